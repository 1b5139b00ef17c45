// A block of kBlock x (2 W) sums stays in registers over all of k: for each unit of k, two vectors
// of B and kBlock broadcasts of A make 2 kBlock fused multiply-adds. Sums run in the order of k
// whatever the block, so a row's result does not depend on where its tile begins.
//
// Why no library. Measured on one Zen 4 core, 64-row tiles, packed weights: these kernels with bias
// and conversion 111 (f32) and 227 GFLOP/s (bf16), oneDNN 2.6.3 without them 113 and 228. With AMX
// (Sapphire Rapids) 1000-1170 against 1400-1750, of which separate passes for bias, residual and
// low-rank parts would take back a share; for the rest a 40 MB library with an OpenMP team to be
// held off in every thread did not pay. OpenBLAS as Debian builds it cannot be held to one thread
// a call without a process-wide setting.
#include "gemm.hpp"

namespace ponder::cpu::PONDER_ISA {
namespace {

// Rows of a block: as many as the registers hold. A tile of 64 needs 65 or 66 rows at most.
#if defined(__AVX512BF16__)
constexpr int kBlock = 13, kHalfBlock = 13;
#elif defined(__AVX512F__)
constexpr int kBlock = 13, kHalfBlock = 11;
#else
constexpr int kBlock = 6, kHalfBlock = 4;
#endif

PONDER_INLINE float as_float(uint32_t u) {
    float f;
    memcpy(&f, &u, 4);
    return f;
}

PONDER_INLINE vf load_units(const uint32_t *p) { return load(reinterpret_cast<const float *>(p)); }

template <int M, int N, bool Half, bool Columns>
PONDER_INLINE void multiply(vf (&sum)[M][N], const Part &part, const uint32_t *a,
                            const uint32_t *b) {
    constexpr int64_t row = Columns ? 1 : kStride, step = Columns ? kStride : 1;
    for (int64_t k0 = 0; k0 < part.k; k0 += kChunk) {
        const int64_t kn = Columns ? part.k : smaller(part.k - k0, kChunk);
        const uint32_t *ak = a;
        for (int64_t k = 0; k < kn; ++k, ak += step, b += part.b_step) {
            if constexpr (!Half) {
                vf bv[N];
#pragma GCC unroll 2
                for (int j = 0; j < N; ++j)
                    bv[j] = load_units(b + j * W);
#pragma GCC unroll 16
                for (int i = 0; i < M; ++i) {
                    const vf av = set(as_float(ak[i * row]));
#pragma GCC unroll 2
                    for (int j = 0; j < N; ++j)
                        sum[i][j] = fma(av, bv[j], sum[i][j]);
                }
            } else {
#if defined(__AVX512BF16__)
                __m512bh bv[N];
#pragma GCC unroll 2
                for (int j = 0; j < N; ++j)
                    bv[j] = (__m512bh)load_units(b + j * W);
#pragma GCC unroll 16
                for (int i = 0; i < M; ++i) {
                    const __m512bh av = (__m512bh)_mm512_set1_epi32(int(ak[i * row]));
#pragma GCC unroll 2
                    for (int j = 0; j < N; ++j)
                        sum[i][j] = _mm512_dpbf16_ps(sum[i][j], av, bv[j]);
                }
#else
                // Without bf16 products: widen both halves, two f32 products a unit.
                vf even[N], odd[N];
#pragma GCC unroll 2
                for (int j = 0; j < N; ++j) {
                    const vf u = load_units(b + j * W);
                    even[j] = low_half(u);
                    odd[j] = high_half(u);
                }
#pragma GCC unroll 16
                for (int i = 0; i < M; ++i) {
                    const uint32_t u = ak[i * row];
                    const vf lo = set(as_float(u << 16)), hi = set(as_float(u & 0xffff0000u));
#pragma GCC unroll 2
                    for (int j = 0; j < N; ++j)
                        sum[i][j] = fma(hi, odd[j], fma(lo, even[j], sum[i][j]));
                }
#endif
            }
        }
        if (Columns)
            return;
        a += kChunkUnits;
    }
}

// The same with rows of a packed and B a panel of int8, widened in registers.
template <int M, int N, bool Half>
PONDER_INLINE void multiply_bytes(vf (&sum)[M][N], int64_t depth, const uint32_t *a,
                                  const int8_t *b) {
    for (int64_t k0 = 0; k0 < depth; k0 += kChunk, a += kChunkUnits) {
        const int64_t kn = smaller(depth - k0, kChunk);
        const uint32_t *ak = a;
        for (int64_t k = 0; k < kn; ++k, ++ak, b += Half ? 2 * kPanel : kPanel) {
            vf even[N], odd[N];
#pragma GCC unroll 2
            for (int j = 0; j < N; ++j) {
                even[j] = load(b + j * W);
                if (Half)
                    odd[j] = load(b + kPanel + j * W);
            }
#if defined(__AVX512BF16__)
            if constexpr (Half) {
                __m512bh bv[N];
#pragma GCC unroll 2
                for (int j = 0; j < N; ++j)
                    bv[j] = (__m512bh)join_exact(even[j], odd[j]);
#pragma GCC unroll 16
                for (int i = 0; i < M; ++i) {
                    const __m512bh av = (__m512bh)_mm512_set1_epi32(int(ak[i * kStride]));
#pragma GCC unroll 2
                    for (int j = 0; j < N; ++j)
                        sum[i][j] = _mm512_dpbf16_ps(sum[i][j], av, bv[j]);
                }
                continue;
            }
#endif
#pragma GCC unroll 16
            for (int i = 0; i < M; ++i) {
                const uint32_t u = ak[i * kStride];
                const vf lo = set(as_float(Half ? u << 16 : u));
#pragma GCC unroll 2
                for (int j = 0; j < N; ++j)
                    sum[i][j] = fma(lo, even[j], sum[i][j]);
                if (Half) {
                    const vf hi = set(as_float(u & 0xffff0000u));
#pragma GCC unroll 2
                    for (int j = 0; j < N; ++j)
                        sum[i][j] = fma(hi, odd[j], sum[i][j]);
                }
            }
        }
    }
}

// y = alpha sum + bias + add (+ y) for rows [r, r + m) and `width` columns; sum(i) is row i's.
// What the call does without is decided once for all rows.
template <bool Plain, bool Narrow, class Sum>
PONDER_INLINE void finish_rows(const Product &p, Sum sum, int64_t r, int64_t m, int64_t column,
                               int width) {
    vf alpha = set(p.alpha);
    if (p.scales.data)
        alpha = width == W ? p.scales.get(column) : p.scales.get(column, width);
    vf bias = set(0);
    if (p.bias.data)
        bias = width == W ? p.bias.get(column) : p.bias.get(column, width);
    const View y = {p.y.data, Narrow};
#pragma GCC unroll 16
    for (int i = 0; i < Sum::rows; ++i) {
        if (i >= m)
            break;
        const int64_t at = (r + i) * p.y_row + column;
        vf x = fma(sum(i), alpha, bias);
        if (Plain) {
            y.put(at, x);
            continue;
        }
        if (p.add) {
            const float *add = p.add + (r + i) * p.add_row + column;
            x += width == W ? load(add) : load(add, width);
        }
        if (p.accumulate)
            x += width == W ? y.get(at) : y.get(at, width);
        if (width == W)
            y.put(at, x);
        else
            y.put(at, x, width);
    }
}

template <class Sum>
PONDER_INLINE void finish(const Product &p, Sum sum, int64_t r, int64_t m, int64_t column,
                          int width) {
    const bool plain = width == W && !p.add && !p.accumulate;
    if (p.y.narrow)
        plain ? finish_rows<true, true>(p, sum, r, m, column, width)
              : finish_rows<false, true>(p, sum, r, m, column, width);
    else
        plain ? finish_rows<true, false>(p, sum, r, m, column, width)
              : finish_rows<false, false>(p, sum, r, m, column, width);
}

// Sums in registers, column j of the block.
template <int M, int N> struct InRegisters {
    static constexpr int rows = M;
    const vf (&sum)[M][N];
    int j;
    __attribute__((always_inline)) vf operator()(int i) const { return sum[i][j]; }
};

// Rows [r, r + m) of M and columns [c, c + n) of N vectors.
template <int M, int N, bool Half, bool Columns>
__attribute__((noinline)) void block(const Product &p, int64_t r, int64_t m, int64_t c, int64_t n) {
    vf sum[M][N];
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
        for (int j = 0; j < N; ++j)
            sum[i][j] = set(0);
    const int64_t panel = c / kPanel;
    for (int s = 0; s < p.parts; ++s)
        multiply<M, N, Half, Columns>(sum, p.part[s], p.part[s].a + (Columns ? r : r * kStride),
                                      p.part[s].b + panel * p.part[s].b_panel);
    const int widths[2] = {int(smaller(n, W)), int(n - W)};
#pragma GCC unroll 2
    for (int j = 0; j < N; ++j)
        finish(p, InRegisters<M, N>{sum, j}, r, m, c + j * W, widths[j]);
}

// The same of one panel, part 0 being int8.
template <int M, bool Half>
__attribute__((noinline)) void bytes_block(const Product &p, int64_t r, int64_t m, int64_t n) {
    vf sum[M][2];
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i)
        sum[i][0] = sum[i][1] = set(0);
    multiply_bytes<M, 2, Half>(sum, p.part[0].k, p.part[0].a + r * kStride, p.bytes);
    if (p.parts > 1)
        multiply<M, 2, Half, false>(sum, p.part[1], p.part[1].a + r * kStride, p.part[1].b);
    finish(p, InRegisters<M, 2>{sum, 0}, r, m, 0, int(smaller(n, W)));
    if (n > W)
        finish(p, InRegisters<M, 2>{sum, 1}, r, m, W, int(n - W));
}

template <int M, bool Half, bool Columns>
PONDER_INLINE void block(const Product &p, int64_t r, int64_t m, int64_t c, int64_t n) {
    if (n > W)
        block<M, 2, Half, Columns>(p, r, m, c, n);
    else
        block<M, 1, Half, Columns>(p, r, m, c, n);
}

#if defined(__AMX_BF16__)

// Eight tiles of 16 rows of 64 bytes.
struct alignas(64) TileShapes {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// C[32, 32] in tiles 0-3, A in 4 and 5, B in 6 and 7. Down and Across say whether the second row
// and column of tiles are needed.
template <bool Down, bool Across>
PONDER_INLINE void amx_sum(const Product &p, int64_t r, int64_t panel) {
    _tile_zero(0);
    if (Across)
        _tile_zero(1);
    if (Down)
        _tile_zero(2);
    if (Down && Across)
        _tile_zero(3);
    for (int s = 0; s < p.parts; ++s) {
        const Part &part = p.part[s];
        const uint32_t *a = part.a + r * part.a_row, *b = part.b + panel * part.b_panel;
        const int64_t a_bytes = part.a_row * 4, b_bytes = part.b_step * 4;
        for (int64_t k0 = 0; k0 < part.k; k0 += kChunk, a += part.a_chunk) {
            const int64_t kn = smaller(part.k - k0, kChunk);
            for (int64_t k = 0; k < kn; k += kHalfStep, b += kHalfStep * part.b_step) {
                _tile_loadd(6, b, b_bytes);
                _tile_loadd(4, a + k, a_bytes);
                _tile_dpbf16ps(0, 4, 6);
                if (Across) {
                    _tile_loadd(7, b + 16, b_bytes);
                    _tile_dpbf16ps(1, 4, 7);
                }
                if (Down) {
                    _tile_loadd(5, a + 16 * part.a_row + k, a_bytes);
                    _tile_dpbf16ps(2, 5, 6);
                    if (Across)
                        _tile_dpbf16ps(3, 5, 7);
                }
            }
        }
    }
}

PONDER_INLINE void amx_store(float *sums, bool down, bool across) {
    _tile_stored(0, sums, 128);
    if (across)
        _tile_stored(1, sums + 16, 128);
    if (down)
        _tile_stored(2, sums + 16 * 32, 128);
    if (down && across)
        _tile_stored(3, sums + 16 * 32 + 16, 128);
}

struct InMemory {
    static constexpr int rows = 32;
    const float *sums;
    __attribute__((always_inline)) vf operator()(int i) const { return load(sums + i * 32); }
};

// A finished block of sums, rows [r, r + m) and columns [c, c + n).
struct AmxBlock {
    const float *sums;
    int64_t r, m, c, n;
};

PONDER_INLINE void amx_finish(const Product &p, const AmxBlock &b) {
    for (int64_t j = 0; j < b.n; j += W)
        finish(p, InMemory{b.sums + j}, b.r, b.m, b.c + j, int(smaller(b.n - j, W)));
}

// A block is finished while the tiles of the next one are being multiplied.
void amx_tile(const Product &p, int64_t m, int64_t n) {
    static constexpr TileShapes shapes;
    alignas(64) float sums[2][32 * 32];
    AmxBlock before = {nullptr, 0, 0, 0, 0};
    int buffer = 0;
    _tile_loadconfig(&shapes);
    for (int64_t c = 0; c < n; c += kPanel) {
        const int64_t cn = smaller(n - c, kPanel), panel = c / kPanel;
        for (int64_t r = 0; r < m; r += 32, buffer ^= 1) {
            const int64_t rn = smaller(m - r, 32);
            if (rn > 16 && cn > 16)
                amx_sum<true, true>(p, r, panel);
            else if (rn > 16)
                amx_sum<true, false>(p, r, panel);
            else if (cn > 16)
                amx_sum<false, true>(p, r, panel);
            else
                amx_sum<false, false>(p, r, panel);
            if (before.sums)
                amx_finish(p, before);
            amx_store(sums[buffer], rn > 16, cn > 16);
            before = {sums[buffer], r, rn, c, cn};
        }
    }
    if (before.sums)
        amx_finish(p, before);
    _tile_release();
}

#endif

template <bool Half, bool Columns> void tile(const Product &p, int64_t m, int64_t n) {
    constexpr int big = Half ? kHalfBlock : kBlock;
    for (int64_t c = 0; c < n; c += kPanel) {
        const int64_t cn = smaller(n - c, kPanel);
        for (int64_t r = 0; r < m;) {
            const int64_t rest = m - r;
            if (rest > 4)
                block<big, Half, Columns>(p, r, smaller(rest, big), c, cn), r += big;
            else if (rest > 1)
                block<4, Half, Columns>(p, r, rest, c, cn), r += 4;
            else
                block<1, Half, Columns>(p, r, 1, c, cn), r += 1;
        }
    }
}

template <bool Half> void few_rows(const Product &p, int64_t m, int64_t n) {
    for (int64_t r = 0; r < m;) {
        const int64_t rest = m - r;
        if (rest > 4)
            bytes_block<8, Half>(p, r, smaller(rest, 8), n), r += 8;
        else if (rest > 2)
            bytes_block<4, Half>(p, r, rest, n), r += 4;
        else if (rest > 1)
            bytes_block<2, Half>(p, r, rest, n), r += 2;
        else
            bytes_block<1, Half>(p, r, rest, n), r += 1;
    }
}

void widen_panel(uint32_t *to, const int8_t *b, int64_t depth, bool half_) {
    float *wide = reinterpret_cast<float *>(to);
    if (half_)
        for (int64_t k = 0; k < depth; ++k, wide += kPanel, b += 2 * kPanel)
            for (int j = 0; j < kPanel; j += W)
                store(wide + j, join_exact(load(b + j), load(b + kPanel + j)));
    else
        for (int64_t k = 0; k < depth; ++k, wide += kPanel, b += kPanel)
            for (int j = 0; j < kPanel; j += W)
                store(wide + j, load(b + j));
}

// One panel after the other.
void product_of_bytes(const Product &p, int64_t m, int64_t n) {
    Product q = p;
    for (int64_t c = 0; c < n; c += kPanel) {
        const int64_t cn = smaller(n - c, kPanel);
        if (m <= kFewRows) {
            p.half ? few_rows<true>(q, m, cn) : few_rows<false>(q, m, cn);
        } else {
            Product w = q;
            w.bytes = nullptr;
            widen_panel(p.wide, q.bytes, p.part[0].k, p.half);
            w.part[0].b = p.wide;
            product(w, m, cn);
        }
        q.bytes += p.part[0].b_panel;
        q.part[1].b += p.part[1].b_panel;
        if (p.scales.data)
            q.scales = q.scales.at(kPanel);
        if (p.bias.data)
            q.bias = q.bias.at(kPanel);
        if (p.add)
            q.add += kPanel;
        q.y = q.y.at(kPanel);
    }
}

} // namespace

void product(const Product &p, int64_t m, int64_t n) {
    if (p.bytes)
        return product_of_bytes(p, m, n);
#if defined(__AMX_BF16__)
    if (p.half && !p.columns)
        return amx_tile(p, m, n);
#endif
    if (p.half)
        p.columns ? tile<true, true>(p, m, n) : tile<true, false>(p, m, n);
    else
        p.columns ? tile<false, true>(p, m, n) : tile<false, false>(p, m, n);
}

} // namespace ponder::cpu::PONDER_ISA
