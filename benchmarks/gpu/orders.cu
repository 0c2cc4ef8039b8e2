// Times our own kernels with their work in other orders: heads that a block works on at once, which
// decide what it finds in L1, and sub-warps that share the samples of a query and head. Needs a
// CUDA device and nothing else:
//
//   nvcc -std=c++17 -O3 -arch=native -o orders benchmarks/gpu/orders.cu && ./orders [--quick|...]
//
// Prints one JSON object per line as it goes: the device, then one measurement per line. The first
// of a case is as the library chooses; the results of the others are compared with its (verified).
// With --once each is run once and not timed, in the same order: for a profiler. Exit status 0: all
// verified.

#define MSDA_VALUE_TYPE float
#include <cmath>
#include <cstring>

#include "../../csrc/cuda/backward.cu"
#include "../../csrc/cuda/forward.cu"
#include "../../csrc/cuda/level_table.cu"
#include "device.cuh"

namespace {

using device::DeviceArray;
using device::Settings;
using device::Times;

// ---- problems -----------------------------------------------------------------------------------

constexpr int kHeads = 8, kHeadDim = 32, kPoints = 4;

struct Case {
  const char* name;
  int batch;
  int num_queries;  // 0: one for each pixel, which looks around itself; else uniform locations
  std::vector<msda::Level> levels;
  std::vector<int> tile_heads;
  std::vector<int> splits;
};

// Deformable DETR R50 at 800 x 1333, or at a fraction of it.
std::vector<msda::Level> pyramid(int divisor) {
  std::vector<msda::Level> levels;
  int64_t start = 0;
  for (const auto& [height, width] : {std::pair{100, 167}, {50, 84}, {25, 42}, {13, 21}}) {
    const int64_t h = std::max(1, height / divisor), w = std::max(1, width / divisor);
    levels.push_back({h, w, start, kPoints});
    start += h * w;
  }
  return levels;
}

// The finalizer of MurmurHash3 as a number in [0, 1).
float random(uint32_t x) {
  x ^= x >> 16;
  x *= 0x85ebca6bu;
  x ^= x >> 13;
  x *= 0xc2b2ae35u;
  return float((x ^ (x >> 16)) >> 8) / float(1 << 24);
}

float normal(uint32_t x) {
  return std::sqrt(-2 * std::log(1 - random(2 * x))) * std::cos(6.2831853f * random(2 * x + 1));
}

std::vector<float> make_locations(const Case& problem, int64_t queries) {
  const int64_t levels = problem.levels.size();
  std::vector<float> locations;
  locations.reserve(problem.batch * queries * kHeads * levels * kPoints * 2);
  for (int64_t b = 0; b < problem.batch; ++b) {
    for (const msda::Level& own : problem.levels) {
      const int64_t of_level = problem.num_queries == 0 ? own.height * own.width : queries;
      for (int64_t q = 0; q < of_level; ++q) {
        const float centre[2] = {(q % own.width + 0.5f) / own.width,
                                 (q / own.width + 0.5f) / own.height};
        for (int m = 0; m < kHeads; ++m) {
          for (const msda::Level& level : problem.levels) {
            for (int i = 0; i < 2 * kPoints; ++i) {
              const auto n = uint32_t(locations.size());
              const float size = i % 2 == 0 ? level.width : level.height;
              locations.push_back(problem.num_queries == 0 ? centre[i % 2] + 2.5f * normal(n) / size
                                                           : random(n));
            }
          }
        }
      }
      if (problem.num_queries != 0) break;
    }
  }
  return locations;
}

// Numbers in [0.5, 2) and their negatives, as the type has them.
template <class T>
std::vector<T> make_values(size_t count) {
  std::vector<T> values(count);
  for (size_t i = 0; i < count; ++i) {
    const float x = (random(uint32_t(i)) + 0.5f) * (i % 2 == 0 ? 1 : -1);
    if constexpr (sizeof(T) == 2) {
      // 10 bits of mantissa below an exponent of 0: what is cut off does not matter here.
      uint32_t bits;
      std::memcpy(&bits, &x, sizeof(bits));
      values[i].bits = uint16_t((bits >> 16 & 0x8000) | (((bits >> 23 & 0xff) - 112) << 10) |
                                (bits >> 13 & 0x3ff));
    } else {
      values[i] = x;
    }
  }
  return values;
}

// ---- measurements -------------------------------------------------------------------------------

bool all_verified = true;

void report(const std::string& name, const msda::CudaCall& call, const Times& times,
            int repetitions, bool verified) {
  all_verified = all_verified && verified;
  std::printf(
      "{\"name\": \"%s\", \"tile_heads\": %d, \"split\": %d, \"ms\": %.6f, \"least_ms\": %.6f, "
      "\"most_ms\": %.6f, \"repetitions\": %d, \"verified\": %s}\n",
      name.c_str(), call.tile_heads, call.split, times.median_ms, times.least_ms, times.most_ms,
      repetitions, verified ? "true" : "false");
  std::fflush(stdout);
}

using Arrays = std::vector<std::vector<float>>;

double relative_difference(const std::vector<float>& a, const std::vector<float>& b) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    difference += (double(a[i]) - b[i]) * (double(a[i]) - b[i]);
    norm += double(b[i]) * b[i];
  }
  return std::sqrt(difference / norm);
}

