// From the inputs of one query and head to samples that a loop over channels can use: which pixels,
// with which weights. Forward and backward, plain and fused calls share this.
//
// All K samples of a query and head, or of a query and all its heads, are prepared together, a
// vector of samples at a time: one by one this would cost as much as reading the pixels. Arrays are
// padded to whole vectors.

#pragma once

#include "../bilinear.h"
#include "../problem.h"
#include "arrays.h"
#include "simd.h"

namespace msda {
namespace MSDA_CPU_CAPABILITY {

// From a given number of one axis (a location or an offset) to a pixel coordinate:
// step * given + origin + rest, where rest is what origin lost to rounding. Of a vector of samples.
template <class Real>
struct AxisTransform {
  Vec<Real> step, origin, rest;
};

// Inputs and outputs are fetched so many rows of queries and heads ahead: the rows of this head,
// some queries on. A walk head by head jumps too far for the machine to foresee it, and memory
// answers later than one query takes.
inline int64_t rows_ahead(const Problem& problem) { return 4 * problem.num_heads; }

// The pixels of one head in memory, in bytes from a base pointer: key k at k * key_stride. Corners
// that must not be read or written lie at `nowhere`: a row of zeros to read, or a row to add to
// that nobody reads. So the loops over samples have no branches, which the one sample in seven of
// an encoder that lies at an edge would mislead, and an Inf in a pixel that is no corner does not
// leak through a zero weight.
struct Rows {
  int64_t key_stride;
  int64_t nowhere;
};

// Rows of so many bytes next to each other, with `nowhere` after them.
inline Rows packed_rows(const Problem& problem, int64_t row) {
  return {row, problem.num_keys * row};
}

// Whether Offset holds every distance within a copy of one head's pixels, in scalars of a size.
template <class Offset>
inline bool fits(const Problem& problem, int64_t scalar_size) {
  return (problem.num_keys + 1) * problem.head_dim <=
         (int64_t(1) << (8 * sizeof(Offset) - 1)) / scalar_size - 1;
}

constexpr int64_t kSoftmaxRows = 8;  // that softmax() takes at once, at most

// The vector of logits from i on in a row of `count`, filled up with -Inf, whose softmax is 0.
template <class Real>
inline Vec<Real> load_logits(const Real* row, int64_t i, int64_t count) {
  if (count - i >= kLanes<Real>) return load(row + i);
  IntVec<Real> lane;
  for (int k = 0; k < kLanes<Real>; ++k) lane[k] = k;
  const int rest = int(count - i);
  return lane < index_t<Real>(rest) ? load_partial(row + i, rest)
                                    : broadcast(Real(-__builtin_inf()));
}

// Writes the softmax of rows of `count` logits, in the same place or in another one, as whole
// vectors: weights past the last are 0. Each step is done for all rows before the next: within one
// row it would wait for the sum over the lanes.
template <class Real>
inline void softmax(const Real* logits, int64_t logits_stride, int64_t num_rows, int64_t count,
                    Real* weights, int64_t weights_stride) {
  constexpr int kStep = kLanes<Real>;
  Real maxima[kSoftmaxRows], scales[kSoftmaxRows];
  for (int64_t r = 0; r < num_rows; ++r) {
    const Real* const row = logits + r * logits_stride;
    Vec<Real> largest = load_logits(row, 0, count);
    for (int64_t i = kStep; i < count; i += kStep) {
      const Vec<Real> v = load_logits(row, i, count);
      largest = v > largest ? v : largest;
    }
    maxima[r] = largest_lane(largest);
  }
  for (int64_t r = 0; r < num_rows; ++r) {
    const Real* const from = logits + r * logits_stride;
    Real* const row = weights + r * weights_stride;
    Vec<Real> sums = {};
    for (int64_t i = 0; i < count; i += kStep) {
      const Vec<Real> e = exp_nonpositive(load_logits(from, i, count) - maxima[r]);
      store(row + i, e);
      sums += e;
    }
    scales[r] = 1 / sum_lanes(sums);
  }
  for (int64_t r = 0; r < num_rows; ++r) {
    Real* const row = weights + r * weights_stride;
    for (int64_t i = 0; i < count; i += kStep) store(row + i, load(row + i) * scales[r]);
  }
}

// The softmax of rows of `count` logits that lie in one vector, a power of two that divides its
// lanes; the bits of softmax(). Lanes past the last row hold anything.
template <class Real>
inline Vec<Real> softmax_of_runs(Vec<Real> logits, int64_t count) {
  const Vec<Real> largest =
      reduce_runs(logits, count, [](Vec<Real> a, Vec<Real> b) { return a > b ? a : b; });
  const Vec<Real> e = exp_nonpositive(logits - largest);
  return e * (1 / reduce_runs(e, count, [](Vec<Real> a, Vec<Real> b) { return a + b; }));
}

// Turns gradients of a softmax's weights into those of its logits:
// grad_logit = p * (grad_p - sum over all samples of p * grad_p). That sum equals
// <grad_output, output>, apart from roundings of the output, and apart from a NaN of grad_output
// where no sample counts: all gradients are 0 there.
template <class Real>
inline void softmax_backward(const Real* weights, Real* gradients, int64_t count) {
  constexpr int kStep = kLanes<Real>;
  const int64_t whole = count / kStep * kStep;
  const int rest = int(count - whole);
  Vec<Real> products = {};
  for (int64_t i = 0; i < whole; i += kStep) {
    products += load(weights + i) * load(gradients + i);
  }
  if (rest > 0) {
    products += load_partial(weights + whole, rest) * load_partial(gradients + whole, rest);
  }
  const Real sum = sum_lanes(products);
  const auto gradient = [&](Vec<Real> weight, Vec<Real> grad) { return weight * (grad - sum); };
  for (int64_t i = 0; i < whole; i += kStep) {
    store(gradients + i, gradient(load(weights + i), load(gradients + i)));
  }
  if (rest > 0) {
    store_partial(
        gradients + whole,
        gradient(load_partial(weights + whole, rest), load_partial(gradients + whole, rest)), rest);
  }
}

struct VectorMath {
  template <class V>
  static V truncate(V v) {
    return MSDA_CPU_CAPABILITY::truncate(v);
  }
  template <class V>
  static V clamp(V v) {
    return MSDA_CPU_CAPABILITY::clamp(v);
  }
  template <class V>
  static V multiply_add(V a, V b, V c) {
    return MSDA_CPU_CAPABILITY::multiply_add(a, b, c);
  }
};

// The distance from one pointer to another, and the pointer at a distance, in bytes: torch's
// tensors need not be aligned to their elements.
inline int64_t distance(const void* from, const void* to) {
  return reinterpret_cast<intptr_t>(to) - reinterpret_cast<intptr_t>(from);
}

template <class T>
inline T* at_distance(T* from, int64_t bytes) {
  return reinterpret_cast<T*>(reinterpret_cast<intptr_t>(from) + bytes);
}

// One head's pixels, copied next to each other, and a row of zeros after them. In value the rows of
// a head lie M * D elements apart and share an eighth of the L1 sets (8 heads); a copy uses all of
// them. Worth it where pixels are sampled often: see packs_pixels().
template <class T>
class HeadRows {
 public:
  // holds_pixels: else the row of zeros alone.
  HeadRows(const Problem& problem, bool holds_pixels)
      : problem_(problem),
        num_keys_(holds_pixels ? problem.num_keys : 0),
        rows_((num_keys_ + 1) * problem.head_dim) {
    std::memset(rows_.get() + num_keys_ * problem.head_dim, 0, problem.head_dim * sizeof(T));
  }

