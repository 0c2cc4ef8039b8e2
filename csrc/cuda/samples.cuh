// From the inputs of one query and head to one sample: which pixels, with which weights. Each lane
// of a warp prepares one sample, once; the lanes that read its pixels get it through shared memory.

#pragma once

#include "../bilinear.h"
#include "vec.cuh"

namespace msda {

constexpr int kWarpSize = 32;
constexpr int kWarpsPerBlock = 4;
constexpr int kThreadsPerBlock = kWarpSize * kWarpsPerBlock;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kSectorBytes = 32;  // the unit in which memory is read

// Channels of all heads together in nearly every published model; kernels for this number know it.
constexpr int kCommonChannels = 256;

// So many levels fit a kernel's parameters; more are read from memory.
constexpr int kMaxLevels = 16;

struct alignas(16) DeviceLevel {
  int32_t height;
  int32_t width;
  int32_t start;        // first key of the level
  int32_t samples_end;  // of a query and head: this level's are those from the last level's end on
  double half_over_points;  // 1 / (2P): offsets of boxes are in units of (w, h) / (2P)
};

// The inputs of all samples, and the levels that they lie on.
struct Sampling {
  DeviceLevel levels[kMaxLevels];
  const DeviceLevel* levels_in_memory;  // null where levels holds them all
  int32_t num_levels;

  ConstArray points;            // (B, Q, M, K, 2): sampling locations; fused: sampling offsets
  ConstArray weights;           // (B, Q, M, K): attention weights; fused: attention logits
  ConstArray reference_points;  // fused only: (B, Q, reference_levels, reference_size)
  const uint8_t* padding_mask;  // (B, S), padding where not 0; if has_padding_mask
  int32_t num_queries;
  int32_t num_heads;
  int32_t num_keys;
  int32_t num_samples;  // K
  int32_t reference_levels;
  int32_t reference_size;
  bool nearest;
  bool has_padding_mask;
};

// The table of levels, copied to shared memory unless it is too long for that. All threads of a
// block call this together.
MSDA_DEVICE const DeviceLevel* stage_levels(const Sampling& sampling,
                                            DeviceLevel (&staged)[kMaxLevels]) {
  if (sampling.num_levels > kMaxLevels) return sampling.levels_in_memory;
  const int l = int(threadIdx.x);
  if (l < sampling.num_levels) {
    if (sampling.levels_in_memory) count_struct(Access::kLoad, sampling.levels_in_memory[l]);
    count_struct(Access::kStore, staged[l]);
    staged[l] = sampling.levels_in_memory ? sampling.levels_in_memory[l] : sampling.levels[l];
  }
  __syncthreads();
  return staged;
}

// One query and head, if is_live.
struct Head {
  const Sampling& sampling;
  int32_t b, q, m;
  bool is_live;

  MSDA_DEVICE uint32_t query() const { return uint32_t(b) * sampling.num_queries + q; }  // of B * Q
  MSDA_DEVICE uint32_t index() const { return query() * sampling.num_heads + m; }  // of B * Q * M
};

template <class Real>
struct Sample {
  int32_t key;       // of the north-west corner; before the level's first where that is outside
  int32_t width;     // keys from one row of the map to the next
  uint32_t corners;  // those that are read: bit c for corner c
  int32_t level, x0, y0;  // the north-west corner again, as a pixel of its level
  Real fx, fy;
  Real weight;          // attention weight, as given or softmaxed
  Real step_x, step_y;  // pixels per unit of a given location or offset
};

struct DeviceMath {
  static MSDA_DEVICE float truncate(float x) { return truncf(x); }
  static MSDA_DEVICE double truncate(double x) { return trunc(x); }
  // Within [0, 1].
  static MSDA_DEVICE float clamp(float x) {
#ifdef __CUDA_ARCH__
    return __saturatef(x);
#else
    return fminf(fmaxf(x, 0), 1);
#endif
  }
  static MSDA_DEVICE double clamp(double x) { return fmin(fmax(x, 0.0), 1.0); }
  static MSDA_DEVICE float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
  static MSDA_DEVICE double multiply_add(double a, double b, double c) { return fma(a, b, c); }
};

MSDA_DEVICE float exponential(float x) { return expf(x); }
MSDA_DEVICE double exponential(double x) { return exp(x); }

// The samples of one query and head. kLanes neighbouring lanes of a warp hold one each and call its
// functions together.
//
// kCommon: points, weights and reference are of type Real, and the interpolation is bilinear.
template <class Real, bool kFused, bool kCommon, int kLanes>
class Sampler {
 public:
  // A head that is not live has no samples and reads nothing.
  MSDA_DEVICE Sampler(const Sampling& sampling, const DeviceLevel* levels, const Head& head,
                      int lane)
      : sampling_(sampling),
        levels_(levels),
        head_(head),
        count_(head.is_live ? sampling.num_samples : 0) {
    if constexpr (kFused) read_softmax(lane);
  }

