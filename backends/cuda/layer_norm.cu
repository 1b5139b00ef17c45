// layer_norm: y = g (x - mean) / std + b, stats = (mean, 1 / std)
// vjp: dx = carry + (u - mean(u) - h mean(u h)) / std, u = g dy, h = (x - mean) / std
// A warp for each row; rows of up to 1024 stay in its registers.
// layer_norm_vjp_weight: dg = sum dy h, db = sum dy over the rows
#include "launch.cuh"
#include "ops.hpp"
#include "warp.cuh"

#include <algorithm>

namespace ponder::cuda {

namespace {

constexpr int warps = 4, lanes = 16;
constexpr int64_t in_registers = 1024;

// Lane l holds elements 4 l + 128 j + 0..3. J: registers of the row, 0 where it is read again.
template <int J, class X> struct Row {
    const X *x;
    int64_t width;
    float kept[J > 0 ? J : 1][4];

    __device__ Row(const X *x, int64_t width) : x(x), width(width) {
        if constexpr (J > 0)
            for (int j = 0; j < J; ++j)
                read(j, kept[j]);
    }
    __device__ int64_t at(int64_t j) const { return 4 * int64_t(threadIdx.x % 32) + 128 * j; }
    __device__ void read(int64_t j, float *to) const {
        if (at(j) < width) {
            const Pack<X, 4> p = load<4>(x + at(j));
            for (int i = 0; i < 4; ++i)
                to[i] = p[i];
        } else {
            for (int i = 0; i < 4; ++i)
                to[i] = 0;
        }
    }
    // f(index of the first of four, the four)
    template <class F> __device__ void each(F f) {
        if constexpr (J > 0) {
#pragma unroll
            for (int j = 0; j < J; ++j)
                if (at(j) < width)
                    f(at(j), kept[j]);
        } else {
            for (int64_t j = 0; at(j) < width; ++j) {
                float four[4];
                read(j, four);
                f(at(j), four);
            }
        }
    }
};

struct Statistics {
    float mean, inverse; // 1 / std
};

// Of rows in registers in one go over the warp: sums of d = x - c and of its square, where c is the
// mean of four elements. It lies within sqrt(width) / 2 deviations of the mean of all, so that the
// difference of the sums loses at most eight bits.
template <int J, class X> __device__ inline Statistics statistics(Row<J, X> &row, float eps) {
    const float part = 1 / float(row.width);
    if constexpr (J > 0) {
        const Pack<X, 4> start = load<4>(row.x);
        const float c = ((start[0] + start[1]) + (start[2] + start[3])) * 0.25f;
        float sums[4] = {}, squares[4] = {};
        row.each([&](int64_t, const float *v) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float d = v[i] - c;
                sums[i] += d;
                squares[i] += d * d;
            }
        });
        const float d = warp_sum((sums[0] + sums[1]) + (sums[2] + sums[3])) * part;
        const float square = warp_sum((squares[0] + squares[1]) + (squares[2] + squares[3])) * part;
        const float variance = square - d * d;
        return {c + d, inverse_root((variance < 0 ? 0 : variance) + eps)}; // and what is NaN stays
    } else {
        float sum = 0, square = 0;
        row.each([&](int64_t, const float *v) { sum += (v[0] + v[1]) + (v[2] + v[3]); });
        const float mean = warp_sum(sum) * part;
        row.each([&](int64_t, const float *v) {
            for (int i = 0; i < 4; ++i)
                square += (v[i] - mean) * (v[i] - mean);
        });
        return {mean, inverse_root(warp_sum(square) * part + eps)};
    }
}

