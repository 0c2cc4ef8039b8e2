// The torch side of the operator: schemas, input checks, allocation and dispatch, written against
// LibTorch's stable ABI so that one binary serves every torch from 2.10 on.

#ifdef MSDA_WITH_CUDA
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
// In a torch without CUDA there is no such symbol; its address is then null.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);
#endif
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <new>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/kernels.h"
#include "cuda/kernels.h"
#include "problem.h"

namespace msda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;
using OptionalSizes = std::optional<Sizes>;  // AOTInductor passes nothing for an empty list

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// A macro, so that the parts of the message are put together only where it is needed.
#define MSDA_CHECK(condition, ...)       \
  do {                                   \
    if (!(condition)) fail(__VA_ARGS__); \
  } while (false)

const Sizes& or_none(const OptionalSizes& sizes) {
  static const Sizes none;
  return sizes ? *sizes : none;
}

std::string to_string(const Sizes& sizes) {
  std::ostringstream text;
  text << "(";
  for (size_t i = 0; i < sizes.size(); ++i) text << (i == 0 ? "" : ", ") << sizes[i];
  text << (sizes.size() == 1 ? ",)" : ")");
  return text.str();
}

// The tensor itself where it is contiguous: asking torch's dispatcher would take a microsecond. The
// CPU kernels read it wherever it lies, those on CUDA only whole elements.
Tensor dense(const Tensor& tensor) {
  if (!tensor.is_contiguous()) return torch::stable::contiguous(tensor);
  if (tensor.is_cpu()) return tensor;
  const auto address = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  return address % tensor.element_size() == 0 ? tensor : torch::stable::clone(tensor);
}

Sizes sizes_of(const Tensor& tensor) {
  Sizes sizes(tensor.dim());
  for (size_t i = 0; i < sizes.size(); ++i) sizes[i] = tensor.size(i);
  return sizes;
}

void check_shape(const Tensor& tensor, const char* name, const char* letters,
                 const Sizes& expected) {
  MSDA_CHECK(sizes_of(tensor) == expected, name, " must have shape ", letters, " = ",
             to_string(expected), ", got ", to_string(sizes_of(tensor)));
}

void check_device(const Tensor& tensor, const char* name, const Tensor& value) {
  MSDA_CHECK(tensor.device() == value.device(), name, " must be on the device of value (",
             value.is_cpu() ? "cpu" : "cuda", "), got a tensor on ",
             tensor.is_cpu() ? "cpu" : "cuda", tensor.is_cpu() ? "" : ":",
             tensor.is_cpu() ? "" : std::to_string(tensor.get_device()));
}

DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      fail(name, " must be float32, float64, float16 or bfloat16, got ",
           torch::headeronly::toString(tensor.scalar_type()));
  }
  return DType::kFloat32;
}

ConstArray const_array(const Tensor& tensor, const char* name) {
  return {tensor.const_data_ptr(), dtype_of(tensor, name)};
}

Array mutable_array(const Tensor& tensor) {
  if (tensor.numel() == 0) return {};
  return {tensor.mutable_data_ptr(), dtype_of(tensor, "gradient")};
}

// A gradient that is not wanted has an empty tensor.
Gradient gradient_array(const Tensor& tensor, bool is_wanted) {
  return {mutable_array(tensor), is_wanted};
}

void check_is_integer(const Tensor& tensor, const char* name) {
  const ScalarType type = tensor.scalar_type();
  MSDA_CHECK(type == ScalarType::Long || type == ScalarType::Int, name,
             " must be int64 or int32, got ", torch::headeronly::toString(type));
}

// The elements of an integer tensor on the CPU.
Sizes read_integers(const Tensor& tensor, const char* name) {
  check_is_integer(tensor, name);
  const ScalarType type = tensor.scalar_type();
  const Tensor given = dense(tensor);
  Sizes numbers(given.numel());
  for (size_t i = 0; i < numbers.size(); ++i) {
    numbers[i] = type == ScalarType::Long ? given.const_data_ptr<int64_t>()[i]
                                          : given.const_data_ptr<int32_t>()[i];
  }
  return numbers;
}

// From here on float32 does not hold every integer.
constexpr int64_t kMaxSide = int64_t(1) << 24;

