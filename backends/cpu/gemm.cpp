// A block of kBlock x (2 W) sums stays in registers over all of k: for each unit of k, two vectors
// of B and kBlock broadcasts of A make 2 kBlock fused multiply-adds. Sums run in the order of k
// whatever the block, so a row's result does not depend on where its tile begins.
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
    const vf alpha = set(p.alpha);
    const int widths[2] = {int(smaller(n, W)), int(n - W)};
#pragma GCC unroll 2
    for (int j = 0; j < N; ++j) {
        const int64_t column = c + j * W;
        const int width = widths[j];
        const vf bias = p.bias.data ? p.bias.get(column, width) : set(0);
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i) {
            if (i >= m)
                continue;
            const int64_t y = (r + i) * p.y_row + column;
            vf x = fma(sum[i][j], alpha, bias);
            if (p.add) {
                const float *add = p.add + (r + i) * p.add_row + column;
                x += width == W ? load(add) : load(add, width);
            }
            if (p.accumulate)
                x += width == W ? p.y.get(y) : p.y.get(y, width);
            if (width == W)
                p.y.put(y, x);
            else
                p.y.put(y, x, width);
        }
    }
}

template <int M, bool Half, bool Columns>
PONDER_INLINE void block(const Product &p, int64_t r, int64_t m, int64_t c, int64_t n) {
    if (n > W)
        block<M, 2, Half, Columns>(p, r, m, c, n);
    else
        block<M, 1, Half, Columns>(p, r, m, c, n);
}

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

} // namespace

void product(const Product &p, int64_t m, int64_t n) {
    if (p.half)
        p.columns ? tile<true, true>(p, m, n) : tile<true, false>(p, m, n);
    else
        p.columns ? tile<false, true>(p, m, n) : tile<false, false>(p, m, n);
}

void pack_a(uint32_t *to, View x, int64_t step, int64_t m, int64_t k, bool half_) {
    for (int64_t i = 0; i < m; ++i) {
        for (int64_t k0 = 0; k0 < k;) {
            const int64_t kn = smaller(k - k0, half_ ? 2 * kChunk : kChunk);
            uint32_t *row = to + (k0 / (half_ ? 2 * kChunk : kChunk)) * kChunkUnits + i * kStride;
            const View from = x.at(i * step + k0);
            if (half_) {
                if (kn % 2)
                    row[kn / 2] = 0;
                if (from.narrow)
                    memcpy(row, from.data, size_t(kn) * 2);
                else {
                    const View packed = {reinterpret_cast<char *>(row), true};
                    each_vector(
                        kn, PONDER_EACH(e, n) { packed.put(e, from.get(e, n), n); });
                }
            } else {
                const View packed = {reinterpret_cast<char *>(row), false};
                each_vector(
                    kn, PONDER_EACH(e, n) { packed.put(e, from.get(e, n), n); });
            }
            k0 += kn;
        }
    }
}

void pack_b(uint32_t *to, View x, int64_t k_step, int64_t n_step, int64_t k, int64_t n,
            bool half_) {
    const int64_t ku = units(k, half_);
    for (int64_t c = 0; c < n; c += kPanel, to += ku * kPanel) {
        const int64_t cn = smaller(n - c, kPanel);
        if (cn % W)
            memset(to, 0, size_t(ku * kPanel) * 4);
        if (n_step == 1) {
            for (int64_t u = 0; u < ku; ++u) {
                uint32_t *row = to + u * kPanel;
                const View from = x.at((half_ ? 2 * u : u) * k_step + c);
                if (!half_) {
                    const View packed = {reinterpret_cast<char *>(row), false};
                    each_vector(
                        cn, PONDER_EACH(e, w) { packed.put(e, from.get(e, w), w); });
                    continue;
                }
                const bool pair = 2 * u + 1 < k;
                const View next = pair ? from.at(k_step) : from;
                const View packed = {reinterpret_cast<char *>(row), false};
                if (x.narrow) {
                    each_vector(
                        cn, PONDER_EACH(e, w) {
                            const vf hi = pair ? next.get(e, w) : set(0);
                            packed.put(e, join_exact(from.get(e, w), hi), w);
                        });
                    continue;
                }
                each_vector(
                    cn, PONDER_EACH(e, w) {
                        const vf hi = pair ? next.get(e, w) : set(0);
                        packed.put(e, interleave(from.get(e, w), hi), w);
                    });
            }
        } else {
            for (int64_t j = 0; j < cn; ++j) {
                const View from = x.at((c + j) * n_step);
                for (int64_t u = 0; u < ku; ++u) {
                    uint32_t bits;
                    if (half_) {
                        const half lo = to_half(from.one(2 * u * k_step));
                        const half hi =
                            2 * u + 1 < k ? to_half(from.one((2 * u + 1) * k_step)) : half{0};
                        bits = uint32_t(hi.bits) << 16 | lo.bits;
                    } else {
                        const float f = from.one(u * k_step);
                        memcpy(&bits, &f, 4);
                    }
                    to[u * kPanel + j] = bits;
                }
            }
        }
    }
}

namespace {

struct WeightContext {
    View w;
    int64_t k, n;
    bool transposed;
};

void pack_weight_now(void *to, const void *context) {
    const WeightContext &c = *static_cast<const WeightContext *>(context);
    pack_b(static_cast<uint32_t *>(to), c.w, c.transposed ? 1 : c.n, c.transposed ? c.k : 1, c.k,
           c.n, c.w.narrow);
}

} // namespace

const uint32_t *pack_weight(const Call &c, const void *w, int32_t dtype, int64_t k, int64_t n,
                            bool transposed) {
    const bool half_ = dtype == kBF16;
    const WeightContext context = {View::of(const_cast<void *>(w), dtype), k, n, transposed};
    const uint64_t layout =
        uint64_t(k) << 32 | uint64_t(n) << 2 | uint64_t(half_) << 1 | transposed;
    return static_cast<const uint32_t *>(packed_weight(
        c.device, w, layout, 4 * b_units(units(k, half_), n), pack_weight_now, &context));
}

} // namespace ponder::cpu::PONDER_ISA
