// Prints how csrc/split.h splits the calls of one problem over 1 to 64 threads, for test_split.py.
//   split_of_work BATCH QUERIES KEYS HEADS CHANNELS SAMPLES
// A line for each number of threads: passes of backward; then for forward and each pass of backward
// the threads that work, and the largest share over an even one.

#include <cstdio>
#include <cstdlib>

#include "../../csrc/split.h"

int main(int, char** arguments) {
  msda::Problem problem{};
  problem.batch = std::atoll(arguments[1]);
  problem.num_queries = std::atoll(arguments[2]);
  problem.num_keys = std::atoll(arguments[3]);
  problem.num_heads = std::atoll(arguments[4]);
  problem.head_dim = std::atoll(arguments[5]);
  problem.num_samples = std::atoll(arguments[6]);
  for (int64_t threads = 1; threads <= 64; ++threads) {
    const bool two_passes = msda::backward_in_two_passes(problem, threads);
    std::printf("%d", two_passes ? 2 : 1);
    const auto print = [&](const msda::Loop& loop) {
      const int64_t at_work = loop.num_threads(threads);
      std::printf(" %lld %.6f", static_cast<long long>(at_work),
                  loop.largest_share(threads) * double(at_work));
    };
    print(msda::rows_of(problem));
    if (two_passes) print(msda::rows_of(problem));
    print(two_passes ? msda::channel_parts_of(problem) : msda::heads_of(problem));
    std::printf("\n");
  }
}