template <int J, bool gated, class X, class G, class Y>
__global__ void layer_norm_kernel(const X *x, const G *g, const G *b, const bf16 *gate, Y *y,
                                  float *stats, int64_t rows, int64_t width, float eps,
                                  bool settled) {
    const int64_t r = int64_t(blockIdx.x) * warps + threadIdx.x / 32;
    if (r >= rows)
        return;
    if (!settled)
        wait_for_earlier();
    Row<J, G> scale(g, width), shift(b, width); // on their way before the row is there
    wait_for_earlier();
    let_next_start();
    Row<J, X> row(x + r * width, width);
    Row<gated ? J : 0, bf16> gates(gate + r * width, gated ? width : 0);
    const auto [mean, inverse] = statistics(row, eps);
    const auto put = [&](int64_t at, const float *v, const float *scale, const float *shift,
                         const float *gates) {
        Pack<Y, 4> out;
        for (int i = 0; i < 4; ++i) {
            const float n = scale[i] * ((v[i] - mean) * inverse) + shift[i];
            out.set(i, gated ? gates[i] * n : n);
        }
        store<4>(y + r * width + at, out);
    };
    if constexpr (J > 0) {
#pragma unroll
        for (int j = 0; j < J; ++j)
            if (row.at(j) < width)
                put(row.at(j), row.kept[j], scale.kept[j], shift.kept[j],
                    gates.kept[gated ? j : 0]);
    } else {
        for (int64_t j = 0; row.at(j) < width; ++j) {
            float v[4], g4[4], b4[4], more[4];
            row.read(j, v);
            gates.read(j, more);
            scale.read(j, g4);
            shift.read(j, b4);
            put(row.at(j), v, g4, b4, more);
        }
    }
    if (threadIdx.x % 32 == 0) {
        stats[2 * r] = mean;
        stats[2 * r + 1] = inverse;
    }
}

template <int J, class DY, class X, class G>
__global__ void layer_norm_vjp_kernel(const DY *dy, const X *x, const G *g, const float *stats,
                                      const float *carry, float *dx, bf16 *copy, int64_t rows,
                                      int64_t width) {
    const int64_t r = int64_t(blockIdx.x) * warps + threadIdx.x / 32;
    if (r >= rows)
        return;
    wait_for_earlier();
    let_next_start();
    Row<J, DY> up(dy + r * width, width);
    Row<J, X> row(x + r * width, width);
    // On their way while the sums run.
    Row<J, G> scales(g, width);
    Row<J, float> carried(carry ? carry + r * width : dx, carry ? width : 0);
    const float mean = stats[2 * r], inverse = stats[2 * r + 1];
    float sum_u = 0, sum_uh = 0;
    const auto both = [&](auto f) {
        if constexpr (J > 0) {
#pragma unroll
            for (int j = 0; j < J; ++j)
                if (row.at(j) < width)
                    f(row.at(j), up.kept[j], row.kept[j], scales.kept[j], carried.kept[j]);
        } else {
            for (int64_t j = 0; row.at(j) < width; ++j) {
                float a[4], c[4], s[4], more[4];
                up.read(j, a);
                row.read(j, c);
                scales.read(j, s);
                carried.read(j, more);
                f(row.at(j), a, c, s, more);
            }
        }
    };
    both([&](int64_t, const float *d, const float *v, const float *scale, const float *) {
        for (int i = 0; i < 4; ++i) {
            const float u = scale[i] * d[i];
            sum_u += u;
            sum_uh += u * (v[i] - mean) * inverse;
        }
    });
    const float mean_u = warp_sum(sum_u) / float(width), mean_uh = warp_sum(sum_uh) / float(width);
    both([&](int64_t at, const float *d, const float *v, const float *scale, const float *more) {
        Pack<float, 4> out;
        for (int i = 0; i < 4; ++i) {
            const float u = scale[i] * d[i], h = (v[i] - mean) * inverse;
            out.v[i] = more[i] + (u - mean_u - h * mean_uh) * inverse;
        }
        store<4>(dx + r * width + at, out);
        if (copy) {
            Pack<bf16, 4> narrow;
            for (int i = 0; i < 4; ++i)
                narrow.set(i, out.v[i]);
            store<4>(copy + r * width + at, narrow);
        }
    });
}

// Rows whose width is no multiple of four.
template <class X, class G, class Y>
__global__ void layer_norm_odd(const X *x, const G *g, const G *b, Y *y, float *stats,
                               int64_t width, float eps) {
    __shared__ float cell[33];
    const int64_t r = blockIdx.x;
    x += r * width;
    float sum = 0, square = 0;
    for (int64_t j = threadIdx.x; j < width; j += blockDim.x)
        sum += to_float(x[j]);
    const float mean = block_sum(sum, cell) / float(width);
    for (int64_t j = threadIdx.x; j < width; j += blockDim.x)
        square += (to_float(x[j]) - mean) * (to_float(x[j]) - mean);
    const float inverse = 1 / sqrtf(block_sum(square, cell) / float(width) + eps);
    for (int64_t j = threadIdx.x; j < width; j += blockDim.x)
        y[r * width + j] = from_float<Y>(to_float(g[j]) * ((to_float(x[j]) - mean) * inverse) +
                                         to_float(b[j]));
    if (threadIdx.x == 0) {
        stats[2 * r] = mean;
        stats[2 * r + 1] = inverse;
    }
}

