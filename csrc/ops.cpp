// The operators of torch: schemas, entries and registration, against LibTorch's stable ABI, so that
// one binary serves every torch from 2.10 on.
//
// An entry goes through these files:
//   arguments.h, call.h  the checks, from arguments to a problem. In Python: msda/checks.py. Sizes
//                        that a GPU alone knows are checked there: cuda/level_table.cu
//   torch_tensor.h       what the checks ask of torch's tensors; allocation
//   run_cpu.cpp, run_cuda.cpp  the kernels on torch's threads, or on its stream
// The operators' Python half (fakes, autograd, vmap): msda/ops.py.

#include <torch/csrc/stable/library.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"
#include "run.h"

namespace msda {
namespace {

using OptionalSizes = std::optional<Sizes>;  // AOTInductor passes nothing for an empty list

const Sizes& or_none(const OptionalSizes& sizes) {
  static const Sizes none;
  return sizes ? *sizes : none;
}

Tensor run_forward(const Call<Tensor>& call, const Pyramid<Tensor>& pyramid) {
  const Problem& problem = call.problem;
  const Tensor output =
      new_empty(kOutput.name, pyramid.value,
                {problem.batch, problem.num_queries, problem.num_heads * problem.head_dim},
                pyramid.value.scalar_type());
  if (output.numel() == 0) return output;
  const ForwardOutputs outputs{mutable_array(output)};
#ifdef MSDA_WITH_CUDA
  if (!pyramid.value.is_cpu()) {
    run_forward_on_cuda(call, pyramid, outputs);
    return output;
  }
#endif
  run_forward_on_cpu(problem, outputs);
  return output;
}

Tensor ms_deform_attn(const Tensor& value, OptionalSizes spatial_shapes,
                      std::optional<Tensor> spatial_shapes_tensor,
                      std::optional<Tensor> level_start_index, const Tensor& sampling_locations,
                      const Tensor& attention_weights, OptionalSizes num_points, bool nearest) {
  const Pyramid<Tensor> pyramid{value, or_none(spatial_shapes), spatial_shapes_tensor,
                                level_start_index, or_none(num_points)};
  return run_forward(plain_call(pyramid, sampling_locations, attention_weights, nearest), pyramid);
}

Tensor ms_deform_attn_fused(const Tensor& value, OptionalSizes spatial_shapes,
                            std::optional<Tensor> spatial_shapes_tensor,
                            std::optional<Tensor> level_start_index, const Tensor& reference_points,
                            const Tensor& sampling_offsets, const Tensor& attention_logits,
                            OptionalSizes num_points, std::optional<Tensor> padding_mask) {
  const Pyramid<Tensor> pyramid{value, or_none(spatial_shapes), spatial_shapes_tensor,
                                level_start_index, or_none(num_points)};
  return run_forward(
      fused_call(pyramid, reference_points, sampling_offsets, attention_logits, padding_mask),
      pyramid);
}

// An uninitialised gradient of input, whose elements the kernels all write; an empty tensor where
// it is not wanted.
Tensor gradient_of(const Tensor& input, const char* name, bool wanted) {
  return new_empty(name, input, wanted ? sizes_of(input) : Sizes{0}, input.scalar_type());
}

// The same for value. CUDA kernels add to it, so it is zero before, and of at least 32 bits.
Tensor sum_of_gradients(const Tensor& value, bool wanted) {
  constexpr char kName[] = "grad_value";
  if (value.is_cpu() || !wanted) return gradient_of(value, kName, wanted);
  return new_zeros(kName, value, sizes_of(value), sum_type(value));
}

// gradients: the tensors that outputs points into, grad_value first.
// deterministic: on CUDA; the CPU's backward always is.
void run_backward(const Call<Tensor>& call, [[maybe_unused]] const Pyramid<Tensor>& pyramid,
                  const Tensor& grad_output, const std::optional<Tensor>& output,
                  const BackwardOutputs& outputs, std::vector<Tensor> gradients,
                  [[maybe_unused]] bool deterministic) {
  const Problem& problem = call.problem;
  if (!outputs.has_wanted()) return;
  if (grad_output.numel() == 0 || problem.num_samples == 0) {
    for (Tensor& gradient : gradients) torch::stable::zero_(gradient);
    return;
  }
  const BackwardInputs inputs{const_array(grad_output),
                              output ? const_array(*output) : ConstArray{}};
#ifdef MSDA_WITH_CUDA
  if (!pyramid.value.is_cpu()) {
    run_backward_on_cuda(call, pyramid, inputs, outputs, deterministic);
    return;
  }
#endif
  run_backward_on_cpu(problem, inputs, outputs, gradients.front());
}

std::tuple<Tensor, Tensor, Tensor> ms_deform_attn_backward(
    const Tensor& grad_output, const Tensor& value, OptionalSizes spatial_shapes,
    std::optional<Tensor> spatial_shapes_tensor, std::optional<Tensor> level_start_index,
    const Tensor& sampling_locations, const Tensor& attention_weights, OptionalSizes num_points,
    bool nearest, bool needs_value, bool needs_locations, bool needs_weights, bool deterministic) {
  const Pyramid<Tensor> pyramid{value, or_none(spatial_shapes), spatial_shapes_tensor,
                                level_start_index, or_none(num_points)};
  Call<Tensor> call = plain_call(pyramid, sampling_locations, attention_weights, nearest);
  check(grad_output, kGradOutput, call.known);
  const Tensor contiguous_grad_output = contiguous(grad_output, kGradOutput.name);
  const Tensor grad_value = sum_of_gradients(value, needs_value);
  const Tensor grad_locations =
      gradient_of(sampling_locations, "grad_sampling_locations", needs_locations);
  const Tensor grad_weights =
      gradient_of(attention_weights, "grad_attention_weights", needs_weights);
  BackwardOutputs outputs;
  outputs.grad_value = gradient_array(grad_value, needs_value);
  outputs.grad_points = gradient_array(grad_locations, needs_locations);
  outputs.grad_weights = gradient_array(grad_weights, needs_weights);
  run_backward(call, pyramid, contiguous_grad_output, std::nullopt, outputs,
               {grad_value, grad_locations, grad_weights}, deterministic);
  return {converted(grad_value, "grad_value", value.scalar_type()), grad_locations, grad_weights};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> ms_deform_attn_fused_backward(
    const Tensor& grad_output, std::optional<Tensor> output, const Tensor& value,
    OptionalSizes spatial_shapes, std::optional<Tensor> spatial_shapes_tensor,
    std::optional<Tensor> level_start_index, const Tensor& reference_points,
    const Tensor& sampling_offsets, const Tensor& attention_logits, OptionalSizes num_points,
    std::optional<Tensor> padding_mask, bool needs_value, bool needs_reference, bool needs_offsets,
    bool needs_logits, bool deterministic) {
  const Pyramid<Tensor> pyramid{value, or_none(spatial_shapes), spatial_shapes_tensor,
                                level_start_index, or_none(num_points)};
  Call<Tensor> call =
      fused_call(pyramid, reference_points, sampling_offsets, attention_logits, padding_mask);
  check(grad_output, kGradOutput, call.known);
  MSDA_CHECK(output || !value.is_cuda(), kOutput.name, " must be given on CUDA, got None");
  if (output) check(*output, kOutput, call.known);
  const Tensor contiguous_grad_output = contiguous(grad_output, kGradOutput.name);
  if (output) output = contiguous(*output, kOutput.name);
  const Tensor grad_value = sum_of_gradients(value, needs_value);
  const Tensor grad_reference =
      gradient_of(reference_points, "grad_reference_points", needs_reference);
  // The gradient of the reference points is summed from that of the offsets, which must then not be
  // rounded to 16 bits on the way.
  const char* const offsets_name = "grad_sampling_offsets";
  const Tensor grad_offsets =
      needs_reference
          ? new_empty(offsets_name, sampling_offsets, sizes_of(sampling_offsets), sum_type(value))
          : gradient_of(sampling_offsets, offsets_name, needs_offsets);
  const Tensor grad_logits = gradient_of(attention_logits, "grad_attention_logits", needs_logits);
  BackwardOutputs outputs;
  outputs.grad_value = gradient_array(grad_value, needs_value);
  outputs.grad_points = gradient_array(grad_offsets, needs_offsets || needs_reference);
  outputs.grad_weights = gradient_array(grad_logits, needs_logits);
  outputs.grad_reference_points = gradient_array(grad_reference, needs_reference);
  run_backward(call, pyramid, contiguous_grad_output, output, outputs,
               {grad_value, grad_offsets, grad_logits, grad_reference}, deterministic);
  return {converted(grad_value, "grad_value", value.scalar_type()), grad_reference,
          needs_offsets ? converted(grad_offsets, offsets_name, sampling_offsets.scalar_type())
                        : gradient_of(sampling_offsets, offsets_name, false),
          grad_logits};
}

template <class Library>
void implement(Library& m) {
  m.impl("ms_deform_attn", TORCH_BOX(&ms_deform_attn));
  m.impl("_ms_deform_attn_backward", TORCH_BOX(&ms_deform_attn_backward));
  m.impl("ms_deform_attn_fused", TORCH_BOX(&ms_deform_attn_fused));
  m.impl("_ms_deform_attn_fused_backward", TORCH_BOX(&ms_deform_attn_fused_backward));
}

}  // namespace

STABLE_TORCH_LIBRARY(msda, m) {
  m.def(
      "ms_deform_attn(Tensor value, SymInt[]? spatial_shapes, Tensor? spatial_shapes_tensor, "
      "Tensor? level_start_index, Tensor sampling_locations, Tensor attention_weights, "
      "int[]? num_points, bool nearest) -> Tensor");
  m.def(
      "_ms_deform_attn_backward(Tensor grad_output, Tensor value, SymInt[]? spatial_shapes, "
      "Tensor? spatial_shapes_tensor, Tensor? level_start_index, Tensor sampling_locations, "
      "Tensor attention_weights, int[]? num_points, bool nearest, bool needs_value, "
      "bool needs_locations, bool needs_weights, bool deterministic=False) -> (Tensor, Tensor, "
      "Tensor)");
  m.def(
      "ms_deform_attn_fused(Tensor value, SymInt[]? spatial_shapes, Tensor? spatial_shapes_tensor, "
      "Tensor? level_start_index, Tensor reference_points, Tensor sampling_offsets, "
      "Tensor attention_logits, int[]? num_points, Tensor? padding_mask) -> Tensor");
  m.def(
      "_ms_deform_attn_fused_backward(Tensor grad_output, Tensor? output, Tensor value, "
      "SymInt[]? spatial_shapes, Tensor? spatial_shapes_tensor, Tensor? level_start_index, "
      "Tensor reference_points, Tensor sampling_offsets, Tensor attention_logits, "
      "int[]? num_points, Tensor? padding_mask, bool needs_value, bool needs_reference, "
      "bool needs_offsets, bool needs_logits, bool deterministic=False) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(msda, CPU, m) { implement(m); }
STABLE_TORCH_LIBRARY_IMPL(msda, CUDA, m) { implement(m); }
// The checks refuse all other tensors (sparse, quantised, of other devices) by name.
STABLE_TORCH_LIBRARY_IMPL(msda, CompositeExplicitAutograd, m) { implement(m); }

}  // namespace msda

// For msda.info(), through ctypes.
extern "C" {

__attribute__((visibility("default"))) const char* msda_compiled_cpu_capabilities() {
  return msda::compiled_cpu_capabilities();
}

__attribute__((visibility("default"))) const char* msda_supported_cpu_capabilities() {
  return msda::supported_cpu_capabilities();
}

// The instruction set in use, or null where MSDA_CPU_CAPABILITY names one that cannot be used.
__attribute__((visibility("default"))) const char* msda_cpu_capability() {
  try {
    return msda::cpu_kernels().capability;
  } catch (const std::runtime_error&) {
    return nullptr;
  }
}

// Comma-separated; empty in a build without CUDA kernels.
__attribute__((visibility("default"))) const char* msda_cuda_architectures() {
#ifdef MSDA_WITH_CUDA
  return MSDA_CUDA_ARCHITECTURES;
#else
  return "";
#endif
}

// The end of an error about a CUDA tensor: what to do.
__attribute__((visibility("default"))) void msda_set_cuda_remedy(const char* text) {
#ifdef MSDA_WITH_CUDA
  (void)text;
#else
  msda::cuda_remedy() = text;
#endif
}

// The table of arguments, for the test that holds msda/checks.py against it.
__attribute__((visibility("default"))) const char* msda_arguments() {
  static const std::string text = msda::describe_arguments();
  return text.c_str();
}

__attribute__((visibility("default"))) const char* msda_built_with_torch() {
  return MSDA_TORCH_VERSION;
}

}  // extern "C"
