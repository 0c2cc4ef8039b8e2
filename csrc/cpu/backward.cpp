// Backward on the CPU: all gradients in one pass over the samples. Compiled once per instruction
// set.
//
// grad_value is a scatter: many samples add to one pixel. A task owns one head of one image, or
// some of its channels, so no other thread writes there, and it visits the queries in order: no
// atomics, and the same bits for any number of threads.

#include "kernels.h"
#include "samples.h"

namespace msda {
namespace MSDA_CPU_CAPABILITY {
namespace {

// Packed: value and the sums of grad_value are copies of one head's pixels, next to each other.
// Otherwise value is read where it is, and the sums lie in grad_value or in a copy.
template <class T, bool kPacked>
using PackedSamples = Samples<acc_t<T>, std::conditional_t<kPacked, index_t<acc_t<T>>, int64_t>>;

// Samples first..last-1, of one query and head; kVectors vectors of channels or
// `channels` lanes of one (kPartial): adds weight * grad_output to the pixels read by forward, and
// adds to dots[4 * i + c] the product <grad_output, value> of sample i and corner c over these
// channels.
//   value: value[b, 0, m, d:]   grad_output: grad_output[b, q, m * D + d:]
//   grad_value: the sum's place for key 0, channel d, of the head
template <class T, bool kPacked, int kVectors, bool kPartial, bool kDots, bool kScatter>
void backward_channels(const PackedSamples<T, kPacked>& samples, int64_t first, int64_t last,
                       const T* value, const T* grad_output, int channels, acc_t<T>* grad_value,
                       acc_t<T>* dots, bool first_channels) {
  using Real = acc_t<T>;
  // Rows next to each other in both: what differs is how wide a number is.
  constexpr int kGradScale = kPacked ? sizeof(Real) / sizeof(T) : 1;
  constexpr int kStep = kLanes<Real>;
  Vec<Real> g[kVectors];
  for (int k = 0; k < kVectors; ++k) {
    g[k] = kPartial ? load_partial(grad_output, channels) : load(grad_output + k * kStep);
  }

  const auto prepared = samples.prepared();
  for (int64_t i = first / kStep * kStep; i < last; i += kStep) {
    const int begin = int(first > i ? first - i : 0);
    const int end = int(last - i < kStep ? last - i : kStep);
    const auto* const value_offset = prepared.value_offset + kNumCorners * i;
    const auto* const grad_offset =
        kPacked ? value_offset : samples.grad_offset() + kNumCorners * i;
    const Real* const weight = prepared.corner_weight + kNumCorners * i;
    Vec<Real> weights[kNumCorners];
    for (int c = 0; c < kNumCorners; ++c) weights[c] = load(weight + c * kStep);
    IntVec<Real> index = broadcast(index_t<Real>(begin));
    // So many samples at once that their sums fill a vector: a whole vector that was stored can be
    // loaded before it has reached the cache. Samples past the last do not count.
    for (int j = begin; j < end; j += kQuads<Real>) {
      Vec<Real> dot[kQuads<Real>][kNumCorners] = {};
      MSDA_UNROLL for (int s = 0; s < kQuads<Real>; ++s, index += 1) {
        MSDA_UNROLL for (int c = 0; c < kNumCorners; ++c) {
          const int n = c * kStep + j + s;
          if constexpr (kDots) {
            const T* const pixel = at_distance(value, value_offset[n]);
            MSDA_UNROLL for (int k = 0; k < kVectors; ++k) {
              const Vec<Real> v =
                  kPartial ? load_partial(pixel, channels) : load(pixel + k * kStep);
              dot[s][c] = add_product(dot[s][c], g[k], v);
            }
          }
          if constexpr (kScatter) {
            Real* const pixel = at_distance(grad_value, int64_t(grad_offset[n]) * kGradScale);
            const Vec<Real> w = broadcast_lane(weights[c], index, weight + c * kStep, j + s);
            MSDA_UNROLL for (int k = 0; k < kVectors; ++k) {
              Real* const p = pixel + k * kStep;
              if constexpr (kPartial) {
                store_partial(p, add_product(load_partial(p, channels), g[k], w), channels);
              } else {
                store(p, add_product(load(p), g[k], w));
              }
            }
          }
        }
      }
      if constexpr (kDots) store_lane_sums(dots + kNumCorners * (i + j), dot, !first_channels);
    }
  }
}

// Walks the channels of one query and head in as few passes as the vectors allow.
template <class T, bool kPacked, bool kDots, bool kScatter>
void backward_all_channels(const PackedSamples<T, kPacked>& samples, int64_t first, int64_t last,
                           const T* value, const T* grad_output, int64_t num_channels,
                           acc_t<T>* grad_value, acc_t<T>* dots) {
  constexpr int kStep = kLanes<acc_t<T>>;
  const auto run = [&](auto vectors, auto partial, int64_t d) {
    backward_channels<T, kPacked, decltype(vectors)::value, decltype(partial)::value, kDots,
                      kScatter>(samples, first, last, value + d, grad_output + d,
                                int(num_channels - d), grad_value + (kScatter ? d : 0), dots,
                                d == 0);
  };
  constexpr std::bool_constant<false> whole;
  constexpr std::bool_constant<true> partial;
  int64_t d = 0;
  for (; d + 4 * kStep <= num_channels; d += 4 * kStep)
    run(std::integral_constant<int, 4>(), whole, d);
  for (; d + 2 * kStep <= num_channels; d += 2 * kStep)
    run(std::integral_constant<int, 2>(), whole, d);
  for (; d + kStep <= num_channels; d += kStep) run(std::integral_constant<int, 1>(), whole, d);
  if (d < num_channels) run(std::integral_constant<int, 1>(), partial, d);
}

// The gradients of one head of one image after the other; or, where sums_in_place(), of num_heads
// heads next to each other together.
template <class T, bool kPacked>
class Backward {
 public:
  using Real = acc_t<T>;

