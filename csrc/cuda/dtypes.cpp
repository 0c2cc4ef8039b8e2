// Chooses the kernels for the type of value.

#include <type_traits>

#include "kernels.h"

namespace msda {
namespace {

// Calls f with a null pointer of the element type.
template <class F>
auto dispatch_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat64:
      return f(static_cast<double*>(nullptr));
    case DType::kFloat16:
      return f(static_cast<Half*>(nullptr));
    case DType::kBFloat16:
      return f(static_cast<BFloat16*>(nullptr));
    default:
      return f(static_cast<float*>(nullptr));
  }
}

}  // namespace

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
