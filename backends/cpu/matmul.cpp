// matmul: c = a b for each of the leading dims, a stored [K,M] if ta, b stored [N,K] if tb; f32
// results. A task makes one block of c: it packs its columns of b once, 512 of K at a time, and
// takes tiles of 64 rows of a through them.
#include "gemm.hpp"
#include "ops.hpp"

namespace ponder::cpu::PONDER_ISA {
namespace {

constexpr int64_t kDepth = 512; // of K at a time
constexpr int64_t kEnough = 8;  // tasks

struct Matmul : Kernel {
    int64_t m, n, k;          // of one product
    int64_t block_m, block_n; // of a task
    bool ta, tb, half_;
    int32_t a, b;
};

size_t left_units(const Matmul &k) {
    return larger(a_rows_units(units(kDepth, k.half_)),
                  k.half_ ? a_transposed_units(kDepth) : a_columns_units(kDepth));
}

// Rows [i, i + m) of a from column k0 on, as the left operand.
void left_of(const Matmul &k, Product &p, uint32_t *to, View a, int64_t i, int64_t m, int64_t k0,
             int64_t depth) {
    if (!k.ta) {
        left_operand(p.part[0], to, a.at(i * k.k + k0), k.k, m, depth, k.half_);
        return;
    }
    const View from = a.at(k0 * k.m + i);
    p.part[0].a = to;
    if (k.half_) {
        pack_a_transposed(to, from, k.m, depth, m);
        return;
    }
    for (int64_t r = 0; r < depth; ++r) {
        const View row = from.at(r * k.m), y = View::of(to + r * kStride, kF32);
        each_vector(
            m, PONDER_EACH(e, n) { y.put(e, row.get(e, n), n); });
    }
}

void run(const Kernel *kernel, void *const *buffers, void *workspace, uint32_t task) {
    const Matmul &k = *static_cast<const Matmul *>(kernel);
    const int64_t across = tiles(k.n, k.block_n), down = tiles(k.m, k.block_m);
    const int64_t which = task / (across * down);
    const int64_t i0 = task / across % down * k.block_m, j0 = task % across * k.block_n;
    const int64_t end = smaller(k.m, i0 + k.block_m), n = smaller(k.n - j0, k.block_n);
    const View a = View::of(buffers[0], k.a).at(which * k.m * k.k);
    const View b = View::of(buffers[1], k.b).at(which * k.k * k.n);
    float *c = static_cast<float *>(buffers[2]) + which * k.m * k.n;
    Carver carver{static_cast<char *>(workspace)};
    uint32_t *left = carver.take<uint32_t>(left_units(k));
    uint32_t *panels = carver.take<uint32_t>(b_units(units(kDepth, k.half_), k.block_n));
    Product p;
    p.half = k.half_;
    p.columns = k.ta && (!k.half_ || kTransposedIsColumns);
    p.y_row = k.n;
    for (int64_t k0 = 0; k0 < k.k; k0 += kDepth) {
        const int64_t depth = smaller(k.k - k0, kDepth);
        // What one tile of rows reads once is not worth packing.
        if (!k.half_ && !k.tb && n % kPanel == 0 && end - i0 <= kTile) {
            p.part[0] = direct_part(left, reinterpret_cast<const float *>(b.at(k0 * k.n + j0).data),
                                    depth, k.n);
        } else {
            const View from = b.at(k.tb ? j0 * k.k + k0 : k0 * k.n + j0);
            pack_b(panels, from, k.tb ? 1 : k.n, k.tb ? k.k : 1, depth, n, k.half_);
            p.part[0] = packed_part(left, panels, units(depth, k.half_));
        }
        for (int64_t i = i0; i < end; i += kTile) {
            const int64_t m = smaller(end - i, kTile);
            left_of(k, p, left, a, i, m, k0, depth);
            p.y = View::of(c + i * k.n + j0, kF32);
            product(p, m, n);
        }
        p.accumulate = true;
    }
}

} // namespace

int32_t plan_matmul(const Call &c) {
    const ponder_tensor &a = in(c, 0), &y = out(c, 0);
    if (!floats(a) || !floats(in(c, 1)) || y.dtype != kF32 || y.rank < 2 || a.rank != y.rank)
        return PONDER_PLAN_NONE;
    Matmul *k = new_kernel<Matmul>(run);
    if (!k)
        return PONDER_PLAN_FAILED;
    k->ta = attr(c, 0) != 0, k->tb = attr(c, 1) != 0;
    k->m = y.dim[y.rank - 2], k->n = last(y), k->k = a.dim[a.rank - (k->ta ? 2 : 1)];
    k->half_ = a.dtype == kBF16 || in(c, 1).dtype == kBF16;
    k->a = a.dtype, k->b = in(c, 1).dtype;
    const int64_t products = count(y) / (k->m * k->n);
    k->block_m = 4 * kTile, k->block_n = 256;
    const auto tasks = [&] { return products * tiles(k->m, k->block_m) * tiles(k->n, k->block_n); };
    while (tasks() < kEnough && (k->block_m > kTile || k->block_n > 128))
        if (k->block_m > kTile && (k->block_m >= k->block_n || k->n <= k->block_n / 2))
            k->block_m /= 2;
        else if (k->block_n > 128)
            k->block_n /= 2;
        else
            k->block_m /= 2;
    return planned(c, k, tasks(), PONDER_TILE_ANY,
                   padded(4 * left_units(*k)) +
                       padded(4 * b_units(units(kDepth, k->half_), k->block_n)));
}

} // namespace ponder::cpu::PONDER_ISA
