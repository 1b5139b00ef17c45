// Float vectors of the instruction set this file is compiled for.
//
// Everything here has internal linkage: the sources are compiled once per instruction set, and no
// function of a higher one may be what the linker picks for a lower one.
#pragma once

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

namespace ponder::cpu::PONDER_ISA {

#define PONDER_INLINE [[maybe_unused]] static inline __attribute__((always_inline))

struct half {
    uint16_t bits;
};

PONDER_INLINE float scalar(half x) {
    const uint32_t u = uint32_t(x.bits) << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}

PONDER_INLINE half to_half(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    if ((u & 0x7fffffffu) > 0x7f800000u)
        return {uint16_t((u >> 16) | 0x40u)};
    return {uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}

#if defined(__AVX512F__)

typedef __m512 vf;
typedef __m512i vi;
constexpr int W = 16;

PONDER_INLINE __mmask16 first(int n) { return __mmask16(n >= W ? 0xffff : (1u << n) - 1); }
PONDER_INLINE vf set(float x) { return _mm512_set1_ps(x); }
PONDER_INLINE vf load(const float *p) { return _mm512_loadu_ps(p); }
PONDER_INLINE vf load(const float *p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
PONDER_INLINE void store(float *p, vf x) { _mm512_storeu_ps(p, x); }
PONDER_INLINE void store(float *p, vf x, int n) { _mm512_mask_storeu_ps(p, first(n), x); }
PONDER_INLINE vf widen(__m256i x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
#if defined(__AVX512BF16__)
PONDER_INLINE __m256i narrow(vf x) {
    const __m256bh y = _mm512_cvtneps_pbh(x);
    __m256i bits;
    memcpy(&bits, &y, 32);
    return bits;
}
#else
PONDER_INLINE __m256i narrow(vf x) {
    const vi u = _mm512_castps_si512(x);
    const vi odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    vi r = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    r = _mm512_mask_or_epi32(r, nan, u, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16));
}
#endif
PONDER_INLINE vf load(const half *p) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
}
PONDER_INLINE vf load(const half *p, int n) { return widen(_mm256_maskz_loadu_epi16(first(n), p)); }
PONDER_INLINE void store(half *p, vf x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), narrow(x));
}
PONDER_INLINE void store(half *p, vf x, int n) { _mm256_mask_storeu_epi16(p, first(n), narrow(x)); }
PONDER_INLINE vf load(const int8_t *p) {
    return _mm512_cvtepi32_ps(
        _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))));
}
PONDER_INLINE vf load(const int8_t *p, int n) {
    if (__builtin_constant_p(n) && n == W)
        return load(p);
    int8_t t[W] = {};
    for (int i = 0; i < n && i < W; ++i)
        t[i] = p[i];
    return load(t);
}
// Two bf16 in each 32 bits: lo in the low half.
PONDER_INLINE vf interleave(vf lo, vf hi) {
    const vi l = _mm512_cvtepu16_epi32(narrow(lo)), h = _mm512_cvtepu16_epi32(narrow(hi));
    return _mm512_castsi512_ps(_mm512_or_si512(l, _mm512_slli_epi32(h, 16)));
}
// The same for numbers that are bf16 already.
PONDER_INLINE vf join_exact(vf lo, vf hi) {
    return _mm512_castsi512_ps(
        _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(lo), 16), _mm512_castps_si512(hi)));
}
PONDER_INLINE vf low_half(vf u) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(u), 16));
}
PONDER_INLINE vf high_half(vf u) {
    return _mm512_castsi512_ps(
        _mm512_and_si512(_mm512_castps_si512(u), _mm512_set1_epi32(int(0xffff0000u))));
}
PONDER_INLINE vf lane_index() {
    return _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}
