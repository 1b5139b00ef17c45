// Ops on fast weights and their gradients: reductions over rows, norms, optimizer steps.
#include "tensor/ops.hpp"

namespace ponder {

namespace {

uint64_t no_flops(const Graph &, const Call &) { return 0; }

uint64_t matmul_tn_flops(const Graph &g, const Call &call) {
    return 2 * uint64_t(g.shape(call.in[0]).count()) * uint64_t(g.shape(call.in[1])[2]);
}

const OpRule fill_rule{"fill", false, no_flops, nullptr};
const OpRule matmul_tn_rule{"matmul_tn", false, matmul_tn_flops, nullptr};
const OpRule norm_rule{"norm", false, no_flops, nullptr};
const OpRule adam_rule{"adam", false, no_flops, nullptr};
const OpRule sgd_rule{"sgd", false, no_flops, nullptr};

} // namespace

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

void adam(Graph &g, Id w, Id grad, Id m, Id v, Id h, Id gnorm, Id w2, Id m2, Id v2) {
    g.add_call(adam_rule, {w, grad, m, v, h, gnorm}, {w2, m2, v2});
}

void sgd(Graph &g, Id w, Id grad, Id h, Id gnorm, Id w2) {
    g.add_call(sgd_rule, {w, grad, h, gnorm}, {w2});
}

} // namespace ponder
