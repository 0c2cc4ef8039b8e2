// Backward: one sub-warp of kLanes lanes computes the gradients of a query and head in one pass
// over its samples. Gradients of points and weights belong to one sample each and are written once;
// those of value are added atomically, in vectors where the machine can.

#pragma once

#include "order.cuh"

namespace msda {

struct BackwardParams {
  Sampling sampling;
  Order order;
  const void* value;        // (B, S, M, D)
  const void* grad_output;  // (B, Q, M * D)
  const void* output;       // (B, Q, M * D); fused only
  Gradient grad_value;      // (B, S, M, D) of acc_t
  Gradient grad_points;     // (B, Q, M, K, 2)
  Gradient grad_weights;    // (B, Q, M, K)
  int32_t head_dim;
  bool points_in_pixels;  // leave grad_points in pixels, for backward_reference_points_kernel
};

// ---- sums over the lanes of a sub-warp ----------------------------------------------------------

// a of this lane and of the lane at distance s, added; the upper one of the two takes b instead.
template <class Real>
MSDA_DEVICE Real exchange(Real a, Real b, bool is_upper, int s) {
  const Real keep = is_upper ? b : a;
  const Real give = is_upper ? a : b;
  return keep + __shfl_xor_sync(kAllLanes, give, s);
}

// f(i) for i = kFirst to kFirst + kCount - 1, each summed over kCount neighbouring lanes; lane i
// gets the sum of f(kFirst + i). It takes kCount - 1 shuffles where kCount sums by themselves would
// take kCount * log2(kCount).
template <int kFirst, int kCount, class F>
MSDA_DEVICE auto sum_transposed(int lane, const F& f) {
  if constexpr (kCount == 1) {
    return f(kFirst);
  } else {
    constexpr int kHalf = kCount / 2;
    const auto a = sum_transposed<kFirst, kHalf>(lane, f);
    const auto b = sum_transposed<kFirst + kHalf, kHalf>(lane, f);
    const bool is_upper = lane & kHalf;
    return decltype(f(0)){
        exchange(a.nw, b.nw, is_upper, kHalf), exchange(a.ne, b.ne, is_upper, kHalf),
        exchange(a.sw, b.sw, is_upper, kHalf), exchange(a.se, b.se, is_upper, kHalf)};
  }
}

template <int kLanes, class Real>
MSDA_DEVICE Real sum_lanes(Real x) {
#pragma unroll
  for (int s = kLanes / 2; s > 0; s /= 2) x += __shfl_xor_sync(kAllLanes, x, s);
  return x;
}

// ---- gradients of one sample --------------------------------------------------------------------

// sum += <g, v>
template <class T, int kVec>
MSDA_DEVICE void add_product(const acc_t<T> (&g)[kVec], const Packed<T, kVec>& v, acc_t<T>& sum) {
#pragma unroll
  for (int i = 0; i < kVec; ++i) sum += g[i] * element(v, i);
}

template <bool kCommon, class Real>
MSDA_DEVICE void write_weight_gradient(const BackwardParams& params, int64_t i, Real grad) {
  if constexpr (kCommon) {
    store(static_cast<Real*>(params.grad_weights.data) + i, grad);
  } else {
    store_number(params.grad_weights, i, grad);
  }
}

// Writes the gradients of sample i of B * Q * M * K. dot: <grad_output, v> of each corner. delta:
// <grad_output, output> of the query and head, for the softmax.
template <bool kFused, bool kCommon, class Real>
MSDA_DEVICE void write_gradients(const BackwardParams& params, int64_t i,
                                 const Sample<Real>& sample, Corners<Real> dot, Real delta) {
  dot.nw = sample.corners & 1u << kNw ? dot.nw : Real(0);
  dot.ne = sample.corners & 1u << kNe ? dot.ne : Real(0);
  dot.sw = sample.corners & 1u << kSw ? dot.sw : Real(0);
  dot.se = sample.corners & 1u << kSe ? dot.se : Real(0);
  const SampleGradient<Real> gradient = sample_gradient(dot, sample.fx, sample.fy);
  if (params.grad_points.is_wanted) {
    // Where no corner was read the steps may be NaN or Inf.
    Pair<Real> grad = {0, 0};
    if (sample.corners != 0 && (kFused || kCommon || !params.sampling.nearest)) {
      grad = {sample.weight * gradient.dx, sample.weight * gradient.dy};
      if (!kFused || !params.points_in_pixels) {
        grad.x *= sample.step_x;
        grad.y *= sample.step_y;
      }
    }
    if constexpr (kCommon) {
      const Real numbers[2] = {grad.x, grad.y};
      store(static_cast<Real*>(params.grad_points.data) + 2 * i, pack<Real>(numbers));
    } else {
      store_pair(params.grad_points, i, grad);
    }
  }
  if (params.grad_weights.is_wanted) {
    // Softmax: grad_logit = p * (grad_p - sum over all samples of p * grad_p), and that sum is
    // <grad_output, output>.
    Real grad = gradient.sample;
    if constexpr (kFused) grad = sample.weight * (grad - delta);
    write_weight_gradient<kCommon>(params, i, grad);
  }
}

// ---- additions to the gradient of value ---------------------------------------------------------

// NOTE [full sectors]
// Memory adds in sectors of 32 bytes, however little of one an instruction adds to. If each lane
// added to the channels whose pixels it reads, which are neighbours, an instruction would add to
// one or two words of each sector. So the lanes of a sub-warp add side by side: each instruction
// adds to one run of channels, width of them to a lane (what one lane adds in one instruction), and
// a lane has a second copy of grad_output, its channels in every run. Where a sub-warp's run is
// shorter than a sector, neighbouring sub-warps are a team, whose lanes all add for one member,
// then for the next.
template <class T, int kVec, int kLanes, bool kExact, bool kCommon>
class ValueGradient {
 public:
  using Real = acc_t<T>;

