// From a problem to a launch: run-time values become template arguments, here and nowhere else.

#pragma once

#include <stdexcept>
#include <string>

#include "kernels.h"
#include "order.cuh"

namespace msda {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next call reports it again
  throw std::runtime_error(std::string("msda could not ") + what + ": " +
                           cudaGetErrorString(error));
}

template <class... Params>
void launch(void (*kernel)(Params...), unsigned blocks, unsigned threads, void* stream,
            Params... params) {
  void* arguments[] = {&params...};
  check_cuda(cudaLaunchKernel(kernel, dim3(blocks), dim3(threads), arguments, 0,
                              static_cast<cudaStream_t>(stream)),
             "launch a CUDA kernel");
}

// ---- limits -------------------------------------------------------------------------------------

inline void check_fits(bool fits, const char* name, const char* rule, int64_t value) {
  if (fits) return;
  throw std::runtime_error(std::string(name) + " must " + rule + " on CUDA, got " +
                           std::to_string(value));
}

inline void check_fits(const Problem& problem) {
  constexpr int64_t k31 = int64_t(1) << 31;
  check_fits(problem.num_keys < k31, "value", "hold fewer than 2^31 keys", problem.num_keys);
  const int64_t key_bytes = problem.num_heads * problem.head_dim * int64_t(sizeof(double));
  check_fits(key_bytes < k31, "value", "hold fewer than 2^28 channels",
             problem.num_heads * problem.head_dim);
  const int64_t heads = problem.batch * problem.num_queries * problem.num_heads;
  check_fits(heads < k31, "the points", "be of fewer than 2^31 queries times heads", heads);
  const int64_t references = problem.batch * problem.num_queries * problem.reference_levels;
  check_fits(references < k31, "reference_points", "be fewer than 2^31", references);
  check_fits(problem.num_samples < k31 / 2, "the points", "be fewer than 2^30 for a query and head",
             problem.num_samples);
  for (int64_t l = 0; l < problem.num_levels; ++l) {
    const Level& level = problem.levels[l];
    check_fits(level.width <= kMaxWidth, "spatial_shapes", "be less than 2^28 wide", level.width);
  }
}

// ---- the parameters that forward and backward share ---------------------------------------------

// Some entries of the table of levels in memory, to be filled by level_table.cu: where the GPU
// alone knows the sizes, or where there are too many for a kernel's parameters.
struct LevelTableParams {
  DeviceLevel levels[kMaxLevels];  // some of the table's; without sizes and starts if has_shapes
  const void* shapes;              // (L, 2), int64 or int32; if has_shapes
  DeviceLevel* table;              // (L)
  int64_t num_keys;
  int32_t first, last;  // those levels
  int32_t num_levels;
  bool has_shapes;
  bool shapes_are_int64;
};

// In level_table.cu.
void fill_level_table(const LevelTableParams& params, void* stream);

// For deterministic_cells.cu, which finds where the samples of each cell begin, for the
// deterministic gradient of value.
struct CellStartsParams {
  const int32_t* sorted_cells;  // (N), N = B * Q * M * K
  int32_t* starts;              // (C + 1), C = B * M * cells_per_head
  int32_t num_sorted;           // N
  int32_t num_cells;            // C
};

// In deterministic_cells.cu.
void find_cell_starts(const CellStartsParams& params, void* stream);

inline bool needs_level_table(int64_t num_levels, bool shapes_on_device) {
  return shapes_on_device || num_levels > kMaxLevels;
}

