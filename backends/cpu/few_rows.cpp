// One row goes by a loop of its own: four units of k at a time into sums of their own, since with
// two vectors of B a unit the sums of gemm.cpp would wait for each other. More rows take its
// blocks.
#include "few_rows.hpp"

namespace ponder::cpu::PONDER_ISA {
namespace {

constexpr int kUnroll = 4;

PONDER_INLINE vf load_units(const uint32_t *p) { return load(reinterpret_cast<const float *>(p)); }

// sum + a b for units of one k.
template <bool Half> PONDER_INLINE vf multiply(uint32_t a, vf b, vf sum) {
    if constexpr (Half) {
#if defined(__AVX512BF16__)
        return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(int(a)), (__m512bh)b);
#else
        const uint32_t low = a << 16, high = a & 0xffff0000u;
        float lo, hi;
        memcpy(&lo, &low, 4);
        memcpy(&hi, &high, 4);
        return fma(set(hi), high_half(b), fma(set(lo), low_half(b), sum));
#endif
    } else {
        float x;
        memcpy(&x, &a, 4);
        return fma(set(x), b, sum);
    }
}

template <bool Half>
PONDER_INLINE void panel(const uint32_t *a, const uint32_t *b, int64_t k, vf (&sum)[2]) {
    vf s[kUnroll][2];
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u)
        s[u][0] = s[u][1] = set(0);
    int64_t i = 0;
    for (; i + kUnroll <= k; i += kUnroll, b += kUnroll * kPanel)
#pragma GCC unroll 4
        for (int u = 0; u < kUnroll; ++u)
#pragma GCC unroll 2
            for (int j = 0; j < 2; ++j)
                s[u][j] = multiply<Half>(a[i + u], load_units(b + u * kPanel + j * W), s[u][j]);
    for (; i < k; ++i, b += kPanel)
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j)
            s[0][j] = multiply<Half>(a[i], load_units(b + j * W), s[0][j]);
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j)
        sum[j] = (s[0][j] + s[1][j]) + (s[2][j] + s[3][j]);
}

template <bool Half> void one_row(const FewRows &f, int64_t c, int64_t n, uint32_t *a) {
    const int64_t depth = f.w.depth;
    const View packed = {reinterpret_cast<char *>(a), Half};
    for (int64_t u = (Half ? f.k / 2 : f.k); u < depth; ++u)
        a[u] = 0;
    each_vector(
        f.k, PONDER_EACH(i, w) { packed.put(i, f.x.get(i, w), w); });
    const uint32_t *b = f.w.units + c / kPanel * f.w.panel;
    for (int64_t p = 0; p < n; p += kPanel, b += f.w.panel) {
        vf sum[2];
        panel<Half>(a, b, depth, sum);
        for (int j = 0; j < 2 && p + j * W < n; ++j) {
            const int64_t at = p + j * W;
            const int w = int(smaller(n - at, W));
            vf x = sum[j];
            if (f.bias.data)
                x += f.bias.get(c + at, w);
            if (f.add)
                x += w == W ? load(f.add + c + at) : load(f.add + c + at, w);
            f.y.put(at, x, w);
        }
    }
}

} // namespace

void few_rows(const FewRows &f, int64_t c, int64_t count, uint32_t *work) {
    if (f.rows == 1 && f.w.units)
        return f.half_ ? one_row<true>(f, c, count, work) : one_row<false>(f, c, count, work);
    Product p;
    p.half = f.half_;
    f.w.use(p, c, 0);
    left_operand(p.part[0], work, f.x, f.k, f.rows, f.k, f.half_);
    if (f.scales.data)
        p.scales = f.scales.at(c);
    if (f.bias.data)
        p.bias = f.bias.at(c);
    if (f.add)
        p.add = f.add + c, p.add_row = f.n;
    p.y = f.y, p.y_row = f.y_row;
    product(p, f.rows, count);
}

} // namespace ponder::cpu::PONDER_ISA
