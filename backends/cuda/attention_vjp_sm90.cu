// attention_vjp for heads of 64 on Hopper: both kernels of attention_vjp.cu with products by groups
// of warps (wgmma). A block has 128 rows, keys or queries, 64 for each of two groups; what is on
// the other side comes by in tiles of 64 rows through a ring of stages (TMA). While one group works
// out probabilities the other one's products run.
//
// Results of a product lie as the first operand of the next does, so they stay in registers; as the
// second operand a tile is read along its rows for scores, and across them for gradients.
//
// Where there are few rows a block has 64 only, and its two groups share them: each takes every
// other tile, and in the end they add up what they found. All tiles of 512 tokens are on their way
// at once.
#include "attention_sm90.hpp"
#include "launch.cuh"
#include "wgmma.cuh"

namespace ponder::cuda {

namespace {

constexpr int D = 64, tile = 64, groups = 2;
constexpr int threads = 128 * groups, tile_bytes = tile * D * 2, sums_bytes = tile * 4;

template <bool share> constexpr int tiles_of = share ? 1 : groups; // of a block's rows
template <bool share> constexpr int stages_of = share ? 8 : 4;
template <bool share>
constexpr size_t memory_bytes = size_t(tiles_of<share> + stages_of<share>) * 2 * tile_bytes
                                + stages_of<share> * 2 * sums_bytes +
                                (2 * stages_of<share> + 1) * 8 + 1024;
constexpr float log2_e = 1.4426950408889634f;

struct Shape {
    int tokens, width, heads;
    float scale;
};

// A block's rows: keys with all queries from them on, or queries with all keys up to them.
template <bool by_key, bool share>
__device__ inline void gradients(std::byte *memory, const CUtensorMap *qkv, const CUtensorMap *grad,
                                 const float *lse, const float *delta, bf16 *dqkv, const Shape &s,
                                 int block, int head) {
    constexpr int stages = stages_of<share>, own_tiles = tiles_of<share>, rows = own_tiles * tile;
    std::byte *const mine = memory, *const ring = memory + own_tiles * 2 * tile_bytes;
    float *const sums = reinterpret_cast<float *>(ring + stages * 2 * tile_bytes);
    uint64_t *const full = reinterpret_cast<uint64_t *>(sums + stages * 2 * tile),
                   *const empty = full + stages, *const ready = empty + stages;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = warp / 4;
    const int stream = blockIdx.z, first = block * rows;
    const int row0 = stream * s.tokens, at_q = head * D, at_k = s.width + at_q,
              at_v = s.width + at_k;
    lse += int64_t(stream * s.heads + head) * s.tokens;
    delta += int64_t(stream * s.heads + head) * s.tokens;
    if (threadIdx.x == 0) {
        for (int i = 0; i < stages; ++i) {
            barrier_init(full + i, 1);
            barrier_init(empty + i, 4 * own_tiles);
        }
        barrier_init(ready, 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();

    const int begin = by_key ? first / tile : 0,
              end = by_key ? s.tokens / tile : first / tile + own_tiles;
    const auto fetch = [&](int i) {
        const int stage = i % stages, y = row0 + (begin + i) * tile;
        std::byte *const to = ring + stage * 2 * tile_bytes;
        barrier_expect(full + stage, 2 * tile_bytes + (by_key ? 2 * sums_bytes : 0));
        load_tile(to, qkv, full + stage, by_key ? at_q : at_k, y);
        if constexpr (by_key) {
            load_tile(to + tile_bytes, grad, full + stage, at_q, y);
            load_bytes(sums + stage * 2 * tile, lse + (begin + i) * tile, full + stage, sums_bytes);
            load_bytes(sums + stage * 2 * tile + tile, delta + (begin + i) * tile, full + stage,
                       sums_bytes);
        } else {
            load_tile(to + tile_bytes, qkv, full + stage, at_v, y);
        }
    };
    if (threadIdx.x == 0) {
        barrier_expect(ready, own_tiles * 2 * tile_bytes);
        for (int i = 0; i < own_tiles; ++i) {
            const int y = row0 + first + i * tile;
            load_tile(mine + 2 * i * tile_bytes, qkv, ready, by_key ? at_k : at_q, y);
            load_tile(mine + (2 * i + 1) * tile_bytes, by_key ? qkv : grad, ready,
                      by_key ? at_v : at_q, y);
        }
        for (int i = 0; i < min(stages, end - begin); ++i)
            fetch(i);
    }
    __syncwarp();

    const int part = share ? 0 : group; // of the block's rows
    const uint64_t mine_a = operand(mine + 2 * part * tile_bytes),
                   mine_b = operand(mine + (2 * part + 1) * tile_bytes);
    const int own = first / tile + part, row = warp % 4 * 16 + lane / 4, column = lane % 4 * 2;
    const float factor = s.scale * log2_e;
    float row_lse[2] = {}, row_delta[2] = {};
    if constexpr (!by_key)
        for (int half = 0; half < 2; ++half) {
            row_lse[half] = lse[own * tile + row + 8 * half] * log2_e;
            row_delta[half] = delta[own * tile + row + 8 * half];
        }
    float sum_a[32] = {}, sum_b[by_key ? 32 : 1] = {}; // dk or dq; dv
    barrier_wait(ready, 0);
    for (int i = 0; i < end - begin; ++i) {
        // The stage of the tile before last is free when the slower group has left it.
        if (threadIdx.x == 0 && i >= 2 && i - 2 + stages < end - begin) {
            barrier_wait(empty + (i - 2) % stages, (i - 2) / stages & 1);
            fetch(i - 2 + stages);
        }
        __syncwarp();
        const int stage = i % stages, there = begin + i;
        if (share && i % groups != group)
            continue;
        barrier_wait(full + stage, i / stages & 1);
        if (by_key ? there >= own : there <= own) {
            const uint64_t other_a = operand(ring + stage * 2 * tile_bytes),
                           other_b = operand(ring + (stage * 2 + 1) * tile_bytes);
            const float *const column_lse = sums + stage * 2 * tile + column,
                               *const column_delta = column_lse + tile;
            float p[32], dp[32];
            uint32_t packed_p[by_key ? 16 : 1], packed_ds[16];
            pin(p);
            pin(dp);
            products_begin();
#pragma unroll
            for (int k = 0; k < D / 16; ++k)
                multiply(p, mine_a + 2 * k, other_a + 2 * k, k > 0);
            products_commit();
#pragma unroll
            for (int k = 0; k < D / 16; ++k)
                multiply(dp, mine_b + 2 * k, other_b + 2 * k, k > 0);
            products_commit();
            products_wait<1>();
            pin(p);
            const bool diagonal = there == own;
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                float2 shift{};
                if constexpr (by_key) {
                    shift = *reinterpret_cast<const float2 *>(column_lse + 8 * j);
                    shift.x *= log2_e;
                    shift.y *= log2_e;
                }
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    float &x = p[4 * j + e];
                    x = power_of_two(x * factor -
                              (by_key ? (e % 2 ? shift.y : shift.x) : row_lse[e / 2]));
                    if (diagonal) {
                        const int r = row + e / 2 * 8, c = 8 * j + column + e % 2;
                        if (by_key ? c < r : c > r)
                            x = 0;
                    }
                }
                if constexpr (by_key) {
                    packed_p[2 * j] = pack(p[4 * j], p[4 * j + 1]);
                    packed_p[2 * j + 1] = pack(p[4 * j + 2], p[4 * j + 3]);
                }
            }
            if constexpr (by_key) {
                pin(sum_b);
                products_begin();
#pragma unroll
                for (int k = 0; k < tile / 16; ++k)
                    multiply(sum_b, packed_p + 4 * k, other_b + 128 * k);
                products_commit();
                products_wait<1>();
            } else {
                products_wait<0>();
            }
            pin(dp);
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                float2 inner{};
                if constexpr (by_key)
                    inner = *reinterpret_cast<const float2 *>(column_delta + 8 * j);
                float ds[4];
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    ds[e] = p[4 * j + e] *
                            (dp[4 * j + e] -
                             (by_key ? (e % 2 ? inner.y : inner.x) : row_delta[e / 2]));
                packed_ds[2 * j] = pack(ds[0], ds[1]);
                packed_ds[2 * j + 1] = pack(ds[2], ds[3]);
            }
            pin(sum_a);
            products_begin();
#pragma unroll
            for (int k = 0; k < tile / 16; ++k)
                multiply(sum_a, packed_ds + 4 * k, other_a + 128 * k);
            products_commit();
            products_wait<0>();
            pin(sum_a);
            if constexpr (by_key)
                pin(sum_b);
        }
        if (lane == 0)
            barrier_arrive(empty + stage);
        __syncwarp();
    }

