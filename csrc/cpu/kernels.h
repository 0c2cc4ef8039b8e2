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

// Whether so many queries sample a head's pixels so often that a copy of the pixels, next to each
// other, pays. Measured: in an encoder, which samples each key 16 times, forward then takes two
// thirds of the time; in a decoder, which samples one key in five, a copy of the sums made backward
// half as slow again.
inline bool samples_often(const Problem& problem, int64_t num_queries) {
  return num_queries * problem.num_samples >= 4 * problem.num_keys;
}

// Whether a query has so few samples of each head that most of a vector of samples would be empty:
// then the kernels walk query by query and prepare all heads together. Measured against a walk head
// by head: RF-DETR's decoder (2 samples) four times as fast in forward and one and a half times in
// backward, BEVFormer's temporal self-attention (4) one and a half times in both.
inline bool has_few_samples(const Problem& problem) { return problem.num_samples < 8; }

// Whether the kernels walk head by head, with the head's pixels packed: copied next to each other.
inline bool packs_pixels(const Problem& problem, int64_t num_queries) {
  return !has_few_samples(problem) && samples_often(problem, num_queries);
}

// Whether backward adds to grad_value itself, which must then be zero before. Otherwise it sums
// each head in a scratch buffer of S * D numbers per thread and writes every element of grad_value
// once: for 16-bit values, whose sums must be float32, and where packs_pixels().
inline bool sums_in_place(const Problem& problem) {
  const bool same_type =
      problem.value.dtype == DType::kFloat32 || problem.value.dtype == DType::kFloat64;
  return same_type && !packs_pixels(problem, problem.num_queries);
}

// The channels of a head that are summed together by CpuKernels::backward_value: a vector at most
// of AVX-512. Fewer would leave the time the same.
constexpr int64_t kChannelsOfPart = 16;

inline int64_t num_channel_parts(const Problem& problem) {
  return (problem.head_dim + kChannelsOfPart - 1) / kChannelsOfPart;
}

struct CpuKernels {
  const char* capability;  // as in MSDA_CPU_CAPABILITY

  // Computes the outputs of rows first..last-1, where row = (b * M + m) * Q + q, or
  // (b * Q + q) * M + m where not packs_pixels().
  void (*forward)(const Problem& problem, const ForwardOutputs& outputs, int64_t first,
                  int64_t last);

  // Computes the wanted gradients of heads first..last-1, where head = b * M + m. No two heads
  // write to the same place, and each place is summed in the order of the queries, so that the
  // result has the same bits however the heads are spread over threads. grad_value must be zero
  // before where sums_in_place(problem). Of a fused call, grad_points are left in pixels for
  // backward_reference_points() where grad_reference_points is wanted.
  void (*backward)(const Problem& problem, const BackwardInputs& inputs,
                   const BackwardOutputs& outputs, int64_t first, int64_t last);

  // The same bits in two passes, for more threads than heads: all gradients but grad_value, of rows
  // first..last-1, where row = (b * M + m) * Q + q; and grad_value, of parts first..last-1, where
  // part = (b * M + m) * num_channel_parts(problem) + c. Zeros and pixels as for backward().
  void (*backward_samples)(const Problem& problem, const BackwardInputs& inputs,
                           const BackwardOutputs& outputs, int64_t first, int64_t last);
  void (*backward_value)(const Problem& problem, const BackwardInputs& inputs,
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
