// Backward on the CPU: all gradients in one pass over the samples. Compiled once per instruction
// set.
//
// grad_value is a scatter: many samples add to one pixel. A task owns one head of one image (or one
// level of it), so no other thread writes to its pixels, and it visits the queries in order: no
// atomics, and the same bits for any number of threads.

#include "kernels.h"
#include "samples.h"

namespace msda {
namespace MSDA_CPU_CAPABILITY {
namespace {

// Packed: value and the sums of grad_value are copies of one head's pixels, next to each other.
// Otherwise value is read where it is, and the sums lie in grad_value or in a copy.
template <class T, bool kPacked>
using PackedSamples = Samples<acc_t<T>, std::conditional_t<kPacked, index_t<acc_t<T>>, int64_t>>;

// One query and head, kVectors vectors of channels or `channels` lanes of one (kPartial):
// adds weight * grad_output to the pixels read by forward, and adds to dots[4 * i + c] the product
// <grad_output, value> of sample i and corner c over these channels.
//   value: value[b, 0, m, d:]   grad_output: grad_output[b, q, m * D + d:]
//   grad_value: the sum's place for key 0, channel d, of the head
template <class T, bool kPacked, int kVectors, bool kPartial, bool kDots, bool kScatter>
void backward_channels(const PackedSamples<T, kPacked>& samples, const T* value,
                       const T* grad_output, int channels, acc_t<T>* grad_value, acc_t<T>* dots,
                       bool first_channels) {
  using Real = acc_t<T>;
  // Rows next to each other in both: what differs is how wide a number is.
  constexpr int kGradScale = kPacked ? sizeof(Real) / sizeof(T) : 1;
  constexpr int kStep = kLanes<Real>;
  Vec<Real> g[kVectors];
  for (int k = 0; k < kVectors; ++k) {
    g[k] = kPartial ? load_partial(grad_output, channels) : load(grad_output + k * kStep);
  }

  const auto prepared = samples.prepared();
  const int64_t count = samples.count();
  for (int64_t i = 0; i < count; i += kStep) {
    const int group = int(count - i < kStep ? count - i : kStep);
    const auto* const value_offset = prepared.value_offset + kNumCorners * i;
    const auto* const grad_offset =
        kPacked ? value_offset : samples.grad_offset() + kNumCorners * i;
    const Real* const weight = prepared.corner_weight + kNumCorners * i;
    Vec<Real> weights[kNumCorners];
    for (int c = 0; c < kNumCorners; ++c) weights[c] = load(weight + c * kStep);
    IntVec<Real> index = {};
    // So many samples at once that their sums fill a vector: a whole vector that was stored can be
    // loaded before it has reached the cache. Samples past the last do not count.
    for (int j = 0; j < group; j += kQuads<Real>) {
      Vec<Real> dot[kQuads<Real>][kNumCorners] = {};
      MSDA_UNROLL for (int s = 0; s < kQuads<Real>; ++s, index += 1) {
        MSDA_UNROLL for (int c = 0; c < kNumCorners; ++c) {
          const int n = c * kStep + j + s;
          if constexpr (kDots) {
            const T* const pixel = at_distance(value, value_offset[n]);
            MSDA_UNROLL for (int k = 0; k < kVectors; ++k) {
              dot[s][c] +=
                  g[k] * (kPartial ? load_partial(pixel, channels) : load(pixel + k * kStep));
            }
          }
          if constexpr (kScatter) {
            Real* const pixel = at_distance(grad_value, int64_t(grad_offset[n]) * kGradScale);
            const Vec<Real> w = broadcast_lane(weights[c], index, weight + c * kStep, j + s);
            MSDA_UNROLL for (int k = 0; k < kVectors; ++k) {
              Real* const p = pixel + k * kStep;
              if constexpr (kPartial) {
                store_partial(p, load_partial(p, channels) + g[k] * w, channels);
              } else {
                store(p, load(p) + g[k] * w);
              }
            }
          }
        }
      }
      if constexpr (kDots) store_lane_sums(dots + kNumCorners * (i + j), dot, !first_channels);
    }
  }
}

// Walks the channels of one query and head in as few passes as the vectors allow.
template <class T, bool kPacked, bool kDots, bool kScatter>
void backward_all_channels(const PackedSamples<T, kPacked>& samples, const T* value,
                           const T* grad_output, int64_t head_dim, acc_t<T>* grad_value,
                           acc_t<T>* dots) {
  constexpr int kStep = kLanes<acc_t<T>>;
  const auto run = [&](auto vectors, auto partial, int64_t d) {
    backward_channels<T, kPacked, decltype(vectors)::value, decltype(partial)::value, kDots,
                      kScatter>(samples, value + d, grad_output + d, int(head_dim - d),
                                grad_value + (kScatter ? d : 0), dots, d == 0);
  };
  constexpr std::bool_constant<false> whole;
  constexpr std::bool_constant<true> partial;
  int64_t d = 0;
  for (; d + 4 * kStep <= head_dim; d += 4 * kStep) run(std::integral_constant<int, 4>(), whole, d);
  for (; d + 2 * kStep <= head_dim; d += 2 * kStep) run(std::integral_constant<int, 2>(), whole, d);
  for (; d + kStep <= head_dim; d += kStep) run(std::integral_constant<int, 1>(), whole, d);
  if (d < head_dim) run(std::integral_constant<int, 1>(), partial, d);
}

// The gradients of levels first_level to last_level - 1 of one head of one image after the other.
template <class T, bool kPacked>
class Backward {
 public:
  using Real = acc_t<T>;

