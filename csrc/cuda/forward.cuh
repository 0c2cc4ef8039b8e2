// Forward: one sub-warp of kLanes lanes computes the kVec * kLanes channels of a query and head.

#pragma once

#include "order.cuh"

namespace msda {

struct ForwardParams {
  Sampling sampling;
  Order order;
  const void* value;  // (B, S, M, D)
  void* output;       // (B, Q, M * D)
  int32_t head_dim;
};

// Blocks that a multiprocessor must hold at once; the compiler cuts the registers to that.
template <class T, int kLanes, bool kFused, bool kCommon>
constexpr int forward_blocks() {
  if (sizeof(T) == 8) return 4;
  if (kLanes < 4) return kFused ? 5 : 6;
  return kCommon ? 8 : 6;
}

// kExact: D == kVec * kLanes. Else a sub-warp takes several steps over the channels.
// kCommon: as of Sampler, and M * D == kCommonChannels.
template <class T, int kVec, int kLanes, bool kExact, bool kFused, bool kCommon>
__global__ void __launch_bounds__(kThreadsPerBlock, forward_blocks<T, kLanes, kFused, kCommon>())
    forward_kernel(const __grid_constant__ ForwardParams params) {
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
  const int key_stride =
      (kCommon ? kCommonChannels : params.sampling.num_heads * head_dim) * int(sizeof(T));

  for_each_head<kLanes>(order, params.sampling, [&](const Head& head) {
    const T* const value =  // value[b, 0, m, :]
        static_cast<const T*>(params.value) +
        (int64_t(head.b) * params.sampling.num_keys * params.sampling.num_heads + head.m) *
            head_dim;

#pragma unroll 1
    for (int chunk = 0; chunk < head_dim; chunk += kVec * kLanes) {
      const int channel = chunk + self.lane * kVec;
      const bool has_channel = kExact || channel < head_dim;
      Sampler<Real, kFused, kCommon, kLanes> sampler(params.sampling, levels, head, self.lane);
      const char* const base = reinterpret_cast<const char*>(value + channel);
      Real sum[kVec] = {};
#pragma unroll 1
      for (int first = 0; first < num_samples; first += kLanes * order.split) {
        round.put(self.slot(self.lane), sampler.prepare(first + self.part * kLanes + self.lane));
        __syncwarp();
        // Once for the round: a pixel that is not read may hold what it held before. Setting it to
        // zero for each sample would cost as much as reading it.
        Pixels<Vector> v = {};
#pragma unroll
        for (int i = 0; i < kLanes; ++i) {
          if (i % 2 == 0 && first + i >= num_samples) break;
          round.count_get(self.slot(i));
          const Corners<Real> weights = round.weights[self.slot(i)].weights;
          const Place place = round.places[self.slot(i)];
          const char* const north = advance<kCommon>(base, place.key, key_stride);
          const char* const south = advance<kCommon>(north, int32_t(place.width()), key_stride);
          const bool nw = has_channel && place.reads(kNw), ne = has_channel && place.reads(kNe);
          const bool sw = has_channel && place.reads(kSw), se = has_channel && place.reads(kSe);
          load_if(nw, north, v.nw);
          load_if(ne, north + key_stride, v.ne);
          load_if(sw, south, v.sw);
          load_if(se, south + key_stride, v.se);
          multiply_add_if(nw, weights.nw, v.nw, sum);
          multiply_add_if(ne, weights.ne, v.ne, sum);
          multiply_add_if(sw, weights.sw, v.sw, sum);
          multiply_add_if(se, weights.se, v.se, sum);
        }
        __syncwarp();
      }

      for (int s = kLanes; s < kLanes * order.split; s *= 2) {
#pragma unroll
        for (int i = 0; i < kVec; ++i) sum[i] += __shfl_xor_sync(kAllLanes, sum[i], s);
      }
      if (head.is_live && has_channel && self.part == 0) {
        store(static_cast<T*>(params.output) + int64_t(head.index()) * head_dim + channel,
              pack<T>(sum));
      }
    }
  });
}

}  // namespace msda
