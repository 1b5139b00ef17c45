// attention for heads of 64 on Hopper: the kernel of attention.cu with products by groups of warps
// (wgmma). A block has 128 queries, 64 for each of two groups; keys and values come by in tiles of
// 64 through a ring of stages (TMA). The scores of the next tile follow the sums over values of
// this one, so that a group waits once a tile; while it works out probabilities the other one's
// products run. See attention_vjp_sm90.cu for how operands lie.
//
// Where there are few rows a block has 64 only, which four groups share: each takes every fourth
// tile, and in the end each puts together a quarter of the columns from what all found. All tiles
// of 512 tokens are on their way at once.
#include "attention_sm90.hpp"
#include "launch.cuh"
#include "wgmma.cuh"

#include <type_traits>

namespace ponder::cuda {

namespace {

constexpr int D = 64, tile = 64, tile_bytes = tile * D * 2;
constexpr float log2_e = 1.4426950408889634f;

template <bool share> constexpr int groups_of = share ? 4 : 2;
template <bool share> constexpr int tiles_of = share ? 1 : groups_of<share>; // of a block's rows
template <bool share> constexpr int stages_of = share ? 8 : 4;
template <bool share> constexpr int threads_of = 128 * groups_of<share>;
template <bool share>
constexpr size_t memory_bytes = size_t(tiles_of<share> + 2 * stages_of<share>) * tile_bytes +
                                (2 * stages_of<share> + 1) * 8 + 1024;

// What the groups found of 64 rows: out in the place of thread t of a group, top and sum of a row.
struct Shares {
    float out[4][32][128], top[4][tile], sum[4][tile];
};
static_assert(sizeof(Shares) <= 2 * 8 * tile_bytes);

template <bool share>
__global__
__launch_bounds__(threads_of<share>,
                  share ? 1 : 2) void tiles_kernel(const __grid_constant__ CUtensorMap qkv, bf16 *o,
                                                   float *lse, int tokens, int width, float scale) {
    extern __shared__ std::byte raw[];
    constexpr int groups = groups_of<share>, own_tiles = tiles_of<share>, rows = own_tiles * tile,
                  stages = stages_of<share>;
    constexpr int every = share ? groups : 1; // tile after tile of a group
    std::byte *const mine = raw + (1024 - (address(raw) & 1023)) % 1024, *const ring =
                                                                             mine +
                                                                             own_tiles * tile_bytes;
    uint64_t *const full = reinterpret_cast<uint64_t *>(ring + stages * 2 * tile_bytes),
                   *const empty = full + stages, *const ready = empty + stages;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = warp / 4;
    const int first = (int(gridDim.x) - 1 - int(blockIdx.x)) * rows; // longest blocks first
    const int head = blockIdx.y, row0 = int(blockIdx.z) * tokens, at_q = head * D;
    if (threadIdx.x == 0) {
        for (int i = 0; i < stages; ++i) {
            barrier_init(full + i, 1);
            barrier_init(empty + i, 4 * own_tiles);
        }
        barrier_init(ready, 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    wait_for_earlier();

    const int count = first / tile + own_tiles;
    const auto fetch = [&](int i) {
        const int stage = i % stages, y = row0 + i * tile;
        std::byte *const to = ring + stage * 2 * tile_bytes;
        barrier_expect(full + stage, 2 * tile_bytes);
        load_tile(to, &qkv, full + stage, at_q + width, y);
        load_tile(to + tile_bytes, &qkv, full + stage, at_q + 2 * width, y);
    };
    if (threadIdx.x == 0) {
        barrier_expect(ready, own_tiles * tile_bytes);
        for (int i = 0; i < own_tiles; ++i)
            load_tile(mine + i * tile_bytes, &qkv, ready, at_q, row0 + first + i * tile);
        for (int i = 0; i < min(stages, count); ++i)
            fetch(i);
    }
    __syncwarp();

    const int part = share ? 0 : group; // of the block's rows
    const uint64_t q = operand(mine + part * tile_bytes);
    const int own = first / tile + part, row = warp % 4 * 16 + lane / 4, column = lane % 4 * 2;
    const float factor = scale * log2_e;
    float p[32], out[32] = {}, top[2] = {-INFINITY, -INFINITY}, sum[2] = {};
    const auto queue_scores = [&](int i) {
        barrier_wait(full + i % stages, i / stages & 1);
        const uint64_t k = operand(ring + i % stages * 2 * tile_bytes);
        pin(p);
        products_begin();
#pragma unroll
        for (int j = 0; j < D / 16; ++j)
            multiply(p, q + 2 * j, k + 2 * j, j > 0);
        products_commit();
    };
    // The last tile, that of the queries themselves, is cut along its diagonal.
    const auto step = [&]<bool last>(int i, std::bool_constant<last>) {
        products_wait<0>(); // scores of this tile, sums over values of the one before
        pin(p);
        pin(out);
        if (lane == 0 && i >= every)
            barrier_arrive(empty + (i - every) % stages);
        // The stage of the tile before last is free when the slower group has left it; of shared
        // ones those that all groups had before these.
        const int back = share ? every : 2;
        if (threadIdx.x == 0 && i >= back)
            for (int j = i - back; j < i - back + every && j + stages < count; ++j) {
                barrier_wait(empty + j % stages, j / stages & 1);
                fetch(j + stages);
            }
        __syncwarp();
        const auto score = [&](int j, int e) { // results of products stay as they are
            return last && 8 * j + column + e % 2 > row + e / 2 * 8 ? -INFINITY : p[4 * j + e];
        };
        uint32_t packed[16];
        float shrink[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float high = top[half]; // every row has seen a key when this tile is done
#pragma unroll
            for (int j = 0; j < 8; ++j)
                high = fmaxf(high, fmaxf(score(j, 2 * half), score(j, 2 * half + 1)));
            high = fmaxf(high, __shfl_xor_sync(~0u, high, 1));
            high = fmaxf(high, __shfl_xor_sync(~0u, high, 2));
            shrink[half] = power_of_two((top[half] - high) * factor);
            top[half] = high;
            const float offset = high * factor;
            float all = 0;
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                const float a = power_of_two(score(j, 2 * half) * factor - offset),
                            b = power_of_two(score(j, 2 * half + 1) * factor - offset);
                all += a + b;
                packed[2 * j + half] = pack(a, b);
            }
            sum[half] = sum[half] * shrink[half] + all;
        }
#pragma unroll
        for (int j = 0; j < 32; ++j)
            out[j] *= shrink[j / 2 % 2];
        const uint64_t v = operand(ring + (i % stages * 2 + 1) * tile_bytes);
        pin(out);
        products_begin();
#pragma unroll
        for (int j = 0; j < tile / 16; ++j)
            multiply(out, packed + 4 * j, v + 128 * j);
        products_commit();
        if constexpr (!last)
            if (!share || i + every <= own)
                queue_scores(i + every); // while those run
    };
    barrier_wait(ready, 0);
    pin(out); // zero before products begin
    const int begin = share ? group : 0;
    if (!share || begin <= own) {
        queue_scores(begin);
        for (int i = begin; i < own; i += every)
            step(i, std::false_type());
        if (!share || own % groups == group)
            step(own, std::true_type());
    }
    products_wait<0>();
    pin(out);

    bf16 *const to = o + (int64_t(row0) + own * tile + row) * width + at_q + column;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        sum[half] += __shfl_xor_sync(~0u, sum[half], 1);
        sum[half] += __shfl_xor_sync(~0u, sum[half], 2);
    }
    if constexpr (share) {
        Shares &shares = *reinterpret_cast<Shares *>(ring);
        const int t = threadIdx.x % 128;
        __syncthreads(); // the stages are free
#pragma unroll
        for (int j = 0; j < 32; ++j)
            shares.out[group][j][t] = out[j];
#pragma unroll
        for (int half = 0; half < 2; ++half)
            if (lane % 4 == 0) {
                shares.top[group][row + 8 * half] = top[half];
                shares.sum[group][row + 8 * half] = sum[half];
            }
        __syncthreads();
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int r = row + 8 * half;
            float high = shares.top[0][r], weight[groups], all = 0; // the first has seen key 0
#pragma unroll
            for (int g = 1; g < groups; ++g)
                high = fmaxf(high, shares.top[g][r]);
#pragma unroll
            for (int g = 0; g < groups; ++g) {
                weight[g] = power_of_two((shares.top[g][r] - high) * factor);
                all += weight[g] * shares.sum[g][r];
            }
            if (group == 0 && lane % 4 == 0)
                lse[(int64_t(blockIdx.z) * gridDim.y + head) * tokens + own * tile + r] =
                    high * scale + logf(all);
            const float one = 1 / all;
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const int at = 8 * group + 4 * j + 2 * half;
                float x = 0, y = 0;
#pragma unroll
                for (int g = 0; g < groups; ++g) {
                    x += weight[g] * shares.out[g][at][t];
                    y += weight[g] * shares.out[g][at + 1][t];
                }
                *reinterpret_cast<uint32_t *>(to + half * 8 * int64_t(width) + 16 * group + 8 * j) =
                    pack(x * one, y * one);
            }
        }
    } else {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (lane % 4 == 0)
                lse[(int64_t(blockIdx.z) * gridDim.y + head) * tokens + own * tile + row +
                    8 * half] = top[half] * scale + logf(sum[half]);
            const float one = 1 / sum[half];
#pragma unroll
            for (int j = 0; j < 8; ++j)
                *reinterpret_cast<uint32_t *>(to + half * 8 * int64_t(width) + 8 * j) =
                    pack(out[4 * j + 2 * half] * one, out[4 * j + 2 * half + 1] * one);
        }
    }
}

