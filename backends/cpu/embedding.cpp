// embedding: y_t = table[id_t] + position[first + t], an int8 row of the table times its scale.
#include "ops.hpp"

namespace ponder::cpu::PONDER_ISA {
namespace {

struct Embedding : Kernel {
    int64_t row_count, tokens, width, vocabulary, positions, first_position;
    int32_t table, position;
    uint32_t out; // place of y
};

void run(const Kernel *kernel, void *const *buffers, void *, uint32_t task) {
    const Embedding &k = *static_cast<const Embedding *>(kernel);
    const int32_t *ids = static_cast<const int32_t *>(buffers[0]);
    const View table = View::of(buffers[1], k.table), position = View::of(buffers[2], k.position);
    float *y = static_cast<float *>(buffers[k.out]);
    const bool bytes = k.table == kI8;
    const View scales = {bytes ? static_cast<char *>(buffers[k.out - 1]) : nullptr, false};
    const Span s = span(task, kTile, k.row_count);
    for (int64_t r = s.begin; r < s.end; ++r) {
        // Callers check ids; an id out of range still must not read outside the table.
        const int64_t id = larger(0, smaller(ids[r], k.vocabulary - 1));
        const int64_t at = smaller(k.first_position + r % k.tokens, k.positions - 1);
        const View p = position.at(at * k.width);
        const int8_t *stored = static_cast<const int8_t *>(buffers[1]) + id * k.width;
        const vf scale = set(bytes ? scales.one(id) : 1);
        float *to = y + r * k.width;
        each_vector(
            k.width, PONDER_EACH(i, n) {
                const vf e = bytes ? load(stored + i, n) * scale : table.get(id * k.width + i, n);
                const vf v = e + p.get(i, n);
                if (n == W)
                    store(to + i, v);
                else
                    store(to + i, v, n);
            });
    }
}

} // namespace

int32_t plan_embedding(const Call &c) {
    if (in(c, 0).dtype != kI32 || !is_weight(in(c, 1)) || !floats(in(c, 2)) ||
        out(c, 0).dtype != kF32 ||
        (scaled(c, 1) && in(c, c.op->n_in - 1).dim[0] != in(c, 1).dim[0]))
        return PONDER_PLAN_NONE;
    Embedding *k = new_kernel<Embedding>(run);
    if (!k)
        return PONDER_PLAN_FAILED;
    k->row_count = rows(out(c, 0)), k->width = last(out(c, 0)), k->tokens = last(in(c, 0));
    k->vocabulary = in(c, 1).dim[0], k->positions = in(c, 2).dim[0];
    k->first_position = int64_t(attr(c, 0));
    k->out = c.op->n_in;
    k->table = in(c, 1).dtype, k->position = in(c, 2).dtype;
    return planned_rows(c, k, k->row_count);
}

} // namespace ponder::cpu::PONDER_ISA
