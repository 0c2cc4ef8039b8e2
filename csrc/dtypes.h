// The floating-point dtypes of the kernels, CPU and CUDA. No torch.
//
// A new dtype needs
//   this file          a name in DType, the struct that stores a number, a case in dispatch_dtype
//   arguments.h        a name in Type, a case in floating_dtype, a word in kDTypeRules
//   torch_tensor.h     torch's name for it
//   c_api.cpp, msda.h  its number in the C interface; runtimes/*.cpp: the runtimes' names for it
//   cpu/simd.h         load() and store() of a vector of such numbers
//   cuda/vec.cuh       widen() and narrow() of one number, a case in with_element_type
//   CMakeLists.txt     cuda_value_types, for CUDA kernels whose value is of it
//   msda/dtypes.py     the list that Python's checks are made from; msda/testing.py: its tolerance
//   msda/numpy.py      its NumPy type; msda/onnx.py, msda/openvino.py where the runtimes have it
//   tests/fuzz         its rounding, get() and put() in numbers.h, its draw in case.cpp
//   tests/cuda/executor/module.cpp  its NumPy type
// A switch over DType or Type that lacks it does not compile (-Werror=switch), and
// tests/operator/test_arguments.py compares the lists of C++ and Python.

#pragma once

#include <cstdint>
#include <type_traits>

namespace msda {

enum class DType : int32_t { kFloat32, kFloat64, kFloat16, kBFloat16 };

// 16-bit floats as stored; all arithmetic is done in acc_t.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// The type in which values of type T are summed, and in which their coordinates are computed.
template <class T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Calls f with a null pointer of the type that stores a dtype.
template <class F>
inline auto dispatch_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat64:
      return f(static_cast<double*>(nullptr));
    case DType::kFloat16:
      return f(static_cast<Half*>(nullptr));
    case DType::kBFloat16:
      return f(static_cast<BFloat16*>(nullptr));
    case DType::kFloat32:
      break;
  }
  return f(static_cast<float*>(nullptr));
}

constexpr int64_t element_size(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return sizeof(double);
    case DType::kFloat32:
      return sizeof(float);
    case DType::kFloat16:
    case DType::kBFloat16:
      break;
  }
  return sizeof(Half);
}

}  // namespace msda
