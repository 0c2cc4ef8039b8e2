// Launches the backward kernels. Compiled once for each type of value, MSDA_VALUE_TYPE.

#include "backward.cuh"
#include "launch.cuh"

namespace msda {

template <class T>
void backward_cuda(const Problem& problem, const BackwardInputs& inputs,
                   const BackwardOutputs& outputs, const CudaCall& call) {
  check_fits(problem);
  if (!outputs.has_wanted()) return;
  BackwardParams params = {};
  params.sampling = make_sampling(problem, call);
  params.value = problem.value.data;
  params.grad_output = inputs.grad_output.data;
  params.output = inputs.output.data;
  params.grad_value = outputs.grad_value;
  params.grad_points = outputs.grad_points;
  params.grad_weights = outputs.grad_weights;
  params.head_dim = int32_t(problem.head_dim);
  params.points_in_pixels = outputs.grad_reference_points.is_wanted;
  const bool aligned = is_aligned(params.value) && is_aligned(params.grad_output) &&
                       (!problem.is_fused || is_aligned(params.output)) &&
                       (!outputs.grad_value.is_wanted || is_aligned(outputs.grad_value.data));
  dispatch_layout<T>(problem, aligned, [&](auto layout) {
    using L = decltype(layout);
    const auto run = [&](auto is_fused) {
      constexpr bool kFused = decltype(is_fused)::value;
      constexpr int kBlocks = backward_blocks<T, L::kLanes, L::kExact, kFused, L::kCommon>();
      const int64_t corner_bytes = problem.head_dim * (sizeof(T) + sizeof(acc_t<T>));
      params.order = make_order(problem, call, L::kLanes, kBlocks, corner_bytes);
      launch(backward_kernel<T, L::kVec, L::kLanes, L::kExact, kFused, L::kCommon>,
             block_count(params.order, kBlocks), kThreadsPerBlock, call.stream, params);
    };
    problem.is_fused ? run(std::true_type()) : run(std::false_type());
  });
  if (outputs.grad_reference_points.is_wanted) {
    const int64_t references = problem.batch * problem.num_queries * problem.reference_levels;
    const Array grad_reference_points = outputs.grad_reference_points;
    launch(backward_reference_points_kernel<acc_t<T>>,
           unsigned(divide_up(references, kThreadsPerBlock)), kThreadsPerBlock, call.stream, params,
           grad_reference_points, uint32_t(references));
  }
}

template void backward_cuda<MSDA_VALUE_TYPE>(const Problem&, const BackwardInputs&,
                                             const BackwardOutputs&, const CudaCall&);

}  // namespace msda
