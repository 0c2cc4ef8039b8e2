// Micro-benchmarks of what the design of the kernels rests on: reductions, atomics and gathers at
// random rows, and the ceilings of the roofline. Needs a CUDA device and nothing else:
//
//   nvcc -std=c++17 -O3 -arch=native -o micro benchmarks/gpu/micro.cu && ./micro [--quick]
//
// Prints one JSON object per line as it goes: the device, then one measurement per line. Every
// measurement is checked against what the host computes (verified), then timed by events, with the
// GPU kept busy until the host has enqueued the call; times are medians. bytes_per_second counts
// what the rows hold (for copies: what is read and what is written). Exit status 0: all verified.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "device.cuh"

namespace {

using device::DeviceArray;
using device::Settings;
using device::time_calls;
using device::Times;

constexpr int kThreadsPerBlock = 256;
constexpr int kUnroll = 8;  // independent accesses in flight per thread
constexpr size_t kMegabyte = 1000 * 1000;
constexpr int kFirstWithVectorReductions = 9;  // major compute capability

// ---- random rows, the same on host and device
// ----------------------------------------------------

// The finalizer of MurmurHash3: neighbouring numbers become unrelated ones.
__host__ __device__ inline uint32_t mix(uint32_t x) {
  x ^= x >> 16;
  x *= 0x85ebca6bu;
  x ^= x >> 13;
  x *= 0xc2b2ae35u;
  return x ^ (x >> 16);
}

// A linear congruential generator: one instruction per row keeps the address off the critical path.
__host__ __device__ inline uint32_t next(uint32_t state) { return state * 1664525u + 1013904223u; }

__host__ __device__ inline uint32_t pick(uint32_t state, uint32_t count) {
  return static_cast<uint32_t>((static_cast<uint64_t>(state) * count) >> 32);
}

// Calls visit(row) for the rows that one group of lanes goes through, in its order.
template <typename Visit>
void for_each_row(uint32_t group, int rows_per_group, uint32_t num_rows, Visit visit) {
  uint32_t state = mix(group + 1);
  for (int i = 0; i < rows_per_group; ++i) {
    state = next(state);
    visit(pick(state, num_rows));
  }
}

// ---- kernels
// -------------------------------------------------------------------------------------

__global__ void do_nothing() {}

__global__ void fill_random(uint32_t* __restrict__ words, size_t count) {
  const size_t stride = size_t{gridDim.x} * blockDim.x;
  for (size_t i = size_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += stride) {
    words[i] = mix(static_cast<uint32_t>(i) + 1);
  }
}

__global__ void copy_words(const uint4* __restrict__ from, uint4* __restrict__ to, size_t count) {
  const size_t stride = size_t{gridDim.x} * blockDim.x;
  for (size_t i = size_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += stride) {
    to[i] = from[i];
  }
}

__global__ void count_different(const uint4* __restrict__ a, const uint4* __restrict__ b,
                                size_t count, unsigned int* __restrict__ different) {
  const size_t stride = size_t{gridDim.x} * blockDim.x;
  unsigned int found = 0;
  for (size_t i = size_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += stride) {
    const size_t j = count - 1 - i;  // not what this thread copied
    const uint4 x = a[j], y = b[j];
    found += x.x != y.x || x.y != y.y || x.z != y.z || x.w != y.w;
  }
  if (found != 0) atomicAdd(different, found);
}

// Sums all words passes times, reading from L2 or DRAM only (ld.cg does not look into L1).
__global__ void sum_words(const uint4* __restrict__ words, size_t count, int passes,
                          uint32_t* __restrict__ sums) {
  const size_t stride = size_t{gridDim.x} * blockDim.x;
  const size_t thread = size_t{blockIdx.x} * blockDim.x + threadIdx.x;
  uint32_t sum = 0;
  for (int pass = 0; pass < passes; ++pass) {
#pragma unroll 8
    for (size_t i = thread; i < count; i += stride) {
      const uint4 word = __ldcg(words + i);
      sum += word.x + word.y + word.z + word.w;
    }
  }
  sums[thread] = sum;
}

// Each group of kRowBytes / 16 lanes reads whole random rows, 16 bytes per lane.
template <int kRowBytes>
__global__ void __launch_bounds__(kThreadsPerBlock)
    load_rows(const uint4* __restrict__ rows, uint32_t num_rows, int rows_per_group,
              uint32_t* __restrict__ sums) {
  constexpr int kLanes = kRowBytes / 16;
  const uint32_t thread = blockIdx.x * kThreadsPerBlock + threadIdx.x;
  const uint4* const lane = rows + thread % kLanes;
  uint32_t state = mix(thread / kLanes + 1);
  uint32_t sum = 0;
  for (int i = 0; i < rows_per_group; i += kUnroll) {
    uint4 loaded[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      state = next(state);
      loaded[u] = __ldg(lane + size_t{pick(state, num_rows)} * kLanes);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      sum += loaded[u].x + loaded[u].y + loaded[u].z + loaded[u].w;
    }
  }
  sums[thread] = sum;
}

// What is added to element e of a row: small whole numbers, so that sums are exact in any order.
__host__ __device__ inline int increment(int e) { return 1 + e % 4; }

// One reduction instruction of a lane: kBytes of the row, from element lane * kBytes /
// kElementBytes.
struct RedF32 {
  static constexpr const char* kName = "red.f32";
  static constexpr int kBytes = 4, kElementBytes = 4;
  static constexpr bool kIsVector = false;
  static __device__ void add(char* address, int lane) {
    asm volatile("red.global.add.f32 [%0], %1;" ::"l"(address), "f"(float(increment(lane)))
                 : "memory");
  }
};

struct RedF32V2 {
  static constexpr const char* kName = "red.v2.f32";
  static constexpr int kBytes = 8, kElementBytes = 4;
  static constexpr bool kIsVector = true;
  static __device__ void add([[maybe_unused]] char* address, [[maybe_unused]] int lane) {
#if __CUDA_ARCH__ >= 900
    asm volatile("red.global.add.v2.f32 [%0], {%1, %2};" ::"l"(address),
                 "f"(float(increment(2 * lane))), "f"(float(increment(2 * lane + 1)))
                 : "memory");
#else
    __trap();
#endif
  }
};

struct RedF32V4 {
  static constexpr const char* kName = "red.v4.f32";
  static constexpr int kBytes = 16, kElementBytes = 4;
  static constexpr bool kIsVector = true;
  static __device__ void add([[maybe_unused]] char* address, [[maybe_unused]] int lane) {
#if __CUDA_ARCH__ >= 900
    // 4 * lane + e counts as e: increments repeat every four elements.
    asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(address),
                 "f"(float(increment(0))), "f"(float(increment(1))), "f"(float(increment(2))),
                 "f"(float(increment(3)))
                 : "memory");
#else
    __trap();
#endif
  }
};

