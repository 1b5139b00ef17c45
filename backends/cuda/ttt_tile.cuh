// Matrix products of a warp over tiles in shared memory, for bf16 and for f32.
//
// A tile holds rows of D elements, ld = D + 8 apart, so that the loads below meet no bank twice in
// bf16. f32 factors are split into two of 10 bits each, of which three products are summed: about
// 21 bits. Within 8 columns of a product's inner dimension the lanes take columns 2 t and 2 t + 1
// for the instruction's t and t + 4: the same order in both factors, and that in which results lie.
#pragma once

#include "warp.cuh"

namespace ponder::cuda {

struct Bf16 {
    uint16_t bits;
};

template <class E> struct FragA; // [16,16]
template <class E> struct FragB; // [16,8]

template <> struct FragA<Bf16> { uint32_t x[4]; };
template <> struct FragB<Bf16> { uint32_t x[2]; };
template <> struct FragA<float> { uint32_t high[8], low[8]; };
template <> struct FragB<float> { uint32_t high[4], low[4]; };

struct Split {
    uint32_t high, low;
};
__device__ __forceinline__ Split split(float x) {
    const uint32_t high = bits_of_float(x) & 0xffffe000u;
    return {high, bits_of_float(x - float_of_bits(high))};
}
__device__ __forceinline__ void set(FragA<float> &a, int i, float x) {
    const Split s = split(x);
    a.high[i] = s.high;
    a.low[i] = s.low;
}
__device__ __forceinline__ void set(FragB<float> &b, int i, float x) {
    const Split s = split(x);
    b.high[i] = s.high;
    b.low[i] = s.low;
}

__device__ __forceinline__ void mma(float (&c)[4], const FragA<Bf16> &a, const FragB<Bf16> &b) {
    mma_bf16(c, a.x, b.x);
}
__device__ __forceinline__ void mma(float (&c)[4], const FragA<float> &a, const FragB<float> &b) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        mma_tf32(c, a.low + 4 * i, b.high + 2 * i);
        mma_tf32(c, a.high + 4 * i, b.low + 2 * i);
        mma_tf32(c, a.high + 4 * i, b.high + 2 * i);
    }
}