  T* get() { return rows_.get(); }
  const T* get() const { return rows_.get(); }

  // Copies the pixels of head m of image b from value.
  void read(int64_t b, int64_t m) {
    const int64_t M = problem_.num_heads, D = problem_.head_dim;
    const T* const value =
        static_cast<const T*>(problem_.value.data) + (b * problem_.num_keys * M + m) * D;
    const int64_t row = D * int64_t(sizeof(T));
    for (int64_t key = 0; key < num_keys_; ++key) {
      const T* const pixel = at_distance(value, key * M * row);
      for (int64_t byte = 0; byte < row; byte += kCacheLine) {
        __builtin_prefetch(at_distance(pixel, kPrefetchedRows * M * row + byte));
      }
      copy_bytes(pixel, rows_.get() + key * D, row);
    }
  }

 private:
  static constexpr int64_t kPrefetchedRows = 16;  // asked for ahead: they lie far apart

  const Problem& problem_;
  const int64_t num_keys_;
  Buffer<T> rows_;
};

// Prepares the samples of one query and head at a time, or of one query and several heads next to
// each other. Holds the tables and buffers that serve them all. Offset is the type of distances
// between pixels: index_t<Real> where it can hold them.
template <class Real, class Offset>
class Samples {
 public:
  // The result of one prepare(), for a loop over channels: for corner c of sample i, at
  // corner_index(c, i), attention times corner weight, and the offset of the pixel in value. The
  // four corners of a vector of samples lie together, so that the loop reads them through one
  // pointer.
  struct Prepared {
    const Real* corner_weight;
    const Offset* value_offset;
  };

