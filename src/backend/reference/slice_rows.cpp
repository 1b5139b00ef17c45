// slice_rows: y[.., i, :] = x[.., first + i, :]
// vjp:        dx[.., first + i, :] = dy[.., i, :], zeros elsewhere
#include "backend/reference/kernel.hpp"

namespace ponder::reference {
namespace {

// Blocks of rows of all tensors; the leading dims flattened.
struct Cut {
    int64_t blocks, tokens, taken, width;
    Cut(const ponder_tensor &whole, const ponder_tensor &part)
        : tokens(whole.dim[whole.rank - 2]), taken(part.dim[part.rank - 2]),
          width(part.dim[part.rank - 1]) {
        blocks = count_of(part) / (taken * width);
    }
};

template <class T> void slice_rows(Args<T> &args) {
    const Cut cut(args.shape_in(0), args.shape_out(0));
    const T *x = args.in(0) + args.attr_int(0) * cut.width;
    T *y = args.out(0);
    for (int64_t i = 0; i < cut.blocks; ++i)
        std::copy_n(x + i * cut.tokens * cut.width, cut.taken * cut.width,
                    y + i * cut.taken * cut.width);
}

template <class T> void slice_rows_vjp(Args<T> &args) {
    const Cut cut(args.shape_out(0), args.shape_in(0));
    const T *dy = args.in(0);
    T *dx = args.out(0);
    std::fill_n(dx, cut.blocks * cut.tokens * cut.width, T(0));
    for (int64_t i = 0; i < cut.blocks; ++i)
        std::copy_n(dy + i * cut.taken * cut.width, cut.taken * cut.width,
                    dx + (i * cut.tokens + args.attr_int(0)) * cut.width);
}

const char *check(const ponder_tensor &whole, const ponder_tensor &part, double first) {
    if (whole.rank < 2 || whole.rank != part.rank)
        return "x and y must have equal ranks of 2 or more";
    for (int32_t i = 0; i < whole.rank; ++i)
        if (i != whole.rank - 2 && whole.dim[i] != part.dim[i])
            return "only the number of rows may differ";
    return first >= 0 && int64_t(first) + part.dim[part.rank - 2] <= whole.dim[whole.rank - 2]
               ? nullptr
               : "the slice ends after T";
}

} // namespace

const Op slice_rows_op = {
    "slice_rows",
    "x[*] -> y[*]",
    1,
    slice_rows<float>,
    slice_rows<double>,
    nullptr,
    [](const ponder_tensor *t, const double *attr) { return check(t[0], t[1], attr[0]); }};

const Op slice_rows_vjp_op = {
    "slice_rows_vjp",
    "dy[*] -> dx[*]",
    1,
    slice_rows_vjp<float>,
    slice_rows_vjp<double>,
    nullptr,
    [](const ponder_tensor *t, const double *attr) { return check(t[1], t[0], attr[0]); }};

} // namespace ponder::reference
