// Backward on the CPU: all gradients in one pass over the samples. Compiled once per instruction
// set.
//
// grad_value is a scatter: many samples add to one pixel. A task owns one head of one image (or one
// level of it), so no other thread writes to its pixels, and it visits the queries in order: no
// atomics, and the same bits for any number of threads.

#include "kernels.h"
#include "samples.h"

namespace msda {
namespace MSDA_CPU_CAPABILITY {
namespace {

// Where a task sums the gradient of one head's pixels: in grad_value itself or in a buffer of its
// own.
template <class Real>
struct GradValue {
  Real* base;  // null if not wanted
  Rows rows;
};

// One query and head, kVectors vectors of channels or `channels` lanes of one (kPartial):
// adds weight * grad_output to the pixels read by forward, and adds to dots[4 * i + c] the product
// <grad_output, value> of sample i and corner c over these channels.
//   value: value[b, 0, m, d:]   grad_output: grad_output[b, q, m * D + d:]
//   grad_value: the sum's place for key 0, channel d, of the head
template <class T, int kVectors, bool kPartial, bool kDots, bool kScatter>
void backward_channels(const Samples<acc_t<T>>& samples, const T* value, const T* grad_output,
                       int channels, acc_t<T>* grad_value, acc_t<T>* dots, bool first_channels) {
  using Real = acc_t<T>;
  constexpr int kStep = kLanes<Real>;
  Vec<Real> g[kVectors];
  for (int k = 0; k < kVectors; ++k) {
    g[k] = kPartial ? load_partial(grad_output, channels) : load(grad_output + k * kStep);
  }

  const int64_t count = samples.count();
  for (int64_t i = 0; i < count; i += kStep) {
    const int group = int(count - i < kStep ? count - i : kStep);
    const int64_t* const value_offset = samples.value_offset() + kNumCorners * i;
    const int64_t* const grad_offset = samples.grad_offset() + kNumCorners * i;
    const Real* const weight = samples.corner_weight() + kNumCorners * i;
    Vec<Real> weights[kNumCorners];
    for (int c = 0; c < kNumCorners; ++c) weights[c] = load(weight + c * kStep);
    IntVec<Real> index = {};
    for (int j = 0; j < group; ++j, index += 1) {
      Vec<Real> dot[kNumCorners] = {};
      for (int c = 0; c < kNumCorners; ++c) {
        if constexpr (kDots) {
          const T* const pixel = at_distance(value, value_offset[c * kStep + j]);
          for (int k = 0; k < kVectors; ++k) {
            dot[c] += g[k] * (kPartial ? load_partial(pixel, channels) : load(pixel + k * kStep));
          }
        }
        if constexpr (kScatter) {
          Real* const pixel = at_distance(grad_value, grad_offset[c * kStep + j]);
          const Vec<Real> w = broadcast_lane(weights[c], index, weight + c * kStep, j);
          for (int k = 0; k < kVectors; ++k) {
            Real* const p = pixel + k * kStep;
            if constexpr (kPartial) {
              store_partial(p, load_partial(p, channels) + g[k] * w, channels);
            } else {
              store(p, load(p) + g[k] * w);
            }
          }
        }
      }
      if constexpr (kDots) {
        Real* const sums = dots + kNumCorners * (i + j);
        auto sum = lane_sums(dot[kNw], dot[kNe], dot[kSw], dot[kSe]);
        if (!first_channels) sum += load_as<decltype(sum)>(sums);
        store_as(sums, sum);
      }
    }
  }
}

// Walks the channels of one query and head in as few passes as the vectors allow.
template <class T, bool kDots, bool kScatter>
void backward_all_channels(const Samples<acc_t<T>>& samples, const T* value, const T* grad_output,
                           int64_t head_dim, acc_t<T>* grad_value, acc_t<T>* dots) {
  constexpr int kStep = kLanes<acc_t<T>>;
  const auto run = [&](auto vectors, auto partial, int64_t d) {
    backward_channels<T, decltype(vectors)::value, decltype(partial)::value, kDots, kScatter>(
        samples, value + d, grad_output + d, int(head_dim - d), grad_value + (kScatter ? d : 0),
        dots, d == 0);
  };
  constexpr std::bool_constant<false> whole;
  constexpr std::bool_constant<true> partial;
  int64_t d = 0;
  for (; d + 4 * kStep <= head_dim; d += 4 * kStep) run(std::integral_constant<int, 4>(), whole, d);
  for (; d + 2 * kStep <= head_dim; d += 2 * kStep) run(std::integral_constant<int, 2>(), whole, d);
  for (; d + kStep <= head_dim; d += kStep) run(std::integral_constant<int, 1>(), whole, d);
  if (d < head_dim) run(std::integral_constant<int, 1>(), partial, d);
}

// One task, or the tasks of neighbouring heads together: the gradients of levels first_level to
// last_level - 1 of heads first_head to last_head - 1 of image b.
template <class T>
class Backward {
 public:
  using Real = acc_t<T>;