  static int64_t corner_index(int c, int64_t i) {
    return (i / kLanes<Real> * kNumCorners + c) * kLanes<Real> + i % kLanes<Real>;
  }

  // num_heads: that are prepared at once. for_backward: corners(), fx(), fy() and attention() are
  // wanted.
  Samples(const Problem& problem, int64_t num_heads, bool for_backward)
      : problem_(problem),
        num_heads_(num_heads),
        for_backward_(for_backward),
        stride_(for_backward ? round_up(problem.num_samples, kQuads<Real>) : problem.num_samples),
        padded_(round_up(num_heads * stride_, kLanes<Real>)),
        width_(padded_),
        height_(padded_),
        map_width_(padded_),
        level_start_(padded_),
        head_offset_(padded_),
        reference_index_(padded_),
        half_over_points_(padded_),
        step_x_(padded_),
        step_y_(padded_),
        references_(round_up(problem.num_levels * problem.reference_size, kLanes<Real>), 0),
        given_points_(2 * padded_, Real(__builtin_nan(""))),
        given_weights_(padded_, 0),
        softmaxed_heads_(padded_),
        softmax_stride_(
            problem.is_fused ? round_up(problem.num_samples, kLanes<Real>) + kLanes<Real> : 0),
        softmaxed_(kSoftmaxRows * softmax_stride_),
        key_(padded_),
        corners_(padded_),
        value_offset_(2 * kNumCorners * padded_),
        grad_offset_(kNumCorners * padded_),
        fx_(padded_),
        fy_(padded_),
        attention_(padded_),
        corner_weight_(2 * kNumCorners * padded_) {
    const int64_t pixel = problem.head_dim * element_size(problem.value.dtype);
    // Samples past the last of a head: NaN for points, so that they do not count.
    for (int64_t i = 0; i < padded_; ++i) set_sample(i, 0, Level{1, 1, 0, 0}, 0);
    for (int64_t head = 0; head < num_heads; ++head) {
      int64_t i = head * stride_;
      for (int64_t l = 0; l < problem.num_levels; ++l) {
        for (int64_t p = 0; p < problem.levels[l].num_points; ++p, ++i) {
          set_sample(i, l, problem.levels[l], head * pixel);
        }
      }
    }
    std::memset(softmaxed_heads_.get(), 0, padded_ * sizeof(Real));
  }

  int64_t stride() const { return stride_; }  // from the first sample of a head to the next head's
  int64_t padded() const { return padded_; }  // length of the arrays below

