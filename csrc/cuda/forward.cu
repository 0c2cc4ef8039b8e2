// Launches the forward kernel. Compiled once for each type of value, MSDA_VALUE_TYPE.

#include "forward.cuh"
#include "launch.cuh"

namespace msda {

template <class T>
void forward_cuda(const Problem& problem, const ForwardOutputs& outputs, const CudaCall& call) {
  check_fits(problem);
  ForwardParams params = {};
  params.sampling = make_sampling(problem, call);
  params.value = problem.value.data;
  params.output = outputs.output.data;
  params.head_dim = int32_t(problem.head_dim);
  const bool aligned = is_aligned(params.value) && is_aligned(params.output);
  dispatch_layout<T>(problem, aligned, [&](auto layout) {
    using L = decltype(layout);
    const auto run = [&](auto is_fused) {
      constexpr bool kFused = decltype(is_fused)::value;
      constexpr int kBlocks = forward_blocks<T, L::kLanes, kFused, L::kCommon>();
      params.order = make_order(problem, call, L::kLanes, kBlocks, problem.head_dim * sizeof(T));
      launch(forward_kernel<T, L::kVec, L::kLanes, L::kExact, kFused, L::kCommon>,
             block_count(params.order, kBlocks), kThreadsPerBlock, call.stream, params);
    };
    problem.is_fused ? run(std::true_type()) : run(std::false_type());
  });
}

template void forward_cuda<MSDA_VALUE_TYPE>(const Problem&, const ForwardOutputs&, const CudaCall&);

}  // namespace msda
