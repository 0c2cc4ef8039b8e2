// Runs a case through the kernels and holds what they computed against the definition.

#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "../../csrc/cpu/kernels.h"
#include "case.h"

namespace msda {
namespace fuzz {

// A result that is not right; says which, where, what was expected and what came.
struct Wrong : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// What is being done, for whoever has to report a crash.
const char* current_step();

// Throws Wrong. Arrays lie between pages that cannot be read: an access outside of them is a crash.
// threads: over how many the work of each call is spread; with more than one, the results must have
// the same bits as with one.
void check_case(const Case& c, const std::vector<CpuKernels>& kernels, int threads);

}  // namespace fuzz
}  // namespace msda
