// Primitives: closed under vjp, so that any order of gradient can be recorded.
#include "tensor/ops.hpp"

#include "base/error.hpp"

#include <algorithm>

namespace ponder {

namespace {

uint64_t no_flops(const Graph &, const Call &) { return 0; }

Id unary(Graph &g, const OpRule &rule, Id x, std::vector<double> attr = {}) {
    const Id y = g.temporary(g.value(x).type, g.shape(x));
    g.add_call(rule, {x}, {y}, std::move(attr));
    return y;
}

// Dims aligned at the right; a missing one is 1.
int64_t dim_from_right(const Shape &s, int i) { return i < s.rank ? s[s.rank - 1 - i] : 1; }

Shape broadcast_shape(const Shape &a, const Shape &b) {
    Shape y = a.rank >= b.rank ? a : b;
    for (int i = 0; i < y.rank; ++i) {
        const int64_t da = dim_from_right(a, i), db = dim_from_right(b, i);
        if (da != db && da != 1 && db != 1)
            throw_error(PONDER_E_INTERNAL, "shapes do not broadcast: %d and %d", int(da), int(db));
        y.dim[y.rank - 1 - i] = std::max(da, db);
    }
    return y;
}

Id binary(Graph &g, const OpRule &rule, Id a, Id b, DType out) {
    const Id y = g.temporary(out, broadcast_shape(g.shape(a), g.shape(b)));
    g.add_call(rule, {a, b}, {y});
    return y;
}

// ---- add, sub, mul

void give(Tape &tape, Id to, Id gradient) {
    tape.add(to, sum_to(tape.graph, gradient, tape.graph.shape(to)));
}

void add_backward(Tape &tape, const Call &call) {
    for (Id in : call.in)
        if (tape.wants(in))
            give(tape, in, tape.gradient(call.out[0]));
}
const OpRule add_rule{"add", true, no_flops, add_backward};

void sub_backward(Tape &tape, const Call &call) {
    const Id dy = tape.gradient(call.out[0]);
    if (tape.wants(call.in[0]))
        give(tape, call.in[0], dy);
    if (tape.wants(call.in[1]))
        give(tape, call.in[1], affine(tape.graph, dy, -1, 0));
}
const OpRule sub_rule{"sub", true, no_flops, sub_backward};

void mul_backward(Tape &tape, const Call &call) {
    const Id dy = tape.gradient(call.out[0]);
    for (int i = 0; i < 2; ++i)
        if (tape.wants(call.in[size_t(i)]))
            give(tape, call.in[size_t(i)], mul(tape.graph, dy, call.in[size_t(1 - i)]));
}
const OpRule mul_rule{"mul", true, no_flops, mul_backward};

// ---- broadcast and its vjp, sum_to; reshape

void broadcast_backward(Tape &tape, const Call &call) {
    give(tape, call.in[0], tape.gradient(call.out[0]));
}
const OpRule broadcast_rule{"broadcast", true, no_flops, broadcast_backward};

void sum_backward(Tape &tape, const Call &call) {
    const Graph &g = tape.graph;
    tape.add(call.in[0], broadcast(tape.graph, tape.gradient(call.out[0]), g.shape(call.in[0])));
}
const OpRule sum_last_rule{"sum_last", true, no_flops, sum_backward};
const OpRule sum_to_rule{"sum_to", false, no_flops, sum_backward};

void reshape_backward(Tape &tape, const Call &call) {
    tape.add(call.in[0],
             reshape(tape.graph, tape.gradient(call.out[0]), tape.graph.shape(call.in[0])));
}
const OpRule reshape_rule{"reshape", false, no_flops, reshape_backward};

// ---- elementwise

void affine_backward(Tape &tape, const Call &call) {
    Graph &g = tape.graph;
    const Id x = call.in[0], dx = g.temporary(g.value(x).type, g.shape(x)); // it may have converted
    g.add_call(*call.rule, {tape.gradient(call.out[0])}, {dx}, {call.attr[0], 0});
    tape.add(x, dx);
}
const OpRule affine_rule{"affine", true, no_flops, affine_backward};

void power_backward(Tape &tape, const Call &call) {
    Graph &g = tape.graph;
    const double n = call.attr[0];
    const Id slope = affine(g, power(g, call.in[0], n - 1), n, 0);
    tape.add(call.in[0], mul(g, tape.gradient(call.out[0]), slope));
}
const OpRule power_rule{"power", true, no_flops, power_backward};

void exp_backward(Tape &tape, const Call &call) {
    tape.add(call.in[0], mul(tape.graph, tape.gradient(call.out[0]), call.out[0]));
}
const OpRule exp_rule{"exp", true, no_flops, exp_backward};

// Constant wherever it has a slope.
const OpRule step_rule{"step", true, no_flops, [](Tape &, const Call &) {}};

void relu_backward(Tape &tape, const Call &call) {
    Graph &g = tape.graph;
    tape.add(call.in[0], mul(g, tape.gradient(call.out[0]), unary(g, step_rule, call.in[0])));
}
const OpRule relu_rule{"relu", true, no_flops, relu_backward};

// y = s(x): dy/dx = s (1 - s)
void sigmoid_backward(Tape &tape, const Call &call) {
    Graph &g = tape.graph;
    const Id y = call.out[0];
    const Id slope = mul(g, y, affine(g, y, -1, 1));
    tape.add(call.in[0], mul(g, tape.gradient(y), slope));
}
const OpRule sigmoid_rule{"sigmoid", true, no_flops, sigmoid_backward};

extern const OpRule gelu_derivative_rule;

void gelu_derivative_backward(Tape &tape, const Call &call) {
    Graph &g = tape.graph;
    const Id slope = unary(g, gelu_derivative_rule, call.in[0], {call.attr[0] + 1});
    tape.add(call.in[0], mul(g, tape.gradient(call.out[0]), slope));
}
const OpRule gelu_derivative_rule{"gelu_derivative", true, no_flops, gelu_derivative_backward};

// ---- softmax, log_sum_exp, pick

// dx = p (dp - sum(p dp))
void softmax_backward(Tape &tape, const Call &call) {
    Graph &g = tape.graph;
    const Id p = call.out[0], dp = tape.gradient(p);
    tape.add(call.in[0], mul(g, p, sub(g, dp, sum_last(g, mul(g, p, dp)))));
}
const OpRule softmax_rule{"softmax", true, no_flops, softmax_backward};

void log_sum_exp_backward(Tape &tape, const Call &call) {
    Graph &g = tape.graph;
    tape.add(call.in[0], mul(g, softmax(g, call.in[0], false), tape.gradient(call.out[0])));
}
const OpRule log_sum_exp_rule{"log_sum_exp", true, no_flops, log_sum_exp_backward};

extern const OpRule pick_rule, pick_vjp_rule;

void pick_backward(Tape &tape, const Call &call) {
    Graph &g = tape.graph;
    const Id dx = g.temporary(g.value(call.in[0]).type, g.shape(call.in[0]));
    g.add_call(pick_vjp_rule, {tape.gradient(call.out[0]), call.in[1]}, {dx});
    tape.add(call.in[0], dx);
}
void pick_vjp_backward(Tape &tape, const Call &call) {
    tape.add(call.in[0], pick(tape.graph, tape.gradient(call.out[0]), call.in[1]));
}
const OpRule pick_rule{"pick", true, no_flops, pick_backward};
const OpRule pick_vjp_rule{"pick_vjp", true, no_flops, pick_vjp_backward};

// ---- matmul

uint64_t matmul_flops(const Graph &g, const Call &call) {
    const Shape &a = g.shape(call.in[0]), &c = g.shape(call.out[0]);
    return 2 * uint64_t(c.count()) * uint64_t(a[a.rank - (call.attr[0] != 0 ? 2 : 1)]);
}

// c = op(a) op(b): d op(a) = dc op(b)^T, d op(b) = op(a)^T dc, transposed again where op does.
void matmul_backward(Tape &tape, const Call &call) {
    Graph &g = tape.graph;
    const Id a = call.in[0], b = call.in[1], dc = tape.gradient(call.out[0]);
    const bool ta = call.attr[0] != 0, tb = call.attr[1] != 0;
    if (tape.wants(a))
        tape.add(a, ta ? matmul(g, b, dc, tb, true) : matmul(g, dc, b, false, !tb));
    if (tape.wants(b))
        tape.add(b, tb ? matmul(g, dc, a, true, ta) : matmul(g, a, dc, !ta, false));
}
const OpRule matmul_rule{"matmul", false, matmul_flops, matmul_backward};

// ---- where things stand

extern const OpRule split_heads_rule, merge_heads_rule;

void split_heads_backward(Tape &tape, const Call &call) {
    tape.add(call.in[0], merge_heads(tape.graph, tape.gradient(call.out[0]), int64_t(call.attr[1]),
                                     int64_t(call.attr[2])));
}
void merge_heads_backward(Tape &tape, const Call &call) {
    tape.add(call.in[0], split_heads(tape.graph, tape.gradient(call.out[0]), int64_t(call.attr[0]),
                                     int64_t(call.attr[1]), int64_t(call.attr[2])));
}
const OpRule split_heads_rule{"split_heads", false, no_flops, split_heads_backward};
const OpRule merge_heads_rule{"merge_heads", false, no_flops, merge_heads_backward};

extern const OpRule slice_rows_rule, slice_rows_vjp_rule;

void slice_rows_backward(Tape &tape, const Call &call) {
    const Shape &x = tape.graph.shape(call.in[0]);
    tape.add(call.in[0], pad_rows(tape.graph, tape.gradient(call.out[0]), int64_t(call.attr[0]),
                                  x[x.rank - 2]));
}
void slice_rows_vjp_backward(Tape &tape, const Call &call) {
    const Shape &dy = tape.graph.shape(call.in[0]);
    tape.add(call.in[0], slice_rows(tape.graph, tape.gradient(call.out[0]), int64_t(call.attr[0]),
                                    dy[dy.rank - 2]));
}
// Not rows ops: output row t is input row t + first, another task's.
const OpRule slice_rows_rule{"slice_rows", false, no_flops, slice_rows_backward};
const OpRule slice_rows_vjp_rule{"slice_rows_vjp", false, no_flops, slice_rows_vjp_backward};

} // namespace

Id add(Graph &g, Id a, Id b, DType out) { return binary(g, add_rule, a, b, out); }
Id sub(Graph &g, Id a, Id b) { return binary(g, sub_rule, a, b, g.value(a).type); }
Id mul(Graph &g, Id a, Id b) { return binary(g, mul_rule, a, b, g.value(a).type); }

Id broadcast(Graph &g, Id x, Shape shape) {
    if (g.shape(x) == shape)
        return x;
    const Id y = g.temporary(g.value(x).type, shape);
    g.add_call(broadcast_rule, {x}, {y});
    return y;
}

Id sum_last(Graph &g, Id x) {
    const Id y = g.temporary(g.value(x).type, g.shape(x).with_last(1));
    g.add_call(sum_last_rule, {x}, {y});
    return y;
}

Id sum_to(Graph &g, Id x, Shape shape) {
    if (g.shape(x) == shape)
        return x;
    if (g.shape(x).with_last(1) == shape)
        return sum_last(g, x);
    const Id y = g.temporary(g.wide, shape);
    g.add_call(sum_to_rule, {x}, {y});
    return y;
}

Id reshape(Graph &g, Id x, Shape shape) {
    const Id y = g.temporary(g.value(x).type, shape);
    g.add_call(reshape_rule, {x}, {y});
    return y;
}

Id affine(Graph &g, Id x, double factor, double offset) {
    return unary(g, affine_rule, x, {factor, offset});
}

void convert(Graph &g, Id x, Id y) { g.add_call(affine_rule, {x}, {y}, {1, 0}); }
Id converted(Graph &g, Id x, DType type) {
    if (g.value(x).type == type)
        return x;
    const Id y = g.temporary(type, g.shape(x));
    convert(g, x, y);
    return y;
}
Id power(Graph &g, Id x, double exponent) { return unary(g, power_rule, x, {exponent}); }
Id exp(Graph &g, Id x) { return unary(g, exp_rule, x); }
Id relu(Graph &g, Id x) { return unary(g, relu_rule, x); }
Id sigmoid(Graph &g, Id x) { return unary(g, sigmoid_rule, x); }
Id gelu_derivative(Graph &g, Id x, int order) {
    return unary(g, gelu_derivative_rule, x, {double(order)});
}
Id softmax(Graph &g, Id x, bool causal) { return unary(g, softmax_rule, x, {double(causal)}); }

Id log_sum_exp(Graph &g, Id x) {
    const Id y = g.temporary(g.value(x).type, g.shape(x).with_last(1));
    g.add_call(log_sum_exp_rule, {x}, {y});
    return y;
}

Id pick(Graph &g, Id x, Id target) {
    const Id y = g.temporary(g.value(x).type, g.shape(x).with_last(1));
    g.add_call(pick_rule, {x, target}, {y});
    return y;
}

Id matmul(Graph &g, Id a, Id b, bool ta, bool tb, DType out) {
    Shape c = g.shape(a);
    const Shape &sb = g.shape(b);
    c.dim[c.rank - 2] = g.shape(a)[c.rank - (ta ? 1 : 2)];
    c.dim[c.rank - 1] = sb[sb.rank - (tb ? 2 : 1)];
    const Id y = g.temporary(out == DType::none ? g.value(a).type : out, c);
    g.add_call(matmul_rule, {a, b}, {y}, {double(ta), double(tb)});
    return y;
}

Id split_heads(Graph &g, Id x, int64_t heads, int64_t part, int64_t parts) {
    const Shape &s = g.shape(x);
    const Id y = g.temporary(g.value(x).type, {s[0], heads, s[1], s[2] / (parts * heads)});
    g.add_call(split_heads_rule, {x}, {y}, {double(heads), double(part), double(parts)});
    return y;
}

Id merge_heads(Graph &g, Id x, int64_t part, int64_t parts) {
    const Shape &s = g.shape(x);
    const Id y = g.temporary(g.value(x).type, {s[0], s[2], parts * s[1] * s[3]});
    g.add_call(merge_heads_rule, {x}, {y}, {double(s[1]), double(part), double(parts)});
    return y;
}

Id slice_rows(Graph &g, Id x, int64_t first, int64_t count) {
    Shape s = g.shape(x);
    s.dim[s.rank - 2] = count;
    const Id y = g.temporary(g.value(x).type, s);
    g.add_call(slice_rows_rule, {x}, {y}, {double(first)});
    return y;
}

Id pad_rows(Graph &g, Id x, int64_t first, int64_t count) {
    Shape s = g.shape(x);
    s.dim[s.rank - 2] = count;
    const Id y = g.temporary(g.value(x).type, s);
    g.add_call(slice_rows_vjp_rule, {x}, {y}, {double(first)});
    return y;
}

} // namespace ponder