PONDER_INLINE vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
PONDER_INLINE vf clear(vf a, int n) { return _mm512_maskz_mov_ps(first(n), a); } // lanes from n on
PONDER_INLINE vf max(vf a, vf b) { return _mm512_max_ps(a, b); }
PONDER_INLINE vf min(vf a, vf b) { return _mm512_min_ps(a, b); }
PONDER_INLINE vf sqrt(vf a) { return _mm512_sqrt_ps(a); }
PONDER_INLINE vf nearest(vf a) { return _mm512_roundscale_ps(a, 8); }
PONDER_INLINE vf scale2(vf a, vf n) { return _mm512_scalef_ps(a, n); } // a 2^n, 0 far below
PONDER_INLINE vf where_below(vf a, vf b, vf yes, vf no) {              // a < b ? yes : no
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
}
PONDER_INLINE float sum(vf a) {
    const __m256 h =
        _mm256_add_ps(_mm512_castps512_ps256(a),
                      _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a), 1)));
    const __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    const __m128 d = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(d, _mm_shuffle_ps(d, d, 1)));
}
PONDER_INLINE float largest(vf a) { return _mm512_reduce_max_ps(a); }

#else // AVX2 and FMA

typedef __m256 vf;
typedef __m256i vi;
constexpr int W = 8;

PONDER_INLINE vi first(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
PONDER_INLINE vf set(float x) { return _mm256_set1_ps(x); }
PONDER_INLINE vf load(const float *p) { return _mm256_loadu_ps(p); }
PONDER_INLINE vf load(const float *p, int n) { return _mm256_maskload_ps(p, first(n)); }
PONDER_INLINE void store(float *p, vf x) { _mm256_storeu_ps(p, x); }
PONDER_INLINE void store(float *p, vf x, int n) { _mm256_maskstore_ps(p, first(n), x); }
PONDER_INLINE vf widen(__m128i x) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
}
PONDER_INLINE __m128i narrow(vf x) {
    const vi u = _mm256_castps_si256(x);
    const vi odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const vi r = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
    const vi quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
    const vi nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const vi bits = _mm256_srli_epi32(_mm256_blendv_epi8(r, quiet, nan), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
}
PONDER_INLINE vf load(const half *p) {
    return widen(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
}
PONDER_INLINE vf load(const half *p, int n) {
    half t[W] = {};
    for (int i = 0; i < n && i < W; ++i)
        t[i] = p[i];
    return load(t);
}
PONDER_INLINE void store(half *p, vf x) {
    _mm_storeu_si128(reinterpret_cast<__m128i *>(p), narrow(x));
}
PONDER_INLINE void store(half *p, vf x, int n) {
    half t[W];
    store(t, x);
    for (int i = 0; i < n && i < W; ++i)
        p[i] = t[i];
}
PONDER_INLINE vf load(const int8_t *p) {
    return _mm256_cvtepi32_ps(
        _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p))));
}
PONDER_INLINE vf load(const int8_t *p, int n) {
    if (__builtin_constant_p(n) && n == W)
        return load(p);
    int8_t t[W] = {};
    for (int i = 0; i < n && i < W; ++i)
        t[i] = p[i];
    return load(t);
}
// Two bf16 in each 32 bits: lo in the low half.
PONDER_INLINE vf interleave(vf lo, vf hi) {
    const vi l = _mm256_cvtepu16_epi32(narrow(lo)), h = _mm256_cvtepu16_epi32(narrow(hi));
    return _mm256_castsi256_ps(_mm256_or_si256(l, _mm256_slli_epi32(h, 16)));
}
// The same for numbers that are bf16 already.
PONDER_INLINE vf join_exact(vf lo, vf hi) {
    return _mm256_castsi256_ps(
        _mm256_or_si256(_mm256_srli_epi32(_mm256_castps_si256(lo), 16), _mm256_castps_si256(hi)));
}
PONDER_INLINE vf low_half(vf u) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(u), 16));
}
PONDER_INLINE vf high_half(vf u) {
    return _mm256_castsi256_ps(
        _mm256_and_si256(_mm256_castps_si256(u), _mm256_set1_epi32(int(0xffff0000u))));
}
PONDER_INLINE vf lane_index() { return _mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7); }
PONDER_INLINE vf fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
PONDER_INLINE vf clear(vf a, int n) { // lanes from n on
    return _mm256_and_ps(a, _mm256_castsi256_ps(first(n)));
}
PONDER_INLINE vf max(vf a, vf b) { return _mm256_max_ps(a, b); }
PONDER_INLINE vf min(vf a, vf b) { return _mm256_min_ps(a, b); }
PONDER_INLINE vf sqrt(vf a) { return _mm256_sqrt_ps(a); }
PONDER_INLINE vf nearest(vf a) { return _mm256_round_ps(a, 8); }
PONDER_INLINE vf scale2(vf a, vf n) { // a 2^n, 0 far below
    const vi bits = _mm256_slli_epi32(
        _mm256_add_epi32(_mm256_cvtps_epi32(_mm256_max_ps(n, set(-126))), _mm256_set1_epi32(127)),
        23);
    const vf y = _mm256_mul_ps(a, _mm256_castsi256_ps(bits));
    return _mm256_and_ps(y, _mm256_cmp_ps(n, set(-126), _CMP_GE_OQ));
}
PONDER_INLINE vf where_below(vf a, vf b, vf yes, vf no) { // a < b ? yes : no
    return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}
