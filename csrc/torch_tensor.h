// torch's tensors, as the checks and the kernels need them. Written against LibTorch's stable ABI.

#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <string>

#include "call.h"

namespace msda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ---- in messages: torch_tensor.cpp --------------------------------------------------------------

// The type of any tensor: torch's stable interface throws where it meets a quantised one.
ScalarType scalar_type(const Tensor& tensor);

// As Python writes them.
std::string dtype_name(ScalarType type);
std::string device_name(const Tensor& tensor);
std::string layout_name(const Tensor& tensor);

// "12.3 MB"
std::string amount(double bytes);

#ifndef MSDA_WITH_CUDA
// How to get CUDA kernels, ending with the command. Python knows what it is on this machine.
std::string& cuda_remedy();
#endif

// ---- in memory: torch_tensor.cpp ----------------------------------------------------------------

// Each says which name found no memory, and how much it asked for.

// On the device of another tensor.
Tensor new_empty(const char* name, const Tensor& like, const Sizes& sizes, ScalarType type);
Tensor new_zeros(const char* name, const Tensor& like, const Sizes& sizes, ScalarType type);

// The tensor itself where it is contiguous, else a copy. The CPU kernels read it at any address,
// those on CUDA only whole elements, or pairs of them.
Tensor contiguous(const Tensor& tensor, const char* name, bool in_pairs = false);

// The tensor itself where it is of that type, else a copy.
Tensor converted(const Tensor& tensor, const char* name, ScalarType type);

inline Sizes sizes_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return Sizes(sizes.begin(), sizes.end());
}

// The type in which the gradients of a value are summed.
inline ScalarType sum_type(const Tensor& value) {
  return value.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// ---- in the checks ------------------------------------------------------------------------------

inline Type checked_type(ScalarType type) {
  switch (type) {
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

template <>
struct TensorTraits<Tensor> {
  static Type type(const Tensor& tensor) { return checked_type(scalar_type(tensor)); }

  static std::string type_name(const Tensor& tensor) { return dtype_name(scalar_type(tensor)); }

  static void check_layout(const Tensor& tensor, const char* name) {
    MSDA_CHECK(tensor.defined(), name, " must be a Tensor, got NoneType");
    int32_t layout = -1;
    aoti_torch_get_layout(tensor.get(), &layout);
    MSDA_CHECK(layout == aoti_torch_layout_strided(), name,
               " must be a dense tensor, got one of layout ", layout_name(tensor));
  }

  static bool is_on_host(const Tensor& tensor) { return tensor.is_cpu(); }
  static bool has_same_device(const Tensor& one, const Tensor& other) {
    return one.device() == other.device();
  }
  static std::string device_name(const Tensor& tensor) { return msda::device_name(tensor); }
  static auto sizes(const Tensor& tensor) { return tensor.sizes(); }

  // The end of what a tensor reaches, in bytes from the start of its storage; false: beyond 2^63.
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

  // The elements of a tensor must lie in its storage, which may have been freed or shortened since.
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
               "value must be on the CPU or on a CUDA device, got a tensor on ",
               device_name(value));
#else
    MSDA_CHECK(
        !value.is_cuda(), "value must be on the CPU, got a tensor on ", device_name(value),
        ": this build of msda has no CUDA kernels. MSDA_BACKEND=reference does without, slowly; ",
        cuda_remedy());
    MSDA_CHECK(value.is_cpu(), "value must be on the CPU, got a tensor on ", device_name(value));
#endif
  }

  static Tensor contiguous(const Tensor& tensor, const char* name, bool in_pairs) {
    return msda::contiguous(tensor, name, in_pairs);
  }
  static const void* data(const Tensor& tensor) { return tensor.const_data_ptr(); }
};

// ---- for the kernels ----------------------------------------------------------------------------

inline Array mutable_array(const Tensor& tensor) {
  if (tensor.numel() == 0) return {};
  return {tensor.mutable_data_ptr(), floating_dtype(TensorTraits<Tensor>::type(tensor)).value()};
}

// A gradient that is not wanted has an empty tensor.
inline Gradient gradient_array(const Tensor& tensor, bool is_wanted) {
  return {mutable_array(tensor), is_wanted};
}

}  // namespace msda
