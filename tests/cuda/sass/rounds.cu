// Small kernels whose machine code the tests read. The listings beside this file are
//   nvcc -std=c++17 -O3 -arch=sm_90 -cubin -o rounds.cubin rounds.cu
//   (nvdisasm -c rounds.cubin; cuobjdump -res-usage rounds.cubin) | tr -s ' ' > rounds.sm_90.sass

#include <cstdint>

enum Kind { kPlain, kRolled, kSwitch, kAdd, kShuffle, kSpill };

struct alignas(16) Sample {
  int32_t key;
  uint32_t corners;
  float weight;
  float unused;
};

template <int kVec>
struct alignas(4 * kVec) Packed {
  float x[kVec];
};

__device__ float read_number(const void* p, int i, int type) {
  switch (type) {
    case 0:
      return static_cast<const float*>(p)[i];
    case 1:
      return float(static_cast<const double*>(p)[i]);
    case 2:
      return float(static_cast<const int16_t*>(p)[i]);
    default:
      return float(static_cast<const int32_t*>(p)[i]);
  }
}

__device__ void add(float* p, const Packed<4>& v) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(p), "f"(v.x[0]), "f"(v.x[1]),
               "f"(v.x[2]), "f"(v.x[3])
               : "memory");
#else
  for (int i = 0; i < 4; ++i) atomicAdd(p + i, v.x[i]);
#endif
}

// A round: each lane prepares one sample, then each kLanes lanes gather kLanes of them.
template <class T, int kVec, int kLanes, Kind kKind>
__global__ void __launch_bounds__(32) round_kernel(const Packed<kVec>* value, const void* weights,
                                                   Packed<kVec>* output, int count, int type) {
  __shared__ Sample samples[32];
  const int lane = threadIdx.x;
  Packed<kVec> v[4] = {}, sum = {};
  // Lanes of kShuffle leave the loop at different times, for all the compiler knows.
#pragma unroll 1
  for (int first = kKind == kShuffle ? lane : 0; first < count; first += 32) {
    const int i = kKind == kShuffle ? first : first + lane;
    const float weight =
        kKind == kSwitch ? read_number(weights, i, type) : static_cast<const float*>(weights)[i];
    samples[lane] = {int(weight), uint32_t(weight) & 15, weight, 0};
    __syncwarp();
#pragma unroll(kKind == kRolled ? 1 : kLanes)
    for (int j = 0; j < kLanes; ++j) {
      const Sample sample = samples[lane / kLanes * kLanes + j];
      for (int c = 0; c < 4; ++c) {
        if (sample.corners >> c & 1) v[c] = value[sample.key + 64 * c];
      }
      for (int c = 0; c < 4; ++c) {
        if (!(sample.corners >> c & 1)) continue;
        for (int k = 0; k < kVec; ++k) sum.x[k] += sample.weight * v[c].x[k];
      }
      if constexpr (kKind == kAdd) add(output[sample.key].x, sum);
    }
    if (kKind == kShuffle) sum.x[0] += __shfl_xor_sync(~0u, sum.x[0], 1);
    __syncwarp();
  }
  if (kKind == kSpill) {
    float table[32];
#pragma unroll 1
    for (int i = 0; i < type; ++i) table[i] = output[i].x[0];
    sum.x[0] += table[count];
  }
  output[lane] = sum;
}

#define MSDA_INSTANTIATE(vec, kind)                                                           \
  template __global__ void round_kernel<float, vec, 2, kind>(const Packed<vec>*, const void*, \
                                                             Packed<vec>*, int, int)
MSDA_INSTANTIATE(4, kPlain);
MSDA_INSTANTIATE(4, kAdd);
MSDA_INSTANTIATE(2, kShuffle);
#if __CUDA_ARCH__ == 900
MSDA_INSTANTIATE(2, kRolled);
MSDA_INSTANTIATE(2, kSwitch);
MSDA_INSTANTIATE(2, kSpill);
#endif