  // has_all_levels: the gradients of a softmax can be completed.
  Backward(const Problem& problem, const BackwardInputs& inputs, const BackwardOutputs& outputs,
           int64_t first_level, int64_t last_level, bool has_all_levels)
      : problem_(problem),
        inputs_(inputs),
        outputs_(outputs),
        has_all_levels_(has_all_levels),
        first_key_(problem.levels[first_level].start),
        num_keys_(problem.levels[last_level - 1].start +
                  problem.levels[last_level - 1].height * problem.levels[last_level - 1].width -
                  first_key_),
        num_sums_(outputs.grad_value.is_wanted && !sums_in_place(problem) ? num_keys_ : 0),
        samples_(problem, first_level, last_level, 1, true),
        dots_(4 * samples_.padded()),
        points_(2 * samples_.padded()),
        weights_(samples_.padded()),
        copy_(problem, first_key_, kPacked ? num_keys_ : 0),
        sums_((num_sums_ + 1) * problem.head_dim) {
    std::memset(dots_.get(), 0, 4 * samples_.padded() * sizeof(Real));
    std::memset(spare_row(), 0, problem.head_dim * sizeof(Real));
  }

  // Head m of image b.
  void run(int64_t b, int64_t m) {
    const int64_t M = problem_.num_heads, D = problem_.head_dim;
    // value[b, 0, m, :]
    const T* value =
        static_cast<const T*>(problem_.value.data) + (b * problem_.num_keys * M + m) * D;
    Rows value_rows{M * D * int64_t(sizeof(T)), 0, distance(value, copy_.get())};
    if (kPacked) {
      copy_.read(b, m);
      value = copy_.get();
      value_rows = copy_.rows();
    }
    // The sums of the pixels' gradients: in place, or next to each other.
    Real* grad_value = nullptr;
    Rows grad_rows{};
    if (num_sums_ > 0) {
      std::memset(sums_.get(), 0, num_sums_ * D * sizeof(Real));
      grad_value = sums_.get();
      grad_rows = {D * int64_t(sizeof(Real)), first_key_, distance(grad_value, spare_row())};
    } else if (outputs_.grad_value.is_wanted) {
      grad_value =
          static_cast<Real*>(outputs_.grad_value.data) + (b * problem_.num_keys * M + m) * D;
      grad_rows = {M * D * int64_t(sizeof(Real)), 0, distance(grad_value, spare_row())};
    }
    for (int64_t q = 0; q < problem_.num_queries; ++q) {
      samples_.set_query(b, q);
      const bool has_grad_rows = !kPacked && outputs_.grad_value.is_wanted;
      samples_.prepare(b, q, m, value_rows, has_grad_rows ? &grad_rows : nullptr);
      query(b, q, m, value, grad_value);
    }
    if (num_sums_ > 0) write_sums(b, m);
  }