template <class DY, class X, class G>
__global__ void layer_norm_vjp_odd(const DY *dy, const X *x, const G *g, const float *stats,
                                   const float *carry, float *dx, bf16 *copy, int64_t width) {
    __shared__ float cell[33];
    const int64_t r = blockIdx.x;
    const float mean = stats[2 * r], inverse = stats[2 * r + 1];
    float sum_u = 0, sum_uh = 0;
    for (int64_t j = threadIdx.x; j < width; j += blockDim.x) {
        const float u = to_float(g[j]) * to_float(dy[r * width + j]);
        sum_u += u;
        sum_uh += u * (to_float(x[r * width + j]) - mean) * inverse;
    }
    const float mean_u = block_sum(sum_u, cell) / float(width);
    const float mean_uh = block_sum(sum_uh, cell) / float(width);
    for (int64_t j = threadIdx.x; j < width; j += blockDim.x) {
        const int64_t at = r * width + j;
        const float u = to_float(g[j]) * to_float(dy[at]), h = (to_float(x[at]) - mean) * inverse;
        dx[at] = (carry ? carry[at] : 0.0f) + (u - mean_u - h * mean_uh) * inverse;
        if (copy)
            copy[at] = __float2bfloat16(dx[at]);
    }
}

template <class DY, class X>
__global__ void weight_shares(const DY *dy, const X *x, const float *stats, float *partial,
                              int64_t rows, int64_t width, int64_t share) {
    __shared__ float cell[2][lanes][33];
    const int64_t c = int64_t(blockIdx.x) * 32 + threadIdx.x;
    const int64_t first = int64_t(blockIdx.y) * share, end = min(rows, first + share);
    float g = 0, b = 0;
    if (c < width)
        for (int64_t r = first + threadIdx.y; r < end; r += lanes) {
            const float d = to_float(dy[r * width + c]);
            g += d * ((to_float(x[r * width + c]) - stats[2 * r]) * stats[2 * r + 1]);
            b += d;
        }
    cell[0][threadIdx.y][threadIdx.x] = g;
    cell[1][threadIdx.y][threadIdx.x] = b;
    __syncthreads();
    if (threadIdx.y < 2 && c < width) {
        float sum = 0;
        for (int i = 0; i < lanes; ++i)
            sum += cell[threadIdx.y][i][threadIdx.x];
        partial[(int64_t(blockIdx.y) * 2 + threadIdx.y) * width + c] = sum;
    }
}

__global__ void weight_sum(const float *partial, float *dg, float *db, int64_t width,
                           int64_t parts) {
    const int64_t i = int64_t(blockIdx.x) * 128 + threadIdx.x;
    if (i >= 2 * width)
        return;
    float sum = 0;
    for (int64_t p = 0; p < parts; ++p)
        sum += partial[p * 2 * width + i];
    (i < width ? dg[i] : db[i - width]) = sum;
}

// f(constant J) for the registers that a row of this width takes.
template <class F> void by_registers(int64_t width, F f) {
    if (width > in_registers)
        f(std::integral_constant<int, 0>());
    else if (width > 768)
        f(std::integral_constant<int, 8>());
    else if (width > 384)
        f(std::integral_constant<int, 6>());
    else
        f(std::integral_constant<int, 3>());
}

} // namespace

