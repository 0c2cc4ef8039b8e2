#include "traffic.h"

#include <algorithm>
#include <array>
#include <tuple>
#include <utility>

namespace executor {

const char* const kSharedMemory = "shared memory";

namespace {

constexpr uintptr_t kSectorBytes = 32;
constexpr uintptr_t kLineBytes = 128;
constexpr uintptr_t kBankBytes = 4;
constexpr uintptr_t kBanks = 32;
constexpr size_t kWarpSize = 32;
constexpr int kLoad = 0;  // as the kernels number accesses

// What each lane does in one access of its warp; null where it takes no part.
using WarpAccess = std::array<const MemoryAccess*, kWarpSize>;

// The accesses of a warp at one place in the code.
struct Place {
  std::vector<WarpAccess> accesses;
  std::array<size_t, kWarpSize> times{};  // that each lane was there
};

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

void count_global(const WarpAccess& access, Traffic& traffic, Lookup& lookup) {
  // The sectors that the lanes touch, each with a bit for each of its bytes.
  std::array<std::pair<uintptr_t, uint32_t>, 2 * kWarpSize> touched;
  size_t count = 0;
  for (const MemoryAccess* part : access) {
    if (part == nullptr) continue;
    const uintptr_t end = part->address + part->bytes;
    for (uintptr_t from = part->address; from < end;) {
      const uintptr_t sector = from / kSectorBytes, first = sector * kSectorBytes;
      const uintptr_t to = std::min(end, first + kSectorBytes);
      const uint32_t mask = uint32_t(((uint64_t(1) << (to - from)) - 1) << (from - first));
      touched.at(count++) = {sector, mask};
      from = to;
    }
  }
  const auto last = touched.begin() + count;
  if (!std::is_sorted(touched.begin(), last)) std::sort(touched.begin(), last);
  int64_t bytes = 0;
  uintptr_t line = 0;
  for (auto i = touched.begin(); i != last;) {
    const uintptr_t sector = i->first;
    uint32_t mask = 0;
    for (; i != last && i->first == sector; ++i) mask |= i->second;
    bytes += __builtin_popcount(mask);
    traffic.sectors += 1;
    constexpr uintptr_t kSectorsPerLine = kLineBytes / kSectorBytes;
    if (sector / kSectorsPerLine != line) {
      line = sector / kSectorsPerLine;
      traffic.lines += 1;
      lookup.lines.emplace_back(line, 0);
    }
    lookup.lines.back().second |= 1u << sector % kSectorsPerLine;
  }
  traffic.least_sectors += divide_up(bytes, kSectorBytes);
}

void count_shared(const WarpAccess& access, uint32_t bytes, Traffic& traffic) {
  const size_t lanes_per_turn = kWarpSize * kBankBytes / std::max<uintptr_t>(bytes, kBankBytes);
  for (size_t first = 0; first < kWarpSize; first += lanes_per_turn) {
    std::array<uintptr_t, kWarpSize> words;  // four bytes each, of at most 32 * 4 bytes
    size_t count = 0;
    for (size_t lane = first; lane < first + lanes_per_turn; ++lane) {
      if (access[lane] == nullptr) continue;
      const uintptr_t end = access[lane]->address + bytes;
      for (uintptr_t w = access[lane]->address / kBankBytes; w * kBankBytes < end; ++w) {
        words.at(count++) = w;
      }
    }
    std::sort(words.begin(), words.begin() + count);
    const auto last = std::unique(words.begin(), words.begin() + count);
    std::array<int, kBanks> of_bank{};
    for (auto w = words.begin(); w != last; ++w) ++of_bank[*w % kBanks];
    traffic.sectors += *std::max_element(of_bank.begin(), of_bank.end());
    traffic.least_sectors += divide_up(last - words.begin(), kBanks);
  }
}

// Where something that is asked for many times in turn stands in a short list.
Place& find(std::vector<std::pair<const void*, Place>>& places, const void* wanted, size_t& last) {
  const size_t next = last + 1 < places.size() ? last + 1 : 0;
  for (const size_t i : {last, next}) {
    if (i < places.size() && places[i].first == wanted) return places[last = i].second;
  }
  for (last = 0; last < places.size(); ++last) {
    if (places[last].first == wanted) return places[last].second;
  }
  return places.emplace_back(wanted, Place()).second;
}

}  // namespace

void count_warp(const std::vector<std::vector<MemoryAccess>*>& lanes,
                const std::function<const std::string&(uintptr_t)>& name_of, TrafficTable& table,
                Lookups& lookups) {
  std::vector<std::pair<const void*, Place>> places;
  for (size_t lane = 0; lane < lanes.size(); ++lane) {
    size_t last = 0;
    for (const MemoryAccess& access : *lanes[lane]) {
      Place& place = find(places, access.place, last);
      const size_t n = place.times[lane]++;
      if (n == place.accesses.size()) place.accesses.push_back({});
      if (access.address != 0) place.accesses[n][lane] = &access;
    }
  }
  for (const auto& [address, place] : places) {
    for (const WarpAccess& access : place.accesses) {
      const auto lanes_in = kWarpSize - std::count(access.begin(), access.end(), nullptr);
      if (lanes_in == 0) continue;
      const MemoryAccess& first =
          **std::find_if(access.begin(), access.end(), [](auto* part) { return part != nullptr; });
      const std::string& array = name_of(first.address);
      Traffic& traffic = table[{array, first.kind, first.bytes}];
      traffic.requests += 1;
      traffic.lanes += lanes_in;
      if (array == kSharedMemory) {
        count_shared(access, first.bytes, traffic);
      } else {
        Lookup lookup{&traffic, {}};
        count_global(access, traffic, lookup);
        if (first.kind == kLoad) lookups.push_back(std::move(lookup));
      }
    }
  }
  for (auto* lane : lanes) lane->clear();
}

void look_up(const Cache& cache, const std::vector<const Lookups*>& blocks) {
  struct Way {
    uintptr_t line;
    unsigned sectors;
    int64_t used;
  };
  const uintptr_t num_sets = cache.bytes / int64_t(kLineBytes) / cache.ways;
  std::vector<std::vector<Way>> sets(num_sets);
  int64_t now = 0;
  size_t longest = 0;
  for (const Lookups* block : blocks) longest = std::max(longest, block->size());
  for (size_t i = 0; i < longest; ++i) {
    for (const Lookups* block : blocks) {
      if (i >= block->size()) continue;
      for (const auto& [line, sectors] : (*block)[i].lines) {
        uintptr_t index = line;
        if (cache.is_hashed) {
          for (uintptr_t rest = line / num_sets; rest != 0; rest /= num_sets) index ^= rest;
        }
        std::vector<Way>& set = sets[index % num_sets];
        auto way = std::find_if(set.begin(), set.end(),
                                [wanted = line](const Way& w) { return w.line == wanted; });
        if (way == set.end()) {
          if (int(set.size()) < cache.ways) {
            way = set.insert(set.end(), Way{});
          } else {
            way = std::min_element(set.begin(), set.end(),
                                   [](const Way& a, const Way& b) { return a.used < b.used; });
          }
          *way = {line, 0, 0};
        }
        (*block)[i].traffic->hits += __builtin_popcount(way->sectors & sectors);
        way->sectors |= sectors;
        way->used = now++;
      }
    }
  }
}

}  // namespace executor
