// What the reference kernels are written with: plain views of their tensors and a few loops.
//
// A kernel is a template on its compute type T: float, or double as soon as one tensor of the call
// is f64, so that finite differences see no float anywhere. Tensors of another type are converted
// to T on the way in and rounded on the way out. Scratch comes from the heap: a backend for use
// plans its workspace, this one favours the equation.
#pragma once

#include "backend/reference/op.hpp"
#include "base/dtype.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

namespace ponder::reference {

inline int64_t count_of(const ponder_tensor &t) {
    int64_t n = 1;
    for (int32_t i = 0; i < t.rank; ++i)
        n *= t.dim[i];
    return n;
}

template <class T> class Args {
public:
    Args(const Planned &call, void *const *buffers) : call_(call), buffers_(buffers) {}

    // Inputs and outputs are numbered from 0 each; an absent tensor is nullptr.
    const T *in(size_t i) {
        if (i >= call_.n_in)
            return nullptr; // left out
        const ponder_tensor &t = call_.tensor[i];
        if (is_plain(t) || !buffers_[i])
            return static_cast<const T *>(buffers_[i]);
        const int64_t n = count_of(t);
        T *copy = scratch(n);
        load(i, 0, n, copy);
        return copy;
    }
    const int32_t *ids(size_t i) const { return static_cast<const int32_t *>(buffers_[i]); }
    int32_t *ids_out(size_t i) const { return static_cast<int32_t *>(buffers_[call_.n_in + i]); }
    T *out(size_t i) {
        const size_t at = call_.n_in + i;
        if (is_plain(call_.tensor[at]) || !buffers_[at])
            return static_cast<T *>(buffers_[at]);
        converted_.push_back({at, scratch(count_of(call_.tensor[at]))});
        return converted_.back().values;
    }
    // Elements [first, first + n) of an input, for tables of which a call reads a few rows.
    void load(size_t i, int64_t first, int64_t n, T *to) const {
        switch (DType(call_.tensor[i].dtype)) {
        case DType::f32:
            std::copy_n(static_cast<const float *>(buffers_[i]) + first, n, to);
            break;
        case DType::f64:
            std::transform(static_cast<const double *>(buffers_[i]) + first,
                           static_cast<const double *>(buffers_[i]) + first + n, to,
                           [](double x) { return T(x); });
            break;
        case DType::bf16:
            std::transform(static_cast<const bf16 *>(buffers_[i]) + first,
                           static_cast<const bf16 *>(buffers_[i]) + first + n, to,
                           [](bf16 x) { return T(to_float(x)); });
            break;
        case DType::i8:
            std::transform(static_cast<const int8_t *>(buffers_[i]) + first,
                           static_cast<const int8_t *>(buffers_[i]) + first + n, to,
                           [](int8_t x) { return T(x); });
            break;
        default:
            break;
        }
    }
    // Input i, times its scales where they are given (int8 weights).
    const T *weight(size_t i, size_t scales) {
        if (!given(scales))
            return in(i);
        const int64_t m = call_.tensor[i].dim[0], n = call_.tensor[i].dim[1];
        T *w = scratch(m * n);
        load_weight(i, scales, 0, m, w);
        return w;
    }
    // Rows [first, first + n) of the same.
    void load_weight(size_t i, size_t scales, int64_t first, int64_t n, T *to) {
        const int64_t width = call_.tensor[i].dim[1];
        load(i, first * width, n * width, to);
        if (!given(scales))
            return;
        const bool of_rows = call_.tensor[scales].dim[1] == 1;
        const T *by = of_rows ? nullptr : in(scales);
        for (int64_t r = 0; r < n; ++r, to += width) {
            T row = 1;
            if (of_rows)
                load(scales, first + r, 1, &row);
            for (int64_t j = 0; j < width; ++j)
                to[j] *= of_rows ? row : by[j];
        }
    }
    // n zeros.
    T *scratch(int64_t n) { return scratch_.emplace_back(size_t(n)).data(); }

    const ponder_tensor &shape_in(size_t i) const { return call_.tensor[i]; }
    const ponder_tensor &shape_out(size_t i) const { return call_.tensor[call_.n_in + i]; }
    // Sizes by their letters in the op's signature.
    int64_t operator[](char letter) const { return call_.sizes[letter]; }
    double attr(size_t i) const { return call_.attr[i]; } // 0 where left out
    int64_t attr_int(size_t i) const { return int64_t(call_.attr[i]); }

    // Rounds converted outputs into their buffers; the last thing of a run.
    void store() {
        for (const Converted &c : converted_) {
            const int64_t n = count_of(call_.tensor[c.tensor]);
            void *to = buffers_[c.tensor];
            switch (DType(call_.tensor[c.tensor].dtype)) {
            case DType::f32:
                std::transform(c.values, c.values + n, static_cast<float *>(to),
                               [](T x) { return float(x); });
                break;
            case DType::bf16:
                std::transform(c.values, c.values + n, static_cast<bf16 *>(to),
                               [](T x) { return to_bf16(float(x)); });
                break;
            default:
                break;
            }
        }
    }

private:
    struct Converted {
        size_t tensor;
        T *values;
    };
    bool given(size_t i) const { return i < call_.n_in && buffers_[i]; }
    static bool is_plain(const ponder_tensor &t) {
        return DType(t.dtype) == (std::is_same_v<T, double> ? DType::f64 : DType::f32);
    }

    const Planned &call_;
    void *const *buffers_;
    std::vector<std::vector<T>> scratch_;
    std::vector<Converted> converted_;
};

// y += a x. The inner loop of every product: elements are independent, so it vectorises without
// reordering a sum.
template <class T> void axpy(int64_t n, T a, const T *__restrict x, T *__restrict y) {
    for (int64_t i = 0; i < n; ++i)
        y[i] += a * x[i];
}

template <class T> T dot(int64_t n, const T *x, const T *y) {
    T sum = 0;
    for (int64_t i = 0; i < n; ++i)
        sum += x[i] * y[i];
    return sum;
}

// to[columns, rows] = from[rows, columns]^T, rows of `from` being `stride` apart
template <class T>
void transpose(int64_t rows, int64_t columns, const T *from, int64_t stride, T *to) {
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j)
            to[j * rows + i] = from[i * stride + j];
}

