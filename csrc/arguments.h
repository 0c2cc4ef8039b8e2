// The arguments of the operators in one table, and the check of a tensor against its row. No torch:
// TensorTraits<Tensor> answers what the checks ask of a tensor, in torch_tensor.h for torch's and
// in c_api.cpp for those of msda.h. The checks of a call as a whole: call.h.
//
// msda/checks.py holds the same table and the same checks, for tensors without data and for the
// reference. tests/operator/test_arguments.py compares the tables and walks every rule through
// both.

#pragma once

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "dtypes.h"

namespace msda {

using Sizes = std::vector<int64_t>;

// ---- the table ----------------------------------------------------------------------------------

// The length of an axis. B batch, S keys, M heads, D channels per head, Q queries, L levels,
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

// An argument of the same shape with and without num_points.
constexpr Argument of_one_shape(const char* name, DTypes dtypes, Place place, Shape shape) {
  return {name, dtypes, place, shape, shape};
}

constexpr Argument kValue =
    of_one_shape("value", DTypes::kFloat, Place::kAny, {4, {kB, kS, kM, kD}});
constexpr Argument kSpatialShapes =
    of_one_shape("spatial_shapes", DTypes::kInteger, Place::kHostOrWithValue, {2, {kL, k2}});
constexpr Argument kLevelStartIndex =
    of_one_shape("level_start_index", DTypes::kInteger, Place::kHostOrWithValue, {1, {kL}});
constexpr Argument kSamplingLocations{"sampling_locations", DTypes::kFloat, Place::kWithValue,
                                      kPointsShape, kRaggedPointsShape};
constexpr Argument kAttentionWeights{"attention_weights", DTypes::kFloat, Place::kWithValue,
                                     kWeightsShape, kRaggedWeightsShape};
constexpr Argument kReferencePoints = of_one_shape("reference_points", DTypes::kFloat,
                                                   Place::kWithValue, {4, {kB, kQ, kLOr1, k2Or4}});
constexpr Argument kSamplingOffsets{"sampling_offsets", DTypes::kFloat, Place::kWithValue,
                                    kPointsShape, kRaggedPointsShape};
constexpr Argument kAttentionLogits{"attention_logits", DTypes::kFloat, Place::kWithValue,
                                    kWeightsShape, kRaggedWeightsShape};
constexpr Argument kPaddingMask =
    of_one_shape("padding_mask", DTypes::kBool, Place::kWithValue, {2, {kB, kS}});
constexpr Argument kGradOutput =
    of_one_shape("grad_output", DTypes::kOfValue, Place::kWithValue, {3, {kB, kQ, kMTimesD}});
constexpr Argument kOutput =
    of_one_shape("output", DTypes::kOfValue, Place::kWithValue, {3, {kB, kQ, kMTimesD}});

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

// ---- messages -----------------------------------------------------------------------------------

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

// ---- the check of a tensor ----------------------------------------------------------------------

// The types of elements that the table tells apart.
enum class Type : int8_t { kFloat32, kFloat64, kFloat16, kBFloat16, kInt64, kInt32, kBool, kOther };

// The dtype of floating-point numbers; none of the other types.
inline std::optional<DType> floating_dtype(Type type) {
  switch (type) {
    case Type::kFloat32:
      return DType::kFloat32;
    case Type::kFloat64:
      return DType::kFloat64;
    case Type::kFloat16:
      return DType::kFloat16;
    case Type::kBFloat16:
      return DType::kBFloat16;
    case Type::kInt64:
    case Type::kInt32:
    case Type::kBool:
    case Type::kOther:
      break;
  }
  return std::nullopt;
}

// The checks ask of a tensor:
//   void check_layout(const Tensor&, const char* name)  that it exists and has strides
//   Type type(const Tensor&), std::string type_name(const Tensor&)
//   bool is_on_host(const Tensor&), bool has_same_device(const Tensor&, const Tensor&)
//   std::string device_name(const Tensor&)
//   sizes(const Tensor&), with size() and []
//   void check_extent(const Tensor&, const char* name)  that its elements lie in its memory
template <class Tensor>
struct TensorTraits;

// The sizes of a call, from the arguments checked so far.
template <class Tensor>
struct Known {
  const Tensor* value = nullptr;
  bool ragged = false;                                            // num_points was given
  int64_t sizes[kNumLetters] = {-1, -1, -1, -1, -1, -1, -1, -1};  // by letter; -1: not yet known

  int64_t& operator[](Axis letter) { return sizes[letter]; }
};

// Whether an axis may be so long. A letter that is not yet known becomes known.
template <class Tensor>
bool check_axis(Axis axis, int64_t size, Known<Tensor>& known) {
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
template <class Tensor>
std::string expected_shape(const Shape& shape, const Known<Tensor>& known) {
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

template <class Tensor>
bool has_dtype(const Tensor& tensor, DTypes dtypes, const Known<Tensor>& known) {
  const Type type = TensorTraits<Tensor>::type(tensor);
  switch (dtypes) {
    case DTypes::kFloat:
      return floating_dtype(type).has_value();
    case DTypes::kInteger:
      return type == Type::kInt64 || type == Type::kInt32;
    case DTypes::kBool:
      return type == Type::kBool;
    case DTypes::kOfValue:
      return type == TensorTraits<Tensor>::type(*known.value);
  }
  return false;
}

// Checks a tensor against its row of the table, after the tensors that its row refers to.
template <class Tensor>
void check(const Tensor& tensor, const Argument& argument, Known<Tensor>& known) {
  using Traits = TensorTraits<Tensor>;
  const char* const name = argument.name;
  Traits::check_layout(tensor, name);
  const bool of_value = argument.dtypes == DTypes::kOfValue;
  MSDA_CHECK(has_dtype(tensor, argument.dtypes, known), name, " must ",
             kDTypeRules[int(argument.dtypes)],
             of_value ? " (" + Traits::type_name(*known.value) + ")" : "", ", got ",
             Traits::type_name(tensor));
  if (argument.place != Place::kAny) {
    const bool may_be_on_host = argument.place == Place::kHostOrWithValue;
    MSDA_CHECK((may_be_on_host && Traits::is_on_host(tensor)) ||
                   Traits::has_same_device(tensor, *known.value),
               name, " must ", kPlaceRules[int(argument.place)], " (",
               Traits::device_name(*known.value), "), got a tensor on ",
               Traits::device_name(tensor));
  }
  const Shape& shape = known.ragged ? argument.ragged_shape : argument.shape;
  const auto& sizes = Traits::sizes(tensor);
  bool fits = int(sizes.size()) == shape.rank;
  if (fits) {
    for (int i = 0; i < shape.rank; ++i) fits &= check_axis(shape.axes[i], sizes[i], known);
  }
  MSDA_CHECK(fits, name, " must have shape ", expected_shape(shape, known), ", got ",
             to_string(sizes));
  Traits::check_extent(tensor, name);
}

}  // namespace msda
