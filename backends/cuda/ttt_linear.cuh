// What the scan of TTT-Linear and its reverse share. One block has one head of one stream, but for
// heads that a cluster of blocks shares (ttt_linear_wide.cuh).
//
// Notation, for one mini-batch of n tokens (ops.hpp: form, scale, token_i, lr_j):
//   eta[i,j] = a_i c_j: official a_i = scale token_i, c_j = lr_j; PonderTTT a_i = 1,
//   c_j = scale token_j lr_j. f is a_{n-1}, or 1 where that is 0 (then nothing is learned).
//   G_j = clipped gradient of the reconstruction loss in z_j = k_j W + b
//   P_j = -f c_j G_j, so that W' = W + sum_j k_j^T P_j and u_i = q_i W + b + sum_j A_ij P_j
//   with A_ij = a_i / f (q_i k_j + 1) for j <= i + causal_k.
//
// W is held without its mean over the outputs (likewise b): the layer norm that follows takes means
// out, and gradients through it have none, so the means never change. They are kept aside and added
// to the final state; the norm needs no mean. Each warp has 16 outputs, as the transpose [16, D+1]
// in the registers of matrix results: column D is b. That form is at once the factor for k W.
#pragma once

#include "ttt_scan.hpp"
#include "ttt_tile.cuh"

