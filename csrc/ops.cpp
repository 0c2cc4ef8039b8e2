// The torch side of the operator: schemas, input checks, allocation and dispatch, written against
// LibTorch's stable ABI so that one binary serves every torch from 2.10 on.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
// Before torch 2.13 there is no such symbol; its address is then null.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();
#ifdef MSDA_WITH_CUDA
#include <torch/csrc/stable/accelerator.h>
// In a torch without CUDA there is no such symbol; its address is then null.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);
#endif
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/Layout.h>
#include <torch/headeronly/core/ScalarType.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <array>
#include <atomic>
#include <cctype>
#include <cstring>
#include <iomanip>
#include <new>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "call.h"
#include "cpu/kernels.h"
#include "cuda/kernels.h"
#include "problem.h"

namespace msda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalSizes = std::optional<Sizes>;  // AOTInductor passes nothing for an empty list

const Sizes& or_none(const OptionalSizes& sizes) {
  static const Sizes none;
  return sizes ? *sizes : none;
}

DType kernel_dtype(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      return DType::kFloat32;
  }
}

ConstArray const_array(const Tensor& tensor) {
  return {tensor.const_data_ptr(), kernel_dtype(tensor)};
}

Array mutable_array(const Tensor& tensor) {
  if (tensor.numel() == 0) return {};
  return {tensor.mutable_data_ptr(), kernel_dtype(tensor)};
}

// A gradient that is not wanted has an empty tensor.
Gradient gradient_array(const Tensor& tensor, bool is_wanted) {
  return {mutable_array(tensor), is_wanted};
}

// ---- what messages say of a tensor
// ---------------------------------------------------------------

// torch's stable interface has no quantised types and throws where it meets one.
ScalarType dtype_of(const Tensor& tensor) {
  try {
    return tensor.scalar_type();
  } catch (const std::exception&) {
    int32_t number = -1;
    aoti_torch_get_dtype(tensor.get(), &number);
    return static_cast<ScalarType>(number);
  }
}

// As Python writes it.
std::string dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::ComplexHalf:
      return "complex32";
    case ScalarType::ComplexFloat:
      return "complex64";
    case ScalarType::ComplexDouble:
      return "complex128";
    default: {
      std::string name = torch::headeronly::toString(type);
      for (char& letter : name) letter = char(std::tolower(letter));
      return name;
    }
  }
}

std::string device_name(const Tensor& tensor) {
  using torch::headeronly::DeviceType;
  const torch::stable::Device device = tensor.device();
  const DeviceType type = device.type();
  if (type == DeviceType::CPU) return "cpu";
  const std::string name = type == DeviceType::CUDA   ? "cuda"
                           : type == DeviceType::Meta ? "meta"
                           : type == DeviceType::XPU  ? "xpu"
                           : type == DeviceType::MPS  ? "mps"
                                                      : "device type " + std::to_string(int(type));
  return device.index() < 0 ? name : name + ":" + std::to_string(device.index());
}

const char* layout_name(torch::headeronly::Layout layout) {
  using torch::headeronly::Layout;
  switch (layout) {
    case Layout::Strided:
      return "strided";
    case Layout::Sparse:
      return "sparse_coo";
    case Layout::SparseCsr:
      return "sparse_csr";
    case Layout::SparseCsc:
      return "sparse_csc";
    case Layout::SparseBsr:
      return "sparse_bsr";
    case Layout::SparseBsc:
      return "sparse_bsc";
    case Layout::Mkldnn:
      return "_mkldnn";
    default:
      return "jagged";
  }
}

// ---- memory -------------------------------------------------------------------------------------

int element_size(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
    case ScalarType::Long:
      return 8;
    case ScalarType::Float:
    case ScalarType::Int:
      return 4;
    case ScalarType::Bool:
    case ScalarType::Byte:
      return 1;
    default:
      return 2;
  }
}

std::string amount(double bytes) {
  std::ostringstream text;
  text << std::fixed << std::setprecision(1);
  bytes < 1e9 ? text << bytes / 1e6 << " MB" : text << bytes / 1e9 << " GB";
  return text.str();
}