// What every form of the operator takes.
struct Pyramid {
  const Tensor& value;
  const Sizes& spatial_shapes;  // H0, W0, H1, ...; empty if given as a tensor
  const std::optional<Tensor>& spatial_shapes_tensor;  // (L, 2)
  const std::optional<Tensor>& level_start_index;      // (L)
  const Sizes& num_points;                             // (L); empty if the same for all levels
};

// A problem with the tensors that its pointers point into.
struct Call {
  Problem problem{};
  std::vector<Level> levels;
  std::vector<Tensor> kept;

  const Tensor& keep(const Tensor& tensor) {
    kept.push_back(dense(tensor));
    return kept.back();
  }

  // The same for numbers that CUDA kernels read in pairs, which must be aligned to pairs.
  const Tensor& keep_pairs(const Tensor& tensor) {
    const Tensor& kept_tensor = keep(tensor);
    const auto address = reinterpret_cast<uintptr_t>(kept_tensor.const_data_ptr());
    if (kept_tensor.is_cpu() || address % (2 * kept_tensor.element_size()) == 0) return kept_tensor;
    return kept.back() = torch::stable::clone(kept_tensor);
  }
};

// Whether the sizes of the levels are known to the GPU alone. They are then neither read nor
// checked here.
bool shapes_are_on_gpu(const Pyramid& pyramid) {
  return pyramid.spatial_shapes_tensor && !pyramid.spatial_shapes_tensor->is_cpu();
}

// All numbers are 0 where the GPU alone knows them.
Sizes read_spatial_shapes(const Pyramid& pyramid) {
  if (!pyramid.spatial_shapes_tensor) {
    MSDA_CHECK(pyramid.spatial_shapes.size() % 2 == 0,
               "spatial_shapes must hold (height, width) pairs, got ",
               pyramid.spatial_shapes.size(), " numbers");
    return pyramid.spatial_shapes;
  }
  const Tensor& shapes = *pyramid.spatial_shapes_tensor;
  MSDA_CHECK(shapes.dim() == 2 && shapes.size(1) == 2,
             "spatial_shapes must have shape (L, 2), got ", to_string(sizes_of(shapes)));
  if (!shapes.is_cpu()) {
    MSDA_CHECK(!pyramid.value.is_cpu(),
               "spatial_shapes must be on the CPU when value is, got a tensor on cuda");
    check_device(shapes, "spatial_shapes", pyramid.value);
    check_is_integer(shapes, "spatial_shapes");
    return Sizes(2 * shapes.size(0), 0);
  }
  return read_integers(shapes, "spatial_shapes");
}

// Checks value and the pyramid's metadata and fills in all sizes but those of queries and points.
void read_pyramid(const Pyramid& pyramid, Call& call) {
  const Tensor& value = pyramid.value;
  MSDA_CHECK(value.dim() == 4, "value must have shape (B, S, M, D), got ",
             to_string(sizes_of(value)));
  Problem& problem = call.problem;
  problem.batch = value.size(0);
  problem.num_keys = value.size(1);
  problem.num_heads = value.size(2);
  problem.head_dim = value.size(3);
  problem.value = const_array(call.keep(value), "value");

  const Sizes shapes = read_spatial_shapes(pyramid);
  problem.num_levels = shapes.size() / 2;
  MSDA_CHECK(problem.num_levels > 0, "spatial_shapes must hold at least one level, got none");
  const bool known = !shapes_are_on_gpu(pyramid);
  const bool ragged = !pyramid.num_points.empty();
  MSDA_CHECK(!ragged || int64_t(pyramid.num_points.size()) == problem.num_levels,
             "num_points must hold one count per level (", problem.num_levels, "), got ",
             to_string(pyramid.num_points));
  Sizes starts;
  int64_t start = 0;
  for (int64_t l = 0; l < problem.num_levels; ++l) {
    const int64_t height = shapes[2 * l], width = shapes[2 * l + 1];
    MSDA_CHECK(!known || (height > 0 && width > 0), "spatial_shapes must be positive, got ",
               to_string(shapes));
    MSDA_CHECK(std::max(height, width) <= kMaxSide || value.scalar_type() == ScalarType::Double,
               "spatial_shapes must be at most 2^24 on a side, where float32 coordinates end, got ",
               to_string(shapes));
    const int64_t points = ragged ? pyramid.num_points[l] : 0;
    MSDA_CHECK(points >= 0, "num_points must not be negative, got ", to_string(pyramid.num_points));
    call.levels.push_back({height, width, start, points});
    starts.push_back(start);
    int64_t pixels;
    const bool overflows = __builtin_mul_overflow(height, width, &pixels) ||
                           __builtin_add_overflow(start, pixels, &start);
    MSDA_CHECK(!overflows, "spatial_shapes must cover the S = ", problem.num_keys,
               " keys of value, got 2^63 pixels or more: ", to_string(shapes));
  }
  problem.levels = call.levels.data();
  MSDA_CHECK(!known || start == problem.num_keys,
             "spatial_shapes must cover the S = ", problem.num_keys, " keys of value, got ", start,
             " pixels: ", to_string(shapes));

  // The start of a level follows from the shapes: where both are on the CPU it is checked, else it
  // is not read.
  if (known && pyramid.level_start_index && pyramid.level_start_index->is_cpu()) {
    MSDA_CHECK(pyramid.level_start_index->dim() == 1,
               "level_start_index must have shape (L,), got ",
               to_string(sizes_of(*pyramid.level_start_index)));
    const Sizes given = read_integers(*pyramid.level_start_index, "level_start_index");
    MSDA_CHECK(given == starts, "level_start_index must be the running sum of height * width, ",
               to_string(starts), ", got ", to_string(given));
  }
}