namespace ponder::cuda {

struct LinearParams {
    int tokens, heads, streams, batches;
    bool by_key, rate_bf16;
    float scale, decay, eps, max_norm;
    int causal_k;
    const void *q, *k, *v, *lr;
    const float *index, *g, *b, *w1, *b1;
    // forward
    void *y;
    float *w_out, *b_out, *loss, *loss_part; // loss_part: [S,H,3]
    unsigned *tickets;
    // trace: P [S,H,T,D] and states [S,H,n,(D/8+1),2D,4], before every trace_every-th mini-batch
    // and after the last
    void *trace_p;
    float *trace_w;
    // reverse
    const void *dy;
    const float *dw_next, *db_next, *dloss;
    void *dq, *dk, *dv, *dlr;
    float *dw, *db1;
    float *part;      // [S,H,2 D + M]: gradients of g, b and the token rates
    float *last_rows; // [S,H,batches,2,D]: dk, dv of last tokens without the initial loss's part
};

constexpr int trace_every = 16;

__host__ __device__ inline int64_t trace_states(int64_t batches) {
    return (batches + trace_every - 1) / trace_every + 1;
}

// `split`: blocks that share a head, each having `own` of its outputs.
template <class E_, int D_, int M_, int split_ = 1> struct Linear {
    using E = E_;
    static constexpr int D = D_, M = M_, split = split_, own = D / split;
    static constexpr int ld = D + 8, warps = own / 16, threads = 32 * warps;
    static constexpr int mt = M / 16, kt = D / 16; // tiles of 16 tokens, of 16 dims
    static constexpr int tile = M * ld;            // elements
    static constexpr int tile_bytes = tile * int(sizeof(E));
    static constexpr int state_threads = threads * split;
    static constexpr int64_t state_size = int64_t(2 * kt + 1) * state_threads * 4;
    using State = float[2 * kt + 1][4];
    using Rows = float[mt][2][4]; // of M tokens and a warp's 16 dims
};

// Where this thread stands; `first`: the block's first dim.
struct Place {
    int thread, warp, lane, g, t, col; // col: the warp's first dim
    __device__ explicit Place(int first = 0)
        : thread(int(threadIdx.x)), warp(thread >> 5), lane(thread & 31), g(lane >> 2), t(lane & 3),
          col(first + 16 * warp) {}
};

// Rates of the tokens. `shared` has 3 M + 4 floats; a barrier has to follow.
template <int M> struct Rates {
    float *shared;
    __device__ float &a(bool is_short, int i) const { return shared[is_short * M + i]; } // a_i / f
    __device__ float &c(int j) const { return shared[2 * M + j]; } // c_j / lr_j
    __device__ float &f(bool is_short) const { return shared[3 * M + is_short]; }
    __device__ float &learns(bool is_short) const { return shared[3 * M + 2 + is_short]; }

    __device__ static float token(const LinearParams &p, int i) {
        return fmaxf(0.0f, 1.0f / float(i + 1) + p.index[i]) * expf(p.decay * float(i - (M - 1)));
    }
    // n: tokens of the last mini-batch
    __device__ void fill(const LinearParams &p, int thread, int n) const {
        if (thread < M) {
            const float rate = p.scale * token(p, thread);
#pragma unroll
            for (int s = 0; s < 2; ++s) {
                const float last = p.by_key ? 1.0f : p.scale * token(p, s ? n - 1 : M - 1);
                const float by = last != 0 ? last : 1.0f;
                a(s, thread) = p.by_key ? 1.0f : rate / by;
                f(s) = by;
                learns(s) = last != 0 ? 1.0f : 0.0f;
            }
            c(thread) = p.by_key ? rate : 1.0f;
        }
    }
};

__device__ __forceinline__ float rate_at(const LinearParams &p, int64_t i) {
    return p.rate_bf16 ? to_float(static_cast<const Bf16 *>(p.lr)[i])
                       : static_cast<const float *>(p.lr)[i];
}

// Of a lane's pairs of one row, at columns 2 t and 8 + 2 t: four neighbours, from `quad_column` on,
// so that a warp's stores to memory fill what it writes at a time.
__device__ __forceinline__ uint2 quad_of(uint32_t x, uint32_t y, const Place &at) {
    const bool odd = at.t & 1;
    const uint32_t other = bits_of_float(from_lane_xor(float_of_bits(odd ? x : y), 1));
    return odd ? uint2{other, y} : uint2{x, other};
}
__device__ __forceinline__ int quad_column(const Place &at) {
    return 2 * at.t + (at.t & 1 ? 6 : 0);
}

// Rows [first, first + M) of one head into a tile; zeros from `tokens` on.
template <class L>
__device__ __forceinline__ void fetch(typename L::E *tile, const void *from, int64_t offset,
                                      int stride, int first, int tokens, int thread) {
    using E = typename L::E;
    constexpr int per = 16 / int(sizeof(E)), chunks = L::D / per;
    const E *rows = static_cast<const E *>(from) + offset;
#pragma unroll
    for (int i = 0; i < (L::M * chunks + L::threads - 1) / L::threads; ++i) {
        const int at = i * L::threads + thread;
        if ((L::M * chunks) % L::threads != 0 && at >= L::M * chunks)
            break;
        const int row = at / chunks, c = at % chunks * per;
        const bool valid = first + row < tokens;
        copy_async(tile + row * L::ld + c, rows + (valid ? int64_t(first + row) * stride : 0) + c,
                   valid);
    }
}

// The state's bias at this thread's dims of a result.
template <class L>
__device__ __forceinline__ void bias_of(float (&bias)[2][2], const typename L::State &w, int t) {
#pragma unroll
    for (int nt = 0; nt < 2; ++nt)
#pragma unroll
        for (int e = 0; e < 2; ++e)
            bias[nt][e] = from_lane(w[2 * L::kt][2 * nt], 4 * (2 * t + e));
}

// z = x W + b for the rows of one tile or two.
template <class L, int count>
__device__ __forceinline__ void products(typename L::Rows *const (&z)[count],
                                         const typename L::E *const (&x)[count],
                                         const typename L::State &w, const Place &at) {
    using E = typename L::E;
    constexpr int halves = L::mt == 1 ? 2 : 1; // two sums, so that fewer products wait in a row
    float bias[2][2], sum[count][halves][L::mt][2][4];
    bias_of<L>(bias, w, at.t);
#pragma unroll
    for (int i = 0; i < count; ++i)
#pragma unroll
        for (int m = 0; m < L::mt; ++m)
#pragma unroll
            for (int nt = 0; nt < 2; ++nt)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    sum[i][0][m][nt][e] = bias[nt][e & 1];
                    sum[i][halves - 1][m][nt][e] = halves == 2 ? 0 : bias[nt][e & 1];
                }
#pragma unroll
    for (int k = 0; k < L::kt; ++k) {
        FragB<E> b[2];
#pragma unroll
        for (int nt = 0; nt < 2; ++nt)
            b_of_transposed(b[nt], w[2 * k], w[2 * k + 1], nt);
#pragma unroll
        for (int i = 0; i < count; ++i)
#pragma unroll
            for (int m = 0; m < L::mt; ++m) {
                FragA<E> a;
                load_a(a, x[i] + 16 * m * L::ld + 16 * k, L::ld, at.lane);
#pragma unroll
                for (int nt = 0; nt < 2; ++nt)
                    mma(sum[i][k % halves][m][nt], a, b[nt]);
            }
    }
#pragma unroll
    for (int i = 0; i < count; ++i)
#pragma unroll
        for (int m = 0; m < L::mt; ++m)
#pragma unroll
            for (int nt = 0; nt < 2; ++nt)
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    (*z[i])[m][nt][e] = halves == 2
                                            ? sum[i][0][m][nt][e] + sum[i][halves - 1][m][nt][e]
                                            : sum[i][0][m][nt][e];
}