// What torch said of the allocation that just failed. An older torch does not tell: then the words
// that programs look for which try again with less.
std::string why_not_allocated(bool on_cpu) {
  if (torch_exception_get_what_without_backtrace != nullptr) {
    return torch_exception_get_what_without_backtrace();
  }
  return on_cpu ? "DefaultCPUAllocator: can't allocate memory" : "CUDA out of memory.";
}

// The result of allocate(), which makes a tensor of a shape and type where `like` is. name, what:
// said where there is no memory for it.
template <class F>
Tensor in_memory(const char* name, const char* what, const Tensor& like, const Sizes& sizes,
                 ScalarType type, const F& allocate) {
  try {
    return allocate();
  } catch (const std::exception&) {
    double bytes = element_size(type);
    for (const int64_t size : sizes) bytes *= double(size);
    fail(name, " must fit into memory", what, ", got ", to_string(sizes), " of ", dtype_name(type),
         " on ", device_name(like), ", ", amount(bytes), ": ", why_not_allocated(like.is_cpu()));
  }
}

Sizes sizes_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return Sizes(sizes.begin(), sizes.end());
}

// From this size on it repays to ask for huge pages.
constexpr int64_t kHugePagesFrom = int64_t(4) << 20;

// Asks for huge pages before memory is written to for the first time: what is large comes fresh
// from the kernel in every call, and to fault it in by small pages takes longer than to fill it.
// Where there are none, nothing changes.
void ask_for_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kHugePage = uintptr_t(2) << 20;
  const auto begin = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (begin + bytes) / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

Tensor new_empty(const char* name, const Tensor& like, const Sizes& sizes, ScalarType type) {
  const Tensor made = in_memory(name, "", like, sizes, type,
                                [&] { return torch::stable::new_empty(like, sizes, type); });
  int64_t bytes = element_size(type);
  for (const int64_t size : sizes) bytes *= size;
  if (bytes >= kHugePagesFrom && like.is_cpu()) {
    ask_for_huge_pages(made.mutable_data_ptr(), bytes);
  }
  return made;
}

Tensor aligned_copy(const Tensor& tensor, const char* name) {
  return in_memory(name, " once more, aligned", tensor, sizes_of(tensor), tensor.scalar_type(),
                   [&] { return torch::stable::clone(tensor); });
}

bool is_aligned(const Tensor& tensor, size_t bytes) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % bytes == 0;
}

// The tensor itself where it is contiguous: asking torch's dispatcher would take a microsecond. The
// CPU kernels read it wherever it lies, those on CUDA only whole elements, or pairs of them.
Tensor dense(const Tensor& tensor, const char* name, bool in_pairs = false) {
  const auto is_readable = [&](const Tensor& given) {
    return given.is_cpu() || is_aligned(given, (in_pairs ? 2 : 1) * given.element_size());
  };
  if (tensor.is_contiguous()) return is_readable(tensor) ? tensor : aligned_copy(tensor, name);
  const Tensor copy =
      in_memory(name, " once more, without gaps", tensor, sizes_of(tensor), tensor.scalar_type(),
                [&] { return torch::stable::contiguous(tensor); });
  return is_readable(copy) ? copy : aligned_copy(copy, name);
}

Tensor converted(const Tensor& tensor, const char* name, ScalarType type) {
  if (tensor.scalar_type() == type) return tensor;
  return in_memory(name, "", tensor, sizes_of(tensor), type,
                   [&] { return torch::stable::to(tensor, type); });
}

#ifndef MSDA_WITH_CUDA
// How to get CUDA kernels, ending with the command. Python knows what it is on this machine.
std::string& cuda_remedy() {
  static std::string text = "to have them, build msda where nvcc is found, with MSDA_CUDA=1";
  return text;
}
#endif

}  // namespace

// ---- what the checks ask of a tensor ------------------------------------------------------------