// Fills in the levels; enqueues the kernel that computes their table, where one is needed.
inline Sampling make_sampling(const Problem& problem, const CudaCall& call) {
  Sampling sampling = {};
  sampling.num_levels = int32_t(problem.num_levels);
  sampling.points = problem.points;
  sampling.weights = problem.weights;
  sampling.reference_points = problem.reference_points;
  sampling.has_padding_mask = problem.has_padding_mask;
  sampling.padding_mask = problem.padding_mask;
  sampling.num_queries = int32_t(problem.num_queries);
  sampling.num_heads = int32_t(problem.num_heads);
  sampling.num_keys = int32_t(problem.num_keys);
  sampling.num_samples = int32_t(problem.num_samples);
  sampling.reference_levels = int32_t(problem.reference_levels);
  sampling.reference_size = int32_t(problem.reference_size);
  sampling.nearest = problem.nearest;

  const bool in_memory = needs_level_table(problem.num_levels, call.shapes_on_device);
  if (in_memory) sampling.levels_in_memory = static_cast<const DeviceLevel*>(call.level_table);
  LevelTableParams table = {};
  table.has_shapes = call.shapes_on_device;
  table.shapes = call.spatial_shapes;
  table.shapes_are_int64 = call.shapes_are_int64;
  table.table = static_cast<DeviceLevel*>(call.level_table);
  table.num_keys = problem.num_keys;
  table.num_levels = sampling.num_levels;
  int32_t samples_end = 0;
  for (int32_t first = 0; first < sampling.num_levels; first += kMaxLevels) {
    table.first = first;
    table.last =
        first + kMaxLevels < sampling.num_levels ? first + kMaxLevels : sampling.num_levels;
    for (int32_t l = first; l < table.last; ++l) {
      const Level& level = problem.levels[l];
      samples_end += int32_t(level.num_points);
      table.levels[l - first] = {int32_t(level.height), int32_t(level.width), int32_t(level.start),
                                 samples_end, 0.5 / double(level.num_points)};
      if (!in_memory) sampling.levels[l] = table.levels[l - first];
    }
    if (in_memory) fill_level_table(table, call.stream);
  }
  return sampling;
}

inline int32_t floor_log2(int64_t n) {
  int32_t log2 = 0;
  while (n >>= 1) ++log2;
  return log2;
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int multiprocessor_count() {
  int device = 0, count = 0;
  check_cuda(cudaGetDevice(&device), "find the current CUDA device");
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
             "count the multiprocessors of the CUDA device");
  return count;
}

// NOTE [split]
// While a round of a warp waits for memory, first for its points and then for their pixels, the
// rounds of other warps must keep the multiprocessor's way to memory busy. A round has 32 samples
// of four corners, so it takes corner_bytes turns of 128 bytes there, and as counted some 50 more
// for shared memory (docs/cuda.md). With so many warps that those of all others last as long as the
// two waits, a multiprocessor has enough. A smaller problem gets more warps by a split: each
// sub-warp then has fewer rounds to wait for, one after the other. By the count that costs a
// hundredth or two of all accesses (each part reads grad_output, and in the fused form all logits)
// as long as each part has a round of its own, and up to as many again where one has not.

// Warps that a multiprocessor needs. The waits are an assumption: two of 500 turns.
inline int64_t warps_to_fill(int64_t corner_bytes) {
  constexpr int64_t kTurnsOfWaits = 1000, kTurnsOfSharedMemory = 50;
  return 1 + divide_up(kTurnsOfWaits, corner_bytes + kTurnsOfSharedMemory);
}

