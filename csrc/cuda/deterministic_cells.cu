// Finds where the samples of each cell begin in their order. See deterministic_backward.cuh.

#include "launch.cuh"

namespace msda {
namespace {

// One thread for each cell, and for the end: the first place that holds it or a later one.
__global__ void __launch_bounds__(kThreadsPerBlock)
    cell_starts_kernel(const __grid_constant__ CellStartsParams params) {
  const int64_t cell = int64_t(blockIdx.x) * kThreadsPerBlock + threadIdx.x;
  if (cell > params.num_cells) return;
  int32_t first = 0, last = params.num_sorted;
  while (first < last) {
    const int32_t middle = first + (last - first) / 2;
    if (load<int32_t>(params.sorted_cells + middle) < cell) {
      first = middle + 1;
    } else {
      last = middle;
    }
  }
  store(params.starts + cell, first);
}

}  // namespace

void find_cell_starts(const CellStartsParams& params, void* stream) {
  const int64_t threads = int64_t(params.num_cells) + 1;
  launch(cell_starts_kernel, unsigned(divide_up(threads, kThreadsPerBlock)), kThreadsPerBlock,
         stream, params);
}

SortSizes sort_sizes(const Problem& problem, const CudaCall& call) {
  SortSizes sizes = {};
  const int64_t heads = problem.batch * problem.num_heads;
  sizes.num_samples = heads * problem.num_queries * problem.num_samples;
  if (call.shapes_on_device) {
    sizes.cells_per_head = 4 * problem.num_keys;  // (H + 1) * (W + 1) <= 4 * H * W
  } else {
    for (int64_t l = 0; l < problem.num_levels; ++l) {
      sizes.cells_per_head += (problem.levels[l].height + 1) * (problem.levels[l].width + 1);
    }
  }
  sizes.num_cells = heads * sizes.cells_per_head;
  // Half the passes that a sort of 64 bits takes.
  constexpr int64_t k31 = int64_t(1) << 31;
  check_fits(sizes.num_samples < k31, "the points",
             "be fewer than 2^31 for a deterministic gradient of value", sizes.num_samples);
  check_fits(sizes.num_cells < k31, "value",
             "have fewer than 2^31 cells between pixels for a deterministic gradient",
             sizes.num_cells);
  return sizes;
}

}  // namespace msda
