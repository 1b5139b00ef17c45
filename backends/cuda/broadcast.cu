// add, sub, mul, broadcast of tensors that are broadcast to the result; sum_to, the way back.
#include "launch.cuh"
#include "ops.hpp"

namespace ponder::cuda {

namespace {

constexpr int threads = 256;

// Where element i of a tensor of shape `to` comes from in `from`; see the reference's Broadcast.
struct Index {
    int64_t dim[PONDER_MAX_RANK], step[PONDER_MAX_RANK];
    int32_t rank = 0;
    bool whole = true;  // the same element
    bool tail = false;  // i % count: missing dims in front only
    int64_t count = 1;

    Index() = default;
    Index(const ponder_tensor &from, const ponder_tensor &to) {
        int64_t next = 1;
        bool matched = true;
        tail = true;
        rank = to.rank;
        for (int32_t axis = 0; axis < to.rank; ++axis) {
            const int32_t at = from.rank - 1 - axis;
            const int64_t n = at >= 0 ? from.dim[at] : 1;
            dim[axis] = to.dim[to.rank - 1 - axis];
            step[axis] = n == 1 ? 0 : next;
            whole = whole && n == dim[axis];
            const bool same = n == dim[axis];
            tail = tail && (same ? matched : n == 1);
            matched = matched && same;
            next *= n;
        }
        count = next;
    }
    __device__ int64_t operator()(int64_t i) const {
        if (whole)
            return i;
        if (tail)
            return i % count;
        int64_t from = 0;
        for (int32_t axis = 0; axis < rank; i /= dim[axis++])
            from += i % dim[axis] * step[axis];
        return from;
    }
};

struct Add {
    __device__ float operator()(float a, float b) const { return a + b; }
};
struct Sub {
    __device__ float operator()(float a, float b) const { return a - b; }
};
struct Mul {
    __device__ float operator()(float a, float b) const { return a * b; }
};

template <class A, class B, class Y, class F>
__global__ void combine_kernel(const A *a, const B *b, Y *y, Index at_a, Index at_b, int64_t n,
                               F f) {
    const int64_t i = int64_t(blockIdx.x) * threads + threadIdx.x;
    wait_for_earlier();
    if (i < n)
        y[i] = from_float<Y>(f(to_float(a[at_a(i)]), to_float(b[at_b(i)])));
}

template <int N, class A, class B, class Y, class F>
__global__ void combine_packs(const A *a, const B *b, Y *y, int64_t packs, F f) {
    const int64_t i = int64_t(blockIdx.x) * threads + threadIdx.x;
    if (i >= packs)
        return;
    wait_for_earlier();
    const Pack<A, N> x = load<N>(a + i * N);
    const Pack<B, N> z = load<N>(b + i * N);
    Pack<Y, N> out;
    for (int j = 0; j < N; ++j)
        out.set(j, f(x[j], z[j]));
    store<N>(y + i * N, out);
}

template <class F> int32_t plan_combine(const Call &call, F f) {
    const Index at_a(call.tensor(0), call.tensor(2)), at_b(call.tensor(1), call.tensor(2));
    const int64_t n = call.count(2);
    const bool plain = at_a.whole && at_b.whole && n % 8 == 0;
    return by_types(call.type(0), call.type(1), [&]<class A, class B>(A, B) {
        return by_type(call.type(2), [&]<class Y>(Y) {
            return call.is(0, [=](const Run &run) {
                const A *a = run.at<const A>(0);
                const B *b = run.at<const B>(1);
                Y *y = run.at<Y>(2);
                if (plain && aligned(a, 16) && aligned(b, 16) && aligned(y, 16))
                    launch(run, combine_packs<8, A, B, Y, F>, blocks_for(n / 8, threads), threads,
                           0, a, b, y, n / 8, f);
                else
                    launch(run, combine_kernel<A, B, Y, F>, blocks_for(n, threads), threads, 0, a,
                           b, y, at_a, at_b, n, f);
            });
        });
    });
}

template <class X, class Y>
__global__ void broadcast_kernel(const X *x, Y *y, Index at, int64_t n) {
    const int64_t i = int64_t(blockIdx.x) * threads + threadIdx.x;
    if (i < n)
        y[i] = from_float<Y>(to_float(x[at(i)]));
}

// ---- sums

// Rows [R,N] -> [N]: each block sums the columns of 32 over its share of rows, a second kernel the
// blocks' sums.
constexpr int row_lanes = 16;

template <class X>
__global__ void column_sums(const X *x, float *partial, int64_t rows, int64_t n, int64_t share) {
    __shared__ float cell[row_lanes][33];
    const int64_t column = int64_t(blockIdx.x) * 32 + threadIdx.x;
    const int64_t first = int64_t(blockIdx.y) * share, end = min(rows, first + share);
    float sum = 0;
    if (column < n)
        for (int64_t r = first + threadIdx.y; r < end; r += row_lanes)
            sum += to_float(x[r * n + column]);
    cell[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && column < n) {
        for (int i = 1; i < row_lanes; ++i)
            sum += cell[i][threadIdx.x];
        partial[int64_t(blockIdx.y) * n + column] = sum;
    }
}

template <class Y>
__global__ void add_partials(const float *partial, Y *y, int64_t n, int64_t parts) {
    const int64_t column = int64_t(blockIdx.x) * threads + threadIdx.x;
    if (column >= n)
        return;
    float sum = 0;
    for (int64_t p = 0; p < parts; ++p)
        sum += partial[p * n + column];
    y[column] = from_float<Y>(sum);
}

// Any shapes: a block for each element of y walks what it is the sum of.
struct Walk {
    int64_t kept_dim[PONDER_MAX_RANK], kept_step[PONDER_MAX_RANK];
    int64_t gone_dim[PONDER_MAX_RANK], gone_step[PONDER_MAX_RANK];
    int32_t kept = 0, gone = 0;
    int64_t count = 1; // elements in one sum
};

template <class X, class Y> __global__ void sum_kernel(const X *x, Y *y, Walk w) {
    __shared__ float cell[33];
    int64_t base = 0, o = blockIdx.x;
    for (int32_t a = 0; a < w.kept; o /= w.kept_dim[a++])
        base += o % w.kept_dim[a] * w.kept_step[a];
    float sum = 0;
    for (int64_t k = threadIdx.x; k < w.count; k += threads) {
        int64_t at = base, rest = k;
        for (int32_t a = 0; a < w.gone; rest /= w.gone_dim[a++])
            at += rest % w.gone_dim[a] * w.gone_step[a];
        sum += to_float(x[at]);
    }
    sum = block_sum(sum, cell);
    if (threadIdx.x == 0)
        y[blockIdx.x] = from_float<Y>(sum);
}

} // namespace

int32_t plan_add(const Call &call) { return plan_combine(call, Add{}); }
int32_t plan_sub(const Call &call) { return plan_combine(call, Sub{}); }
int32_t plan_mul(const Call &call) { return plan_combine(call, Mul{}); }

int32_t plan_broadcast(const Call &call) {
    const Index at(call.tensor(0), call.tensor(1));
    const int64_t n = call.count(1);
    return by_types(call.type(0), call.type(1), [&]<class X, class Y>(X, Y) {
        return call.is(0, [=](const Run &run) {
            broadcast_kernel<<<blocks_for(n, threads), threads, 0, run.stream>>>(
                run.at<const X>(0), run.at<Y>(1), at, n);
        });
    });
}

int32_t plan_sum_to(const Call &call) {
    const Index at(call.tensor(1), call.tensor(0)); // of y in x
    const int64_t n = call.count(1), all = call.count(0);
    if (at.tail && n > 1) { // a bias
        const int64_t rows = all / n;
        const int64_t parts = std::min<int64_t>(
            64, std::max<int64_t>(1, rows / (4 * row_lanes)));
        const int64_t share = (rows + parts - 1) / parts;
        return by_types(call.type(0), call.type(1), [&]<class X, class Y>(X, Y) {
            return call.is(size_t(parts * n) * sizeof(float), [=](const Run &run) {
                float *partial = reinterpret_cast<float *>(run.workspace);
                column_sums<<<dim3(blocks_for(n, 32), unsigned(parts)), dim3(32, row_lanes), 0,
                              run.stream>>>(run.at<const X>(0), partial, rows, n, share);
                add_partials<<<blocks_for(n, threads), threads, 0, run.stream>>>(
                    partial, run.at<Y>(1), n, parts);
            });
        });
    }
    Walk walk;
    int64_t step = 1;
    for (int32_t axis = 0; axis < at.rank; ++axis) {
        const bool gone = at.step[axis] == 0;
        if (gone) {
            walk.gone_dim[walk.gone] = at.dim[axis];
            walk.gone_step[walk.gone++] = step;
            walk.count *= at.dim[axis];
        } else {
            walk.kept_dim[walk.kept] = at.dim[axis];
            walk.kept_step[walk.kept++] = step;
        }
        step *= at.dim[axis];
    }
    return by_types(call.type(0), call.type(1), [&]<class X, class Y>(X, Y) {
        return call.is(0, [=](const Run &run) {
            sum_kernel<<<unsigned(n), threads, 0, run.stream>>>(run.at<const X>(0), run.at<Y>(1),
                                                               walk);
        });
    });
}

} // namespace ponder::cuda