// a[m][k] = s[m][k]
__device__ __forceinline__ void load_a(FragA<Bf16> &a, const Bf16 *s, int ld, int lane) {
    load_matrices(a.x, s + (lane & 15) * ld + (lane >> 4) * 8);
}
__device__ __forceinline__ void load_a(FragA<float> &a, const float *s, int ld, int lane) {
    const float *p = s + (lane >> 2) * ld + (lane & 3) * 2;
#pragma unroll
    for (int i = 0; i < 4; ++i) { // columns 8 (i / 2), rows 8 (i % 2)
        const float2 v = *reinterpret_cast<const float2 *>(p + (i & 1) * 8 * ld + (i >> 1) * 8);
        set(a, (i >> 1) * 4 + (i & 1), v.x);
        set(a, (i >> 1) * 4 + (i & 1) + 2, v.y);
    }
}
// a[m][k] = s[k][m]
__device__ __forceinline__ void load_a_transposed(FragA<Bf16> &a, const Bf16 *s, int ld, int lane) {
    load_matrices_transposed(a.x, s + ((lane & 7) + (lane >> 4) * 8) * ld + (lane & 8));
}
__device__ __forceinline__ void load_a_transposed(FragA<float> &a, const float *s, int ld,
                                                  int lane) {
    const float *p = s + (lane & 3) * 2 * ld + (lane >> 2);
#pragma unroll
    for (int i = 0; i < 8; ++i) // columns 8 (i / 4) + i / 2 % 2, rows 8 (i % 2)
        set(a, i, p[((i >> 2) * 8 + (i >> 1 & 1)) * ld + (i & 1) * 8]);
}
// a[0][k] = s[k], other rows 0
__device__ __forceinline__ void load_a_row(FragA<Bf16> &a, const Bf16 *s, int lane) {
    const uint32_t *p = reinterpret_cast<const uint32_t *>(s) + (lane & 3);
    a.x[0] = lane < 4 ? p[0] : 0;
    a.x[2] = lane < 4 ? p[4] : 0;
    a.x[1] = a.x[3] = 0;
}
__device__ __forceinline__ void load_a_row(FragA<float> &a, const float *s, int lane) {
#pragma unroll
    for (int i = 0; i < 8; ++i)
        set(a, i,
            (i & 1) == 0 && lane < 4 ? s[(lane & 3) * 2 + (i >> 2) * 8 + (i >> 1 & 1)] : 0.0f);
}
// b[k][n] = s[n][k], for n = 0 to 7 and 8 to 15
__device__ __forceinline__ void load_b(FragB<Bf16> (&b)[2], const Bf16 *s, int ld, int lane) {
    uint32_t x[4];
    load_matrices(x, s + ((lane & 7) + (lane >> 4) * 8) * ld + (lane & 8));
    b[0] = {{x[0], x[1]}};
    b[1] = {{x[2], x[3]}};
}
__device__ __forceinline__ void load_b(FragB<float> (&b)[2], const float *s, int ld, int lane) {
    const float *p = s + (lane >> 2) * ld + (lane & 3) * 2;
#pragma unroll
    for (int i = 0; i < 4; ++i) { // columns 8 (i % 2), rows 8 (i / 2)
        const float2 v = *reinterpret_cast<const float2 *>(p + (i >> 1) * 8 * ld + (i & 1) * 8);
        set(b[i >> 1], (i & 1) * 2, v.x);
        set(b[i >> 1], (i & 1) * 2 + 1, v.y);
    }
}
// b[k][n] = s[k][n], for n = 0 to 7 and 8 to 15
__device__ __forceinline__ void load_b_transposed(FragB<Bf16> (&b)[2], const Bf16 *s, int ld,
                                                  int lane) {
    uint32_t x[4];
    load_matrices_transposed(x, s + (lane & 15) * ld + (lane >> 4) * 8);
    b[0] = {{x[0], x[1]}};
    b[1] = {{x[2], x[3]}};
}
__device__ __forceinline__ void load_b_transposed(FragB<float> (&b)[2], const float *s, int ld,
                                                  int lane) {
    const float *p = s + (lane & 3) * 2 * ld + (lane >> 2);
#pragma unroll
    for (int i = 0; i < 8; ++i) // rows 8 (i / 2 % 2) + i % 2, columns 8 (i / 4)
        set(b[i >> 2], i & 3, p[((i >> 1 & 1) * 8 + (i & 1)) * ld + (i >> 2) * 8]);
}

// The same two of rows in f32
__device__ __forceinline__ void load_b(FragB<Bf16> (&b)[2], const float *s, int ld, int lane) {
    const float *p = s + (lane >> 2) * ld + (lane & 3) * 2;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 v = *reinterpret_cast<const float2 *>(p + (i >> 1) * 8 * ld + (i & 1) * 8);
        b[i >> 1].x[i & 1] = pack_bf16(v.x, v.y);
    }
}
__device__ __forceinline__ void load_b_transposed(FragB<Bf16> (&b)[2], const float *s, int ld,
                                                  int lane) {
    const float *p = s + (lane & 3) * 2 * ld + (lane >> 2);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float *from = p + (i & 1) * 8 * ld + (i >> 1) * 8;
        b[i >> 1].x[i & 1] = pack_bf16(from[0], from[ld]);
    }
}