// Checks the per-sample tensors: points (B, Q, M, L, P, 2) or ragged (B, Q, M, K, 2), weights alike
// without the last axis.
void read_samples(const Pyramid& pyramid, const Tensor& points, const char* points_name,
                  const Tensor& weights, const char* weights_name, Call& call) {
  Problem& problem = call.problem;
  check_device(points, points_name, pyramid.value);
  check_device(weights, weights_name, pyramid.value);
  const bool ragged = !pyramid.num_points.empty();
  const char* const letters = ragged ? "(B, Q, M, K, 2)" : "(B, Q, M, L, P, 2)";
  MSDA_CHECK(points.dim() == (ragged ? 5 : 6), points_name, " must have shape ", letters, ", got ",
             to_string(sizes_of(points)));
  problem.num_queries = points.size(1);
  Sizes expected = {problem.batch, problem.num_queries, problem.num_heads};
  if (ragged) {
    int64_t rest = points.size(3);
    for (const Level& level : call.levels)
      rest = level.num_points <= rest ? rest - level.num_points : -1;
    MSDA_CHECK(rest == 0, "num_points must sum to the K = ", points.size(3), " samples of ",
               points_name, ", got ", to_string(pyramid.num_points));
    problem.num_samples = points.size(3);
    expected.push_back(problem.num_samples);
  } else {
    const int64_t num_points = points.size(4);
    for (Level& level : call.levels) level.num_points = num_points;
    problem.num_samples = problem.num_levels * num_points;
    expected.push_back(problem.num_levels);
    expected.push_back(num_points);
  }
  check_shape(weights, weights_name, ragged ? "(B, Q, M, K)" : "(B, Q, M, L, P)", expected);
  expected.push_back(2);
  check_shape(points, points_name, letters, expected);
  problem.points = const_array(call.keep_pairs(points), points_name);
  problem.weights = const_array(call.keep(weights), weights_name);
}

Call plain_call(const Pyramid& pyramid, const Tensor& sampling_locations,
                const Tensor& attention_weights, bool nearest) {
  Call call;
  read_pyramid(pyramid, call);
  read_samples(pyramid, sampling_locations, "sampling_locations", attention_weights,
               "attention_weights", call);
  call.problem.nearest = nearest;
  call.problem.is_fused = false;
  return call;
}