struct RedBF16V4 {
  static constexpr const char* kName = "red.v4.bf16x2";
  static constexpr int kBytes = 16, kElementBytes = 2;
  static constexpr bool kIsVector = true;
  static __device__ void add([[maybe_unused]] char* address, [[maybe_unused]] int lane) {
#if __CUDA_ARCH__ >= 900
    constexpr uint32_t kOneTwo = 0x40003f80, kThreeFour = 0x40804040;  // the first in the low half
    asm volatile("red.global.add.noftz.v4.bf16x2 [%0], {%1, %2, %1, %2};" ::"l"(address),
                 "r"(kOneTwo), "r"(kThreeFour)
                 : "memory");
#else
    __trap();
#endif
  }
};

constexpr int kLineBytes = 128, kSectorBytes = 32;

// Each group of kLanes lanes adds to random rows of kRowBytes, one instruction of a lane next to
// the other from the beginning of the row on.
template <typename Red, int kRowBytes, int kLanes>
__global__ void __launch_bounds__(kThreadsPerBlock)
    reduce_rows(char* __restrict__ rows, uint32_t num_rows, int rows_per_group) {
  static_assert(kLanes * Red::kBytes <= kRowBytes);
  const uint32_t thread = blockIdx.x * kThreadsPerBlock + threadIdx.x;
  const int lane = thread % kLanes;
  char* const base = rows + lane * Red::kBytes;
  uint32_t state = mix(thread / kLanes + 1);
#pragma unroll 8
  for (int i = 0; i < rows_per_group; ++i) {
    state = next(state);
    Red::add(base + size_t{pick(state, num_rows)} * kRowBytes, lane);
  }
}