PONDER_INLINE float sum(vf a) {
    const __m128 q = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 d = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(d, _mm_shuffle_ps(d, d, 1)));
}
PONDER_INLINE float largest(vf a) {
    const __m128 q = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 d = _mm_max_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_max_ss(d, _mm_shuffle_ps(d, d, 1)));
}

#endif

// e^x to 2e-7: e^x = 2^n e^r with |r| <= ln(2)/2 and the series of e^r up to r^6.
PONDER_INLINE vf exp(vf x) {
    x = max(min(x, set(88.37f)), set(-104.0f));
    const vf n = nearest(x * set(1.44269504f));
    vf r = fma(n, set(-0.693359375f), x);
    r = fma(n, set(2.12194440e-4f), r);
    vf p = fma(set(1.0f / 720), r, set(1.0f / 120));
    p = fma(p, r, set(1.0f / 24));
    p = fma(p, r, set(1.0f / 6));
    p = fma(p, r, set(0.5f));
    p = fma(p, r, set(1.0f));
    p = fma(p, r, set(1.0f));
    return scale2(p, n);
}

PONDER_INLINE float row_exp(float x) {
    float t[W];
    store(t, exp(set(x)));
    return t[0];
}

PONDER_INLINE vf sigmoid(vf x) { return set(1.0f) / (set(1.0f) + exp(-x)); }

// A tensor of f32 or bf16, read and written as f32. The branch is the same for a whole tensor.
struct View {
    char *data;
    bool narrow;

    PONDER_INLINE View of(void *p, int32_t dtype) { return {static_cast<char *>(p), dtype == 2}; }
    __attribute__((always_inline)) View at(int64_t i) const {
        return {data + (narrow ? 2 * i : 4 * i), narrow};
    }
    __attribute__((always_inline)) vf get(int64_t i) const {
        return narrow ? load(reinterpret_cast<const half *>(data) + i)
                      : load(reinterpret_cast<const float *>(data) + i);
    }
    __attribute__((always_inline)) vf get(int64_t i, int n) const {
        if (__builtin_constant_p(n) && n == W)
            return get(i);
        return narrow ? load(reinterpret_cast<const half *>(data) + i, n)
                      : load(reinterpret_cast<const float *>(data) + i, n);
    }
    __attribute__((always_inline)) void put(int64_t i, vf x) const {
        if (narrow)
            store(reinterpret_cast<half *>(data) + i, x);
        else
            store(reinterpret_cast<float *>(data) + i, x);
    }
    __attribute__((always_inline)) void put(int64_t i, vf x, int n) const {
        if (__builtin_constant_p(n) && n == W)
            return put(i, x);
        if (narrow)
            store(reinterpret_cast<half *>(data) + i, x, n);
        else
            store(reinterpret_cast<float *>(data) + i, x, n);
    }
    __attribute__((always_inline)) float one(int64_t i) const {
        return narrow ? scalar(reinterpret_cast<const half *>(data)[i])
                      : reinterpret_cast<const float *>(data)[i];
    }
    __attribute__((always_inline)) void put_one(int64_t i, float x) const {
        if (narrow)
            reinterpret_cast<half *>(data)[i] = to_half(x);
        else
            reinterpret_cast<float *>(data)[i] = x;
    }
};

// each_vector(count, PONDER_EACH(i, n) {...}): for each vector of n <= W elements of [0, count).
#define PONDER_EACH(i, n) [&](int64_t i, int n) __attribute__((always_inline))
template <class F> PONDER_INLINE void each_vector(int64_t count, F f) {
    int64_t i = 0;
    for (; i + W <= count; i += W)
        f(i, W);
    if (i < count)
        f(i, int(count - i));
}

} // namespace ponder::cpu::PONDER_ISA
