// Which block works on which queries and heads, and when. This decides how often a pixel is found
// in L1, not the result.
//
// Work is cut into tiles: some queries that lie together in the image (8 x 8 pixels of an encoder,
// else a run of queries) times some heads (as many as fill a cache line of 128 bytes of value).
// Tiles are numbered image by image, group of heads by group, and along the rows of each level, and
// each multiprocessor works through a contiguous range of them.

#pragma once

#include "samples.cuh"

namespace msda {

// Queries as pixels of a map: those of one level, or all queries as one row.
struct QueryMap {
  int32_t height;
  int32_t width;
  int32_t first_query;
  int32_t first_tile;
  int32_t tiles_across;
};

struct Order {
  QueryMap maps[kMaxLevels];
  int32_t num_maps;
  int32_t log2_tile_width, log2_tile_height, log2_tile_heads;
  uint32_t num_tiles;  // of one image and group of heads
  uint32_t num_head_groups;
  uint32_t num_items;   // tiles of all images and groups
  uint32_t num_ranges;  // contiguous ranges of items: one for each multiprocessor
  uint32_t items_per_range;
  int32_t split;  // sub-warps that share the samples of a query and head
};

// The place of this thread in a warp. Sub-warps of kLanes lanes each serve a query and head, or,
// with a split, some of its samples.
template <int kLanes>
struct Lane {
  static constexpr int kSubWarps = kWarpSize / kLanes;

  MSDA_DEVICE explicit Lane(int split)
      : warp(int(threadIdx.x) / kWarpSize),
        sub_warp(int(threadIdx.x) % kWarpSize / kLanes),
        lane(int(threadIdx.x) % kLanes),
        part(sub_warp & (split - 1)) {}

  // The slot of sample i of a round of this sub-warp, or of another.
  MSDA_DEVICE int slot(int i) const { return slot(sub_warp, i); }
  static MSDA_DEVICE int slot(int sub_warp, int i) {
    return slot_of_lane(sub_warp * kLanes) + slot_of_lane(i);
  }

  int warp;      // of the block
  int sub_warp;  // of the warp
  int lane;      // of the sub-warp
  int part;      // of the split
};

// Calls f(head) for each query and head of this thread's sub-warp. All threads of a warp call f
// together, or none does where none of their heads is live. A head that is not live lies beyond the
// map.
template <int kLanes, class F>
MSDA_DEVICE void for_each_head(const Order& order, const Sampling& sampling, const F& f) {
  const uint32_t heads_per_pass = kWarpsPerBlock * Lane<kLanes>::kSubWarps / order.split;
  const uint32_t heads_per_tile =
      1u << (order.log2_tile_width + order.log2_tile_height + order.log2_tile_heads);
  const uint32_t own = threadIdx.x / kLanes / order.split;

  const uint32_t range = blockIdx.x % order.num_ranges;
  const uint32_t first = range * order.items_per_range;
  const uint32_t end = first + order.items_per_range;
  const uint32_t last = end < order.num_items ? end : order.num_items;
  const uint32_t step = gridDim.x / order.num_ranges;
#pragma unroll 1
  for (uint32_t item = first + blockIdx.x / order.num_ranges; item < last; item += step) {
    const uint32_t tile = item % order.num_tiles;
    const uint32_t group = item / order.num_tiles % order.num_head_groups;
    const uint32_t b = item / order.num_tiles / order.num_head_groups;
    int i = 0;
#pragma unroll 1
    while (i + 1 < order.num_maps && int(tile) >= order.maps[i + 1].first_tile) ++i;
    const QueryMap& map = order.maps[i];
    const int tile_in_map = int(tile) - map.first_tile;
    const int tile_y = tile_in_map / map.tiles_across;
    const int tile_x = tile_in_map - tile_y * map.tiles_across;

#pragma unroll 1
    for (uint32_t head = own; head < heads_per_tile; head += heads_per_pass) {
      const int m =
          int((group << order.log2_tile_heads) + (head & ((1u << order.log2_tile_heads) - 1)));
      const uint32_t pixel = head >> order.log2_tile_heads;
      const int x =
          (tile_x << order.log2_tile_width) + int(pixel & ((1u << order.log2_tile_width) - 1));
      const int y = (tile_y << order.log2_tile_height) + int(pixel >> order.log2_tile_width);
      const bool is_live = x < map.width && y < map.height;
      if (!__any_sync(kAllLanes, is_live)) continue;
      f(Head{sampling, int(b), map.first_query + y * map.width + x, m, is_live});
    }
  }
}

}  // namespace msda
