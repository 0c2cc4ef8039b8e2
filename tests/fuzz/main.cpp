// The CPU kernels on random problems, against their definition.
//
//   kernels_fuzz --first 0 --count 1000        cases of these seeds
//   kernels_fuzz --first 0 --seconds 60        as many as there is time for
//   kernels_fuzz --bytes 00ff17                one case by its bytes
//
// Options: --capability NAME (of the instruction sets that the machine has, one), --threads N,
// --stats FILE (what was run, as JSON), --fault NAME (a fault to plant: the test of this program).
// Ends at the first failure, with one line that says how to repeat it: exit status 1 where a number
// is wrong, 2 where the kernels crash.
//
// Linked with Clang's libFuzzer, the bytes are those that reach most of the kernels' code. Options
// are then libFuzzer's, and the variable MSDA_FUZZ_STATS is the file for --stats.

#include <malloc.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <sstream>

#include "check.h"
#include "numbers.h"

// Of the sanitizers' library, where there is one.
extern "C" __attribute__((weak)) void __sanitizer_set_death_callback(void (*)(void));

// Their options: what is found ends the process.
extern "C" __attribute__((visibility("default"))) const char* __ubsan_default_options() {
  return "print_stacktrace=1:abort_on_error=1";
}
extern "C" __attribute__((visibility("default"))) const char* __tsan_default_options() {
  return "halt_on_error=1";
}

namespace msda {
namespace fuzz {
namespace {

// ---- which kernels ------------------------------------------------------------------------------

// Faults that this program must find: kernels that do something wrong before or after the sound
// ones.

CpuKernels sound;

void read_one_pixel_on(const Problem& problem, const ForwardOutputs& outputs, int64_t first,
                       int64_t last) {
  Problem shifted = problem;
  shifted.value.data = static_cast<const char*>(problem.value.data) +
                       problem.num_heads * problem.head_dim * element_size(problem.value.dtype);
  sound.forward(shifted, outputs, first, last);
}

void write_a_wrong_number(const Problem& problem, const ForwardOutputs& outputs, int64_t first,
                          int64_t last) {
  sound.forward(problem, outputs, first, last);
  const double number = get(outputs.output.dtype, outputs.output.data, 0);
  put(outputs.output.dtype, outputs.output.data, 0, 1.125 * number);
}

void write_beside(const Problem& problem, const ForwardOutputs& outputs, int64_t first,
                  int64_t last) {
  sound.forward(problem, outputs, first, last);
  const int64_t size = problem.batch * problem.num_queries * problem.num_heads * problem.head_dim;
  static_cast<char*>(outputs.output.data)[size * element_size(outputs.output.dtype)] = 0;
}

void leave_a_row_out(const Problem& problem, const ForwardOutputs& outputs, int64_t first,
                     int64_t last) {
  sound.forward(problem, outputs, first, last - 1);
}

void read_through_null(const Problem& problem, const BackwardOutputs& outputs, int64_t first,
                       int64_t last) {
  sound.backward_reference_points(problem, outputs, first, last);
  volatile const float* const nowhere = nullptr;
  (void)*nowhere;
}

// For the sanitizers.

void race(const Problem& problem, const ForwardOutputs& outputs, int64_t first, int64_t last) {
  static volatile int calls = 0;
  calls = calls + 1;
  sound.forward(problem, outputs, first, last);
}

void read_past_the_heap(const Problem& problem, const ForwardOutputs& outputs, int64_t first,
                        int64_t last) {
  sound.forward(problem, outputs, first, last);
  const std::vector<float> numbers(4);
  volatile const size_t past_the_end = numbers.size();
  (void)*static_cast<volatile const float*>(numbers.data() + past_the_end);
}

void load_misaligned(const Problem& problem, const ForwardOutputs& outputs, int64_t first,
                     int64_t last) {
  sound.forward(problem, outputs, first, last);
  alignas(double) char bytes[2 * sizeof(double)] = {};
  (void)*reinterpret_cast<volatile const double*>(bytes + 1);
}

CpuKernels with_fault(const CpuKernels& kernels, const std::string& fault) {
  using Forward = decltype(CpuKernels::forward);
  static const std::map<std::string, Forward> in_forward = {
      {"read_one_pixel_on", read_one_pixel_on},
      {"write_a_wrong_number", write_a_wrong_number},
      {"write_beside", write_beside},
      {"leave_a_row_out", leave_a_row_out},
      {"race", race},
      {"read_past_the_heap", read_past_the_heap},
      {"load_misaligned", load_misaligned}};
  CpuKernels faulty = sound = kernels;
  if (fault.empty()) return faulty;
  const auto found = in_forward.find(fault);
  if (found != in_forward.end()) {
    faulty.forward = found->second;
  } else if (fault == "read_through_null") {
    faulty.backward_reference_points = read_through_null;
  } else {
    throw std::invalid_argument("--fault must be a known fault, got " + fault);
  }
  return faulty;
}

std::vector<CpuKernels> kernels_named(const std::string& names, const std::string& fault) {
  std::vector<CpuKernels> kernels;
  std::istringstream all(names);
  for (std::string name; all >> name;) {
    const CpuKernels* const found = find_cpu_kernels(name.c_str());
    if (found == nullptr) {
      throw std::invalid_argument("--capability must be one of: " +
                                  std::string(supported_cpu_capabilities()) + ", got " + name);
    }
    kernels.push_back(with_fault(*found, fault));
  }
  return kernels;
}

// ---- what was run -------------------------------------------------------------------------------

struct Stats {
  std::string file;
  std::vector<CpuKernels> kernels;
  int64_t cases = 0;
  std::map<std::string, int64_t> kinds;
  const std::chrono::steady_clock::time_point start = std::chrono::steady_clock::now();