// Gives every sample its rank in its cell: one returning atomic per sample.
__global__ void __launch_bounds__(kThreadsPerBlock)
    rank_samples(int* __restrict__ counts, uint32_t num_cells, uint32_t num_samples,
                 int* __restrict__ ranks) {
  const uint32_t stride = gridDim.x * kThreadsPerBlock;
#pragma unroll 4
  for (uint32_t i = blockIdx.x * kThreadsPerBlock + threadIdx.x; i < num_samples; i += stride) {
    ranks[i] = atomicAdd(counts + pick(mix(i + 1), num_cells), 1);
  }
}

// ---- host side ----------------------------------------------------------------------------------

int full_grid(const Settings& settings) {
  return settings.device.multiProcessorCount * 8;  // 2048 threads each
}

bool all_verified = true;

// One line of output. rows: how many rows, samples or launches one call handles; bytes: per call.
void report(const std::string& name, size_t footprint, double rows, double bytes,
            const Times& times, int repetitions, bool verified) {
  all_verified = all_verified && verified;
  const double seconds = times.median_ms * 1e-3;
  std::printf(
      "{\"name\": \"%s\", \"footprint_bytes\": %zu, \"ms\": %.6f, \"least_ms\": %.6f, "
      "\"most_ms\": %.6f, \"repetitions\": %d, \"rows_per_second\": %.6e, "
      "\"bytes_per_second\": %.6e, \"verified\": %s}\n",
      name.c_str(), footprint, times.median_ms, times.least_ms, times.most_ms, repetitions,
      rows / seconds, bytes / seconds, verified ? "true" : "false");
  std::fflush(stdout);
}

void report_skipped(const std::string& name, const std::string& reason) {
  std::printf("{\"name\": \"%s\", \"skipped\": \"%s\"}\n", name.c_str(), reason.c_str());
  std::fflush(stdout);
}

void measure_dram(const Settings& settings) {
  size_t free = 0, total = 0;
  DEVICE_CHECK(cudaMemGetInfo(&free, &total));
  const size_t most = settings.quick ? 64 * kMegabyte : 1024 * kMegabyte;
  const size_t words = std::min(most, free / 4) / sizeof(uint4);
  const size_t bytes = words * sizeof(uint4);
  DeviceArray<uint4> from(words), to(words);
  DeviceArray<unsigned int> different(1);
  const int grid = full_grid(settings);
  fill_random<<<grid, kThreadsPerBlock>>>(reinterpret_cast<uint32_t*>(from.data()), words * 4);

  const auto is_copied = [&] {
    different.fill_bytes(0);
    count_different<<<grid, kThreadsPerBlock>>>(from.data(), to.data(), words, different.data());
    DEVICE_CHECK(cudaGetLastError());
    return different.download()[0] == 0;
  };
  const auto copy = [&] { copy_words<<<grid, kThreadsPerBlock>>>(from.data(), to.data(), words); };
  const auto copy_by_driver = [&] {
    DEVICE_CHECK(cudaMemcpyAsync(to.data(), from.data(), bytes, cudaMemcpyDeviceToDevice));
  };
  to.fill_bytes(0xff);
  copy();
  bool verified = is_copied();
  Times times = time_calls(settings, copy);
  report("dram.copy", 2 * bytes, double(words), 2.0 * bytes, times, settings.repetitions(),
         verified && is_copied());

  to.fill_bytes(0xff);
  copy_by_driver();
  verified = is_copied();
  times = time_calls(settings, copy_by_driver);
  report("dram.memcpy", 2 * bytes, double(words), 2.0 * bytes, times, settings.repetitions(),
         verified && is_copied());
}

