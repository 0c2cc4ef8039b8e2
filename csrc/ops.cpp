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

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <array>
#include <atomic>
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

#include "arguments.h"
#include "cpu/kernels.h"
#include "cuda/kernels.h"
#include "problem.h"

namespace msda {
namespace {

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
// CPU kernels read it wherever it lies, those on CUDA only whole elements.
Tensor dense(const Tensor& tensor, const char* name) {
  if (tensor.is_contiguous()) {
    const bool is_readable = tensor.is_cpu() || is_aligned(tensor, tensor.element_size());
    return is_readable ? tensor : aligned_copy(tensor, name);
  }
  return in_memory(name, " once more, without gaps", tensor, sizes_of(tensor), tensor.scalar_type(),
                   [&] { return torch::stable::contiguous(tensor); });
}

Tensor converted(const Tensor& tensor, const char* name, ScalarType type) {
  if (tensor.scalar_type() == type) return tensor;
  return in_memory(name, "", tensor, sizes_of(tensor), type,
                   [&] { return torch::stable::to(tensor, type); });
}

// The elements of an integer tensor on the CPU.
Sizes read_integers(const Tensor& tensor, const char* name) {
  const Tensor given = dense(tensor, name);
  Sizes numbers(given.numel());
  const auto* const bytes = static_cast<const char*>(given.const_data_ptr());
  for (size_t i = 0; i < numbers.size(); ++i) {
    if (given.scalar_type() == ScalarType::Long) {
      std::memcpy(&numbers[i], bytes + 8 * i, 8);
    } else {
      int32_t number;
      std::memcpy(&number, bytes + 4 * i, 4);
      numbers[i] = number;
    }
  }
  return numbers;
}

// ---- checks -------------------------------------------------------------------------------------

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
  Known known;

  const Tensor& keep(const Tensor& tensor, const Argument& argument) {
    kept.push_back(dense(tensor, argument.name));
    return kept.back();
  }