 private:
  // A row past the sums: the kernels add there what must reach no pixel, and nobody reads it.
  Real* spare_row() { return sums_.get() + num_sums_ * problem_.head_dim; }

  void write_sums(int64_t b, int64_t m) {
    const int64_t M = problem_.num_heads, D = problem_.head_dim;
    T* const grad_value = static_cast<T*>(outputs_.grad_value.data) +
                          ((b * problem_.num_keys + first_key_) * M + m) * D;
    for (int64_t key = 0; key < num_keys_; ++key) {
      convert(sums_.get() + key * D, grad_value + key * M * D, D);
    }
  }

  void query(int64_t b, int64_t q, int64_t m, const T* value, Real* grad_value) {
    const int64_t D = problem_.head_dim;
    const int64_t head = (b * problem_.num_queries + q) * problem_.num_heads + m;
    const T* const grad_output = static_cast<const T*>(inputs_.grad_output.data) + head * D;
    prefetch_next(head + rows_ahead(problem_));
    const bool wants_dots = outputs_.grad_points.is_wanted || outputs_.grad_weights.is_wanted;
    const auto run = [&](auto with_dots, auto with_scatter) {
      backward_all_channels<T, kPacked, decltype(with_dots)::value, decltype(with_scatter)::value>(
          samples_, value, grad_output, D, grad_value, dots_.get());
    };
    constexpr std::bool_constant<false> no;
    constexpr std::bool_constant<true> yes;
    const bool wants_value = outputs_.grad_value.is_wanted;
    if (wants_dots && wants_value) {
      run(yes, yes);
    } else if (wants_dots) {
      run(yes, no);
    } else if (wants_value) {
      run(no, yes);
    }
    if (wants_dots) write_sample_gradients(head);
  }

  void prefetch_next(int64_t head) {
    const int64_t D = problem_.head_dim, samples = head * problem_.num_samples + samples_.begin();
    prefetch<false>(inputs_.grad_output, head * D, D);
    if (outputs_.grad_points.is_wanted) {
      prefetch<true>(outputs_.grad_points, 2 * samples, 2 * samples_.count());
    }
    if (outputs_.grad_weights.is_wanted) {
      prefetch<true>(outputs_.grad_weights, samples, samples_.count());
    }
  }

  // The gradients of points and weights, each of which belongs to one sample alone.
  void write_sample_gradients(int64_t head) {
    const bool in_pixels = outputs_.grad_reference_points.is_wanted;
    for (int64_t i = 0; i < samples_.padded(); i += kLanes<Real>) {
      Corners<Vec<Real>> dot;
      load_quads(dots_.get() + 4 * i, dot.nw, dot.ne, dot.sw, dot.se);
      const IntVec<Real> corners = load_as<IntVec<Real>>(samples_.corners() + i);
      dot.nw = (corners & (1 << kNw)) != 0 ? dot.nw : Vec<Real>{};
      dot.ne = (corners & (1 << kNe)) != 0 ? dot.ne : Vec<Real>{};
      dot.sw = (corners & (1 << kSw)) != 0 ? dot.sw : Vec<Real>{};
      dot.se = (corners & (1 << kSe)) != 0 ? dot.se : Vec<Real>{};
      const SampleGradient<Vec<Real>> gradient =
          sample_gradient(dot, load(samples_.fx() + i), load(samples_.fy() + i));
      const Vec<Real> attention = load(samples_.attention() + i);
      Vec<Real> grad_x = {}, grad_y = {};
      if (!problem_.nearest) {
        grad_x = attention * gradient.dx;
        grad_y = attention * gradient.dy;
        if (!in_pixels) {
          grad_x *= load(samples_.x().step.get() + i);
          grad_y *= load(samples_.y().step.get() + i);
        }
        // Where no corner was read the step may be NaN or Inf.
        grad_x = corners != 0 ? grad_x : Vec<Real>{};
        grad_y = corners != 0 ? grad_y : Vec<Real>{};
      }
      store_pairs(points_.get() + 2 * i, grad_x, grad_y);
      store(weights_.get() + i, gradient.sample);
    }
    const int64_t first_sample = head * problem_.num_samples + samples_.begin();
    if (outputs_.grad_points.is_wanted) {
      write(outputs_.grad_points, 2 * first_sample, 2 * samples_.count(), points_.get());
    }
    if (outputs_.grad_weights.is_wanted) {
      if (problem_.is_fused && has_all_levels_) {
        softmax_backward(samples_.weights(), weights_.get(), samples_.count());
      }
      write(outputs_.grad_weights, first_sample, samples_.count(), weights_.get());
    }
  }

