// Chooses the kernels for the dtype of value.

#include <type_traits>

#include "kernels.h"

namespace msda {

void forward_cuda(const Problem& problem, const ForwardOutputs& outputs, const CudaCall& call) {
  dispatch_dtype(problem.value.dtype, [&](auto* type) {
    forward_cuda<std::remove_pointer_t<decltype(type)>>(problem, outputs, call);
  });
}

void backward_cuda(const Problem& problem, const BackwardInputs& inputs,
                   const BackwardOutputs& outputs, const CudaCall& call) {
  dispatch_dtype(problem.value.dtype, [&](auto* type) {
    backward_cuda<std::remove_pointer_t<decltype(type)>>(problem, inputs, outputs, call);
  });
}

void sample_cells_cuda(const Problem& problem, const SortedSamples& samples, const CudaCall& call) {
  dispatch_dtype(problem.value.dtype, [&](auto* type) {
    sample_cells_cuda<std::remove_pointer_t<decltype(type)>>(problem, samples, call);
  });
}

void gather_cuda(const Problem& problem, const BackwardInputs& inputs, const Array& grad_value,
                 const SortedSamples& samples, const CudaCall& call) {
  dispatch_dtype(problem.value.dtype, [&](auto* type) {
    gather_cuda<std::remove_pointer_t<decltype(type)>>(problem, inputs, grad_value, samples, call);
  });
}

}  // namespace msda
