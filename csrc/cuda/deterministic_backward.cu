// Launches the kernels that sum the gradient of value without atomic additions. Compiled once for
// each type of value, MSDA_VALUE_TYPE.

#include "deterministic_backward.cuh"
#include "launch.cuh"

namespace msda {

// Any number of channels in steps of so many lanes.
constexpr int kGatherLanes = 8;

template <class T>
void sample_cells_cuda(const Problem& problem, const SortedSamples& samples, const CudaCall& call) {
  check_fits(problem);
  const SortSizes sizes = sort_sizes(problem, call);
  constexpr int kBlocks = 4;
  SampleCellsParams params = {};
  params.sampling = make_sampling(problem, call);
  CudaCall whole = call;
  whole.split = 1;
  params.order = make_order(problem, whole, kGatherLanes, kBlocks, sizeof(CornerWeights<acc_t<T>>));
  params.cells_per_head = int32_t(sizes.cells_per_head);
  params.cells = samples.cells;
  params.weights = samples.weights;
  const auto run = [&](auto is_fused) {
    launch(sample_cells_kernel<acc_t<T>, kGatherLanes, decltype(is_fused)::value>,
           block_count(params.order, kBlocks), kThreadsPerBlock, call.stream, params);
  };
  problem.is_fused ? run(std::true_type()) : run(std::false_type());
}

template <class T>
void gather_cuda(const Problem& problem, const BackwardInputs& inputs, const Array& grad_value,
                 const SortedSamples& samples, const CudaCall& call) {
  check_fits(problem);
  const SortSizes sizes = sort_sizes(problem, call);
  CellStartsParams starts = {};
  starts.sorted_cells = samples.sorted_cells;
  starts.starts = samples.cell_starts;
  starts.num_sorted = int32_t(sizes.num_samples);
  starts.num_cells = int32_t(sizes.num_cells);
  find_cell_starts(starts, call.stream);

  GatherParams params = {};
  params.sampling = make_sampling(problem, call);
  params.sample_order = samples.sample_order;
  params.starts = samples.cell_starts;
  params.weights = samples.weights;
  params.grad_output = inputs.grad_output.data;
  params.grad_value = grad_value.data;
  params.cells_per_head = int32_t(sizes.cells_per_head);
  params.head_dim = int32_t(problem.head_dim);
  constexpr int kKeysPerBlock = kThreadsPerBlock / kGatherLanes;
  params.blocks_per_head = uint32_t(divide_up(problem.num_keys, kKeysPerBlock));
  const int64_t blocks = problem.batch * problem.num_heads * int64_t(params.blocks_per_head);
  check_fits(blocks < int64_t(1) << 31, "value", "hold fewer than 2^31 blocks of 16 keys of a head",
             blocks);
  // A lane writes a vector; for 16-bit values it reads half of one.
  constexpr int kVec = kMaxVectorBytes / sizeof(acc_t<T>);
  const bool by_vector = problem.head_dim % kVec == 0 && is_aligned(params.grad_output) &&
                         is_aligned(params.grad_value);
  launch(by_vector ? gather_kernel<T, kVec, kGatherLanes> : gather_kernel<T, 1, kGatherLanes>,
         unsigned(blocks), kThreadsPerBlock, call.stream, params);
}

template void sample_cells_cuda<MSDA_VALUE_TYPE>(const Problem&, const SortedSamples&,
                                                 const CudaCall&);
template void gather_cuda<MSDA_VALUE_TYPE>(const Problem&, const BackwardInputs&, const Array&,
                                           const SortedSamples&, const CudaCall&);

}  // namespace msda
