// Numbers of every element type, read and written without the kernels' own conversions.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "../../csrc/problem.h"

namespace msda {
namespace fuzz {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// What rounding to a type can do to a number.
struct Rounding {
  double relative;  // largest relative error of a normal number
  double absolute;  // at least the largest error of a number too small to be normal
  double largest;   // what is larger may become infinite
};

inline Rounding rounding_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return {0x1p-24, 0x1p-126, 0x1.fffffep127};
    case DType::kFloat64:
      return {0x1p-53, 0x1p-1022, 0x1.fffffffffffffp1023};
    case DType::kFloat16:
      return {0x1p-11, 0x1p-24, 65504};
    case DType::kBFloat16:
      return {0x1p-8, 0x1p-126, 0x1.fep127};
  }
  std::abort();
}

template <class T>
T read(const void* address) {
  T number;
  std::memcpy(&number, address, sizeof(T));
  return number;
}

inline double decode_half(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  double magnitude =
      std::ldexp(exponent == 0 ? mantissa : mantissa + 1024, std::max(exponent, 1) - 25);
  if (exponent == 31) magnitude = mantissa == 0 ? kInf : kNaN;
  return bits & 0x8000 ? -magnitude : magnitude;
}

inline double decode_bfloat16(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  return read<float>(&wide);
}

// Element `index` of an array, which need not be aligned.
inline double get(DType dtype, const void* array, int64_t index) {
  const char* const p = static_cast<const char*>(array) + index * element_size(dtype);
  static const std::vector<double> halves = [] {
    std::vector<double> all(1 << 16);
    for (int i = 0; i < 1 << 16; ++i) all[i] = decode_half(uint16_t(i));
    return all;
  }();
  switch (dtype) {
    case DType::kFloat32:
      return read<float>(p);
    case DType::kFloat64:
      return read<double>(p);
    case DType::kFloat16:
      return halves[read<uint16_t>(p)];
    case DType::kBFloat16:
      return decode_bfloat16(read<uint16_t>(p));
  }
  std::abort();
}

inline uint16_t encode_half(double number) {
  const double magnitude = std::fabs(number);
  int exponent;
  const double mantissa = std::frexp(magnitude, &exponent);  // in [1/2, 1)
  const uint16_t bits = std::isnan(number)    ? 0x7e00
                        : magnitude >= 0x1p16 ? 0x7c00
                        : magnitude < 0x1p-14
                            ? uint16_t(magnitude * 0x1p24)
                            : uint16_t((exponent + 14) * 1024 + int((2 * mantissa - 1) * 1024));
  return std::signbit(number) ? bits | 0x8000 : bits;
}

// 16 bits are cut off, not rounded: what is stored is what counts.
inline void put(DType dtype, void* array, int64_t index, double number) {
  char* const p = static_cast<char*>(array) + index * element_size(dtype);
  const float single = float(number);
  switch (dtype) {
    case DType::kFloat32:
      std::memcpy(p, &single, 4);
      return;
    case DType::kFloat64:
      std::memcpy(p, &number, 8);
      return;
    case DType::kFloat16: {
      const uint16_t bits = encode_half(number);
      std::memcpy(p, &bits, 2);
      return;
    }
    case DType::kBFloat16: {
      const uint16_t bits = uint16_t(read<uint32_t>(&single) >> 16);
      std::memcpy(p, &bits, 2);
      return;
    }
  }
}

}  // namespace fuzz
}  // namespace msda
