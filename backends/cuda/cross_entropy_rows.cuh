// What a head does for each row, before and behind the product with its table
// (cross_entropy_sm90.cu): the logit c that sums start from, and the sum of the tiles' sums.
#pragma once

#include "cross_entropy.hpp"
#include "launch.cuh"
#include "warp.cuh"

namespace ponder::cuda {

// In place of a logit behind the vocabulary: finite, since it is multiplied with e to it, 0.
constexpr float nothing = -1e30f;
// Of sums, about e^58: what is multiplied with them, or with their inverse, stays in range.
constexpr float limit = 1e25f;

// The logit that the sums of a row start from; for a row without a target that of the first word. A
// warp for each row.
__global__ void reference_kernel(const bf16 *h, const bf16 *table, const int32_t *target,
                                 float *reference, int tokens, int width) {
    const int64_t r = int64_t(blockIdx.x) * 8 + threadIdx.x / 32;
    if (r >= tokens)
        return;
    wait_for_earlier();
    let_next_start();
    const int word = max(target[r], 0);
    h += r * width;
    table += int64_t(word) * width;
    float sum = 0;
    for (int k = threadIdx.x % 32 * 8; k < width; k += 1024) {
        Pack<bf16, 8> a[4], b[4]; // 1024 columns of a warp, all on their way at once
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (k + 256 * i < width)
                a[i] = load<8>(h + k + 256 * i);
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (k + 256 * i < width)
                b[i] = load<8>(table + k + 256 * i);
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (k + 256 * i < width)
#pragma unroll
                for (int j = 0; j < 8; ++j)
                    sum = fmaf(a[i][j], b[i][j], sum);
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0)
        reference[r] = sum;
}

// What finish_kernel takes to compute rows anew, and writes. e and share are missing together.
struct Head {
    const bf16 *h, *table;
    const int32_t *target;
    float *nll, *entropy, *share;
    bf16 *e;
    int tokens, width, vocabulary, stride;

    // With sums that start from a logit which the target's is that far above.
    __device__ void write(int64_t row, int hit, float sum, float weighted, float above) const {
        const float log_sum = logf(sum);
        entropy[row] = log_sum - weighted / sum;
        nll[row] = hit < 0 || log_sum < above ? 0.0f : log_sum - above;
        if (!e)
            return;
        share[row] = 1 / sum;
        if (hit >= 0)
            e[row * stride + hit] = from_float<bf16>(expf(above) - sum);
    }
};

// f(i, word, logit) for the rows 2 (lane % 4) + i of eight, i = 0 and 1, and every word up to the
// stride, each in one of eight warps; what is behind the vocabulary has some logit. A lane takes
// eight columns in a row from each operand of two products, in an order that is the same in both.
template <class F> __device__ void each_logit(const Head &s, int64_t first, F f) {
    const int lane = threadIdx.x % 32, group = lane / 4, place = lane % 4 * 8;
    const bf16 *const h = s.h + min(first + group, int64_t(s.tokens) - 1) * s.width;
    for (int word = threadIdx.x / 32 * 16; word < s.stride; word += 8 * 16) {
        const bf16 *const low = s.table + int64_t(min(word + group, s.vocabulary - 1)) * s.width,
                          *const high =
                              s.table + int64_t(min(word + group + 8, s.vocabulary - 1)) * s.width;
        float c[4] = {};
#pragma unroll 4
        for (int k = 0; k < s.width; k += 32) {
            uint4 x = {}, y = {}, z = {};
            if (k + place < s.width) {
                x = *reinterpret_cast<const uint4 *>(low + k + place);
                y = *reinterpret_cast<const uint4 *>(high + k + place);
                z = *reinterpret_cast<const uint4 *>(h + k + place);
            }
            mma_bf16(c, {x.x, y.x, x.y, y.y}, z.x, z.y);
            mma_bf16(c, {x.z, y.z, x.w, y.w}, z.z, z.w);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i)
            f(i % 2, word + group + i / 2 * 8, c[i]);
    }
}

// combine of what all lanes have of a row, in each lane for its two rows of eight
template <class F> __device__ void combine_rows(float (&x)[2], float (*cell)[8], F combine) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        for (int step = 4; step < 32; step *= 2)
            x[i] = combine(x[i], __shfl_xor_sync(~0u, x[i], step));
        if (lane < 4)
            cell[warp][2 * lane + i] = x[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        x[i] = cell[0][2 * (lane % 4) + i];
        for (int w = 1; w < 8; ++w)
            x[i] = combine(x[i], cell[w][2 * (lane % 4) + i]);
    }
    __syncthreads();
}

// Rows of eight from `first` on, those of the bits of `lost`: their logits once more for the
// largest of each row, and again for sums that start from it. By a block of eight warps.
__device__ __noinline__ void rescue(const Head &s, const float *reference, int64_t first,
                                    unsigned lost) {
    __shared__ float cell[8][8];
    const int mine = threadIdx.x % 4 * 2; // of eight rows
    float top[2] = {-INFINITY, -INFINITY}, sum[2] = {}, weighted[2] = {};
    each_logit(s, first, [&](int i, int word, float l) {
        if (word < s.vocabulary)
            top[i] = fmaxf(top[i], l);
    });
    combine_rows(top, cell, [](float a, float b) { return fmaxf(a, b); });
    each_logit(s, first, [&](int i, int word, float l) {
        const float d = word < s.vocabulary ? l - top[i] : nothing, x = expf(d);
        sum[i] += x;
        weighted[i] += d * x;
        if (s.e && lost >> (mine + i) & 1)
            s.e[(first + mine + i) * s.stride + word] = from_float<bf16>(x);
    });
    const auto add = [](float a, float b) { return a + b; };
    combine_rows(sum, cell, add);
    combine_rows(weighted, cell, add);
    if (threadIdx.x < 4)
#pragma unroll
        for (int i = 0; i < 2; ++i)
            if (lost >> (mine + i) & 1)
                s.write(first + mine + i, s.target[first + mine + i], sum[i], weighted[i],
                        reference[first + mine + i] - top[i]);
}

// A warp for each row, eight in a block.
__global__ __launch_bounds__(256, 6) void finish_kernel(const float2 *part, const float *reference,
                                                        const __grid_constant__ Head s, int tiles) {
    __shared__ unsigned lost;
    const int64_t first = int64_t(blockIdx.x) * 8, r = first + threadIdx.x / 32;
    if (threadIdx.x == 0)
        lost = 0;
    const int hit = r < s.tokens ? s.target[r] : -1; // the first of three kernels has read it, too
    __syncthreads();
    wait_for_earlier();
    if (r < s.tokens) {
        float sum = 0, weighted = 0;
#pragma unroll 8
        for (int64_t i = threadIdx.x % 32; i < tiles; i += 32) {
            const float2 p = part[r * tiles + i];
            sum += p.x;
            weighted += p.y;
        }
        sum = warp_sum(sum);
        weighted = warp_sum(weighted);
        if (threadIdx.x % 32 == 0) {
            if (sum > limit)
                atomicOr(&lost, 1u << threadIdx.x / 32);
            else
                s.write(r, hit, sum, weighted, 0);
        }
    }
    __syncthreads();
    if (lost)
        rescue(s, reference, first, lost);
}

} // namespace ponder::cuda
