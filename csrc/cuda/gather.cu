// Launches the kernels that sum the gradient of value without atomic additions. Compiled once for
// each type of value, MSDA_VALUE_TYPE.

#include "gather.cuh"
#include "launch.cuh"

namespace msda {

// Any number of channels in steps of so many lanes.
constexpr int kGatherLanes = 8;

template <class T>
void sample_cells_cuda(const Problem& problem, const SortedSamples& samples, const CudaCall& call) {
  check_fits(problem);
  constexpr int kBlocks = 4;
  SampleCellsParams params = {};
  params.sampling = make_sampling(problem, call);
  CudaCall whole = call;
  whole.split = 1;
  params.order = make_order(problem, whole, kGatherLanes, kBlocks);
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
  GatherParams params = {};
  params.sampling = make_sampling(problem, call);
  params.sorted_cells = samples.sorted_cells;
  params.sample_order = samples.sample_order;
  params.weights = samples.weights;
  params.grad_output = inputs.grad_output.data;
  params.grad_value = grad_value.data;
  params.num_pixels = problem.batch * problem.num_keys * problem.num_heads;
  params.num_sorted = problem.batch * problem.num_queries * problem.num_heads * problem.num_samples;
  params.head_dim = int32_t(problem.head_dim);
  const int64_t blocks = divide_up(params.num_pixels, kThreadsPerBlock / kGatherLanes);
  check_fits(blocks < int64_t(1) << 31, "value", "hold fewer than 2^35 heads of keys",
             params.num_pixels);
  constexpr int kVec = kMaxVectorBytes / sizeof(T);
  const bool by_vector = problem.head_dim % kVec == 0 && is_aligned(params.grad_output);
  launch(by_vector ? gather_kernel<T, kVec, kGatherLanes> : gather_kernel<T, 1, kGatherLanes>,
         unsigned(blocks), kThreadsPerBlock, call.stream, params);
}

template void sample_cells_cuda<MSDA_VALUE_TYPE>(const Problem&, const SortedSamples&,
                                                 const CudaCall&);
template void gather_cuda<MSDA_VALUE_TYPE>(const Problem&, const BackwardInputs&, const Array&,
                                           const SortedSamples&, const CudaCall&);

}  // namespace msda