    if constexpr (share) {
        // Each group gives away what the other one is to write: the first writes dq or dk, the
        // second dv.
        float *const given = reinterpret_cast<float *>(ring) + threadIdx.x % 128;
        __syncthreads(); // the stages are free
        if (by_key || group == 1)
#pragma unroll
            for (int j = 0; j < 32; ++j)
                given[(32 * group + j) * 128] = group == 1 ? sum_a[j] : sum_b[by_key ? j : 0];
        __syncthreads();
        if (!by_key && group == 1)
            return;
#pragma unroll
        for (int j = 0; j < 32; ++j)
            (group == 0 ? sum_a[j] : sum_b[by_key ? j : 0]) += given[(32 * (1 - group) + j) * 128];
    }
    bf16 *const to = dqkv + (int64_t(row0) + own * tile + row) * 3 * s.width +
                     (by_key ? at_k : at_q) + column;
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            bf16 *const at = to + half * 8 * int64_t(3 * s.width) + 8 * j;
            if (!share || group == 0)
                *reinterpret_cast<uint32_t *>(at) =
                    pack(sum_a[4 * j + 2 * half] * s.scale, sum_a[4 * j + 2 * half + 1] * s.scale);
            if constexpr (by_key)
                if (!share || group == 1)
                    *reinterpret_cast<uint32_t *>(at + s.width) =
                        pack(sum_b[4 * j + 2 * half], sum_b[4 * j + 2 * half + 1]);
        }
}

