// matmul_tn_group: c = a^T b for many pairs in one launch, where one of a and b is narrow:
// gradients of low-rank factors. A block has 64 columns of the broad one, whole lines of memory in
// bf16, and 16 of the narrow one; its warps share the tokens, and their sums meet in shared memory
// in a fixed order.
#include "fragments.cuh"
#include "launch.cuh"
#include "ops.hpp"

#include <array>
#include <vector>

namespace ponder::cuda {

namespace {

constexpr int warps = 8, threads = 32 * warps, columns = 64, ranks = 16;
constexpr int each = columns / 8; // of a lane
constexpr int most_pairs = 40; // of a launch: what fits into its parameters

struct Pair {
    const void *broad, *narrow;
    float *to;
    int width, rank;  // of broad and of narrow
    int first_block;  // of the pairs' blocks in a row
    int8_t broad_f32, narrow_f32;
    int8_t broad_first; // c is [width, rank], else [rank, width]
};
struct Pairs {
    Pair pair[most_pairs];
    int count, tokens;
};

// N neighbours of a row of `width`, from `at` on, as pairs of bf16; what lies behind the row is 0.
// width and at are multiples of N.
template <int N>
__device__ inline void read(uint32_t (&to)[N / 2], const void *from, int64_t row, int at, int width,
                            bool f32, bool there) {
    const int64_t place = row * width + at;
    if (!there || at >= width) {
#pragma unroll
        for (int i = 0; i < N / 2; ++i)
            to[i] = 0;
    } else if (f32) {
        const Pack<float, N> x = load<N>(static_cast<const float *>(from) + place);
#pragma unroll
        for (int i = 0; i < N / 2; ++i)
            to[i] = pack_bf16(x.v[2 * i], x.v[2 * i + 1]);
    } else {
        const Pack<uint32_t, N / 2> x =
            *reinterpret_cast<const Pack<uint32_t, N / 2> *>(static_cast<const bf16 *>(from) + place);
#pragma unroll
        for (int i = 0; i < N / 2; ++i)
            to[i] = x.v[i];
    }
}

__device__ inline uint32_t low_halves(uint32_t a, uint32_t b) { return (a & 0xffff) | b << 16; }
__device__ inline uint32_t high_halves(uint32_t a, uint32_t b) {
    return a >> 16 | (b & 0xffff0000);
}

__global__ __launch_bounds__(threads, 2) void group_kernel(const Pairs pairs) {
    __shared__ float cell[warps][columns][ranks + 1];
    int which = 0; // the last pair that begins at this block or before
    for (int step = 32; step > 0; step /= 2)
        if (which + step < pairs.count &&
            pairs.pair[which + step].first_block <= int(blockIdx.x))
            which += step;
    const Pair p = pairs.pair[which];
    const int tokens = pairs.tokens, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int g = lane / 4, q = lane % 4;
    const int column = (int(blockIdx.x) - p.first_block) * columns, rank0 = int(blockIdx.y) * ranks;
    const int64_t row0 = int64_t(blockIdx.z) * tokens;
    if (rank0 >= p.rank)
        return;
    wait_for_earlier();
    // Rows g and g + 8 of operand i are columns 8g + 2i and + 1; column g of operand j is 2g + j.
    float c[each / 2][2][4] = {};
#pragma unroll 4
    for (int t = warp * 16; t < tokens; t += warps * 16) {
        uint32_t z[4][each / 2], s[4][1];
#pragma unroll
        for (int k = 0; k < 4; ++k) { // tokens 4q .. 4q+3 stand at this lane's four places
            const int token = t + 4 * q + k;
            read<each>(z[k], p.broad, row0 + token, column + each * g, p.width, p.broad_f32,
                       token < tokens);
            read<2>(s[k], p.narrow, row0 + token, rank0 + 2 * g, p.rank, p.narrow_f32,
                    token < tokens);
        }
#pragma unroll
        for (int i = 0; i < each / 2; ++i) {
            const uint32_t a[4] = {
                low_halves(z[0][i], z[1][i]), high_halves(z[0][i], z[1][i]),
                low_halves(z[2][i], z[3][i]), high_halves(z[2][i], z[3][i])};
            mma_bf16(c[i][0], a, low_halves(s[0][0], s[1][0]), low_halves(s[2][0], s[3][0]));
            mma_bf16(c[i][1], a, high_halves(s[0][0], s[1][0]), high_halves(s[2][0], s[3][0]));
        }
    }
#pragma unroll
    for (int i = 0; i < each / 2; ++i)
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                cell[warp][each * g + 2 * i + e / 2][2 * (2 * q + e % 2) + j] = c[i][j][e];
    __syncthreads();
    float *const to = p.to + int64_t(blockIdx.z) * p.width * p.rank;
    for (int i = threadIdx.x; i < columns * ranks; i += threads) {
        // Neighbouring threads write neighbouring elements.
        const int x = p.broad_first ? i / ranks : i % columns,
                  r = p.broad_first ? i % ranks : i / columns;
        if (column + x >= p.width || rank0 + r >= p.rank)
            continue;
        float sum = 0;
        for (int w = 0; w < warps; ++w)
            sum += cell[w][x][r];
        to[p.broad_first ? int64_t(column + x) * p.rank + rank0 + r
                         : int64_t(rank0 + r) * p.width + column + x] = sum;
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
        if (width % each || rank % 2 || rank > 64 || width > (1 << 24))
            return PONDER_PLAN_NONE;
        if (parts.empty() || parts.back().pairs.count == most_pairs)
            parts.emplace_back();
        Part &part = parts.back();
        part.pairs.tokens = int(tokens);
        part.pairs.pair[part.pairs.count++] = {nullptr,
                                               nullptr,
                                               nullptr,
                                               int(width),
                                               int(rank),
                                               part.blocks,
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
                   threads, 0, pairs);
        }
    });
}

} // namespace ponder::cuda