  // prepare() computes these for each sample: the corners that are read (bit c for corner c), the
  // fractions, the attention weight (0 where the sample does not count) and the weight as given or
  // softmaxed, whether the sample counts or not.
  const index_t<Real>* corners() const { return corners_.get(); }
  const Real* fx() const { return fx_.get(); }
  const Real* fy() const { return fy_.get(); }
  const Real* attention() const { return attention_.get(); }
  const Real* weights() const { return weights_; }

  // Of the last prepare(). The next one leaves it alone.
  Prepared prepared() const { return {corner_weight_.get() + half_, value_offset_.get() + half_}; }

  // Fetches `bytes` of each pixel of a head that is prepared. base: what the offsets start from.
  void fetch_pixels(const void* base, const Offset* offsets, int64_t head, int64_t bytes) const {
    for (int64_t i = head * stride_; i < head * stride_ + problem_.num_samples; ++i) {
      for (int c = 0; c < kNumCorners; ++c) {
        const void* const pixel = at_distance(base, offsets[corner_index(c, i)]);
        for (int64_t byte = 0; byte < bytes; byte += kCacheLine) {
          __builtin_prefetch(at_distance(pixel, byte));
        }
      }
    }
  }

  // The offset of the pixel in grad_value, if given grad_rows.
  const Offset* grad_offset() const { return grad_offset_.get(); }

  // The pixels that a given number stands for, per sample. An offset from a point is in pixels, one
  // from a box in units of (w, h) / (2P).
  const Real* step_x() const { return step_x_.get(); }
  const Real* step_y() const { return step_y_.get(); }

  // Reads the reference points of query q of image b, if the call is fused.
  void set_query(int64_t b, int64_t q) {
    if (!problem_.is_fused) return;
    const int64_t given = problem_.reference_levels * problem_.reference_size;
    const int64_t size = problem_.num_levels * problem_.reference_size;
    const int64_t query = b * problem_.num_queries + q;
    const int64_t next = q + 1 < problem_.num_queries ? query + 1 : -1;
    reference_ = references_.get(query, next, [&](int64_t of_query, Real* to) {
      read(problem_.reference_points, of_query * given, given, to);
      for (int64_t i = given; i < size; ++i) to[i] = to[i - given];
    });
    if (problem_.reference_size != 4) return;
    for (int64_t i = 0; i < padded_; i += kLanes<Real>) {
      const IntVec<Real> side = load_as<IntVec<Real>>(reference_index_.get() + i) + 2;
      const Vec<Real> half_over_points = load(half_over_points_.get() + i);
      store(step_x_.get() + i,
            load(width_.get() + i) * take(reference_, size, side) * half_over_points);
      store(step_y_.get() + i,
            load(height_.get() + i) * take(reference_, size, side + 1) * half_over_points);
    }
  }

  // Prepares the samples of head m of query q of image b, and of the heads after it that are
  // prepared at once, after set_query() of the same query. grad_rows: of several heads at once,
  // those of grad_value itself.
  void prepare(int64_t b, int64_t q, int64_t m, const Rows& value_rows,
               const Rows* grad_rows = nullptr) {
    half_ = kNumCorners * padded_ - half_;
    const int64_t head = (b * problem_.num_queries + q) * problem_.num_heads + m;
    const int64_t K = problem_.num_samples, first_sample = head * K;
    const int64_t next = q + 1 < problem_.num_queries ? head + problem_.num_heads : -1;
    points_ = given(problem_.points, head, next, 2, given_points_);
    if (problem_.is_fused) {
      weights_ = num_heads_ > 1 ? softmaxed_heads(head) : softmaxed(b, q, m);
    } else {
      weights_ = given(problem_.weights, head, next, 1, given_weights_);
    }
    const int64_t ahead = first_sample + rows_ahead(problem_) * K;
    prefetch<false>(problem_.points, 2 * ahead, 2 * num_heads_ * K);
    const int64_t further =
        problem_.is_fused && num_heads_ == 1 ? kSoftmaxRows * problem_.num_heads : 0;
    prefetch<false>(problem_.weights, ahead + further * K, num_heads_ * K);
    if (problem_.nearest) {
      prepare_nearest(value_rows, grad_rows);
    } else if (problem_.is_fused) {
      prepare_bilinear<true>(value_rows, grad_rows);
    } else {
      prepare_bilinear<false>(value_rows, grad_rows);
    }
    if (problem_.has_padding_mask) drop_padding(b, value_rows, grad_rows);
  }

