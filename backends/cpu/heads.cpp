// split_heads: y[s,h,t,:] = x[s,t, part C / parts + h D ...].  merge_heads: the way back, zeros in
// the other parts.  reshape: y = x.  Copies; a task makes 64 rows of the output.
#include "ops.hpp"

namespace ponder::cpu::PONDER_ISA {
namespace {

struct Heads : Kernel {
    int64_t row_count, tokens, width, heads, d, first; // first column of the part
    int32_t x, y;
};

PONDER_INLINE void copy(View to, View from, int64_t n) {
    each_vector(
        n, PONDER_EACH(i, w) { to.put(i, from.get(i, w), w); });
}

void split(const Kernel *kernel, void *const *buffers, void *, uint32_t task) {
    const Heads &k = *static_cast<const Heads *>(kernel);
    const View x = View::of(buffers[0], k.x), y = View::of(buffers[1], k.y);
    const Span s = span(task, kTile, k.row_count);
    for (int64_t r = s.begin; r < s.end; ++r) {
        const int64_t t = r % k.tokens, h = r / k.tokens % k.heads, i = r / k.tokens / k.heads;
        copy(y.at(r * k.d), x.at((i * k.tokens + t) * k.width + k.first + h * k.d), k.d);
    }
}

void merge(const Kernel *kernel, void *const *buffers, void *, uint32_t task) {
    const Heads &k = *static_cast<const Heads *>(kernel);
    const View x = View::of(buffers[0], k.x), y = View::of(buffers[1], k.y);
    const Span s = span(task, kTile, k.row_count);
    if (k.heads * k.d != k.width)
        memset(y.at(s.begin * k.width).data, 0,
               size_t((s.end - s.begin) * k.width) * (y.narrow ? 2 : 4));
    for (int64_t r = s.begin; r < s.end; ++r)
        for (int64_t h = 0; h < k.heads; ++h) {
            const int64_t from = (r / k.tokens * k.heads + h) * k.tokens + r % k.tokens;
            copy(y.at(r * k.width + k.first + h * k.d), x.at(from * k.d), k.d);
        }
}

// Rows of a common length; the shapes' own rows do not matter.
void same(const Kernel *kernel, void *const *buffers, void *, uint32_t task) {
    const Heads &k = *static_cast<const Heads *>(kernel);
    const Span s = span(task, k.width, k.row_count);
    copy(View::of(buffers[1], k.y).at(s.begin), View::of(buffers[0], k.x).at(s.begin),
         s.end - s.begin);
}

int32_t plan(const Call &c, const ponder_tensor &wide, const ponder_tensor &parted,
             void (*run)(const Kernel *, void *const *, void *, uint32_t)) {
    if (!floats(wide) || !floats(parted) || wide.rank != 3 || parted.rank != 4)
        return PONDER_PLAN_NONE;
    Heads *k = new_kernel<Heads>(run);
    if (!k)
        return PONDER_PLAN_FAILED;
    k->tokens = wide.dim[1], k->width = wide.dim[2], k->heads = parted.dim[1];
    k->d = parted.dim[3], k->first = int64_t(attr(c, 1)) * k->heads * k->d;
    k->row_count = rows(out(c, 0)), k->x = in(c, 0).dtype, k->y = out(c, 0).dtype;
    if (k->first < 0 || k->first + k->heads * k->d > k->width) {
        kernel_release(k);
        return PONDER_PLAN_NONE;
    }
    return planned(c, k, tiles(k->row_count, kTile), PONDER_TILE_ANY);
}

} // namespace

int32_t plan_split_heads(const Call &c) { return plan(c, in(c, 0), out(c, 0), split); }
int32_t plan_merge_heads(const Call &c) { return plan(c, out(c, 0), in(c, 0), merge); }

int32_t plan_reshape(const Call &c) {
    if (!floats(in(c, 0)) || !floats(out(c, 0)) || count(in(c, 0)) != count(out(c, 0)))
        return PONDER_PLAN_NONE;
    Heads *k = new_kernel<Heads>(same);
    if (!k)
        return PONDER_PLAN_FAILED;
    k->row_count = count(in(c, 0)), k->width = 16384;
    k->x = in(c, 0).dtype, k->y = out(c, 0).dtype;
    return planned(c, k, tiles(k->row_count, k->width), PONDER_TILE_ANY);
}

} // namespace ponder::cpu::PONDER_ISA
