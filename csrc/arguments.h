// The arguments of the operators in one table, and the check of a tensor against its row.
//
// msda/checks.py holds the same table and the same checks, for tensors without data and for the
// reference. tests/test_arguments.py compares the tables and walks every rule through both.

#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/Layout.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cctype>
#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace msda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

// ---- the table
// -----------------------------------------------------------------------------------

// What an axis is as long as. B batch, S keys, M heads, D channels per head, Q queries, L levels,
// P points of each level, or, where num_points gives a count for each, K of all levels together.
enum Axis : int8_t { kB, kS, kM, kD, kQ, kL, kP, kK, kNumLetters, k2, k2Or4, kLOr1, kMTimesD };

constexpr const char* kAxisNames[] = {"B", "S", "M", "D",      "Q",      "L",    "P",
                                      "K", "",  "2", "2 or 4", "L or 1", "M * D"};

enum class DTypes : int8_t { kFloat, kInteger, kBool, kOfValue };
constexpr const char* kDTypeRules[] = {"be float32, float64, float16 or bfloat16",
                                       "be int64 or int32", "be bool (True = padding)",
                                       "have the dtype of value"};

enum class Place : int8_t { kAny, kWithValue, kHostOrWithValue };
constexpr const char* kPlaceRules[] = {"be on any device", "be on the device of value",
                                       "be on the CPU or on the device of value"};

constexpr int kMaxRank = 6;

struct Shape {
  int rank;
  Axis axes[kMaxRank];

  std::string letters() const {
    std::string text;
    for (int i = 0; i < rank; ++i) text += std::string(i ? ", " : "") + kAxisNames[axes[i]];
    return "(" + text + (rank == 1 ? ",)" : ")");
  }
};

struct Argument {
  const char* name;
  DTypes dtypes;
  Place place;
  Shape shape;
  Shape ragged_shape;  // with num_points
};

constexpr Shape kPointsShape{6, {kB, kQ, kM, kL, kP, k2}},
    kRaggedPointsShape{5, {kB, kQ, kM, kK, k2}};
constexpr Shape kWeightsShape{5, {kB, kQ, kM, kL, kP}}, kRaggedWeightsShape{4, {kB, kQ, kM, kK}};

constexpr Argument kept_shape(const char* name, DTypes dtypes, Place place, Shape shape) {
  return {name, dtypes, place, shape, shape};
}

constexpr Argument kValue = kept_shape("value", DTypes::kFloat, Place::kAny, {4, {kB, kS, kM, kD}});
constexpr Argument kSpatialShapes =
    kept_shape("spatial_shapes", DTypes::kInteger, Place::kHostOrWithValue, {2, {kL, k2}});
constexpr Argument kLevelStartIndex =
    kept_shape("level_start_index", DTypes::kInteger, Place::kHostOrWithValue, {1, {kL}});
constexpr Argument kSamplingLocations{"sampling_locations", DTypes::kFloat, Place::kWithValue,
                                      kPointsShape, kRaggedPointsShape};
constexpr Argument kAttentionWeights{"attention_weights", DTypes::kFloat, Place::kWithValue,
                                     kWeightsShape, kRaggedWeightsShape};
constexpr Argument kReferencePoints =
    kept_shape("reference_points", DTypes::kFloat, Place::kWithValue, {4, {kB, kQ, kLOr1, k2Or4}});
constexpr Argument kSamplingOffsets{"sampling_offsets", DTypes::kFloat, Place::kWithValue,
                                    kPointsShape, kRaggedPointsShape};
constexpr Argument kAttentionLogits{"attention_logits", DTypes::kFloat, Place::kWithValue,
                                    kWeightsShape, kRaggedWeightsShape};
constexpr Argument kPaddingMask =
    kept_shape("padding_mask", DTypes::kBool, Place::kWithValue, {2, {kB, kS}});
constexpr Argument kGradOutput =
    kept_shape("grad_output", DTypes::kOfValue, Place::kWithValue, {3, {kB, kQ, kMTimesD}});
constexpr Argument kOutput =
    kept_shape("output", DTypes::kOfValue, Place::kWithValue, {3, {kB, kQ, kMTimesD}});

// In the order in which they are checked.
constexpr Argument kArguments[] = {
    kValue,           kSpatialShapes,   kLevelStartIndex, kSamplingLocations, kAttentionWeights,
    kSamplingOffsets, kAttentionLogits, kReferencePoints, kPaddingMask,       kGradOutput,
    kOutput};

// A line for each argument.
inline std::string describe_arguments() {
  std::ostringstream text;
  for (const Argument& argument : kArguments) {
    text << argument.name << ": " << argument.shape.letters();
    const std::string ragged = argument.ragged_shape.letters();
    if (ragged != argument.shape.letters()) text << " or " << ragged;
    text << "; must " << kDTypeRules[int(argument.dtypes)] << "; must "
         << kPlaceRules[int(argument.place)] << "\n";
  }
  return text.str();
}

// ---- messages
// ------------------------------------------------------------------------------------

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// A macro, so that the parts of the message are put together only where it is needed.
#define MSDA_CHECK(condition, ...)             \
  do {                                         \
    if (!(condition)) msda::fail(__VA_ARGS__); \
  } while (false)

template <class Integers>
std::string to_string(const Integers& sizes) {
  std::ostringstream text;
  text << "(";
  for (size_t i = 0; i < sizes.size(); ++i) text << (i == 0 ? "" : ", ") << sizes[i];
  text << (sizes.size() == 1 ? ",)" : ")");
  return text.str();
}

