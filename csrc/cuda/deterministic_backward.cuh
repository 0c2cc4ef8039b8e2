// The gradient of value without atomic additions, for the same bits in every run: samples are
// sorted by the cell that they lie in, and each pixel then gathers from its four cells, in that
// order.
//
//   1. sample_cells_kernel writes, for each sample, its cell and its four corner weights
//   2. the caller sorts the cells, stably
//   3. find_cell_starts finds where each cell begins
//   4. gather_kernel sums: each pixel is written once
//
// Cells of one level form a map of (H + 1) x (W + 1), the first of each row and column lying beyond
// the edge; those of one image and head are numbered level by level, below cells_per_head.

#pragma once

#include "order.cuh"

namespace msda {

// Cells of the levels before this one.
MSDA_DEVICE int32_t cells_before(const DeviceLevel* levels, int level) {
  int32_t cells = 0;
  for (int l = 0; l < level; ++l) {
    count_struct(Access::kLoad, levels[l]);
    cells += (levels[l].height + 1) * (levels[l].width + 1);
  }
  return cells;
}

struct SampleCellsParams {
  Sampling sampling;
  Order order;
  int32_t cells_per_head;
  int32_t* cells;  // (B, Q, M, K)
  void* weights;   // (B, Q, M, K) of CornerWeights
};

template <class Real, int kLanes, bool kFused>
__global__ void __launch_bounds__(kThreadsPerBlock)
    sample_cells_kernel(const __grid_constant__ SampleCellsParams params) {
  __shared__ DeviceLevel staged_levels[kMaxLevels];
  const Sampling& sampling = params.sampling;
  const DeviceLevel* const levels = stage_levels(sampling, staged_levels);
  const Lane<kLanes> self(1);

  for_each_head<kLanes>(params.order, sampling, [&](const Head& head) {
    Sampler<Real, kFused, false, kLanes> sampler(sampling, levels, head, self.lane);
    if (!head.is_live) return;
    for (int k = self.lane; k < sampling.num_samples; k += kLanes) {
      const Sample<Real> sample = sampler.prepare(k);
      const int64_t i = int64_t(head.index()) * sampling.num_samples + k;
      int32_t cell = -1;  // counts for no pixel
      if (sample.corners != 0) {
        cell = (head.b * sampling.num_heads + head.m) * params.cells_per_head +
               cells_before(levels, sample.level) +
               (sample.y0 + 1) * (levels[sample.level].width + 1) + sample.x0 + 1;
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
  const int64_t* sample_order;  // (N): samples in the order of their cells
  const int32_t* starts;        // (C + 1)
  const void* weights;          // (B, Q, M, K) of CornerWeights
  const void* grad_output;      // (B, Q, M * D)
  void* grad_value;             // (B, S, M, D) of acc_t
  uint32_t blocks_per_head;
  int32_t cells_per_head;
  int32_t head_dim;
};

// kLanes lanes for each pixel of each head. Neighbouring pixels, which have cells in common, are
// next to each other.
template <class T, int kVec, int kLanes>
__global__ void __launch_bounds__(kThreadsPerBlock)
    gather_kernel(const __grid_constant__ GatherParams params) {
  using Real = acc_t<T>;
  __shared__ DeviceLevel staged_levels[kMaxLevels];
  const Sampling& sampling = params.sampling;
  const DeviceLevel* const levels = stage_levels(sampling, staged_levels);
  const int lane = int(threadIdx.x) % kLanes;
  const int head = int(blockIdx.x / params.blocks_per_head);  // of B * M
  const int64_t key = int64_t(blockIdx.x % params.blocks_per_head) * (kThreadsPerBlock / kLanes) +
                      threadIdx.x / kLanes;
  if (key >= sampling.num_keys) return;
  const int m = head % sampling.num_heads;
  const int64_t row = int64_t(head / sampling.num_heads) * sampling.num_keys + key;  // of B * S
  const bool is_padding =
      sampling.has_padding_mask && load<uint8_t>(sampling.padding_mask + row) != 0;

  int l = 0;
  while (l + 1 < sampling.num_levels && key >= levels[l + 1].start) ++l;
  count_struct(Access::kLoad, levels[l]);
  const int cells_across = levels[l].width + 1;
  const int y = (int(key) - levels[l].start) / levels[l].width;
  const int x = (int(key) - levels[l].start) % levels[l].width;
  // The cell whose north-west corner the pixel is. It is the north-east one of the cell before and
  // the south-east and south-west ones of those two of the row before, so that two runs of the
  // order hold what it gathers.
  const int32_t* const own = params.starts + int64_t(head) * params.cells_per_head +
                             cells_before(levels, l) + (y + 1) * cells_across + x + 1;
  const int32_t* const above = own - cells_across;
  const bool has_others = !sampling.nearest;
  int32_t i = 0, middle = 0, end = 0, next = 0, next_middle = 0, next_end = 0;
  if (!is_padding) {
    next_middle = load<int32_t>(own);
    next_end = load<int32_t>(own + 1);
    next = has_others ? load<int32_t>(own - 1) : next_middle;
  }
  if (!is_padding && has_others) {
    i = load<int32_t>(above - 1);
    middle = load<int32_t>(above);
    end = load<int32_t>(above + 1);
  }

  const int num_steps = (end - i) + (next_end - next);
  const int first = i;
  for (int channel = lane * kVec; channel < params.head_dim; channel += kLanes * kVec) {
    Real sum[kVec] = {};
    for (int step = 0; step < num_steps; ++step) {
      const bool is_above = first + step < end;
      i = is_above ? first + step : next + (step - (end - first));
      const int corner = is_above ? (i < middle ? kSe : kSw) : (i < next_middle ? kNe : kNw);
      const auto sample = load<int64_t>(params.sample_order + i);
      const auto w = load<Real>(static_cast<const Real*>(params.weights) + 4 * sample + corner);
      const int64_t query_and_head = uint32_t(sample) / uint32_t(sampling.num_samples);
      const auto g = load<Packed<T, kVec>>(static_cast<const T*>(params.grad_output) +
                                           query_and_head * params.head_dim + channel);
      multiply_add_if(true, w, g, sum);
    }
    Real* const grad = static_cast<Real*>(params.grad_value) +
                       (row * sampling.num_heads + m) * params.head_dim + channel;
    store(grad, pack<Real>(sum));
  }
}

}  // namespace msda
