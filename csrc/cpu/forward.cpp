// Forward on the CPU. Compiled once per instruction set.

#include "kernels.h"
#include "samples.h"

namespace msda {
namespace MSDA_CPU_CAPABILITY {
namespace {

// Sums the samples of one query and head over kVectors vectors of channels, or over the first
// `channels` lanes of one vector where kPartial.
//   value: value[b, 0, m, d:]   output: output[b, q, m * D + d:]
template <class T, int kVectors, bool kPartial>
void gather(const Samples<acc_t<T>>& samples, const T* value, int channels, T* output) {
  using Real = acc_t<T>;
  constexpr int kStep = kLanes<Real>;
  // Enough independent sums to hide the latency of a multiply-add.
  constexpr int kChains = kVectors >= 4 ? 1 : kVectors == 2 ? 2 : 4;
  Vec<Real> sum[kChains][kVectors] = {};

  const int64_t count = samples.count();
  for (int64_t i = 0; i < count; i += kStep) {
    const int group = int(count - i < kStep ? count - i : kStep);
    const int64_t* const offset = samples.value_offset() + kNumCorners * i;
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

template <class T>
void forward_rows(const Problem& problem, const ForwardOutputs& outputs, int64_t first,
                  int64_t last) {
  constexpr int kStep = kLanes<acc_t<T>>;
  const int64_t D = problem.head_dim, Q = problem.num_queries;
  const int64_t key_stride = problem.num_heads * D;
  Samples<acc_t<T>> samples(problem, 0, problem.num_levels, kQueryTile, false);
  Buffer<T> zeros(D);
  std::memset(zeros.get(), 0, D * sizeof(T));

  for (int64_t tile = first; tile < last;) {
    const int64_t b = tile / Q;
    const int64_t image_end = (b + 1) * Q < last ? (b + 1) * Q : last;
    const int64_t end = tile + kQueryTile < image_end ? tile + kQueryTile : image_end;
    samples.set_queries(b, tile - b * Q, end - b * Q);

    for (int64_t m = 0; m < problem.num_heads; ++m) {
      // value[b, 0, m, :]
      const T* const value =
          static_cast<const T*>(problem.value.data) + b * problem.num_keys * key_stride + m * D;
      const Rows rows{key_stride * int64_t(sizeof(T)), 0, distance(value, zeros.get())};
      for (int64_t row = tile; row < end; ++row) {
        samples.prepare(b, row - b * Q, m, row - tile, rows);
        T* const output = static_cast<T*>(outputs.output.data) + row * key_stride + m * D;
        int64_t d = 0;
        for (; d + 8 * kStep <= D; d += 8 * kStep) {
          gather<T, 8, false>(samples, value + d, 0, output + d);
        }
        for (; d + 4 * kStep <= D; d += 4 * kStep) {
          gather<T, 4, false>(samples, value + d, 0, output + d);
        }
        for (; d + 2 * kStep <= D; d += 2 * kStep) {
          gather<T, 2, false>(samples, value + d, 0, output + d);
        }
        for (; d + kStep <= D; d += kStep) {
          gather<T, 1, false>(samples, value + d, 0, output + d);
        }
        if (d < D) gather<T, 1, true>(samples, value + d, int(D - d), output + d);
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
