// How the work of a CPU call is split over threads. No torch. tests/operator/test_split.py counts
// each thread's share.

#pragma once

#include <algorithm>

#include "cpu/kernels.h"

namespace msda {

// Less work than this, in samples times channels, is not worth a thread: some 70 us of forward,
// where an encoder of 91 million takes 48 ms on one thread.
constexpr int64_t kMinWorkPerThread = 1 << 17;

inline int64_t grain_size(int64_t work_per_item) {
  return std::max<int64_t>(1, kMinWorkPerThread / std::max<int64_t>(1, work_per_item));
}

inline int64_t work_per_query_and_head(const Problem& problem) {
  return problem.num_samples * std::max<int64_t>(problem.head_dim, 16);
}

// Items of equal work that threads share, none fewer than `grain`.
struct Loop {
  int64_t count, grain;

  int64_t num_threads(int64_t available) const {
    return std::max<int64_t>(1, std::min(available, (count + grain - 1) / grain));
  }
  // The largest share of all items that a thread has.
  double largest_share(int64_t available) const {
    const int64_t threads = num_threads(available);
    return count == 0 ? 0 : double((count + threads - 1) / threads) / double(count);
  }
};

// Forward, and the first pass of a backward in two.
inline Loop rows_of(const Problem& problem) {
  return {problem.batch * problem.num_heads * problem.num_queries,
          grain_size(work_per_query_and_head(problem))};
}

inline Loop heads_of(const Problem& problem) {
  return {problem.batch * problem.num_heads,
          grain_size(work_per_query_and_head(problem) * problem.num_queries)};
}

// The second pass.
inline Loop channel_parts_of(const Problem& problem) {
  const int64_t parts = num_channel_parts(problem);
  return {problem.batch * problem.num_heads * parts,
          grain_size(work_per_query_and_head(problem) * problem.num_queries / parts)};
}

// Whether backward is faster in two passes, the gradients of points and weights first and that of
// value then: with about twice as many threads as there are heads. In one pass a thread owns heads;
// in two it has any of the rows, and owns channels of heads.
inline bool backward_in_two_passes(const Problem& problem, int64_t threads) {
  // Measured for an encoder on one thread, as parts of the time of one pass: rows; and parts of
  // channels, each of which prepares all samples of its head.
  constexpr double kRows = 0.65, kSamples = 0.2, kChannels = 0.4;
  const double of_parts = kSamples * double(num_channel_parts(problem)) + kChannels;
  return kRows * rows_of(problem).largest_share(threads) +
             of_parts * channel_parts_of(problem).largest_share(threads) <
         heads_of(problem).largest_share(threads);
}

}  // namespace msda