Call fused_call(const Pyramid& pyramid, const Tensor& reference_points,
                const Tensor& sampling_offsets, const Tensor& attention_logits,
                const std::optional<Tensor>& padding_mask) {
  Call call;
  read_pyramid(pyramid, call);
  read_samples(pyramid, sampling_offsets, "sampling_offsets", attention_logits, "attention_logits",
               call);
  Problem& problem = call.problem;

  check_device(reference_points, "reference_points", pyramid.value);
  const Sizes shape = sizes_of(reference_points);
  const bool valid =
      shape.size() == 4 && shape[0] == problem.batch && shape[1] == problem.num_queries &&
      (shape[2] == problem.num_levels || shape[2] == 1) && (shape[3] == 2 || shape[3] == 4);
  MSDA_CHECK(valid, "reference_points must have shape (B, Q, L or 1, 2 or 4) = (", problem.batch,
             ", ", problem.num_queries, ", ", problem.num_levels, " or 1, 2 or 4), got ",
             to_string(shape));
  problem.is_fused = true;
  problem.reference = const_array(call.keep_pairs(reference_points), "reference_points");
  problem.reference_levels = shape[2];
  problem.reference_size = shape[3];

  if (padding_mask) {
    check_device(*padding_mask, "padding_mask", pyramid.value);
    check_shape(*padding_mask, "padding_mask", "(B, S)", {problem.batch, problem.num_keys});
    MSDA_CHECK(padding_mask->scalar_type() == ScalarType::Bool,
               "padding_mask must be bool (True = padding), got ",
               torch::headeronly::toString(padding_mask->scalar_type()));
    problem.has_padding_mask = true;
    problem.padding_mask = static_cast<const uint8_t*>(call.keep(*padding_mask).const_data_ptr());
  }
  return call;
}

// The type in which the gradients of a value are summed.
ScalarType sum_type(const Tensor& value) {
  return value.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// ---- CPU ----------------------------------------------------------------------------------------

// The least work that is worth waking a thread for, in samples times channels: some 70 us of
// forward where an encoder of 91 million takes 48 ms on one thread.
constexpr int64_t kMinWorkPerThread = 1 << 17;

// torch's parallel_for, with exceptions handed through: torch would name only the call that failed.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  std::atomic<bool> out_of_memory{false};
  torch::stable::parallel_for(begin, end, grain, [&](int64_t first, int64_t last) {
    try {
      f(first, last);
    } catch (const std::bad_alloc&) {
      out_of_memory = true;
    }
  });
  MSDA_CHECK(!out_of_memory, "msda ran out of memory for the scratch space of its CPU kernels");
}

int64_t grain_size(int64_t work_per_item) {
  return std::max<int64_t>(1, kMinWorkPerThread / std::max<int64_t>(1, work_per_item));
}

int64_t work_per_query_and_head(const Problem& problem) {
  return problem.num_samples * std::max<int64_t>(problem.head_dim, 16);
}

void run_forward_cpu(const Problem& problem, const ForwardOutputs& outputs) {
  const CpuKernels& kernels = cpu_kernels();
  parallel_for(0, problem.batch * problem.num_heads * problem.num_queries,
               grain_size(work_per_query_and_head(problem)), [&](int64_t first, int64_t last) {
                 kernels.forward(problem, outputs, first, last);
               });
}

void zero_fill(const Tensor& tensor) {
  if (tensor.numel() == 0) return;
  auto* const bytes = static_cast<char*>(tensor.mutable_data_ptr());
  parallel_for(0, tensor.numel() * tensor.element_size(), 1 << 20,
               [&](int64_t first, int64_t last) { std::memset(bytes + first, 0, last - first); });
}

// With too few heads for the threads, levels are spread over them too.
bool split_by_level(int64_t num_tasks) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t busiest = (num_tasks + threads - 1) / threads;
  return 4 * num_tasks < 3 * busiest * threads;
}

void run_backward_cpu(const Problem& problem, const BackwardInputs& inputs,
                      const BackwardOutputs& outputs, const Tensor& grad_value) {
  const CpuKernels& kernels = cpu_kernels();
  if (sums_in_place(problem)) zero_fill(grad_value);
  const int64_t num_heads = problem.batch * problem.num_heads;
  const bool by_level = problem.num_levels > 1 && split_by_level(num_heads);
  const int64_t num_parts = by_level ? problem.num_levels : 1;
  const int64_t num_rows = num_heads * problem.num_queries;
  BackwardOutputs parts = outputs;
  std::optional<Tensor> softmax_gradient;  // where tasks see parts of a softmax only
  if (by_level && problem.is_fused && outputs.grad_weights.is_wanted) {
    softmax_gradient = torch::stable::new_empty(grad_value, {num_rows * problem.num_samples},
                                                sum_type(grad_value));
    parts.grad_weights = gradient_array(*softmax_gradient, true);
  }
  parallel_for(0, num_heads * num_parts,
               grain_size(work_per_query_and_head(problem) * problem.num_queries / num_parts),
               [&](int64_t first, int64_t last) {
                 kernels.backward(problem, inputs, parts, by_level, first, last);
               });
  if (softmax_gradient) {
    const ConstArray left = const_array(*softmax_gradient, "grad_weights");
    parallel_for(0, num_rows, grain_size(16 * problem.num_samples),
                 [&](int64_t first, int64_t last) {
                   kernels.backward_softmax(problem, left, outputs, first, last);
                 });
  }
  if (outputs.grad_reference.is_wanted) {
    parallel_for(0, problem.batch * problem.num_queries,
                 grain_size(work_per_query_and_head(problem) * problem.num_heads / 4),
                 [&](int64_t first, int64_t last) {
                   kernels.backward_reference(problem, outputs, first, last);
                 });
  }
}

