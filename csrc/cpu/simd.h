// Vectors of one instruction set, through the compiler's vector extensions. This file is compiled
// once per instruction set (see CMakeLists.txt); everything it defines lives in a namespace named
// after the set, so that no two sets ever share a function. Intrinsics appear here and only here.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "../dtypes.h"

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#ifndef MSDA_CPU_CAPABILITY
#error "MSDA_CPU_CAPABILITY names the instruction set this file is compiled for"
#endif

// Before a loop whose arrays must stay in registers: the compiler writes every turn out.
#if defined(__clang__)
#define MSDA_UNROLL _Pragma("unroll")
#else
#define MSDA_UNROLL _Pragma("GCC unroll 16")
#endif

namespace msda {
namespace MSDA_CPU_CAPABILITY {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;  // SSE2, NEON: part of every 64-bit x86 and Arm machine
#endif

// The integer as wide as a coordinate, so that masks and indices line up with it lane by lane.
template <class Real>
using index_t = std::conditional_t<std::is_same_v<Real, double>, int64_t, int32_t>;

template <class T, int N>
struct VectorOf {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};
template <class T, int N>
using VecN = typename VectorOf<T, N>::type;

template <class Real>
constexpr int kLanes = kVectorBytes / int(sizeof(Real));
template <class Real>
using Vec = VecN<Real, kLanes<Real>>;
template <class Real>
using IntVec = VecN<index_t<Real>, kLanes<Real>>;

// Arrays of callers need not be aligned to their elements: only these two and intrinsics read and
// write through a pointer into them.
template <class V>
inline V load_as(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

template <class V>
inline void store_as(void* p, V v) {
  std::memcpy(p, &v, sizeof(V));
}

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

template <class Real>
inline Vec<Real> broadcast(Real x) {
  return x - Vec<Real>{};
}

inline Vec<int64_t> widen_half(IntVec<float> v, int first) {
#if defined(__AVX512F__)
  const __m512i all = (__m512i)v;
  return (Vec<int64_t>)_mm512_cvtepi32_epi64(first == 0 ? _mm512_castsi512_si256(all)
                                                        : _mm512_extracti64x4_epi64(all, 1));
#elif defined(__AVX2__)
  const __m256i all = (__m256i)v;
  return (Vec<int64_t>)_mm256_cvtepi32_epi64(first == 0 ? _mm256_castsi256_si128(all)
                                                        : _mm256_extracti128_si256(all, 1));
#else
  typedef VecN<int32_t, kLanes<int64_t>> Part;
  int32_t lanes[kLanes<float>];
  store_as(lanes, v);
  return __builtin_convertvector(load_as<Part>(lanes + first), Vec<int64_t>);
#endif
}

// Lanes first..first + kLanes<To> - 1 of a vector of integers, as integers of type To.
template <class To, class V>
inline Vec<To> widen(V v, int first) {
  if constexpr (std::is_same_v<V, Vec<To>>) {
    return v;
  } else {
    return widen_half(v, first);
  }
}

template <class Real>
inline VecN<Real, kLanes<Real>> truncate_lanes(Vec<Real> v) {
  return __builtin_convertvector(__builtin_convertvector(v, IntVec<Real>), Vec<Real>);
}

// Towards zero; for numbers that fit an integer.
inline Vec<float> truncate(Vec<float> v) { return truncate_lanes<float>(v); }
inline Vec<double> truncate(Vec<double> v) { return truncate_lanes<double>(v); }

// Within [0, 1]. Two instructions, where GCC makes four of the conditions.
inline Vec<double> clamp(Vec<double> v) {
  const Vec<double> one = broadcast(1.0), positive = v > 0 ? v : Vec<double>{};
  return positive < 1 ? positive : one;
}

inline Vec<float> clamp(Vec<float> v) {
  const Vec<float> one = broadcast(1.0f);
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_min_ps(_mm512_max_ps((__m512)v, _mm512_setzero_ps()), (__m512)one);
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_min_ps(_mm256_max_ps((__m256)v, _mm256_setzero_ps()), (__m256)one);
#elif defined(__SSE2__)
  return (Vec<float>)_mm_min_ps(_mm_max_ps((__m128)v, _mm_setzero_ps()), (__m128)one);
#elif defined(__ARM_NEON)
  return (Vec<float>)vminq_f32(vmaxq_f32((float32x4_t)v, vdupq_n_f32(0)), (float32x4_t)one);
#else
  const Vec<float> positive = v > 0 ? v : Vec<float>{};
  return positive < 1 ? positive : one;
#endif
}

// a * b + c, rounded once; of double, where the instruction set can.
inline Vec<double> multiply_add(Vec<double> a, Vec<double> b, Vec<double> c) {
#if defined(__AVX512F__)
  return (Vec<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__FMA__)
  return (Vec<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif defined(__ARM_NEON)
  return (Vec<double>)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#else
  return a * b + c;
#endif
}

inline Vec<float> multiply_add(Vec<float> a, Vec<float> b, Vec<float> c) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (Vec<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON)
  return (Vec<float>)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  typedef VecN<double, kLanes<float>> Wide;  // holds the product exactly
  return __builtin_convertvector(
      __builtin_convertvector(a, Wide) * __builtin_convertvector(b, Wide) +
          __builtin_convertvector(c, Wide),
      Vec<float>);
#endif
}

// sum + a * b, rounded once where the instruction set can. Written out: left to the compiler, two
// instances of a kernel could round differently, and their bits are to be the same.
template <class V>
inline V add_product(V sum, V a, V b) {
#if defined(__FMA__) || defined(__ARM_NEON)
  return multiply_add(a, b, sum);
#else
  return sum + a * b;
#endif
}

// a * b - 1/2, and in rest what it lost to rounding.
inline Vec<double> multiply_subtract_half(Vec<double> a, Vec<double> b, Vec<double>& rest) {
  rest = Vec<double>{};
  return a * b - 0.5;
}

inline Vec<float> multiply_subtract_half(Vec<float> a, Vec<float> b, Vec<float>& rest) {
  const Vec<float> half = broadcast(0.5f);
  const Vec<float> rounded = multiply_add(a, b, -half);
  // rounded + 1/2 is sum + lost (Knuth), and a * b so close to sum that the difference is exact.
  const Vec<float> sum = rounded + half;
  const Vec<float> other = sum - half;
  const Vec<float> lost = (rounded - other) + (half - (sum - other));
  rest = multiply_add(a, b, -sum) - lost;
  return rounded;
}

// ---- loads: kLanes elements as acc_t ------------------------------------------------------------

inline Vec<float> load(const float* p) { return load_as<Vec<float>>(p); }
inline Vec<double> load(const double* p) { return load_as<Vec<double>>(p); }

using Bits16 = VecN<uint16_t, kLanes<float>>;
using Bits32 = VecN<uint32_t, kLanes<float>>;

// One instruction, which GCC does not make of the conversion.
inline Bits32 widen(Bits16 v) {
#if defined(__AVX512F__)
  return (Bits32)_mm512_cvtepu16_epi32((__m256i)v);
#elif defined(__AVX2__)
  return (Bits32)_mm256_cvtepu16_epi32((__m128i)v);
#else
  return __builtin_convertvector(v, Bits32);
#endif
}

inline Vec<float> load(const BFloat16* p) {
  return bit_cast<Vec<float>>(widen(load_as<Bits16>(p)) << 16);
}

inline Vec<float> load(const Half* p) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_cvtph_ps(load_as<__m256i>(p));
#elif defined(__F16C__)
  return (Vec<float>)_mm256_cvtph_ps(load_as<__m128i>(p));
#elif defined(__ARM_NEON)
  return (Vec<float>)vcvt_f32_f16(vreinterpret_f16_u16(load_as<uint16x4_t>(p)));
#else
  // Place exponent and mantissa where float32 has them and correct the bias by a multiplication,
  // which also makes subnormals right; Inf and NaN then lack the rest of their exponent bits.
  const Bits32 half = widen(load_as<Bits16>(p));
  const Bits32 magnitude = (half & 0x7fff) << 13;
  const Vec<float> scaled = bit_cast<Vec<float>>(magnitude) * 0x1p112f;
  const Bits32 special = (Bits32)((half & 0x7c00) == 0x7c00) & 0x7f800000;
  return bit_cast<Vec<float>>(bit_cast<Bits32>(scaled) | special | ((half & 0x8000) << 16));
#endif
}

// ---- stores: kLanes elements, rounded to nearest even -------------------------------------------

inline void store(float* p, Vec<float> v) { store_as(p, v); }
inline void store(double* p, Vec<double> v) { store_as(p, v); }

inline void store(BFloat16* p, Vec<float> v) {
  const Bits32 bits = bit_cast<Bits32>(v);
  const Bits32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Bits32 quiet_nan = (bits >> 16) | 0x40;
  const Bits32 is_nan = (Bits32)(v != v);
  store_as(p, __builtin_convertvector((is_nan & quiet_nan) | (~is_nan & rounded), Bits16));
}

inline void store(Half* p, Vec<float> v) {
#if defined(__AVX512F__)
  store_as(p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  store_as(p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__ARM_NEON)
  store_as(p, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)v)));
#else
  const Bits32 bits = bit_cast<Bits32>(v);
  const Bits32 sign = (bits >> 16) & 0x8000;
  const Bits32 magnitude = bits & 0x7fffffff;
  // Normal numbers: move the exponent bias, round the 13 dropped bits to nearest even. Subnormal
  // results: adding 1/2 leaves the float adder to align and round the mantissa.
  const Bits32 normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const Bits32 subnormal =
      bit_cast<Bits32>(bit_cast<Vec<float>>(magnitude) + 0.5f) - (uint32_t(126) << 23);
  const Bits32 is_small = (Bits32)(magnitude < (113u << 23));
  const Bits32 is_large = (Bits32)(magnitude >= 0x477ff000u);  // rounds to 65536 or more, or NaN
  const Bits32 special = 0x7c00 | ((Bits32)(magnitude > 0x7f800000u) & 0x200);
  const Bits32 finite = (is_small & subnormal) | (~is_small & normal);
  const Bits32 half = sign | (is_large & special) | (~is_large & finite);
  store_as(p, __builtin_convertvector(half, Bits16));
#endif
}

