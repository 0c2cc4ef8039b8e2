// The CPU kernels as their callers see them: one table of functions per instruction set.
//
// Reading order: samples.h (from the inputs of one query and head to samples: which pixels, with
// which weights; the softmax and its gradient), forward.cpp and backward.cpp (the kernels),
// instruction_sets.cpp (which set this machine runs). Beneath them: simd.h (vectors, all
// intrinsics) and arrays.h (scratch memory, arrays of a dtype known at run time). Who calls them:
// ../run_cpu.cpp (torch) and ../c_api.cpp, which spread their rows and tasks over threads.

#pragma once

#include "../problem.h"

namespace msda {

// Whether the kernels pack a head's pixels: copy them next to each other before so many queries
// sample them. It must pay for the copy. Measured: in an encoder, which samples each key 16 times,
// forward then takes two thirds of the time; in a decoder, which samples one key in five, a copy of
// the sums made backward half as slow again.
inline bool packs_pixels(const Problem& problem, int64_t num_queries) {
  return num_queries * problem.num_samples >= 4 * problem.num_keys;
}

// Whether backward adds to grad_value itself, which must then be zero before. Otherwise it sums
// each head in a scratch buffer of S * D numbers per thread and writes every element of grad_value
// once: for 16-bit values, whose sums must be float32, and where packs_pixels().
inline bool sums_in_place(const Problem& problem) {
  const bool same_type =
      problem.value.dtype == DType::kFloat32 || problem.value.dtype == DType::kFloat64;
  return same_type && !packs_pixels(problem, problem.num_queries);
}

struct CpuKernels {
  const char* capability;  // as in MSDA_CPU_CAPABILITY

  // Computes the outputs of rows first..last-1, where row = (b * M + m) * Q + q, or
  // (b * Q + q) * M + m where not packs_pixels().
  void (*forward)(const Problem& problem, const ForwardOutputs& outputs, int64_t first,
                  int64_t last);

  // Computes the gradients of tasks first..last-1. A task is one head of one image, or, if
  // by_level, one level of one head of one image: task = (b * M + m) [* L + l]. No two tasks write
  // to the same place, and each place is summed in the order of the queries, so that the result
  // has the same bits however the tasks are spread over threads. grad_value must be zero before
  // where sums_in_place(problem). Of a fused call, backward() leaves grad_points in pixels for
  // backward_reference_points() where grad_reference_points is wanted, and, if by_level, leaves in
  // grad_weights the gradient of the softmax's result, in the type of the sums, for
  // backward_softmax().
  void (*backward)(const Problem& problem, const BackwardInputs& inputs,
                   const BackwardOutputs& outputs, bool by_level, int64_t first, int64_t last);

  // Completes grad_weights of rows first..last-1 from what backward() left, where
  // row = (b * Q + q) * M + m.
  void (*backward_softmax)(const Problem& problem, const ConstArray& grad_weights,
                           const BackwardOutputs& outputs, int64_t first, int64_t last);

  // Sums grad_points of rows first..last-1 into grad_reference_points and completes grad_points,
  // where row = b * Q + q.
  void (*backward_reference_points)(const Problem& problem, const BackwardOutputs& outputs,
                                    int64_t first, int64_t last);
};

// The kernels in use: the best set that this machine runs, or the one named by the environment
// variable MSDA_CPU_CAPABILITY. Throws std::runtime_error if that one does not exist here.
const CpuKernels& cpu_kernels();

// Those of one of supported_cpu_capabilities(); null where there are none of that name.
const CpuKernels* find_cpu_kernels(const char* capability);

// Space-separated names: the sets compiled in, and those among them that this machine runs.
const char* compiled_cpu_capabilities();
const char* supported_cpu_capabilities();

}  // namespace msda
