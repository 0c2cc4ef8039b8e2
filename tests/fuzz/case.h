// One problem for the kernels, decided by bytes: its sizes, its types, its numbers, and how it is
// called. The same bytes give the same case.

#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "../../csrc/problem.h"

namespace msda {
namespace fuzz {

// Gives what it was given, and random bytes after that, whose seed is the first eight given.
class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size);

  uint8_t next();
  uint64_t random();
  double uniform(double low, double high);
  // One of a few numbers, each as likely as it is listed.
  template <class T>
  T pick(std::initializer_list<T> from) {
    return from.begin()[next() % from.size()];
  }

 private:
  const uint8_t* at_;
  const uint8_t* const end_;
  uint64_t state_ = 0;
};

// Where an array lies between two pages that cannot be read.
struct Placement {
  bool at_end;   // ends at the page after it, or begins at the page before it
  int64_t skew;  // but for so many bytes
};

// An array of a problem as it lies in memory.
struct Stored {
  DType dtype = DType::kFloat32;
  std::vector<uint8_t> bytes;

  int64_t size() const { return int64_t(bytes.size()) / element_size(dtype); }
};

struct Case {
  Problem problem{};  // without pointers
  std::vector<Level> levels;
  bool fused = false;
  Stored value, points, weights, reference, grad_output;
  std::vector<uint8_t> padding_mask;  // empty: none

  // Which gradients are wanted.
  bool wants_value, wants_points, wants_weights, wants_reference;
  bool wants_any() const { return wants_value || wants_points || wants_weights || wants_reference; }

  bool has_special_numbers;  // NaN, infinity and others
  Placement placement;
  bool two_passes;
  std::vector<uint8_t> cuts;  // where rows and tasks are split, in 256ths
  bool repeats;               // whether to call again, split elsewhere, for the same bits

  // Coordinates, softmax and sums are computed in this type.
  DType computed_in() const {
    return value.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  }
  int64_t num_rows() const { return problem.batch * problem.num_heads * problem.num_queries; }

  std::string describe() const;
};

Case make_case(Bytes bytes);

// The bytes that stand for a seed.
std::vector<uint8_t> bytes_of_seed(uint64_t seed);

const char* name_of(DType dtype);

}  // namespace fuzz
}  // namespace msda
