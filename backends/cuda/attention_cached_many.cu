// attention_cached for pieces of a prompt in bf16: 64 new tokens a block, on tensor cores, over the
// cached rows before and among them. Where the piece begins is known at run time only. Heads of up
// to 128, a multiple of 8; columns that a tile has and a head has not are zeros.
#include "attention_cached.hpp"
#include "attention_walk.cuh"
#include "launch.cuh"

#include <type_traits>

namespace ponder::cuda {

namespace {

// As load_tile, for rows of `columns` <= D.
template <int D, int ROWS, int THREADS>
__device__ inline void load_part(bf16 *tile, const bf16 *from, int first, int rows, int64_t stride,
                                 int columns) {
    constexpr int pieces = Tile<D>::pieces;
    for (int i = threadIdx.x; i < ROWS * pieces; i += THREADS) {
        const int row = i / pieces, piece = i % pieces;
        const bool there = first + row < rows && piece * 8 < columns;
        copy_async(tile + Tile<D>::place(row, piece),
                   from + (there ? int64_t(first + row) * stride + piece * 8 : 0), there);
    }
}

// Blocks with the most keys come first.
template <int D, int SPLIT>
__global__ __launch_bounds__(128 * SPLIT) void many_kernel(const bf16 *qkv, const int32_t *firsts,
                                                           const bf16 *k_all, const bf16 *v_all,
                                                           bf16 *o, int tokens, int heads,
                                                           int places, int d, float scale) {
    constexpr int threads = 128 * SPLIT, step = walk_keys * SPLIT;
    extern __shared__ __align__(128) std::byte memory[];
    const int first = (int(gridDim.x) - 1 - int(blockIdx.x)) * walk_queries, head = blockIdx.y;
    const int64_t s = blockIdx.z, width = int64_t(heads) * d, stride = 3 * width;
    const bf16 *const q = qkv + s * tokens * stride + int64_t(head) * d;
    const bf16 *const k = k_all + (s * heads + head) * places * d, *const v =
                                                                       v_all + (s * heads + head) *
                                                                                   places * d;
    wait_for_earlier();
    const int past = firsts[s] + first;
    const int last = min(firsts[s] + min(first + walk_queries, tokens), places) - 1;
    Found<D> found;
    if (!walk<D, SPLIT>(
            memory, found, past, places - 1, last, scale * log2_e,
            [&](bf16 *to) { load_part<D, walk_queries, threads>(to, q, first, tokens, stride, d); },
            [&](bf16 *to_k, bf16 *to_v, int key) {
                load_part<D, step, threads>(to_k, k, key, places, d, d);
                load_part<D, step, threads>(to_v, v, key, places, d, d);
            }))
        return;
    const int warp = threadIdx.x / 32;
    store_rows<D>(o + s * tokens * width + int64_t(head) * d, found.out, first + 16 * warp, tokens,
                  width, 1 / found.sum[0], 1 / found.sum[1], d);
}

template <int D, int SPLIT> void queue(const Run &run, const CachedShape &s, dim3 grid) {
    constexpr size_t memory = walk_memory<D, SPLIT>;
    run.device->check(cudaFuncSetAttribute(many_kernel<D, SPLIT>,
                                           cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           int(memory)),
                      "attention_cached");
    launch(run, many_kernel<D, SPLIT>, grid, 128 * SPLIT, memory, run.at<const bf16>(0),
           run.at<const int32_t>(1), run.at<const bf16>(5), run.at<const bf16>(6), run.at<bf16>(4),
           int(s.tokens), int(s.heads), int(s.places), int(s.d), 1 / sqrtf(float(s.d)));
}

template <int D> void queue(const Run &run, const CachedShape &s) {
    const dim3 grid(blocks_for(s.tokens, walk_queries), unsigned(s.heads), unsigned(s.streams));
    walk_by_split<D>(
        grid, s.places, *run.device,
        [&]<int SPLIT>(std::integral_constant<int, SPLIT>) { queue<D, SPLIT>(run, s, grid); });
}

} // namespace

bool many_tokens_fit(const CachedShape &shape) {
    return shape.type == PONDER_DTYPE_BF16 && shape.d % 8 == 0 && shape.d <= 128 &&
           shape.places < (1 << 24) && shape.tokens < (1 << 24);
}

void attend_many_tokens(const Run &run, const CachedShape &shape) {
    if (shape.d <= 32)
        queue<32>(run, shape);
    else if (shape.d <= 64)
        queue<64>(run, shape);
    else
        queue<128>(run, shape);
}

} // namespace ponder::cuda
