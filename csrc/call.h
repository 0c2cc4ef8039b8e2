// From the arguments of a call to the problem that kernels take: the checks of a call as a whole,
// which the operator of torch and the C interface (msda.h) share, and the split of a call over
// threads. In Python: msda/checks.py. Sizes that the GPU alone knows: cuda/level_table.cu.

#pragma once

#include <algorithm>
#include <cstring>
#include <optional>
#include <utility>

#include "arguments.h"
#include "problem.h"

namespace msda {

// TensorTraits has, beyond what the checks of arguments.h ask:
//   void check_device(const Tensor& value)  that there are kernels for it
//   Tensor contiguous(const Tensor&, const char* name, bool in_pairs)  it, or a copy without gaps
//   const void* data(const Tensor&)

// A floating-point tensor as kernels read it.
template <class Tensor>
ConstArray const_array(const Tensor& tensor) {
  using Traits = TensorTraits<Tensor>;
  return {Traits::data(tensor), floating_dtype(Traits::type(tensor)).value()};
}

// From here on float32 does not hold every integer.
constexpr int64_t kMaxSide = int64_t(1) << 24;

// The arguments that both forms of the operator take.
template <class Tensor>
struct Pyramid {
  const Tensor& value;
  const Sizes& spatial_shapes;  // H0, W0, H1, ...; empty if given as a tensor
  const std::optional<Tensor>& spatial_shapes_tensor;  // (L, 2)
  const std::optional<Tensor>& level_start_index;      // (L)
  const Sizes& num_points;                             // (L); empty if the same for all levels
};

// A problem with the tensors that its pointers point into.
template <class Tensor>
struct Call {
  Problem problem{};
  std::vector<Level> levels;
  std::vector<Tensor> tensors;
  Known<Tensor> known;