  // Some queries, and some channels of grad_value: all of them where other gradients are wanted.
  struct Part {
    int64_t first_query, last_query, first_channel, last_channel;
  };

  Backward(const Problem& problem, const BackwardInputs& inputs, const BackwardOutputs& outputs,
           int64_t num_heads)
      : problem_(problem),
        inputs_(inputs),
        outputs_(outputs),
        num_heads_(num_heads),
        has_sums_(outputs.grad_value.is_wanted && !sums_in_place(problem)),
        samples_(problem, num_heads, true),
        dots_(4 * samples_.padded()),
        points_(2 * samples_.padded()),
        weights_(samples_.padded()),
        copy_(problem, kPacked && wants_dots()),
        spare_row_(problem.head_dim),
        sums_(has_sums_ ? (problem.num_keys + 1) * problem.head_dim : 0) {
    std::memset(dots_.get(), 0, 4 * samples_.padded() * sizeof(Real));
    std::memset(spare_row_.get(), 0, problem.head_dim * sizeof(Real));
  }

  // Head m of image b, and those after it that are walked together.
  void run(int64_t b, int64_t m, const Part& part) {
    const int64_t M = problem_.num_heads, D = problem_.head_dim;
    const int64_t first_element = b * problem_.num_keys * M * D + m * D + part.first_channel;
    const int64_t channels = part.last_channel - part.first_channel;
    const T* value = static_cast<const T*>(problem_.value.data) + first_element;
    Rows value_rows{M * D * int64_t(sizeof(T)), distance(value, copy_.get())};
    if (kPacked) {
      if (wants_dots()) copy_.read(b, m);
      value = copy_.get();
      value_rows = packed_rows(problem_, channels * int64_t(sizeof(T)));
    }
    // The sums of the pixels' gradients: in place, or next to each other.
    Real* grad_value = nullptr;
    Rows grad_rows{};
    if (has_sums_) {
      std::memset(sums_.get(), 0, (problem_.num_keys + 1) * channels * sizeof(Real));
      grad_value = sums_.get();
      grad_rows = packed_rows(problem_, channels * int64_t(sizeof(Real)));
    } else if (outputs_.grad_value.is_wanted) {
      grad_value = static_cast<Real*>(outputs_.grad_value.data) + first_element;
      grad_rows = {M * D * int64_t(sizeof(Real)), distance(grad_value, spare_row_.get())};
    }
    const bool has_grad_rows = !kPacked && outputs_.grad_value.is_wanted;
    for (int64_t q = part.first_query; q < part.last_query; ++q) {
      samples_.set_query(b, q);
      samples_.prepare(b, q, m, value_rows, has_grad_rows ? &grad_rows : nullptr);
      query((b * problem_.num_queries + q) * M + m, part, value, grad_value);
    }
    if (has_sums_) {
      T* const to = static_cast<T*>(outputs_.grad_value.data) + first_element;
      for (int64_t key = 0; key < problem_.num_keys; ++key) {
        convert(sums_.get() + key * channels, to + key * M * D, channels);
      }
    }
  }