// W += x^T p, b += sum p for 16 tokens, p being a factor of this warp's outputs. The matrix unit
// cuts sums off where it should round them; over a long stream f32 would notice, so there the step
// is added apart.
template <class L>
__device__ __forceinline__ void add_outer(typename L::State &w, const typename L::E *x,
                                          const FragA<typename L::E> &p, const Place &at) {
    using E = typename L::E;
    constexpr bool apart = sizeof(E) == 4;
    FragB<E> ones;
    b_of_ones(ones, at.lane);
    const auto add = [&](float(&to)[4], const FragB<E> &b) {
        if constexpr (apart) {
            float c[4] = {};
            mma(c, p, b);
#pragma unroll
            for (int e = 0; e < 4; ++e)
                to[e] += c[e];
        } else
            mma(to, p, b);
    };
#pragma unroll
    for (int k = 0; k < L::kt; ++k) {
        FragB<E> b[2];
        load_b_transposed(b, x + 16 * k, L::ld, at.lane);
        add(w[2 * k], b[0]);
        add(w[2 * k + 1], b[1]);
    }
    add(w[2 * L::kt], ones);
}
// The same, or -=, for all tokens of tiles x and p.
template <class L, bool minus = false>
__device__ __forceinline__ void add_outer(typename L::State &w, const typename L::E *x,
                                          const typename L::E *p, const Place &at) {
#pragma unroll
    for (int m = 0; m < L::mt; ++m) {
        FragA<typename L::E> a;
        load_a_transposed(a, p + 16 * m * L::ld + at.col, L::ld, at.lane);
        if (minus)
            negate(a);
        add_outer<L>(w, x + 16 * m * L::ld, a, at);
    }
}

// c[16,16] += x y^T for 16 rows of two tiles.
template <class L>
__device__ __forceinline__ void row_products(float (&c)[2][4], const typename L::E *x,
                                             const typename L::E *y, int lane) {
    using E = typename L::E;
#pragma unroll
    for (int k = 0; k < L::kt; ++k) {
        FragA<E> a;
        FragB<E> b[2];
        load_a(a, x + 16 * k, L::ld, lane);
        load_b(b, y + 16 * k, L::ld, lane);
        mma(c[0], a, b[0]);
        mma(c[1], a, b[1]);
    }
}

