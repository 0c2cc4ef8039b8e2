// What the kernels are to compute, written a second time: one sample after the other, one channel
// after the other, in double precision, by the rules at the top of csrc/bilinear.h.
//
// Each expected number comes with a radius: how far off a right kernel may be. It follows from how
// the kernels round (u is half an epsilon of the type they compute in):
//   - a sum of n terms: (n + 8) u times the sum of their magnitudes;
//   - a fraction of a pixel: 4 u, and for fused calls 4 u times the offset in pixels;
//   - a coordinate, which decides about the cell: 4 u times its parts. A sample so close to the
//   edge
//     of a cell may lie on either side: its gradients are anything between those of both;
//   - softmax: u times 8, the number of samples and the distance to the largest logit together;
//   - a result: one rounding to the type it is stored in (see check.cpp).
// Where a sample is so far from its reference point that rounding moves it by a quarter of a pixel
// or more, it may lie anywhere on the map, but not beyond: fractions stay between 0 and 1.

#pragma once

#include <cstdint>
#include <vector>

#include "case.h"

namespace msda {
namespace fuzz {

// A number that is known up to a radius. One that is not finite is to be met as such.
struct Ball {
  double middle = 0;
  double radius = 0;
  bool anything = false;  // two right answers differ by more than a radius: nothing is promised
};

struct Expected {
  std::vector<Ball> output;          // (B, Q, M, D)
  std::vector<Ball> grad_value;      // (B, S, M, D)
  std::vector<Ball> grad_points;     // (B, Q, M, K, 2)
  std::vector<Ball> grad_weights;    // (B, Q, M, K)
  std::vector<Ball> grad_reference;  // (B, Q, reference_levels, reference_size)
};

// The output, and all gradients whether wanted or not.
Expected compute_expected(const Case& c);

}  // namespace fuzz
}  // namespace msda
