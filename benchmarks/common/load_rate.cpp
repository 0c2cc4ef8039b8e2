// Prints how many 64-byte loads per second one core makes from its first-level cache, each added to
// a sum: the floor under a kernel whose work is to load and add. Compile with -O3 -march=native.

#include <chrono>
#include <cstdio>

typedef float Line __attribute__((vector_size(64)));

int main() {
  constexpr int kLines = 256;  // 16 KiB
  constexpr int kSums = 16;    // enough to hide the latency of an addition
  constexpr int kRepeats = 20000;
  static Line lines[kLines];
  for (int i = 0; i < kLines; ++i) lines[i] = Line{} + 1e-3f * float(i);
  double best = 0;
  float sink = 0;
  for (int trial = 0; trial < 20; ++trial) {
    Line sums[kSums] = {};
    const auto start = std::chrono::steady_clock::now();
    for (int repeat = 0; repeat < kRepeats; ++repeat) {
      const Line* first = lines;
      __asm__ volatile("" : "+r"(first) : : "memory");  // load anew in every repeat
      for (int i = 0; i < kLines; i += kSums) {
#pragma GCC unroll 16
        for (int s = 0; s < kSums; ++s) sums[s] += first[i + s];
      }
    }
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    const double rate = double(kLines) * kRepeats / elapsed.count();
    best = rate > best ? rate : best;
    for (const Line& sum : sums) sink += sum[0];
  }
  std::printf("%.6g\n", best);
  return sink == 12345.0f;  // the sums are used
}