  Backward(const Problem& problem, const BackwardInputs& inputs, const BackwardOutputs& outputs,
           int64_t first_level, int64_t last_level)
      : problem_(problem),
        inputs_(inputs),
        outputs_(outputs),
        first_level_(first_level),
        last_level_(last_level),
        samples_(problem, first_level, last_level, kQueryTile, true),
        dots_(4 * samples_.padded()),
        points_(2 * samples_.padded()),
        weights_(samples_.padded()),
        delta_(problem.is_fused() ? 2 * problem.head_dim : 0),
        zeros_(problem.head_dim),
        rubbish_(problem.head_dim),
        scratch_(outputs.grad_value.data && !sums_in_place(problem) ? num_keys() * problem.head_dim
                                                                    : 0) {
    std::memset(dots_.get(), 0, 4 * samples_.padded() * sizeof(Real));
    std::memset(zeros_.get(), 0, problem.head_dim * sizeof(T));
    std::memset(rubbish_.get(), 0, problem.head_dim * sizeof(Real));
  }

  void run(int64_t b, int64_t first_head, int64_t last_head) {
    if (outputs_.grad_value.data == nullptr) {
      walk(b, first_head, last_head, [](int64_t) { return GradValue<Real>{}; });
    } else if (sums_in_place(problem_)) {
      const int64_t M = problem_.num_heads, D = problem_.head_dim;
      Real* const base =
          static_cast<Real*>(outputs_.grad_value.data) + b * problem_.num_keys * M * D;
      walk(b, first_head, last_head, [&](int64_t m) {
        Real* const head = base + m * D;
        return GradValue<Real>{head,
                               {M * D * int64_t(sizeof(Real)), 0, distance(head, rubbish_.get())}};
      });
    } else {
      for (int64_t m = first_head; m < last_head; ++m) run_in_scratch(b, m);
    }
  }

 private:
  template <class GradValueOfHead>
  void walk(int64_t b, int64_t first_head, int64_t last_head,
            const GradValueOfHead& grad_value_of_head) {
    const int64_t Q = problem_.num_queries;
    for (int64_t tile = 0; tile < Q; tile += kQueryTile) {
      const int64_t end = tile + kQueryTile < Q ? tile + kQueryTile : Q;
      samples_.set_queries(b, tile, end);
      for (int64_t m = first_head; m < last_head; ++m) {
        const GradValue<Real> grad_value = grad_value_of_head(m);
        for (int64_t q = tile; q < end; ++q) query(b, q, m, q - tile, grad_value);
      }
    }
  }

  // Keys of this object's levels.
  int64_t num_keys() const {
    const Level& last = problem_.levels[last_level_ - 1];
    return last.start + last.height * last.width - problem_.levels[first_level_].start;
  }

