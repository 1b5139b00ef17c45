// matmul_tn_group: c = a^T b for many pairs in one launch, where one of a and b is narrow:
// gradients of low-rank factors. A block has some columns of the broad one and 16 of the narrow
// one; their tokens pass through a ring of stages in shared memory, where every warp multiplies 16
// of the columns, so that nothing has to be summed over warps. Most of the operands are long out of
// the L2 cache when they are read here, and bytes under way from memory are what counts: blocks are
// small enough that those of a pass (GPT-2 124M: 384) are all on the machine at once.
#include "fragments.cuh"
#include "launch.cuh"
#include "ops.hpp"

#include <algorithm>
#include <vector>

namespace ponder::cuda {

namespace {

constexpr int columns = 96, ranks = 16;
constexpr int threads = 2 * columns; // 16 columns a warp
constexpr int step = 32, stages = 6; // step: tokens of a stage
// Of a token: columns of both, and 8 more, so that the eight rows that ldmatrix reads at once fall
// into different banks.
constexpr int row = columns + ranks + 8;
constexpr size_t ring_size = sizeof(bf16) * stages * step * row;
static_assert(ring_size <= 48 * 1024, "more has to be asked for");
constexpr int most_pairs = 40; // of a launch: what fits into its parameters

struct Pair {
    const void *broad, *narrow;
    float *to;
    int width, rank; // of broad and of narrow
    int8_t broad_f32, narrow_f32;
    int8_t broad_first; // c is [width, rank], else [rank, width]
};
struct Pairs {
    int count, tokens;
    int first_block[most_pairs]; // of the pairs' blocks in a row
    Pair pair[most_pairs];
};

// Pairs of bf16 from N neighbours at `from`.
template <int N>
__device__ inline Pack<uint32_t, N / 2> read(const void *from, int64_t place, bool f32) {
    if (!f32)
        return *reinterpret_cast<const Pack<uint32_t, N / 2> *>(static_cast<const bf16 *>(from) +
                                                                place);
    const Pack<float, N> x = load<N>(static_cast<const float *>(from) + place);
    Pack<uint32_t, N / 2> to;
#pragma unroll
    for (int i = 0; i < N / 2; ++i)
        to.v[i] = pack_bf16(x.v[2 * i], x.v[2 * i + 1]);
    return to;
}

// Brings 8 PIECES columns from `column0` on of an operand's tokens, stage by stage, to rows of
// shared memory. What lies behind the end is 0. width is even; where a row is no whole number of
// pieces, the pieces are put together from pairs.
template <int PIECES> struct Feed {
    static constexpr int apart = threads / PIECES; // tokens of one thread
    static_assert(apart >= step || step % apart == 0);
    const void *from;
    int width, column;
    bool f32;
    int left;      // tokens from this thread's next one on
    int64_t place; // of that one

    __device__ Feed(const void *from, bool f32, int64_t row0, int tokens, int width, int column0)
        : from(from), width(width), column(column0 + 8 * int(threadIdx.x % PIECES)), f32(f32) {
        const int first = threadIdx.x / PIECES;
        left = tokens - first;
        place = (row0 + first) * width + column;
        if (column >= width || first >= step)
            left = 0;
    }
    __device__ void fill(bf16 *stage) {
        constexpr int each = apart < step ? step / apart : 1;
        if (apart > step && threadIdx.x / PIECES >= step)
            return;
        stage += threadIdx.x / PIECES * row + 8 * (threadIdx.x % PIECES);
        if (width % 8 == 0 && !f32) {
#pragma unroll
            for (int i = 0; i < each; ++i, next())
                copy_async(stage + i * apart * row,
                           static_cast<const bf16 *>(from) + (left > 0 ? place : 0), left > 0);
            return;
        }
        Pack<uint32_t, 4> x[each]; // all under way before the first is needed
#pragma unroll
        for (int i = 0; i < each; ++i, next())
            x[i] = piece();
#pragma unroll
        for (int i = 0; i < each; ++i)
            *reinterpret_cast<Pack<uint32_t, 4> *>(stage + i * apart * row) = x[i];
    }
    __device__ void next() {
        left -= min(apart, step);
        place += int64_t(min(apart, step)) * width;
    }
    __device__ Pack<uint32_t, 4> piece() const {
        if (width % 8 == 0 && left > 0)
            return read<8>(from, place, f32);
        Pack<uint32_t, 4> x = {};
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (left > 0 && column + 2 * i < width)
                x.v[i] = read<2>(from, place + 2 * i, f32).v[0];
        return x;
    }
};

__global__ __launch_bounds__(threads) void group_kernel(const Pairs pairs) {
    int which = 0; // the last pair that begins at this block or before
    for (int half = 32; half > 0; half /= 2)
        if (which + half < pairs.count && pairs.first_block[which + half] <= int(blockIdx.x))
            which += half;
    const Pair p = pairs.pair[which];
    const int tokens = pairs.tokens, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int column = (int(blockIdx.x) - pairs.first_block[which]) * columns,
              rank0 = int(blockIdx.y) * ranks;
    if (rank0 >= p.rank)
        return;
    bf16 *const ring = reinterpret_cast<bf16 *>(shared_memory());
    wait_for_earlier();

    const int64_t row0 = int64_t(blockIdx.z) * tokens;
    const int count = (tokens + step - 1) / step;
    Feed<columns / 8> broad(p.broad, p.broad_f32, row0, tokens, p.width, column);
    Feed<ranks / 8> narrow(p.narrow, p.narrow_f32, row0, tokens, p.rank, rank0);
    const auto fill = [&](int s) {
        if (s < count) {
            bf16 *const stage = ring + s % stages * (step * row);
            broad.fill(stage);
            narrow.fill(stage + columns);
        }
        commit_copies();
    };
    for (int s = 0; s < stages - 1; ++s)
        fill(s);
    // Rows of the products are 16 columns of broad; two chains of sums, of every other 16 tokens.
    float c[2][2][4] = {};
    for (int s = 0; s < count; ++s) {
        wait_for_copies<stages - 2>();
        __syncthreads(); // stage s is there, and s - 1 has been read by all
        fill(s + stages - 1);
        const bf16 *const stage = ring + s % stages * (step * row);
#pragma unroll
        for (int t = 0; t < step; t += 16) {
            uint32_t a[4], b[4];
            load_matrices_transposed(a, stage + (t + lane % 8 + lane / 16 * 8) * row + 16 * warp +
                                            lane / 8 % 2 * 8);
            load_matrices_transposed(b, stage + (t + lane % 16) * row + columns + lane / 16 * 8);
            mma_bf16(c[t / 16 % 2][0], a, b[0], b[1]);
            mma_bf16(c[t / 16 % 2][1], a, b[2], b[3]);
        }
    }

    float *const to = p.to + int64_t(blockIdx.z) * p.width * p.rank;
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const int x = column + 16 * warp + lane / 4 + 8 * half,
                      r = rank0 + 8 * j + lane % 4 * 2;
            if (x >= p.width || r >= p.rank)
                continue;
            const Pack<float, 2> sum = {c[0][j][2 * half] + c[1][j][2 * half],
                                        c[0][j][2 * half + 1] + c[1][j][2 * half + 1]};
            if (p.broad_first) {
                store<2>(to + int64_t(x) * p.rank + r, sum);
            } else {
                to[int64_t(r) * p.width + x] = sum.v[0];
                to[int64_t(r + 1) * p.width + x] = sum.v[1];
            }
        }
}

} // namespace