// ---- the last vector of a row whose length is not a multiple of kLanes --------------------------

template <class T>
inline Vec<acc_t<T>> load_partial(const T* p, int count) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  if constexpr (std::is_same_v<T, float>) {
    return (Vec<float>)_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), p);
  } else if constexpr (sizeof(T) == 2) {
    T buffer[kLanes<float>];
    store_as(buffer, _mm256_maskz_loadu_epi16(__mmask16((1u << count) - 1), p));
    return load(buffer);
  }
#endif
  T buffer[kLanes<acc_t<T>>] = {};
  for (int i = 0; i < count; ++i) buffer[i] = load_as<T>(p + i);
  return load(buffer);
}

template <class T>
inline void store_partial(T* p, Vec<acc_t<T>> v, int count) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) {
    return _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1), (__m512)v);
  }
#endif
  T buffer[kLanes<acc_t<T>>];
  store(buffer, v);
  for (int i = 0; i < count; ++i) store_as(p + i, buffer[i]);
}

// ---- shuffles -----------------------------------------------------------------------------------

template <class V, int... I>
inline V even_lanes(V a, V b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (2 * I)...);
}

template <class V, int... I>
inline V odd_lanes(V a, V b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (2 * I + 1)...);
}

template <class V, int... I>
inline V interleave(V a, V b, int offset, std::integer_sequence<int, I...>) {
  constexpr int n = sizeof...(I);
  return offset == 0 ? __builtin_shufflevector(a, b, (I % 2 * n + I / 2)...)
                     : __builtin_shufflevector(a, b, (I % 2 * n + n / 2 + I / 2)...);
}

