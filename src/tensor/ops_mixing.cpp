// Ops that look across rows: attention, the TTT layer's pieces, and the loss.
#include "tensor/compose.hpp"

namespace ponder {

namespace {

uint64_t no_flops(const Graph &, const Call &) { return 0; }

extern const OpRule cross_entropy_vjp_rule, cross_entropy_vjp_table_rule, mean_vjp_rule;

// ---- attention: causal, so token t meets t + 1 keys

uint64_t causal_pairs(const Shape &qkv) {
    return uint64_t(qkv[0]) * uint64_t(qkv[1]) * uint64_t(qkv[1] + 1) / 2;
}

// Two products forward; five backward (scores again, dp, dv, dq, dk).
uint64_t attention_flops(const Graph &g, const Call &call) {
    const Shape &qkv = g.shape(call.in[0]);
    return 2 * 2 * causal_pairs(qkv) * uint64_t(qkv[2] / 3);
}
uint64_t attention_vjp_flops(const Graph &g, const Call &call) {
    const Shape &qkv = g.shape(call.in[0]);
    return 5 * 2 * causal_pairs(qkv) * uint64_t(qkv[2] / 3);
}

void attention_backward(Tape &tape, const Call &call) {
    Graph &g = tape.graph;
    const Id qkv = call.in[0];
    const Id dqkv = g.temporary(g.value(qkv).type, g.shape(qkv));
    g.add_call(attention_vjp_rule, {qkv, call.out[0], call.out[1], tape.gradient(call.out[0])},
               {dqkv}, call.attr);
    tape.add(qkv, dqkv);
}

const OpRule attention_rule{"attention", false, attention_flops, attention_backward};

} // namespace

const OpRule attention_vjp_rule{"attention_vjp", false, attention_vjp_flops, nullptr};

namespace {

// ---- attention_cached: for passes without gradients. How many keys there are is known at run
// time: counted as if each token saw all rows.

uint64_t attention_cached_flops(const Graph &g, const Call &call) {
    const Shape &qkv = g.shape(call.in[0]), &k = g.shape(call.in[2]);
    return 2 * 2 * uint64_t(qkv[0] * qkv[1] * k[2]) * uint64_t(qkv[2] / 3);
}

const OpRule attention_cached_rule{"attention_cached", false, attention_cached_flops, nullptr};
const OpRule keep_rows_rule{"keep_rows", false, no_flops, nullptr};

// ---- cross_entropy: nll_t = lse_t - logit_t[target], d nll / d logit = p - onehot

uint64_t cross_entropy_flops(const Graph &g, const Call &call) {
    const Shape &h = g.shape(call.in[0]), &table = g.shape(call.in[1]);
    return 2 * uint64_t(h.count()) * uint64_t(table[0]);
}

void cross_entropy_backward(Tape &tape, const Call &call) {
    Graph &g = tape.graph;
    const Id h = call.in[0], table = call.in[1], dnll = tape.gradient(call.out[0]);
    if (tape.wants(table)) {
        const Id dtable = g.temporary(g.wide, g.shape(table));
        g.add_call(cross_entropy_vjp_table_rule, {call.out[2], h, call.in[2], dnll}, {dtable});
        tape.add(table, dtable);
    }
    if (!tape.wants(h))
        return;
    const Id dh = g.temporary(g.value(h).type, g.shape(h));
    g.add_call(cross_entropy_vjp_rule,
               with_scales(g, table, {call.out[2], table, call.in[2], dnll}), {dh});
    tape.add(h, dh);
}

uint64_t cross_entropy_vjp_flops(const Graph &g, const Call &call) {
    const Shape &dh = g.shape(call.out[0]), &table = g.shape(call.in[1]);
    return 2 * uint64_t(dh.count()) * uint64_t(table[0]);
}

const OpRule cross_entropy_rule{"cross_entropy", true, cross_entropy_flops, cross_entropy_backward};
const OpRule cross_entropy_vjp_rule{"cross_entropy_vjp", true, cross_entropy_vjp_flops, nullptr};

uint64_t cross_entropy_vjp_table_flops(const Graph &g, const Call &call) {
    const Shape &h = g.shape(call.in[1]), &table = g.shape(call.out[0]);
    return 2 * uint64_t(h.count()) * uint64_t(table[0]);
}

const OpRule cross_entropy_vjp_table_rule{"cross_entropy_vjp_table", false,
                                          cross_entropy_vjp_table_flops, nullptr};

// ---- mean

void mean_backward(Tape &tape, const Call &call) {
    Graph &g = tape.graph;
    const Id dx = g.temporary(g.wide, g.shape(call.in[0]));
    g.add_call(mean_vjp_rule, {tape.gradient(call.out[0])}, {dx}, call.attr);
    tape.add(call.in[0], dx);
}

const OpRule mean_rule{"mean", false, no_flops, mean_backward};

void mean_vjp_backward(Tape &tape, const Call &call) {
    tape.add(call.in[0], mean(tape.graph, tape.gradient(call.out[0]), int64_t(call.attr[0])));
}

const OpRule mean_vjp_rule{"mean_vjp", false, no_flops, mean_vjp_backward};

// ---- the TTT layer's pieces

const OpRule conv1d_vjp_rule{"conv1d_vjp", false, no_flops, nullptr};

void conv1d_backward(Tape &tape, const Call &call) {
    Graph &g = tape.graph;
    const Id x = call.in[0], w = call.in[1], b = call.in[2];
    const Id dx = g.temporary(g.value(x).type, g.shape(x));
    const Id dw = g.temporary(g.wide, g.shape(w)), db = g.temporary(g.wide, g.shape(b));
    g.add_call(conv1d_vjp_rule, {tape.gradient(call.out[0]), x, w}, {dx, dw, db}, call.attr);
    if (tape.wants(x))
        tape.add(x, dx);
    if (tape.wants(w))
        tape.add(w, dw);
    if (tape.wants(b))
        tape.add(b, db);
}

const OpRule conv1d_rule{"conv1d", false, no_flops, conv1d_backward};

// A rotation: its vjp turns back.
void rope_backward(Tape &tape, const Call &call) {
    Graph &g = tape.graph;
    const Id dx = g.temporary(g.value(call.in[0]).type, g.shape(call.in[0]));
    std::vector<double> attr = call.attr;
    attr[3] = attr[3] == 0;
    g.add_call(*call.rule, {tape.gradient(call.out[0])}, {dx}, attr);
    tape.add(call.in[0], dx);
}

const OpRule rope_rule{"rope", false, no_flops, rope_backward};

// Per head and mini-batch of m tokens: K W, Q W, K^T g (m D D each), Q K^T and A g (m m D, causal).
uint64_t ttt_linear_flops(const Graph &g, const Call &call) {
    const Shape &q = g.shape(call.in[0]), &w = g.shape(call.in[7]);
    const uint64_t tokens = uint64_t(q[0] * q[1]), heads = uint64_t(w[1]), d = uint64_t(w[2]);
    const uint64_t m = uint64_t(g.shape(call.in[4])[0]);
    return 2 * tokens * heads * (3 * d * d + (m + 1) * d);
}

// Forward K and Q through both layers, gradient through W2, two outer products, and for each layer
// a causal pair of m x m products.
uint64_t ttt_mlp_flops(const Graph &g, const Call &call) {
    const Shape &q = g.shape(call.in[0]), &w = g.shape(call.in[7]);
    const uint64_t tokens = uint64_t(q[0] * q[1]), heads = uint64_t(w[1]);
    const uint64_t d = uint64_t(w[2]), inner = uint64_t(w[3]);
    const uint64_t m = uint64_t(g.shape(call.in[4])[0]);
    return 2 * tokens * heads * (7 * d * inner + (m + 1) * (d + inner));
}

// The scan again, and about twice its products.
uint64_t ttt_linear_vjp_flops(const Graph &g, const Call &call) {
    return 3 * ttt_linear_flops(g, call);
}

uint64_t ttt_mlp_vjp_flops(const Graph &g, const Call &call) { return 3 * ttt_mlp_flops(g, call); }

const OpRule ttt_linear_vjp_rule{"ttt_linear_vjp", false, ttt_linear_vjp_flops, nullptr};
const OpRule ttt_mlp_vjp_rule{"ttt_mlp_vjp", false, ttt_mlp_vjp_flops, nullptr};

// Of both scans: the call's inputs, then the gradients of its outputs.
void ttt_backward(Tape &tape, const Call &call, const OpRule &vjp) {
    Graph &g = tape.graph;
    std::vector<Id> in = call.in, out;
    for (Id output : call.out) {
        Id gradient = tape.gradient(output);
        if (gradient == none) {
            gradient = fill(g, g.shape(output), 0);
        } else if (g.value(gradient).type != g.value(output).type) {
            const Id narrow = g.temporary(g.value(output).type, g.shape(output));
            convert(g, gradient, narrow);
            gradient = narrow;
        }
        in.push_back(gradient);
    }
    for (size_t i = 0; i < call.in.size(); ++i) {
        const Value &v = g.value(call.in[i]);
        // q, k, v, lr in their own type; what is summed in wide
        out.push_back(g.temporary(i < 4 ? v.type : g.wide, v.shape));
    }
    g.add_call(vjp, in, out, call.attr);
    for (size_t i = 0; i < call.in.size(); ++i)
        if (tape.wants(call.in[i]))
            tape.add(call.in[i], out[i]);
}

void ttt_linear_backward(Tape &tape, const Call &call) {
    ttt_backward(tape, call, ttt_linear_vjp_rule);
}
void ttt_mlp_backward(Tape &tape, const Call &call) { ttt_backward(tape, call, ttt_mlp_vjp_rule); }

const OpRule ttt_linear_rule{"ttt_linear", false, ttt_linear_flops, ttt_linear_backward};
const OpRule ttt_mlp_rule{"ttt_mlp", false, ttt_mlp_flops, ttt_mlp_backward};

bool any_needs(const Graph &g, const std::vector<Id> &ids) {
    for (Id id : ids)
        if (g.value(id).needs_gradient)
            return true;
    return false;
}

} // namespace

const OpRule conv1d_rope_rule{"conv1d_rope", false, no_flops, nullptr};

const OpRule cross_entropy_parts_rule{"cross_entropy_parts", true, cross_entropy_flops, nullptr};

namespace {

uint64_t cross_entropy_parts_vjp_flops(const Graph &g, const Call &call) {
    const Shape &dh = g.shape(call.out[0]), &table = g.shape(call.in[2]);
    return (call.out[1] != none ? 4 : 2) * uint64_t(dh.count()) * uint64_t(table[0]);
}

} // namespace

const OpRule cross_entropy_parts_vjp_rule{"cross_entropy_parts_vjp", false,
                                          cross_entropy_parts_vjp_flops, nullptr};

Id attention(Graph &g, Id qkv, int64_t heads, int64_t salt) {
    if (g.mode.attention_dropout > 0 || (g.mode.higher && any_needs(g, {qkv})))
        return compose::attention(g, qkv, heads, g.mode.attention_dropout, salt);
    const Shape s = g.shape(qkv);
    const Id o = g.temporary(g.act, s.with_last(s[2] / 3));
    const Id lse = g.temporary(g.wide, {s[0], heads, s[1]});
    g.add_call(attention_rule, {qkv}, {o, lse}, {double(heads)});
    return o;
}

CachedAttention attention_cached(Graph &g, Id qkv, Id first, Id k, Id v) {
    const Shape s = g.shape(qkv);
    const CachedAttention r{g.temporary(g.act, s.with_last(s[2] / 3)),
                            g.temporary(g.value(k).type, g.shape(k)),
                            g.temporary(g.value(v).type, g.shape(v))};
    g.add_call(attention_cached_rule, {qkv, first, k, v}, {r.o, r.k, r.v});
    return r;
}

Id keep_rows(Graph &g, Id x, Id first, Id rows) {
    const Id kept = g.temporary(g.value(rows).type, g.shape(rows));
    g.add_call(keep_rows_rule, {x, first, rows}, {kept});
    return kept;
}

CrossEntropy cross_entropy(Graph &g, Id h, Id table, Id target, bool keep) {
    if (g.mode.higher && any_needs(g, {h, table}))
        return {compose::cross_entropy(g, h, table, target), none};
    const Shape s = g.shape(h);
    const CrossEntropy r{g.temporary(g.wide, {s[0], s[1]}), g.temporary(g.wide, {s[0], s[1]})};
    const Id p = keep ? g.temporary(g.act, s.with_last(g.shape(table)[0])) : none;
    g.add_call(cross_entropy_rule, with_scales(g, table, {h, table, target}),
               {r.nll, r.entropy, p});
    return r;
}

Id mean(Graph &g, Id x, int64_t count) {
    const Id y = g.temporary(g.wide, {1});
    g.add_call(mean_rule, {x}, {y}, {double(count)});
    return y;
}

Id conv1d(Graph &g, Id x, Id w, Id b, int64_t shift, Id before) {
    if (g.mode.higher && any_needs(g, {x, w, b}))
        return compose::conv1d(g, x, w, b, shift);
    const Id y = g.temporary(g.value(x).type, g.shape(x));
    std::vector<Id> in{x, w, b};
    if (before != none)
        in.push_back(before);
    g.add_call(conv1d_rule, in, {y}, {double(shift)});
    return y;
}

Id rope(Graph &g, Id x, int64_t heads, int64_t period, double theta) {
    const Id y = g.temporary(g.value(x).type, g.shape(x));
    g.add_call(rope_rule, {x}, {y}, {double(heads), double(period), theta, 0});
    return y;
}

TttResult ttt_scan(Graph &g, Id q, Id k, Id v, Id lr, Id index, Id scale, Id shift,
                   const std::vector<Id> &state, const TttScan &form) {
    std::vector<Id> inputs{q, k, v, lr, index, scale, shift};
    inputs.insert(inputs.end(), state.begin(), state.end());
    if ((g.mode.higher || (form.mlp && g.mode.compose_mlp)) && any_needs(g, inputs))
        return compose::ttt_scan(g, q, k, v, lr, index, scale, shift, state, form);
    TttResult r{
        g.temporary(g.value(q).type, g.shape(q)), g.temporary(g.wide, {g.shape(q)[0], 3}), {}};
    std::vector<Id> in{q, k, v, lr, index, scale, shift}, out{r.y};
    for (Id weight : state) {
        in.push_back(weight);
        r.state.push_back(g.temporary(g.wide, g.shape(weight)));
        out.push_back(r.state.back());
    }
    out.push_back(r.loss);
    if (form.mlp)
        g.add_call(ttt_mlp_rule, in, out, {form.scale, form.eps});
    else
        g.add_call(ttt_linear_rule, in, out,
                   {double(form.ponder), form.scale, form.decay, form.eps, form.max_grad_norm,
                    double(form.causal_k)});
    return r;
}

} // namespace ponder
