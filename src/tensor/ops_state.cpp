// Ops on fast weights and their gradients: reductions over rows, norms, optimizer steps.
#include "tensor/ops.hpp"

namespace ponder {

namespace {

uint64_t no_flops(const Graph &, const Call &) { return 0; }

uint64_t matmul_tn_flops(const Graph &g, const Call &call) {
    return 2 * uint64_t(g.shape(call.in[0]).count()) * uint64_t(g.shape(call.in[1])[2]);
}

const OpRule fill_rule{"fill", false, no_flops, nullptr};
// c = a^T b: da = b dc^T, db = a dc
void matmul_tn_backward(Tape &tape, const Call &call) {
    Graph &g = tape.graph;
    const Id a = call.in[0], b = call.in[1], dc = tape.gradient(call.out[0]);
    if (tape.wants(a))
        tape.add(a, matmul(g, b, dc, false, true));
    if (tape.wants(b))
        tape.add(b, matmul(g, a, dc, false, false));
}
const OpRule matmul_tn_rule{"matmul_tn", false, matmul_tn_flops, matmul_tn_backward};

void matmul_tn_sum_backward(Tape &tape, const Call &call) {
    Graph &g = tape.graph;
    const Id dc = tape.gradient(call.out[0]);
    const auto flat = [&](Id x) {
        const Shape s = g.shape(x);
        return reshape(g, x, {s[0] * s[1], s[2]});
    };
    for (int i = 0; i < 2; ++i)
        if (tape.wants(call.in[size_t(i)]))
            tape.add(call.in[size_t(i)],
                     reshape(g, matmul(g, flat(call.in[size_t(1 - i)]), dc, false, i == 0),
                             g.shape(call.in[size_t(i)])));
}
const OpRule matmul_tn_sum_rule{"matmul_tn_sum", false, matmul_tn_flops, matmul_tn_sum_backward};
const OpRule norm_rule{"norm", false, no_flops, nullptr};
const OpRule adam_rule{"adam", false, no_flops, nullptr};
const OpRule sgd_rule{"sgd", false, no_flops, nullptr};
const OpRule adam_vjp_rule{"adam_vjp", false, no_flops, nullptr};
const OpRule sgd_vjp_rule{"sgd_vjp", false, no_flops, nullptr};
const OpRule adamw_rule{"adamw", false, no_flops, nullptr};
const OpRule gate_rule{"gate", false, no_flops, nullptr};
const OpRule commit_rule{"commit", false, no_flops, nullptr};

uint64_t matmul_tn_group_flops(const Graph &g, const Call &call) {
    uint64_t flops = 0;
    for (size_t i = 0; i < call.in.size(); i += 2)
        flops += 2 * uint64_t(g.shape(call.in[i]).count()) * uint64_t(g.shape(call.in[i + 1])[2]);
    return flops;
}

} // namespace

const OpRule matmul_tn_group_rule{"matmul_tn_group", false, matmul_tn_group_flops, nullptr};

Id fill(Graph &g, Shape shape, double value) {
    const Id y = g.temporary(g.wide, shape);
    g.add_call(fill_rule, {}, {y}, {value});
    return y;
}

Id matmul_tn(Graph &g, Id a, Id b) {
    const Shape &sa = g.shape(a), &sb = g.shape(b);
    const Id c = g.temporary(g.wide, {sa[0], sa[2], sb[2]});
    g.add_call(matmul_tn_rule, {a, b}, {c});
    return c;
}

Id norm(Graph &g, Id a, Id b) {
    const Id y = g.temporary(g.wide, {1});
    g.add_call(norm_rule, {a, b}, {y});
    return y;
}

Id matmul_tn_sum(Graph &g, Id a, Id b) {
    const Id c = g.temporary(g.wide, {g.shape(a)[2], g.shape(b)[2]});
    g.add_call(matmul_tn_sum_rule, {a, b}, {c});
    return c;
}

void adam(Graph &g, const Step &s, Id w2, Id m2, Id v2) {
    g.add_call(adam_rule, {s.w, s.g, s.m, s.v, s.h, s.norm, s.rate, s.keep, s.start}, {w2, m2, v2});
}

void sgd(Graph &g, const Step &s, Id w2) {
    g.add_call(sgd_rule, {s.w, s.g, s.h, s.norm, s.rate, s.keep, s.start}, {w2});
}

void adam_vjp(Graph &g, const Step &s, Id dw2, Id dm2, Id dv2, const StepGradient &d) {
    g.add_call(adam_vjp_rule,
               {s.w, s.g, s.m, s.v, s.h, s.norm, s.rate, s.keep, s.start, dw2, dm2, dv2},
               {d.w, d.g, d.m, d.v, d.rate, d.keep, d.start});
}

void sgd_vjp(Graph &g, const Step &s, Id dw2, const StepGradient &d) {
    g.add_call(sgd_vjp_rule, {s.w, s.g, s.h, s.norm, s.rate, s.keep, s.start, dw2},
               {d.w, d.g, d.rate, d.keep, d.start});
}

void adamw(Graph &g, const Step &s, Id w2, Id m2, Id v2) {
    g.add_call(adamw_rule, {s.w, s.g, s.m, s.v, s.h, s.norm}, {w2, m2, v2});
}

void gate(Graph &g, const GateCall &c) {
    g.add_call(gate_rule, {c.nll, c.entropy, c.reconstruction, c.state}, {c.state2, c.flags, c.h},
               {double(c.predictions), double(c.told), c.lr, c.beta1, c.beta2, c.epsilon, c.clip});
}

void commit(Graph &g, const CommitCall &c) {
    g.add_call(commit_rule, {c.gradient_norms, c.distance, c.fresh, c.state}, {c.state2, c.w},
               {c.beta1, c.beta2});
}

} // namespace ponder