int32_t plan_matmul_tn_group(const Call &call) {
    const size_t count = call.op->n_in / 2;
    const int64_t streams = call.dim(0, 0), tokens = call.dim(0, 1);
    struct Part {
        Pairs pairs{};
        int blocks = 0, rank_blocks = 0;
    };
    std::vector<Part> parts;
    for (size_t i = 0; i < count; ++i) {
        const size_t a = 2 * i, b = a + 1, c = call.out(i);
        if (call.dim(a, 0) != streams || call.dim(a, 1) != tokens || tokens >= (1 << 24) ||
            call.type(c) != PONDER_DTYPE_F32)
            return PONDER_PLAN_NONE;
        const bool first = call.dim(a, 2) >= call.dim(b, 2); // a is the broad one
        const size_t broad = first ? a : b, narrow = first ? b : a;
        const int64_t width = call.dim(broad, 2), rank = call.dim(narrow, 2);
        if (width % 8 || rank % 2 || rank > 64 || width > (1 << 24))
            return PONDER_PLAN_NONE;
        if (parts.empty() || parts.back().pairs.count == most_pairs)
            parts.emplace_back();
        Part &part = parts.back();
        Pairs &pairs = part.pairs;
        pairs.tokens = int(tokens);
        pairs.first_block[pairs.count] = part.blocks;
        pairs.pair[pairs.count++] = {nullptr,
                                     nullptr,
                                     nullptr,
                                     int(width),
                                     int(rank),
                                     call.type(broad) == PONDER_DTYPE_F32,
                                     call.type(narrow) == PONDER_DTYPE_F32,
                                     first};
        part.blocks += int((width + columns - 1) / columns);
        part.rank_blocks = std::max(part.rank_blocks, int((rank + ranks - 1) / ranks));
    }
    return call.is(0, [=](const Run &run) {
        size_t at = 0;
        for (const Part &part : parts) {
            Pairs pairs = part.pairs;
            for (int i = 0; i < pairs.count; ++i, ++at) {
                Pair &p = pairs.pair[i];
                p.broad = run.at(2 * at + (p.broad_first ? 0 : 1));
                p.narrow = run.at(2 * at + (p.broad_first ? 1 : 0));
                p.to = run.at<float>(2 * count + at);
            }
            launch(run, group_kernel,
                   dim3(unsigned(part.blocks), unsigned(part.rank_blocks), unsigned(streams)),
                   threads, ring_size, pairs);
        }
    });
}

} // namespace ponder::cuda
