// The vector vocabulary of the CPU kernels: one fp32 vector type and what is done with it, for AVX-512, AVX2 and, in
// GCC vector extensions, any other CPU. A kernel file is compiled once a level (setup.py) and everything here has
// internal linkage: a shared inline function compiled with AVX-512 could otherwise be linked into the plain level.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace slowfast::cpu {
namespace {

struct BF16 { uint16_t bits; };
struct F16 { uint16_t bits; };

#define SLOWFAST_INLINE inline __attribute__((always_inline))

SLOWFAST_INLINE float from_bits(uint32_t bits) { float x; std::memcpy(&x, &bits, 4); return x; }
SLOWFAST_INLINE uint32_t to_bits(float x) { uint32_t bits; std::memcpy(&bits, &x, 4); return bits; }

// ---- scalars: tails, and all of the plain level's conversions

SLOWFAST_INLINE float to_float(float x) { return x; }
SLOWFAST_INLINE float to_float(BF16 x) { return from_bits(uint32_t(x.bits) << 16); }
SLOWFAST_INLINE float to_float(F16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return from_bits(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);   // inf, NaN
  return from_bits(sign | to_bits(from_bits(magnitude << 13) * 0x1p112f));   // exact, subnormals too
}

SLOWFAST_INLINE void from_float(float x, float* to) { *to = x; }
SLOWFAST_INLINE void from_float(float x, BF16* to) {
  const uint32_t bits = to_bits(x);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  to->bits = uint16_t((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16 | 0x40) : rounded);
}
SLOWFAST_INLINE void from_float(float x, F16* to) {
  const uint32_t bits = to_bits(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) { to->bits = uint16_t(sign | 0x7e00); return; }
  if (magnitude >= 0x477ff000) { to->bits = uint16_t(sign | 0x7c00); return; }   // rounds to 2^16 or is larger
  if (magnitude < 0x38800000) {   // subnormal half: let an fp32 addition do the rounding
    to->bits = uint16_t(sign | (to_bits(from_bits(magnitude) + 0.5f) - to_bits(0.5f)));
    return;
  }
  to->bits = uint16_t(sign | (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

// ---- vectors

#if defined(__AVX512F__)

using Vec = __m512;
constexpr int kLanes = 16;
constexpr bool kManyRegisters = true;

SLOWFAST_INLINE Vec zero() { return _mm512_setzero_ps(); }
SLOWFAST_INLINE Vec splat(float x) { return _mm512_set1_ps(x); }
SLOWFAST_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
SLOWFAST_INLINE Vec load(const BF16* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
SLOWFAST_INLINE Vec load(const F16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
SLOWFAST_INLINE void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
SLOWFAST_INLINE void store(BF16* p, Vec x) {   // not the AVX512-BF16 instruction, which drops subnormals
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i even = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), even);
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __m512i kept = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), quiet);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16)));
}
SLOWFAST_INLINE void store(F16* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
SLOWFAST_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
SLOWFAST_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
SLOWFAST_INLINE float sum(Vec x) { return _mm512_reduce_add_ps(x); }
// In each lane: begin <= x < end ? inside : outside.
SLOWFAST_INLINE Vec where_within(Vec x, Vec begin, Vec end, Vec inside, Vec outside) {
  const __mmask16 from = _mm512_cmp_ps_mask(begin, x, _CMP_LE_OQ);
  return _mm512_mask_mov_ps(outside, _mm512_mask_cmp_ps_mask(from, x, end, _CMP_LT_OQ), inside);
}
// In each lane: begin[lane] <= x < end[lane] ? inside : outside.
SLOWFAST_INLINE Vec where_between(int32_t x, const int32_t* begin, const int32_t* end, Vec inside, Vec outside) {
  const __m512i all = _mm512_set1_epi32(x);
  const __mmask16 from = _mm512_cmple_epi32_mask(_mm512_loadu_si512(begin), all);
  return _mm512_mask_mov_ps(outside, _mm512_mask_cmplt_epi32_mask(from, all, _mm512_loadu_si512(end)), inside);
}
// a[0], b[0], a[1], b[1], ...: the first and the second half of that.
SLOWFAST_INLINE Vec zip_first(Vec a, Vec b) {
  const __m512i order = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  return _mm512_permutex2var_ps(a, order, b);
}
SLOWFAST_INLINE Vec zip_second(Vec a, Vec b) {
  const __m512i order = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  return _mm512_permutex2var_ps(a, order, b);
}

// The W floats at p, repeated over the vector.
template <int W> SLOWFAST_INLINE Vec repeat(const float* p) {
  static_assert(W == 1 || W == 2 || W == 4 || W == 8 || W == 16);
  if constexpr (W == 1) return _mm512_set1_ps(*p);
  if constexpr (W == 2) { double both; std::memcpy(&both, p, 8); return _mm512_castpd_ps(_mm512_set1_pd(both)); }
  if constexpr (W == 4) return _mm512_broadcast_f32x4(_mm_loadu_ps(p));
  if constexpr (W == 8) return _mm512_broadcast_f32x8(_mm256_loadu_ps(p));
  if constexpr (W == 16) return _mm512_loadu_ps(p);
}

// Sum over each group of W neighbouring lanes, left in all of them.
template <int W> SLOWFAST_INLINE Vec group_sum(Vec x) {
  if constexpr (W >= 2) x = _mm512_add_ps(x, _mm512_permute_ps(x, 0xB1));
  if constexpr (W >= 4) x = _mm512_add_ps(x, _mm512_permute_ps(x, 0x4E));
  if constexpr (W >= 8) x = _mm512_add_ps(x, _mm512_shuffle_f32x4(x, x, 0xB1));
  if constexpr (W >= 16) x = _mm512_add_ps(x, _mm512_shuffle_f32x4(x, x, 0x4E));
  return x;
}

// 2^x for x <= 0: 0 at -inf, NaN at NaN. The order of max's operands lets NaN through.
template <class Polynomial> SLOWFAST_INLINE Vec exp2_with(Vec x, Polynomial polynomial) {
  x = _mm512_max_ps(_mm512_set1_ps(-160.f), x);
  const Vec whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return _mm512_scalef_ps(polynomial(_mm512_sub_ps(x, whole)), whole);
}

#elif defined(__AVX2__)

using Vec = __m256;
constexpr int kLanes = 8;
constexpr bool kManyRegisters = false;

SLOWFAST_INLINE Vec zero() { return _mm256_setzero_ps(); }
SLOWFAST_INLINE Vec splat(float x) { return _mm256_set1_ps(x); }
SLOWFAST_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
SLOWFAST_INLINE Vec load(const BF16* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
SLOWFAST_INLINE Vec load(const F16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
SLOWFAST_INLINE void store(float* p, Vec x) { _mm256_storeu_ps(p, x); }
SLOWFAST_INLINE void store(BF16* p, Vec x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i even = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), even);
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i kept = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(kept, kept), 0xD8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
SLOWFAST_INLINE void store(F16* p, Vec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
SLOWFAST_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
SLOWFAST_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
SLOWFAST_INLINE Vec where_within(Vec x, Vec begin, Vec end, Vec inside, Vec outside) {
  const Vec within = _mm256_and_ps(_mm256_cmp_ps(begin, x, _CMP_LE_OQ), _mm256_cmp_ps(x, end, _CMP_LT_OQ));
  return _mm256_blendv_ps(outside, inside, within);
}
SLOWFAST_INLINE Vec where_between(int32_t x, const int32_t* begin, const int32_t* end, Vec inside, Vec outside) {
  const __m256i all = _mm256_set1_epi32(x);
  const __m256i before = _mm256_cmpgt_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(begin)), all);
  const __m256i ahead = _mm256_cmpgt_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(end)), all);
  return _mm256_blendv_ps(outside, inside, _mm256_castsi256_ps(_mm256_andnot_si256(before, ahead)));
}
SLOWFAST_INLINE Vec zip_first(Vec a, Vec b) {
  return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x20);
}
SLOWFAST_INLINE Vec zip_second(Vec a, Vec b) {
  return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x31);
}

