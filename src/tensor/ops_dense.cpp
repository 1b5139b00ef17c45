// Products with weights, and what stands between them: one row at a time.
#include "tensor/compose.hpp"

namespace ponder {

namespace {

uint64_t rows_of(const Shape &s) { return uint64_t(s.count() / s[s.rank - 1]); }

uint64_t no_flops(const Graph &, const Call &) { return 0; }

extern const OpRule lora_linear_vjp_rule, layer_norm_vjp_rule, gelu_vjp_rule;

bool any_needs(const Graph &g, std::initializer_list<Id> ids) {
    for (Id id : ids)
        if (id != none && g.value(id).needs_gradient)
            return true;
    return false;
}

// ---- embedding: y_t = table[id_t] + position[first + t]

const OpRule embedding_vjp_rule{"embedding_vjp", false, no_flops, nullptr};

void embedding_backward(Tape &tape, const Call &call) {
    Graph &g = tape.graph;
    const Id table = call.in[1], position = call.in[2];
    const Id dtable = g.temporary(g.wide, g.shape(table));
    const Id dposition = g.temporary(g.wide, g.shape(position));
    g.add_call(embedding_vjp_rule, {tape.gradient(call.out[0]), call.in[0]}, {dtable, dposition},
               call.attr);
    tape.add(table, dtable);
    tape.add(position, dposition);
}

const OpRule embedding_rule{"embedding", true, no_flops, embedding_backward};

// ---- embedding_at: positions of each token; for passes without gradients

const OpRule embedding_at_rule{"embedding_at", true, no_flops, nullptr};

// ---- layer_norm

const OpRule layer_norm_vjp_weight_rule{"layer_norm_vjp_weight", false, no_flops, nullptr};

void layer_norm_backward(Tape &tape, const Call &call) {
    Graph &g = tape.graph;
    const Id dy = tape.gradient(call.out[0]), x = call.in[0], stats = call.out[1];
    if (tape.wants(call.in[1])) {
        const Id dg = g.temporary(g.wide, g.shape(call.in[1]));
        const Id db = g.temporary(g.wide, g.shape(call.in[2]));
        g.add_call(layer_norm_vjp_weight_rule, {dy, x, stats}, {dg, db});
        tape.add(call.in[1], dg);
        tape.add(call.in[2], db);
    }
    if (!tape.wants(x))
        return;
    const Id dx = g.temporary(g.wide, g.shape(x));
    // The residual stream's gradient so far is added in the same sweep.
    const Id carry = tape.take(x);
    g.add_call(layer_norm_vjp_rule, {dy, x, call.in[1], stats, carry}, {dx});
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
    const Id w = call.in[1], b = call.in[2];
    const bool transposed = call.attr[0] != 0;
    if (tape.wants(w))
        tape.add(w, transposed ? matmul_tn_sum(g, dy, x) : matmul_tn_sum(g, x, dy));
    if (tape.wants(b))
        tape.add(b, sum_to(g, dy, g.shape(b)));
    if (tape.wants(residual))
        tape.add(residual, dy);
    if (tape.wants(x))
        tape.add(x, linear(g, dy, w, none, none, !transposed, g.value(x).type));
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
    g.add_call(lora_linear_vjp_rule, with_scales(g, w, {dy, w, a, bb}), {dx, du}, call.attr);
    if (tape.wants(x))
        tape.add(x, dx);
    if (tape.wants(a))
        tape.add(a, matmul_tn(g, x, du));
    if (tape.wants(bb)) {
        const Id dbb = matmul_tn(g, u, dy);
        tape.add(bb, call.attr[0] == 1 ? dbb : affine(g, dbb, call.attr[0], 0));
    }
}

const OpRule lora_linear_rule{"lora_linear", true, lora_linear_flops, lora_linear_backward};

uint64_t lora_linear_vjp_flops(const Graph &g, const Call &call) {
    const Shape &dy = g.shape(call.in[0]), &dx = g.shape(call.out[0]), &a = g.shape(call.in[2]);
    const uint64_t k = uint64_t(dx[2]), n = uint64_t(dy[2]), r = uint64_t(a[2]);
    return 2 * rows_of(dy) * (k * n + r * (k + n));
}

const OpRule lora_linear_vjp_rule{"lora_linear_vjp", true, lora_linear_vjp_flops, nullptr};

// ---- gelu

void gelu_backward(Tape &tape, const Call &call) {
    Graph &g = tape.graph;
    const Id x = call.in[0], dy = tape.gradient(call.out[0]);
    if (g.mode.higher)
        return tape.add(x, mul(g, dy, gelu_derivative(g, x, 1)));
    const Id dx = g.temporary(g.value(x).type, g.shape(x));
    g.add_call(gelu_vjp_rule, {dy, x}, {dx});
    tape.add(x, dx);
}

const OpRule gelu_rule{"gelu", true, no_flops, gelu_backward};
const OpRule gelu_vjp_rule{"gelu_vjp", true, no_flops, nullptr};

// ---- dropout: the same call drops the same places of the gradient

void dropout_backward(Tape &tape, const Call &call) {
    Graph &g = tape.graph;
    const Id dx = g.temporary(g.value(call.in[0]).type, g.shape(call.in[0]));
    g.add_call(*call.rule, {tape.gradient(call.out[0]), call.in[1]}, {dx}, call.attr);
    tape.add(call.in[0], dx);
}

const OpRule dropout_rule{"dropout", true, no_flops, dropout_backward};

} // namespace

const OpRule layer_norm_gated_rule{"layer_norm_gated", true, no_flops, nullptr};
const OpRule layer_norm_vjp_copy_rule{"layer_norm_vjp_copy", true, no_flops, nullptr};
const OpRule linear_gelu_rule{"linear_gelu", true, linear_flops, nullptr};

uint64_t linear_group_flops(const Graph &g, const Call &call) {
    uint64_t columns = 0;
    for (Id y : call.out)
        columns += uint64_t(g.shape(y)[2]);
    const Shape &x = g.shape(call.in[0]);
    return 2 * rows_of(x) * uint64_t(x[2]) * columns;
}
const OpRule linear_group_rule{"linear_group", true, linear_group_flops, nullptr};
const OpRule lora_linear_gelu_rule{"lora_linear_gelu", true, lora_linear_flops, nullptr};
// As if dx were made: records count what was recorded, the same on every device.
uint64_t lora_linear_vjp_narrow_flops(const Graph &g, const Call &call) {
    const Shape &dy = g.shape(call.in[0]);
    const uint64_t k = uint64_t(call.attr[1]), n = uint64_t(dy[2]),
                   r = uint64_t(g.shape(call.out[0])[2]);
    return 2 * rows_of(dy) * (k * n + r * (k + n));
}
const OpRule lora_linear_vjp_narrow_rule{"lora_linear_vjp_narrow", true,
                                         lora_linear_vjp_narrow_flops, nullptr};
const OpRule lora_linear_vjp_gelu_rule{"lora_linear_vjp_gelu", true, lora_linear_vjp_flops,
                                       nullptr};

std::vector<Id> with_scales(const Graph &g, Id w, std::vector<Id> in) {
    if (g.value(w).scales != none)
        in.push_back(g.value(w).scales);
    return in;
}

Id embedding(Graph &g, Id ids, Id table, Id position, int64_t first) {
    const Shape &s = g.shape(ids);
    const Id y = g.temporary(g.wide, {s[0], s[1], g.shape(table)[1]});
    g.add_call(embedding_rule, with_scales(g, table, {ids, table, position}), {y}, {double(first)});
    return y;
}

Id embedding_at(Graph &g, Id ids, Id at, Id table, Id position) {
    const Shape &s = g.shape(ids);
    const Id y = g.temporary(g.wide, {s[0], s[1], g.shape(table)[1]});
    g.add_call(embedding_at_rule, with_scales(g, table, {ids, at, table, position}), {y});
    return y;
}

Id layer_norm(Graph &g, Id x, Id scale, Id shift, double eps, DType out) {
    if (g.mode.higher && any_needs(g, {x, scale, shift}))
        return compose::layer_norm(g, x, scale, shift, eps);
    const Shape s = g.shape(x);
    const Id y = g.temporary(out, s), stats = g.temporary(g.wide, s.with_last(2));
    g.add_call(layer_norm_rule, {x, scale, shift}, {y, stats}, {eps});
    return y;
}

Id linear(Graph &g, Id x, Id w, Id b, Id residual, bool transposed, DType out) {
    const Id y = g.temporary(out, g.shape(x).with_last(g.shape(w)[transposed ? 0 : 1]));
    g.add_call(linear_rule, with_scales(g, w, {x, w, b, residual}), {y}, {double(transposed)});
    return y;
}

Id lora_linear(Graph &g, Id x, Id w, Id b, Id a, Id bb, Id residual, double scale, DType out) {
    if (g.mode.higher)
        return compose::lora_linear(g, x, w, b, a, bb, residual, scale);
    const Shape s = g.shape(x);
    const Id y = g.temporary(out, s.with_last(g.shape(w)[1]));
    const Id u = g.temporary(g.act, s.with_last(g.shape(a)[2]));
    g.add_call(lora_linear_rule, with_scales(g, w, {x, w, b, a, bb, residual}), {y, u}, {scale});
    return y;
}

Id gelu(Graph &g, Id x) {
    const Id y = g.temporary(g.value(x).type, g.shape(x));
    g.add_call(gelu_rule, {x}, {y});
    return y;
}

Id dropout(Graph &g, Id x, double probability, int64_t salt) {
    if (probability == 0)
        return x;
    const Id y = g.temporary(g.value(x).type, g.shape(x));
    g.add_call(dropout_rule, {x, g.mode.dropout_seed}, {y}, {probability, double(salt)});
    return y;
}

} // namespace ponder