  // The same for numbers that CUDA kernels read in pairs, which must be aligned to pairs.
  const Tensor& keep_pairs(const Tensor& tensor, const Argument& argument) {
    const Tensor& kept_tensor = keep(tensor, argument);
    const bool is_readable =
        kept_tensor.is_cpu() || is_aligned(kept_tensor, 2 * kept_tensor.element_size());
    return is_readable ? kept_tensor : kept.back() = aligned_copy(kept_tensor, argument.name);
  }
};

// Whether the sizes of the levels are known to the GPU alone. They are then neither read nor
// checked here.
bool shapes_are_on_gpu(const Pyramid& pyramid) {
  return pyramid.spatial_shapes_tensor && !pyramid.spatial_shapes_tensor->is_cpu();
}

// All numbers are 0 where the GPU alone knows them.
Sizes read_spatial_shapes(const Pyramid& pyramid, Known& known) {
  if (!pyramid.spatial_shapes_tensor) {
    MSDA_CHECK(pyramid.spatial_shapes.size() % 2 == 0,
               "spatial_shapes must hold (height, width) pairs, got ",
               pyramid.spatial_shapes.size(), " numbers");
    known[kL] = pyramid.spatial_shapes.size() / 2;
    return pyramid.spatial_shapes;
  }
  MSDA_CHECK(pyramid.spatial_shapes.empty(),
             "spatial_shapes must be given as numbers or as a tensor, got both");
  const Tensor& shapes = *pyramid.spatial_shapes_tensor;
  check(shapes, kSpatialShapes, known);
  return shapes.is_cpu() ? read_integers(shapes, kSpatialShapes.name) : Sizes(2 * known[kL], 0);
}

#ifndef MSDA_WITH_CUDA
// How to get CUDA kernels, ending with the command. Python knows what it is on this machine.
std::string& cuda_remedy() {
  static std::string text = "to have them, build msda where nvcc is found, with MSDA_CUDA=1";
  return text;
}
#endif

// Checks value and the pyramid's metadata and fills in all sizes but those of queries and points.
void read_pyramid(const Pyramid& pyramid, Call& call) {
  const Tensor& value = pyramid.value;
  Known& known = call.known;
  known.value = &value;
  known.ragged = !pyramid.num_points.empty();
  check(value, kValue, known);
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
  int64_t channels;
  MSDA_CHECK(!__builtin_mul_overflow(known[kM], known[kD], &channels),
             "value must hold fewer than 2^63 channels, got ", to_string(value.sizes()));
  Problem& problem = call.problem;
  problem.batch = known[kB];
  problem.num_keys = known[kS];
  problem.num_heads = known[kM];
  problem.head_dim = known[kD];
  problem.value = const_array(call.keep(value, kValue));

  const Sizes shapes = read_spatial_shapes(pyramid, known);
  problem.num_levels = known[kL];
  MSDA_CHECK(problem.num_levels > 0, "spatial_shapes must hold at least one level, got none");
  const bool on_host = !shapes_are_on_gpu(pyramid);
  MSDA_CHECK(!known.ragged || int64_t(pyramid.num_points.size()) == problem.num_levels,
             "num_points must hold one count per level (", problem.num_levels, "), got ",
             to_string(pyramid.num_points));
  Sizes starts;
  int64_t start = 0;
  for (int64_t l = 0; l < problem.num_levels; ++l) {
    const int64_t height = shapes[2 * l], width = shapes[2 * l + 1];
    MSDA_CHECK(!on_host || (height > 0 && width > 0), "spatial_shapes must be positive, got ",
               to_string(shapes));
    MSDA_CHECK(std::max(height, width) <= kMaxSide || value.scalar_type() == ScalarType::Double,
               "spatial_shapes must be at most 2^24 on a side, where float32 coordinates end, got ",
               to_string(shapes));
    const int64_t points = known.ragged ? pyramid.num_points[l] : 0;
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
  MSDA_CHECK(!on_host || start == problem.num_keys,
             "spatial_shapes must cover the S = ", problem.num_keys, " keys of value, got ", start,
             " pixels: ", to_string(shapes));

  // The start of a level follows from the shapes: where both are on the CPU it is checked, else it
  // is not read.
  if (!pyramid.level_start_index) return;
  check(*pyramid.level_start_index, kLevelStartIndex, known);
  if (on_host && pyramid.level_start_index->is_cpu()) {
    const Sizes given = read_integers(*pyramid.level_start_index, kLevelStartIndex.name);
    MSDA_CHECK(given == starts, "level_start_index must be the running sum of height * width, ",
               to_string(starts), ", got ", to_string(given));
  }
}

// Checks the per-sample tensors and fills in the sizes of queries and points.
void read_samples(const Pyramid& pyramid, const Tensor& points, const Argument& points_row,
                  const Tensor& weights, const Argument& weights_row, Call& call) {
  Problem& problem = call.problem;
  Known& known = call.known;
  check(points, points_row, known);
  if (known.ragged) {
    int64_t rest = known[kK];
    for (const Level& level : call.levels)
      rest = level.num_points <= rest ? rest - level.num_points : -1;
    MSDA_CHECK(rest == 0, "num_points must sum to the K = ", known[kK], " samples of ",
               points_row.name, ", got ", to_string(pyramid.num_points));
  } else {
    MSDA_CHECK(!__builtin_mul_overflow(known[kL], known[kP], &known[kK]), points_row.name,
               " must hold fewer than 2^63 samples, got ", to_string(points.sizes()));
    for (Level& level : call.levels) level.num_points = known[kP];
  }
  check(weights, weights_row, known);
  problem.num_queries = known[kQ];
  problem.num_samples = known[kK];
  problem.points = const_array(call.keep_pairs(points, points_row));
  problem.weights = const_array(call.keep(weights, weights_row));
}

Call plain_call(const Pyramid& pyramid, const Tensor& sampling_locations,
                const Tensor& attention_weights, bool nearest) {
  Call call;
  read_pyramid(pyramid, call);
  read_samples(pyramid, sampling_locations, kSamplingLocations, attention_weights,
               kAttentionWeights, call);
  call.problem.nearest = nearest;
  call.problem.is_fused = false;
  return call;
}

Call fused_call(const Pyramid& pyramid, const Tensor& reference_points,
                const Tensor& sampling_offsets, const Tensor& attention_logits,
                const std::optional<Tensor>& padding_mask) {
  Call call;
  read_pyramid(pyramid, call);
  read_samples(pyramid, sampling_offsets, kSamplingOffsets, attention_logits, kAttentionLogits,
               call);
  Problem& problem = call.problem;

  check(reference_points, kReferencePoints, call.known);
  problem.is_fused = true;
  problem.reference = const_array(call.keep_pairs(reference_points, kReferencePoints));
  problem.reference_levels = reference_points.size(2);
  problem.reference_size = reference_points.size(3);

  if (padding_mask) {
    check(*padding_mask, kPaddingMask, call.known);
    problem.has_padding_mask = true;
    problem.padding_mask =
        static_cast<const uint8_t*>(call.keep(*padding_mask, kPaddingMask).const_data_ptr());
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

Tensor run_forward(const Call& call, const Pyramid& pyramid) {
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
void run_backward(const Call& call, const Pyramid& pyramid, const Tensor& grad_output,
                  const std::optional<Tensor>& output, const BackwardOutputs& outputs,
                  std::vector<Tensor> gradients, bool deterministic) {
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
  const Pyramid pyramid{value, or_none(spatial_shapes), spatial_shapes_tensor, level_start_index,
                        or_none(num_points)};
  Call call = plain_call(pyramid, sampling_locations, attention_weights, nearest);
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
  const Pyramid pyramid{value, or_none(spatial_shapes), spatial_shapes_tensor, level_start_index,
                        or_none(num_points)};
  Call call =
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
