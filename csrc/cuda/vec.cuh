// Numbers, vectors of up to 16 bytes, and the loads, stores and atomic additions that move them.
// PTX stands behind __CUDA_ARCH__; its scalar twin lets the kernels run on a CPU in tests. Kernels
// touch memory through these functions alone: where they run on a CPU, each announces its access,
// and the executor counts the accesses of a warp.

#pragma once

#include <cuda_runtime.h>

#include <cassert>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels.h"

#ifdef __CUDACC__
#define MSDA_DEVICE __device__ __forceinline__
#else
// In line, so that each use of a function below is a place of its own in the code.
#define MSDA_DEVICE inline __attribute__((always_inline))
#endif

namespace msda {

// ---- one number ---------------------------------------------------------------------------------

template <class To, class From>
MSDA_DEVICE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

MSDA_DEVICE double widen(double x) { return x; }
MSDA_DEVICE float widen(float x) { return x; }
MSDA_DEVICE float widen(BFloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
MSDA_DEVICE float widen(Half x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  const int exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
  const float magnitude = exponent == 31  ? (mantissa ? NAN : INFINITY)
                          : exponent == 0 ? std::ldexp(float(mantissa), -24)
                                          : std::ldexp(float(mantissa | 1024), exponent - 25);
  return x.bits >> 15 ? -magnitude : magnitude;
#endif
}

// Rounds to nearest, ties to even.
template <class T>
MSDA_DEVICE T narrow(acc_t<T> x) {
  if constexpr (std::is_same_v<T, Half>) {
#ifdef __CUDA_ARCH__
    Half y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
#else
    if (std::isnan(x)) return {0x7fff};
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    const float magnitude = std::fabs(x);
    if (magnitude >= 65520) return {uint16_t(sign | 0x7c00)};
    const int exponent = magnitude < 6.103515625e-5f ? -14 : std::ilogb(magnitude);
    // A mantissa that rounds up to 2048 carries into the exponent, as it should.
    const int mantissa = int(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
    return {uint16_t(sign | (((exponent + 14) << 10) + mantissa))};
#endif
  } else if constexpr (std::is_same_v<T, BFloat16>) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    BFloat16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
#else
    const uint32_t bits = bit_cast<uint32_t>(x);
    if (x != x) return {0x7fff};
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
#endif
  } else {
    return x;
  }
}

// ---- counted accesses ---------------------------------------------------------------------------

enum class Access { kLoad, kStore, kReduction };

// Where the kernels run on a CPU: this thread accesses memory, or, if condition is false, waits
// while others of its warp do.
MSDA_DEVICE void count([[maybe_unused]] Access access, [[maybe_unused]] const void* p,
                       [[maybe_unused]] int bytes, [[maybe_unused]] bool condition = true) {
#ifndef __CUDACC__
  executor::count(int(access), condition ? p : nullptr, bytes);
#endif
}

// The same for a whole struct, in shared memory for example, which the compiler moves as it likes:
// it counts in pieces of at most 16 bytes.
template <class Struct>
MSDA_DEVICE void count_struct([[maybe_unused]] Access access,
                              [[maybe_unused]] const Struct& place) {
#ifndef __CUDACC__
  constexpr int kPiece = 16;
  for (int i = 0; i < int(sizeof(Struct)); i += kPiece) {
    const int rest = int(sizeof(Struct)) - i;
    count(access, reinterpret_cast<const char*>(&place) + i, rest < kPiece ? rest : kPiece);
  }
#endif
}

// ---- vectors ------------------------------------------------------------------------------------

constexpr int kMaxVectorBytes = 16;

// kVec neighbouring numbers as the bits that are moved. (Not as an array of them: the compiler
// would keep each 16-bit number in a register of its own.)
template <class T, int kVec>
struct alignas(kVec * sizeof(T)) Packed {
  static_assert(kVec * sizeof(T) <= kMaxVectorBytes);
  using Word = std::conditional_t<kVec * sizeof(T) == 2, uint16_t, uint32_t>;
  Word words[kVec * sizeof(T) / sizeof(Word)];
};

template <class T, int kVec>
MSDA_DEVICE acc_t<T> element(const Packed<T, kVec>& v, int i) {
  if constexpr (std::is_same_v<T, float>) {
    return bit_cast<float>(v.words[i]);
  } else if constexpr (std::is_same_v<T, double>) {
    return bit_cast<double>(uint64_t(v.words[2 * i + 1]) << 32 | v.words[2 * i]);
  } else if constexpr (std::is_same_v<T, BFloat16> && kVec > 1) {
    uint32_t bits = i % 2 ? v.words[i / 2] & 0xffff0000u : v.words[i / 2] << 16;
#ifdef __CUDA_ARCH__
    asm volatile("" : "+r"(bits));  // or the compiler moves it into a branch, and keeps the branch
#endif
    return bit_cast<float>(bits);
  } else {
    return widen(T{uint16_t(v.words[i / 2] >> 16 * (i % 2))});
  }
}

template <class T, int kVec>
MSDA_DEVICE Packed<T, kVec> pack(const acc_t<T> (&x)[kVec]) {
  T rounded[kVec];
#pragma unroll
  for (int i = 0; i < kVec; ++i) rounded[i] = narrow<T>(x[i]);
  Packed<T, kVec> v;
  memcpy(&v, rounded, sizeof(v));
  return v;
}

// The machine's type of the same size, which one instruction moves.
template <class V>
using MachineWord = std::conditional_t<
    sizeof(V) == 16, uint4,
    std::conditional_t<sizeof(V) == 8, uint2,
                       std::conditional_t<sizeof(V) == 4, uint32_t,
                                          std::conditional_t<sizeof(V) == 2, uint16_t, uint8_t>>>>;

// p + index * stride, in bytes, in one instruction, to which the compiler must be led: a stride
// known in advance becomes shifts and additions unless it cannot see what p is, another one a
// product of 64 bits.
template <bool kKnownStride, class T>
MSDA_DEVICE T* advance(T* p, int32_t index, int32_t stride) {
#ifdef __CUDA_ARCH__
  if constexpr (!kKnownStride) {
    int64_t address;
    asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(address) : "r"(index), "r"(stride), "l"(p));
    return reinterpret_cast<T*>(address);
  }
  asm("" : "+l"(p));
#endif
  return reinterpret_cast<T*>(reinterpret_cast<intptr_t>(p) + int64_t(index) * stride);
}

// v = the vector at p where condition is true; else v keeps what it held, and p is not touched.
// Read through the non-coherent cache: nobody writes there while the kernel runs.
template <class V>
MSDA_DEVICE void load_if(bool condition, const void* p, V& v) {
  count(Access::kLoad, p, sizeof(V), condition);
#ifdef __CUDA_ARCH__
  if (condition) v = bit_cast<V>(__ldg(static_cast<const MachineWord<V>*>(p)));
#else
  memset(&v, 0xff, sizeof(V));  // NaN: a use of what was not loaded shows
  if (condition) v = *static_cast<const V*>(p);
#endif
}

template <class V>
MSDA_DEVICE V load(const void* p) {
  count(Access::kLoad, p, sizeof(V));
  if constexpr (std::is_arithmetic_v<V>) return *static_cast<const V*>(p);
  return bit_cast<V>(*static_cast<const MachineWord<V>*>(p));
}

// The same for what nobody else will ask for: it leaves the pixels in L1 alone.
template <class V>
MSDA_DEVICE V load_once(const void* p) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(V) == 4) {
    uint32_t word;
    asm("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(word) : "l"(p));
    return bit_cast<V>(word);
  } else if constexpr (sizeof(V) == 8) {
    uint2 words;
    asm("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
        : "=r"(words.x), "=r"(words.y)
        : "l"(p));
    return bit_cast<V>(words);
  }
#endif
  return load<V>(p);
}