// Streaming reads of a buffer: one pass over a large one (DRAM), many over a small one (L2).
void measure_reads(const Settings& settings, const char* name, size_t bytes, int passes) {
  const size_t words = bytes / sizeof(uint4);
  DeviceArray<uint4> data(words);
  const int grid = full_grid(settings);
  DeviceArray<uint32_t> sums(size_t(grid) * kThreadsPerBlock);
  fill_random<<<grid, kThreadsPerBlock>>>(reinterpret_cast<uint32_t*>(data.data()), words * 4);
  sums.fill_bytes(0xff);
  const auto read = [&] {
    sum_words<<<grid, kThreadsPerBlock>>>(data.data(), words, passes, sums.data());
  };
  const Times times = time_calls(settings, read);
  uint32_t expected = 0, actual = 0;
  for (size_t i = 0; i < words * 4; ++i) expected += mix(static_cast<uint32_t>(i) + 1);
  for (const uint32_t sum : sums.download()) actual += sum;
  report(name, words * sizeof(uint4), double(words) * passes, 16.0 * words * passes, times,
         settings.repetitions(), actual == expected * static_cast<uint32_t>(passes));
}

template <int kRowBytes>
void measure_loads(const Settings& settings, const char* where, size_t footprint,
                   int rows_per_group) {
  constexpr int kLanes = kRowBytes / 16;
  const uint32_t num_rows = static_cast<uint32_t>(footprint / kRowBytes);
  const uint32_t blocks = settings.scaled(1u << 17) * kLanes / kThreadsPerBlock;
  const uint32_t groups = blocks * kThreadsPerBlock / kLanes;

  std::vector<uint4> rows(size_t{num_rows} * kLanes);
  std::vector<uint32_t> row_sums(num_rows, 0);
  for (size_t i = 0; i < rows.size() * 4; ++i) {
    const uint32_t word = mix(static_cast<uint32_t>(i) + 1);
    std::memcpy(reinterpret_cast<char*>(rows.data()) + i * 4, &word, 4);
    row_sums[i * 4 / kRowBytes] += word;
  }
  DeviceArray<uint4> data(rows.size());
  data.upload(rows);
  DeviceArray<uint32_t> sums(size_t{blocks} * kThreadsPerBlock);
  sums.fill_bytes(0xff);
  const Times times = time_calls(settings, [&] {
    load_rows<kRowBytes>
        <<<blocks, kThreadsPerBlock>>>(data.data(), num_rows, rows_per_group, sums.data());
  });

  const std::vector<uint32_t> lane_sums = sums.download();
  bool verified = true;
  for (uint32_t group = 0; group < groups; ++group) {
    uint32_t expected = 0, actual = 0;
    for_each_row(group, rows_per_group, num_rows, [&](uint32_t row) { expected += row_sums[row]; });
    for (int lane = 0; lane < kLanes; ++lane) actual += lane_sums[group * kLanes + lane];
    verified = verified && actual == expected;
  }
  const double loaded = double(groups) * rows_per_group;
  report("load." + std::to_string(kRowBytes) + "B." + where, size_t{num_rows} * kRowBytes, loaded,
         loaded * kRowBytes, times, settings.repetitions(), verified);
}

double element_of(const std::vector<char>& rows, size_t element, int element_bytes) {
  uint32_t bits = 0;
  std::memcpy(&bits, rows.data() + element * element_bytes, element_bytes);
  if (element_bytes == 2) bits <<= 16;  // bfloat16 is the upper half of a float
  float number = 0;
  std::memcpy(&number, &bits, 4);
  return number;
}