  // Sample i of the K; i must not be less than in the last call.
  MSDA_DEVICE Sample<Real> prepare(int i) {
    Sample<Real> sample = {};
    if (i >= count_) return sample;
#pragma unroll 1
    while (i >= levels_[level_].samples_end) ++level_;
    count_struct(Access::kLoad, levels_[level_]);
    const DeviceLevel level = levels_[level_];

    sample.width = level.width;
    sample.weight = weight(i);
    if constexpr (kFused) sample.weight = exponential(sample.weight - maximum_) * scale_;
    const Pair<Real> given =
        pair<2 * kLanes * sizeof(Real) >= kSectorBytes>(sampling_.points, first_sample() + i);
    const Real width = Real(level.width), height = Real(level.height);
    const Pair<Axis> axes = transform(level, width, height);
    const Axis x_axis = axes.x, y_axis = axes.y;
    sample.step_x = x_axis.step;
    sample.step_y = y_axis.step;
    const Real x = DeviceMath::multiply_add(given.x, x_axis.step, x_axis.origin);
    const Real y = DeviceMath::multiply_add(given.y, y_axis.step, y_axis.origin);
    if (!kFused && !kCommon && sampling_.nearest) {
      set_nearest(sample, level, x, y);
      return sample;
    }

    if (!sample_counts(x, y, width, height)) return sample;
    const Cell<Real> column =
        find_cell<DeviceMath>(given.x, x_axis.step, x_axis.origin, x_axis.rest, x);
    const Cell<Real> row =
        find_cell<DeviceMath>(given.y, y_axis.step, y_axis.origin, y_axis.rest, y);
    sample.fx = column.fraction;
    sample.fy = row.fraction;
    const int x0 = int(column.first), y0 = int(row.first);
    place(sample, level, x0, y0);
    const bool west = x0 >= 0, east = x0 + 1 < level.width;
    const bool north = y0 >= 0, south = y0 + 1 < level.height;
    sample.corners = uint32_t(north && west) << kNw | uint32_t(north && east) << kNe |
                     uint32_t(south && west) << kSw | uint32_t(south && east) << kSe;
    if constexpr (kFused) drop_padding(sample);
    return sample;
  }

  // The softmax's factor of exponentials: NaN where a logit makes it so.
  MSDA_DEVICE Real weight_scale() const { return scale_; }

 private:
  // From a given number of one axis to a pixel coordinate: step * given + origin + rest, where rest
  // is what origin lost to rounding.
  struct Axis {
    Real step, origin, rest;
  };

  static MSDA_DEVICE Real number(const ConstArray& array, int64_t i) {
    if constexpr (kCommon) return load<Real>(static_cast<const Real*>(array.data) + i);
    return load_number<Real>(array, i);
  }

  MSDA_DEVICE Real weight(int i) const {
    // The lanes ask for whole sectors of memory, and, without a softmax, once.
    constexpr bool kOnce = kCommon && !kFused && kLanes * sizeof(Real) >= kSectorBytes;
    const int64_t place = first_sample() + i;
    if constexpr (kOnce) {
      const auto* const weights = static_cast<const Real*>(sampling_.weights.data);
      return element(load_once<Packed<Real, 1>>(weights + place), 0);
    }
    return number(sampling_.weights, place);
  }

  template <bool kOnce = false>
  static MSDA_DEVICE Pair<Real> pair(const ConstArray& array, int64_t i) {
    if constexpr (kCommon) {
      const auto* const p = static_cast<const Real*>(array.data) + 2 * i;
      const auto xy = kOnce ? load_once<Packed<Real, 2>>(p) : load<Packed<Real, 2>>(p);
      return {element(xy, 0), element(xy, 1)};
    }
    return load_pair<Real>(array, i);
  }

  MSDA_DEVICE int64_t first_sample() const {
    return int64_t(head_.index()) * sampling_.num_samples;
  }

  MSDA_DEVICE Pair<Axis> transform(const DeviceLevel& level, Real width, Real height) const {
    if constexpr (!kFused) {
      // Nearest: x = loc * W + 1/2, then truncated (RT-DETRv2's rule).
      const Real origin = !kCommon && sampling_.nearest ? Real(0.5) : Real(-0.5);
      return {{width, origin, Real(0)}, {height, origin, Real(0)}};
    } else {
      const bool is_box = sampling_.reference_size == 4;
      const int64_t point = int64_t(head_.query()) * sampling_.reference_levels +
                            (sampling_.reference_levels == 1 ? 0 : level_);
      const Pair<Real> centre = pair(sampling_.reference_points, is_box ? 2 * point : point);
      Pair<Axis> axes = {around(centre.x, width), around(centre.y, height)};
      if (is_box) {
        const Pair<Real> extent = pair(sampling_.reference_points, 2 * point + 1);
        axes.x.step = width * extent.x * Real(level.half_over_points);
        axes.y.step = height * extent.y * Real(level.half_over_points);
      }
      return axes;
    }
  }

  // Offsets in pixels from a reference point.
  static MSDA_DEVICE Axis around(Real centre, Real size) {
    const Real origin = DeviceMath::multiply_add(centre, size, Real(-0.5));
    return {Real(1), origin, DeviceMath::multiply_add(centre, size, -origin) - Real(0.5)};
  }

