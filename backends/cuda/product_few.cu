// Products of at most eight rows of bf16, as texts are written with: nothing but reading b. A
// thread has eight neighbours of a row of b at a time. Where b is [k,n] a block has some columns
// and all of k, which its threads share by rows; where b is [n,k] a warp has a column of the
// result. The order of sums depends on the shape alone.
#include "gelu.cuh"
#include "launch.cuh"
#include "product_kernels.hpp"

namespace ponder::cuda {

namespace {

constexpr int by_rows_threads = 512, by_rows_warps = by_rows_threads / 32, by_columns_warps = 8;

// One element of the result.
template <class C> struct Finish {
    C *c;
    const C *bias, *add;
    C *kept;
    int n;
    bool gelu;
    __device__ void operator()(int row, int column, float sum) const {
        const int64_t at = int64_t(row) * n + column;
        if (bias)
            sum += to_float(bias[column]);
        if (add)
            sum += to_float(add[at]);
        if (kept)
            kept[at] = from_float<C>(sum);
        c[at] = from_float<C>(gelu ? gelu_of(sum) : sum);
    }
};

// LANES threads have a row of the block's 8 LANES columns.
template <int M, int LANES, class C>
__global__ __launch_bounds__(by_rows_threads) void by_rows_kernel(const bf16 *a, const bf16 *b,
                                                                  int m, int n, int k,
                                                                  Finish<C> finish) {
    constexpr int columns = 8 * LANES, rows = by_rows_threads / LANES;
    __shared__ float parts[by_rows_warps][M][columns];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int first = blockIdx.x * columns, own = threadIdx.x % LANES * 8;
    const bool inside = first + own < n;
    float sum[M][8] = {};
    wait_for_earlier();
    if (inside)
#pragma unroll(M <= 2 ? 8 : 4)
        for (int row = threadIdx.x / LANES; row < k; row += rows) {
            const Pack<bf16, 8> w = load<8>(b + int64_t(row) * n + first + own);
#pragma unroll
            for (int i = 0; i < M; ++i) {
                const float x = i < m ? to_float(a[int64_t(i) * k + row]) : 0.0f;
#pragma unroll
                for (int j = 0; j < 8; ++j)
                    sum[i][j] = fmaf(x, w[j], sum[i][j]);
            }
        }
#pragma unroll
    for (int i = 0; i < M; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j) {
#pragma unroll
            for (int step = LANES; step < 32; step *= 2)
                sum[i][j] += __shfl_xor_sync(~0u, sum[i][j], step);
            if (lane < LANES)
                parts[warp][i][own + j] = sum[i][j];
        }
    __syncthreads();
    for (int i = threadIdx.x; i < m * columns; i += by_rows_threads) {
        const int row = i / columns, column = i % columns;
        if (first + column >= n)
            continue;
        float all = 0;
        for (int w = 0; w < by_rows_warps; ++w)
            all += parts[w][row][column];
        finish(row, first + column, all);
    }
}

template <int M, class C>
__global__
__launch_bounds__(32 * by_columns_warps) void by_columns_kernel(const bf16 *a, const bf16 *b, int m,
                                                                int n, int k, Finish<C> finish) {
    const int lane = threadIdx.x % 32,
              column = blockIdx.x * by_columns_warps + int(threadIdx.x / 32);
    if (column >= n)
        return;
    float sum[M] = {};
    wait_for_earlier();
#pragma unroll 4
    for (int i = 8 * lane; i < k; i += 256) {
        const Pack<bf16, 8> w = load<8>(b + int64_t(column) * k + i);
#pragma unroll
        for (int row = 0; row < M; ++row) {
            const Pack<bf16, 8> x = load<8>(a + int64_t(row < m ? row : 0) * k + i);
#pragma unroll
            for (int j = 0; j < 8; ++j)
                sum[row] = fmaf(x[j], w[j], sum[row]);
        }
    }
#pragma unroll
    for (int row = 0; row < M; ++row) {
        sum[row] = warp_sum(sum[row]);
        if (lane == 0 && row < m)
            finish(row, column, sum[row]);
    }
}

template <int M, class C>
void queue(const Run &run, const ProductShape &s, const bf16 *a, const bf16 *b,
           const Finish<C> &finish) {
    const int m = int(s.m), n = int(s.n), k = int(s.k);
    if (s.tb)
        launch(run, by_columns_kernel<M, C>, blocks_for(n, by_columns_warps), 32 * by_columns_warps,
               0, a, b, m, n, k, finish);
    else if (n < 32 * run.device->processors / 2) // narrower pieces for more blocks
        launch(run, by_rows_kernel<M, 2, C>, blocks_for(n, 16), by_rows_threads, 0, a, b, m, n, k,
               finish);
    else
        launch(run, by_rows_kernel<M, 4, C>, blocks_for(n, 32), by_rows_threads, 0, a, b, m, n, k,
               finish);
}

} // namespace

bool few_fit(const ProductShape &s) {
    return s.m <= 8 && s.operands == PONDER_DTYPE_BF16 && !s.ta && s.batch == 1 && s.lda == 0 &&
           s.ldb == 0 && s.ldc == 0 && s.k % 8 == 0 && (s.tb || s.n % 8 == 0) && s.n < (1 << 30) &&
           s.k < (1 << 30);
}

void few_product(const Run &run, const ProductShape &s, const void *a, const void *b, void *c,
                 const void *bias, const void *add, void *kept) {
    by_type(s.result, [&]<class C>(C) {
        const Finish<C> finish{static_cast<C *>(c),
                               s.bias ? static_cast<const C *>(bias) : nullptr,
                               s.add ? static_cast<const C *>(add) : nullptr,
                               s.keep ? static_cast<C *>(kept) : nullptr,
                               int(s.n),
                               s.gelu};
        const bf16 *x = static_cast<const bf16 *>(a), *w = static_cast<const bf16 *>(b);
        if (s.m == 1)
            queue<1>(run, s, x, w, finish);
        else if (s.m <= 2)
            queue<2>(run, s, x, w, finish);
        else if (s.m <= 4)
            queue<4>(run, s, x, w, finish);
        else
            queue<8>(run, s, x, w, finish);
    });
}

} // namespace ponder::cuda