  const Problem& problem_;
  const BackwardInputs& inputs_;
  const BackwardOutputs& outputs_;
  const bool has_all_levels_;
  const int64_t first_key_, num_keys_;  // of the levels
  const int64_t num_sums_;              // as many, or 0 where grad_value is summed in place
  PackedSamples<T, kPacked> samples_;
  Buffer<Real> dots_, points_, weights_;
  HeadRows<T> copy_;
  Buffer<Real> sums_;
};

template <class T, bool kPacked>
void backward_tasks(const Problem& problem, const BackwardInputs& inputs,
                    const BackwardOutputs& outputs, bool by_level, int64_t first, int64_t last) {
  const int64_t M = problem.num_heads, L = problem.num_levels;
  if (by_level) {
    for (int64_t task = first; task < last; ++task) {
      const int64_t l = task % L, head = task / L;
      Backward<T, kPacked>(problem, inputs, outputs, l, l + 1, false).run(head / M, head % M);
    }
    return;
  }
  Backward<T, kPacked> backward(problem, inputs, outputs, 0, L, true);
  for (int64_t head = first; head < last; ++head) backward.run(head / M, head % M);
}

// grad_weights: (B, Q, M, K), of the softmax's result.
template <class Real>
void backward_softmax_rows(const Problem& problem, const ConstArray& grad_weights,
                           const BackwardOutputs& outputs, int64_t first, int64_t last) {
  const int64_t K = problem.num_samples, padded = round_up(K, kLanes<Real>);
  Buffer<Real> weights(padded), gradients(padded);
  for (int64_t row = first; row < last; ++row) {
    read(problem.weights, row * K, K, weights.get());
    softmax(weights.get(), 1, padded, K);
    read(grad_weights, row * K, K, gradients.get());
    for (int64_t i = K; i < padded; ++i) gradients[i] = 0;  // the last row's may be NaN
    softmax_backward(weights.get(), gradients.get(), K);
    write(outputs.grad_weights, row * K, K, gradients.get());
  }
}

// Heads are added up sample by sample first, whole vectors at a time, and levels at the end.
template <class Real>
void backward_reference_points_rows(const Problem& problem, const BackwardOutputs& outputs,
                                    int64_t first, int64_t last) {
  constexpr int kStep = kLanes<Real>;
  const int64_t M = problem.num_heads, K = problem.num_samples;
  const int64_t size = problem.reference_size, levels = problem.reference_levels;
  const bool is_box = size == 4;
  const ConstArray in_pixels{outputs.grad_points.data, outputs.grad_points.dtype};
  Samples<Real, int64_t> samples(problem, 0, problem.num_levels, 1, true);
  const int64_t padded = round_up(2 * K, kStep);
  Buffer<Real> grad_points(padded), offsets(padded), steps(padded);  // (K, 2) and more
  Buffer<Real> sums(padded), sums_by_offset(padded);                 // over the heads
  Buffer<Real> grad_reference(levels * size);
  for (Buffer<Real>* buffer : {&grad_points, &offsets, &steps}) {
    std::memset(buffer->get(), 0, padded * sizeof(Real));
  }
  for (int64_t row = first; row < last; ++row) {
    if (is_box) {
      samples.set_query(row / problem.num_queries, row % problem.num_queries);
      for (int64_t i = 0; i < K; ++i) {
        steps[2 * i] = samples.x().step[i];
        steps[2 * i + 1] = samples.y().step[i];
      }
    }
    std::memset(sums.get(), 0, padded * sizeof(Real));
    std::memset(sums_by_offset.get(), 0, padded * sizeof(Real));
    for (int64_t m = 0; m < M; ++m) {
      const int64_t first_number = 2 * (row * M + m) * K;
      prefetch<false>(in_pixels, first_number + 2 * rows_ahead(problem) * K, 2 * K);
      read(in_pixels, first_number, 2 * K, grad_points.get());
      if (is_box) read(problem.points, first_number, 2 * K, offsets.get());
      for (int64_t i = 0; i < padded; i += kStep) {
        const Vec<Real> gradient = load(grad_points.get() + i);
        store(sums.get() + i, load(sums.get() + i) + gradient);
        if (!is_box) continue;
        // A sample that does not count may have offsets or boxes that are NaN or Inf.
        const IntVec<Real> counts = gradient != 0;
        const Vec<Real> by_offset = gradient * load(offsets.get() + i);
        store(sums_by_offset.get() + i,
              load(sums_by_offset.get() + i) + (counts ? by_offset : Vec<Real>{}));
        const Vec<Real> complete = gradient * load(steps.get() + i);
        store(grad_points.get() + i, counts ? complete : Vec<Real>{});
      }
      // Offsets from points are in pixels already.
      if (is_box) write(outputs.grad_points, first_number, 2 * K, grad_points.get());
    }
    std::memset(grad_reference.get(), 0, levels * size * sizeof(Real));
    int64_t i = 0;
    for (int64_t l = 0; l < problem.num_levels; ++l) {
      const Level& level = problem.levels[l];
      const Real width = Real(level.width), height = Real(level.height);
      const Real half_over_points = Real(0.5) / Real(level.num_points > 0 ? level.num_points : 1);
      Real* const grad_point = grad_reference.get() + (levels == 1 ? 0 : l) * size;
      for (int64_t p = 0; p < level.num_points; ++p, ++i) {
        grad_point[0] += sums[2 * i] * width;
        grad_point[1] += sums[2 * i + 1] * height;
        if (!is_box) continue;
        grad_point[2] += sums_by_offset[2 * i] * width * half_over_points;
        grad_point[3] += sums_by_offset[2 * i + 1] * height * half_over_points;
      }
    }
    write(outputs.grad_reference_points, row * levels * size, levels * size, grad_reference.get());
  }
}

}  // namespace

void backward(const Problem& problem, const BackwardInputs& inputs, const BackwardOutputs& outputs,
              bool by_level, int64_t first, int64_t last) {
  if (!outputs.has_wanted()) return;
  dispatch_dtype(problem.value.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Real = acc_t<T>;
    if (packs_pixels(problem, problem.num_queries) && fits<index_t<Real>>(problem, sizeof(Real))) {
      backward_tasks<T, true>(problem, inputs, outputs, by_level, first, last);
    } else {
      backward_tasks<T, false>(problem, inputs, outputs, by_level, first, last);
    }
  });
}

void backward_softmax(const Problem& problem, const ConstArray& grad_weights,
                      const BackwardOutputs& outputs, int64_t first, int64_t last) {
  dispatch_dtype(problem.value.dtype, [&](auto* type) {
    backward_softmax_rows<acc_t<std::remove_pointer_t<decltype(type)>>>(problem, grad_weights,
                                                                        outputs, first, last);
  });
}

void backward_reference_points(const Problem& problem, const BackwardOutputs& outputs,
                               int64_t first, int64_t last) {
  dispatch_dtype(problem.value.dtype, [&](auto* type) {
    backward_reference_points_rows<acc_t<std::remove_pointer_t<decltype(type)>>>(problem, outputs,
                                                                                 first, last);
  });
}

}  // namespace MSDA_CPU_CAPABILITY
}  // namespace msda