// c[m,n] += a[m,k] b[k,n]
template <class T> void product(int64_t m, int64_t n, int64_t k, const T *a, const T *b, T *c) {
    for (int64_t i = 0; i < m; ++i)
        for (int64_t l = 0; l < k; ++l)
            axpy(n, a[i * k + l], b + l * n, c + i * n);
}

// c[m,n] += a[m,k] b[n,k]^T, transposing 64 rows of b at a time
template <class T> void product_nt(int64_t m, int64_t n, int64_t k, const T *a, const T *b, T *c) {
    constexpr int64_t tile = 64;
    std::vector<T> bt(static_cast<size_t>(k * tile));
    for (int64_t j = 0; j < n; j += tile) {
        const int64_t width = std::min(tile, n - j);
        transpose(width, k, b + j * k, k, bt.data());
        for (int64_t i = 0; i < m; ++i)
            for (int64_t l = 0; l < k; ++l)
                axpy(width, a[i * k + l], bt.data() + l * width, c + i * n + j);
    }
}

// c[m,n] += a[k,m]^T b[k,n]
template <class T> void product_tn(int64_t m, int64_t n, int64_t k, const T *a, const T *b, T *c) {
    for (int64_t l = 0; l < k; ++l)
        for (int64_t i = 0; i < m; ++i)
            axpy(n, a[l * m + i], b + l * n, c + i * n);
}

// Where element i of a tensor of shape `to` comes from in `from`, which is broadcast to it: dims
// are aligned at the right; a dim that is 1 or missing is read again and again.
class Broadcast {
public:
    Broadcast(const ponder_tensor &from, const ponder_tensor &to) : whole_(true) {
        int64_t step = 1;
        for (int32_t axis = 0; axis < to.rank; ++axis) {
            const int32_t at = from.rank - 1 - axis;
            const int64_t n = at >= 0 ? from.dim[at] : 1;
            dim_[axis] = to.dim[to.rank - 1 - axis];
            step_[axis] = n == 1 ? 0 : step;
            whole_ = whole_ && n == dim_[axis];
            step *= n;
        }
        rank_ = to.rank;
    }
    int64_t operator()(int64_t i) const {
        if (whole_)
            return i;
        int64_t from = 0;
        for (int32_t axis = 0; axis < rank_; i /= dim_[axis++])
            from += i % dim_[axis] * step_[axis];
        return from;
    }
    static bool fits(const ponder_tensor &from, const ponder_tensor &to) {
        if (from.rank > to.rank)
            return false;
        for (int32_t axis = 1; axis <= from.rank; ++axis) {
            const int64_t n = from.dim[from.rank - axis];
            if (n != 1 && n != to.dim[to.rank - axis])
                return false;
        }
        return true;
    }

private:
    int64_t dim_[PONDER_MAX_RANK], step_[PONDER_MAX_RANK];
    int32_t rank_;
    bool whole_;
};

// gelu(x) = x (1 + tanh(u)) / 2,  u = sqrt(2/pi) (x + 0.044715 x^3)
constexpr double gelu_scale = 0.79788456080286535588, gelu_cube = 0.044715;

template <class T> T gelu_of(T x) {
    return T(0.5) * x * (1 + std::tanh(T(gelu_scale) * (x + T(gelu_cube) * x * x * x)));
}

// gelu'(x) = (1 + tanh(u)) / 2 + x (1 - tanh(u)^2) u' / 2
template <class T> T gelu_slope(T x) {
    const T t = std::tanh(T(gelu_scale) * (x + T(gelu_cube) * x * x * x));
    const T du = T(gelu_scale) * (1 + 3 * T(gelu_cube) * x * x);
    return T(0.5) * (1 + t) + T(0.5) * x * (1 - t * t) * du;
}

} // namespace ponder::reference
