// norm: y = |a - b|, b absent = 0. One task; squares are summed in f64 lanes, in a fixed order.
#include "ops.hpp"

namespace ponder::cpu::PONDER_ISA {
namespace {

struct Norm : Kernel {
    int64_t n;
    bool difference;
};

template <bool Difference> PONDER_INLINE double squares(const float *a, const float *b, int64_t n) {
    constexpr int lanes = 32;
    double lane[lanes] = {};
    int64_t i = 0;
    for (; i + lanes <= n; i += lanes)
        for (int j = 0; j < lanes; ++j) {
            const double d = double(a[i + j]) - (Difference ? double(b[i + j]) : 0.0);
            lane[j] += d * d;
        }
    for (; i < n; ++i) {
        const double d = double(a[i]) - (Difference ? double(b[i]) : 0.0);
        lane[i % lanes] += d * d;
    }
    double total = 0;
    for (double v : lane)
        total += v;
    return total;
}

void run(const Kernel *kernel, void *const *buffers, void *, uint32_t) {
    const Norm &k = *static_cast<const Norm *>(kernel);
    const float *a = static_cast<const float *>(buffers[0]);
    const float *b = static_cast<const float *>(buffers[1]);
    const double s = k.difference ? squares<true>(a, b, k.n) : squares<false>(a, b, k.n);
    *static_cast<float *>(buffers[2]) = float(__builtin_sqrt(s));
}

} // namespace

int32_t plan_norm(const Call &c) {
    if (in(c, 0).dtype != kF32 || !f32_or_none(in(c, 1)) || out(c, 0).dtype != kF32)
        return PONDER_PLAN_NONE;
    Norm *k = new_kernel<Norm>(run);
    if (!k)
        return PONDER_PLAN_FAILED;
    k->n = count(in(c, 0)), k->difference = given(in(c, 1));
    return planned(c, k, 1, PONDER_TILE_WHOLE);
}

} // namespace ponder::cpu::PONDER_ISA
