// The gradient of value without atomic additions, for the same bits in every run: samples are
// sorted by the cell that they lie in, and each pixel then gathers from its four cells, in that
// order.
//
//   1. sample_cells_kernel writes, for each sample, its cell and its four corner weights
//   2. the caller sorts the cells, stably
//   3. gather_kernel sums: each pixel is written once
//
// Cells of one level form a map of (H + 1) x (W + 1), the first of each row and column lying beyond
// the edge; those of one image and head are numbered level by level, below kCellsPerKey * S.

#pragma once

#include "order.cuh"

namespace msda {

constexpr int64_t kCellsPerKey = 4;  // (H + 1) * (W + 1) <= 4 * H * W

// Cells of the levels before this one.
MSDA_DEVICE int64_t cells_before(const DeviceLevel* levels, int level) {
  int64_t cells = 0;
  for (int l = 0; l < level; ++l) {
    count_struct(Access::kLoad, levels[l]);
    cells += (levels[l].height + int64_t(1)) * (levels[l].width + 1);
  }
  return cells;
}

struct SampleCellsParams {
  Sampling sampling;
  Order order;
  int64_t* cells;  // (B, Q, M, K)
  void* weights;   // (B, Q, M, K) of CornerWeights
};

template <class Real, int kLanes, bool kFused>
__global__ void __launch_bounds__(kThreadsPerBlock)
    sample_cells_kernel(const __grid_constant__ SampleCellsParams params) {
  __shared__ DeviceLevel staged_levels[kMaxLevels];
  const Sampling& sampling = params.sampling;
  const DeviceLevel* const levels = stage_levels(sampling, staged_levels);
  const Lane<kLanes> self(1);
  const int64_t cells_per_head = kCellsPerKey * sampling.num_keys;

  for_each_head<kLanes>(params.order, sampling, [&](const Head& head) {
    Sampler<Real, kFused, false, kLanes> sampler(sampling, levels, head, self.lane);
    if (!head.is_live) return;
    for (int k = self.lane; k < sampling.num_samples; k += kLanes) {
      const Sample<Real> sample = sampler.prepare(k);
      const int64_t i = int64_t(head.index()) * sampling.num_samples + k;
      int64_t cell = -1;  // counts for no pixel
      if (sample.corners != 0) {
        cell = (int64_t(head.b) * sampling.num_heads + head.m) * cells_per_head +
               cells_before(levels, sample.level) +
               (sample.y0 + 1) * (levels[sample.level].width + int64_t(1)) + sample.x0 + 1;
      }
      store(params.cells + i, cell);
      CornerWeights<Real>& weights = static_cast<CornerWeights<Real>*>(params.weights)[i];
      count_struct(Access::kStore, weights);
      weights = weights_of(sample);
    }
  });
}

struct GatherParams {
  Sampling sampling;
  const int64_t* sorted_cells;  // (N), N = B * Q * M * K
  const int64_t* sample_order;  // (N): samples in the order of sorted_cells
  const void* weights;          // (B, Q, M, K) of CornerWeights
  const void* grad_output;      // (B, Q, M * D)
  void* grad_value;             // (B, S, M, D) of acc_t
  int64_t num_pixels;           // B * S * M
  int64_t num_sorted;           // N
  int32_t head_dim;
};

// The first place of sorted_cells that holds cell or more.
MSDA_DEVICE int64_t lower_bound(const GatherParams& params, int64_t cell) {
  int64_t first = 0, last = params.num_sorted;
  while (first < last) {
    const int64_t middle = first + (last - first) / 2;
    if (load<int64_t>(params.sorted_cells + middle) < cell) {
      first = middle + 1;
    } else {
      last = middle;
    }
  }
  return first;
}

// kLanes lanes for each pixel of each head.
template <class T, int kVec, int kLanes>
__global__ void __launch_bounds__(kThreadsPerBlock)
    gather_kernel(const __grid_constant__ GatherParams params) {
  using Real = acc_t<T>;
  using Vector = Packed<T, kVec>;
  __shared__ DeviceLevel staged_levels[kMaxLevels];
  const Sampling& sampling = params.sampling;
  const DeviceLevel* const levels = stage_levels(sampling, staged_levels);
  const int64_t pixel =  // of B * S * M
      int64_t(blockIdx.x) * (kThreadsPerBlock / kLanes) + threadIdx.x / kLanes;
  if (pixel >= params.num_pixels) return;
  const int lane = int(threadIdx.x) % kLanes;
  const int m = int(pixel % sampling.num_heads);
  const int64_t row = pixel / sampling.num_heads;  // of B * S
  const int64_t b = row / sampling.num_keys;
  const int key = int(row % sampling.num_keys);
  const bool is_padding =
      sampling.has_padding_mask && load<uint8_t>(sampling.padding_mask + row) != 0;

  int l = 0;
  while (l + 1 < sampling.num_levels && key >= levels[l + 1].start) ++l;
  count_struct(Access::kLoad, levels[l]);
  const int64_t cells_across = levels[l].width + 1;
  const int y = (key - levels[l].start) / levels[l].width;
  const int x = (key - levels[l].start) % levels[l].width;
  // The cell whose north-west corner the pixel is; it is the south-east one of that before it in
  // both directions.
  const int64_t own = (b * sampling.num_heads + m) * kCellsPerKey * sampling.num_keys +
                      cells_before(levels, l) + (y + 1) * cells_across + x + 1;
  const CornerWeights<Real>* const weights =
      static_cast<const CornerWeights<Real>*>(params.weights);

  for (int channel = lane * kVec; channel < params.head_dim; channel += kLanes * kVec) {
    Real sum[kVec] = {};
    const auto add = [&](int64_t cell, Real Corners<Real>::* corner) {
      const int64_t end = lower_bound(params, cell + 1);
      for (int64_t i = lower_bound(params, cell); i < end; ++i) {
        const auto sample = load<int64_t>(params.sample_order + i);
        const int64_t head = sample / sampling.num_samples;
        const auto g = load<Vector>(static_cast<const T*>(params.grad_output) +
                                    head * params.head_dim + channel);
        const Real& w = weights[sample].weights.*corner;
        count(Access::kLoad, &w, sizeof(Real));
        multiply_add_if(true, w, g, sum);
      }
    };
    if (!is_padding) {
      add(own, &Corners<Real>::nw);
      if (!sampling.nearest) {
        add(own - 1, &Corners<Real>::ne);
        add(own - cells_across, &Corners<Real>::sw);
        add(own - cells_across - 1, &Corners<Real>::se);
      }
    }
    Real* const grad = static_cast<Real*>(params.grad_value) + pixel * params.head_dim + channel;
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      count(Access::kStore, grad + i, sizeof(Real));
      grad[i] = sum[i];
    }
  }
}

}  // namespace msda