template <int W> SLOWFAST_INLINE Vec repeat(const float* p) {
  static_assert(W == 1 || W == 2 || W == 4 || W == 8);
  if constexpr (W == 1) return _mm256_broadcast_ss(p);
  if constexpr (W == 2) { double both; std::memcpy(&both, p, 8); return _mm256_castpd_ps(_mm256_set1_pd(both)); }
  if constexpr (W == 4) return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(p));
  if constexpr (W == 8) return _mm256_loadu_ps(p);
}
template <int W> SLOWFAST_INLINE Vec group_sum(Vec x) {
  if constexpr (W >= 2) x = _mm256_add_ps(x, _mm256_permute_ps(x, 0xB1));
  if constexpr (W >= 4) x = _mm256_add_ps(x, _mm256_permute_ps(x, 0x4E));
  if constexpr (W >= 8) x = _mm256_add_ps(x, _mm256_permute2f128_ps(x, x, 1));
  return x;
}
SLOWFAST_INLINE float sum(Vec x) { return _mm256_cvtss_f32(group_sum<8>(x)); }

// At -127 the exponent field is 0, so the result is exactly 0.
template <class Polynomial> SLOWFAST_INLINE Vec exp2_with(Vec x, Polynomial polynomial) {
  x = _mm256_max_ps(_mm256_set1_ps(-127.f), x);
  const Vec whole = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127));
  return polynomial(_mm256_sub_ps(x, whole)) * _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}

#else

using Vec = float __attribute__((vector_size(16)));
using IntVec = int32_t __attribute__((vector_size(16)));
constexpr int kLanes = 4;
constexpr bool kManyRegisters = false;