// ---- CUDA ---------------------------------------------------------------------------------------

#ifdef MSDA_WITH_CUDA

// Runs f(CudaCall) with value's device as the current one.
template <class F>
void with_cuda(const Call& call, const Pyramid& pyramid, const F& f) {
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
    shapes = dense(*pyramid.spatial_shapes_tensor);
    cuda_call.spatial_shapes = shapes->const_data_ptr();
    cuda_call.shapes_are_int64 = shapes->scalar_type() == ScalarType::Long;
  }
  const int64_t table_bytes = level_table_bytes(call.problem.num_levels, on_gpu);
  if (table_bytes > 0) {
    level_table = torch::stable::new_empty(pyramid.value, {table_bytes}, ScalarType::Byte);
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

void run_backward_cuda(const Problem& problem, const BackwardInputs& inputs,
                       BackwardOutputs outputs, const Tensor& value, bool deterministic,
                       const CudaCall& call) {
  const Array grad_value = outputs.grad_value;
  const bool gathers = deterministic && outputs.grad_value.is_wanted;
  if (gathers) outputs.grad_value = {};
  backward_cuda(problem, inputs, outputs, call);
  if (!gathers) return;
  const int64_t num_samples =
      problem.batch * problem.num_queries * problem.num_heads * problem.num_samples;
  const Tensor cells = torch::stable::new_empty(value, {num_samples}, ScalarType::Long);
  const Tensor weights = torch::stable::new_empty(value, {num_samples, 4}, sum_type(value));
  SortedSamples samples;
  samples.cells = cells.mutable_data_ptr<int64_t>();
  samples.weights = weights.mutable_data_ptr();
  sample_cells_cuda(problem, samples, call);
  const auto [sorted_cells, sample_order] = sort(cells);
  samples.sorted_cells = sorted_cells.const_data_ptr<int64_t>();
  samples.sample_order = sample_order.const_data_ptr<int64_t>();
  gather_cuda(problem, inputs, grad_value, samples, call);
}

#endif

// ---- either -------------------------------------------------------------------------------------

Tensor run_forward(const Call& call, const Pyramid& pyramid) {
  const Problem& problem = call.problem;
  const Tensor output = torch::stable::new_empty(
      pyramid.value, {problem.batch, problem.num_queries, problem.num_heads * problem.head_dim});
  if (output.numel() == 0) return output;
  const ForwardOutputs outputs{mutable_array(output)};
#ifdef MSDA_WITH_CUDA
  if (!pyramid.value.is_cpu()) {
    with_cuda(call, pyramid, [&](const CudaCall& cuda) { forward_cuda(problem, outputs, cuda); });
    return output;
  }
#endif
  run_forward_cpu(problem, outputs);
  return output;
}

Tensor ms_deform_attn(const Tensor& value, OptionalSizes spatial_shapes,
                      std::optional<Tensor> spatial_shapes_tensor,
                      std::optional<Tensor> level_start_index, const Tensor& sampling_locations,
                      const Tensor& attention_weights, OptionalSizes num_points, bool nearest) {
  const Pyramid pyramid{value, or_none(spatial_shapes), spatial_shapes_tensor, level_start_index,
                        or_none(num_points)};
  return run_forward(plain_call(pyramid, sampling_locations, attention_weights, nearest), pyramid);
}

Tensor ms_deform_attn_fused(const Tensor& value, OptionalSizes spatial_shapes,
                            std::optional<Tensor> spatial_shapes_tensor,
                            std::optional<Tensor> level_start_index, const Tensor& reference_points,
                            const Tensor& sampling_offsets, const Tensor& attention_logits,
                            OptionalSizes num_points, std::optional<Tensor> padding_mask) {
  const Pyramid pyramid{value, or_none(spatial_shapes), spatial_shapes_tensor, level_start_index,
                        or_none(num_points)};
  return run_forward(
      fused_call(pyramid, reference_points, sampling_offsets, attention_logits, padding_mask),
      pyramid);
}

// grad_output, or the forward's output, as the kernels read it.
Tensor dense_like_output(const Tensor& tensor, const char* name, const Call& call,
                         const Tensor& value) {
  const Problem& problem = call.problem;
  check_device(tensor, name, value);
  check_shape(tensor, name, "(B, Q, M * D)",
              {problem.batch, problem.num_queries, problem.num_heads * problem.head_dim});
  MSDA_CHECK(tensor.scalar_type() == value.scalar_type(), name, " must have the dtype of value (",
             torch::headeronly::toString(value.scalar_type()), "), got ",
             torch::headeronly::toString(tensor.scalar_type()));
  return dense(tensor);
}

// An uninitialised gradient of input, or an empty tensor where none is wanted. The kernels write
// every element.
Tensor gradient_of(const Tensor& input, bool wanted) {
  return torch::stable::new_empty(input, wanted ? sizes_of(input) : Sizes{0});
}

// The same for value. CUDA kernels add to it, which takes zeros, and at least 32 bits.
Tensor sum_of_gradients(const Tensor& value, bool wanted) {
  if (value.is_cpu() || !wanted) return gradient_of(value, wanted);
  return torch::stable::new_zeros(value, sizes_of(value), sum_type(value));
}

// gradients: those that outputs points into, grad_value first.
void run_backward(const Call& call, const Pyramid& pyramid, const Tensor& grad_output,
                  const Tensor* output, const BackwardOutputs& outputs,
                  std::vector<Tensor> gradients, bool deterministic) {
  const Problem& problem = call.problem;
  if (grad_output.numel() == 0 || problem.num_samples == 0) {
    for (Tensor& gradient : gradients) torch::stable::zero_(gradient);
    return;
  }
  if (!outputs.has_wanted()) return;
  const BackwardInputs inputs{const_array(grad_output, "grad_output"),
                              output ? const_array(*output, "output") : ConstArray{}};
#ifdef MSDA_WITH_CUDA
  if (!pyramid.value.is_cpu()) {
    with_cuda(call, pyramid, [&](const CudaCall& cuda) {
      run_backward_cuda(problem, inputs, outputs, pyramid.value, deterministic, cuda);
    });
    return;
  }
#endif
  (void)pyramid, (void)deterministic;  // the CPU's backward always is
  run_backward_cpu(problem, inputs, outputs, gradients.front());
}

std::tuple<Tensor, Tensor, Tensor> ms_deform_attn_backward(
    const Tensor& grad_output, const Tensor& value, OptionalSizes spatial_shapes,
    std::optional<Tensor> spatial_shapes_tensor, std::optional<Tensor> level_start_index,
    const Tensor& sampling_locations, const Tensor& attention_weights, OptionalSizes num_points,
    bool nearest, bool needs_value, bool needs_locations, bool needs_weights, bool deterministic) {
  const Pyramid pyramid{value, or_none(spatial_shapes), spatial_shapes_tensor, level_start_index,
                        or_none(num_points)};
  const Call call = plain_call(pyramid, sampling_locations, attention_weights, nearest);
  const Tensor dense_grad_output = dense_like_output(grad_output, "grad_output", call, value);
  const Tensor grad_value = sum_of_gradients(value, needs_value);
  const Tensor grad_locations = gradient_of(sampling_locations, needs_locations);
  const Tensor grad_weights = gradient_of(attention_weights, needs_weights);
  BackwardOutputs outputs;
  outputs.grad_value = gradient_array(grad_value, needs_value);
  outputs.grad_points = gradient_array(grad_locations, needs_locations);
  outputs.grad_weights = gradient_array(grad_weights, needs_weights);
  run_backward(call, pyramid, dense_grad_output, nullptr, outputs,
               {grad_value, grad_locations, grad_weights}, deterministic);
  return {torch::stable::to(grad_value, value.scalar_type()), grad_locations, grad_weights};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> ms_deform_attn_fused_backward(
    const Tensor& grad_output, const Tensor& output, const Tensor& value,
    OptionalSizes spatial_shapes, std::optional<Tensor> spatial_shapes_tensor,
    std::optional<Tensor> level_start_index, const Tensor& reference_points,
    const Tensor& sampling_offsets, const Tensor& attention_logits, OptionalSizes num_points,
    std::optional<Tensor> padding_mask, bool needs_value, bool needs_reference, bool needs_offsets,
    bool needs_logits, bool deterministic) {
  const Pyramid pyramid{value, or_none(spatial_shapes), spatial_shapes_tensor, level_start_index,
                        or_none(num_points)};
  const Call call =
      fused_call(pyramid, reference_points, sampling_offsets, attention_logits, padding_mask);
  const Tensor dense_grad_output = dense_like_output(grad_output, "grad_output", call, value);
  const Tensor dense_output = dense_like_output(output, "output", call, value);
  const Tensor grad_value = sum_of_gradients(value, needs_value);
  const Tensor grad_reference = gradient_of(reference_points, needs_reference);
  // The gradient of the reference points is summed from that of the offsets, which must then not be
  // rounded to 16 bits on the way.
  const Tensor grad_offsets =
      needs_reference
          ? torch::stable::new_empty(sampling_offsets, sizes_of(sampling_offsets), sum_type(value))
          : gradient_of(sampling_offsets, needs_offsets);
  const Tensor grad_logits = gradient_of(attention_logits, needs_logits);
  BackwardOutputs outputs;
  outputs.grad_value = gradient_array(grad_value, needs_value);
  outputs.grad_points = gradient_array(grad_offsets, needs_offsets || needs_reference);
  outputs.grad_weights = gradient_array(grad_logits, needs_logits);
  outputs.grad_reference = gradient_array(grad_reference, needs_reference);
  run_backward(call, pyramid, dense_grad_output, &dense_output, outputs,
               {grad_value, grad_offsets, grad_logits, grad_reference}, deterministic);
  return {torch::stable::to(grad_value, value.scalar_type()), grad_reference,
          needs_offsets ? torch::stable::to(grad_offsets, sampling_offsets.scalar_type())
                        : gradient_of(sampling_offsets, false),
          grad_logits};
}

#ifndef MSDA_WITH_CUDA
void refuse_cuda(StableIValue*, uint64_t, uint64_t) {
  throw std::runtime_error(
      "value must be on the CPU, got a CUDA tensor: this build of msda has no CUDA kernels. "
      "Install it where nvcc is found (MSDA_CUDA=1 to insist), or set MSDA_BACKEND=reference.");
}
#endif

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
      "_ms_deform_attn_fused_backward(Tensor grad_output, Tensor output, Tensor value, "
      "SymInt[]? spatial_shapes, Tensor? spatial_shapes_tensor, Tensor? level_start_index, "
      "Tensor reference_points, Tensor sampling_offsets, Tensor attention_logits, "
      "int[]? num_points, Tensor? padding_mask, bool needs_value, bool needs_reference, "
      "bool needs_offsets, bool needs_logits, bool deterministic=False) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(msda, CPU, m) {
  m.impl("ms_deform_attn", TORCH_BOX(&ms_deform_attn));
  m.impl("_ms_deform_attn_backward", TORCH_BOX(&ms_deform_attn_backward));
  m.impl("ms_deform_attn_fused", TORCH_BOX(&ms_deform_attn_fused));
  m.impl("_ms_deform_attn_fused_backward", TORCH_BOX(&ms_deform_attn_fused_backward));
}

STABLE_TORCH_LIBRARY_IMPL(msda, CUDA, m) {
#ifdef MSDA_WITH_CUDA
  m.impl("ms_deform_attn", TORCH_BOX(&ms_deform_attn));
  m.impl("_ms_deform_attn_backward", TORCH_BOX(&ms_deform_attn_backward));
  m.impl("ms_deform_attn_fused", TORCH_BOX(&ms_deform_attn_fused));
  m.impl("_ms_deform_attn_fused_backward", TORCH_BOX(&ms_deform_attn_fused_backward));
#else
  m.impl("ms_deform_attn", &refuse_cuda);
  m.impl("_ms_deform_attn_backward", &refuse_cuda);
  m.impl("ms_deform_attn_fused", &refuse_cuda);
  m.impl("_ms_deform_attn_fused_backward", &refuse_cuda);
#endif
}

}  // namespace msda

// What msda.info() reads, through ctypes.
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

__attribute__((visibility("default"))) const char* msda_built_with_torch() {
  return MSDA_TORCH_VERSION;
}

}  // extern "C"