  // Loads nothing where the gradient of value is not wanted. All lanes of a warp call this
  // together.
  MSDA_DEVICE ValueGradient(const BackwardParams& params, const Head& head,
                            const Lane<kLanes>& self, int head_dim, int channels)
      : wanted_(params.grad_value.is_wanted ? 0xf : 0), head_dim_(head_dim), channels_(channels) {
    first_sub_warp_ = self.sub_warp / members() * members();
    first_channel_ = int(threadIdx.x) % team() * width();
#pragma unroll
    for (int member = 0; member < members(); ++member) {
      int index = head.is_live ? int(head.index()) : -1, m = head.m;
      if (members() > 1) {
        const int lane = (first_sub_warp_ + member) * kLanes;
        index = __shfl_sync(kAllLanes, index, lane);
        m = __shfl_sync(kAllLanes, m, lane);
      }
      const int64_t channel = int64_t(head.b) * params.sampling.num_keys * channels + m * head_dim;
      // As a number: there is no such address where the gradient is not wanted.
      grad_value_[member] =
          reinterpret_cast<Real*>(reinterpret_cast<intptr_t>(params.grad_value.data) +
                                  (channel + first_channel_) * int(sizeof(Real)));
      has_grad_output_[member] = index >= 0 && wanted_ != 0;
      grad_output_[member] =
          static_cast<const T*>(params.grad_output) + int64_t(index) * head_dim + first_channel_;
    }
  }

  // Loads the share of the channels from chunk on, before add(). g: grad_output of the channels
  // whose pixels this lane reads.
  MSDA_DEVICE void load_chunk(int chunk, const Real (&g)[kVec]) {
    rest_ = kExact ? kVec * kLanes : head_dim_ - chunk - first_channel_;
    if (width() == kVec && members() == 1) {  // the same
#pragma unroll
      for (int i = 0; i < kVec; ++i) share_[i] = g[i];
      return;
    }
#pragma unroll
    for (int member = 0; member < members(); ++member) {
#pragma unroll
      for (int i = 0; i < kVec / members(); i += width()) {
        Real* const x = share_ + member * (kVec / members()) + i;
        const bool is_there = has_grad_output_[member] && i * team() < rest_;
        const T* const p = grad_output_[member] + chunk + i * team();
        if (kVec % 4 == 0 && width() == 4) {
          load_numbers<kVec % 4 == 0 ? 4 : 1>(is_there, p, x);
        } else {
          load_numbers<1>(is_there, p, x);
        }
      }
    }
  }

  // The pixels that a sample of a member adds to, and its weights.
  struct Rows {
    Corners<Real> weights;
    uint32_t corners;  // to which it adds
    Real* north;
    Real* south;
  };