template <typename Red, int kRowBytes = kLineBytes, int kLanes = kRowBytes / Red::kBytes>
void measure_reductions(const Settings& settings, const std::string& where, uint32_t num_rows) {
  const std::string name = std::string(Red::kName) + "." + where;
  if (Red::kIsVector && settings.device.major < kFirstWithVectorReductions) {
    report_skipped(name, "vector reductions need compute capability 9.0, got " +
                             std::to_string(settings.device.major) + "." +
                             std::to_string(settings.device.minor));
    return;
  }
  constexpr int kRowsPerGroup = 64;
  constexpr int kElements = kRowBytes / Red::kElementBytes;
  constexpr int kFilled = kLanes * Red::kBytes / Red::kElementBytes;  // of those, from the first on
  const uint32_t blocks = settings.scaled(1u << 16) * kLanes / kThreadsPerBlock;
  const uint32_t groups = blocks * kThreadsPerBlock / kLanes;
  DeviceArray<char> rows(size_t{num_rows} * kRowBytes);

  // bfloat16 counts exactly to 256 only: about 8 additions per row while checking.
  constexpr bool kCountsFar = Red::kElementBytes == 4;
  const int checked_rows = kCountsFar ? kRowsPerGroup : 8;
  const uint32_t checked_blocks =
      kCountsFar ? blocks : std::min(blocks, num_rows * kLanes / kThreadsPerBlock);
  rows.fill_bytes(0);
  reduce_rows<Red, kRowBytes, kLanes>
      <<<checked_blocks, kThreadsPerBlock>>>(rows.data(), num_rows, checked_rows);
  DEVICE_CHECK(cudaGetLastError());
  const std::vector<char> sums = rows.download();
  std::vector<int> visits(num_rows, 0);
  for (uint32_t group = 0; group < checked_blocks * kThreadsPerBlock / kLanes; ++group) {
    for_each_row(group, checked_rows, num_rows, [&](uint32_t row) { ++visits[row]; });
  }
  bool verified = true;
  for (size_t i = 0; i < size_t{num_rows} * kElements; ++i) {
    const double added = int(i % kElements) < kFilled ? increment(static_cast<int>(i % 4)) : 0;
    const double expected = double(visits[i / kElements]) * added;
    verified = verified && element_of(sums, i, Red::kElementBytes) == expected;
  }

  const Times times = time_calls(settings, [&] {
    reduce_rows<Red, kRowBytes, kLanes>
        <<<blocks, kThreadsPerBlock>>>(rows.data(), num_rows, kRowsPerGroup);
  });
  const double added = double(groups) * kRowsPerGroup;
  const double bytes = added * kLanes * Red::kBytes;
  report(name, rows.size(), added, bytes, times, settings.repetitions(), verified);
}

// Whether a reduction costs by the sector or by the byte: a warp adds to random sectors, kLanes of
// its lanes to each. If by the sector, as many sectors are done in a second however full; rows are
// sectors here.
template <typename Red, int kLanes>
void measure_fill_of_sectors(const Settings& settings, uint32_t num_lines) {
  constexpr int kWords = kLanes * Red::kBytes / 4, kOf = kSectorBytes / 4;
  const std::string where = std::to_string(kWords) + "of" + std::to_string(kOf) + ".random";
  measure_reductions<Red, kSectorBytes, kLanes>(settings, where,
                                                num_lines * (kLineBytes / kSectorBytes));
}

void measure_ranks(const Settings& settings, const char* where, uint32_t num_cells) {
  const uint32_t num_samples = settings.scaled(5689088);  // of the encoder, batch 2
  DeviceArray<int> counts(num_cells), ranks(num_samples);
  ranks.fill_bytes(0xff);
  const Times times = time_calls(
      settings,
      [&] {
        rank_samples<<<full_grid(settings), kThreadsPerBlock>>>(counts.data(), num_cells,
                                                                num_samples, ranks.data());
      },
      [&] { DEVICE_CHECK(cudaMemsetAsync(counts.data(), 0, num_cells * sizeof(int))); });

  // Within each cell the ranks must be a permutation of 0, 1, ..., count - 1.
  std::vector<int> expected(num_cells, 0);
  for (uint32_t i = 0; i < num_samples; ++i) ++expected[pick(mix(i + 1), num_cells)];
  bool verified = counts.download() == expected;
  std::vector<size_t> first(num_cells, 0);
  for (uint32_t cell = 1; cell < num_cells; ++cell) {
    first[cell] = first[cell - 1] + expected[cell - 1];
  }
  std::vector<bool> taken(num_samples, false);
  const std::vector<int> given = ranks.download();
  for (uint32_t i = 0; i < num_samples && verified; ++i) {
    const uint32_t cell = pick(mix(i + 1), num_cells);
    verified = given[i] >= 0 && given[i] < expected[cell] && !taken[first[cell] + given[i]];
    if (verified) taken[first[cell] + given[i]] = true;
  }
  report(std::string("atom.s32.") + where, num_cells * sizeof(int), num_samples, 4.0 * num_samples,
         times, settings.repetitions(), verified);
}