  // The tensor without gaps, which lives as long as the call. in_pairs: CUDA kernels read its
  // numbers in pairs.
  const Tensor& hold(const Tensor& tensor, const Argument& argument, bool in_pairs = false) {
    tensors.push_back(TensorTraits<Tensor>::contiguous(tensor, argument.name, in_pairs));
    return tensors.back();
  }
};

// Whether the sizes of the levels are known to the GPU alone. They are then neither read nor
// checked here.
template <class Tensor>
bool shapes_are_on_gpu(const Pyramid<Tensor>& pyramid) {
  return pyramid.spatial_shapes_tensor &&
         !TensorTraits<Tensor>::is_on_host(*pyramid.spatial_shapes_tensor);
}

// The elements of an integer tensor on the host.
template <class Tensor>
Sizes read_integers(const Tensor& tensor, const char* name) {
  const Tensor given = TensorTraits<Tensor>::contiguous(tensor, name, false);
  const auto& sizes = TensorTraits<Tensor>::sizes(given);
  int64_t count = 1;
  for (size_t i = 0; i < sizes.size(); ++i) count *= sizes[i];
  Sizes numbers(count);
  const auto* const bytes = static_cast<const char*>(TensorTraits<Tensor>::data(given));
  for (size_t i = 0; i < numbers.size(); ++i) {
    if (TensorTraits<Tensor>::type(given) == Type::kInt64) {
      std::memcpy(&numbers[i], bytes + 8 * i, 8);
    } else {
      int32_t number;
      std::memcpy(&number, bytes + 4 * i, 4);
      numbers[i] = number;
    }
  }
  return numbers;
}

// All numbers are 0 where the GPU alone knows them.
template <class Tensor>
Sizes read_spatial_shapes(const Pyramid<Tensor>& pyramid, Known<Tensor>& known) {
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
  return TensorTraits<Tensor>::is_on_host(shapes) ? read_integers(shapes, kSpatialShapes.name)
                                                  : Sizes(2 * known[kL], 0);
}

// Checks value and the pyramid's metadata and fills in all sizes but those of queries and points.
template <class Tensor>
void read_pyramid(const Pyramid<Tensor>& pyramid, Call<Tensor>& call) {
  const Tensor& value = pyramid.value;
  Known<Tensor>& known = call.known;
  known.value = &value;
  known.ragged = !pyramid.num_points.empty();
  check(value, kValue, known);
  TensorTraits<Tensor>::check_device(value);
  int64_t channels;
  MSDA_CHECK(!__builtin_mul_overflow(known[kM], known[kD], &channels),
             "value must hold fewer than 2^63 channels, got ",
             to_string(TensorTraits<Tensor>::sizes(value)));
  Problem& problem = call.problem;
  problem.batch = known[kB];
  problem.num_keys = known[kS];
  problem.num_heads = known[kM];
  problem.head_dim = known[kD];
  problem.value = const_array(call.hold(value, kValue));

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
    MSDA_CHECK(std::max(height, width) <= kMaxSide || problem.value.dtype == DType::kFloat64,
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

  // The start of a level follows from the shapes: it is checked where both are on the CPU, and not
  // read elsewhere.
  if (!pyramid.level_start_index) return;
  check(*pyramid.level_start_index, kLevelStartIndex, known);
  if (on_host && TensorTraits<Tensor>::is_on_host(*pyramid.level_start_index)) {
    const Sizes given = read_integers(*pyramid.level_start_index, kLevelStartIndex.name);
    MSDA_CHECK(given == starts, "level_start_index must be the running sum of height * width, ",
               to_string(starts), ", got ", to_string(given));
  }
}

// Checks the per-sample tensors and fills in the sizes of queries and points.
template <class Tensor>
void read_samples(const Pyramid<Tensor>& pyramid, const Tensor& points, const Argument& points_row,
                  const Tensor& weights, const Argument& weights_row, Call<Tensor>& call) {
  Problem& problem = call.problem;
  Known<Tensor>& known = call.known;
  check(points, points_row, known);
  if (known.ragged) {
    int64_t rest = known[kK];
    for (const Level& level : call.levels)
      rest = level.num_points <= rest ? rest - level.num_points : -1;
    MSDA_CHECK(rest == 0, "num_points must sum to the K = ", known[kK], " samples of ",
               points_row.name, ", got ", to_string(pyramid.num_points));
  } else {
    MSDA_CHECK(!__builtin_mul_overflow(known[kL], known[kP], &known[kK]), points_row.name,
               " must hold fewer than 2^63 samples, got ",
               to_string(TensorTraits<Tensor>::sizes(points)));
    for (Level& level : call.levels) level.num_points = known[kP];
  }
  check(weights, weights_row, known);
  problem.num_queries = known[kQ];
  problem.num_samples = known[kK];
  problem.points = const_array(call.hold(points, points_row, true));
  problem.weights = const_array(call.hold(weights, weights_row));
}

template <class Tensor>
Call<Tensor> plain_call(const Pyramid<Tensor>& pyramid, const Tensor& sampling_locations,
                        const Tensor& attention_weights, bool nearest) {
  Call<Tensor> call;
  read_pyramid(pyramid, call);
  read_samples(pyramid, sampling_locations, kSamplingLocations, attention_weights,
               kAttentionWeights, call);
  call.problem.nearest = nearest;
  call.problem.is_fused = false;
  return call;
}

template <class Tensor>
Call<Tensor> fused_call(const Pyramid<Tensor>& pyramid, const Tensor& reference_points,
                        const Tensor& sampling_offsets, const Tensor& attention_logits,
                        const std::optional<Tensor>& padding_mask) {
  Call<Tensor> call;
  read_pyramid(pyramid, call);
  read_samples(pyramid, sampling_offsets, kSamplingOffsets, attention_logits, kAttentionLogits,
               call);
  Problem& problem = call.problem;

  check(reference_points, kReferencePoints, call.known);
  problem.is_fused = true;
  problem.reference_points = const_array(call.hold(reference_points, kReferencePoints, true));
  problem.reference_levels = TensorTraits<Tensor>::sizes(reference_points)[2];
  problem.reference_size = TensorTraits<Tensor>::sizes(reference_points)[3];

  if (padding_mask) {
    check(*padding_mask, kPaddingMask, call.known);
    problem.has_padding_mask = true;
    const Tensor& mask = call.hold(*padding_mask, kPaddingMask);
    problem.padding_mask = static_cast<const uint8_t*>(TensorTraits<Tensor>::data(mask));
  }
  return call;
}

}  // namespace msda