  // The rows of sample i of a round.
  MSDA_DEVICE Rows rows(const Round<Real>& round, int i, int member = 0) const {
    const int slot = Lane<kLanes>::slot(first_sub_warp_, member * kLanes + i);
    round.count_get(slot);
    const Place place = round.places[slot];
    constexpr int kBytes = sizeof(Real);
    Real* const north = advance<kCommon>(grad_value_[member], place.key, channels_ * kBytes);
    Real* const south = advance<kCommon>(north, int32_t(place.width()), channels_ * kBytes);
    return {round.weights[slot].weights, place.width_and_corners & wanted_, north, south};
  }

  MSDA_DEVICE void add(const Rows& rows, int chunk, int member = 0) const {
    add_corner(rows.corners & 1u << kNw, rows.north, chunk, rows.weights.nw, member);
    add_corner(rows.corners & 1u << kNe, rows.north, chunk + channels_, rows.weights.ne, member);
    add_corner(rows.corners & 1u << kSw, rows.south, chunk, rows.weights.sw, member);
    add_corner(rows.corners & 1u << kSe, rows.south, chunk + channels_, rows.weights.se, member);
  }

  // Lanes that add side by side, of so many sub-warps.
  static MSDA_DEVICE int team() { return members() * kLanes; }
  static MSDA_DEVICE int members() { return width() == 1 ? kMaxMembers : 1; }

 private:
  static constexpr int kMaxMembers =
      kExact && kLanes * sizeof(Real) < kSectorBytes ? kSectorBytes / (kLanes * sizeof(Real)) : 1;

  static MSDA_DEVICE int width() { return reduction_width<Real, kVec>(); }

  template <int kWidth>
  static MSDA_DEVICE void load_numbers(bool condition, const T* p, Real* x) {
    Packed<T, kWidth> v = {};
    if (condition) v = load<Packed<T, kWidth>>(p);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) x[i] = element(v, i);
  }

  // Where condition is false, row may be no address at all.
  MSDA_DEVICE void add_corner(bool condition, Real* row, int offset, Real weight,
                              int member) const {
    const int count = kVec / members();
    Real scaled[kVec];
#pragma unroll
    for (int i = 0; i < count; ++i) scaled[i] = weight * share_[member * count + i];
#ifndef __CUDACC__
    for (int i = 0; i < count; i += width()) {
      const bool adds = condition && i * team() < rest_;
      msda::count(Access::kReduction, adds ? row + offset + i * team() : nullptr,
                  width() * int(sizeof(Real)));
    }
#endif
    if (!condition) return;
#pragma unroll
    for (int i = 0; i < count; i += width()) {
      if (i * team() < rest_) atomic_add(row + offset + i * team(), scaled + i, width());
    }
  }

  const uint32_t wanted_;  // corners, as of Place
  const int head_dim_, channels_;
  int first_sub_warp_;                 // of the team
  int first_channel_;                  // of this lane, in every run
  int rest_ = 0;                       // channels of the head from there on
  Real* grad_value_[kMaxMembers];      // grad_value[b, 0, m, first_channel_]
  const T* grad_output_[kMaxMembers];  // grad_output[b, q, m, first_channel_]
  bool has_grad_output_[kMaxMembers];
  Real share_[kVec] = {};  // of grad_output, one member after the other
};

// ---- the kernel ---------------------------------------------------------------------------------

// Blocks that a multiprocessor must hold at once; the compiler cuts the registers to that.
template <class T, int kLanes, bool kExact, bool kFused, bool kCommon>
constexpr int backward_blocks() {
  if (sizeof(T) == 8) return 3;
  if (kFused && !kCommon && kLanes == 8 && (sizeof(T) == 2 || !kExact)) return 3;
  return kCommon && !kFused && kLanes > 2 ? 5 : 4;
}

