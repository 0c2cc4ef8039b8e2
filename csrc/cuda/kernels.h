// The CUDA kernels as their callers see them: ../run_cuda.cpp (torch), and the executor of the
// tests. No CUDA header is needed to include this one.
//
// Reading order: samples.cuh (from the inputs to one sample), order.cuh (which block works on
// what), forward.cuh and backward.cuh (the kernels), deterministic_backward.cuh (the gradient of
// value without atomic additions), launch.cuh (which kernel, in how many blocks). Beneath them:
// vec.cuh (numbers, loads, stores, atomic additions). Beside them: level_table.cu (a table of
// levels in the GPU's memory, and its check), deterministic_cells.cu (where the samples of a cell
// begin), dtypes.cpp (the kernels for a dtype).

#pragma once

#include "../problem.h"

namespace msda {

// A call on a GPU, beside the problem. All pointers of the problem point into the GPU's memory,
// apart from problem.levels, which is on the host.
struct CudaCall {
  void* stream = nullptr;  // a cudaStream_t of the current device

  // Heights and widths where the host does not know them: (L, 2), in place of those of
  // problem.levels. The GPU checks them: see level_table.cu.
  bool shapes_on_device = false;
  bool shapes_are_int64 = true;
  const void* spatial_shapes = nullptr;

  // Scratch memory of level_table_bytes(), 16-byte aligned.
  void* level_table = nullptr;

  // Sub-warps that share the samples of one query and head: 1, 2, 4, ..., or 0 for as many as a GPU
  // needs that is not full. Tests and benchmarks set it.
  int split = 0;

  // Heads that a block works on at once: 1, 2, 4, ..., of which M is a multiple, or 0 for as many
  // as fill a line of the cache. Tests and benchmarks set it.
  int tile_heads = 0;
};

int64_t level_table_bytes(int64_t num_levels, bool shapes_on_device);

// All of these enqueue their work on call.stream and return. They throw std::runtime_error where
// the problem is too large for them or a launch fails. The batch, queries, heads and keys of a
// problem must not be none. T: the type of value.

// Writes every element of the output.
template <class T>
void forward_cuda(const Problem& problem, const ForwardOutputs& outputs, const CudaCall& call);

// grad_value is of type float32 for 16-bit values, else of value's own, and must be zero before; it
// is summed by atomic additions, in no fixed order. Every element of the other gradients is
// written. grad_points is of float32 (float64 for float64 values) where grad_reference_points is
// wanted.
template <class T>
void backward_cuda(const Problem& problem, const BackwardInputs& inputs,
                   const BackwardOutputs& outputs, const CudaCall& call);

// The gradient of value once more, without atomic additions: the same bits in every run.
// sample_cells_cuda() writes cells and weights, the caller sorts the cells stably, and
// gather_cuda() writes every element of grad_value, of the type above.
struct SortedSamples {
  int32_t* cells = nullptr;               // (B, Q, M, K)
  void* weights = nullptr;                // (B, Q, M, K, 4) of grad_value's type, 16-byte aligned
  const int32_t* sorted_cells = nullptr;  // (N), N = B * Q * M * K
  const int64_t* sample_order = nullptr;  // (N): cells[sample_order[i]] == sorted_cells[i]
  int32_t* cell_starts = nullptr;         // (num_cells + 1), scratch
};

struct SortSizes {
  int64_t num_samples;  // N
  int64_t num_cells;    // between the pixels of all levels, heads and images; no fewer than these
  int64_t cells_per_head;  // where the host does not know the sizes of the levels
};

// Throws where these are too many for 32 bits.
SortSizes sort_sizes(const Problem& problem, const CudaCall& call);

template <class T>
void sample_cells_cuda(const Problem& problem, const SortedSamples& samples, const CudaCall& call);

template <class T>
void gather_cuda(const Problem& problem, const BackwardInputs& inputs, const Array& grad_value,
                 const SortedSamples& samples, const CudaCall& call);

// The same, for the type of problem.value.dtype: see dtypes.cpp.
void forward_cuda(const Problem& problem, const ForwardOutputs& outputs, const CudaCall& call);
void backward_cuda(const Problem& problem, const BackwardInputs& inputs,
                   const BackwardOutputs& outputs, const CudaCall& call);
void sample_cells_cuda(const Problem& problem, const SortedSamples& samples, const CudaCall& call);
void gather_cuda(const Problem& problem, const BackwardInputs& inputs, const Array& grad_value,
                 const SortedSamples& samples, const CudaCall& call);

}  // namespace msda
