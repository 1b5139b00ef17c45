// embedding_vjp: dtable[v] = sum of dy[s,t] where ids[s,t] = v, dposition[first + t] = sum_s
// dy[s,t]. A task owns 64 rows of one of the two and adds to them in the order of the tokens.
#include "ops.hpp"

namespace ponder::cpu::PONDER_ISA {
namespace {

struct EmbeddingGradient : Kernel {
    int64_t streams, tokens, width, vocabulary, positions, first;
};

void add_row(float *to, const float *from, int64_t width) {
    const View y = View::of(to, kF32), x = View::of(const_cast<float *>(from), kF32);
    each_vector(
        width, PONDER_EACH(i, n) { y.put(i, y.get(i, n) + x.get(i, n), n); });
}

void run(const Kernel *kernel, void *const *buffers, void *, uint32_t task) {
    const EmbeddingGradient &k = *static_cast<const EmbeddingGradient *>(kernel);
    const float *dy = static_cast<const float *>(buffers[0]);
    const int32_t *ids = static_cast<const int32_t *>(buffers[1]);
    const int64_t of_table = tiles(k.vocabulary, kTile);
    if (task < of_table) {
        const Span s = span(task, kTile, k.vocabulary);
        float *table = static_cast<float *>(buffers[2]);
        memset(table + s.begin * k.width, 0, size_t((s.end - s.begin) * k.width) * 4);
        for (int64_t r = 0; r < k.streams * k.tokens; ++r)
            if (ids[r] >= s.begin && ids[r] < s.end)
                add_row(table + ids[r] * k.width, dy + r * k.width, k.width);
        return;
    }
    const Span s = span(uint32_t(task - of_table), kTile, k.positions);
    for (int64_t p = s.begin; p < s.end; ++p) {
        float *to = static_cast<float *>(buffers[3]) + p * k.width;
        memset(to, 0, size_t(k.width) * 4);
        const int64_t t = p - k.first;
        if (t >= 0 && t < k.tokens)
            for (int64_t i = 0; i < k.streams; ++i)
                add_row(to, dy + (i * k.tokens + t) * k.width, k.width);
    }
}

} // namespace

int32_t plan_embedding_vjp(const Call &c) {
    if (in(c, 0).dtype != kF32 || in(c, 1).dtype != kI32 || out(c, 0).dtype != kF32 ||
        out(c, 1).dtype != kF32 || in(c, 0).rank != 3)
        return PONDER_PLAN_NONE;
    EmbeddingGradient *k = new_kernel<EmbeddingGradient>(run);
    if (!k)
        return PONDER_PLAN_FAILED;
    k->streams = in(c, 0).dim[0], k->tokens = in(c, 0).dim[1], k->width = last(in(c, 0));
    k->vocabulary = out(c, 0).dim[0], k->positions = out(c, 1).dim[0];
    k->first = int64_t(attr(c, 0));
    return planned(c, k, tiles(k->vocabulary, kTile) + tiles(k->positions, kTile), PONDER_TILE_ANY);
}

} // namespace ponder::cpu::PONDER_ISA
