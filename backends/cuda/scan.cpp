// ttt_linear, ttt_mlp and their gradients: the fused scans where they take the shape, else the
// plain ones.
#include "scan.hpp"
#include "ops.hpp"
#include "ttt_scan_tensors.hpp"

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

// Fused scans want their tensors at multiples of 16 bytes, but for the gradients of index, g and b,
// which lie behind other parameters' in one flat vector, wherever that is: those are written number
// by number. `anywhere`: the first of the three.
bool all_aligned(const Run &run, size_t count, size_t anywhere) {
    for (size_t i = 0; i < count; ++i)
        if ((i < anywhere || i >= anywhere + 3) && !aligned(run.at(i), 16))
            return false;
    return true;
}

template <class F> int32_t fused(const Call &call, size_t workspace, size_t anywhere, F queue) {
    const size_t tensors = call.op->n_in + call.op->n_out;
    return call.is(workspace, [=](const Run &run) {
        if (all_aligned(run, tensors, anywhere))
            run.device->check(queue(run), "ttt scan");
        else
            run.device->fail("ttt scan: an address is no multiple of 16 bytes");
    });
}

} // namespace

int32_t plan_ttt_linear(const Call &call) {
    const TttLinearShape shape = linear_shape(call);
    if (!types_fit(call, {1, 2, 9}, {4, 5, 6, 7, 8, 10, 11, 12}) || ttt_linear_misses(shape) ||
        shape.streams > ponder_device::most_tickets)
        return plan_plain_ttt_linear(call);
    const size_t none = call.op->n_in + call.op->n_out;
    return fused(call, ttt_linear_workspace(shape), none, [=](const Run &run) {
        return ttt_linear(shape, tensors_at<TttLinearForward>(run.buffer), run.workspace,
                          run.device->tickets, run.stream);
    });
}

int32_t plan_ttt_mlp(const Call &call) {
    const TttMlpShape shape = mlp_shape(call);
    if (!types_fit(call, {1, 2, 11}, {4, 5, 6, 7, 8, 9, 10, 12, 13, 14, 15, 16}) ||
        ttt_mlp_misses(shape) || shape.streams > ponder_device::most_tickets)
        return plan_plain_ttt_mlp(call);
    const size_t none = call.op->n_in + call.op->n_out;
    return fused(call, ttt_mlp_workspace(shape), none, [=](const Run &run) {
        return ttt_mlp(shape, tensors_at<TttMlpForward>(run.buffer), run.workspace,
                       run.device->tickets, run.stream);
    });
}

int32_t plan_ttt_linear_vjp(const Call &call) {
    const TttLinearShape shape = linear_shape(call);
    if (call.op->n_in != 13 ||
        !types_fit(call, {1, 2, 9, 13, 14, 15}, {4, 5, 6, 7, 8, 10, 11, 12, 17, 18, 19, 20, 21}) ||
        call.type(16) != call.type(3) || ttt_linear_vjp_misses(shape))
        return plan_plain_ttt_linear_vjp(call);
    return fused(call, ttt_linear_vjp_workspace(shape, false), call.out(4), [=](const Run &run) {
        return ttt_linear_vjp(shape, tensors_at<TttLinearBackward>(run.buffer), run.workspace,
                              run.stream);
    });
}

int32_t plan_ttt_mlp_vjp(const Call &call) {
    const TttMlpShape shape = mlp_shape(call);
    if (call.op->n_in != 17 ||
        !types_fit(call, {1, 2, 11, 17, 18, 19},
                   {4, 5, 6, 7, 8, 9, 10, 12, 13, 14, 15, 16, 21, 22, 23, 24, 25, 26, 27}) ||
        call.type(20) != call.type(3) || ttt_mlp_vjp_misses(shape))
        return plan_plain_ttt_mlp_vjp(call);
    return fused(call, ttt_mlp_vjp_workspace(shape, false), call.out(4), [=](const Run &run) {
        return ttt_mlp_vjp(shape, tensors_at<TttMlpBackward>(run.buffer), run.workspace,
                           run.stream);
    });
}

} // namespace ponder::cuda