std::vector<float> as_floats(const std::vector<float>& numbers) { return numbers; }
std::vector<float> as_floats(const std::vector<msda::Half>& numbers) {
  std::vector<float> floats;
  for (const msda::Half number : numbers) {
    const int exponent = number.bits >> 10 & 31, mantissa = number.bits & 1023;
    const float size = exponent == 0 ? std::ldexp(float(mantissa), -24)
                                     : std::ldexp(float(mantissa | 1024), exponent - 25);
    floats.push_back(number.bits >> 15 ? -size : size);
  }
  return floats;
}

// Times enqueue(call) for each order of the case. results(call) is what one call writes.
template <class Enqueue, class Results>
void measure_orders(const Settings& settings, bool once, const std::string& name,
                    const Case& problem, Enqueue enqueue, Results results) {
  std::vector<msda::CudaCall> calls(1);
  for (const int heads : problem.tile_heads) {
    calls.emplace_back();
    calls.back().split = 1;
    calls.back().tile_heads = heads;
  }
  for (const int split : problem.splits) {
    calls.emplace_back();
    calls.back().split = split;
  }
  Arrays first;
  for (const msda::CudaCall& call : calls) {
    const Arrays got = results(call);
    if (first.empty()) first = got;
    bool verified = true;
    for (size_t i = 0; i < got.size(); ++i) {
      verified = verified && relative_difference(got[i], first[i]) < 1e-3;
    }
    if (once) {
      report(name, call, {}, 1, verified);
    } else {
      const Times times = device::time_calls(settings, [&] { enqueue(call); });
      report(name, call, times, settings.repetitions(), verified);
    }
  }
}

template <class T>
void measure(const Settings& settings, bool once, const char* type, const Case& given) {
  int64_t keys = 0;
  for (const msda::Level& level : given.levels) keys += level.height * level.width;
  const int64_t queries = given.num_queries == 0 ? keys : given.num_queries;
  const size_t samples = given.batch * queries * kHeads * given.levels.size() * kPoints;
  const size_t outputs = given.batch * queries * kHeads * kHeadDim;

  const DeviceArray<T> value(make_values<T>(given.batch * keys * kHeads * kHeadDim));
  const DeviceArray<float> locations(make_locations(given, queries));
  const DeviceArray<float> weights(
      std::vector<float>(samples, 1.0f / (given.levels.size() * kPoints)));
  const DeviceArray<T> grad_output(make_values<T>(outputs));
  const DeviceArray<T> output(outputs);
  const DeviceArray<float> grad_value(value.size()), grad_points(2 * samples),
      grad_weights(samples);

  const msda::DType dtype = sizeof(T) == 2 ? msda::DType::kFloat16 : msda::DType::kFloat32;
  msda::Problem problem{};
  problem.batch = given.batch;
  problem.num_keys = keys;
  problem.num_queries = queries;
  problem.num_heads = kHeads;
  problem.head_dim = kHeadDim;
  problem.num_levels = given.levels.size();
  problem.num_samples = given.levels.size() * kPoints;
  problem.levels = given.levels.data();
  problem.value = {value.data(), dtype};
  problem.points = {locations.data(), msda::DType::kFloat32};
  problem.weights = {weights.data(), msda::DType::kFloat32};

  const std::string name = std::string(given.name) + "." + type;
  const auto forward = [&](const msda::CudaCall& call) {
    msda::forward_cuda<T>(problem, {{output.data(), dtype}}, call);
  };
  measure_orders(settings, once, name + ".forward", given, forward,
                 [&](const msda::CudaCall& call) {
                   forward(call);
                   return Arrays{as_floats(output.download())};
                 });

  msda::BackwardOutputs gradients;
  gradients.grad_value = {{grad_value.data(), msda::DType::kFloat32}, true};
  gradients.grad_points = {{grad_points.data(), msda::DType::kFloat32}, true};
  gradients.grad_weights = {{grad_weights.data(), msda::DType::kFloat32}, true};
  const auto backward = [&](const msda::CudaCall& call) {
    msda::backward_cuda<T>(problem, {{grad_output.data(), dtype}, {}}, gradients, call);
  };
  measure_orders(
      settings, once, name + ".backward", given, backward, [&](const msda::CudaCall& call) {
        grad_value.fill_bytes(0);
        backward(call);
        return Arrays{grad_value.download(), grad_points.download(), grad_weights.download()};
      });
}

int run(bool quick, bool once) {
  const Settings settings = device::begin("orders", quick);
  const int divisor = quick ? 16 : 1;
  const std::vector<msda::Level> levels = pyramid(divisor);
  const std::vector<Case> cases = {
      {"encoder-2", 2, 0, levels, {1, 2, 4, 8}, {}},
      {"decoder-300", 2, 300 / divisor, levels, {}, {1, 2, 4}},
      {"decoder-300-alone", 1, 300 / divisor, levels, {}, {1, 2, 4}},
      {"decoder-900", 2, 900 / divisor, levels, {}, {1, 2, 4}},
  };
  for (const Case& problem : cases) {
    measure<float>(settings, once, "float32", problem);
    measure<msda::Half>(settings, once, "float16", problem);
  }
  return all_verified ? 0 : 1;
}

}  // namespace

int main(int count, char** arguments) {
  const std::string mode = count == 2 ? arguments[1] : "";
  if (count > 2 || (count == 2 && mode != "--quick" && mode != "--once")) {
    std::fprintf(stderr, "usage: orders [--quick|--once]\n");
    return 2;
  }
  return run(mode == "--quick", mode == "--once");
}