// torch's stable interface has no quantised types and throws where it meets one.
inline ScalarType dtype_of(const Tensor& tensor) {
  try {
    return tensor.scalar_type();
  } catch (const std::exception&) {
    int32_t number = -1;
    aoti_torch_get_dtype(tensor.get(), &number);
    return static_cast<ScalarType>(number);
  }
}

// As Python writes it.
inline std::string dtype_name(ScalarType type) {
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

inline std::string device_name(const Tensor& tensor) {
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

inline const char* layout_name(torch::headeronly::Layout layout) {
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

// ---- the check
// -----------------------------------------------------------------------------------

// What is known of a call, from the arguments checked so far.
struct Known {
  const Tensor* value = nullptr;
  bool ragged = false;                                            // num_points was given
  int64_t sizes[kNumLetters] = {-1, -1, -1, -1, -1, -1, -1, -1};  // by letter; -1: not yet known

  int64_t& operator[](Axis letter) { return sizes[letter]; }
};

// Whether an axis may be so long. A letter that is not yet known becomes known.
inline bool check_axis(Axis axis, int64_t size, Known& known) {
  switch (axis) {
    case k2:
      return size == 2;
    case k2Or4:
      return size == 2 || size == 4;
    case kLOr1:
      return size == known[kL] || size == 1;
    case kMTimesD:
      return size == known[kM] * known[kD];
    default:
      if (known[axis] < 0) known[axis] = size;
      return size == known[axis];
  }
}

// "(B, Q, M * D) = (2, 5, 12)", as far as the numbers are known.
inline std::string expected_shape(const Shape& shape, const Known& known) {
  std::string numbers;
  for (int i = 0; i < shape.rank; ++i) {
    const Axis axis = shape.axes[i];
    if (axis < kNumLetters && known.sizes[axis] < 0) return shape.letters();
    numbers += i ? ", " : "";
    if (axis < kNumLetters) {
      numbers += std::to_string(known.sizes[axis]);
    } else if (axis == kLOr1) {
      numbers += std::to_string(known.sizes[kL]) + " or 1";
    } else if (axis == kMTimesD) {
      numbers += std::to_string(known.sizes[kM] * known.sizes[kD]);
    } else {
      numbers += kAxisNames[axis];
    }
  }
  return shape.letters() + " = (" + numbers + (shape.rank == 1 ? ",)" : ")");
}

// The bytes of its storage that a tensor reaches, from the first on.
inline bool reaches(const Tensor& tensor, int64_t* bytes) {
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
inline void check_extent(const Tensor& tensor, const char* name) {
  if (tensor.numel() == 0) return;
  int64_t storage = 0, bytes = 0;
  MSDA_CHECK(aoti_torch_get_storage_size(tensor.get(), &storage) == AOTI_TORCH_SUCCESS, name,
             " must have a storage, got a tensor without");
  const bool fits = reaches(tensor, &bytes) && bytes <= storage;
  MSDA_CHECK(fits, name, " must lie within its storage, got a tensor that reaches ", bytes,
             " bytes into a storage of ", storage);
}

inline bool has_dtype(const Tensor& tensor, DTypes dtypes, const Known& known) {
  const ScalarType type = dtype_of(tensor);
  switch (dtypes) {
    case DTypes::kFloat:
      return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
             type == ScalarType::BFloat16;
    case DTypes::kInteger:
      return type == ScalarType::Long || type == ScalarType::Int;
    case DTypes::kBool:
      return type == ScalarType::Bool;
    case DTypes::kOfValue:
      return type == known.value->scalar_type();
  }
  return false;
}

// Checks a tensor against its row of the table. Those that its row refers to must have been before.
inline void check(const Tensor& tensor, const Argument& argument, Known& known) {
  const char* const name = argument.name;
  MSDA_CHECK(tensor.defined(), name, " must be a Tensor, got NoneType");
  int32_t layout = -1;
  aoti_torch_get_layout(tensor.get(), &layout);
  MSDA_CHECK(layout == aoti_torch_layout_strided(), name,
             " must be a dense tensor, got one of layout ", layout_name(tensor.layout()));
  const bool of_value = argument.dtypes == DTypes::kOfValue;
  MSDA_CHECK(has_dtype(tensor, argument.dtypes, known), name, " must ",
             kDTypeRules[int(argument.dtypes)],
             of_value ? " (" + dtype_name(known.value->scalar_type()) + ")" : "", ", got ",
             dtype_name(dtype_of(tensor)));
  if (argument.place != Place::kAny) {
    const bool may_be_on_host = argument.place == Place::kHostOrWithValue;
    MSDA_CHECK((may_be_on_host && tensor.is_cpu()) || tensor.device() == known.value->device(),
               name, " must ", kPlaceRules[int(argument.place)], " (", device_name(*known.value),
               "), got a tensor on ", device_name(tensor));
  }
  const Shape& shape = known.ragged ? argument.ragged_shape : argument.shape;
  const auto sizes = tensor.sizes();
  bool fits = int(sizes.size()) == shape.rank;
  if (fits) {
    for (int i = 0; i < shape.rank; ++i) fits &= check_axis(shape.axes[i], sizes[i], known);
  }
  MSDA_CHECK(fits, name, " must have shape ", expected_shape(shape, known), ", got ",
             to_string(sizes));
  check_extent(tensor, name);
}

}  // namespace msda
