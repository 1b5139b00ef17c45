// embedding: y_t = table[id_t] + position[first + t], an int8 row of the table times its scale;
// embedding_at: position[at_t].
#include "ops.hpp"

namespace ponder::cpu::PONDER_ISA {
namespace {

struct Embedding : Kernel {
    int64_t row_count, tokens, width, vocabulary, positions, first_position;
    int32_t table, position;
    bool given;   // positions
    uint32_t out; // place of y
};

void run(const Kernel *kernel, void *const *buffers, void *, uint32_t task) {
    const Embedding &k = *static_cast<const Embedding *>(kernel);
    const int32_t *ids = static_cast<const int32_t *>(buffers[0]);
    const int32_t *places = static_cast<const int32_t *>(buffers[1]); // if given
    buffers += k.given;
    const View table = View::of(buffers[1], k.table), position = View::of(buffers[2], k.position);
    float *y = static_cast<float *>(buffers[k.out]);
    const bool bytes = k.table == kI8;
    const View scales = {bytes ? static_cast<char *>(buffers[k.out - 1]) : nullptr, false};
    const Span s = span(task, kTile, k.row_count);
    for (int64_t r = s.begin; r < s.end; ++r) {
        // Callers check ids; an id out of range still must not read outside the table.
        const int64_t id = larger(0, smaller(ids[r], k.vocabulary - 1));
        const int64_t place = k.given ? places[r] : k.first_position + r % k.tokens;
        const int64_t at = larger(0, smaller(place, k.positions - 1));
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

namespace {

int32_t plan_lookup(const Call &c, uint32_t table) {
    if (in(c, 0).dtype != kI32 || !is_weight(in(c, table)) || !floats(in(c, table + 1)) ||
        out(c, 0).dtype != kF32 ||
        (scaled(c, table) && in(c, c.op->n_in - 1).dim[0] != in(c, table).dim[0]))
        return PONDER_PLAN_NONE;
    Embedding *k = new_kernel<Embedding>(run);
    if (!k)
        return PONDER_PLAN_FAILED;
    k->row_count = rows(out(c, 0)), k->width = last(out(c, 0)), k->tokens = last(in(c, 0));
    k->vocabulary = in(c, table).dim[0], k->positions = in(c, table + 1).dim[0];
    k->table = in(c, table).dtype, k->position = in(c, table + 1).dtype;
    k->given = table == 2, k->first_position = k->given ? 0 : int64_t(attr(c, 0));
    k->out = c.op->n_in - k->given; // counted from the table's place on
    return planned_rows(c, k, k->row_count);
}

} // namespace

int32_t plan_embedding(const Call &c) { return plan_lookup(c, 1); }

int32_t plan_embedding_at(const Call &c) {
    return in(c, 1).dtype == kI32 ? plan_lookup(c, 2) : PONDER_PLAN_NONE;
}

} // namespace ponder::cpu::PONDER_ISA
