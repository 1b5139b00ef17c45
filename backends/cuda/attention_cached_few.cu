// attention_cached for few new tokens. Reading the caches is nearly all of it, so they are read
// once, in words of 16 bytes with many on their way, and are cut into parts for enough blocks to
// keep the device busy (Dao et al. 2023, "Flash-Decoding for long-context inference"). The last
// block of a head adds up the parts in their order. How many parts a stream has reached is known at
// run time only: a recorded pass launches all blocks, and those behind its length leave at once.
#include "attention_cached.hpp"
#include "launch.cuh"
#include "warp.cuh"

#include <algorithm>
#include <type_traits>

namespace ponder::cuda {

namespace {

constexpr int warps = 4, threads = 32 * warps, ahead = 4;
constexpr float log2_e = 1.4426950408889634f;

template <class T> constexpr int word = 16 / int(sizeof(T)); // elements

// LANES lanes share a row, so a warp reads 32 / LANES of them at a time.
template <int LANES> constexpr int rows_at_once = warps *(32 / LANES) * ahead;

struct Few {
    const void *qkv;
    const int32_t *first;
    void *k, *v, *o;
    float *found;      // [pairs, parts, D + 2]: sums of a part, its largest product, their weight
    unsigned *tickets; // [pairs]
    int64_t places, span;
    int tokens, heads, d, parts;
    float factor; // products are taken to the power of 2
};

// A softmax so far, of a lane's columns: sum_j 2^(x_j - top) v_j and the same without v_j.
template <int N> struct Sums {
    float out[N] = {}, top = -INFINITY, sum = 0;
    __device__ void add(const Sums &other) {
        const float high = fmaxf(top, other.top), base = high == -INFINITY ? 0.0f : high;
        const float a = exp2f(top - base), b = exp2f(other.top - base);
        for (int i = 0; i < N; ++i)
            out[i] = out[i] * a + other.out[i] * b;
        sum = sum * a + other.sum * b;
        top = high;
    }
};

// A block takes one part of one head's rows, for one token.
template <class T, int LANES> __global__ __launch_bounds__(threads) void few_kernel(Few p) {
    constexpr int N = word<T>, rows = 32 / LANES;
    extern __shared__ float cell[]; // [warps, D + 2]
    __shared__ bool last_block;
    const int part = int(blockIdx.x) % p.parts, t = int(blockIdx.x) / p.parts, h = blockIdx.y;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, d = p.d;
    const int column = lane % LANES * N;
    const bool mine = column < d;
    const int64_t s = blockIdx.z, width = int64_t(p.heads) * d, stride = 3 * width;
    wait_for_earlier();
    const int64_t first = p.first[s], seen = min(first + t + 1, p.places);
    const int64_t begin = part * p.span, end = min(begin + p.span, seen);
    if (begin >= seen)
        return;
    const T *const q = static_cast<const T *>(p.qkv) + s * p.tokens * stride + int64_t(h) * d,
                   *const k_new = q + width, *const v_new = k_new + width;
    T *const k_all = static_cast<T *>(p.k) + (s * p.heads + h) * p.places * d,
             *const v_all = static_cast<T *>(p.v) + (s * p.heads + h) * p.places * d;
    using Word = Pack<T, N>;
    const Word word_q = mine ? load<N>(q + t * stride + column) : Word{};
    Sums<N> sums;
    for (int64_t at = begin; at < end; at += rows_at_once<LANES>) {
        Word k[ahead], v[ahead];
#pragma unroll
        for (int i = 0; i < ahead; ++i) {
            const int64_t j = at + (i * warps + warp) * rows + lane / LANES;
            if (mine && j < end) {
                // Rows of this call come from where other blocks take them, too.
                k[i] = load<N>(j < first ? k_all + j * d + column
                                         : k_new + (j - first) * stride + column);
                v[i] = load<N>(j < first ? v_all + j * d + column
                                         : v_new + (j - first) * stride + column);
                if (j == first + t) {
                    store<N>(k_all + j * d + column, k[i]);
                    store<N>(v_all + j * d + column, v[i]);
                }
            } else {
                k[i] = v[i] = Word{};
            }
        }
        float x[ahead], high = sums.top;
#pragma unroll
        for (int i = 0; i < ahead; ++i) {
            x[i] = 0;
#pragma unroll
            for (int c = 0; c < N; ++c)
                x[i] += word_q[c] * k[i][c];
#pragma unroll
            for (int step = LANES / 2; step > 0; step /= 2)
                x[i] += __shfl_xor_sync(~0u, x[i], step);
            const int64_t j = at + (i * warps + warp) * rows + lane / LANES;
            x[i] = j < end ? x[i] * p.factor : -INFINITY;
            high = fmaxf(high, x[i]);
        }
        const float base = high == -INFINITY ? 0.0f : high, shrink = exp2f(sums.top - base);
        sums.top = high;
        sums.sum *= shrink;
#pragma unroll
        for (int c = 0; c < N; ++c)
            sums.out[c] *= shrink;
#pragma unroll
        for (int i = 0; i < ahead; ++i) {
            const float e = exp2f(x[i] - base);
            sums.sum += e;
#pragma unroll
            for (int c = 0; c < N; ++c)
                sums.out[c] += e * v[i][c];
        }
    }
#pragma unroll
    for (int step = LANES; step < 32; step *= 2) {
        Sums<N> other;
#pragma unroll
        for (int c = 0; c < N; ++c)
            other.out[c] = __shfl_xor_sync(~0u, sums.out[c], step);
        other.top = __shfl_xor_sync(~0u, sums.top, step);
        other.sum = __shfl_xor_sync(~0u, sums.sum, step);
        sums.add(other);
    }
    const int size = d + 2;
    if (lane < LANES && mine)
#pragma unroll
        for (int c = 0; c < N; ++c)
            cell[warp * size + column + c] = sums.out[c];
    if (lane == 0) {
        cell[warp * size + d] = sums.top;
        cell[warp * size + d + 1] = sums.sum;
    }
    __syncthreads();

    // What a column has in each of n places, added up in their order.
    const auto all = [&](const float *from, int n, int c) {
        Sums<1> total;
#pragma unroll 8
        for (int i = 0; i < n; ++i) {
            Sums<1> one;
            one.out[0] = from[i * size + c], one.top = from[i * size + d];
            one.sum = from[i * size + d + 1];
            total.add(one);
        }
        return total;
    };
    T *const o = static_cast<T *>(p.o) + (s * p.tokens + t) * width + int64_t(h) * d;
    const int64_t parts = (seen + p.span - 1) / p.span;
    if (parts == 1) {
        for (int c = threadIdx.x; c < d; c += threads) {
            const Sums<1> total = all(cell, warps, c);
            o[c] = from_float<T>(total.out[0] / total.sum);
        }
        return;
    }
    const int64_t pair = (s * p.heads + h) * p.tokens + t;
    float *const found = p.found + pair * p.parts * size;
    for (int c = threadIdx.x; c < d; c += threads) {
        const Sums<1> total = all(cell, warps, c);
        found[part * size + c] = total.out[0];
        if (c == 0) {
            found[part * size + d] = total.top;
            found[part * size + d + 1] = total.sum;
        }
    }
    __syncthreads();
    if (threadIdx.x == 0)
        last_block = is_last(p.tickets + pair, unsigned(parts));
    __syncthreads();
    if (!last_block)
        return;
    for (int c = threadIdx.x; c < d; c += threads) {
        const Sums<1> total = all(found, int(parts), c);
        o[c] = from_float<T>(total.out[0] / total.sum);
    }
}

int lanes_for(const CachedShape &shape) {
    const int64_t words = shape.d * int64_t(size_of(shape.type)) / 16;
    int lanes = 1;
    while (lanes < words)
        lanes *= 2;
    return lanes;
}

} // namespace

bool FewTokens::fit(const CachedShape &shape) {
    const bool words = shape.d * int64_t(size_of(shape.type)) % 16 == 0;
    const bool few = shape.tokens <= 8 || shape.type == PONDER_DTYPE_F32; // others have tiles
    return words && few && lanes_for(shape) <= 32 && shape.tokens < (1 << 16);
}

FewTokens::FewTokens(const CachedShape &shape, const ponder_device &device) : shape_(shape) {
    const int64_t pairs = shape.streams * shape.heads * shape.tokens,
                  step = warps * (32 / lanes_for(shape)) * ahead;
    const int64_t most = pairs > ponder_device::most_tickets ? 1 : (shape.places + step - 1) / step;
    const int64_t wanted = (2 * device.processors + pairs - 1) / pairs;
    const int64_t each = (shape.places + std::min(wanted, most) - 1) / std::min(wanted, most);
    span_ = (each + step - 1) / step * step;
    parts_ = (shape.places + span_ - 1) / span_;
}

size_t FewTokens::workspace() const {
    return parts_ == 1
               ? 0
               : size_t(shape_.streams * shape_.heads * shape_.tokens * parts_ * (shape_.d + 2)) *
                     sizeof(float);
}

void FewTokens::run(const Run &run) const {
    const CachedShape &s = shape_;
    const Few p{run.at(0),
                run.at<const int32_t>(1),
                run.at(5),
                run.at(6),
                run.at(4),
                reinterpret_cast<float *>(run.workspace),
                run.device->tickets,
                s.places,
                span_,
                int(s.tokens),
                int(s.heads),
                int(s.d),
                int(parts_),
                log2_e / sqrtf(float(s.d))};
    const dim3 grid(unsigned(parts_ * s.tokens), unsigned(s.heads), unsigned(s.streams));
    by_type(s.type, [&]<class T>(T) {
        const auto with = [&]<int LANES>(std::integral_constant<int, LANES>) {
            launch(run, few_kernel<T, LANES>, grid, threads,
                   size_t(warps * (s.d + 2)) * sizeof(float), p);
        };
        switch (lanes_for(s)) {
        case 1:
            return with(std::integral_constant<int, 1>());
        case 2:
            return with(std::integral_constant<int, 2>());
        case 4:
            return with(std::integral_constant<int, 4>());
        case 8:
            return with(std::integral_constant<int, 8>());
        case 16:
            return with(std::integral_constant<int, 16>());
        default:
            return with(std::integral_constant<int, 32>());
        }
    });
}

} // namespace ponder::cuda