  // Sums the gradient of one head's pixels as contiguous rows of Real, then rounds and copies them.
  void run_in_scratch(int64_t b, int64_t m) {
    const int64_t M = problem_.num_heads, D = problem_.head_dim;
    const int64_t first_key = problem_.levels[first_level_].start;
    std::memset(scratch_.get(), 0, num_keys() * D * sizeof(Real));
    walk(b, m, m + 1, [&](int64_t) {
      const int64_t nowhere = distance(scratch_.get(), rubbish_.get());
      return GradValue<Real>{scratch_.get(), {D * int64_t(sizeof(Real)), first_key, nowhere}};
    });
    T* const grad_value = static_cast<T*>(outputs_.grad_value.data) +
                          ((b * problem_.num_keys + first_key) * M + m) * D;
    for (int64_t key = 0; key < num_keys(); ++key) {
      convert(scratch_.get() + key * D, grad_value + key * M * D, D);
    }
  }

  void query(int64_t b, int64_t q, int64_t m, int64_t slot, const GradValue<Real>& grad_value) {
    const int64_t M = problem_.num_heads, D = problem_.head_dim;
    const int64_t head = (b * problem_.num_queries + q) * M + m;
    const T* const value =
        static_cast<const T*>(problem_.value.data) + (b * problem_.num_keys * M + m) * D;
    const T* const grad_output = static_cast<const T*>(inputs_.grad_output.data) + head * D;
    samples_.prepare(b, q, m, slot, {M * D * int64_t(sizeof(T)), 0, distance(value, zeros_.get())},
                     grad_value.base ? &grad_value.rows : nullptr);
    const bool wants_dots = outputs_.grad_points.data || outputs_.grad_weights.data;
    const auto run = [&](auto with_dots, auto with_scatter) {
      backward_all_channels<T, decltype(with_dots)::value, decltype(with_scatter)::value>(
          samples_, value, grad_output, D, grad_value.base, dots_.get());
    };
    constexpr std::bool_constant<false> no;
    constexpr std::bool_constant<true> yes;
    if (!wants_dots) {
      run(no, yes);
    } else if (grad_value.base == nullptr) {
      run(yes, no);
    } else {
      run(yes, yes);
    }
    if (wants_dots) write_sample_gradients(head, slot);
  }

  // The gradients of points and weights, each of which belongs to one sample alone.
  void write_sample_gradients(int64_t head, int64_t slot) {
    // Softmax: grad_logit = p * (grad_p - sum over all samples of p * grad_p), and that sum is
    // <grad_output, output>.
    const Real delta = problem_.is_fused() ? output_product(head) : Real(0);
    const PixelTransform<Real> to_pixels = samples_.transform(slot);
    const bool in_pixels = outputs_.grad_reference.data != nullptr;
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
          grad_x *= load(to_pixels.x.step + i);
          grad_y *= load(to_pixels.y.step + i);
        }
        // Where no corner was read the step may be NaN or Inf.
        grad_x = corners != 0 ? grad_x : Vec<Real>{};
        grad_y = corners != 0 ? grad_y : Vec<Real>{};
      }
      store_pairs(points_.get() + 2 * i, grad_x, grad_y);
      Vec<Real> grad_weight = gradient.sample;
      if (problem_.is_fused()) grad_weight = load(samples_.weights() + i) * (grad_weight - delta);
      store(weights_.get() + i, grad_weight);
    }
    const int64_t first_sample = head * problem_.num_samples + samples_.begin();
    if (outputs_.grad_points.data) {
      write(outputs_.grad_points, 2 * first_sample, 2 * samples_.count(), points_.get());
    }
    if (outputs_.grad_weights.data) {
      write(outputs_.grad_weights, first_sample, samples_.count(), weights_.get());
    }
  }

  // <grad_output, output> of one query and head.
  Real output_product(int64_t head) {
    const int64_t D = problem_.head_dim;
    Real* const g = delta_.get();
    Real* const output = g + D;
    read(inputs_.grad_output, head * D, D, g);
    read(inputs_.output, head * D, D, output);
    Real sum = 0;
    for (int64_t d = 0; d < D; ++d) sum += g[d] * output[d];
    return sum;
  }

  const Problem& problem_;
  const BackwardInputs& inputs_;
  const BackwardOutputs& outputs_;
  const int64_t first_level_, last_level_;
  Samples<Real> samples_;
  Buffer<Real> dots_, points_, weights_, delta_;
  Buffer<T> zeros_;
  Buffer<Real> rubbish_, scratch_;
};

