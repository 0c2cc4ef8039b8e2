// Forward on the CPU. Compiled once per instruction set.

#include "kernels.h"
#include "samples.h"

namespace msda {
namespace MSDA_CPU_CAPABILITY {
namespace {

// Where pixels are not packed, they are fetched at least so many samples before their turn.
constexpr int64_t kSamplesAhead = 8;

// Sums samples first..last-1 over kVectors vectors of channels, or over the first `channels` lanes
// of one vector where kPartial.
//   value: what the offsets start from, channel d   output: output[b, q, m * D + d:]
template <class T, class Offset, int kVectors, bool kPartial>
void gather(const typename Samples<acc_t<T>, Offset>::Prepared& samples, int64_t first,
            int64_t last, const T* value, int channels, T* output) {
  using Real = acc_t<T>;
  constexpr int kStep = kLanes<Real>;
  // Enough independent sums to hide the latency of a multiply-add.
  constexpr int kChains = kVectors >= 4 ? 1 : kVectors == 2 ? 2 : 4;
  Vec<Real> sum[kChains][kVectors] = {};

  for (int64_t i = first / kStep * kStep; i < last; i += kStep) {
    const int begin = int(first > i ? first - i : 0);
    const int end = int(last - i < kStep ? last - i : kStep);
    const Offset* const offset = samples.value_offset + kNumCorners * i;
    const Real* const weight = samples.corner_weight + kNumCorners * i;
    Vec<Real> weights[kNumCorners];
    for (int c = 0; c < kNumCorners; ++c) weights[c] = load(weight + c * kStep);
    IntVec<Real> index = broadcast(index_t<Real>(begin));
    for (int j = begin; j < end; ++j, index += 1) {
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

// The same over all channels of a head, in as few passes as the vectors allow.
template <class T, class Offset>
void gather_head(const typename Samples<acc_t<T>, Offset>::Prepared& samples, int64_t first,
                 int64_t last, const T* value, int64_t head_dim, T* output) {
  constexpr int kStep = kLanes<acc_t<T>>;
  const auto run = [&](auto vectors, auto partial, int64_t d) {
    gather<T, Offset, decltype(vectors)::value, decltype(partial)::value>(
        samples, first, last, value + d, int(head_dim - d), output + d);
  };
  constexpr std::bool_constant<false> whole;
  constexpr std::bool_constant<true> partial;
  const int64_t D = head_dim;
  int64_t d = 0;
  for (; d + 8 * kStep <= D; d += 8 * kStep) run(std::integral_constant<int, 8>(), whole, d);
  for (; d + 4 * kStep <= D; d += 4 * kStep) run(std::integral_constant<int, 4>(), whole, d);
  for (; d + 2 * kStep <= D; d += 2 * kStep) run(std::integral_constant<int, 2>(), whole, d);
  for (; d + kStep <= D; d += kStep) run(std::integral_constant<int, 1>(), whole, d);
  if (d < D) run(std::integral_constant<int, 1>(), partial, d);
}

// Walks rows (b * M + m) * Q + q from first to last - 1, head by head, with the head's pixels
// copied next to each other if packed.
template <class T, class Offset>
void forward_heads(const Problem& problem, const ForwardOutputs& outputs, bool packed,
                   int64_t first, int64_t last) {
  const int64_t M = problem.num_heads, D = problem.head_dim, Q = problem.num_queries;
  Samples<acc_t<T>, Offset> samples(problem, 1, false);
  HeadRows<T> copy(problem, packed);

  while (first < last) {
    const int64_t b = first / Q / M, m = first / Q % M;
    const int64_t end = (first / Q + 1) * Q < last ? (first / Q + 1) * Q : last;
    // value[b, 0, m, :]
    const T* value = static_cast<const T*>(problem.value.data) + (b * problem.num_keys * M + m) * D;
    Rows rows{M * D * int64_t(sizeof(T)), distance(value, copy.get())};
    if (packed) {
      copy.read(b, m);
      value = copy.get();
      rows = packed_rows(problem, D * int64_t(sizeof(T)));
    }
    for (; first < end; ++first) {
      const int64_t q = first % Q;
      samples.set_query(b, q);
      samples.prepare(b, q, m, rows);
      const int64_t row = (b * Q + q) * M + m;
      T* const output = static_cast<T*>(outputs.output.data) + row * D;
      prefetch<true>(outputs.output, (row + rows_ahead(problem)) * D, D);
      gather_head<T, Offset>(samples.prepared(), 0, problem.num_samples, value, D, output);
    }
  }
}

// Walks rows (b * Q + q) * M + m from first to last - 1, query by query. All heads of a query are
// prepared at once, and each query is prepared before the previous one is summed: so its pixels,
// which lie anywhere, can be fetched ahead.
template <class T>
void forward_queries(const Problem& problem, const ForwardOutputs& outputs, int64_t first,
                     int64_t last) {
  using Prepared = typename Samples<acc_t<T>, int64_t>::Prepared;
  const int64_t M = problem.num_heads, D = problem.head_dim, Q = problem.num_queries;
  const int64_t K = problem.num_samples, row_bytes = D * int64_t(sizeof(T));
  Samples<acc_t<T>, int64_t> samples(problem, M, false);
  const HeadRows<T> zeros(problem, false);
  const auto* const values = static_cast<const T*>(problem.value.data);
  // value[b, 0, 0, :]
  const auto value_of = [&](int64_t query) {
    return values + query / Q * problem.num_keys * M * D;
  };
  const auto prepare = [&](int64_t query) {
    const int64_t b = query / Q, q = query % Q;
    samples.set_query(b, q);
    samples.prepare(b, q, 0, {M * row_bytes, distance(value_of(query), zeros.get())});
    return samples.prepared();
  };
  const auto fetch_pixels = [&](const Prepared& of, int64_t query, int64_t head) {
    samples.fetch_pixels(value_of(query), of.value_offset, head, row_bytes);
  };
  const int64_t heads_ahead = K > 0 ? (kSamplesAhead + K - 1) / K : 0;
  const int64_t ahead = heads_ahead < M ? heads_ahead : M;

  const int64_t last_query = (last - 1) / M;
  Prepared next = prepare(first / M);
  for (int64_t m = 0; m < ahead; ++m) fetch_pixels(next, first / M, m);
  for (int64_t query = first / M; query <= last_query; ++query) {
    const Prepared current = next;
    if (query < last_query) next = prepare(query + 1);
    for (int64_t m = 0; m < M; ++m) {
      if (m + ahead < M) {
        fetch_pixels(current, query, m + ahead);
      } else if (query < last_query) {
        fetch_pixels(next, query + 1, m + ahead - M);
      }
      const int64_t row = query * M + m;
      if (row < first || row >= last) continue;
      T* const output = static_cast<T*>(outputs.output.data) + row * D;
      gather_head<T, int64_t>(current, m * K, (m + 1) * K, value_of(query), D, output);
    }
  }
}

}  // namespace

void forward(const Problem& problem, const ForwardOutputs& outputs, int64_t first, int64_t last) {
  if (first >= last) return;
  dispatch_dtype(problem.value.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Near = index_t<acc_t<T>>;
    const int64_t num_queries =
        problem.num_queries < last - first ? problem.num_queries : last - first;
    if (!packs_pixels(problem, problem.num_queries)) {
      forward_queries<T>(problem, outputs, first, last);
    } else if (packs_pixels(problem, num_queries) && fits<Near>(problem, sizeof(T))) {
      forward_heads<T, Near>(problem, outputs, true, first, last);
    } else {
      forward_heads<T, int64_t>(problem, outputs, false, first, last);
    }
  });
}

}  // namespace MSDA_CPU_CAPABILITY
}  // namespace msda
