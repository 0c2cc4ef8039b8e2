#include "check.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <sstream>
#include <thread>

#include "definition.h"
#include "numbers.h"

namespace msda {
namespace fuzz {
namespace {

std::string step;

// ---- memory -------------------------------------------------------------------------------------

constexpr uint8_t kUnwritten = 0xff;  // NaN, as numbers of every type

// Memory between two pages that cannot be read, for one array at a time.
class Guarded {
 public:
  Guarded() {
    const size_t page = size_t(sysconf(_SC_PAGESIZE));
    char* const all = static_cast<char*>(mmap(nullptr, kCapacity + 2 * page, PROT_READ | PROT_WRITE,
                                              MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    begin_ = all + page;
    if (all == MAP_FAILED || mprotect(all, page, PROT_NONE) != 0 ||
        mprotect(begin_ + kCapacity, page, PROT_NONE) != 0) {
      throw std::runtime_error("the fuzzer must get memory between guard pages, got an error");
    }
  }

  // An array of so many bytes that holds `contents`, or kUnwritten where there are none. Null where
  // it is empty, as torch has it.
  void* place(int64_t size, Placement placement, const uint8_t* contents = nullptr) {
    if (size == 0) return nullptr;
    if (size + kMargin > kCapacity) {
      throw std::runtime_error("a case must fit its memory, got " + std::to_string(size) +
                               " bytes");
    }
    data_ = placement.at_end ? begin_ + kCapacity - size - placement.skew : begin_ + placement.skew;
    margin_ = placement.at_end ? data_ + size : begin_;
    margin_size_ = placement.skew;
    std::memset(margin_, kUnwritten, margin_size_);
    if (contents != nullptr) {
      std::memcpy(data_, contents, size);
    } else {
      std::memset(data_, kUnwritten, size);
    }
    return data_;
  }

  // What the page cannot protect: the bytes between it and an array.
  bool margin_is_untouched() const {
    return std::all_of(margin_, margin_ + margin_size_,
                       [](char byte) { return uint8_t(byte) == kUnwritten; });
  }

 private:
  static constexpr int64_t kCapacity = 1 << 20;  // a multiple of every page size
  static constexpr int64_t kMargin = 64;

  char* begin_;
  char* data_ = nullptr;
  char* margin_ = nullptr;
  int64_t margin_size_ = 0;
};

// ---- calls --------------------------------------------------------------------------------------

// An output of a call, and what is expected of it.
struct Result {
  const char* name;
  bool wanted;
  int64_t size;
  DType dtype;
  const std::vector<Ball>* expected;
  Guarded* memory;
  void* data = nullptr;

  Array array() const { return {data, dtype}; }
  Gradient gradient() const { return {array(), wanted}; }
  void place(Placement placement) {
    data = memory->place(wanted ? size * element_size(dtype) : 0, placement);
  }
};

// How a call is spread over threads.
struct Spread {
  int threads;
  std::vector<uint8_t> cuts;  // in 256ths
  bool two_passes;
};

// Runs f(first, last) over 0..count-1.
void split(const Spread& spread, int64_t count, const std::function<void(int64_t, int64_t)>& f) {
  const int threads = spread.threads;
  std::vector<int64_t> ends;
  for (const uint8_t cut : spread.cuts) ends.push_back(count * cut / 256);
  for (int i = 1; i < threads; ++i) ends.push_back(count * i / threads);
  ends.push_back(count);
  std::sort(ends.begin(), ends.end());
  std::vector<std::thread> running;
  int64_t first = 0;
  for (const int64_t end : ends) {
    if (end == first) continue;
    if (threads > 1) {
      running.emplace_back(f, first, end);
    } else {
      f(first, end);
    }
    first = end;
  }
  for (std::thread& thread : running) thread.join();
}

class Check {
 public:
  Check(const Case& c, const Expected& expected) : c_(c), expected_(expected) {}

  void run(const CpuKernels& kernels, int threads) {
    capability_ = kernels.capability;
    Problem problem = c_.problem;
    place_inputs(problem);
    const Spread first{1, c_.cuts, c_.two_passes}, other{threads, {}, !c_.two_passes};
    const bool repeats = c_.repeats || threads > 1;
    const Bits output = run_forward(problem, kernels, first);
    if (repeats) require_same(output, run_forward(problem, kernels, other));
    // As csrc/ops.cpp: nothing to sum over is no work for the kernels.
    if (c_.num_rows() == 0 || problem.num_samples == 0) return;
    const Bits gradients = run_backward(problem, kernels, first);
    if (repeats) require_same(gradients, run_backward(problem, kernels, other));
  }

 private:
  // The numbers of a call, bit by bit, but that one NaN is as good as another.
  using Bits = std::vector<uint64_t>;

  void place_inputs(Problem& problem) {
    const auto place = [&](Guarded& memory, const Stored& stored) {
      return ConstArray{
          memory.place(int64_t(stored.bytes.size()), c_.placement, stored.bytes.data()),
          stored.dtype};
    };
    problem.value = place(memory().value, c_.value);
    problem.points = place(memory().points, c_.points);
    problem.weights = place(memory().weights, c_.weights);
    problem.is_fused = c_.fused;
    problem.has_padding_mask = !c_.padding_mask.empty();
    if (c_.fused) problem.reference_points = place(memory().reference, c_.reference);
    problem.padding_mask = static_cast<const uint8_t*>(memory().padding_mask.place(
        int64_t(c_.padding_mask.size()), c_.placement, c_.padding_mask.data()));
    problem.levels = static_cast<const Level*>(
        memory().levels.place(int64_t(c_.levels.size() * sizeof(Level)), {c_.placement.at_end, 0},
                              reinterpret_cast<const uint8_t*>(c_.levels.data())));
    inputs_.grad_output = place(memory().grad_output, c_.grad_output);
  }

  Bits run_forward(const Problem& problem, const CpuKernels& kernels, const Spread& spread) {
    begin_step("forward", spread);
    Result output{"output",        true, c_.grad_output.size(), c_.value.dtype, &expected_.output,
                  &memory().output};
    output.place(c_.placement);
    const ForwardOutputs outputs{output.array()};
    split(spread, c_.num_rows(),
          [&](int64_t first, int64_t last) { kernels.forward(problem, outputs, first, last); });
    inputs_.output = {output.data, output.dtype};
    return finish({output}, true);
  }

  Bits run_backward(const Problem& problem, const CpuKernels& kernels, const Spread& spread) {
    begin_step(spread.two_passes ? "backward in two passes" : "backward", spread);
    // The gradient of the reference points is summed from that of the points.
    const bool sums_points = c_.wants_reference;
    Result value{"grad_value",   c_.wants_value,        c_.value.size(),
                 c_.value.dtype, &expected_.grad_value, &memory().grad_value};
    Result points{"grad_points",          c_.wants_points || sums_points,
                  c_.points.size(),       sums_points ? c_.computed_in() : c_.points.dtype,
                  &expected_.grad_points, &memory().grad_points};
    Result weights{"grad_weights",   c_.wants_weights,        c_.weights.size(),
                   c_.weights.dtype, &expected_.grad_weights, &memory().grad_weights};
    Result reference{"grad_reference",   c_.wants_reference,        c_.reference.size(),
                     c_.reference.dtype, &expected_.grad_reference, &memory().grad_reference};
    for (Result* result : {&value, &points, &weights, &reference}) result->place(c_.placement);
    if (value.wanted && sums_in_place(problem)) {
      std::memset(value.data, 0, value.size * element_size(value.dtype));
    }
    const BackwardOutputs outputs{value.gradient(), points.gradient(), weights.gradient(),
                                  reference.gradient()};
    const int64_t num_heads = problem.batch * problem.num_heads;
    if (spread.two_passes) {
      if (points.wanted || weights.wanted) {
        split(spread, num_heads * problem.num_queries, [&](int64_t first, int64_t last) {
          kernels.backward_samples(problem, inputs_, outputs, first, last);
        });
      }
      if (value.wanted) {
        const int64_t parts = num_heads * num_channel_parts(problem);
        split(spread, parts, [&](int64_t first, int64_t last) {
          kernels.backward_value(problem, inputs_, outputs, first, last);
        });
      }
    } else if (outputs.has_wanted()) {
      split(spread, num_heads, [&](int64_t first, int64_t last) {
        kernels.backward(problem, inputs_, outputs, first, last);
      });
    }
    if (c_.wants_reference) {
      split(spread, problem.batch * problem.num_queries, [&](int64_t first, int64_t last) {
        kernels.backward_reference_points(problem, outputs, first, last);
      });
    }
    return finish({value, points, weights, reference}, false);
  }

  void begin_step(const char* name, const Spread& spread) {
    step = std::string(capability_) + " " + name;
    if (spread.threads > 1) step += " on " + std::to_string(spread.threads) + " threads";
  }

  // Compares what is wanted with the definition; returns it.
  Bits finish(const std::vector<Result>& results, bool exact_infinities) {
    Bits bits;
    for (const Result& result : results) {
      if (!result.wanted || result.size == 0) continue;
      if (!result.memory->margin_is_untouched()) {
        throw Wrong(step + ": wrote beside " + result.name);
      }
      compare(result, exact_infinities);
      for (int64_t i = 0; i < result.size; ++i) {
        const double number = get(result.dtype, result.data, i);
        bits.push_back(0);
        std::memcpy(&bits.back(), std::isnan(number) ? &kNaN : &number, sizeof(number));
      }
    }
    return bits;
  }

  void compare(const Result& result, bool exact_infinities) const {
    const Rounding stored = rounding_of(result.dtype), computed = rounding_of(c_.computed_in());
    const double tiny = 100 * std::max(stored.absolute, computed.absolute);
    // Sums on the way to a number may be so much larger.
    const double largest = std::min(stored.largest, 0x1p-20 * computed.largest);
    for (int64_t i = 0; i < result.size; ++i) {
      const Ball& expected = (*result.expected)[i];
      if (expected.anything) continue;
      const double actual = get(result.dtype, result.data, i);
      const double size = std::fabs(expected.middle) + expected.radius;
      const double allowed = size == 0 ? 0 : expected.radius + stored.relative * size + tiny;
      bool right;
      if (std::isfinite(expected.middle)) {
        right = std::fabs(actual - expected.middle) <= allowed ||
                (actual == kInf && expected.middle + expected.radius >= largest) ||
                (actual == -kInf && expected.middle - expected.radius <= -largest);
      } else if (!exact_infinities) {
        right = !std::isfinite(actual);
      } else {
        right = std::isnan(expected.middle) ? std::isnan(actual) : actual == expected.middle;
      }
      if (right) continue;
      std::ostringstream text;
      text.precision(9);
      const auto tell = [&](const char* before, double number) {
        text << before << (std::isnan(number) ? kNaN : number);  // the sign of NaN says nothing
      };
      text << step << ": " << result.name << "[" << i << "]";
      tell(" must be ", expected.middle);
      if (allowed > 0) tell(" within ", allowed);
      tell(", got ", actual);
      throw Wrong(text.str());
    }
  }

  void require_same(const Bits& one, const Bits& other) const {
    if (one != other)
      throw Wrong(step + ": must give the bits of another split of the work, got others");
  }

  // One of each for the whole run: to map memory takes longer than to run a case.
  struct Memory {
    Guarded value, points, weights, reference, padding_mask, levels, grad_output, output,
        grad_value, grad_points, grad_weights, grad_reference;
  };
  static Memory& memory() {
    static Memory memory;
    return memory;
  }

  const Case& c_;
  const Expected& expected_;
  const char* capability_ = "";
  BackwardInputs inputs_;
};

}  // namespace

const char* current_step() { return step.c_str(); }

void check_case(const Case& c, const std::vector<CpuKernels>& kernels, int threads) {
  step = "the definition";
  const Expected expected = compute_expected(c);
  for (const CpuKernels& one : kernels) Check(c, expected).run(one, threads);
}

}  // namespace fuzz
}  // namespace msda
