// Vectors of floats for the instruction set that this translation unit is compiled for.
// Everything lives in namespace RMT_ISA, which differs per unit: the linker must never merge two of them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define RMT_INLINE inline __attribute__((always_inline))

namespace rmt::RMT_ISA {

#if defined(__AVX512F__)
constexpr int W = 16;  // lanes
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));
typedef uint64_t vw __attribute__((vector_size(8 * W)));

constexpr float kInf = std::numeric_limits<float>::infinity();

template <class V, class T>
RMT_INLINE V load(const T* p) {
  V v;
  memcpy(&v, p, sizeof(V));
  return v;
}
template <class V, class T>
RMT_INLINE void store(T* p, V v) {
  memcpy(p, &v, sizeof(V));
}
RMT_INLINE vf splat(float x) { return vf{} + x; }
RMT_INLINE vi splat(int32_t x) { return vi{} + x; }
RMT_INLINE vi iota() {
  vi v;
  for (int i = 0; i < W; ++i) v[i] = i;
  return v;
}

#if defined(__AVX512F__)
RMT_INLINE vf max(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
RMT_INLINE vf min(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
RMT_INLINE float reduce_max(vf a) { return _mm512_reduce_max_ps((__m512)a); }
RMT_INLINE float reduce_add(vf a) { return _mm512_reduce_add_ps((__m512)a); }
#else
RMT_INLINE vf max(vf a, vf b) { return a > b ? a : b; }
RMT_INLINE vf min(vf a, vf b) { return a < b ? a : b; }
RMT_INLINE float reduce_max(vf a) {
  float m = a[0];
  for (int i = 1; i < W; ++i) m = m > a[i] ? m : a[i];
  return m;
}
RMT_INLINE float reduce_add(vf a) {
  float s = a[0];
  for (int i = 1; i < W; ++i) s += a[i];
  return s;
}
// Adding 1.5 * 2^23 leaves no fraction bits; for |a| < 2^22.
RMT_INLINE vf round(vf a) { return (a + 12582912.0f) - 12582912.0f; }
#endif

// 2^x. Degree 6 has relative error 9.6e-8, degree 4 2.7e-6 (minimax on [-1/2, 1/2]). Exact 0 at -inf, inf beyond 2^128.
template <int Degree>
RMT_INLINE vf exp2(vf x) {
#if defined(__AVX512F__)
  const vf f = (vf)_mm512_reduce_ps((__m512)x, 8), n = x - f;  // the part of an infinity is 0, so n keeps it
#else
  x = x < splat(-127.0f) ? splat(-127.0f) : x;
  x = x > splat(128.0f) ? splat(128.0f) : x;
  const vf n = round(x), f = x - n;
#endif
  vf p;
  if constexpr (Degree == 6) {
    p = splat(1.53458124e-4f);
    p = p * f + 1.33999309e-3f;
    p = p * f + 9.61848907e-3f;
    p = p * f + 5.55032864e-2f;
    p = p * f + 2.40226462e-1f;
    p = p * f + 6.93147182e-1f;
    p = p * f + 1.0f;
  } else {
    p = splat(9.57010220e-3f);
    p = p * f + 5.59178591e-2f;
    p = p * f + 2.40247443e-1f;
    p = p * f + 6.93121791e-1f;
    p = p * f + 9.99999285e-1f;
  }
#if defined(__AVX512F__)
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  // Two factors, so that n = 128 overflows to inf and n = -127 to 0 without leaving the exponent field.
  const vi e = __builtin_convertvector(n, vi), half = e >> 1;
  const vf a = (vf)((half + 127) << 23), b = (vf)((e - half + 127) << 23);
  return p * a * (n == splat(-127.0f) ? vf{} : b);
#endif
}

// float16 and bfloat16, as their bits.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

RMT_INLINE vf widen(const float* p) { return load<vf>(p); }
RMT_INLINE vf widen(const bf16* p) { return (vf)(__builtin_convertvector(load<vh>(p), vu) << 16); }
RMT_INLINE vf widen(const f16* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(load<__m256i>(p));
#elif defined(__F16C__) && defined(__AVX2__)
  return (vf)_mm256_cvtph_ps(load<__m128i>(p));
#else
  // Shift exponent and fraction into place, then scale by 2^112; inf and NaN get the full exponent back.
  const vu h = __builtin_convertvector(load<vh>(p), vu), magnitude = (h & 0x7FFFu) << 13;
  const vf scaled = (vf)magnitude * 5.192296858534828e33f;
  const vu special = (vu)(magnitude >= (0x7C00u << 13));
  return (vf)((h & 0x8000u) << 16 | ((vu)scaled & ~special) | ((magnitude | 0x7F800000u) & special));
#endif
}
RMT_INLINE void narrow(float* p, vf x) { store(p, x); }
RMT_INLINE void narrow(bf16* p, vf x) {
#if defined(__AVX512BF16__)
  store(p, _mm512_cvtneps_pbh((__m512)x));
#else
  const vu u = (vu)x, rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  const vu nan = (vu)(x != x);
  store(p, __builtin_convertvector((rounded & ~nan) | (0x7FC0u & nan), vh));
#endif
}
RMT_INLINE void narrow(f16* p, vf x) {
#if defined(__AVX512F__)
  store(p, _mm512_cvtps_ph((__m512)x, 0));
#elif defined(__F16C__) && defined(__AVX2__)
  store(p, _mm256_cvtps_ph((__m256)x, 0));
#else
  // Normal halves: rebias and round to nearest even. Small ones: adding 0.5 lets the float unit round at 2^-24.
  const vu u = (vu)x, sign = (u >> 16) & 0x8000u, magnitude = u & 0x7FFFFFFFu;
  const vu normal = (magnitude - (112u << 23) + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  const vu small = (vu)((vf)magnitude + 0.5f) - 0x3F000000u;
  vu half = magnitude < (113u << 23) ? small : normal;
  half = magnitude >= 0x477FF000u ? vu{} + 0x7C00u : half;
  half = magnitude > 0x7F800000u ? vu{} + 0x7E00u : half;
  store(p, __builtin_convertvector(sign | half, vh));
#endif
}

// The first `count` < W elements of a row; the rest reads as 0 and is never touched.
template <class T>
RMT_INLINE vf widen_part(const T* p, int count) {
  T buffer[W] = {};
  memcpy(buffer, p, count * sizeof(T));
  return widen(buffer);
}
template <class T>
RMT_INLINE void narrow_part(T* p, vf x, int count) {
  T buffer[W];
  narrow(buffer, x);
  memcpy(p, buffer, count * sizeof(T));
}

}  // namespace rmt::RMT_ISA
