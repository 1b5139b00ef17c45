// A token on a warp: each lane has n = D / 32 of its dims, which are neighbours.
#pragma once

#include "ttt_mlp.cuh"

namespace ponder::cuda {

template <int n> struct Dims { float x[n]; };

template <int n, class F> __device__ __forceinline__ Dims<n> each_dim(F f) {
    Dims<n> r;
#pragma unroll
    for (int i = 0; i < n; ++i)
        r.x[i] = f(i);
    return r;
}
template <int n> __device__ __forceinline__ Dims<n> operator+(const Dims<n> &a, const Dims<n> &b) {
    return each_dim<n>([&](int i) { return a.x[i] + b.x[i]; });
}
template <int n> __device__ __forceinline__ Dims<n> operator-(const Dims<n> &a, const Dims<n> &b) {
    return each_dim<n>([&](int i) { return a.x[i] - b.x[i]; });
}
template <int n> __device__ __forceinline__ Dims<n> operator*(const Dims<n> &a, const Dims<n> &b) {
    return each_dim<n>([&](int i) { return a.x[i] * b.x[i]; });
}
template <int n> __device__ __forceinline__ Dims<n> operator-(const Dims<n> &a, float b) {
    return each_dim<n>([&](int i) { return a.x[i] - b; });
}
template <int n> __device__ __forceinline__ Dims<n> operator*(float a, const Dims<n> &b) {
    return each_dim<n>([&](int i) { return a * b.x[i]; });
}
template <int n> __device__ __forceinline__ void operator+=(Dims<n> &a, const Dims<n> &b) {
    a = a + b;
}
template <int n> __device__ __forceinline__ void operator-=(Dims<n> &a, const Dims<n> &b) {
    a = a - b;
}
// Over this lane's
template <int n> __device__ __forceinline__ float sum(const Dims<n> &a) {
    float r = a.x[0];
#pragma unroll
    for (int i = 1; i < n; ++i)
        r += a.x[i];
    return r;
}
template <int n> __device__ __forceinline__ float mean(const Dims<n> &a) {
    return sum_of_lanes(sum(a)) * (1.0f / (32 * n));
}

// From and to memory, in one piece
template <int n> __device__ __forceinline__ Dims<n> dims_at(const float *p) {
    if constexpr (n == 2) {
        const float2 x = *reinterpret_cast<const float2 *>(p);
        return {x.x, x.y};
    } else {
        static_assert(n == 4);
        const float4 x = *reinterpret_cast<const float4 *>(p);
        return {x.x, x.y, x.z, x.w};
    }
}
template <int n> __device__ __forceinline__ Dims<n> dims_at(const Bf16 *p) {
    if constexpr (n == 2) {
        const float2 x = floats(pair_at(p));
        return {x.x, x.y};
    } else {
        static_assert(n == 4);
        const uint2 both = *reinterpret_cast<const uint2 *>(p);
        const float2 x = floats(Pair<Bf16>{both.x}), y = floats(Pair<Bf16>{both.y});
        return {x.x, x.y, y.x, y.y};
    }
}
__device__ __forceinline__ void store_dims(float *p, const Dims<2> &a) {
    store_pair(p, a.x[0], a.x[1]);
}
__device__ __forceinline__ void store_dims(float *p, const Dims<4> &a) {
    *reinterpret_cast<float4 *>(p) = {a.x[0], a.x[1], a.x[2], a.x[3]};
}
__device__ __forceinline__ void store_dims(Bf16 *p, const Dims<2> &a) {
    store_pair(p, a.x[0], a.x[1]);
}
__device__ __forceinline__ void store_dims(Bf16 *p, const Dims<4> &a) {
    *reinterpret_cast<uint2 *>(p) = {pack_bf16(a.x[0], a.x[1]), pack_bf16(a.x[2], a.x[3])};
}

// 16 bytes of the row as elements of E, the `chunk`-th
template <class E, int n>
__device__ __forceinline__ float4 chunk_of_row(const Dims<n> &a, int chunk) {
    constexpr int words = n * int(sizeof(E)) / 4, lanes = 4 / words; // of a lane, to a chunk
    float mine[words], all[4];
#pragma unroll
    for (int i = 0; i < words; ++i)
        if constexpr (sizeof(E) == 2)
            mine[i] = float_of_bits(pack_bf16(a.x[2 * i], a.x[2 * i + 1]));
        else
            mine[i] = a.x[i];
#pragma unroll
    for (int i = 0; i < 4; ++i)
        all[i] = lanes == 1 ? mine[i] : from_lane(mine[i % words], lanes * chunk + i / words);
    return {all[0], all[1], all[2], all[3]};
}

} // namespace ponder::cuda