void measure_fill(const Settings& settings, size_t bytes) {
  DeviceArray<char> buffer(bytes);
  const Times times = time_calls(
      settings, [&] { DEVICE_CHECK(cudaMemsetAsync(buffer.data(), 0x5a, bytes)); },
      [&] { DEVICE_CHECK(cudaMemsetAsync(buffer.data(), 0, bytes)); });
  bool verified = true;
  for (const char byte : buffer.download()) verified = verified && byte == 0x5a;
  report("fill.45MB", bytes, 1, double(bytes), times, settings.repetitions(), verified);
}

void measure_launches(const Settings& settings) {
  constexpr int kLaunches = 500;
  const Times times = time_calls(settings, [] {
    for (int i = 0; i < kLaunches; ++i) do_nothing<<<1, 32>>>();
  });
  report("launch.empty", 0, kLaunches, 0, times, settings.repetitions(), true);
}

int run(bool quick) {
  const Settings settings = device::begin("micro", quick);

  // The ceilings.
  measure_dram(settings);
  measure_reads(settings, "dram.read", (quick ? 64 : 512) * kMegabyte, 1);
  measure_reads(settings, "l2.read",
                std::min<size_t>(16 * kMegabyte, settings.device.l2CacheSize / 2), quick ? 4 : 64);

  // Reductions into 45 MB (grad_value of the encoder, batch 2, float32) and into the rows of its
  // smallest level, 13 x 21 pixels of 8 heads and 2 images.
  constexpr uint32_t kRandomRows = 45 * kMegabyte / kLineBytes, kHotRows = 273 * 8 * 2;
  measure_reductions<RedF32V4>(settings, "random", kRandomRows);
  measure_reductions<RedF32V4>(settings, "hot", kHotRows);
  measure_reductions<RedF32>(settings, "random", kRandomRows);
  measure_reductions<RedF32>(settings, "hot", kHotRows);
  measure_reductions<RedF32V2>(settings, "random", kRandomRows);
  measure_reductions<RedF32V2>(settings, "hot", kHotRows);
  measure_reductions<RedBF16V4>(settings, "random", kRandomRows);
  measure_reductions<RedBF16V4>(settings, "hot", kHotRows);
  measure_fill_of_sectors<RedF32, 1>(settings, kRandomRows);
  measure_fill_of_sectors<RedF32, 2>(settings, kRandomRows);
  measure_fill_of_sectors<RedF32, 4>(settings, kRandomRows);
  measure_fill_of_sectors<RedF32, 8>(settings, kRandomRows);
  measure_fill_of_sectors<RedF32V4, 1>(settings, kRandomRows);
  measure_fill_of_sectors<RedF32V4, 2>(settings, kRandomRows);

  // Gathers: in L2 at three footprints, and in L1.
  for (const int megabytes : {11, 23, 45}) {
    const std::string where = "L2." + std::to_string(megabytes) + "MB";
    measure_loads<64>(settings, where.c_str(), megabytes * kMegabyte, 64);
    measure_loads<128>(settings, where.c_str(), megabytes * kMegabyte, 64);
  }
  measure_loads<64>(settings, "L1.32kB", 32 * 1024, 512);
  measure_loads<128>(settings, "L1.32kB", 32 * 1024, 512);

  // Ranks of samples in the encoder's 0.36 million cells, and in those of its smallest level.
  measure_ranks(settings, "random", 22223 * 8 * 2);
  measure_ranks(settings, "hot", kHotRows);

  measure_fill(settings, 22223ull * 256 * 2 * 4);
  measure_launches(settings);
  return all_verified ? 0 : 1;
}

}  // namespace

int main(int count, char** arguments) {
  const bool quick = count > 1 && std::strcmp(arguments[1], "--quick") == 0;
  if (count > 2 || (count == 2 && !quick)) {
    std::fprintf(stderr, "usage: micro [--quick]\n");
    return 2;
  }
  return run(quick);
}
