// mean: y = sum(x) / count     norm: y = |a - b| or |a|
// One share of the elements a block, then one block over the shares: the same order every time.
#include "reduce.hpp"
#include "ops.hpp"

namespace ponder::cuda {

namespace {

struct Sum {
    const float *x;
    __device__ float operator()(int64_t i) const { return x[i]; }
};
struct Squares {
    const float *a, *b;
    __device__ float operator()(int64_t i) const {
        const float d = a[i] - (b ? b[i] : 0.0f);
        return d * d;
    }
};
struct Mean {
    float *y;
    double count;
    __device__ void operator()(double sum) const { *y = float(sum / count); }
};
struct Root {
    float *y;
    __device__ void operator()(double sum) const { *y = float(sqrt(sum)); }
};

} // namespace

int32_t plan_mean(const Call &call) {
    const int64_t n = call.count(0);
    const double count = call.attr(0);
    return call.is(reduce_workspace(n), [=](const Run &run) {
        reduce(n, run, Sum{run.at<const float>(0)}, Mean{run.at<float>(1), count});
    });
}

int32_t plan_norm(const Call &call) {
    const int64_t n = call.count(0);
    return call.is(reduce_workspace(n), [=](const Run &run) {
        reduce(n, run, Squares{run.at<const float>(0), run.at<const float>(1)},
               Root{run.at<float>(2)});
    });
}

} // namespace ponder::cuda