template <class T>
void backward_tasks(const Problem& problem, const BackwardInputs& inputs,
                    const BackwardOutputs& outputs, bool by_level, int64_t first, int64_t last) {
  const int64_t M = problem.num_heads, L = problem.num_levels;
  if (by_level) {
    for (int64_t task = first; task < last; ++task) {
      const int64_t l = task % L, head = task / L;
      Backward<T>(problem, inputs, outputs, l, l + 1).run(head / M, head % M, head % M + 1);
    }
    return;
  }
  Backward<T> backward(problem, inputs, outputs, 0, L);
  while (first < last) {
    const int64_t b = first / M;
    const int64_t end = (b + 1) * M < last ? (b + 1) * M : last;
    backward.run(b, first - b * M, end - b * M);
    first = end;
  }
}

template <class Real>
void backward_reference_rows(const Problem& problem, const BackwardOutputs& outputs, int64_t first,
                             int64_t last) {
  const int64_t M = problem.num_heads, K = problem.num_samples;
  const int64_t size = problem.reference_size, levels = problem.reference_levels;
  Samples<Real> samples(problem, 0, problem.num_levels, 1, true);
  Buffer<Real> grad_points(2 * K), offsets(2 * K), grad_reference(levels * size);
  for (int64_t row = first; row < last; ++row) {
    const int64_t b = row / problem.num_queries, q = row % problem.num_queries;
    samples.set_queries(b, q, q + 1);
    const PixelTransform<Real> to_pixels = samples.transform(0);
    std::memset(grad_reference.get(), 0, levels * size * sizeof(Real));
    for (int64_t m = 0; m < M; ++m) {
      const int64_t first_sample = (row * M + m) * K;
      read({outputs.grad_points.data, outputs.grad_points.dtype}, 2 * first_sample, 2 * K,
           grad_points.get());
      if (size == 4) read(problem.points, 2 * first_sample, 2 * K, offsets.get());
      int64_t i = 0;
      for (int64_t l = 0; l < problem.num_levels; ++l) {
        const Level& level = problem.levels[l];
        Real* const grad_point = grad_reference.get() + (levels == 1 ? 0 : l) * size;
        for (int64_t p = 0; p < level.num_points; ++p, ++i) {
          // A sample that does not count may have offsets or boxes that are NaN or Inf.
          if (grad_points[2 * i] == 0 && grad_points[2 * i + 1] == 0) continue;
          const Real grad_x = grad_points[2 * i] * samples.width()[i];
          const Real grad_y = grad_points[2 * i + 1] * samples.height()[i];
          grad_point[0] += grad_x;
          grad_point[1] += grad_y;
          if (size == 4) {
            const Real half_over_points = Real(0.5) / Real(level.num_points);
            grad_point[2] += grad_x * offsets[2 * i] * half_over_points;
            grad_point[3] += grad_y * offsets[2 * i + 1] * half_over_points;
          }
          grad_points[2 * i] *= to_pixels.x.step[i];
          grad_points[2 * i + 1] *= to_pixels.y.step[i];
        }
      }
      write(outputs.grad_points, 2 * first_sample, 2 * K, grad_points.get());
    }
    write(outputs.grad_reference, row * levels * size, levels * size, grad_reference.get());
  }
}

}  // namespace

void backward(const Problem& problem, const BackwardInputs& inputs, const BackwardOutputs& outputs,
              bool by_level, int64_t first, int64_t last) {
  dispatch_dtype(problem.value.dtype, [&](auto* type) {
    backward_tasks<std::remove_pointer_t<decltype(type)>>(problem, inputs, outputs, by_level, first,
                                                          last);
  });
}

void backward_reference(const Problem& problem, const BackwardOutputs& outputs, int64_t first,
                        int64_t last) {
  dispatch_dtype(problem.value.dtype, [&](auto* type) {
    backward_reference_rows<acc_t<std::remove_pointer_t<decltype(type)>>>(problem, outputs, first,
                                                                          last);
  });
}

}  // namespace MSDA_CPU_CAPABILITY
}  // namespace msda