 private:
  // The `size` numbers of each sample of the heads that are prepared at once: in place where there
  // is no padding. head, next: (b * Q + q) * M + m of the first, now and next.
  const Real* given(const ConstArray& array, int64_t head, int64_t next, int64_t size,
                    ReadAhead<Real>& buffer) const {
    const int64_t K = problem_.num_samples;
    const bool is_own = array.dtype == dtype_of<Real>;
    if (is_own && num_heads_ * K == padded_) {
      return static_cast<const Real*>(array.data) + size * head * K;
    }
    return buffer.get(head, next, [&](int64_t first_head, Real* to) {
      if (stride_ == K) {
        read(array, size * first_head * K, size * num_heads_ * K, to);
        return;
      }
      for (int64_t m = 0; m < num_heads_; ++m) {
        read(array, size * (first_head + m) * K, size * K, to + size * m * stride_);
      }
    });
  }

  // head_offset: from the first of the heads at once to that of this sample, in bytes.
  void set_sample(int64_t i, int64_t l, const Level& level, int64_t head_offset) {
    width_[i] = Real(level.width);
    height_[i] = Real(level.height);
    map_width_[i] = Offset(level.width);
    level_start_[i] = Offset(level.start);
    head_offset_[i] = Offset(head_offset);
    reference_index_[i] = index_t<Real>(l * problem_.reference_size);
    half_over_points_[i] = Real(0.5) / Real(level.num_points > 0 ? level.num_points : 1);
    step_x_[i] = problem_.is_fused ? 1 : width_[i];
    step_y_[i] = problem_.is_fused ? 1 : height_[i];
  }

  // The softmax of the logits of one query and head, computed together with those of the next
  // queries.
  const Real* softmaxed(int64_t b, int64_t q, int64_t m) {
    const int64_t M = problem_.num_heads, Q = problem_.num_queries, head = b * M + m;
    if (head != softmaxed_head_ || q < softmaxed_begin_ || q >= softmaxed_end_) {
      softmaxed_head_ = head;
      softmaxed_begin_ = q;
      softmaxed_end_ = q + kSoftmaxRows < Q ? q + kSoftmaxRows : Q;
      softmax_rows((b * Q + q) * M + m, M, softmaxed_end_ - q);
    }
    return softmaxed_.get() + (q - softmaxed_begin_) * softmax_stride_;
  }

  // Of so many rows of logits, the first one first_head, each so many heads after the one before.
  void softmax_rows(int64_t first_head, int64_t heads, int64_t num_rows) {
    const int64_t K = problem_.num_samples;
    Real* const rows = softmaxed_.get();
    if (problem_.weights.dtype == dtype_of<Real>) {
      const Real* const logits = static_cast<const Real*>(problem_.weights.data) + first_head * K;
      softmax(logits, heads * K, num_rows, K, rows, softmax_stride_);
      return;
    }
    for (int64_t r = 0; r < num_rows; ++r) {
      read(problem_.weights, (first_head + r * heads) * K, K, rows + r * softmax_stride_);
    }
    softmax(rows, softmax_stride_, num_rows, K, rows, softmax_stride_);
  }