namespace {

int32_t plan_forward(const Call &call, bool gated) {
    const int64_t width = call.last(0), rows = call.count(0) / width;
    const float eps = float(call.attr(0));
    const size_t y_at = call.out(0), stats_at = call.out(1);
    if (call.type(1) != call.type(2) ||
        (gated && (call.type(3) != PONDER_DTYPE_BF16 || width % 4 != 0)))
        return PONDER_PLAN_NONE;
    return by_types(call.type(0), call.type(1), [&]<class X, class G>(X, G) {
        return by_type(call.type(y_at), [&]<class Y>(Y) {
            return call.is(0, [=](const Run &run) {
                const X *x = run.at<const X>(0);
                const G *g = run.at<const G>(1), *b = run.at<const G>(2);
                const bf16 *gate = gated ? run.at<const bf16>(3) : nullptr;
                Y *y = run.at<Y>(y_at);
                float *stats = run.at<float>(stats_at);
                const bool whole = width % 4 == 0 && aligned(x, 16) && aligned(g, 16) &&
                                   aligned(b, 16) && aligned(y, 16) && aligned(gate, 8);
                if (!whole && gated)
                    return run.device->fail(
                        "layer_norm_gated: addresses have to be multiples of 16");
                if (!whole)
                    return layer_norm_odd<<<unsigned(rows), 128, 0, run.stream>>>(x, g, b, y, stats,
                                                                                 width, eps);
                const bool settled = run.device->settled(g, size_t(width) * sizeof(G)) &&
                                     run.device->settled(b, size_t(width) * sizeof(G));
                by_registers(width, [&](auto j) {
                    launch(run,
                           gated ? layer_norm_kernel<decltype(j)::value, true, X, G, Y>
                                 : layer_norm_kernel<decltype(j)::value, false, X, G, Y>,
                           blocks_for(rows, warps), warps * 32, 0, x, g, b, gate, y, stats, rows,
                           width, eps, settled);
                });
            });
        });
    });
}

} // namespace

int32_t plan_layer_norm(const Call &call) { return plan_forward(call, false); }
int32_t plan_layer_norm_gated(const Call &call) { return plan_forward(call, true); }

int32_t plan_layer_norm_vjp(const Call &call) {
    const int64_t width = call.last(0), rows = call.count(0) / width;
    const bool copies = call.has_out(1);
    if (copies && call.type(6) != PONDER_DTYPE_BF16)
        return PONDER_PLAN_NONE;
    return by_types(call.type(0), call.type(1), [&]<class DY, class X>(DY, X) {
        return by_type(call.type(2), [&]<class G>(G) {
            return call.is(0, [=](const Run &run) {
                const DY *dy = run.at<const DY>(0);
                const X *x = run.at<const X>(1);
                const G *g = run.at<const G>(2);
                const float *stats = run.at<const float>(3), *carry = run.at<const float>(4);
                float *dx = run.at<float>(5);
                bf16 *copy = copies ? run.at<bf16>(6) : nullptr;
                if (width % 4 != 0 || !aligned(dy, 16) || !aligned(x, 16) || !aligned(g, 16) ||
                    !aligned(dx, 16) || !aligned(carry, 16) || !aligned(copy, 16))
                    return layer_norm_vjp_odd<<<unsigned(rows), 128, 0, run.stream>>>(
                        dy, x, g, stats, carry, dx, copy, width);
                by_registers(width, [&](auto j) {
                    launch(run, layer_norm_vjp_kernel<decltype(j)::value, DY, X, G>,
                           blocks_for(rows, warps), warps * 32, 0, dy, x, g, stats, carry, dx, copy,
                           rows, width);
                });
            });
        });
    });
}

int32_t plan_layer_norm_vjp_weight(const Call &call) {
    const int64_t width = call.last(0), rows = call.count(0) / width;
    const int64_t parts = std::clamp<int64_t>(rows / 64, 1, 64), share = (rows + parts - 1) / parts;
    return by_types(call.type(0), call.type(1), [&]<class DY, class X>(DY, X) {
        return call.is(size_t(parts * 2 * width) * sizeof(float), [=](const Run &run) {
            float *partial = reinterpret_cast<float *>(run.workspace);
            weight_shares<<<dim3(blocks_for(width, 32), unsigned(parts)), dim3(32, lanes), 0,
                            run.stream>>>(run.at<const DY>(0), run.at<const X>(1),
                                          run.at<const float>(2), partial, rows, width, share);
            weight_sum<<<blocks_for(2 * width, 128), 128, 0, run.stream>>>(
                partial, run.at<float>(3), run.at<float>(4), width, parts);
        });
    });
}

} // namespace ponder::cuda