// Sums over dims of 8 quantities a token. A thread has parts for tokens g and g + 8 of 16; after
// `put` by every warp and a barrier, `get` gives the thread the sums of token g + 8 (t % 2).
struct RowSums {
    // parts: [warps][16][8], a token's where neither reading nor writing meets a bank twice
    static __device__ __forceinline__ int place(int warp, int g, int upper) {
        return warp * 128 + (upper ? 64 + (8 * g ^ 16) : 8 * g);
    }
    static __device__ __forceinline__ void put(float *parts, const float (&low)[8],
                                               const float (&high)[8], const Place &at) {
        *quad_at(parts, at.warp, at) = quad(low, high, at);
    }
    // What a thread puts, and where of its warp's parts.
    static __device__ __forceinline__ float4 *quad_at(float *parts, int warp, const Place &at) {
        return reinterpret_cast<float4 *>(parts + place(warp, at.g, at.t & 1) + 4 * (at.t >> 1));
    }
    static __device__ __forceinline__ float4 quad(const float (&low)[8], const float (&high)[8],
                                                  const Place &at) {
        const bool odd = at.t & 1, upper = at.t & 2;
        float a[8], quad[4];
#pragma unroll
        for (int i = 0; i < 8; ++i)
            a[i] = (odd ? high[i] : low[i]) + from_lane_xor(odd ? low[i] : high[i], 1);
#pragma unroll
        for (int i = 0; i < 4; ++i)
            quad[i] = (upper ? a[4 + i] : a[i]) + from_lane_xor(upper ? a[i] : a[4 + i], 2);
        return {quad[0], quad[1], quad[2], quad[3]};
    }
    // The same for the first `count` quantities, rounded to 10 bits: a product with ones and zeros
    // sums over the lanes of a token in one instruction, and leaves every lane the sum.
    template <int count>
    static __device__ __forceinline__ void put_quick(float *parts, const float (&low)[8],
                                                     const float (&high)[8], const Place &at) {
        static_assert(count > 4 && count % 2 == 0);
        const bool odd = at.t & 1;
        float quad[8] = {};
#pragma unroll
        for (int i = 0; i < count; i += 2) {
            float sums[4];
            of_lanes(sums, low[i], high[i], low[i + 1], high[i + 1], at);
            quad[i] = odd ? sums[2] : sums[0];
            quad[i + 1] = odd ? sums[3] : sums[1];
        }
        if (at.t < 2) {
            float4 *to = reinterpret_cast<float4 *>(parts + place(at.warp, at.g, at.t));
            to[0] = {quad[0], quad[1], quad[2], quad[3]};
            to[1] = {quad[4], quad[5], quad[6], quad[7]};
        }
    }
    // Sums over the four lanes of a token: of a for tokens g and g + 8 into 0 and 2, of b into
    // 1, 3.
    static __device__ __forceinline__ void of_lanes(float (&sums)[4], float a_low, float a_high,
                                                    float b_low, float b_high, const Place &at) {
        const uint32_t x[4] = {bits_of_float(a_low), bits_of_float(a_high), bits_of_float(b_low),
                               bits_of_float(b_high)};
        const uint32_t one = bits_of_float(1.0f),
                       with[2] = {at.g & 1 ? 0u : one, at.g & 1 ? one : 0u};
#pragma unroll
        for (int e = 0; e < 4; ++e)
            sums[e] = 0;
        mma_tf32(sums, x, with);
    }
    static __device__ __forceinline__ void get(float (&sum)[8], const float *parts, int warps,
                                               const Place &at) {
        const bool upper = at.t & 2;
        const float *from = parts + place(0, at.g, at.t & 1) + 4 * (at.t >> 1);
        float quad[4] = {0, 0, 0, 0};
#pragma unroll
        for (int w = 0; w < warps; ++w) {
            const float4 x = *reinterpret_cast<const float4 *>(from + w * 128);
            quad[0] += x.x;
            quad[1] += x.y;
            quad[2] += x.z;
            quad[3] += x.w;
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float other = from_lane_xor(quad[i], 2);
            sum[i] = upper ? other : quad[i];
            sum[4 + i] = upper ? quad[i] : other;
        }
    }
    // Of a value known for token g + 8 (t % 2): those of tokens g and g + 8.
    static __device__ __forceinline__ void spread(float (&to)[2], float x, const Place &at) {
        const float other = from_lane_xor(x, 1);
        to[0] = at.t & 1 ? other : x;
        to[1] = at.t & 1 ? x : other;
    }
};

// The norm's factors at this thread's dims of a result.
struct HeadNorm {
    float g[2][2], b[2][2];
    __device__ __forceinline__ void load(const LinearParams &p, int at) {
#pragma unroll
        for (int nt = 0; nt < 2; ++nt)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                g[nt][e] = p.g[at + 8 * nt + e];
                b[nt][e] = p.b[at + 8 * nt + e];
            }
    }
};

// target - b = v - k - b at this thread's dims of 16 tokens
template <class L>
__device__ __forceinline__ void goals(float (&goal)[2][4], const typename L::E *k,
                                      const typename L::E *v, const HeadNorm &norm,
                                      const Place &at) {
#pragma unroll
    for (int nt = 0; nt < 2; ++nt)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int from = (at.g + 8 * half) * L::ld + at.col + 8 * nt + 2 * at.t;
            const float2 vv = floats(pair_at(v + from)), kk = floats(pair_at(k + from));
            goal[nt][2 * half] = vv.x - kk.x - norm.b[nt][0];
            goal[nt][2 * half + 1] = vv.y - kk.y - norm.b[nt][1];
        }
}