// Template arguments as of forward_kernel.
template <class T, int kVec, int kLanes, bool kExact, bool kFused, bool kCommon>
__global__ void __launch_bounds__(kThreadsPerBlock,
                                  backward_blocks<T, kLanes, kExact, kFused, kCommon>())
    backward_kernel(const __grid_constant__ BackwardParams params) {
  using Real = acc_t<T>;
  using Vector = Packed<T, kVec>;
  __shared__ Round<Real> rounds[kWarpsPerBlock];
  __shared__ DeviceLevel staged_levels[kMaxLevels];
  const DeviceLevel* const levels = stage_levels(params.sampling, staged_levels);

  const Order& order = params.order;
  const Lane<kLanes> self(order.split);
  Round<Real>& round = rounds[self.warp];
  const int num_samples = params.sampling.num_samples;
  const int head_dim = kExact ? kVec * kLanes : params.head_dim;
  const int channels = kCommon ? kCommonChannels : params.sampling.num_heads * head_dim;

  for_each_head<kLanes>(order, params.sampling, [&](const Head& head) {
    const T* const value =  // value[b, 0, m, :], for this lane
        static_cast<const T*>(params.value) +
        int64_t(head.b) * params.sampling.num_keys * channels + head.m * head_dim +
        self.lane * kVec;
    const int64_t first_output = int64_t(head.index()) * head_dim + self.lane * kVec;

    // grad_output[b, q, m, :] of this lane, where one step covers all channels
    Real g[kVec] = {};
    const auto load_g = [&](int chunk) {
      Vector v = {};
      const bool has_channel = head.is_live && (kExact || chunk + self.lane * kVec < head_dim);
      if (has_channel)
        v = load<Vector>(static_cast<const T*>(params.grad_output) + first_output + chunk);
#pragma unroll
      for (int i = 0; i < kVec; ++i) g[i] = element(v, i);
      return has_channel;
    };
    ValueGradient<T, kVec, kLanes, kExact, kCommon> grad_value(params, head, self, head_dim,
                                                               channels);
    if constexpr (kExact) {
      load_g(0);
      grad_value.load_chunk(0, g);
    }

    Real delta = 0;
    if constexpr (kFused) {
#pragma unroll 1
      for (int chunk = 0; chunk < head_dim; chunk += kVec * kLanes) {
        if (!kExact && !load_g(chunk)) continue;
        if (!head.is_live) continue;
        add_product(g, load<Vector>(static_cast<const T*>(params.output) + first_output + chunk),
                    delta);
      }
      delta = sum_lanes<kLanes>(delta);
    }

    Sampler<Real, kFused, kCommon, kLanes> sampler(params.sampling, levels, head, self.lane);
    uint32_t corners = 0;  // any that this lane's samples read
#pragma unroll 1
    for (int first = 0; first < num_samples; first += kLanes * order.split) {
      const int own = first + self.part * kLanes + self.lane;
      const Sample<Real> sample = sampler.prepare(own);
      corners |= sample.corners;
      round.put(self.slot(self.lane), sample);
      __syncwarp();
      // Once for the round: a pixel that is not read may hold what it held before.
      Pixels<Vector> v = {};
      const auto products = [&](int i) {
        Corners<Real> dot = {};
        if (first + (i & ~1) >= num_samples) return dot;
        if (grad_value.members() > 1) round.count_get_place(self.slot(i));
        const Place place = round.places[self.slot(i)];
        const T* const north = advance<kCommon>(value, place.key, channels * int(sizeof(T)));
        const T* const south =
            advance<kCommon>(north, int32_t(place.width()), channels * int(sizeof(T)));
        const auto rows = grad_value.rows(round, i);
#pragma unroll 1
        for (int chunk = 0; chunk < head_dim; chunk += kVec * kLanes) {
          bool has_channel = true;
          if constexpr (!kExact) {
            has_channel = load_g(chunk);
            grad_value.load_chunk(chunk, g);
          }
          load_if(has_channel && place.reads(kNw), north + chunk, v.nw);
          load_if(has_channel && place.reads(kNe), north + chunk + channels, v.ne);
          load_if(has_channel && place.reads(kSw), south + chunk, v.sw);
          load_if(has_channel && place.reads(kSe), south + chunk + channels, v.se);
          grad_value.add(rows, chunk);
#pragma unroll
          for (int member = 1; member < grad_value.members(); ++member) {
            grad_value.add(grad_value.rows(round, i, member), chunk, member);
          }
          if (!has_channel) continue;
          add_product(g, v.nw, dot.nw);
          add_product(g, v.ne, dot.ne);
          add_product(g, v.sw, dot.sw);
          add_product(g, v.se, dot.se);
        }
        return dot;
      };
      const Corners<Real> dot = sum_transposed<0, kLanes>(self.lane, products);
      if (head.is_live && own < num_samples) {
        const int64_t i = int64_t(head.index()) * num_samples + own;
        write_gradients<kFused, kCommon>(params, i, sample, dot, delta);
      }
      __syncwarp();
    }

    // Where no sample of a head counts, its output is 0, and a NaN of grad_output makes delta NaN.
    // It must not reach the gradient of the weights then.
    if constexpr (kFused) {
      if (!__any_sync(kAllLanes, delta != delta)) return;
      for (int s = 1; s < kLanes * order.split; s *= 2) {
        corners |= __shfl_xor_sync(kAllLanes, corners, s);
      }
      if (corners != 0 || !(delta != delta) || !params.grad_weights.is_wanted) return;
      for (int own = self.part * kLanes + self.lane; own < num_samples;
           own += kLanes * order.split) {
        const int64_t i = int64_t(head.index()) * num_samples + own;
        write_weight_gradient<kCommon>(params, i, 0 * sampler.weight_scale());
      }
    }
  });
}

