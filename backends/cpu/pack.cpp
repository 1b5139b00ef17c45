// Operands of the products in gemm.hpp's layouts.
#include "gemm.hpp"
#include "transpose.hpp"

namespace ponder::cpu::PONDER_ISA {
namespace {

// W units of consecutive elements x[at...], of which `left` exist.
PONDER_INLINE vf take_units(View x, int64_t at, int64_t left, bool half_) {
    if (!half_)
        return left >= W ? x.get(at) : x.get(at, int(larger(left, 0)));
    half u[2 * W];
    if (left >= 2 * W && x.narrow) {
        memcpy(u, x.at(at).data, sizeof u);
    } else if (left >= 2 * W) {
        store(u, x.get(at));
        store(u + W, x.get(at + W));
    } else {
        for (int64_t i = 0; i < 2 * W; ++i)
            u[i] = i < left ? to_half(x.one(at + i)) : half{0};
    }
    return load(reinterpret_cast<const float *>(u));
}

// A panel of n columns whose elements lie along k.
void pack_along(uint32_t *to, View x, int64_t n_step, int64_t k, int64_t n, bool half_) {
    const int64_t ku = units(k, half_);
    for (int64_t j = 0; j < n; j += W)
        for (int64_t u = 0; u < ku; u += W) {
            vf r[W];
            const int64_t at = half_ ? 2 * u : u;
#pragma GCC unroll 16
            for (int i = 0; i < W; ++i)
                r[i] = j + i < n ? take_units(x, (j + i) * n_step + at, k - at, half_) : set(0);
            transpose(r);
            const int64_t un = smaller(W, ku - u);
            for (int64_t i = 0; i < un; ++i)
                store(reinterpret_cast<float *>(to + (u + i) * kPanel + j), r[i]);
        }
}

// A panel of n columns whose elements lie across k.
void pack_across(uint32_t *to, View x, int64_t k_step, int64_t k, int64_t n, bool half_) {
    const int64_t ku = units(k, half_);
    for (int64_t u = 0; u < ku; ++u) {
        const View row = View::of(to + u * kPanel, kF32);
        const int64_t at = half_ ? 2 * u : u;
        const View from = x.at(at * k_step), next = from.at(k_step);
        if (!half_)
            each_vector(
                n, PONDER_EACH(i, w) { row.put(i, from.get(i, w), w); });
        else if (at + 1 < k)
            each_vector(
                n, PONDER_EACH(i, w) {
                    const vf lo = from.get(i, w), hi = next.get(i, w);
                    row.put(i, x.narrow ? join_exact(lo, hi) : interleave(lo, hi), w);
                });
        else
            each_vector(
                n, PONDER_EACH(i, w) {
                    row.put(i, at < k ? interleave(from.get(i, w), set(0)) : set(0), w);
                });
    }
}

PONDER_INLINE void copy_chunk(uint32_t *to, const char *from) {
    const View x = {const_cast<char *>(from), false}, y = {reinterpret_cast<char *>(to), false};
#pragma GCC unroll 8
    for (int64_t i = 0; i < kChunk; i += W)
        y.put(i, x.get(i));
}

} // namespace

void pack_a(uint32_t *to, View x, int64_t step, int64_t m, int64_t k, bool half_, View factor) {
    const int64_t chunk = half_ ? 2 * kChunk : kChunk;
    for (int64_t i = 0; i < m; ++i)
        for (int64_t k0 = 0; k0 < k; k0 += chunk) {
            const int64_t kn = smaller(k - k0, chunk);
            uint32_t *row = to + k0 / chunk * kChunkUnits + i * kStride;
            const View from = x.at(i * step + k0);
            if (half_)
                for (int64_t u = kn / 2; u < units(kn, true); ++u)
                    row[u] = 0;
            const View packed = {reinterpret_cast<char *>(row), half_};
            if (factor.data) {
                const View by = factor.at(k0);
                each_vector(
                    kn, PONDER_EACH(e, n) { packed.put(e, from.get(e, n) * by.get(e, n), n); });
            } else if (half_ && from.narrow && kn == chunk)
                copy_chunk(row, from.data);
            else if (half_ && from.narrow)
                memcpy(row, from.data, size_t(kn) * 2);
            else
                each_vector(
                    kn, PONDER_EACH(e, n) { packed.put(e, from.get(e, n), n); });
        }
}

void pack_a_transposed(uint32_t *to, View x, int64_t step, int64_t k, int64_t m) {
    const auto pair = [&](int64_t u, int64_t i, int n) __attribute__((always_inline)) {
        const int64_t at = 2 * u * step + i;
        if (2 * u + 1 < k) {
            const vf even = x.get(at, n), odd = x.get(at + step, n);
            return x.narrow ? join_exact(even, odd) : interleave(even, odd);
        }
        return 2 * u < k ? interleave(x.get(at, n), set(0)) : set(0);
    };
    const int64_t ku = units(k, true);
    each_vector(
        m, PONDER_EACH(i, n) {
            if (kTransposedIsColumns) {
                for (int64_t u = 0; u < ku; ++u)
                    store(reinterpret_cast<float *>(to) + u * kStride + i, pair(u, i, n));
                return;
            }
            for (int64_t u = 0; u < ku; u += W) {
                uint32_t *at = to + u / kChunk * kChunkUnits + i * kStride + u % kChunk;
                vf r[W];
#pragma GCC unroll 16
                for (int j = 0; j < W; ++j)
                    r[j] = pair(u + j, i, n);
                transpose(r);
#pragma GCC unroll 16
                for (int j = 0; j < W; ++j)
                    store(reinterpret_cast<float *>(at) + j * kStride, r[j]);
            }
        });
}

void pack_b(uint32_t *to, View x, int64_t k_step, int64_t n_step, int64_t k, int64_t n,
            bool half_) {
    const int64_t panel = units(k, half_) * kPanel;
    for (int64_t c = 0; c < n; c += kPanel, to += panel) {
        const int64_t cn = smaller(n - c, kPanel);
        if (n_step == 1) {
            if (cn % W)
                memset(to, 0, size_t(panel) * 4);
            pack_across(to, x.at(c), k_step, k, cn, half_);
        } else {
            pack_along(to, x.at(c * n_step), n_step, k, cn, half_);
        }
    }
}

namespace {

struct WeightContext {
    View w;
    int64_t k, n;
    bool transposed;
};

void pack_units(void *to, const void *context) {
    const WeightContext &c = *static_cast<const WeightContext *>(context);
    pack_b(static_cast<uint32_t *>(to), c.w, c.transposed ? 1 : c.n, c.transposed ? c.k : 1, c.k,
           c.n, c.w.narrow);
}

void pack_bytes(void *to, const void *context) {
    const WeightContext &c = *static_cast<const WeightContext *>(context);
    const int64_t rows = byte_rows(c.k);
    char *panel = static_cast<char *>(to);
    for (int64_t j = 0; j < c.n; j += kPanel, panel += rows * kPanel) {
        const int64_t n = smaller(c.n - j, kPanel);
        memset(panel, 0, size_t(rows * kPanel));
        if (!c.transposed) {
            for (int64_t k = 0; k < c.k; ++k)
                memcpy(panel + k * kPanel, c.w.data + k * c.n + j, size_t(n));
            continue;
        }
        // Blocks of k, so that a column's bytes are in cache for the next one.
        for (int64_t k0 = 0; k0 < c.k; k0 += 2 * kChunk)
            for (int64_t i = 0; i < n; ++i) {
                const char *from = c.w.data + (j + i) * c.k;
                for (int64_t k = k0; k < smaller(k0 + 2 * kChunk, c.k); ++k)
                    panel[k * kPanel + i] = from[k];
            }
    }
}

} // namespace

Weight pack_weight(const Call &c, uint32_t i, int64_t k, int64_t n, bool transposed, bool half_) {
    void *w = const_cast<void *>(c.op->constant[i]);
    const bool bytes = scaled(c, i);
    const WeightContext context = {View::of(w, in(c, i).dtype), k, n, transposed};
    const uint64_t layout =
        uint64_t(k) << 34 | uint64_t(n) << 2 | uint64_t(half_ && !bytes) << 1 | transposed;
    const int64_t depth = units(k, half_);
    const void *packed =
        packed_weight(c.device, w, layout, bytes ? b_bytes(k, n) : 4 * b_units(depth, n),
                      bytes ? pack_bytes : pack_units, &context, sizeof context);
    if (bytes)
        return {nullptr, static_cast<const int8_t *>(packed), depth, kPanel * byte_rows(k)};
    return {static_cast<const uint32_t *>(packed), nullptr, depth, kPanel * depth};
}

} // namespace ponder::cpu::PONDER_ISA