// One round of the smaller blocks.
bool few_rows(const ponder_device &device, int64_t streams, int64_t heads, int64_t tokens) {
    return tokens % tile == 0 && streams * heads * (tokens / tile) <= device.processors;
}

template <bool share>
void queue(const Run &run, const CUtensorMap &map, bf16 *o, float *lse, int64_t streams,
           int64_t heads, int64_t tokens) {
    constexpr size_t memory = memory_bytes<share>;
    run.device->check(cudaFuncSetAttribute(tiles_kernel<share>,
                                           cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           int(memory)),
                      "attention");
    launch(run, tiles_kernel<share>,
           dim3(unsigned(tokens / (tiles_of<share> * tile)), unsigned(heads), unsigned(streams)),
           threads_of<share>, memory, map, o, lse, int(tokens), int(heads * D),
           1 / sqrtf(float(D)));
}

} // namespace

bool attention_fits(const ponder_device &device, int64_t streams, int64_t heads, int64_t tokens,
                    int64_t d) {
    if (device.major != 9 || d != D || streams >= 65536 || heads >= 65536 ||
        streams * tokens >= (1 << 30) || !encode_function())
        return false;
    // In between the blocks of attention.cu keep more multiprocessors busy.
    return few_rows(device, streams, heads, tokens) ||
           (tokens % (2 * tile) == 0 &&
            streams * heads * (tokens / (2 * tile)) >= 2 * device.processors);
}

void attention_tiles(const Run &run, const bf16 *qkv, bf16 *o, float *lse, int64_t streams,
                     int64_t heads, int64_t tokens) {
    CUtensorMap map;
    if (!describe(map, qkv, 3 * heads * D, streams * tokens, tile))
        return run.device->fail("attention: cuTensorMapEncodeTiled failed");
    few_rows(*run.device, streams, heads, tokens)
        ? queue<true>(run, map, o, lse, streams, heads, tokens)
        : queue<false>(run, map, o, lse, streams, heads, tokens);
}

} // namespace ponder::cuda