  double seconds() const {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }

  void count(const Case& c) {
    ++cases;
    ++kinds[std::string("value ") + name_of(c.value.dtype)];
    const bool box = c.fused && c.problem.reference_size == 4;
    ++kinds[box ? "boxes" : c.fused ? "points" : c.problem.nearest ? "nearest" : "plain"];
    if (c.placement.skew % element_size(c.value.dtype) != 0) ++kinds["misaligned"];
    if (c.has_special_numbers) ++kinds["NaN and infinity"];
    if (!c.padding_mask.empty()) ++kinds["padding mask"];
    if (!c.wants_any()) ++kinds["no gradient wanted"];
    if (c.problem.num_samples == 0 || c.num_rows() == 0) ++kinds["empty"];
  }

  void write() const {
    if (file.empty()) return;
    std::ofstream out(file);
    out << "{\"cases\": " << cases << ", \"seconds\": " << seconds() << ", \"capabilities\": [";
    for (size_t i = 0; i < kernels.size(); ++i) {
      out << (i == 0 ? "" : ", ") << '"' << kernels[i].capability << '"';
    }
    out << "], \"kinds\": {";
    const char* separator = "";
    for (const auto& [kind, number] : kinds) {
      out << separator << '"' << kind << "\": " << number;
      separator = ", ";
    }
    out << "}}\n";
  }
};

Stats& stats() {
  static Stats all;
  return all;
}

// ---- one case -----------------------------------------------------------------------------------

std::string repeat_by;  // the command that runs the present case

void say(const char* text) {
  if (write(STDOUT_FILENO, text, std::strlen(text)) < 0) std::abort();
}

// Without memory of its own: the heap may be what is broken.
void report_crash() {
  static bool reported = false;
  if (reported) return;
  reported = true;
  for (const char* text : {"crash: ", current_step(), "; repeat: ", repeat_by.c_str(), "\n"}) {
    say(text);
  }
}

void end_crash(int) {
  report_crash();
  _exit(2);
}

void set_up_process() {
  // Memory that a case gave back is for the next case: to get it anew would take a third of the
  // time.
  mallopt(M_MMAP_THRESHOLD, 1 << 28);
  mallopt(M_TRIM_THRESHOLD, 1 << 28);

  if (__sanitizer_set_death_callback != nullptr) __sanitizer_set_death_callback(report_crash);
  std::signal(SIGABRT, end_crash);  // GCC's library for undefined behaviour ends by this alone
  if (__sanitizer_set_death_callback != nullptr) return;
  for (const int signal : {SIGSEGV, SIGBUS, SIGILL, SIGFPE}) std::signal(signal, end_crash);
}

// Whether the case came out right.
bool run(const std::vector<uint8_t>& bytes, int threads) {
  const Case c = make_case(Bytes(bytes.data(), bytes.size()));
  stats().count(c);
  try {
    check_case(c, stats().kernels, threads);
    return true;
  } catch (const Wrong& wrong) {
    const std::string text =
        "wrong: " + std::string(wrong.what()) + "; " + c.describe() + "; repeat: " + repeat_by;
    say((text + "\n").c_str());
    return false;
  }
}

// Does what the command line says; returns the exit status.
int run_command(int argc, char** argv) {
  std::map<std::string, std::string> options{
      {"--first", "0"},     {"--count", ""},    {"--seconds", ""}, {"--bytes", ""},
      {"--capability", ""}, {"--threads", "1"}, {"--stats", ""},   {"--fault", ""}};
  for (int i = 1; i < argc; i += 2) {
    if (options.count(argv[i]) == 0 || i + 1 == argc) {
      std::fprintf(stderr, "kernels_fuzz must be given options it knows, got %s\n", argv[i]);
      return 3;
    }
    options[argv[i]] = argv[i + 1];
  }
  try {
    const std::string capability = options["--capability"], fault = options["--fault"];
    stats().file = options["--stats"];
    stats().kernels =
        kernels_named(capability.empty() ? supported_cpu_capabilities() : capability, fault);
    set_up_process();
    const int threads = std::stoi(options["--threads"]);
    std::string command = argv[0];
    for (const char* option : {"--capability", "--threads", "--fault"}) {
      const bool is_default = options[option].empty() || options[option] == "1";
      if (!is_default) command += std::string(" ") + option + " " + options[option];
    }
    const std::string hex = options["--bytes"];
    bool right = true;
    if (!hex.empty()) {
      std::vector<uint8_t> bytes;
      for (size_t i = 0; i + 1 < hex.size(); i += 2) {
        bytes.push_back(uint8_t(std::stoi(hex.substr(i, 2), nullptr, 16)));
      }
      repeat_by = command + " --bytes " + hex;
      right = run(bytes, threads);
    } else {
      const uint64_t first = std::stoull(options["--first"]);
      const std::string count = options["--count"], seconds = options["--seconds"];
      const double limit = seconds.empty() ? kInf : std::stod(seconds);
      const uint64_t most = count.empty() ? seconds.empty() ? 1 : UINT64_MAX : std::stoull(count);
      for (uint64_t i = 0; right && i < most && stats().seconds() < limit; ++i) {
        repeat_by = command + " --first " + std::to_string(first + i);
        right = run(bytes_of_seed(first + i), threads);
      }
    }
    stats().write();
    return right ? 0 : 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 3;
  }
}

}  // namespace
}  // namespace fuzz
}  // namespace msda

#ifdef MSDA_LIBFUZZER

using namespace msda::fuzz;

extern "C" int LLVMFuzzerInitialize(int* argc, char*** argv) {
  if (*argc > 1 && std::strncmp((*argv)[1], "--", 2) == 0) std::exit(run_command(*argc, *argv));
  const char* const file = std::getenv("MSDA_FUZZ_STATS");
  stats().file = file == nullptr ? "" : file;
  stats().kernels = kernels_named(msda::supported_cpu_capabilities(), "");
  std::atexit([] { stats().write(); });
  set_up_process();
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  repeat_by = "kernels_fuzz --bytes ";
  for (size_t i = 0; i < size; ++i) {
    char digits[3];
    std::snprintf(digits, sizeof(digits), "%02x", data[i]);
    repeat_by += digits;
  }
  if (run({data, data + size}, 1)) return 0;
  stats().write();
  std::_Exit(1);
}

#else

int main(int argc, char** argv) { return msda::fuzz::run_command(argc, argv); }

#endif