// ---- gradients of the reference points ----------------------------------------------------------

// One thread for each reference point: sums the gradients, in pixels, of its samples, in their
// order, and turns them into gradients of the offsets.
template <class Real>
__global__ void __launch_bounds__(kThreadsPerBlock)
    backward_reference_points_kernel(const __grid_constant__ BackwardParams params,
                                     const __grid_constant__ Array grad_reference_points,
                                     const uint32_t num_references) {
  __shared__ DeviceLevel staged_levels[kMaxLevels];
  const Sampling& sampling = params.sampling;
  const DeviceLevel* const levels = stage_levels(sampling, staged_levels);
  const uint32_t reference = blockIdx.x * kThreadsPerBlock + threadIdx.x;  // of B * Q * L
  if (reference >= num_references) return;
  const int64_t query = reference / uint32_t(sampling.reference_levels);
  const int own_level = int(reference % uint32_t(sampling.reference_levels));
  const bool is_shared = sampling.reference_levels == 1, is_box = sampling.reference_size == 4;
  const int first_level = is_shared ? 0 : own_level;
  const int last_level = is_shared ? sampling.num_levels : own_level + 1;

  const int64_t first = int64_t(reference) * sampling.reference_size;
  Pair<Real> extent = {0, 0};  // width and height of a box
  if (is_box) {
    extent.x = load_number<Real>(sampling.reference_points, first + 2);
    extent.y = load_number<Real>(sampling.reference_points, first + 3);
  }
  Real* const grad_points = static_cast<Real*>(params.grad_points.data);
  Pair<Real> grad_centre = {0, 0}, grad_extent = {0, 0};
  for (int m = 0; m < sampling.num_heads; ++m) {
    const int64_t first_sample = (query * sampling.num_heads + m) * sampling.num_samples;
    for (int l = first_level; l < last_level; ++l) {
      count_struct(Access::kLoad, levels[l]);
      const int begin = l == 0 ? 0 : levels[l - 1].samples_end, end = levels[l].samples_end;
      const Real width = Real(levels[l].width), height = Real(levels[l].height);
      const Real half_over_points = Real(levels[l].half_over_points);
      // As Sampler has them: the gradient of the offsets is that of a call without this kernel.
      const Real step_x = width * extent.x * half_over_points;
      const Real step_y = height * extent.y * half_over_points;
      for (int64_t i = first_sample + begin; i < first_sample + end; ++i) {
        count(Access::kLoad, grad_points + 2 * i, 2 * sizeof(Real));
        const Real x = grad_points[2 * i], y = grad_points[2 * i + 1];
        // A sample that does not count may have offsets or boxes that are NaN or Inf.
        if (x == 0 && y == 0) continue;
        grad_centre.x += x * width;
        grad_centre.y += y * height;
        if (!is_box) continue;
        const Pair<Real> offset = load_pair<Real>(sampling.points, i);
        grad_extent.x += x * (width * half_over_points) * offset.x;
        grad_extent.y += y * (height * half_over_points) * offset.y;
        count(Access::kStore, grad_points + 2 * i, 2 * sizeof(Real));
        grad_points[2 * i] = x * step_x;
        grad_points[2 * i + 1] = y * step_y;
      }
    }
  }
  store_number(grad_reference_points, first, grad_centre.x);
  store_number(grad_reference_points, first + 1, grad_centre.y);
  if (is_box) {
    store_number(grad_reference_points, first + 2, grad_extent.x);
    store_number(grad_reference_points, first + 3, grad_extent.y);
  }
}

}  // namespace msda
