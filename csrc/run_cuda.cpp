// Runs the CUDA kernels (cuda/kernels.h) on torch's current stream.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <optional>
#include <utility>

#include "cuda/kernels.h"
#include "run.h"

// In a torch without CUDA there is no such symbol; its address is then null.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace msda {
namespace {

// Runs f(CudaCall) with value's device as the current one.
template <class F>
void with_cuda(const Call<Tensor>& call, const Pyramid<Tensor>& pyramid, const F& f) {
  // Weak: a torch without CUDA has no such symbol, and loads this library all the same.
  MSDA_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
             "value must be on the CPU, got a CUDA tensor: this torch has no CUDA");
  const auto device = pyramid.value.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  CudaCall cuda_call;
  MSDA_CHECK(aoti_torch_get_current_cuda_stream(device, &cuda_call.stream) == AOTI_TORCH_SUCCESS,
             "torch must give msda a CUDA stream, got an error");
  const bool on_gpu = shapes_are_on_gpu(pyramid);
  std::optional<Tensor> shapes, level_table;
  cuda_call.shapes_on_device = on_gpu;
  if (on_gpu) {
    shapes = contiguous(*pyramid.spatial_shapes_tensor, kSpatialShapes.name);
    cuda_call.spatial_shapes = shapes->const_data_ptr();
    cuda_call.shapes_are_int64 = shapes->scalar_type() == ScalarType::Long;
  }
  const int64_t table_bytes = level_table_bytes(call.problem.num_levels, on_gpu);
  if (table_bytes > 0) {
    level_table = new_empty("the table of levels", pyramid.value, {table_bytes}, ScalarType::Byte);
    cuda_call.level_table = level_table->mutable_data_ptr();
  }
  f(cuda_call);
}

// The stable order of integers: sorted, and where each came from.
std::pair<Tensor, Tensor> sort(const Tensor& integers) {
  std::array<StableIValue, 4> stack{
      torch::stable::detail::from(integers), torch::stable::detail::from(std::optional(true)),
      torch::stable::detail::from(int64_t(-1)), torch::stable::detail::from(false)};
  MSDA_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION) ==
                 AOTI_TORCH_SUCCESS,
             "torch must sort the cells of a deterministic backward, got an error");
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

void run_backward(const Problem& problem, const BackwardInputs& inputs, BackwardOutputs outputs,
                  const Tensor& value, bool deterministic, const CudaCall& call) {
  const Array grad_value = outputs.grad_value;
  const bool gathers = deterministic && outputs.grad_value.is_wanted;
  if (gathers) outputs.grad_value = {};
  backward_cuda(problem, inputs, outputs, call);
  if (!gathers) return;
  const SortSizes sizes = sort_sizes(problem, call);
  const char* const name = "the scratch space of a deterministic backward";
  const Tensor cells = new_empty(name, value, {sizes.num_samples}, ScalarType::Int);
  const Tensor weights = new_empty(name, value, {sizes.num_samples, 4}, sum_type(value));
  SortedSamples samples;
  samples.cells = cells.mutable_data_ptr<int32_t>();
  samples.weights = weights.mutable_data_ptr();
  sample_cells_cuda(problem, samples, call);
  const auto [sorted_cells, sample_order] = sort(cells);
  const Tensor starts = new_empty(name, value, {sizes.num_cells + 1}, ScalarType::Int);
  samples.sorted_cells = sorted_cells.const_data_ptr<int32_t>();
  samples.sample_order = sample_order.const_data_ptr<int64_t>();
  samples.cell_starts = starts.mutable_data_ptr<int32_t>();
  gather_cuda(problem, inputs, grad_value, samples, call);
}

}  // namespace

void run_forward_on_cuda(const Call<Tensor>& call, const Pyramid<Tensor>& pyramid,
                         const ForwardOutputs& outputs) {
  with_cuda(call, pyramid,
            [&](const CudaCall& cuda) { forward_cuda(call.problem, outputs, cuda); });
}

void run_backward_on_cuda(const Call<Tensor>& call, const Pyramid<Tensor>& pyramid,
                          const BackwardInputs& inputs, const BackwardOutputs& outputs,
                          bool deterministic) {
  with_cuda(call, pyramid, [&](const CudaCall& cuda) {
    run_backward(call.problem, inputs, outputs, pyramid.value, deterministic, cuda);
  });
}

}  // namespace msda
