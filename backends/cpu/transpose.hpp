// A square of W vectors, transposed in registers.
#pragma once

#include "simd.hpp"

namespace ponder::cpu::PONDER_ISA {

// r[i][j] becomes r[j][i].
#if defined(__AVX512F__)
PONDER_INLINE void transpose(vf (&r)[W]) {
    __m512d t[W];
    vf u[W];
#pragma GCC unroll 8
    for (int i = 0; i < W; i += 2) {
        t[i] = _mm512_castps_pd(_mm512_unpacklo_ps(r[i], r[i + 1]));
        t[i + 1] = _mm512_castps_pd(_mm512_unpackhi_ps(r[i], r[i + 1]));
    }
#pragma GCC unroll 4
    for (int i = 0; i < W; i += 4) {
        u[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(t[i], t[i + 2]));
        u[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(t[i], t[i + 2]));
        u[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(t[i + 1], t[i + 3]));
        u[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(t[i + 1], t[i + 3]));
    }
    // Quarter l of u[4 i + c] holds column 4 l + c of rows 4 i ... 4 i + 3.
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
        const vf a = _mm512_shuffle_f32x4(u[c], u[4 + c], 0x88);
        const vf b = _mm512_shuffle_f32x4(u[c], u[4 + c], 0xdd);
        const vf d = _mm512_shuffle_f32x4(u[8 + c], u[12 + c], 0x88);
        const vf e = _mm512_shuffle_f32x4(u[8 + c], u[12 + c], 0xdd);
        r[c] = _mm512_shuffle_f32x4(a, d, 0x88);
        r[4 + c] = _mm512_shuffle_f32x4(b, e, 0x88);
        r[8 + c] = _mm512_shuffle_f32x4(a, d, 0xdd);
        r[12 + c] = _mm512_shuffle_f32x4(b, e, 0xdd);
    }
}
#else
PONDER_INLINE void transpose(vf (&r)[W]) {
    __m256d t[W];
    vf u[W];
#pragma GCC unroll 4
    for (int i = 0; i < W; i += 2) {
        t[i] = _mm256_castps_pd(_mm256_unpacklo_ps(r[i], r[i + 1]));
        t[i + 1] = _mm256_castps_pd(_mm256_unpackhi_ps(r[i], r[i + 1]));
    }
#pragma GCC unroll 2
    for (int i = 0; i < W; i += 4) {
        u[i] = _mm256_castpd_ps(_mm256_unpacklo_pd(t[i], t[i + 2]));
        u[i + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(t[i], t[i + 2]));
        u[i + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(t[i + 1], t[i + 3]));
        u[i + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(t[i + 1], t[i + 3]));
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
        r[c] = _mm256_permute2f128_ps(u[c], u[4 + c], 0x20);
        r[4 + c] = _mm256_permute2f128_ps(u[c], u[4 + c], 0x31);
    }
}
#endif

} // namespace ponder::cpu::PONDER_ISA
