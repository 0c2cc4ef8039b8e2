// Forward on the CPU. Compiled once per instruction set.

#include "kernels.h"
#include "samples.h"

namespace msda {
namespace MSDA_CPU_CAPABILITY {
namespace {

// Queries whose heads are walked together. The rows of one head lie M * D elements apart, which maps
// them to a fraction of the L1 sets; neighbouring queries share pixels. A tile of queries, head by
// head, balances the two.
constexpr int64_t kQueryTile = 16;

// Sums the samples of one query and head over kVectors vectors of channels, or over the first
// `channels` lanes of one vector where kPartial.
//   value: value[b, 0, m, d:], key_stride elements from one key to the next
//   output: output[b, q, m * D + d:]
template <class T, int kVectors, bool kPartial>
void gather(const Samples<acc_t<T>>& samples, const T* value, int64_t key_stride, int channels,
            T* output) {
  using Real = acc_t<T>;
  constexpr int kStep = kLanes<Real>;
  // Enough independent sums to hide the latency of a multiply-add.
  constexpr int kChains = kVectors >= 4 ? 1 : kVectors == 2 ? 2 : 4;
  Vec<Real> sum[kChains][kVectors] = {};

  const auto add_corner = [&](const T* pixel, Real weight, Vec<Real>* into) {
    for (int k = 0; k < kVectors; ++k) {
      const Vec<Real> v = kPartial ? load_partial(pixel, channels) : load(pixel + k * kStep);
      into[k] += v * weight;
    }
  };

  const int64_t count = samples.count(), padded = samples.padded();
  const int64_t* const row = samples.row();
  const auto* const corners = samples.corners();
  const auto* const map_width = samples.map_width();
  const Real* const weight = samples.corner_weight();
  for (int64_t i = 0; i < count; ++i) {
    const int64_t north = row[i] * key_stride;
    const int64_t south = north + map_width[i] * key_stride;
    if (corners[i] == 15) {
      add_corner(value + north, weight[kNw * padded + i], sum[0]);
      add_corner(value + north + key_stride, weight[kNe * padded + i], sum[1 % kChains]);
      add_corner(value + south, weight[kSw * padded + i], sum[2 % kChains]);
      add_corner(value + south + key_stride, weight[kSe * padded + i], sum[3 % kChains]);
    } else {  // at the edge of the map: a corner outside is not read
      for (int c = 0; c < kNumCorners; ++c) {
        if ((corners[i] >> c & 1) == 0) continue;
        add_corner(value + (c / 2 == 0 ? north : south) + c % 2 * key_stride,
                   weight[c * padded + i], sum[0]);
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

template <class T>
void forward_rows(const Problem& problem, const ForwardOutputs& outputs, int64_t first,
                  int64_t last) {
  constexpr int kStep = kLanes<acc_t<T>>;
  const int64_t D = problem.head_dim, Q = problem.num_queries;
  const int64_t key_stride = problem.num_heads * D;
  Samples<acc_t<T>> samples(problem, 0, problem.num_levels, kQueryTile);

  for (int64_t tile = first; tile < last;) {
    const int64_t b = tile / Q;
    const int64_t image_end = (b + 1) * Q < last ? (b + 1) * Q : last;
    const int64_t end = tile + kQueryTile < image_end ? tile + kQueryTile : image_end;
    samples.set_queries(b, tile - b * Q, end - b * Q);

    for (int64_t m = 0; m < problem.num_heads; ++m) {
      // value[b, 0, m, :]
      const T* const value =
          static_cast<const T*>(problem.value.data) + b * problem.num_keys * key_stride + m * D;
      for (int64_t row = tile; row < end; ++row) {
        samples.prepare(b, row - b * Q, m, row - tile);
        T* const output = static_cast<T*>(outputs.output.data) + row * key_stride + m * D;
        int64_t d = 0;
        for (; d + 8 * kStep <= D; d += 8 * kStep) {
          gather<T, 8, false>(samples, value + d, key_stride, 0, output + d);
        }
        for (; d + 4 * kStep <= D; d += 4 * kStep) {
          gather<T, 4, false>(samples, value + d, key_stride, 0, output + d);
        }
        for (; d + 2 * kStep <= D; d += 2 * kStep) {
          gather<T, 2, false>(samples, value + d, key_stride, 0, output + d);
        }
        for (; d + kStep <= D; d += kStep) {
          gather<T, 1, false>(samples, value + d, key_stride, 0, output + d);
        }
        if (d < D) gather<T, 1, true>(samples, value + d, key_stride, int(D - d), output + d);
      }
    }
    tile = end;
  }
}

}  // namespace

void forward(const Problem& problem, const ForwardOutputs& outputs, int64_t first, int64_t last) {
  dispatch_dtype(problem.value.dtype, [&](auto* type) {
    forward_rows<std::remove_pointer_t<decltype(type)>>(problem, outputs, first, last);
  });
}

}  // namespace MSDA_CPU_CAPABILITY
}  // namespace msda