template <>
struct Access<Tensor> {
  static Type type(const Tensor& tensor) {
    switch (dtype_of(tensor)) {
      case ScalarType::Float:
        return Type::kFloat32;
      case ScalarType::Double:
        return Type::kFloat64;
      case ScalarType::Half:
        return Type::kFloat16;
      case ScalarType::BFloat16:
        return Type::kBFloat16;
      case ScalarType::Long:
        return Type::kInt64;
      case ScalarType::Int:
        return Type::kInt32;
      case ScalarType::Bool:
        return Type::kBool;
      default:
        return Type::kOther;
    }
  }

  static std::string type_name(const Tensor& tensor) { return dtype_name(dtype_of(tensor)); }

  static void check_is_dense(const Tensor& tensor, const char* name) {
    MSDA_CHECK(tensor.defined(), name, " must be a Tensor, got NoneType");
    int32_t layout = -1;
    aoti_torch_get_layout(tensor.get(), &layout);
    MSDA_CHECK(layout == aoti_torch_layout_strided(), name,
               " must be a dense tensor, got one of layout ", layout_name(tensor.layout()));
  }

  static bool is_on_host(const Tensor& tensor) { return tensor.is_cpu(); }
  static bool has_same_device(const Tensor& one, const Tensor& other) {
    return one.device() == other.device();
  }
  static std::string device_name(const Tensor& tensor) { return msda::device_name(tensor); }
  static auto sizes(const Tensor& tensor) { return tensor.sizes(); }

  // The bytes of its storage that a tensor reaches, from the first on.
  static bool reaches(const Tensor& tensor, int64_t* bytes) {
    int64_t last = tensor.storage_offset();
    const auto sizes = tensor.sizes(), strides = tensor.strides();
    for (size_t i = 0; i < sizes.size(); ++i) {
      int64_t step;
      if (__builtin_mul_overflow(sizes[i] - 1, strides[i], &step) ||
          __builtin_add_overflow(last, step, &last)) {
        return false;
      }
    }
    return !__builtin_add_overflow(last, 1, &last) &&
           !__builtin_mul_overflow(last, int64_t(tensor.element_size()), bytes);
  }

  // What a tensor reads must lie in its storage: that may have been freed or shortened since.
  static void check_extent(const Tensor& tensor, const char* name) {
    if (tensor.numel() == 0) return;
    int64_t storage = 0, bytes = 0;
    MSDA_CHECK(aoti_torch_get_storage_size(tensor.get(), &storage) == AOTI_TORCH_SUCCESS, name,
               " must have a storage, got a tensor without");
    const bool fits = reaches(tensor, &bytes) && bytes <= storage;
    MSDA_CHECK(fits, name, " must lie within its storage, got a tensor that reaches ", bytes,
               " bytes into a storage of ", storage);
  }

  static void check_device(const Tensor& value) {
#ifdef MSDA_WITH_CUDA
    MSDA_CHECK(value.is_cpu() || value.is_cuda(),
               "value must be on the CPU or on a CUDA device, got ", "a tensor on ",
               device_name(value));
#else
    MSDA_CHECK(
        !value.is_cuda(), "value must be on the CPU, got a tensor on ", device_name(value),
        ": this build of msda has no CUDA kernels. MSDA_BACKEND=reference does without, slowly; ",
        cuda_remedy());
    MSDA_CHECK(value.is_cpu(), "value must be on the CPU, got a tensor on ", device_name(value));
#endif
  }

  static Tensor dense(const Tensor& tensor, const char* name, bool in_pairs) {
    return msda::dense(tensor, name, in_pairs);
  }
  static const void* data(const Tensor& tensor) { return tensor.const_data_ptr(); }
  static ConstArray array(const Tensor& tensor) { return const_array(tensor); }
};