  // The softmax of the heads of one query that are prepared at once; head: (b * Q + q) * M + m.
  const Real* softmaxed_heads(int64_t head) {
    constexpr int64_t kStep = kLanes<Real>;
    const int64_t K = problem_.num_samples;
    Real* const weights = softmaxed_heads_.get();
    if (0 < K && K < kStep && kStep % K == 0) {
      Real few[kStep] = {};  // of several heads
      for (int64_t m = 0; m < num_heads_; m += kStep / K) {
        const int64_t heads = num_heads_ - m < kStep / K ? num_heads_ - m : kStep / K;
        read(problem_.weights, (head + m) * K, heads * K, few);
        store(few, softmax_of_runs<Real>(load(few), K));
        for (int64_t h = 0; h < heads; ++h) convert(few + h * K, weights + (m + h) * stride_, K);
      }
      return weights;
    }
    for (int64_t m = 0; m < num_heads_; m += kSoftmaxRows) {
      const int64_t rows = num_heads_ - m < kSoftmaxRows ? num_heads_ - m : kSoftmaxRows;
      softmax_rows(head + m, 1, rows);
      for (int64_t r = 0; r < rows; ++r) {
        convert(softmaxed_.get() + r * softmax_stride_, weights + (m + r) * stride_, K);
      }
    }
    return weights;
  }

  // The buffers as plain pointers, which the compiler can keep in registers: it could take a store
  // to change a member.
  struct Pointers {
    const Real *points, *weights, *width, *height, *step_x, *step_y, *reference;
    const index_t<Real>* reference_index;
    int64_t reference_size;
    Real origin;
    const Offset *map_width, *level_start, *head_offset;
    Real *corner_weight, *fx, *fy, *attention;
    index_t<Real>* corners;
    Offset *key, *value_offset, *grad_offset;
  };

  Pointers pointers() {
    return {points_,
            weights_,
            width_.get(),
            height_.get(),
            step_x_.get(),
            step_y_.get(),
            reference_,
            reference_index_.get(),
            problem_.num_levels * problem_.reference_size,
            Real(problem_.nearest ? 0.5 : -0.5),
            map_width_.get(),
            level_start_.get(),
            head_offset_.get(),
            corner_weight_.get() + half_,
            fx_.get(),
            fy_.get(),
            attention_.get(),
            corners_.get(),
            key_.get(),
            value_offset_.get() + half_,
            grad_offset_.get()};
  }

  // The transform of one axis for samples i and those after it; c: its number in a reference.
  // Bilinear: x = loc * W - 1/2. Nearest: x = loc * W + 1/2, then truncated (RT-DETRv2's rule).
  // Fused, which is bilinear: x = reference * W - 1/2 + offset * step.
  template <bool kFused>
  static AxisTransform<Real> transform(const Pointers& p, int64_t i, int c) {
    AxisTransform<Real> axis{load((c == 0 ? p.step_x : p.step_y) + i), broadcast(p.origin), {}};
    if constexpr (kFused) {
      const IntVec<Real> index = load_as<IntVec<Real>>(p.reference_index + i) + c;
      const Vec<Real> reference = take(p.reference, p.reference_size, index);
      axis.origin =
          multiply_subtract_half(reference, load((c == 0 ? p.width : p.height) + i), axis.rest);
    }
    return axis;
  }

