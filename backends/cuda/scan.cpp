// ttt_linear, ttt_mlp and their gradients: the fused scans where they take the shape, else the
// plain ones.
#include "scan.hpp"
#include "ops.hpp"
#include "ttt_scan.hpp"

namespace ponder::cuda {

namespace {

TttType type_of(int32_t dtype) { return dtype == PONDER_DTYPE_BF16 ? TttType::bf16 : TttType::f32; }

// What shapes of all scans have, from q, lr, index and g.
template <class S> S shape_of(const Call &call) {
    S shape{};
    shape.streams = call.dim(0, 0);
    shape.tokens = call.dim(0, 1);
    shape.heads = call.dim(5, 0);
    shape.head_dim = call.dim(5, 1);
    shape.mini_batch = call.dim(4, 0);
    shape.type = type_of(call.type(0));
    shape.rate_type = type_of(call.type(3));
    return shape;
}

TttLinearShape linear_shape(const Call &call) {
    auto shape = shape_of<TttLinearShape>(call);
    shape.ponder = call.attr(0) == 1;
    shape.scale = call.attr(1);
    shape.decay = call.attr(2);
    shape.eps = call.attr(3);
    shape.max_grad_norm = call.attr(4);
    shape.causal_k = int64_t(call.attr(5));
    return shape;
}

TttMlpShape mlp_shape(const Call &call) {
    auto shape = shape_of<TttMlpShape>(call);
    shape.scale = call.attr(0);
    shape.eps = call.attr(1);
    return shape;
}

// The inputs that all scans begin with.
template <class T> T inputs_of(const Run &run) {
    T t{};
    t.q = run.at(0);
    t.k = run.at(1);
    t.v = run.at(2);
    t.lr = run.at(3);
    t.index = run.at<const float>(4);
    t.g = run.at<const float>(5);
    t.b = run.at<const float>(6);
    t.w1 = run.at<const float>(7);
    t.b1 = run.at<const float>(8);
    return t;
}

bool all_aligned(const Run &run, size_t count) {
    for (size_t i = 0; i < count; ++i)
        if (!aligned(run.at(i), 16))
            return false;
    return true;
}

// Fast weights and gradients lie behind each other in flat vectors: with these sizes, each of them
// starts at a multiple of 16 bytes, as the fused scans want it.
bool stays_aligned(int64_t heads, int64_t mini_batch) {
    return heads % 4 == 0 && mini_batch % 4 == 0;
}

template <class F> int32_t fused(const Call &call, size_t workspace, F queue) {
    const size_t tensors = call.op->n_in + call.op->n_out;
    return call.is(workspace, [=](const Run &run) {
        if (all_aligned(run, tensors))
            run.device->check(queue(run), "ttt scan");
        else
            run.device->fail("ttt scan: an address is no multiple of 16 bytes");
    });
}

} // namespace

int32_t plan_ttt_linear(const Call &call) {
    const TttLinearShape shape = linear_shape(call);
    if (!types_fit(call, {1, 2, 9}, {4, 5, 6, 7, 8, 10, 11, 12}) || ttt_linear_misses(shape) ||
        !stays_aligned(shape.heads, shape.mini_batch) ||
        shape.streams > ponder_device::most_tickets)
        return plan_plain_ttt_linear(call);
    return fused(call, ttt_linear_workspace(shape), [=](const Run &run) {
        auto f = inputs_of<TttLinearForward>(run);
        f.y = run.at(9);
        f.w1_out = run.at<float>(10);
        f.b1_out = run.at<float>(11);
        f.loss = run.at<float>(12);
        return ttt_linear(shape, f, run.workspace, run.device->tickets, run.stream);
    });
}

int32_t plan_ttt_mlp(const Call &call) {
    const TttMlpShape shape = mlp_shape(call);
    if (!types_fit(call, {1, 2, 11}, {4, 5, 6, 7, 8, 9, 10, 12, 13, 14, 15, 16}) ||
        ttt_mlp_misses(shape) || !stays_aligned(shape.heads, shape.mini_batch) ||
        shape.streams > ponder_device::most_tickets)
        return plan_plain_ttt_mlp(call);
    return fused(call, ttt_mlp_workspace(shape), [=](const Run &run) {
        auto f = inputs_of<TttMlpForward>(run);
        f.w2 = run.at<const float>(9);
        f.b2 = run.at<const float>(10);
        f.y = run.at(11);
        f.w1_out = run.at<float>(12);
        f.b1_out = run.at<float>(13);
        f.w2_out = run.at<float>(14);
        f.b2_out = run.at<float>(15);
        f.loss = run.at<float>(16);
        return ttt_mlp(shape, f, run.workspace, run.device->tickets, run.stream);
    });
}

int32_t plan_ttt_linear_vjp(const Call &call) {
    const TttLinearShape shape = linear_shape(call);
    const size_t out = call.out(0);
    if (call.op->n_in != 13 ||
        !types_fit(call, {1, 2, 9, out, out + 1, out + 2},
                   {4, 5, 6, 7, 8, 10, 11, 12, out + 4, out + 5, out + 6, out + 7, out + 8}) ||
        call.type(out + 3) != call.type(3) || ttt_linear_vjp_misses(shape) ||
        !stays_aligned(shape.heads, shape.mini_batch))
        return plan_plain_ttt_linear_vjp(call);
    return fused(call, ttt_linear_vjp_workspace(shape, false), [=](const Run &run) {
        auto b = inputs_of<TttLinearBackward>(run);
        b.dy = run.at(9);
        b.dw1_out = run.at<const float>(10);
        b.db1_out = run.at<const float>(11);
        b.dloss = run.at<const float>(12);
        b.dq = run.at(out);
        b.dk = run.at(out + 1);
        b.dv = run.at(out + 2);
        b.dlr = run.at(out + 3);
        b.dindex = run.at<float>(out + 4);
        b.dg = run.at<float>(out + 5);
        b.db = run.at<float>(out + 6);
        b.dw1 = run.at<float>(out + 7);
        b.db1 = run.at<float>(out + 8);
        return ttt_linear_vjp(shape, b, run.workspace, run.stream);
    });
}

int32_t plan_ttt_mlp_vjp(const Call &call) {
    const TttMlpShape shape = mlp_shape(call);
    const size_t out = call.out(0);
    if (call.op->n_in != 17 ||
        !types_fit(call, {1, 2, 11, out, out + 1, out + 2},
                   {4, 5, 6, 7, 8, 9, 10, 12, 13, 14, 15, 16, out + 4, out + 5, out + 6, out + 7,
                    out + 8, out + 9, out + 10}) ||
        call.type(out + 3) != call.type(3) || ttt_mlp_vjp_misses(shape) ||
        !stays_aligned(shape.heads, shape.mini_batch))
        return plan_plain_ttt_mlp_vjp(call);
    return fused(call, ttt_mlp_vjp_workspace(shape, false), [=](const Run &run) {
        auto b = inputs_of<TttMlpBackward>(run);
        b.w2 = run.at<const float>(9);
        b.b2 = run.at<const float>(10);
        b.dy = run.at(11);
        b.dw1_out = run.at<const float>(12);
        b.db1_out = run.at<const float>(13);
        b.dw2_out = run.at<const float>(14);
        b.db2_out = run.at<const float>(15);
        b.dloss = run.at<const float>(16);
        b.dq = run.at(out);
        b.dk = run.at(out + 1);
        b.dv = run.at(out + 2);
        b.dlr = run.at(out + 3);
        b.dindex = run.at<float>(out + 4);
        b.dg = run.at<float>(out + 5);
        b.db = run.at<float>(out + 6);
        b.dw1 = run.at<float>(out + 7);
        b.db1 = run.at<float>(out + 8);
        b.dw2 = run.at<float>(out + 9);
        b.db2 = run.at<float>(out + 10);
        return ttt_mlp_vjp(shape, b, run.workspace, run.stream);
    });
}

} // namespace ponder::cuda