namespace {

// The type in which the gradients of a value are summed.
ScalarType sum_type(const Tensor& value) {
  return value.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// ---- CPU ----------------------------------------------------------------------------------------

// torch's parallel_for, with exceptions handed through: torch would name only the call that failed.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  std::atomic<int64_t> missing{0};
  torch::stable::parallel_for(begin, end, grain, [&](int64_t first, int64_t last) {
    try {
      f(first, last);
    } catch (const OutOfMemory& error) {
      missing = error.bytes;
    }
  });
  MSDA_CHECK(missing == 0, "the scratch space of the CPU kernels must fit into memory, got ",
             amount(double(missing.load())),
             " for each thread: DefaultCPUAllocator: can't allocate memory");
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
    softmax_gradient = new_empty("the scratch space of the softmax's gradient", grad_value,
                                 {num_rows * problem.num_samples}, sum_type(grad_value));
    parts.grad_weights = gradient_array(*softmax_gradient, true);
  }
  parallel_for(0, num_heads * num_parts,
               grain_size(work_per_query_and_head(problem) * problem.num_queries / num_parts),
               [&](int64_t first, int64_t last) {
                 kernels.backward(problem, inputs, parts, by_level, first, last);
               });
  if (softmax_gradient) {
    const ConstArray left = const_array(*softmax_gradient);
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
    shapes = dense(*pyramid.spatial_shapes_tensor, kSpatialShapes.name);
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

void run_backward_cuda(const Problem& problem, const BackwardInputs& inputs,
                       BackwardOutputs outputs, const Tensor& value, bool deterministic,
                       const CudaCall& call) {
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

#endif

// ---- either -------------------------------------------------------------------------------------

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

// An uninitialised gradient of input, or an empty tensor where none is wanted. The kernels write
// every element.
Tensor gradient_of(const Tensor& input, const char* name, bool wanted) {
  return new_empty(name, input, wanted ? sizes_of(input) : Sizes{0}, input.scalar_type());
}

// The same for value. CUDA kernels add to it, which takes zeros, and at least 32 bits.
Tensor sum_of_gradients(const Tensor& value, bool wanted) {
  constexpr char kName[] = "grad_value";
  if (value.is_cpu() || !wanted) return gradient_of(value, kName, wanted);
  const Sizes sizes = sizes_of(value);
  return in_memory(kName, "", value, sizes, sum_type(value),
                   [&] { return torch::stable::new_zeros(value, sizes, sum_type(value)); });
}

// gradients: those that outputs points into, grad_value first.
void run_backward(const Call<Tensor>& call, const Pyramid<Tensor>& pyramid,
                  const Tensor& grad_output, const std::optional<Tensor>& output,
                  const BackwardOutputs& outputs, std::vector<Tensor> gradients,
                  bool deterministic) {
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
  const Pyramid<Tensor> pyramid{value, or_none(spatial_shapes), spatial_shapes_tensor,
                                level_start_index, or_none(num_points)};
  Call<Tensor> call = plain_call(pyramid, sampling_locations, attention_weights, nearest);
  check(grad_output, kGradOutput, call.known);
  const Tensor dense_grad_output = dense(grad_output, kGradOutput.name);
  const Tensor grad_value = sum_of_gradients(value, needs_value);
  const Tensor grad_locations =
      gradient_of(sampling_locations, "grad_sampling_locations", needs_locations);
  const Tensor grad_weights =
      gradient_of(attention_weights, "grad_attention_weights", needs_weights);
  BackwardOutputs outputs;
  outputs.grad_value = gradient_array(grad_value, needs_value);
  outputs.grad_points = gradient_array(grad_locations, needs_locations);
  outputs.grad_weights = gradient_array(grad_weights, needs_weights);
  run_backward(call, pyramid, dense_grad_output, std::nullopt, outputs,
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
  const Tensor dense_grad_output = dense(grad_output, kGradOutput.name);
  if (output) output = dense(*output, kOutput.name);
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
  outputs.grad_reference = gradient_array(grad_reference, needs_reference);
  run_backward(call, pyramid, dense_grad_output, output, outputs,
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
// All others (sparse and quantised tensors, other devices): the checks refuse them by name.
STABLE_TORCH_LIBRARY_IMPL(msda, CompositeExplicitAutograd, m) { implement(m); }

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

// What an error about a CUDA tensor is to end with.
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
