// The sizes and pointers of one call: what every kernel takes, CPU or CUDA. No torch.
// Shape letters: B batch, S keys (pixels of all levels), Q queries, M heads, D channels per head,
// L levels, K samples of one query and head (the points of all levels together).

#pragma once

#include <cstdint>

#include "dtypes.h"

namespace msda {

// Thrown by the CPU kernels where there is no memory for their scratch space. (No std::exception:
// the linker could choose its functions as compiled for one instruction set, and use them in all.)
struct OutOfMemory {
  int64_t bytes;  // that were asked for
};

// A row-major array without gaps whose dtype is known at run time only. An empty tensor has a null
// pointer: flags say whether an array is given or wanted.
struct ConstArray {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
};

struct Array {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
};

// A gradient has its input's shape. Kernels do not touch the data of one that is not wanted.
struct Gradient : Array {
  bool is_wanted = false;
};

struct Level {
  int64_t height;
  int64_t width;
  int64_t start;       // first key of the level
  int64_t num_points;  // points that each query and head samples from the level
};

struct Problem {
  int64_t batch;
  int64_t num_keys;
  int64_t num_queries;
  int64_t num_heads;
  int64_t head_dim;
  int64_t num_levels;
  int64_t num_samples;  // K
  const Level* levels;  // (L), on the host
  bool nearest;
  bool is_fused;
  bool has_padding_mask;  // fused only

  // inputs
  ConstArray value;             // (B, S, M, D)
  ConstArray points;            // (B, Q, M, K, 2): sampling locations; fused: sampling offsets
  ConstArray weights;           // (B, Q, M, K): attention weights; fused: attention logits
  ConstArray reference_points;  // fused only: (B, Q, reference_levels, reference_size)
  int64_t reference_levels;     // L, or 1 where all levels share a reference point
  int64_t reference_size;       // 2: (x, y); 4: (centre x, centre y, width, height)
  const uint8_t* padding_mask;  // (B, S), padding where not 0, as torch reads a bool
};

struct ForwardOutputs {
  Array output;  // (B, Q, M * D)
};

struct BackwardInputs {
  ConstArray grad_output;  // (B, Q, M * D)
  ConstArray output;       // (B, Q, M * D): what forward returned; read by the fused form on CUDA
};

struct BackwardOutputs {
  Gradient grad_value;
  Gradient grad_points;  // wanted wherever grad_reference_points is
  Gradient grad_weights;
  Gradient grad_reference_points;

  bool has_wanted() const {
    return grad_value.is_wanted || grad_points.is_wanted || grad_weights.is_wanted ||
           grad_reference_points.is_wanted;
  }
};

}  // namespace msda