// The result c[16,16] as a factor a
__device__ __forceinline__ void a_of(FragA<Bf16> &a, const float (&c0)[4], const float (&c1)[4]) {
    a.x[0] = pack_bf16(c0[0], c0[1]);
    a.x[1] = pack_bf16(c0[2], c0[3]);
    a.x[2] = pack_bf16(c1[0], c1[1]);
    a.x[3] = pack_bf16(c1[2], c1[3]);
}
__device__ __forceinline__ void a_of(FragA<float> &a, const float (&c0)[4], const float (&c1)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int at = (i & 1) * 2 + (i >> 1); // row g + 8 (i / 2), column 2 t + i % 2
        set(a, at, c0[i]);
        set(a, 4 + at, c1[i]);
    }
}
// The transpose of the result c[16,16], rows 8 half to 8 half + 7 of c, as a factor b
__device__ __forceinline__ void b_of_transposed(FragB<Bf16> &b, const float (&c0)[4],
                                                const float (&c1)[4], int half) {
    b.x[0] = pack_bf16(c0[2 * half], c0[2 * half + 1]);
    b.x[1] = pack_bf16(c1[2 * half], c1[2 * half + 1]);
}
__device__ __forceinline__ void b_of_transposed(FragB<float> &b, const float (&c0)[4],
                                                const float (&c1)[4], int half) {
    set(b, 0, c0[2 * half]);
    set(b, 1, c0[2 * half + 1]);
    set(b, 2, c1[2 * half]);
    set(b, 3, c1[2 * half + 1]);
}
// The transpose of a factor a[16,16]
__device__ __forceinline__ FragA<Bf16> turned(const FragA<Bf16> &a) {
    return {{turn_matrix(a.x[0]), turn_matrix(a.x[2]), turn_matrix(a.x[1]), turn_matrix(a.x[3])}};
}
// a[m][k] = b[k][m], b being that for m = 0 to 7 and 8 to 15
__device__ __forceinline__ FragA<Bf16> a_of(const FragB<Bf16> (&b)[2]) {
    return {{b[0].x[0], b[1].x[0], b[0].x[1], b[1].x[1]}};
}
// b[k][0] = 1, other columns 0
__device__ __forceinline__ void b_of_ones(FragB<Bf16> &b, int lane) {
    b.x[0] = b.x[1] = lane < 4 ? 0x3f803f80u : 0;
}
__device__ __forceinline__ void b_of_ones(FragB<float> &b, int lane) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
        set(b, i, lane < 4 ? 1.0f : 0.0f);
}
__device__ __forceinline__ void negate(FragA<Bf16> &a) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
        a.x[i] ^= 0x80008000u;
}
__device__ __forceinline__ void negate(FragA<float> &a) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        a.high[i] ^= 0x80000000u;
        a.low[i] ^= 0x80000000u;
    }
}

// Two neighbours of a row, as they lie in memory
template <class E> struct Pair;
template <> struct Pair<Bf16> { uint32_t x; };
template <> struct Pair<float> { float2 x; };
__device__ __forceinline__ Pair<Bf16> pair_at(const Bf16 *p) {
    return {*reinterpret_cast<const uint32_t *>(p)};
}
__device__ __forceinline__ Pair<float> pair_at(const float *p) {
    return {*reinterpret_cast<const float2 *>(p)};
}
__device__ __forceinline__ float2 floats(Pair<Bf16> p) {
    return {float_of_bits(p.x << 16), float_of_bits(p.x & 0xffff0000u)};
}
__device__ __forceinline__ float2 floats(Pair<float> p) { return p.x; }
__device__ __forceinline__ void store_pair(Bf16 *p, float a, float b) {
    *reinterpret_cast<uint32_t *>(p) = pack_bf16(a, b);
}
__device__ __forceinline__ void store_pair(float *p, float a, float b) {
    *reinterpret_cast<float2 *>(p) = {a, b};
}
__device__ __forceinline__ float to_float(Bf16 x) { return float_of_bits(uint32_t(x.bits) << 16); }
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ void store(Bf16 *p, float x) { p->bits = uint16_t(pack_bf16(x, 0)); }
__device__ __forceinline__ void store(float *p, float x) { *p = x; }

} // namespace ponder::cuda