  template <bool kFused>
  void prepare_bilinear(const Rows& value_rows, const Rows* grad_rows) {
    const Pointers p = pointers();
    const int64_t padded = padded_;
    for (int64_t i = 0; i < padded; i += kLanes<Real>) {
      Vec<Real> given_x, given_y;
      load_pairs(p.points + 2 * i, given_x, given_y);
      const AxisTransform<Real> x_axis = transform<kFused>(p, i, 0);
      const AxisTransform<Real> y_axis = transform<kFused>(p, i, 1);
      Vec<Real> x = multiply_add(given_x, x_axis.step, x_axis.origin);
      Vec<Real> y = multiply_add(given_y, y_axis.step, y_axis.origin);

      const Vec<Real> width = load(p.width + i), height = load(p.height + i);
      const IntVec<Real> counts = sample_counts(x, y, width, height);
      x = counts ? x : Vec<Real>{};
      y = counts ? y : Vec<Real>{};
      const Vec<Real> attention = counts ? load(p.weights + i) : Vec<Real>{};

      const Cell<Vec<Real>> column =
          find_cell<VectorMath>(given_x, x_axis.step, x_axis.origin, x_axis.rest, x);
      const Cell<Vec<Real>> row =
          find_cell<VectorMath>(given_y, y_axis.step, y_axis.origin, y_axis.rest, y);
      const Vec<Real> x0 = column.first, y0 = row.first;
      const Vec<Real> fx = counts ? column.fraction : Vec<Real>{};
      const Vec<Real> fy = counts ? row.fraction : Vec<Real>{};

      const IntVec<Real> west = counts & (x0 >= 0), east = counts & (x0 < width - 1);
      const IntVec<Real> north = y0 >= 0, south = y0 < height - 1;
      const Corners<IntVec<Real>> read{west & north, east & north, west & south, east & south};
      const Corners<Vec<Real>> weights = corner_weights(fx, fy);
      store(p.corner_weight + corner_index(kNw, i), read.nw ? attention * weights.nw : Vec<Real>{});
      store(p.corner_weight + corner_index(kNe, i), read.ne ? attention * weights.ne : Vec<Real>{});
      store(p.corner_weight + corner_index(kSw, i), read.sw ? attention * weights.sw : Vec<Real>{});
      store(p.corner_weight + corner_index(kSe, i), read.se ? attention * weights.se : Vec<Real>{});
      if (for_backward_) {  // stores are what this loop is short of, so forward goes without
        store(p.fx + i, fx);
        store(p.fy + i, fy);
        store(p.attention + i, attention);
      }

      place(p, i, __builtin_convertvector(x0, IntVec<Real>),
            __builtin_convertvector(y0, IntVec<Real>), read, value_rows, grad_rows);
    }
  }

  // One pixel per sample, which takes the place of the north-west corner. A location beyond the map
  // reads the pixel at its edge; one that is not finite does not count.
  void prepare_nearest(const Rows& value_rows, const Rows* grad_rows) {
    const Pointers p = pointers();
    const IntVec<Real> none = {};
    for (int64_t i = 0; i < padded_; i += kLanes<Real>) {
      Vec<Real> x, y;
      load_pairs(p.points + 2 * i, x, y);
      const AxisTransform<Real> x_axis = transform<false>(p, i, 0);
      const AxisTransform<Real> y_axis = transform<false>(p, i, 1);
      x = multiply_add(x, x_axis.step, x_axis.origin);
      y = multiply_add(y, y_axis.step, y_axis.origin);
      const IntVec<Real> counts = (x - x == 0) & (y - y == 0);

      const Vec<Real> last_x = load(p.width + i) - 1, last_y = load(p.height + i) - 1;
      x = (x > 0) & counts ? x : Vec<Real>{};
      y = (y > 0) & counts ? y : Vec<Real>{};
      x = x < last_x ? x : last_x;
      y = y < last_y ? y : last_y;
      const Vec<Real> attention = counts ? load(p.weights + i) : Vec<Real>{};
      store(p.corner_weight + corner_index(kNw, i), attention);
      for (int c = kNe; c <= kSe; ++c) store(p.corner_weight + corner_index(c, i), Vec<Real>{});
      store(p.fx + i, Vec<Real>{});
      store(p.fy + i, Vec<Real>{});
      store(p.attention + i, attention);
      place(p, i, __builtin_convertvector(x, IntVec<Real>),
            __builtin_convertvector(y, IntVec<Real>), {counts, none, none, none}, value_rows,
            grad_rows);
    }
  }

  // Stores where the corners of a vector of samples lie.
  void place(const Pointers& p, int64_t i, IntVec<Real> x0, IntVec<Real> y0,
             const Corners<IntVec<Real>>& read, const Rows& value_rows, const Rows* grad_rows) {
    const bool needs_keys = problem_.has_padding_mask;
    if (for_backward_ || needs_keys) {
      store_as(p.corners + i, (read.nw & (1 << kNw)) | (read.ne & (1 << kNe)) |
                                  (read.sw & (1 << kSw)) | (read.se & (1 << kSe)));
    }
    for (int part = 0; part < kLanes<Real>; part += kLanes<Offset>) {
      const int64_t j = i + part;
      const Vec<Offset> map_width = load_as<Vec<Offset>>(p.map_width + j);
      const Vec<Offset> key = load_as<Vec<Offset>>(p.level_start + j) +
                              widen<Offset>(y0, part) * map_width + widen<Offset>(x0, part);
      if (needs_keys) store_as(p.key + j, key);
      const Corners<Vec<Offset>> wide{widen<Offset>(read.nw, part), widen<Offset>(read.ne, part),
                                      widen<Offset>(read.sw, part), widen<Offset>(read.se, part)};
      const Vec<Offset> head = load_as<Vec<Offset>>(p.head_offset + j);
      store_offsets(p.value_offset, j, key, map_width, head, wide, value_rows);
      if (grad_rows) store_offsets(p.grad_offset, j, key, map_width, head, wide, *grad_rows);
    }
  }