template <class V>
MSDA_DEVICE void store(void* p, const V& v) {
  count(Access::kStore, p, sizeof(V));
  *static_cast<MachineWord<V>*>(p) = bit_cast<MachineWord<V>>(v);
}

// sum += w * v where condition is true; else v does not matter.
template <class T, int kVec>
MSDA_DEVICE void multiply_add_if(bool condition, acc_t<T> w, const Packed<T, kVec>& v,
                                 acc_t<T> (&sum)[kVec]) {
  acc_t<T> x[kVec];  // unpacked in any case: the rest is short enough to need no branch
#pragma unroll
  for (int i = 0; i < kVec; ++i) x[i] = element(v, i);
  if (!condition) return;
#pragma unroll
  for (int i = 0; i < kVec; ++i) sum[i] += w * x[i];
}

// ---- arrays of a dtype known at run time --------------------------------------------------------

// dispatch_dtype on a GPU, in line. The branches are the same for all threads. As cases of a switch
// they would cost a kernel local memory; the empty one makes the compiler find a missing dtype.
template <class F>
MSDA_DEVICE auto with_element_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32:
    case DType::kBFloat16:
    case DType::kFloat16:
    case DType::kFloat64:
      break;
  }
  if (dtype == DType::kFloat32) return f(static_cast<float*>(nullptr));
  if (dtype == DType::kBFloat16) return f(static_cast<BFloat16*>(nullptr));
  if (dtype == DType::kFloat16) return f(static_cast<Half*>(nullptr));
  return f(static_cast<double*>(nullptr));
}

