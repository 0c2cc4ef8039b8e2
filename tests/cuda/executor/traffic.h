// What the warps of a launch ask of memory: sectors of 32 bytes, lines of 128, and turns at the
// banks of shared memory.
//
// NOTE [memory traffic]
// Each thread tells of its accesses before it makes them (executor::count). Between two barriers of
// a warp, the n-th accesses of its lanes at one place in the code are one access of the warp, as
// they are on a GPU whose lanes leave a branch or a loop together: lanes that take another branch
// are at another place, and lanes that leave a loop early have no n-th access. A lane that stands
// by, because a condition keeps it from an access that others make, tells that too, or its next
// access at this place would count with theirs. A warp's access takes as many sectors as its lanes
// touch, each once, however often; the least it could take are those that its bytes would fill, lay
// they next to each other. Shared memory has 32 banks, four bytes wide, and serves in one turn the
// lanes of half a warp where each asks for 8 bytes, of a quarter for 16; each turn takes as many
// wavefronts as the busiest bank has different words to give.
//
// With a cache, loads are also looked up in an L1 of that size for each multiprocessor: lines of
// 128 bytes with a valid bit for each sector, sets of so many ways, the least recently used of
// which makes room, and an index that is the address of the line or a hash of it. The blocks of a
// multiprocessor are those that would come to it in turn; all are resident, and their warps'
// accesses take turns, block by block. Stores and additions pass it by.
//
// What it does not model: time. Whether a sector is found in L2, on whose side of L2 it lies, how
// many requests are in flight and which of them wait for each other; that neighbouring warps ask at
// the same time, or that atomic additions to one place queue. How the compiler cuts or joins
// accesses: they count as the source has them, a struct in pieces of 16 bytes. Accesses of
// parameters, of registers that are spilled, and of instructions themselves. Lanes that the
// hardware lets go different ways although they could go together. Of the cache: hints, what it
// shares with shared memory, and the order in which warps really run.

#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace executor {

struct MemoryAccess {
  const void* place;  // in the code
  int kind;           // as the kernels number them
  uintptr_t address;  // 0: the lane stands by
  uint32_t bytes;
};

struct TrafficKey {
  std::string array;
  int kind;
  uint32_t bytes;  // of a lane

  bool operator<(const TrafficKey& other) const {
    return std::tie(array, kind, bytes) < std::tie(other.array, other.kind, other.bytes);
  }
};

struct Traffic {
  int64_t requests = 0;  // accesses of a warp
  int64_t lanes = 0;     // that took part in them
  int64_t sectors = 0;   // of shared memory: wavefronts
  int64_t least_sectors = 0;
  int64_t lines = 0;  // of shared memory: none
  int64_t hits = 0;   // sectors that loads found in L1, with a cache
};

struct Cache {
  int64_t bytes = 0;  // of one multiprocessor; 0: there is none
  int ways = 4;
  bool is_hashed = true;
};

// The lines that one load of a warp touches, each with a bit for each of its sectors.
struct Lookup {
  Traffic* traffic;
  std::vector<std::pair<uintptr_t, unsigned>> lines;
};
using Lookups = std::vector<Lookup>;  // of a block, in its order

extern const char* const kSharedMemory;  // the name of its array

using TrafficTable = std::map<TrafficKey, Traffic>;

// Adds what the lanes of a warp did since its last barrier, each in its own order, and forgets it.
// name_of tells which array an address belongs to.
// Loads from outside of shared memory are appended to lookups.
void count_warp(const std::vector<std::vector<MemoryAccess>*>& lanes,
                const std::function<const std::string&(uintptr_t)>& name_of, TrafficTable& table,
                Lookups& lookups);

// Counts the hits of the blocks of one multiprocessor.
void look_up(const Cache& cache, const std::vector<const Lookups*>& blocks);

}  // namespace executor
