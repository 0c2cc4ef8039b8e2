// The kernels on checked calls: threads or a stream, scratch memory, and the order of the kernels.

#pragma once

#include "torch_tensor.h"

namespace msda {

// The problem must have an output that is not empty.
void run_forward_on_cpu(const Problem& problem, const ForwardOutputs& outputs);

// The problem must have samples, and outputs a gradient that is wanted. grad_value: the tensor of
// outputs.grad_value.
void run_backward_on_cpu(const Problem& problem, const BackwardInputs& inputs,
                         const BackwardOutputs& outputs, const Tensor& grad_value);

// The same on CUDA, on torch's current stream of value's device. Only in builds with CUDA kernels.
void run_forward_on_cuda(const Call<Tensor>& call, const Pyramid<Tensor>& pyramid,
                         const ForwardOutputs& outputs);
void run_backward_on_cuda(const Call<Tensor>& call, const Pyramid<Tensor>& pyramid,
                          const BackwardInputs& inputs, const BackwardOutputs& outputs,
                          bool deterministic);

}  // namespace msda