 private:
  // The heads that were prepared; the first one is first_head = (b * Q + q) * M + m.
  void query(int64_t first_head, const Part& part, const T* value, Real* grad_value) {
    const int64_t D = problem_.head_dim;
    const auto* const grad_output =
        static_cast<const T*>(inputs_.grad_output.data) + first_head * D + part.first_channel;
    prefetch_next(first_head + rows_ahead(problem_));
    for (int64_t head = 0; head < num_heads_; ++head) {
      const auto run = [&](auto with_dots, auto with_scatter) {
        const int64_t first = head * samples_.stride();
        backward_all_channels<T, kPacked, decltype(with_dots)::value,
                              decltype(with_scatter)::value>(
            samples_, first, first + problem_.num_samples, value, grad_output + head * D,
            part.last_channel - part.first_channel, grad_value, dots_.get());
      };
      constexpr std::bool_constant<false> no;
      constexpr std::bool_constant<true> yes;
      if (!outputs_.grad_value.is_wanted) {
        run(yes, no);
      } else if (wants_dots()) {
        run(yes, yes);
      } else {
        run(no, yes);
      }
    }
    if (wants_dots()) write_sample_gradients(first_head);
  }

  // Of the gradients of points and weights.
  bool wants_dots() const {
    return outputs_.grad_points.is_wanted || outputs_.grad_weights.is_wanted;
  }

  void prefetch_next(int64_t first_head) {
    const int64_t width = num_heads_ * problem_.head_dim;
    const int64_t samples = first_head * problem_.num_samples;
    const int64_t count = num_heads_ * problem_.num_samples;
    prefetch<false>(inputs_.grad_output, first_head * problem_.head_dim, width);
    if (outputs_.grad_points.is_wanted) {
      prefetch<true>(outputs_.grad_points, 2 * samples, 2 * count);
    }
    if (outputs_.grad_weights.is_wanted) {
      prefetch<true>(outputs_.grad_weights, samples, count);
    }
  }

  // The gradients of points and weights, each of which belongs to one sample alone.
  void write_sample_gradients(int64_t first_head) {
    const bool in_pixels = outputs_.grad_reference_points.is_wanted;
    for (int64_t i = 0; i < samples_.padded(); i += kLanes<Real>) {
      Corners<Vec<Real>> dot;
      load_quads(dots_.get() + 4 * i, dot.nw, dot.ne, dot.sw, dot.se);
      const IntVec<Real> corners = load_as<IntVec<Real>>(samples_.corners() + i);
      dot.nw = (corners & (1 << kNw)) != 0 ? dot.nw : Vec<Real>{};
      dot.ne = (corners & (1 << kNe)) != 0 ? dot.ne : Vec<Real>{};
      dot.sw = (corners & (1 << kSw)) != 0 ? dot.sw : Vec<Real>{};
      dot.se = (corners & (1 << kSe)) != 0 ? dot.se : Vec<Real>{};
      const SampleGradient<Vec<Real>> gradient =
          sample_gradient(dot, load(samples_.fx() + i), load(samples_.fy() + i));
      const Vec<Real> attention = load(samples_.attention() + i);
      Vec<Real> grad_x = {}, grad_y = {};
      if (!problem_.nearest) {
        grad_x = attention * gradient.dx;
        grad_y = attention * gradient.dy;
        if (!in_pixels) {
          grad_x *= load(samples_.step_x() + i);
          grad_y *= load(samples_.step_y() + i);
        }
        // Where no corner was read the step may be NaN or Inf.
        grad_x = corners != 0 ? grad_x : Vec<Real>{};
        grad_y = corners != 0 ? grad_y : Vec<Real>{};
      }
      store_pairs(points_.get() + 2 * i, grad_x, grad_y);
      store(weights_.get() + i, gradient.sample);
    }
    const int64_t K = problem_.num_samples;
    // Past the last sample all is 0, and whole vectors do not wait for parts of them.
    const int64_t softmaxed = num_heads_ == 1 ? samples_.padded() : K;
    for (int64_t head = 0; head < num_heads_; ++head) {
      const int64_t i = head * samples_.stride();
      const int64_t first_sample = (first_head + head) * K;
      if (outputs_.grad_points.is_wanted) {
        write(outputs_.grad_points, 2 * first_sample, 2 * K, points_.get() + 2 * i);
      }
      if (outputs_.grad_weights.is_wanted) {
        if (problem_.is_fused) {
          softmax_backward(samples_.weights() + i, weights_.get() + i, softmaxed);
        }
        write(outputs_.grad_weights, first_sample, K, weights_.get() + i);
      }
    }
  }

