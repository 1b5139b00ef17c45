// add: y = a + b.  sub: y = a - b.  mul: y = a b.  broadcast: y = a, a and b being broadcast to y.
// y falls into runs in which an operand has its numbers side by side or is one number.
#include "ops.hpp"

namespace ponder::cpu::PONDER_ISA {
namespace {

// Dims from the right, neighbours of one kind taken together: `step` 0 where they repeat.
struct Operand {
    int32_t type, rank;
    int64_t n[PONDER_MAX_RANK], step[PONDER_MAX_RANK];
};

struct Broadcast : Kernel {
    int64_t row_count, width;
    Operand operand[2];
    int32_t y;
};

using Run = void (*)(const Kernel *, void *const *, void *, uint32_t);

bool operand_of(const ponder_tensor &x, const ponder_tensor &y, Operand &o) {
    if (!floats(x) || x.rank > y.rank)
        return false;
    o = {};
    o.type = x.dtype;
    int64_t step = 1;
    for (int32_t i = 1; i <= y.rank; ++i) {
        const int64_t n = y.dim[y.rank - i], have = i <= x.rank ? x.dim[x.rank - i] : 1;
        if (have != n && have != 1)
            return false;
        if (n == 1)
            continue;
        if (o.rank && (o.step[o.rank - 1] != 0) == (have == n)) {
            o.n[o.rank - 1] *= n;
        } else {
            o.n[o.rank] = n, o.step[o.rank] = have == n ? step : 0;
            ++o.rank;
        }
        step *= have;
    }
    if (o.rank == 0)
        o.n[0] = o.step[0] = o.rank = 1;
    return true;
}

// Where an operand is at element i of y, and for how many elements its run goes on.
struct Reader {
    View data;
    const Operand &o;
    int64_t at, left;
    bool one;
    __attribute__((always_inline)) Reader(void *buffer, const Operand &o_)
        : data(View::of(buffer, o_.type)), o(o_), at(0), left(0), one(o_.step[0] == 0) {}
    __attribute__((always_inline)) void seek(int64_t i) {
        left = o.n[0] - i % o.n[0];
        at = 0;
        for (int32_t axis = 0; axis < o.rank; i /= o.n[axis++])
            at += i % o.n[axis] * o.step[axis];
    }
};

template <int N, class F>
PONDER_INLINE void combine(const Kernel *kernel, void *const *buffers, uint32_t task, F f) {
    const Broadcast &k = *static_cast<const Broadcast *>(kernel);
    const Span s = span(task, kTile, k.row_count);
    const int64_t end = s.end * k.width;
    const View y = View::of(buffers[N], k.y);
    Reader a(buffers[0], k.operand[0]), b(buffers[N - 1], k.operand[N - 1]);
    for (int64_t i = s.begin * k.width; i < end;) {
        a.seek(i), b.seek(i);
        const int64_t n = smaller(end - i, smaller(a.left, b.left));
        const View to = y.at(i), from_a = a.data.at(a.at), from_b = b.data.at(b.at);
        const auto sweep = [&](auto get_a, auto get_b) __attribute__((always_inline)) {
            each_vector(
                n, PONDER_EACH(j, w) { to.put(j, f(get_a(j, w), get_b(j, w)), w); });
        };
        const auto many = [](View from) {
            return [from](int64_t j, int w) __attribute__((always_inline)) {
                return from.get(j, w);
            };
        };
        const auto single = [](View from) {
            return [x = set(from.one(0))](int64_t, int) __attribute__((always_inline)) {
                return x;
            };
        };
        if (!a.one && !b.one)
            sweep(many(from_a), many(from_b));
        else if (!a.one)
            sweep(many(from_a), single(from_b));
        else if (!b.one)
            sweep(single(from_a), many(from_b));
        else
            sweep(single(from_a), single(from_b));
        i += n;
    }
}

#define PONDER_OF2(a, b) [](vf a, [[maybe_unused]] vf b) __attribute__((always_inline))

void run_add(const Kernel *kernel, void *const *buffers, void *, uint32_t task) {
    combine<2>(
        kernel, buffers, task, PONDER_OF2(a, b) { return a + b; });
}
void run_sub(const Kernel *kernel, void *const *buffers, void *, uint32_t task) {
    combine<2>(
        kernel, buffers, task, PONDER_OF2(a, b) { return a - b; });
}
void run_mul(const Kernel *kernel, void *const *buffers, void *, uint32_t task) {
    combine<2>(
        kernel, buffers, task, PONDER_OF2(a, b) { return a * b; });
}
void run_broadcast(const Kernel *kernel, void *const *buffers, void *, uint32_t task) {
    combine<1>(
        kernel, buffers, task, PONDER_OF2(a, b) { return a; });
}

int32_t plan(const Call &c, Run run, uint32_t operands) {
    const ponder_tensor &y = out(c, 0);
    Broadcast plan = {};
    if (!floats(y))
        return PONDER_PLAN_NONE;
    for (uint32_t i = 0; i < operands; ++i)
        if (!operand_of(in(c, i), y, plan.operand[i]))
            return PONDER_PLAN_NONE;
    Broadcast *k = new_kernel<Broadcast>(run);
    if (!k)
        return PONDER_PLAN_FAILED;
    k->operand[0] = plan.operand[0], k->operand[1] = plan.operand[1];
    k->row_count = rows(y), k->width = last(y), k->y = y.dtype;
    return planned_rows(c, k, k->row_count);
}

} // namespace

int32_t plan_add(const Call &c) { return plan(c, run_add, 2); }
int32_t plan_sub(const Call &c) { return plan(c, run_sub, 2); }
int32_t plan_mul(const Call &c) { return plan(c, run_mul, 2); }
int32_t plan_broadcast(const Call &c) { return plan(c, run_broadcast, 1); }

} // namespace ponder::cpu::PONDER_ISA