// lanes: of a sub-warp. blocks_per_multiprocessor: how many run at once. corner_bytes: how many a
// kernel moves for one corner of a sample.
inline Order make_order(const Problem& problem, const CudaCall& call, int lanes,
                        int blocks_per_multiprocessor, int64_t corner_bytes) {
  constexpr int kCacheLine = 128;
  const int64_t multiprocessors = multiprocessor_count();
  const int64_t heads = problem.batch * problem.num_queries * problem.num_heads;

  Order order = {};
  const int64_t rounds = divide_up(problem.num_samples, lanes);
  order.split = 1;
  const int64_t enough = multiprocessors * warps_to_fill(corner_bytes);
  while (call.split == 0 && order.split * lanes < kWarpSize && 2 * order.split <= rounds &&
         heads * lanes * order.split < enough * kWarpSize) {
    order.split *= 2;
  }
  if (call.split != 0) order.split = call.split;

  const int32_t heads_per_pass = kThreadsPerBlock / lanes / order.split;
  const int64_t head_bytes = problem.head_dim * element_size(problem.value.dtype);
  const auto fits = [&](int32_t tile_heads) {
    const bool is_wanted = call.tile_heads != 0 ? tile_heads <= call.tile_heads
                                                : tile_heads * head_bytes <= kCacheLine;
    return is_wanted && problem.num_heads % tile_heads == 0 && tile_heads <= heads_per_pass;
  };
  while (fits(2 << order.log2_tile_heads)) {
    ++order.log2_tile_heads;
  }
  order.num_head_groups = uint32_t(problem.num_heads >> order.log2_tile_heads);

  // Large problems in tiles of 64 queries; small ones in as many tiles as a block takes in one
  // pass.
  constexpr int32_t kLog2LargeTile = 6;
  const int64_t resident = multiprocessors * blocks_per_multiprocessor;
  const bool is_large = heads >> (kLog2LargeTile + order.log2_tile_heads) >= resident;
  const bool is_pyramid = is_large && problem.num_queries == problem.num_keys &&
                          !call.shapes_on_device && problem.num_levels <= kMaxLevels;
  order.log2_tile_height = is_pyramid ? kLog2LargeTile / 2 : 0;
  order.log2_tile_width =
      (is_large ? kLog2LargeTile : floor_log2(heads_per_pass) - order.log2_tile_heads) -
      order.log2_tile_height;
  const auto add_map = [&](int64_t height, int64_t width, int64_t first_query) {
    const int64_t across = divide_up(width, 1 << order.log2_tile_width);
    const int64_t down = divide_up(height, 1 << order.log2_tile_height);
    order.maps[order.num_maps++] = {int32_t(height), int32_t(width), int32_t(first_query),
                                    int32_t(order.num_tiles), int32_t(across)};
    order.num_tiles += uint32_t(across * down);
  };
  if (is_pyramid) {
    for (int64_t l = 0; l < problem.num_levels; ++l) {
      const Level& level = problem.levels[l];
      add_map(level.height, level.width, level.start);
    }
  } else {
    add_map(1, problem.num_queries, 0);
  }

  const int64_t items = problem.batch * order.num_head_groups * int64_t(order.num_tiles);
  check_fits(items < int64_t(1) << 31, "the problem", "be of fewer than 2^31 tiles", items);
  order.num_items = uint32_t(items);
  order.num_ranges = uint32_t(items > resident ? multiprocessors : items);
  order.items_per_range = uint32_t(divide_up(items, order.num_ranges));
  return order;
}

inline unsigned block_count(const Order& order, int blocks_per_multiprocessor) {
  const bool one_each = order.num_ranges == order.num_items;
  return order.num_ranges * (one_each ? 1 : blocks_per_multiprocessor);
}

// ---- which kernel -------------------------------------------------------------------------------

template <int kVec_, int kLanes_, bool kExact_, bool kCommon_>
struct Layout {
  static constexpr int kVec = kVec_, kLanes = kLanes_;
  static constexpr bool kExact = kExact_, kCommon = kCommon_;
};

inline bool is_aligned(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % kMaxVectorBytes == 0;
}

// Calls f with the Layout whose kernel serves the problem. aligned: all arrays with channels are
// aligned to 16 bytes.
//
// Fast kernels for the common sizes: 16, 32 or 64 channels to a head, each lane with 16 bytes of
// them, and faster ones where the heads have 256 channels together and points are of the type of
// coordinates. All else runs in steps of 8 lanes, with 16 bytes to a lane or one number.
template <class T, class F>
void dispatch_layout(const Problem& problem, bool aligned, const F& f) {
  constexpr int kVec = kMaxVectorBytes / sizeof(T);
  if constexpr (!std::is_same_v<T, double>) {
    const auto is_float32 = [](const ConstArray& array) { return array.dtype == DType::kFloat32; };
    const bool is_common = problem.num_heads * problem.head_dim == kCommonChannels &&
                           !problem.nearest && is_float32(problem.points) &&
                           is_float32(problem.weights) &&
                           (!problem.is_fused || is_float32(problem.reference_points));
    const auto exact = [&](auto head_dim) {
      constexpr int kLanes = decltype(head_dim)::value / kVec;
      if (is_common) return f(Layout<kVec, kLanes, true, true>());
      return f(Layout<kVec, kLanes, true, false>());
    };
    if (aligned && problem.head_dim == 16) return exact(std::integral_constant<int, 16>());
    if (aligned && problem.head_dim == 32) return exact(std::integral_constant<int, 32>());
    if (aligned && problem.head_dim == 64) return exact(std::integral_constant<int, 64>());
  }
  if (aligned && problem.head_dim % kVec == 0) return f(Layout<kVec, 8, false, false>());
  return f(Layout<1, 8, false, false>());
}

}  // namespace msda