SLOWFAST_INLINE Vec splat(float x) { return Vec{x, x, x, x}; }
SLOWFAST_INLINE Vec zero() { return splat(0.f); }
SLOWFAST_INLINE Vec load(const float* p) { Vec x; std::memcpy(&x, p, sizeof x); return x; }
template <class T> SLOWFAST_INLINE Vec load(const T* p) {
  return Vec{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
}
SLOWFAST_INLINE void store(float* p, Vec x) { std::memcpy(p, &x, sizeof x); }
template <class T> SLOWFAST_INLINE void store(T* p, Vec x) {
  for (int i = 0; i < kLanes; ++i) from_float(x[i], p + i);
}
SLOWFAST_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
SLOWFAST_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }   // b where either is NaN, as on x86
SLOWFAST_INLINE Vec where_within(Vec x, Vec begin, Vec end, Vec inside, Vec outside) {
  return (begin <= x) & (x < end) ? inside : outside;
}
SLOWFAST_INLINE Vec where_between(int32_t x, const int32_t* begin, const int32_t* end, Vec inside, Vec outside) {
  IntVec from, to;
  std::memcpy(&from, begin, sizeof from);
  std::memcpy(&to, end, sizeof to);
  return (from <= x) & (to > x) ? inside : outside;
}
SLOWFAST_INLINE Vec zip_first(Vec a, Vec b) { return Vec{a[0], b[0], a[1], b[1]}; }
SLOWFAST_INLINE Vec zip_second(Vec a, Vec b) { return Vec{a[2], b[2], a[3], b[3]}; }

template <int W> SLOWFAST_INLINE Vec repeat(const float* p) {
  static_assert(W == 1 || W == 2 || W == 4);
  if constexpr (W == 1) return splat(*p);
  if constexpr (W == 2) return Vec{p[0], p[1], p[0], p[1]};
  if constexpr (W == 4) return load(p);
}
template <int W> SLOWFAST_INLINE Vec group_sum(Vec x) {
  if constexpr (W >= 2) x = x + Vec{x[1], x[0], x[3], x[2]};
  if constexpr (W >= 4) x = x + Vec{x[2], x[3], x[0], x[1]};
  return x;
}
SLOWFAST_INLINE float sum(Vec x) { return group_sum<4>(x)[0]; }

template <class Polynomial> SLOWFAST_INLINE Vec exp2_with(Vec x, Polynomial polynomial) {
  x = max(splat(-127.f), x);
  // Adding 1.5 * 2^23 leaves x rounded to an integer in the low bits.
  const Vec shifted = x + splat(12582912.f);
  const Vec whole = shifted - splat(12582912.f);
  const IntVec exponent = reinterpret_cast<IntVec>(shifted) - 0x4b400000 + 127;
  return polynomial(x - whole) * reinterpret_cast<Vec>(exponent << 23);
}

#endif

SLOWFAST_INLINE Vec exp2(Vec x) {   // relative error 1e-7
  return exp2_with(x, [](Vec f) {
    Vec y = fma(splat(1.535336188e-4f), f, splat(1.339887440e-3f));
    y = fma(y, f, splat(9.618437358e-3f));
    y = fma(y, f, splat(5.550332471e-2f));
    y = fma(y, f, splat(2.402264791e-1f));
    y = fma(y, f, splat(6.931472029e-1f));
    return fma(y, f, splat(1.f));
  });
}

// Rows become columns. Each turn moves the highest bit of a column's number to the end of its row's.
SLOWFAST_INLINE void transpose(Vec (&rows)[kLanes]) {
#pragma GCC unroll 4
  for (int turn = 1; turn < kLanes; turn *= 2) {
    Vec next[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = zip_first(rows[i], rows[i + kLanes / 2]);
      next[2 * i + 1] = zip_second(rows[i], rows[i + kLanes / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
  }
}

// ---- bf16 dot products: d-word lanes hold two bf16, a lane of the result adds both products in fp32

#if defined(__AVX512BF16__)
SLOWFAST_INLINE Vec dot_pairs(Vec a, Vec b, Vec c) {
  return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}
// Lane i of the result is the pair (low[i], high[i]) rounded to bf16.
SLOWFAST_INLINE Vec to_pairs(Vec low, Vec high) {
  const auto both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
                                         23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, both));
}
// As to_pairs rounds.
SLOWFAST_INLINE void store_rounded(BF16* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
}
SLOWFAST_INLINE Vec low_of(Vec pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(pairs), 16)); }
SLOWFAST_INLINE Vec high_of(Vec pairs) {
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(pairs), _mm512_set1_epi32(int(0xffff0000))));
}
// to[i] = the pair (low[i], high[i]), 16 of them.
SLOWFAST_INLINE void zip_pairs(const BF16* low, const BF16* high, float* to) {
  const __m512i a = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(low)));
  const __m512i b = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(high)));
  _mm512_storeu_si512(to, _mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
}
#endif

}  // namespace
}  // namespace slowfast::cpu
