// Forward on the CPU. Compiled once per instruction set.

#include "kernels.h"
#include "samples.h"

namespace msda {
namespace MSDA_CPU_CAPABILITY {
namespace {

// Sums the samples of one query and head over kVectors vectors of channels, or over the first
// `channels` lanes of one vector where kPartial.
//   value: value[b, 0, m, d:]   output: output[b, q, m * D + d:]
template <class T, class Offset, int kVectors, bool kPartial>
void gather(const Samples<acc_t<T>, Offset>& samples, const T* value, int channels, T* output) {
  using Real = acc_t<T>;
  constexpr int kStep = kLanes<Real>;
  // Enough independent sums to hide the latency of a multiply-add.
  constexpr int kChains = kVectors >= 4 ? 1 : kVectors == 2 ? 2 : 4;
  Vec<Real> sum[kChains][kVectors] = {};

  const int64_t count = samples.count();
  for (int64_t i = 0; i < count; i += kStep) {
    const int group = int(count - i < kStep ? count - i : kStep);
    const Offset* const offset = samples.value_offset() + kNumCorners * i;
    const Real* const weight = samples.corner_weight() + kNumCorners * i;
    Vec<Real> weights[kNumCorners];
    for (int c = 0; c < kNumCorners; ++c) weights[c] = load(weight + c * kStep);
    IntVec<Real> index = {};
    for (int j = 0; j < group; ++j, index += 1) {
      for (int c = 0; c < kNumCorners; ++c) {
        const T* const pixel = at_distance(value, offset[c * kStep + j]);
        const Vec<Real> w = broadcast_lane(weights[c], index, weight + c * kStep, j);
        for (int k = 0; k < kVectors; ++k) {
          const Vec<Real> v = kPartial ? load_partial(pixel, channels) : load(pixel + k * kStep);
          sum[c % kChains][k] += v * w;
        }
      }
    }
  }

  for (int k = 0; k < kVectors; ++k) {
    Vec<Real> total = sum[0][k];
    for (int chain = 1; chain < kChains; ++chain) total += sum[chain][k];
    if constexpr (kPartial) {
      store_partial(output, total, channels);
    } else {
      store(output + k * kStep, total);
    }
  }
}

// Walks rows first..last-1 head by head, with the head's pixels copied next to each other if
// packed.
template <class T, class Offset>
void forward_heads(const Problem& problem, const ForwardOutputs& outputs, bool packed,
                   int64_t first, int64_t last) {
  constexpr int kStep = kLanes<acc_t<T>>;
  const int64_t M = problem.num_heads, D = problem.head_dim, Q = problem.num_queries;
  Samples<acc_t<T>, Offset> samples(problem, 0, problem.num_levels, false);
  HeadRows<T> copy(problem, 0, packed ? problem.num_keys : 0);

  while (first < last) {
    const int64_t b = first / Q / M, m = first / Q % M;
    const int64_t end = (first / Q + 1) * Q < last ? (first / Q + 1) * Q : last;
    // value[b, 0, m, :]
    const T* value = static_cast<const T*>(problem.value.data) + (b * problem.num_keys * M + m) * D;
    Rows rows{M * D * int64_t(sizeof(T)), 0, distance(value, copy.get())};
    if (packed) {
      copy.read(b, m);
      value = copy.get();
      rows = copy.rows();
    }
    for (; first < end; ++first) {
      const int64_t q = first % Q;
      samples.set_query(b, q);
      samples.prepare(b, q, m, rows);
      const int64_t row = (b * Q + q) * M + m;
      T* const output = static_cast<T*>(outputs.output.data) + row * D;
      prefetch<true>(outputs.output, (row + rows_ahead(problem)) * D, D);
      const auto run = [&](auto vectors, auto partial, int64_t d) {
        gather<T, Offset, decltype(vectors)::value, decltype(partial)::value>(
            samples, value + d, int(D - d), output + d);
      };
      constexpr std::bool_constant<false> whole;
      constexpr std::bool_constant<true> partial;
      int64_t d = 0;
      for (; d + 8 * kStep <= D; d += 8 * kStep) run(std::integral_constant<int, 8>(), whole, d);
      for (; d + 4 * kStep <= D; d += 4 * kStep) run(std::integral_constant<int, 4>(), whole, d);
      for (; d + 2 * kStep <= D; d += 2 * kStep) run(std::integral_constant<int, 2>(), whole, d);
      for (; d + kStep <= D; d += kStep) run(std::integral_constant<int, 1>(), whole, d);
      if (d < D) run(std::integral_constant<int, 1>(), partial, d);
    }
  }
}

}  // namespace

void forward(const Problem& problem, const ForwardOutputs& outputs, int64_t first, int64_t last) {
  dispatch_dtype(problem.value.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Near = index_t<acc_t<T>>;
    const int64_t num_queries =
        problem.num_queries < last - first ? problem.num_queries : last - first;
    if (is_dense(problem, num_queries) && fits<Near>(problem, sizeof(T))) {
      forward_heads<T, Near>(problem, outputs, true, first, last);
    } else {
      forward_heads<T, int64_t>(problem, outputs, false, first, last);
    }
  });
}

}  // namespace MSDA_CPU_CAPABILITY
}  // namespace msda