// Swaps each run of kRun lanes with its neighbour.
template <int kRun, class V, int... I>
inline V swap_runs(V v, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(v, v, (I ^ kRun)...);
}

// (x0, y0, x1, y1, ...) in memory <-> a vector of x and a vector of y.
template <class Real>
inline void load_pairs(const Real* p, Vec<Real>& x, Vec<Real>& y) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes<Real>>();
  const Vec<Real> low = load(p), high = load(p + kLanes<Real>);
  x = even_lanes(low, high, lanes);
  y = odd_lanes(low, high, lanes);
}

// (a0, b0, c0, d0, a1, ...) in memory: four vectors of four numbers per lane.
template <class Real>
inline void load_quads(const Real* p, Vec<Real>& a, Vec<Real>& b, Vec<Real>& c, Vec<Real>& d) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes<Real>>();
  Vec<Real> ac_low, bd_low, ac_high, bd_high;
  load_pairs(p, ac_low, bd_low);
  load_pairs(p + 2 * kLanes<Real>, ac_high, bd_high);
  a = even_lanes(ac_low, ac_high, lanes);
  b = even_lanes(bd_low, bd_high, lanes);
  c = odd_lanes(ac_low, ac_high, lanes);
  d = odd_lanes(bd_low, bd_high, lanes);
}