  void store_offsets(Offset* offsets, int64_t i, Vec<Offset> key, Vec<Offset> map_width,
                     Vec<Offset> head, const Corners<Vec<Offset>>& read, const Rows& rows) {
    const Offset stride = Offset(rows.key_stride);
    const Vec<Offset> nowhere = broadcast(Offset(rows.nowhere));
    const Vec<Offset> north = key * stride + head;
    const Vec<Offset> south = north + map_width * stride;
    store_as(offsets + corner_index(kNw, i), read.nw ? north : nowhere);
    store_as(offsets + corner_index(kNe, i), read.ne ? north + stride : nowhere);
    store_as(offsets + corner_index(kSw, i), read.sw ? south : nowhere);
    store_as(offsets + corner_index(kSe, i), read.se ? south + stride : nowhere);
  }

  // Drops the corners that lie on padded pixels.
  void drop_padding(int64_t b, const Rows& value_rows, const Rows* grad_rows) {
    const uint8_t* const mask = problem_.padding_mask + b * problem_.num_keys;
    for (int64_t i = 0; i < padded_; ++i) {
      for (int c = 0; c < kNumCorners; ++c) {
        if ((corners_[i] >> c & 1) == 0) continue;
        if (mask[key_[i] + c % 2 + c / 2 * map_width_[i]] == 0) continue;
        corners_[i] &= ~(index_t<Real>(1) << c);
        corner_weight_[half_ + corner_index(c, i)] = 0;  // it may be NaN
        value_offset_[half_ + corner_index(c, i)] = Offset(value_rows.nowhere);
        if (grad_rows) grad_offset_[corner_index(c, i)] = Offset(grad_rows->nowhere);
      }
    }
  }

  const Problem& problem_;
  const int64_t num_heads_;
  const bool for_backward_;
  const int64_t stride_, padded_;
  Buffer<Real> width_, height_;
  Buffer<Offset> map_width_, level_start_, head_offset_;
  Buffer<index_t<Real>> reference_index_;  // of the first number of a sample's level in reference_
  Buffer<Real> half_over_points_;          // 1 / (2P) of a sample's level
  Buffer<Real> step_x_, step_y_;
  ReadAhead<Real> references_;
  const Real* reference_ = nullptr;  // points or boxes of the current query: (L, 2) or (L, 4)
  ReadAhead<Real> given_points_, given_weights_;
  Buffer<Real> softmaxed_heads_;
  const int64_t softmax_stride_;  // of the rows below
  Buffer<Real> softmaxed_;        // of queries softmaxed_begin_ to softmaxed_end_ - 1
  int64_t softmaxed_head_ = -1, softmaxed_begin_ = 0, softmaxed_end_ = 0;
  Buffer<Offset> key_;
  Buffer<index_t<Real>> corners_;
  Buffer<Offset> value_offset_, grad_offset_;
  Buffer<Real> fx_, fy_, attention_, corner_weight_;
  int64_t half_ = 0;               // of value_offset_ and corner_weight_: where prepared() begins
  const Real* points_ = nullptr;   // of the current query and head: (padded, 2)
  const Real* weights_ = nullptr;  // likewise: (padded)
};

}  // namespace MSDA_CPU_CAPABILITY
}  // namespace msda
