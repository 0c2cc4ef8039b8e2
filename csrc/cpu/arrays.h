// Scratch memory, and arrays whose dtype is known at run time only. Compiled once per instruction
// set.

#pragma once

#include <cstdlib>

#include "../problem.h"
#include "simd.h"

namespace msda {
namespace MSDA_CPU_CAPABILITY {

// An aligned array, not initialised. (No std container: the linker could choose its functions as
// compiled for this instruction set, and use them in all.)
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size) : data_(nullptr) {
    const size_t bytes = (size * sizeof(T) + kVectorBytes) / kVectorBytes * kVectorBytes;
    data_ = static_cast<T*>(std::aligned_alloc(kVectorBytes, bytes));
    if (data_ == nullptr) throw OutOfMemory{int64_t(bytes)};
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* get() { return data_; }
  const T* get() const { return data_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_;
};

inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// A copy of few bytes, without the call that std::memcpy is.
inline void copy_bytes(const void* from, void* to, int64_t count) {
  const char* const source = static_cast<const char*>(from);
  char* const target = static_cast<char*>(to);
  int64_t i = 0;
  for (; i + kVectorBytes <= count; i += kVectorBytes) {
    store_as(target + i, load_as<Vec<float>>(source + i));
  }
  if (i < count) std::memcpy(target + i, source + i, count - i);
}

// Copies count elements, converting between element types on the way.
template <class To, class From>
inline void convert(const From* from, To* to, int64_t count) {
  if constexpr (std::is_same_v<acc_t<To>, acc_t<From>>) {
    constexpr int lanes = kLanes<acc_t<To>>;
    int64_t i = 0;
    for (; i + lanes <= count; i += lanes) store(to + i, load(from + i));
    if (i < count) store_partial(to + i, load_partial(from + i, int(count - i)), int(count - i));
  } else if constexpr (std::is_arithmetic_v<To> && std::is_arithmetic_v<From>) {
    for (int64_t i = 0; i < count; ++i) store_as(to + i, static_cast<To>(load_as<From>(from + i)));
  } else {  // double <-> 16 bits, by way of float
    for (int64_t i = 0; i < count; ++i) {
      float single;
      convert(from + i, &single, 1);
      convert(&single, to + i, 1);
    }
  }
}

template <class Real>
inline void read(const ConstArray& array, int64_t offset, int64_t count, Real* to) {
  dispatch_dtype(array.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    convert(static_cast<const T*>(array.data) + offset, to, count);
  });
}

template <class Real>
constexpr DType dtype_of = std::is_same_v<Real, double> ? DType::kFloat64 : DType::kFloat32;

template <class Real>
inline void write(const Array& array, int64_t offset, int64_t count, const Real* from) {
  dispatch_dtype(array.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    convert(from, static_cast<T*>(array.data) + offset, count);
  });
}

// Numbers of a query that are read into a buffer one query ahead. They are written in pieces and
// loaded in vectors; a vector that spans several writes waits until they have reached the cache,
// and in backward, behind the scattered sums of pixels, that took longer than all else.
template <class Real>
class ReadAhead {
 public:
  // Holds `size` numbers, at first all `filling`.
  ReadAhead(int64_t size, Real filling) : size_(size), numbers_(2 * size) {
    for (int64_t i = 0; i < 2 * size; ++i) numbers_[i] = filling;
  }

  // The numbers of `query`; read(query, to) reads them. `next` is asked for next, or -1.
  template <class F>
  const Real* get(int64_t query, int64_t next, const F& read) {
    if (query != next_) read(query, other_half());
    const Real* const numbers = other_half();
    half_ = size_ - half_;
    if (next >= 0) read(next, other_half());
    next_ = next;
    return numbers;
  }

 private:
  Real* other_half() { return numbers_.get() + size_ - half_; }

  const int64_t size_;
  Buffer<Real> numbers_;
  int64_t half_ = 0, next_ = -1;
};

constexpr int64_t kCacheLine = 64;  // bytes

// Fetches count elements from offset on, before they are read or written: a line that is only
// written must be fetched, too, and stores wait for one another.
template <bool kToWrite, class AnyArray>
inline void prefetch(const AnyArray& array, int64_t offset, int64_t count) {
  const int64_t size = element_size(array.dtype);
  const intptr_t first = reinterpret_cast<intptr_t>(array.data) + offset * size;
  for (int64_t byte = 0; byte < count * size; byte += kCacheLine) {
    __builtin_prefetch(reinterpret_cast<const void*>(first + byte), kToWrite);
  }
}

}  // namespace MSDA_CPU_CAPABILITY
}  // namespace msda
