// embedding: y = table[id] + position[first + t]; embedding_at: table[id] + position[at]
// vjp: dtable[v] = the sum of dy over v's tokens, in their order (a stable sort by id), so that the
// sum is the same every time; dposition[p] = the sum over streams.
#include "launch.cuh"
#include "ops.hpp"

#include <cub/device/device_radix_sort.cuh>

namespace ponder::cuda {

namespace {

constexpr int threads = 256;

template <int N, class T, class P>
__global__ void embedding_kernel(const int32_t *ids, const int32_t *places, const T *table,
                                 const P *position, float *y, int64_t packs, int64_t tokens,
                                 int64_t width, int64_t first) {
    const int64_t i = int64_t(blockIdx.x) * threads + threadIdx.x;
    if (i >= packs)
        return;
    wait_for_earlier();
    const int64_t at = i * N, row = at / width, c = at % width;
    const Pack<T, N> word = load<N>(table + int64_t(ids[row]) * width + c);
    const int64_t position_of_row = places ? places[row] : first + row % tokens;
    const Pack<P, N> place = load<N>(position + position_of_row * width + c);
    Pack<float, N> out;
    for (int j = 0; j < N; ++j)
        out.v[j] = word[j] + place[j];
    store<N>(y + at, out);
}

__global__ void number_kernel(int32_t *order, int64_t n) {
    const int64_t i = int64_t(blockIdx.x) * threads + threadIdx.x;
    if (i < n)
        order[i] = int32_t(i);
}

__device__ int64_t first_not_below(const int32_t *sorted, int64_t n, int32_t v) {
    int64_t low = 0;
    while (n > 0) {
        const int64_t half = n / 2;
        if (sorted[low + half] < v) {
            low += half + 1;
            n -= half + 1;
        } else {
            n = half;
        }
    }
    return low;
}

__global__ void table_kernel(const float *dy, const int32_t *sorted, const int32_t *order,
                             float *dtable, int64_t rows, int64_t width) {
    __shared__ int64_t range[2];
    const int32_t v = int32_t(blockIdx.x);
    if (threadIdx.x < 2)
        range[threadIdx.x] = first_not_below(sorted, rows, v + int32_t(threadIdx.x));
    __syncthreads();
    for (int64_t c = threadIdx.x; c < width; c += threads) {
        float sum = 0;
#pragma unroll 8
        for (int64_t i = range[0]; i < range[1]; ++i)
            sum += dy[int64_t(order[i]) * width + c];
        dtable[int64_t(v) * width + c] = sum;
    }
}

__global__ void position_kernel(const float *dy, float *dposition, int64_t n, int64_t streams,
                                int64_t tokens, int64_t width, int64_t first) {
    const int64_t i = int64_t(blockIdx.x) * threads + threadIdx.x;
    if (i >= n)
        return;
    const int64_t t = i / width - first;
    float sum = 0;
    if (t >= 0 && t < tokens)
#pragma unroll 8
        for (int64_t s = 0; s < streams; ++s)
            sum += dy[(s * tokens + t) * width + i % width];
    dposition[i] = sum;
}

size_t round_up(size_t bytes) { return (bytes + 255) / 256 * 256; }

int32_t plan_lookup(const Call &call, size_t table_at) {
    const int64_t tokens = call.dim(0, 1), width = call.last(table_at);
    const int64_t n = call.count(call.out(0)), first = int64_t(call.attr(0));
    const bool given = table_at == 2;
    return by_types(call.type(table_at), call.type(table_at + 1), [&]<class T, class P>(T, P) {
        return call.is(0, [=](const Run &run) {
            const int32_t *ids = run.at<const int32_t>(0);
            const int32_t *places = given ? run.at<const int32_t>(1) : nullptr;
            const T *table = run.at<const T>(table_at);
            const P *position = run.at<const P>(table_at + 1);
            float *y = run.at<float>(table_at + 2);
            if (width % 4 == 0 && aligned(table, 16) && aligned(position, 16))
                launch(run, embedding_kernel<4, T, P>, blocks_for(n / 4, threads), threads, 0, ids,
                       places, table, position, y, n / 4, tokens, width, first);
            else
                launch(run, embedding_kernel<1, T, P>, blocks_for(n, threads), threads, 0, ids,
                       places, table, position, y, n, tokens, width, first);
        });
    });
}

} // namespace

int32_t plan_embedding(const Call &call) { return plan_lookup(call, 1); }
int32_t plan_embedding_at(const Call &call) { return plan_lookup(call, 2); }

int32_t plan_embedding_vjp(const Call &call) {
    const int64_t streams = call.dim(1, 0), tokens = call.dim(1, 1), width = call.dim(0, 2);
    const int64_t rows = streams * tokens, vocabulary = call.dim(2, 0), positions = call.dim(3, 0);
    const int64_t first = int64_t(call.attr(0));
    int bits = 1;
    while ((int64_t(1) << bits) < vocabulary)
        ++bits;
    size_t sort_bytes = 0;
    cub::DeviceRadixSort::SortPairs(
        nullptr, sort_bytes, static_cast<const int32_t *>(nullptr), static_cast<int32_t *>(nullptr),
        static_cast<const int32_t *>(nullptr), static_cast<int32_t *>(nullptr), int(rows), 0, bits);
    const size_t list = round_up(size_t(rows) * sizeof(int32_t));
    return call.is(3 * list + sort_bytes, [=](const Run &run) {
        int32_t *number = reinterpret_cast<int32_t *>(run.workspace);
        int32_t *order = reinterpret_cast<int32_t *>(run.workspace + list);
        int32_t *sorted = reinterpret_cast<int32_t *>(run.workspace + 2 * list);
        const float *dy = run.at<const float>(0);
        number_kernel<<<blocks_for(rows, threads), threads, 0, run.stream>>>(number, rows);
        size_t bytes = sort_bytes;
        cub::DeviceRadixSort::SortPairs(run.workspace + 3 * list, bytes, run.at<const int32_t>(1),
                                        sorted, number, order, int(rows), 0, bits, run.stream);
        table_kernel<<<unsigned(vocabulary), threads, 0, run.stream>>>(
            dy, sorted, order, run.at<float>(2), rows, width);
        position_kernel<<<blocks_for(positions * width, threads), threads, 0, run.stream>>>(
            dy, run.at<float>(3), positions * width, streams, tokens, width, first);
    });
}

} // namespace ponder::cuda