// Blocks of keys and of queries by turns, those with the longest way first.
template <bool share>
__global__ __launch_bounds__(threads,
                             1) void gradients_kernel(const __grid_constant__ CUtensorMap qkv,
                                                      const __grid_constant__ CUtensorMap grad,
                                                      const float *lse, const float *delta,
                                                      bf16 *dqkv, const Shape s) {
    extern __shared__ std::byte raw[];
    std::byte *const memory = raw + (1024 - (address(raw) & 1023)) % 1024;
    // Few rows: those of all heads in the order of their ways.
    const int place = share ? blockIdx.y : blockIdx.x, head = share ? blockIdx.x : blockIdx.y;
    const int block = place / 2, last = s.tokens / (tiles_of<share> * tile) - 1;
    wait_for_earlier();
    if (place % 2 == 0)
        gradients<true, share>(memory, &qkv, &grad, lse, delta, dqkv, s, block, head);
    else
        gradients<false, share>(memory, &qkv, &grad, lse, delta, dqkv, s, last - block, head);
}

// Smaller blocks keep more multiprocessors busy.
bool few_rows(const ponder_device &device, int64_t streams, int64_t heads, int64_t tokens) {
    return streams * heads * (tokens / (groups * tile)) < device.processors;
}

template <bool share>
void queue(const Run &run, const CUtensorMap &qkv, const CUtensorMap &grad, const float *lse,
           const float *delta, bf16 *dqkv, const Shape &s, int64_t streams) {
    constexpr int memory = int(memory_bytes<share>);
    run.device->check(cudaFuncSetAttribute(gradients_kernel<share>,
                                           cudaFuncAttributeMaxDynamicSharedMemorySize, memory),
                      "attention_vjp");
    const unsigned blocks = unsigned(2 * s.tokens / (tiles_of<share> * tile)),
                   heads = unsigned(s.heads);
    launch(run, gradients_kernel<share>,
           dim3(share ? heads : blocks, share ? blocks : heads, unsigned(streams)), threads, memory,
           qkv, grad, lse, delta, dqkv, s);
}

} // namespace

bool attention_gradients_fit(const ponder_device &device, int64_t streams, int64_t heads,
                             int64_t tokens, int64_t d) {
    return device.major == 9 && d == D && tokens % tile == 0 && streams < 65536 && heads < 65536 &&
           streams * tokens * 3 * heads * d < int64_t(1) << 40 && streams * tokens < (1 << 30) &&
           (few_rows(device, streams, heads, tokens) ? tokens < 65536 : tokens % (2 * tile) == 0) &&
           encode_function();
}

void attention_gradients(const Run &run, const bf16 *qkv, const float *lse, const float *delta,
                         const bf16 *grad, bf16 *dqkv, int64_t streams, int64_t heads,
                         int64_t tokens) {
    const int64_t width = heads * D;
    CUtensorMap map_qkv, map_grad;
    if (!describe(map_qkv, qkv, 3 * width, streams * tokens, tile) ||
        !describe(map_grad, grad, width, streams * tokens, tile))
        return run.device->fail("attention_vjp: cuTensorMapEncodeTiled failed");
    const Shape shape{int(tokens), int(width), int(heads), 1 / sqrtf(float(D))};
    few_rows(*run.device, streams, heads, tokens)
        ? queue<true>(run, map_qkv, map_grad, lse, delta, dqkv, shape, streams)
        : queue<false>(run, map_qkv, map_grad, lse, delta, dqkv, shape, streams);
}

} // namespace ponder::cuda
