// torch's tensors in messages, and in memory. See torch_tensor.h.

#include "torch_tensor.h"

#include <torch/headeronly/core/Layout.h>

// Before torch 2.13 there is no such symbol; its address is then null.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cctype>
#include <exception>
#include <iomanip>
#include <sstream>

namespace msda {

// ---- messages -----------------------------------------------------------------------------------

ScalarType scalar_type(const Tensor& tensor) {
  try {
    return tensor.scalar_type();
  } catch (const std::exception&) {
    int32_t number = -1;
    aoti_torch_get_dtype(tensor.get(), &number);
    return static_cast<ScalarType>(number);
  }
}

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

std::string layout_name(const Tensor& tensor) {
  using torch::headeronly::Layout;
  switch (tensor.layout()) {
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

std::string amount(double bytes) {
  std::ostringstream text;
  text << std::fixed << std::setprecision(1);
  bytes < 1e9 ? text << bytes / 1e6 << " MB" : text << bytes / 1e9 << " GB";
  return text.str();
}

#ifndef MSDA_WITH_CUDA
std::string& cuda_remedy() {
  static std::string text = "to have them, build msda where nvcc is found, with MSDA_CUDA=1";
  return text;
}
#endif

// ---- memory -------------------------------------------------------------------------------------

namespace {

// The bytes of an element, for the types that are allocated here.
int64_t element_size(ScalarType type) {
  switch (type) {
    case ScalarType::Long:
      return 8;
    case ScalarType::Int:
      return 4;
    case ScalarType::Bool:
    case ScalarType::Byte:
      return 1;
    default:
      return element_size(floating_dtype(checked_type(type)).value());
  }
}

// Torch's message about the allocation that just failed. An older torch has none: then the words by
// which programs know that they must try again with less.
std::string why_not_allocated(bool on_cpu) {
  if (torch_exception_get_what_without_backtrace != nullptr) {
    return torch_exception_get_what_without_backtrace();
  }
  return on_cpu ? "DefaultCPUAllocator: can't allocate memory" : "CUDA out of memory.";
}

// The result of allocate(), which makes a tensor of a shape and type on the device of `like`. The
// message begins with name and what where there is no memory for it.
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

// Smaller memory is not worth a request for huge pages.
constexpr int64_t kHugePagesFrom = int64_t(4) << 20;

// Asks for huge pages before the first write to memory: in every call, large memory comes fresh
// from the system, and to fault it in by small pages takes longer than to fill it. Without huge
// pages nothing changes.
void ask_for_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kHugePage = uintptr_t(2) << 20;
  const auto begin = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (begin + bytes) / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

Tensor aligned_copy(const Tensor& tensor, const char* name) {
  return in_memory(name, " once more, aligned", tensor, sizes_of(tensor), tensor.scalar_type(),
                   [&] { return torch::stable::clone(tensor); });
}

bool is_aligned(const Tensor& tensor, size_t bytes) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % bytes == 0;
}

}  // namespace

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

Tensor new_zeros(const char* name, const Tensor& like, const Sizes& sizes, ScalarType type) {
  return in_memory(name, "", like, sizes, type,
                   [&] { return torch::stable::new_zeros(like, sizes, type); });
}

Tensor contiguous(const Tensor& tensor, const char* name, bool in_pairs) {
  const auto is_readable = [&](const Tensor& given) {
    return given.is_cpu() || is_aligned(given, (in_pairs ? 2 : 1) * given.element_size());
  };
  // Without a call of torch's dispatcher, which would take a microsecond.
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

}  // namespace msda