template <class Real>
MSDA_DEVICE Real load_number(const ConstArray& array, int64_t i) {
  return with_element_type(array.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return Real(widen(load<T>(static_cast<const T*>(array.data) + i)));
  });
}

template <class Real>
struct Pair {
  Real x, y;
};

// Pair i of an array aligned to pairs.
template <class Real>
MSDA_DEVICE Pair<Real> load_pair(const ConstArray& array, int64_t i) {
  return with_element_type(array.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto pair = load<Packed<T, 2>>(static_cast<const T*>(array.data) + 2 * i);
    return Pair<Real>{Real(element(pair, 0)), Real(element(pair, 1))};
  });
}

template <class Real>
MSDA_DEVICE void store_number(const Array& array, int64_t i, Real x) {
  with_element_type(array.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    store(static_cast<T*>(array.data) + i, narrow<T>(acc_t<T>(x)));
  });
}

template <class Real>
MSDA_DEVICE void store_pair(const Array& array, int64_t i, Pair<Real> pair) {
  with_element_type(array.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const acc_t<T> numbers[2] = {acc_t<T>(pair.x), acc_t<T>(pair.y)};
    store(static_cast<T*>(array.data) + 2 * i, pack<T>(numbers));
  });
}

// ---- atomic additions ---------------------------------------------------------------------------

// One instruction adds so many neighbouring numbers of kVec: four floats from compute capability
// 9.0 on, else one. A constant on a GPU.
template <class Real, int kVec>
MSDA_DEVICE int reduction_width() {
  [[maybe_unused]] constexpr int kWidest = std::is_same_v<Real, float> && kVec % 4 == 0 ? 4 : 1;
#ifndef __CUDACC__
  return executor::compute_capability() >= 90 ? kWidest : 1;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  return kWidest;
#else
  return 1;
#endif
}

// One instruction: p[i] += x[i] for each i < width, each addition atomic by itself. PTX, because
// the compiler does not see that p is in global memory and would test for it.
template <class Real>
MSDA_DEVICE void atomic_add(Real* p, const Real* x, int width) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if constexpr (std::is_same_v<Real, float>) {
    if (width == 4) {
      asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(p), "f"(x[0]), "f"(x[1]),
                   "f"(x[2]), "f"(x[3])
                   : "memory");
      return;
    }
  }
#endif
#ifdef __CUDA_ARCH__
  if constexpr (std::is_same_v<Real, float>) {
    asm volatile("red.global.add.f32 [%0], %1;" ::"l"(p), "f"(*x) : "memory");
  } else {
    asm volatile("red.global.add.f64 [%0], %1;" ::"l"(p), "d"(*x) : "memory");
  }
#else
  assert(reinterpret_cast<uintptr_t>(p) % (width * sizeof(Real)) == 0);
  for (int i = 0; i < width; ++i) atomicAdd(p + i, x[i]);
#endif
}

}  // namespace msda
