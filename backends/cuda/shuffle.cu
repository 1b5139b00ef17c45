// Ops that move elements: slice_rows, split_heads, merge_heads, pick and their vjps; keep_rows; rope.
#include "launch.cuh"
#include "ops.hpp"

namespace ponder::cuda {

namespace {

constexpr int threads = 256;

// y_i = f(i)
template <class Y, class F> __global__ void make_kernel(Y *y, int64_t n, F f) {
    const int64_t i = int64_t(blockIdx.x) * threads + threadIdx.x;
    if (i < n)
        y[i] = from_float<Y>(f(i));
}
template <class Y, class F> void make(Y *y, int64_t n, cudaStream_t stream, F f) {
    make_kernel<<<blocks_for(n, threads), threads, 0, stream>>>(y, n, f);
}

struct Cut {
    int64_t whole, taken, width, first; // rows of each, and where the part starts
};

Cut cut_of(const Call &call, size_t whole, size_t part) {
    const int32_t rank = call.rank(whole);
    return {call.dim(whole, rank - 2), call.dim(part, rank - 2), call.last(whole),
            int64_t(call.attr(0))};
}

template <class X> struct TakeRows {
    const X *x;
    Cut c;
    __device__ float operator()(int64_t i) const {
        const int64_t each = c.taken * c.width;
        return to_float(x[(i / each) * c.whole * c.width + c.first * c.width + i % each]);
    }
};
template <class X> struct PutRows {
    const X *dy;
    Cut c;
    __device__ float operator()(int64_t i) const {
        const int64_t each = c.whole * c.width, block = i / each, at = i % each;
        const int64_t row = at / c.width - c.first;
        return row < 0 || row >= c.taken
                   ? 0.0f
                   : to_float(dy[block * c.taken * c.width + at - c.first * c.width]);
    }
};

struct Heads {
    int64_t tokens, width, heads, d, part;
};
template <class X> struct SplitHeads { // -> [S,H,T,D]
    const X *x;
    Heads h;
    __device__ float operator()(int64_t i) const {
        const int64_t j = i % h.d, t = i / h.d % h.tokens, head = i / (h.d * h.tokens) % h.heads,
                      s = i / (h.d * h.tokens * h.heads);
        return to_float(
            x[(s * h.tokens + t) * h.width + (h.part * h.heads + head) * h.d + j]);
    }
};
template <class X> struct MergeHeads { // -> [S,T,C]
    const X *x;
    Heads h;
    __device__ float operator()(int64_t i) const {
        const int64_t c = i % h.width - h.part * h.heads * h.d, row = i / h.width;
        if (c < 0 || c >= h.heads * h.d)
            return 0;
        return to_float(
            x[((row / h.tokens * h.heads + c / h.d) * h.tokens + row % h.tokens) * h.d + c % h.d]);
    }
};

template <class X> struct Pick {
    const X *x;
    const int32_t *target;
    int64_t width;
    __device__ float operator()(int64_t r) const {
        return target[r] < 0 ? 0.0f : to_float(x[r * width + target[r]]);
    }
};
template <class X> struct PickVjp {
    const X *dy;
    const int32_t *target;
    int64_t width;
    __device__ float operator()(int64_t i) const {
        return target[i / width] == i % width ? to_float(dy[i / width]) : 0.0f;
    }
};

// The first of the rows is known at run time, so that a recorded pass serves every length.
__global__ void keep_kernel(const float *x, const int32_t *first, float *kept, int64_t n,
                            int64_t tokens, int64_t places, int64_t width) {
    const int64_t i = int64_t(blockIdx.x) * threads + threadIdx.x;
    if (i >= n)
        return;
    const int64_t row = i / width, s = row / tokens, place = first[s] + row % tokens;
    if (place < places)
        kept[(s * places + place) * width + i % width] = x[i];
}

// A thread turns one pair.
template <class X, class Y>
__global__ void rope_kernel(const X *x, Y *y, int64_t pairs, int64_t tokens, int64_t width,
                            int64_t d, int64_t period, double log_theta, float turn) {
    const int64_t i = int64_t(blockIdx.x) * threads + threadIdx.x;
    if (i >= pairs)
        return;
    wait_for_earlier();
    const int64_t at = 2 * i, row = at / width, c = at - row * width, t = row % tokens;
    // Angles are a mini-batch at most: f32 is off by some 1e-6 at the far end.
    const float angle = float(t % period) * expf(-float(log_theta) * float(c % d) / float(d));
    float cosine, sine;
    sincosf(angle, &sine, &cosine);
    sine *= turn;
    const float a = to_float(x[at]), b = to_float(x[at + 1]);
    y[at] = from_float<Y>(a * cosine - b * sine);
    y[at + 1] = from_float<Y>(a * sine + b * cosine);
}

Heads heads_of(const Call &call, size_t merged, size_t split) {
    return {call.dim(merged, 1), call.dim(merged, 2), call.dim(split, 1), call.dim(split, 3),
            int64_t(call.attr(1))};
}

} // namespace

int32_t plan_slice_rows(const Call &call) {
    const Cut cut = cut_of(call, 0, 1);
    const int64_t n = call.count(1);
    return by_types(call.type(0), call.type(1), [&]<class X, class Y>(X, Y) {
        return call.is(0, [=](const Run &run) {
            make(run.at<Y>(1), n, run.stream, TakeRows<X>{run.at<const X>(0), cut});
        });
    });
}

int32_t plan_slice_rows_vjp(const Call &call) {
    const Cut cut = cut_of(call, 1, 0);
    const int64_t n = call.count(1);
    return by_types(call.type(0), call.type(1), [&]<class X, class Y>(X, Y) {
        return call.is(0, [=](const Run &run) {
            make(run.at<Y>(1), n, run.stream, PutRows<X>{run.at<const X>(0), cut});
        });
    });
}

int32_t plan_split_heads(const Call &call) {
    const Heads heads = heads_of(call, 0, 1);
    const int64_t n = call.count(1);
    return by_types(call.type(0), call.type(1), [&]<class X, class Y>(X, Y) {
        return call.is(0, [=](const Run &run) {
            make(run.at<Y>(1), n, run.stream, SplitHeads<X>{run.at<const X>(0), heads});
        });
    });
}

int32_t plan_merge_heads(const Call &call) {
    const Heads heads = heads_of(call, 1, 0);
    const int64_t n = call.count(1);
    return by_types(call.type(0), call.type(1), [&]<class X, class Y>(X, Y) {
        return call.is(0, [=](const Run &run) {
            make(run.at<Y>(1), n, run.stream, MergeHeads<X>{run.at<const X>(0), heads});
        });
    });
}

int32_t plan_pick(const Call &call) {
    const int64_t rows = call.count(1), width = call.last(0);
    return by_types(call.type(0), call.type(2), [&]<class X, class Y>(X, Y) {
        return call.is(0, [=](const Run &run) {
            make(run.at<Y>(2), rows, run.stream,
                 Pick<X>{run.at<const X>(0), run.at<const int32_t>(1), width});
        });
    });
}

int32_t plan_pick_vjp(const Call &call) {
    const int64_t n = call.count(2), width = call.last(2);
    return by_types(call.type(0), call.type(2), [&]<class X, class Y>(X, Y) {
        return call.is(0, [=](const Run &run) {
            make(run.at<Y>(2), n, run.stream,
                 PickVjp<X>{run.at<const X>(0), run.at<const int32_t>(1), width});
        });
    });
}

int32_t plan_keep_rows(const Call &call) {
    const int64_t n = call.count(0), tokens = call.dim(0, 1), width = call.last(0);
    const int64_t places = call.dim(2, 1), all = call.count(2);
    return call.is(0, [=](const Run &run) {
        if (run.at(2) != run.at(3))
            run.device->check(cudaMemcpyAsync(run.at(3), run.at(2), size_t(all) * sizeof(float),
                                              cudaMemcpyDeviceToDevice, run.stream),
                              "keep_rows");
        keep_kernel<<<blocks_for(n, threads), threads, 0, run.stream>>>(
            run.at<const float>(0), run.at<const int32_t>(1), run.at<float>(3), n, tokens, places,
            width);
    });
}

int32_t plan_rope(const Call &call) {
    const int64_t pairs = call.count(0) / 2, tokens = call.dim(0, 1), width = call.dim(0, 2);
    const int64_t d = width / int64_t(call.attr(0)), period = int64_t(call.attr(1));
    const double log_theta = log(call.attr(2));
    const float turn = call.attr(3) != 0 ? -1.0f : 1.0f;
    return by_types(call.type(0), call.type(1), [&]<class X, class Y>(X, Y) {
        return call.is(0, [=](const Run &run) {
            launch(run, rope_kernel<X, Y>, blocks_for(pairs, threads), threads, 0,
                   run.at<const X>(0), run.at<Y>(1), pairs, tokens, width, d, period, log_theta,
                   turn);
        });
    });
}

} // namespace ponder::cuda