  MSDA_DEVICE void place(Sample<Real>& sample, const DeviceLevel& level, int x0, int y0) const {
    sample.key = level.start + y0 * level.width + x0;
    sample.level = level_;
    sample.x0 = x0;
    sample.y0 = y0;
  }

  // One pixel, which takes the place of the north-west corner. A location beyond the map reads the
  // pixel at its edge; one that is not finite does not count.
  MSDA_DEVICE void set_nearest(Sample<Real>& sample, const DeviceLevel& level, Real x,
                               Real y) const {
    if (!(x - x == 0 && y - y == 0)) return;
    const Real last_x = Real(level.width - 1), last_y = Real(level.height - 1);
    x = x > 0 ? x : Real(0);
    y = y > 0 ? y : Real(0);
    x = x < last_x ? x : last_x;
    y = y < last_y ? y : last_y;
    place(sample, level, int(x), int(y));
    sample.corners = 1u << kNw;
  }

  MSDA_DEVICE void drop_padding(Sample<Real>& sample) const {
    if (!sampling_.has_padding_mask) return;
    const uint8_t* const padding_mask =
        sampling_.padding_mask + int64_t(head_.b) * sampling_.num_keys;
    uint32_t is_padding = 0;
#pragma unroll
    for (int c = 0; c < kNumCorners; ++c) {
      const bool is_read = sample.corners >> c & 1;
      const uint8_t* const p = padding_mask + sample.key + c % 2 + c / 2 * sample.width;
      count(Access::kLoad, p, sizeof(*p), is_read);
      if (is_read && *p != 0) is_padding |= 1u << c;
    }
    sample.corners &= ~is_padding;
  }

  // The largest logit and the scale of the exponentials, over all K samples.
  MSDA_DEVICE void read_softmax(int lane) {
    Real maximum = -INFINITY, sum = 0;
#pragma unroll 1
    for (int i = lane; i < count_; i += kLanes) {
      const Real logit = weight(i);
      maximum = logit > maximum ? logit : maximum;
    }
#pragma unroll
    for (int s = kLanes / 2; s > 0; s /= 2) {
      const Real other = __shfl_xor_sync(kAllLanes, maximum, s);
      maximum = other > maximum ? other : maximum;
    }
#pragma unroll 1
    for (int i = lane; i < count_; i += kLanes) {
      sum += exponential(weight(i) - maximum);
    }
#pragma unroll
    for (int s = kLanes / 2; s > 0; s /= 2) sum += __shfl_xor_sync(kAllLanes, sum, s);
    maximum_ = maximum;
    scale_ = 1 / sum;
  }

  const Sampling& sampling_;
  const DeviceLevel* const levels_;
  const Head& head_;
  const int count_;
  int level_ = 0;
  Real maximum_ = 0, scale_ = 0;
};

// ---- a round of samples in shared memory --------------------------------------------------------

// A sample, for the lanes that read its pixels: weights here, place below.
template <class Real>
struct alignas(16) CornerWeights {
  Corners<Real> weights;  // attention times corner weight
};

template <class Real>
MSDA_DEVICE CornerWeights<Real> weights_of(const Sample<Real>& sample) {
  Corners<Real> w = corner_weights(sample.fx, sample.fy);
  w.nw *= sample.weight;
  w.ne *= sample.weight;
  w.sw *= sample.weight;
  w.se *= sample.weight;
  return {w};
}

struct alignas(16) Place {
  int32_t key;
  uint32_t width_and_corners;       // width << 4 | corners
  static constexpr int kBytes = 8;  // of them are moved

  MSDA_DEVICE uint32_t width() const { return width_and_corners >> kNumCorners; }
  MSDA_DEVICE bool reads(Corner c) const { return width_and_corners >> c & 1; }
};

constexpr int32_t kMaxWidth = (1 << (32 - kNumCorners)) - 1;

// The slot of a lane's sample in the arrays below. Lanes write side by side. A quarter of a warp
// (of 16 bytes) or half of it (of 8) reads at once, from banks that must differ, and 8 slots take
// up all banks: so one slot stays empty after every 8.
MSDA_DEVICE constexpr int slot_of_lane(int lane) { return lane + lane / 8; }

constexpr int kSlots = kWarpSize + kWarpSize / 8;

// One sample of each lane of a warp.
template <class Real>
struct Round {
  CornerWeights<Real> weights[kSlots];
  Place places[kSlots];

  MSDA_DEVICE void put(int slot, const Sample<Real>& sample) {
    count_struct(Access::kStore, weights[slot]);
    count(Access::kStore, &places[slot], Place::kBytes);
    weights[slot] = weights_of(sample);
    places[slot] = {sample.key, uint32_t(sample.width) << kNumCorners | sample.corners};
  }

  // A lane is about to read a slot.
  MSDA_DEVICE void count_get(int slot) const {
    count_struct(Access::kLoad, weights[slot]);
    count_get_place(slot);
  }
  MSDA_DEVICE void count_get_place(int slot) const {
    count(Access::kLoad, &places[slot], Place::kBytes);
  }
};

// The pixels of a sample, as far as one lane reads them.
template <class Vector>
struct Pixels {
  Vector nw, ne, sw, se;
};

}  // namespace msda
