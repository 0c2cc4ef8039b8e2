// Chooses the instruction set whose kernels run: by the machine, or by MSDA_CPU_CAPABILITY.

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "kernels.h"

// The sets that CMakeLists.txt beside this file compiles the kernels for, best last.
#if defined(__x86_64__)
#define MSDA_CPU_CAPABILITIES(F) F(baseline) F(avx2) F(avx512)
#else
#define MSDA_CPU_CAPABILITIES(F) F(baseline)
#endif

namespace msda {

// The functions of one set, of the types that CpuKernels says.
#define MSDA_DECLARE(name)                                                        \
  namespace name {                                                                \
  std::remove_pointer_t<decltype(CpuKernels::forward)> forward;                   \
  std::remove_pointer_t<decltype(CpuKernels::backward)> backward;                 \
  std::remove_pointer_t<decltype(CpuKernels::backward_samples)> backward_samples; \
  std::remove_pointer_t<decltype(CpuKernels::backward_value)> backward_value;     \
  std::remove_pointer_t<decltype(CpuKernels::backward_reference_points)>          \
      backward_reference_points;                                                  \
  }
MSDA_CPU_CAPABILITIES(MSDA_DECLARE)
#undef MSDA_DECLARE

namespace {

#define MSDA_ENTRY(name)   \
  {#name,                  \
   name::forward,          \
   name::backward,         \
   name::backward_samples, \
   name::backward_value,   \
   name::backward_reference_points},
constexpr CpuKernels kCompiled[] = {MSDA_CPU_CAPABILITIES(MSDA_ENTRY)};
#undef MSDA_ENTRY

bool machine_has(const char* capability) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (std::strcmp(capability, "avx2") == 0) {
    // F16C came before AVX2; older compilers do not know its name here.
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  }
  if (std::strcmp(capability, "avx512") == 0) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
#endif
  return std::strcmp(capability, "baseline") == 0;
}

std::string join_names(bool only_supported) {
  std::string names;
  for (const CpuKernels& kernels : kCompiled) {
    if (only_supported && !machine_has(kernels.capability)) continue;
    names += (names.empty() ? "" : " ") + std::string(kernels.capability);
  }
  return names;
}

const CpuKernels& choose() {
  const char* const wanted = std::getenv("MSDA_CPU_CAPABILITY");
  if (wanted == nullptr || *wanted == '\0') {
    const CpuKernels* best = nullptr;
    for (const CpuKernels& kernels : kCompiled) {
      if (machine_has(kernels.capability)) best = &kernels;
    }
    return *best;
  }
  const CpuKernels* const found = find_cpu_kernels(wanted);
  if (found == nullptr) {
    throw std::runtime_error("MSDA_CPU_CAPABILITY must be one of: " +
                             std::string(supported_cpu_capabilities()) + ", got " + wanted);
  }
  return *found;
}

}  // namespace

const CpuKernels& cpu_kernels() {
  static const CpuKernels& chosen = choose();
  return chosen;
}

const CpuKernels* find_cpu_kernels(const char* capability) {
  for (const CpuKernels& kernels : kCompiled) {
    if (std::strcmp(capability, kernels.capability) != 0) continue;
    return machine_has(kernels.capability) ? &kernels : nullptr;
  }
  return nullptr;
}

const char* compiled_cpu_capabilities() {
  static const std::string names = join_names(false);
  return names.c_str();
}

const char* supported_cpu_capabilities() {
  static const std::string names = join_names(true);
  return names.c_str();
}

}  // namespace msda
