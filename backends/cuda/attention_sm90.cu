// attention for heads of 64 on Hopper: the kernel of attention.cu with products by groups of warps
// (wgmma). A block has 128 queries, 64 for each of two groups; keys and values come by in tiles of
// 64 through a ring of stages (TMA). The scores of the next tile follow the sums over values of this
// one, so that a group waits once a tile; while it works out probabilities the other one's products
// run. See attention_vjp_sm90.cu for how operands lie.
#include "attention_sm90.hpp"
#include "launch.cuh"
#include "wgmma.cuh"

#include <type_traits>

namespace ponder::cuda {

namespace {

constexpr int D = 64, tile = 64, groups = 2, rows = tile * groups, stages = 4;
constexpr int threads = 128 * groups, tile_bytes = tile * D * 2;
constexpr size_t memory_bytes =
    size_t(groups + 2 * stages) * tile_bytes + (2 * stages + 1) * 8 + 1024;
constexpr float log2_e = 1.4426950408889634f;

__global__ __launch_bounds__(threads, 2)
void tiles_kernel(const __grid_constant__ CUtensorMap qkv, bf16 *o, float *lse, int tokens,
                  int width, float scale) {
    extern __shared__ std::byte raw[];
    std::byte *const mine = raw + (1024 - (address(raw) & 1023)) % 1024,
                    *const ring = mine + groups * tile_bytes;
    uint64_t *const full = reinterpret_cast<uint64_t *>(ring + stages * 2 * tile_bytes),
                   *const empty = full + stages, *const ready = empty + stages;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = warp / 4;
    const int first = (int(gridDim.x) - 1 - int(blockIdx.x)) * rows; // longest blocks first
    const int head = blockIdx.y, row0 = int(blockIdx.z) * tokens, at_q = head * D;
    if (threadIdx.x == 0) {
        for (int i = 0; i < stages; ++i) {
            barrier_init(full + i, 1);
            barrier_init(empty + i, 4 * groups);
        }
        barrier_init(ready, 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    wait_for_earlier();

    const int count = first / tile + groups;
    const auto fetch = [&](int i) {
        const int stage = i % stages, y = row0 + i * tile;
        std::byte *const to = ring + stage * 2 * tile_bytes;
        barrier_expect(full + stage, 2 * tile_bytes);
        load_tile(to, &qkv, full + stage, at_q + width, y);
        load_tile(to + tile_bytes, &qkv, full + stage, at_q + 2 * width, y);
    };
    if (threadIdx.x == 0) {
        barrier_expect(ready, groups * tile_bytes);
        for (int i = 0; i < groups; ++i)
            load_tile(mine + i * tile_bytes, &qkv, ready, at_q, row0 + first + i * tile);
        for (int i = 0; i < min(stages, count); ++i)
            fetch(i);
    }
    __syncwarp();

    const uint64_t q = operand(mine + group * tile_bytes);
    const int own = first / tile + group, row = warp % 4 * 16 + lane / 4, column = lane % 4 * 2;
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
        if (lane == 0 && i > 0)
            barrier_arrive(empty + (i - 1) % stages);
        // The stage of the tile before last is free when the slower group has left it.
        if (threadIdx.x == 0 && i >= 2 && i - 2 + stages < count) {
            barrier_wait(empty + (i - 2) % stages, (i - 2) / stages & 1);
            fetch(i - 2 + stages);
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
            queue_scores(i + 1); // while those run
    };
    barrier_wait(ready, 0);
    pin(out); // zero before products begin
    queue_scores(0);
    for (int i = 0; i < own; ++i)
        step(i, std::false_type());
    step(own, std::true_type());
    products_wait<0>();
    pin(out);

    bf16 *const to = o + (int64_t(row0) + own * tile + row) * width + at_q + column;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        sum[half] += __shfl_xor_sync(~0u, sum[half], 1);
        sum[half] += __shfl_xor_sync(~0u, sum[half], 2);
        if (lane % 4 == 0)
            lse[(int64_t(blockIdx.z) * gridDim.y + head) * tokens + own * tile + row + 8 * half] =
                top[half] * scale + logf(sum[half]);
        const float share = 1 / sum[half];
#pragma unroll
        for (int j = 0; j < 8; ++j)
            *reinterpret_cast<uint32_t *>(to + half * 8 * int64_t(width) + 8 * j) =
                pack(out[4 * j + 2 * half] * share, out[4 * j + 2 * half + 1] * share);
    }
}

} // namespace

bool attention_fits(const ponder_device &device, int64_t streams, int64_t heads, int64_t tokens,
                    int64_t d) {
    // Smaller blocks keep more multiprocessors busy with few rows.
    return device.major == 9 && d == D && tokens % rows == 0 && streams < 65536 && heads < 65536 &&
           streams * tokens < (1 << 30) &&
           streams * heads * (tokens / rows) >= 2 * device.processors && encode_function();
}

void attention_tiles(const Run &run, const bf16 *qkv, bf16 *o, float *lse, int64_t streams,
                     int64_t heads, int64_t tokens) {
    const int64_t width = heads * D;
    CUtensorMap map;
    if (!describe(map, qkv, 3 * width, streams * tokens, tile))
        return run.device->fail("attention: cuTensorMapEncodeTiled failed");
    run.device->check(cudaFuncSetAttribute(tiles_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           int(memory_bytes)),
                      "attention");
    launch(run, tiles_kernel, dim3(unsigned(tokens / rows), unsigned(heads), unsigned(streams)),
           threads, memory_bytes, map, o, lse, int(tokens), int(width), 1 / sqrtf(float(D)));
}

} // namespace ponder::cuda
