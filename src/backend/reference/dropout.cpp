// dropout: y_i = x_i / (1 - probability), or 0 where the draw of element i is below `probability`
//   draw_i = mix(mix(i ^ first) + second) / 2^32, first and second from seed and salt
// mix is the 32-bit finalizer "lowbias32" of C. Wellons' hash prospector. An element's draw depends
// on nothing but its number: the same call on dy is the vjp, and any backend draws the same.
#include "backend/reference/kernel.hpp"

namespace ponder::reference {
namespace {

uint32_t mix(uint32_t x) {
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x ^ (x >> 16);
}

template <class T> void dropout(Args<T> &args) {
    const double probability = args.attr(0);
    const int32_t *seed = args.ids(1);
    const uint32_t first = mix(mix(uint32_t(seed[0])) + uint32_t(args.attr_int(1)));
    const uint32_t second = mix(first ^ uint32_t(seed[1]));
    const uint32_t below = uint32_t(std::min(probability * 4294967296.0, 4294967295.0));
    const T *x = args.in(0), scale = T(1 / (1 - probability));
    T *y = args.out(0);
    for (int64_t i = 0; i < args['.']; ++i)
        y[i] = mix(mix(uint32_t(i) ^ first) + second) < below ? T(0) : x[i] * scale;
}

const char *check(const Sizes &, const double *attr) {
    return attr[0] >= 0 && attr[0] < 1 ? nullptr : "probability must be in [0, 1)";
}

} // namespace

const Op dropout_op = {"dropout", "x[...] seed:i[2] -> y[...]", 2, dropout<float>, dropout<double>,
                       check};

} // namespace ponder::reference
