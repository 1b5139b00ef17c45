// rope: pairs (x_2i, x_2i+1) of each head turn by (t mod period) theta^(-2i/D), Su et al. 2021,
// arXiv 2104.09864; back by that angle if inverse. With c = (cos, cos) and s = (-sin, sin) a pair,
// y = x c + swapped(x) s.
#include "ops.hpp"

#include <math.h>

namespace ponder::cpu::PONDER_ISA {
namespace {

// The tables cos[positions, D] and sin[positions, D] follow the struct.
struct Rope : Kernel {
    int64_t row_count, tokens, width, head, positions;
    int32_t x, y;
};

PONDER_INLINE vf swap_pairs(vf x) {
#if defined(__AVX512F__)
    return _mm512_permute_ps(x, 0xb1);
#else
    return _mm256_permute_ps(x, 0xb1);
#endif
}

void run(const Kernel *kernel, void *const *buffers, void *, uint32_t task) {
    const Rope &k = *static_cast<const Rope *>(kernel);
    const float *tables = reinterpret_cast<const float *>(&k + 1);
    const View x = View::of(buffers[0], k.x), y = View::of(buffers[1], k.y);
    const Span s = span(task, kTile, k.row_count);
    for (int64_t r = s.begin; r < s.end; ++r) {
        const int64_t at = r % k.tokens % k.positions * k.head;
        const View cosine = View::of(const_cast<float *>(tables + at), kF32);
        const View sine = cosine.at(k.positions * k.head);
        for (int64_t h = 0; h < k.width; h += k.head) {
            const View from = x.at(r * k.width + h), to = y.at(r * k.width + h);
            each_vector(
                k.head, PONDER_EACH(i, n) {
                    const vf v = from.get(i, n);
                    to.put(i, fma(v, cosine.get(i, n), swap_pairs(v) * sine.get(i, n)), n);
                });
        }
    }
}

} // namespace

int32_t plan_rope(const Call &c) {
    const int64_t heads = int64_t(attr(c, 0)), period = int64_t(attr(c, 1));
    const int64_t width = last(in(c, 0));
    if (!floats(in(c, 0)) || !floats(out(c, 0)) || in(c, 0).rank != 3 || heads < 1 || period < 1 ||
        width % heads || width / heads % 2)
        return PONDER_PLAN_NONE;
    const int64_t head = width / heads, tokens = in(c, 0).dim[1];
    const int64_t positions = larger(1, smaller(period, tokens));
    Rope *k = static_cast<Rope *>(
        kernel_memory(sizeof(Rope) + size_t(2 * positions * head) * sizeof(float)));
    if (!k)
        return PONDER_PLAN_FAILED;
    k->run = run;
    k->row_count = rows(in(c, 0)), k->tokens = tokens, k->width = width;
    k->head = head, k->positions = positions;
    k->x = in(c, 0).dtype, k->y = out(c, 0).dtype;
    float *cosine = reinterpret_cast<float *>(k + 1), *sine = cosine + positions * head;
    const double turn = attr(c, 3) != 0 ? -1 : 1;
    for (int64_t t = 0; t < positions; ++t)
        for (int64_t i = 0; i < head; i += 2) {
            const double angle = double(t) * ::pow(attr(c, 2), -double(i) / double(head));
            float *cs = cosine + t * head + i, *sn = sine + t * head + i;
            cs[0] = cs[1] = float(::cos(angle));
            sn[1] = float(turn * ::sin(angle));
            sn[0] = -sn[1];
        }
    return planned_rows(c, k, k->row_count);
}

} // namespace ponder::cpu::PONDER_ISA
