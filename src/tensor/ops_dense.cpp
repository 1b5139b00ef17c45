// Products with weights, and what stands between them: one row at a time.
#include "tensor/ops.hpp"

#include "base/error.hpp"

namespace ponder {

namespace {

uint64_t rows_of(const Shape &s) { return uint64_t(s.count() / s[s.rank - 1]); }

uint64_t no_flops(const Graph &, const Call &) { return 0; }

extern const OpRule linear_rule, lora_linear_vjp_rule, layer_norm_vjp_rule, gelu_vjp_rule,
    slice_rows_vjp_rule;

// ---- embedding: y_t = table[id_t] + position[first + t]; frozen, so without a vjp

const OpRule embedding_rule{"embedding", true, no_flops, nullptr};

// ---- layer_norm

void layer_norm_backward(Tape &tape, const Call &call) {
    Graph &g = tape.graph;
    if (!tape.wants(call.in[0]))
        return;
    const Id dy = tape.gradient(call.out[0]), x = call.in[0];
    const Id dx = g.temporary(g.wide, g.shape(x));
    // The residual stream's gradient so far is added in the same sweep.
    const Id carry = tape.take(x);
    g.add_call(layer_norm_vjp_rule, {dy, x, call.in[1], call.out[1], carry}, {dx});
    tape.add(x, dx);
}

const OpRule layer_norm_rule{"layer_norm", true, no_flops, layer_norm_backward};
const OpRule layer_norm_vjp_rule{"layer_norm_vjp", true, no_flops, nullptr};

// ---- linear: y = add + x w + b, dx = dy w^T

uint64_t linear_flops(const Graph &g, const Call &call) {
    const Shape &x = g.shape(call.in[0]), &y = g.shape(call.out[0]);
    return 2 * rows_of(x) * uint64_t(x[x.rank - 1]) * uint64_t(y[y.rank - 1]);
}

void linear_backward(Tape &tape, const Call &call) {
    Graph &g = tape.graph;
    const Id dy = tape.gradient(call.out[0]), x = call.in[0], residual = call.in[3];
    if (tape.wants(call.in[1]) || tape.wants(call.in[2]))
        throw_error(PONDER_E_INTERNAL, "linear: gradient of a frozen weight");
    if (tape.wants(residual))
        tape.add(residual, dy);
    if (tape.wants(x))
        tape.add(x, linear(g, dy, call.in[1], none, none, call.attr[0] == 0, g.value(x).type));
}

const OpRule linear_rule{"linear", true, linear_flops, linear_backward};

// ---- lora_linear: u = x a, y = add + x w + b + scale u bb (Hu et al. 2021)

uint64_t lora_linear_flops(const Graph &g, const Call &call) {
    const Shape &x = g.shape(call.in[0]), &y = g.shape(call.out[0]), &a = g.shape(call.in[3]);
    const uint64_t k = uint64_t(x[2]), n = uint64_t(y[2]), r = uint64_t(a[2]);
    return 2 * rows_of(x) * (k * n + r * (k + n));
}

void lora_linear_backward(Tape &tape, const Call &call) {
    Graph &g = tape.graph;
    const Id dy = tape.gradient(call.out[0]), u = call.out[1];
    const Id x = call.in[0], w = call.in[1], a = call.in[3], bb = call.in[4];
    if (tape.wants(call.in[5]))
        tape.add(call.in[5], dy);
    const Id du = g.temporary(g.act, g.shape(u));
    const Id dx = g.temporary(g.value(x).type, g.shape(x));
    g.add_call(lora_linear_vjp_rule, {dy, w, a, bb}, {dx, du}, call.attr);
    if (tape.wants(x))
        tape.add(x, dx);
    if (tape.wants(a))
        tape.add(a, matmul_tn(g, x, du));
    if (tape.wants(bb)) {
        if (call.attr[0] != 1)
            throw_error(PONDER_E_INTERNAL, "lora_linear: only scale 1 has a gradient");
        tape.add(bb, matmul_tn(g, u, dy));
    }
}

const OpRule lora_linear_rule{"lora_linear", true, lora_linear_flops, lora_linear_backward};

uint64_t lora_linear_vjp_flops(const Graph &g, const Call &call) {
    const Shape &dy = g.shape(call.in[0]), &dx = g.shape(call.out[0]), &a = g.shape(call.in[2]);
    const uint64_t k = uint64_t(dx[2]), n = uint64_t(dy[2]), r = uint64_t(a[2]);
    return 2 * rows_of(dy) * (k * n + r * (k + n));
}

const OpRule lora_linear_vjp_rule{"lora_linear_vjp", true, lora_linear_vjp_flops, nullptr};

// ---- gelu, add, mul, sigmoid, slice_rows

void gelu_backward(Tape &tape, const Call &call) {
    Graph &g = tape.graph;
    const Id x = call.in[0];
    const Id dx = g.temporary(g.value(x).type, g.shape(x));
    g.add_call(gelu_vjp_rule, {tape.gradient(call.out[0]), x}, {dx});
    tape.add(x, dx);
}

const OpRule gelu_rule{"gelu", true, no_flops, gelu_backward};
const OpRule gelu_vjp_rule{"gelu_vjp", true, no_flops, nullptr};

void add_backward(Tape &tape, const Call &call) {
    for (Id in : call.in)
        if (tape.wants(in))
            tape.add(in, tape.gradient(call.out[0]));
}

const OpRule add_rule{"add", true, no_flops, add_backward};
const OpRule mul_rule{"mul", true, no_flops, nullptr};
const OpRule sigmoid_rule{"sigmoid", true, no_flops, nullptr};

void slice_rows_backward(Tape &tape, const Call &call) {
    Graph &g = tape.graph;
    const Id x = call.in[0];
    const Id dx = g.temporary(g.value(x).type, g.shape(x));
    g.add_call(slice_rows_vjp_rule, {tape.gradient(call.out[0])}, {dx}, call.attr);
    tape.add(x, dx);
}

// Not rows ops: output row t is input row t + first, another task's.
const OpRule slice_rows_rule{"slice_rows", false, no_flops, slice_rows_backward};
const OpRule slice_rows_vjp_rule{"slice_rows_vjp", false, no_flops, nullptr};

} // namespace

Id embedding(Graph &g, Id ids, Id table, Id position, int64_t first) {
    const Shape &s = g.shape(ids);
    const Id y = g.temporary(g.wide, {s[0], s[1], g.shape(table)[1]});
    g.add_call(embedding_rule, {ids, table, position}, {y}, {double(first)});
    return y;
}

Id layer_norm(Graph &g, Id x, Id scale, Id shift, double eps, DType out) {
    const Shape s = g.shape(x);
    const Id y = g.temporary(out, s), stats = g.temporary(g.wide, s.with_last(2));
    g.add_call(layer_norm_rule, {x, scale, shift}, {y, stats}, {eps});
    return y;
}

Id linear(Graph &g, Id x, Id w, Id b, Id residual, bool transposed, DType out) {
    const Id y = g.temporary(out, g.shape(x).with_last(g.shape(w)[transposed ? 0 : 1]));
    g.add_call(linear_rule, {x, w, b, residual}, {y}, {double(transposed)});
    return y;
}

Id lora_linear(Graph &g, Id x, Id w, Id b, Id a, Id bb, Id residual, double scale, DType out) {
    const Shape s = g.shape(x);
    const Id y = g.temporary(out, s.with_last(g.shape(w)[1]));
    const Id u = g.temporary(g.act, s.with_last(g.shape(a)[2]));
    g.add_call(lora_linear_rule, {x, w, b, a, bb, residual}, {y, u}, {scale});
    return y;
}

Id gelu(Graph &g, Id x) {
    const Id y = g.temporary(g.value(x).type, g.shape(x));
    g.add_call(gelu_rule, {x}, {y});
    return y;
}

Id add(Graph &g, Id a, Id b, DType out) {
    const Id y = g.temporary(out, g.shape(a));
    g.add_call(add_rule, {a, b}, {y});
    return y;
}

Id mul(Graph &g, Id a, Id b) {
    const Id y = g.temporary(g.value(a).type, g.shape(a));
    g.add_call(mul_rule, {a, b}, {y});
    return y;
}

Id sigmoid(Graph &g, Id x) {
    const Id y = g.temporary(g.value(x).type, g.shape(x));
    g.add_call(sigmoid_rule, {x}, {y});
    return y;
}

Id slice_rows(Graph &g, Id x, int64_t first, int64_t count) {
    const Shape &s = g.shape(x);
    const Id y = g.temporary(g.value(x).type, {s[0], count, s[2]});
    g.add_call(slice_rows_rule, {x}, {y}, {double(first)});
    return y;
}

} // namespace ponder