template <class Real>
inline void store_pairs(Real* p, Vec<Real> x, Vec<Real> y) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes<Real>>();
  store(p, interleave(x, y, 0, lanes));
  store(p + kLanes<Real>, interleave(x, y, 1, lanes));
}

// Lane j of v = load(p) in all lanes; `index` holds j in all lanes. From the register where the
// instruction set can, because load ports are what the kernels are short of.
inline Vec<double> broadcast_lane(Vec<double>, IntVec<double>, const double* p, int j) {
  return broadcast(p[j]);
}

inline Vec<float> broadcast_lane([[maybe_unused]] Vec<float> v,
                                 [[maybe_unused]] IntVec<float> index,
                                 [[maybe_unused]] const float* p, [[maybe_unused]] int j) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_permutexvar_ps((__m512i)index, (__m512)v);
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_permutevar8x32_ps((__m256)v, (__m256i)index);
#else
  return broadcast(p[j]);
#endif
}

// Lane i is table[index[i]]. The table holds `size` numbers, and is readable to a whole vector.
inline Vec<float> take(const float* table, [[maybe_unused]] int64_t size, IntVec<float> index) {
  Vec<float> v = {};
#if defined(__AVX2__)
  for (int first = 0; first < size; first += kLanes<float>) {
    const Vec<float> part = broadcast_lane(load(table + first), index, nullptr, 0);
    v = (index & -kLanes<float>) == first ? part : v;
  }
#else
  for (int i = 0; i < kLanes<float>; ++i) v[i] = table[index[i]];
#endif
  return v;
}

inline Vec<double> take(const double* table, int64_t, IntVec<double> index) {
  Vec<double> v;
  for (int i = 0; i < kLanes<double>; ++i) v[i] = table[index[i]];
  return v;
}

// The lanes of a vector brought together by f, which takes two vectors: halves first.
template <class V, class F>
inline auto reduce_lanes(V v, const F& f) {
  constexpr int n = sizeof(V) / sizeof(v[0]);
  if constexpr (n > 8) v = f(v, swap_runs<8>(v, std::make_integer_sequence<int, n>()));
  if constexpr (n > 4) v = f(v, swap_runs<4>(v, std::make_integer_sequence<int, n>()));
  if constexpr (n > 2) v = f(v, swap_runs<2>(v, std::make_integer_sequence<int, n>()));
  if constexpr (n > 1) v = f(v, swap_runs<1>(v, std::make_integer_sequence<int, n>()));
  return v[0];
}

// The same within each run of `count` lanes, in all of its lanes.
template <class V, class F>
inline V reduce_runs(V v, int64_t count, const F& f) {
  constexpr int n = sizeof(V) / sizeof(v[0]);
  constexpr auto lanes = std::make_integer_sequence<int, n>();
  if constexpr (n > 8) v = count > 8 ? f(v, swap_runs<8>(v, lanes)) : v;
  if constexpr (n > 4) v = count > 4 ? f(v, swap_runs<4>(v, lanes)) : v;
  if constexpr (n > 2) v = count > 2 ? f(v, swap_runs<2>(v, lanes)) : v;
  if constexpr (n > 1) v = count > 1 ? f(v, swap_runs<1>(v, lanes)) : v;
  return v;
}