// Five sums that give the norm of z and the gradient of its reconstruction loss: of z^2, g^2 z,
// g^2 z^2, g goal z and g goal.
__device__ __forceinline__ void add_loss_sums(float (&s)[8], float z, float g, float goal) {
    const float gz = g * z;
    s[0] += z * z;
    s[1] += g * gz;
    s[2] += gz * gz;
    s[3] += goal * gz;
    s[4] += goal * g;
}
// r = 1 / std; means of u and u h, u = g (g h - goal) with h = r z
struct LossStats {
    float r, mean_u, mean_uh;
    __device__ __forceinline__ LossStats(const float (&s)[8], float d, float eps) {
        r = inverse_root(s[0] / d + eps);
        mean_u = (r * s[1] - s[4]) / d;
        mean_uh = r * (r * s[2] - s[3]) / d;
    }
};
// d 0.5 |LN(z) - target|^2 / dz
__device__ __forceinline__ float loss_gradient(float z, float g, float goal, float r, float mean_u,
                                               float mean_uh) {
    const float h = r * z;
    return r * (g * (g * h - goal) - mean_u - h * mean_uh);
}

// Sum over the block's threads. `shared`: one float a warp; free again after the next barrier.
template <int warps>
__device__ __forceinline__ float block_sum(float x, float *shared, const Place &at) {
#pragma unroll
    for (int i = 16; i > 0; i /= 2)
        x += from_lane_xor(x, i);
    if (at.lane == 0)
        shared[at.warp] = x;
    sync_block();
    x = 0;
#pragma unroll
    for (int w = 0; w < warps; ++w)
        x += shared[w];
    return x;
}

// `thread` counts those of all blocks of a head.
template <class L>
__device__ __forceinline__ void store_state(float *to, const typename L::State &w, int thread) {
#pragma unroll
    for (int j = 0; j < 2 * L::kt + 1; ++j)
        *reinterpret_cast<float4 *>(to + (j * L::state_threads + thread) * 4) = {w[j][0], w[j][1],
                                                                                 w[j][2], w[j][3]};
}
template <class L>
__device__ __forceinline__ void load_state(typename L::State &w, const float *from, int thread) {
#pragma unroll
    for (int j = 0; j < 2 * L::kt + 1; ++j) {
        const float4 x =
            *reinterpret_cast<const float4 *>(from + (j * L::state_threads + thread) * 4);
        w[j][0] = x.x;
        w[j][1] = x.y;
        w[j][2] = x.z;
        w[j][3] = x.w;
    }
}

// Between memory's [D,D], [D] and the registers: each thread's elements by `visit(element, input)`,
// input D being the bias.
template <class L, class Visit>
__device__ __forceinline__ void each_element(typename L::State &w, const Place &at, Visit visit) {
#pragma unroll
    for (int j = 0; j < 2 * L::kt + 1; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int in = 8 * j + 2 * at.t + (e & 1), out = at.col + at.g + 8 * (e >> 1);
            visit(w[j][e], in, out);
        }
}
template <class L>
__device__ __forceinline__ void read_state(typename L::State &w, const float *weight,
                                           const float *bias, const Place &at) {
    each_element<L>(w, at, [&](float &x, int in, int out) {
        x = 0;
        if (in < L::D)
            x = weight ? weight[in * L::D + out] : 0.0f;
        else if (in == L::D)
            x = bias ? bias[out] : 0.0f;
    });
}

// What a block can have at most where this is compiled for; kernels that want more are empty there.
// Code for 8.0 runs on all of 8.x. The host asks the device before it launches any.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int most_shared_memory = 163 * 1024;
#else
constexpr int most_shared_memory = 227 * 1024;
#endif

// Bytes of shared memory, handed out in order.
class SharedLayout {
public:
    __host__ __device__ constexpr explicit SharedLayout(unsigned char *base = nullptr)
        : base_(base) {}
    template <class T> __host__ __device__ constexpr T *take(int count) {
        const int at = size_;
        size_ += (count * int(sizeof(T)) + 15) / 16 * 16;
        if (__builtin_is_constant_evaluated()) // only the size is wanted
            return nullptr;
        return reinterpret_cast<T *>(base_ + at);
    }
    __host__ __device__ constexpr int size() const { return size_; }

private:
    unsigned char *base_;
    int size_ = 0;
};

} // namespace ponder::cuda
