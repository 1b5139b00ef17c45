// Products: linear (y = add + x w + b), matmul, matmul_tn and matmul_tn_sum (c = a^T b).
#include "ops.hpp"
#include "product.hpp"
#include "product_tiles.hpp"

#include <vector>

namespace ponder::cuda {

namespace {

// For shapes where the library's epilogue has no kernel.
template <class Y> __global__ void add_bias_kernel(Y *y, const float *b, int64_t n, int64_t width) {
    const int64_t i = int64_t(blockIdx.x) * 256 + threadIdx.x;
    if (i < n)
        y[i] = from_float<Y>(to_float(y[i]) + b[i % width]);
}

} // namespace

int32_t plan_linear(const Call &call) {
    const int64_t depth = call.last(0), width = call.last(4), rows = call.count(0) / depth;
    const bool transposed = call.attr(0) != 0, has_bias = call.has(2), has_add = call.has(3);
    if (has_bias && call.type(2) != PONDER_DTYPE_F32)
        return PONDER_PLAN_NONE;
    ProductShape shape{rows, width, depth, false, transposed};
    shape.result = call.type(4);
    shape.bias = has_bias;
    shape.add = has_add;
    // An f32 weight among bf16 activations is turned into bf16 once.
    const void *weight = call.op->constant[1];
    const bool narrow_weight =
        weight && call.type(0) == PONDER_DTYPE_BF16 && call.type(1) == PONDER_DTYPE_F32;
    const int32_t weight_type = narrow_weight ? PONDER_DTYPE_BF16 : call.type(1);
    const int64_t weight_count = call.count(1);
    TypedProduct product(call, shape, call.type(0), weight_type, call.count(0), weight_count);
    bool bias_apart = false;
    if (!product.fast() && has_bias) {
        shape.bias = false;
        product = TypedProduct(call, shape, call.type(0), weight_type, call.count(0), weight_count);
        bias_apart = true;
    }
    const bool narrow_bias = has_bias && !bias_apart && product.result() == PONDER_DTYPE_BF16;
    const void *constant = has_bias ? call.op->constant[2] : nullptr;
    if ((narrow_bias && constant && !keep_narrow(call.device, constant, width)) ||
        (narrow_weight && !keep_narrow(call.device, weight, weight_count)))
        return call.no_memory("a copy of a weight in bf16");
    const size_t bias_bytes =
        narrow_bias && !constant ? (size_t(width) * sizeof(bf16) + 255) / 256 * 256 : 0;
    return by_type(call.type(4), [&]<class Y>(Y) {
        return call.is(bias_bytes + product.workspace(), [=](const Run &run) {
            Run rest = run;
            rest.workspace += bias_bytes;
            const float *b = run.at<const float>(2);
            const void *bias = b;
            if (narrow_bias && constant) {
                bias = narrow(run, constant, b);
            } else if (narrow_bias) {
                convert(run, b, reinterpret_cast<bf16 *>(run.workspace), width);
                bias = run.workspace;
            }
            const void *w = run.at(1);
            if (narrow_weight)
                w = narrow(run, weight, run.at<const float>(1));
            product.run(rest, run.at(0), w, run.at(4), bias, run.at(3));
            if (bias_apart)
                add_bias_kernel<<<blocks_for(rows * width, 256), 256, 0, run.stream>>>(
                    run.at<Y>(4), b, rows * width, width);
        });
    });
}

// With the library's epilogue, whose gelu is the tanh form too.
int32_t plan_linear_gelu(const Call &call) {
    const int64_t depth = call.last(0), width = call.last(3), rows = call.count(0) / depth;
    const bool has_bias = call.has(2), keeps = call.has_out(1);
    const void *constant = has_bias ? call.op->constant[2] : nullptr;
    for (size_t i : {0, 1, 3})
        if (call.type(i) != PONDER_DTYPE_BF16)
            return PONDER_PLAN_NONE;
    if (width % 8 != 0 || depth % 8 != 0 || (has_bias && !constant))
        return PONDER_PLAN_NONE;
    ProductShape shape{rows, width, depth, false, call.attr(0) != 0};
    shape.operands = shape.result = PONDER_DTYPE_BF16;
    shape.bias = has_bias;
    shape.gelu = true;
    shape.keep = keeps;
    const std::shared_ptr<const Product> product = call.device->products().get(shape);
    if (!product->fast())
        return PONDER_PLAN_NONE;
    if (has_bias && !keep_narrow(call.device, constant, width))
        return call.no_memory("a copy of a weight in bf16");
    return call.is(product->workspace(), [=](const Run &run) {
        const void *bias = has_bias ? narrow(run, constant, run.at<const float>(2)) : nullptr;
        product->run(run, run.at(0), run.at(1), run.at(3), bias, nullptr, run.workspace,
                     keeps ? run.at(4) : nullptr);
    });
}

// x, w_i, b_i? -> y_i, by attribute i: 0 as it is, 1 its gelu, 2 its sigmoid. One of them may be
// narrow.
int32_t plan_linear_group(const Call &call) {
    const size_t count = call.op->n_out;
    const int64_t depth = call.last(0), rows = call.count(0) / depth;
    if (call.type(0) != PONDER_DTYPE_BF16)
        return PONDER_PLAN_NONE;
    struct Member {
        size_t w, b, y;
        const void *constant; // of a weight that has to be narrowed
        int64_t width;
        int form;
        bool has_bias;
    };
    std::vector<Member> wide;
    Member narrow_one{};
    int64_t all = 0;
    for (size_t i = 0; i < count; ++i) {
        const size_t w = 1 + 2 * i, b = w + 1, y = call.out(i);
        const bool f32 = call.type(w) == PONDER_DTYPE_F32;
        const Member m{
            w,          b, y, f32 ? call.op->constant[w] : nullptr, call.last(y), int(call.attr(i)),
            call.has(b)};
        if (m.has_bias && call.type(b) != PONDER_DTYPE_F32)
            return PONDER_PLAN_NONE;
        if (m.width <= 16) {
            if (narrow_one.width || m.form == 1 || !f32 || call.type(y) != PONDER_DTYPE_F32)
                return PONDER_PLAN_NONE;
            narrow_one = m;
        } else {
            if (m.form == 2 || (f32 && !m.constant) || wide.size() == most_members)
                return PONDER_PLAN_NONE;
            if (!product_group_fit(*call.device, rows, depth, m.width, 0))
                return PONDER_PLAN_NONE;
            wide.push_back(m);
            all += m.width;
        }
    }
    if (wide.empty() || !product_group_fit(*call.device, rows, depth, all, narrow_one.width))
        return PONDER_PLAN_NONE;
    for (const Member &m : wide)
        if (m.constant && !keep_narrow(call.device, m.constant, depth * m.width))
            return call.no_memory("a copy of a weight in bf16");
    std::vector<bool> results(count);
    for (size_t i = 0; i < wide.size(); ++i)
        results[i] = call.type(wide[i].y) == PONDER_DTYPE_F32;
    return call.is(0, [=](const Run &run) {
        ProductGroup g{run.at<const bf16>(0), int(rows), int(depth), int(wide.size())};
        bool whole = aligned(g.x, 16);
        for (size_t i = 0; i < wide.size(); ++i) {
            const Member &m = wide[i];
            const bf16 *w = run.at<const bf16>(m.w);
            if (m.constant)
                w = narrow(run, m.constant, run.at<const float>(m.w));
            g.member[i] = {w,           m.has_bias ? run.at<const float>(m.b) : nullptr,
                           run.at(m.y), int(m.width),
                           results[i],  m.form == 1};
            whole = whole && aligned(w, 16) && aligned(run.at(m.y), 16);
        }
        if (narrow_one.width) {
            const Member &m = narrow_one;
            g.left = run.at<const float>(m.w);
            g.left_bias = m.has_bias ? run.at<const float>(m.b) : nullptr;
            g.narrow = run.at<float>(m.y);
            g.rank = int(m.width);
            g.sigmoid = m.form == 2;
            whole = whole && aligned(g.left, 16);
        }
        if (!whole)
            return run.device->fail("linear_group: addresses have to be multiples of 16");
        product_group(run, g);
    });
}

int32_t plan_matmul(const Call &call) {
    const bool ta = call.attr(0) != 0, tb = call.attr(1) != 0;
    const int32_t rank = call.rank(2);
    const int64_t m = call.dim(2, rank - 2), n = call.dim(2, rank - 1);
    const int64_t k = call.dim(0, rank - (ta ? 2 : 1));
    ProductShape shape{m, n, k, ta, tb};
    shape.result = call.type(2);
    shape.batch = call.count(2) / (m * n);
    shape.stride_a = m * k;
    shape.stride_b = k * n;
    shape.stride_c = m * n;
    const TypedProduct product(call, shape, call.type(0), call.type(1), call.count(0),
                               call.count(1));
    return call.is(product.workspace(),
                   [=](const Run &run) { product.run(run, run.at(0), run.at(1), run.at(2)); });
}

namespace {

int32_t plan_tn(const Call &call, bool sum) {
    const int64_t streams = call.dim(0, 0), tokens = call.dim(0, 1);
    const int64_t m = call.dim(0, 2), n = call.dim(1, 2);
    ProductShape shape{m, n, sum ? streams * tokens : tokens, true, false};
    shape.result = call.type(2);
    if (!sum && streams > 1) {
        shape.batch = streams;
        shape.stride_a = tokens * m;
        shape.stride_b = tokens * n;
        shape.stride_c = m * n;
    }
    const TypedProduct product(call, shape, call.type(0), call.type(1), call.count(0),
                               call.count(1));
    return call.is(product.workspace(),
                   [=](const Run &run) { product.run(run, run.at(0), run.at(1), run.at(2)); });
}

} // namespace

int32_t plan_matmul_tn(const Call &call) { return plan_tn(call, false); }
int32_t plan_matmul_tn_sum(const Call &call) { return plan_tn(call, true); }

} // namespace ponder::cuda