template <class V>
inline auto sum_lanes(V v) {
  return reduce_lanes(v, [](V a, V b) { return a + b; });
}

// No lane may be NaN.
template <class V>
inline auto largest_lane(V v) {
  return reduce_lanes(v, [](V a, V b) { return a > b ? a : b; });
}

// Groups of four lanes in a vector, or one group where it is shorter.
template <class Real>
constexpr int kQuads = kLanes<Real> < 4 ? 1 : kLanes<Real> / 4;

// The sums of the lanes of 4 * kQuads vectors, side by side: number 4 * i + c is that of v[i][c].
// One vector, except where a vector has fewer than four lanes.
inline void store_lane_sums(double* to, const Vec<double> (&v)[kQuads<double>][4], bool add) {
  for (int i = 0; i < kQuads<double>; ++i) {
    for (int c = 0; c < 4; ++c) to[4 * i + c] = sum_lanes(v[i][c]) + (add ? to[4 * i + c] : 0);
  }
}

// Neighbouring lanes of a and of b added up, in turn: within groups of four lanes, of a, b, a, b.
template <int... I>
inline Vec<float> add_neighbours(Vec<float> a, Vec<float> b, std::integer_sequence<int, I...>) {
  constexpr int n = sizeof...(I);
  return __builtin_shufflevector(a, b, (I / 4 * 4 + I % 2 * 2 + I % 4 / 2 * n)...) +
         __builtin_shufflevector(a, b, (I / 4 * 4 + I % 2 * 2 + 1 + I % 4 / 2 * n)...);
}

// Neighbouring groups of four lanes added up: first those of a, then those of b.
template <int... I>
inline Vec<float> add_groups(Vec<float> a, Vec<float> b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (I / 4 * 8 + I % 4)...) +
         __builtin_shufflevector(a, b, (I / 4 * 8 + I % 4 + 4)...);
}

inline void store_lane_sums(float* to, const Vec<float> (&v)[kQuads<float>][4], bool add) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes<float>>();
  Vec<float> sums[kQuads<float>];
  // Each group of four lanes: parts of its four sums.
  MSDA_UNROLL for (int i = 0; i < kQuads<float>; ++i) {
    const Vec<float> pairs[] = {add_neighbours(v[i][0], v[i][1], lanes),
                                add_neighbours(v[i][2], v[i][3], lanes)};
    sums[i] = add_neighbours(pairs[0], pairs[1], lanes);
  }
  MSDA_UNROLL for (int n = kQuads<float>; n > 1; n /= 2) {
    MSDA_UNROLL for (int i = 0; i < n / 2; ++i) {
      sums[i] = add_groups(sums[2 * i], sums[2 * i + 1], lanes);
    }
  }
  store(to, add ? sums[0] + load(to) : sums[0]);
}

// ---- exponential --------------------------------------------------------------------------------

// e^x for x <= 0, as softmax needs it: within 2 ulp, e^-inf = 0, NaN stays NaN. Results below the
// smallest normal number become 0.
inline Vec<float> exp_nonpositive(Vec<float> x) {
  const Vec<float> smallest = broadcast(-87.33654f);  // log(2^-126)
  const auto underflows = x < smallest;
  const Vec<float> t = underflows ? smallest : x;
  // x = k log(2) + r with |r| <= log(2)/2; adding 1.5 * 2^23 rounds k into the low mantissa bits.
  const Vec<float> magic = broadcast(12582912.0f);
  const Vec<float> shifted = t * 1.44269504f + magic;
  const Vec<float> k = shifted - magic;
  const Vec<float> r = (t - k * 0.693359375f) + k * 2.12194440e-4f;
  Vec<float> p = broadcast(1.0f / 5040);  // Taylor polynomial of degree 7
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const Bits32 exponent = bit_cast<Bits32>(shifted) << 23;
  const Vec<float> result = bit_cast<Vec<float>>(bit_cast<Bits32>(p) + exponent);
  return x != x ? x : underflows ? Vec<float>{} : result;
}

inline Vec<double> exp_nonpositive(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

}  // namespace MSDA_CPU_CAPABILITY
}  // namespace msda
