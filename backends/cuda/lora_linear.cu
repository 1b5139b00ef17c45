// lora_linear:     u = x a,           y = add + x w + b + scale u bb
// lora_linear_vjp: du = scale dy bb^T, dx = dy w^T + du a^T
// lora_linear_vjp_narrow: du alone
// lora_linear_gelu, lora_linear_vjp_gelu: with the gelu behind and, for the vjp, before it
// Both are a product onto what was prepared before it: the narrow side u [rows,R], then the addend
// out of it, in one launch on tensor cores or, for odd sizes and f32, in two small kernels. Fast
// weights are f32 and each stream has its own.
#include "lora_linear.cuh"
#include "ops.hpp"
#include "product.hpp"

namespace ponder::cuda {

namespace {

constexpr int warps = 8, rows_each = 4, ranks = 16; // of narrow_kernel
constexpr int columns = 128, rows_tile = 8;         // of wide_kernel

// A factor of low rank: element (depth, rank).
struct Factor {
    const float *data;
    int64_t step_depth, step_rank, stream;
    // Elements (k, first ..), zeros behind the rank.
    __device__ void row(int64_t s, int64_t k, int64_t first, int64_t rank,
                        float (&w)[ranks]) const {
        const float *const at = data + s * stream + k * step_depth + first * step_rank;
        if (step_rank == 1 && first + ranks <= rank && rank % 4 == 0 &&
            reinterpret_cast<uintptr_t>(at) % 16 == 0) {
#pragma unroll
            for (int r = 0; r < ranks; r += 4) {
                const float4 four = *reinterpret_cast<const float4 *>(at + r);
                w[r] = four.x;
                w[r + 1] = four.y;
                w[r + 2] = four.z;
                w[r + 3] = four.w;
            }
        } else {
#pragma unroll
            for (int r = 0; r < ranks; ++r)
                w[r] = first + r < rank ? at[r * step_rank] : 0.0f;
        }
    }
};

// u[rows_each, R] of a block: its warps share the depth.
template <class X, class U>
__global__ void narrow_kernel(const X *x, Factor f, U *u, int64_t rows, int64_t tokens,
                              int64_t depth, int64_t rank, float scale) {
    __shared__ float cell[warps][rows_each][ranks];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int64_t first = int64_t(blockIdx.x) * rows_each; // rows of one stream: T % 4 == 0 or 1 row
    const int64_t s = first / tokens;
    const int count = int(min(int64_t(rows_each), rows - first));
    for (int64_t r0 = 0; r0 < rank; r0 += ranks) {
        float sum[rows_each][ranks] = {};
        for (int64_t k = warp * 32 + lane; k < depth; k += warps * 32) {
            float in[rows_each];
            for (int i = 0; i < rows_each; ++i)
                in[i] = i < count ? to_float(x[(first + i) * depth + k]) : 0.0f;
            float w[ranks];
            f.row(s, k, r0, rank, w);
#pragma unroll
            for (int r = 0; r < ranks; ++r)
                for (int i = 0; i < rows_each; ++i)
                    sum[i][r] += in[i] * w[r];
        }
#pragma unroll
        for (int i = 0; i < rows_each; ++i)
#pragma unroll
            for (int r = 0; r < ranks; ++r) {
                const float all = warp_sum(sum[i][r]);
                if (lane == 0)
                    cell[warp][i][r] = all;
            }
        __syncthreads();
        if (threadIdx.x < rows_each * ranks) {
            const int i = threadIdx.x / ranks, r = threadIdx.x % ranks;
            float all = 0;
            for (int w = 0; w < warps; ++w)
                all += cell[w][i][r];
            if (i < count && r0 + r < rank)
                u[(first + i) * rank + r0 + r] = from_float<U>(scale * all);
        }
        __syncthreads();
    }
}

// y[rows,width] = add + b + scale u f, a thread for each column of a tile of rows
template <class U, class Y>
__global__ void wide_kernel(const U *u, Factor f, const float *add, const float *b, Y *y,
                            int64_t tokens, int64_t width, int64_t rank, float scale) {
    __shared__ float cell[rows_tile][ranks];
    const int64_t n = int64_t(blockIdx.x) * columns + threadIdx.x, s = blockIdx.z;
    const int64_t first = int64_t(blockIdx.y) * rows_tile;
    const int64_t count = min(int64_t(rows_tile), tokens - first), row0 = s * tokens + first;
    float sum[rows_tile]; // starts with what is added, so that it is on its way early
    const float shift = b && n < width ? b[n] : 0.0f;
#pragma unroll
    for (int i = 0; i < rows_tile; ++i)
        sum[i] = add && n < width && i < count ? add[(row0 + i) * width + n] : 0.0f;
    for (int64_t r0 = 0; r0 < rank; r0 += ranks) {
        for (int i = threadIdx.x; i < rows_tile * ranks; i += columns) {
            const int64_t row = i / ranks, r = r0 + i % ranks;
            cell[row][i % ranks] =
                row < count && r < rank ? scale * to_float(u[(row0 + row) * rank + r]) : 0.0f;
        }
        __syncthreads();
        if (n < width) {
            float w[ranks];
            f.row(s, n, r0, rank, w);
#pragma unroll
            for (int i = 0; i < rows_tile; ++i)
#pragma unroll
                for (int r = 0; r < ranks; ++r)
                    sum[i] += cell[i][r] * w[r];
        }
        __syncthreads();
    }
    if (n >= width)
        return;
#pragma unroll
    for (int i = 0; i < rows_tile; ++i)
        if (i < count)
            y[(row0 + i) * width + n] = from_float<Y>(sum[i] + shift);
}

// u = scale_u x left (left: [depth,R])
template <class X, class U>
void narrow_side(const Run &run, const X *x, Factor left, U *u, float scale_u, int64_t streams,
                 int64_t tokens, int64_t depth, int64_t rank) {
    // Blocks of narrow_kernel must not reach into the next stream.
    const int64_t rows = streams * tokens;
    if (streams == 1 || tokens % rows_each == 0) {
        narrow_kernel<<<blocks_for(rows, rows_each), warps * 32, 0, run.stream>>>(
            x, left, u, rows, tokens, depth, rank, scale_u);
    } else {
        for (int64_t s = 0; s < streams; ++s) {
            Factor own = left;
            own.data += s * left.stream;
            narrow_kernel<<<blocks_for(tokens, rows_each), warps * 32, 0, run.stream>>>(
                x + s * tokens * depth, own, u + s * tokens * rank, tokens, tokens, depth, rank,
                scale_u);
        }
    }
}

// The same, and base = add + b + scale_base u right (right: [width,R])
template <class X, class U, class Y>
void prepare(const Run &run, const X *x, Factor left, U *u, float scale_u, Factor right,
             const float *add, const float *b, Y *base, float scale_base, int64_t streams,
             int64_t tokens, int64_t depth, int64_t width, int64_t rank) {
    narrow_side(run, x, left, u, scale_u, streams, tokens, depth, rank);
    wide_kernel<<<dim3(blocks_for(width, columns), blocks_for(tokens, rows_tile),
                       unsigned(streams)),
                  columns, 0, run.stream>>>(u, right, add, b, base, tokens, width, rank,
                                            scale_base);
}

template <bool back, class X, class Y>
__global__ __launch_bounds__(prepare_threads) void prepare_kernel(const Prepare<X, Y> p) {
    prepare<1, back>(p);
}

template <class X, class Y> bool all_aligned(const Prepare<X, Y> &p) {
    for (const void *at : {static_cast<const void *>(p.x), static_cast<const void *>(p.left),
                           static_cast<const void *>(p.right), static_cast<const void *>(p.add),
                           static_cast<const void *>(p.b), static_cast<const void *>(p.base)})
        if (!aligned(at, 16))
            return false;
    return true;
}

// All of it in one launch, product and low-rank part; whether there was a kernel for it.
template <bool back, class X, class U, class Y>
bool tiles(const Run &run, const Prepare<X, Y> &p, const U *, const void *w, int32_t type,
           int64_t streams, bool constant, const LoraGelu &gelu) {
    if constexpr (std::is_same_v<U, bf16> &&
                  (back ? std::is_same_v<Y, bf16> : std::is_same_v<X, bf16>)) {
        if (type != PONDER_DTYPE_BF16 || !all_aligned(p) || !aligned(w, 16) ||
            !lora_tiles_fit(*run.device, streams, p.tokens, p.depth, p.width, p.rank))
            return false;
        const bf16 *x;
        if constexpr (std::is_same_v<X, bf16>) {
            x = p.x;
        } else {
            bf16 *const to = reinterpret_cast<bf16 *>(run.workspace);
            convert(run, p.x, to, streams * p.tokens * p.depth);
            x = to;
        }
        lora_tiles<back, Y>(run,
                            {x, p.left, p.right, p.u, p.add, p.b, p.base, p.tokens, p.depth,
                             p.width, p.rank, p.scale_u, p.scale_base},
                            static_cast<const bf16 *>(w), streams, constant, gelu);
        return true;
    }
    return false;
}

// Whether there was a kernel for it.
template <bool back, class X, class U, class Y>
bool prepare_at_once(const Run &run, const Prepare<X, Y> &p, const U *, int64_t streams) {
    if constexpr (std::is_same_v<U, bf16> && (back ? std::is_same_v<Y, bf16>
                                                    : std::is_same_v<X, bf16>)) {
        if (!all_aligned(p) || !prepare_fits(p.tokens, p.depth, p.width, p.rank))
            return false;
        if (run.device->major == 9)
            prepare_clusters<back>(run, p, streams);
        else
            launch(run, prepare_kernel<back, X, Y>,
                   dim3(blocks_for(p.tokens, prepare_rows), unsigned(streams)), prepare_threads, 0,
                   p);
        return true;
    }
    return false;
}

int32_t plan_forward(const Call &call, bool with_gelu) {
    const int64_t streams = call.dim(0, 0), tokens = call.dim(0, 1), depth = call.dim(0, 2);
    const int64_t width = call.dim(6, 2), rank = call.dim(7, 2);
    const float scale = float(call.attr(0));
    const int32_t weight = call.type(1);
    const bool constant = call.op->constant[1];
    const int64_t count = call.count(6);
    const bool keeps = with_gelu && call.has_out(2);
    if ((call.has(2) && call.type(2) != PONDER_DTYPE_F32) ||
        (with_gelu && call.type(6) != PONDER_DTYPE_BF16))
        return PONDER_PLAN_NONE;
    ProductShape shape{streams * tokens, width, depth};
    shape.result = call.type(6);
    shape.add = true;
    if (call.type(0) == PONDER_DTYPE_F32 && call.type(1) == PONDER_DTYPE_F32 &&
        call.type(6) == PONDER_DTYPE_BF16)
        return PONDER_PLAN_NONE;
    const TypedProduct product(call, shape, call.type(0), call.type(1), call.count(0),
                               call.count(1), true);
    return by_types(call.type(0), call.type(6), [&]<class X, class Y>(X, Y) {
        return by_type(call.type(7), [&]<class U>(U) {
            return call.is(product.workspace(), [=](const Run &run) {
                const Factor a{run.at<const float>(3), rank, 1, depth * rank};
                const Factor bb{run.at<const float>(4), 1, width, rank * width};
                Y *y = run.at<Y>(6);
                LoraGelu after{with_gelu};
                if constexpr (std::is_same_v<Y, bf16>)
                    after.kept = keeps ? run.at<bf16>(8) : nullptr;
                U *u = run.at<U>(7);
                Prepare<X, Y> all{run.at<const X>(0),
                                  a.data,
                                  bb.data,
                                  reinterpret_cast<bf16 *>(u),
                                  run.at<const float>(5),
                                  run.at<const float>(2),
                                  y,
                                  int(tokens),
                                  int(depth),
                                  int(width),
                                  int(rank),
                                  1.0f,
                                  scale};
                if (tiles<false>(run, all, u, run.at(1), weight, streams, constant, after))
                    return;
                Y *const z = keeps ? run.at<Y>(8) : y; // before the gelu
                all.base = z;
                if (!prepare_at_once<false>(run, all, u, streams))
                    prepare(run, run.at<const X>(0), a, u, 1.0f, bb, run.at<const float>(5),
                            run.at<const float>(2), z, scale, streams, tokens, depth, width, rank);
                product.run(run, run.at(0), run.at(1), z, nullptr, z);
                if constexpr (std::is_same_v<Y, bf16>)
                    if (with_gelu)
                        gelu(run, z, y, count);
            });
        });
    });
}

int32_t plan_backward(const Call &call, bool with_gelu) {
    const size_t dx_at = call.out(0), du_at = call.out(1);
    const int64_t streams = call.dim(0, 0), tokens = call.dim(0, 1), width = call.dim(0, 2);
    const int64_t depth = call.dim(dx_at, 2), rank = call.dim(du_at, 2);
    const float scale = float(call.attr(0));
    const int32_t weight = call.type(1);
    const bool constant = call.op->constant[1];
    const int64_t count = call.count(dx_at);
    if (with_gelu && (call.type(dx_at) != PONDER_DTYPE_BF16 || call.type(4) != PONDER_DTYPE_BF16))
        return PONDER_PLAN_NONE;
    ProductShape shape{streams * tokens, depth, width, false, true};
    shape.result = call.type(dx_at);
    shape.add = true;
    if (call.type(0) == PONDER_DTYPE_F32 && call.type(1) == PONDER_DTYPE_F32 &&
        call.type(dx_at) == PONDER_DTYPE_BF16)
        return PONDER_PLAN_NONE;
    const TypedProduct product(call, shape, call.type(0), call.type(1), call.count(0),
                               call.count(1), true);
    return by_types(call.type(0), call.type(dx_at), [&]<class DY, class DX>(DY, DX) {
        return by_type(call.type(du_at), [&]<class U>(U) {
            return call.is(product.workspace(), [=](const Run &run) {
                const Factor a{run.at<const float>(2), rank, 1, depth * rank};
                const Factor bb{run.at<const float>(3), 1, width, rank * width};
                DX *dx = run.at<DX>(dx_at);
                U *du = run.at<U>(du_at);
                const Prepare<DY, DX> all{run.at<const DY>(0), bb.data,
                                          a.data,              reinterpret_cast<bf16 *>(du),
                                          nullptr,             nullptr,
                                          dx,                  int(tokens),
                                          int(width),          int(depth),
                                          int(rank),           scale,
                                          1.0f};
                LoraGelu before;
                before.slope_at = with_gelu ? run.at<const bf16>(4) : nullptr;
                if (tiles<true>(run, all, du, run.at(1), weight, streams, constant, before))
                    return;
                if (!prepare_at_once<true>(run, all, du, streams))
                    prepare(run, run.at<const DY>(0), bb, du, scale, a,
                            static_cast<const float *>(nullptr),
                            static_cast<const float *>(nullptr), dx, 1.0f, streams, tokens, width,
                            depth, rank);
                product.run(run, run.at(0), run.at(1), dx, nullptr, dx);
                if constexpr (std::is_same_v<DX, bf16>)
                    if (with_gelu)
                        gelu_vjp(run, dx, before.slope_at, dx, count);
            });
        });
    });
}

} // namespace

// What would be prepared for dx ends before its first column.
int32_t plan_lora_linear_vjp_narrow(const Call &call) {
    const size_t du_at = 2;
    const int64_t streams = call.dim(0, 0), tokens = call.dim(0, 1), width = call.dim(0, 2);
    const int64_t rank = call.dim(du_at, 2);
    const float scale = float(call.attr(0));
    return by_type(call.type(0), [&]<class DY>(DY) {
        return by_type(call.type(du_at), [&]<class U>(U) {
            return call.is(0, [=](const Run &run) {
                U *du = run.at<U>(du_at);
                const float *bb = run.at<const float>(1);
                const Prepare<DY, bf16> all{run.at<const DY>(0),
                                            bb,
                                            nullptr,
                                            reinterpret_cast<bf16 *>(du),
                                            nullptr,
                                            nullptr,
                                            nullptr,
                                            int(tokens),
                                            int(width),
                                            0,
                                            int(rank),
                                            scale,
                                            1.0f};
                if (!prepare_at_once<true>(run, all, du, streams))
                    narrow_side(run, run.at<const DY>(0), Factor{bb, 1, width, rank * width}, du,
                                scale, streams, tokens, width, rank);
            });
        });
    });
}

int32_t plan_lora_linear(const Call &call) { return plan_forward(call, false); }
int32_t plan_lora_linear_gelu(const Call &call) { return plan_forward(call, true); }
int32_t plan_lora_linear_vjp(const Call &call) { return plan_backward(call, false); }
int32_t plan_lora_linear_vjp_gelu(const Call &call) { return plan_backward(call, true); }

} // namespace ponder::cuda