  const Problem& problem_;
  const BackwardInputs& inputs_;
  const BackwardOutputs& outputs_;
  const int64_t num_heads_;
  const bool has_sums_;  // else grad_value is summed in place, or not wanted
  PackedSamples<T, kPacked> samples_;
  Buffer<Real> dots_, points_, weights_;
  HeadRows<T> copy_;
  // What must reach no pixel is added there, or past the sums, and nobody reads it.
  Buffer<Real> spare_row_;
  Buffer<Real> sums_;
};

template <class T, bool kPacked>
void backward_heads(const Problem& problem, const BackwardInputs& inputs,
                    const BackwardOutputs& outputs, int64_t first, int64_t last) {
  const int64_t M = problem.num_heads;
  const typename Backward<T, kPacked>::Part all{0, problem.num_queries, 0, problem.head_dim};
  if (kPacked || !sums_in_place(problem) || !has_few_samples(problem)) {
    Backward<T, kPacked> backward(problem, inputs, outputs, 1);
    for (int64_t head = first; head < last; ++head) backward.run(head / M, head % M, all);
    return;
  }
  for (int64_t head = first, end; head < last; head = end) {
    const int64_t end_of_image = (head / M + 1) * M;
    end = end_of_image < last ? end_of_image : last;
    Backward<T, kPacked>(problem, inputs, outputs, end - head).run(head / M, head % M, all);
  }
}

template <class T, bool kPacked>
void backward_rows(const Problem& problem, const BackwardInputs& inputs,
                   const BackwardOutputs& outputs, int64_t first, int64_t last) {
  const int64_t M = problem.num_heads, Q = problem.num_queries;
  Backward<T, kPacked> backward(problem, inputs, outputs, 1);
  for (int64_t row = first, end; row < last; row = end) {
    const int64_t head = row / Q, end_of_head = (head + 1) * Q;
    end = end_of_head < last ? end_of_head : last;
    backward.run(head / M, head % M, {row - head * Q, end - head * Q, 0, problem.head_dim});
  }
}

template <class T, bool kPacked>
void backward_channel_parts(const Problem& problem, const BackwardInputs& inputs,
                            const BackwardOutputs& outputs, int64_t first, int64_t last) {
  const int64_t M = problem.num_heads, D = problem.head_dim, parts = num_channel_parts(problem);
  Backward<T, kPacked> backward(problem, inputs, outputs, 1);
  for (int64_t task = first; task < last; ++task) {
    const int64_t head = task / parts, channel = task % parts * kChannelsOfPart;
    const int64_t end = channel + kChannelsOfPart < D ? channel + kChannelsOfPart : D;
    backward.run(head / M, head % M, {0, problem.num_queries, channel, end});
  }
}

// Heads are added up sample by sample first, whole vectors at a time, and levels at the end.
template <class Real>
void backward_reference_points_rows(const Problem& problem, const BackwardOutputs& outputs,
                                    int64_t first, int64_t last) {
  constexpr int kStep = kLanes<Real>;
  const int64_t M = problem.num_heads, K = problem.num_samples;
  const int64_t size = problem.reference_size, levels = problem.reference_levels;
  const bool is_box = size == 4;
  const ConstArray in_pixels{outputs.grad_points.data, outputs.grad_points.dtype};
  Samples<Real, int64_t> samples(problem, 1, true);
  const int64_t padded = round_up(2 * K, kStep);
  Buffer<Real> grad_points(padded), offsets(padded), steps(padded);  // (K, 2) and more
  Buffer<Real> sums(padded), sums_by_offset(padded);                 // over the heads
  Buffer<Real> grad_reference(levels * size);
  for (Buffer<Real>* buffer : {&grad_points, &offsets, &steps}) {
    std::memset(buffer->get(), 0, padded * sizeof(Real));
  }
  for (int64_t row = first; row < last; ++row) {
    if (is_box) {
      samples.set_query(row / problem.num_queries, row % problem.num_queries);
      for (int64_t i = 0; i < K; ++i) {
        steps[2 * i] = samples.step_x()[i];
        steps[2 * i + 1] = samples.step_y()[i];
      }
    }
    std::memset(sums.get(), 0, padded * sizeof(Real));
    std::memset(sums_by_offset.get(), 0, padded * sizeof(Real));
    for (int64_t m = 0; m < M; ++m) {
      const int64_t first_number = 2 * (row * M + m) * K;
      prefetch<false>(in_pixels, first_number + 2 * rows_ahead(problem) * K, 2 * K);
      read(in_pixels, first_number, 2 * K, grad_points.get());
      if (is_box) read(problem.points, first_number, 2 * K, offsets.get());
      for (int64_t i = 0; i < padded; i += kStep) {
        const Vec<Real> gradient = load(grad_points.get() + i);
        store(sums.get() + i, load(sums.get() + i) + gradient);
        if (!is_box) continue;
        // A sample that does not count may have offsets or boxes that are NaN or Inf.
        const IntVec<Real> counts = gradient != 0;
        const Vec<Real> by_offset = gradient * load(offsets.get() + i);
        store(sums_by_offset.get() + i,
              load(sums_by_offset.get() + i) + (counts ? by_offset : Vec<Real>{}));
        const Vec<Real> complete = gradient * load(steps.get() + i);
        store(grad_points.get() + i, counts ? complete : Vec<Real>{});
      }
      // Offsets from points are in pixels already.
      if (is_box) write(outputs.grad_points, first_number, 2 * K, grad_points.get());
    }
    std::memset(grad_reference.get(), 0, levels * size * sizeof(Real));
    int64_t i = 0;
    for (int64_t l = 0; l < problem.num_levels; ++l) {
      const Level& level = problem.levels[l];
      const Real width = Real(level.width), height = Real(level.height);
      const Real half_over_points = Real(0.5) / Real(level.num_points > 0 ? level.num_points : 1);
      Real* const grad_point = grad_reference.get() + (levels == 1 ? 0 : l) * size;
      for (int64_t p = 0; p < level.num_points; ++p, ++i) {
        grad_point[0] += sums[2 * i] * width;
        grad_point[1] += sums[2 * i + 1] * height;
        if (!is_box) continue;
        grad_point[2] += sums_by_offset[2 * i] * width * half_over_points;
        grad_point[3] += sums_by_offset[2 * i + 1] * height * half_over_points;
      }
    }
    write(outputs.grad_reference_points, row * levels * size, levels * size, grad_reference.get());
  }
}

// Calls run() with a null pointer to value's type, and whether pixels are packed: where `packs`, if
// index_t holds the distances.
template <class F>
void dispatch(const Problem& problem, bool packs, const F& run) {
  dispatch_dtype(problem.value.dtype, [&](auto* type) {
    using Real = acc_t<std::remove_pointer_t<decltype(type)>>;
    if (packs && fits<index_t<Real>>(problem, sizeof(Real))) {
      run(type, std::bool_constant<true>());
    } else {
      run(type, std::bool_constant<false>());
    }
  });
}

}  // namespace

void backward(const Problem& problem, const BackwardInputs& inputs, const BackwardOutputs& outputs,
              int64_t first, int64_t last) {
  const bool packs = !sums_in_place(problem) && samples_often(problem, problem.num_queries);
  dispatch(problem, packs, [&](auto* type, auto packed) {
    using T = std::remove_pointer_t<decltype(type)>;
    backward_heads<T, decltype(packed)::value>(problem, inputs, outputs, first, last);
  });
}

void backward_samples(const Problem& problem, const BackwardInputs& inputs,
                      const BackwardOutputs& outputs, int64_t first, int64_t last) {
  BackwardOutputs of_samples = outputs;
  of_samples.grad_value.is_wanted = false;
  const int64_t of_head = problem.num_queries < last - first ? problem.num_queries : last - first;
  dispatch(problem, samples_often(problem, of_head), [&](auto* type, auto packed) {
    using T = std::remove_pointer_t<decltype(type)>;
    backward_rows<T, decltype(packed)::value>(problem, inputs, of_samples, first, last);
  });
}

void backward_value(const Problem& problem, const BackwardInputs& inputs,
                    const BackwardOutputs& outputs, int64_t first, int64_t last) {
  BackwardOutputs of_value;
  of_value.grad_value = outputs.grad_value;
  const bool packs = !sums_in_place(problem) && samples_often(problem, problem.num_queries);
  dispatch(problem, packs, [&](auto* type, auto packed) {
    using T = std::remove_pointer_t<decltype(type)>;
    backward_channel_parts<T, decltype(packed)::value>(problem, inputs, of_value, first, last);
  });
}

void backward_reference_points(const Problem& problem, const BackwardOutputs& outputs,
                               int64_t first, int64_t last) {
  dispatch_dtype(problem.value.dtype, [&](auto* type) {
    backward_reference_points_rows<acc_t<std::remove_pointer_t<decltype(type)>>>(problem, outputs,
                                                                                 first, last);
  });
}

}  // namespace MSDA_CPU_CAPABILITY
}  // namespace msda
