// cross_entropy: logits = h table^T for some rows at a time, in f32; then one pass over each row
//   for max, sum and entropy, and one more where the probabilities are kept.
// vjps: (p - onehot) dnll for some rows at a time, then a product with the table, or with h.
// cross_entropy_parts: no logits at all (cross_entropy_sm90.cu). It leaves their gradient but for a
//   factor of each row, so its vjp multiplies rows of what products give, or take.
#include "cross_entropy.hpp"
#include "launch.cuh"
#include "ops.hpp"
#include "product.hpp"

namespace ponder::cuda {

namespace {

constexpr int threads = 512;
constexpr size_t logits_limit = size_t(128) << 20; // bytes of a block of rows

// Rows whose logits are held at once, and how far apart they lie: products want rows that start
// at multiples of 16 bytes.
struct Tile {
    int64_t rows, stride;
    Tile(int64_t all, int64_t vocabulary, size_t element) {
        stride = (vocabulary + 63) / 64 * 64;
        constexpr int64_t most = 65535 / 128 * 128; // blocks in a grid's second dimension
        const int64_t fit = std::min(most, int64_t(logits_limit / (size_t(stride) * element)));
        rows = std::min(all, std::max<int64_t>(128, fit / 128 * 128));
    }
    size_t bytes(size_t element) const {
        return (size_t(rows * stride) * element + 255) / 256 * 256;
    }
};

// Sums of e^(l - top) and (l - top) e^(l - top) that follow a growing top.
struct Running {
    float top = -INFINITY, sum = 0, weighted = 0;
    __device__ void add(float l) {
        if (l > top) {
            rescale(l);
            sum += 1;
        } else {
            const float d = l - top, e = __expf(d);
            sum += e;
            weighted += d * e;
        }
    }
    __device__ void rescale(float to) { // to >= top
        const float d = top - to, c = top == -INFINITY ? 0.0f : __expf(d);
        weighted = top == -INFINITY ? 0.0f : (weighted + d * sum) * c;
        sum *= c;
        top = to;
    }
    __device__ void add(const Running &o) {
        if (o.top == -INFINITY)
            return;
        Running other = o;
        if (other.top > top)
            rescale(other.top);
        else
            other.rescale(top);
        sum += other.sum;
        weighted += other.weighted;
    }
};

template <class P>
__global__ void rows_kernel(const float *logits, const int32_t *target, float *nll, float *entropy,
                            P *p, int64_t vocabulary, int64_t stride) {
    __shared__ Running cell[threads / 32];
    const int64_t r = blockIdx.x;
    const float *l = logits + r * stride;
    Running mine;
    const int64_t whole = vocabulary / 4;
    for (int64_t j = threadIdx.x; j < whole; j += threads) {
        const float4 four = reinterpret_cast<const float4 *>(l)[j];
        const float top = fmaxf(fmaxf(four.x, four.y), fmaxf(four.z, four.w));
        if (top > mine.top)
            mine.rescale(top);
        const float d[4] = {four.x - mine.top, four.y - mine.top, four.z - mine.top,
                            four.w - mine.top};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float e = __expf(d[i]);
            mine.sum += e;
            mine.weighted += d[i] * e;
        }
    }
    for (int64_t j = 4 * whole + threadIdx.x; j < vocabulary; j += threads)
        mine.add(l[j]);
    for (int step = 16; step > 0; step /= 2) {
        Running other;
        other.top = __shfl_xor_sync(~0u, mine.top, step);
        other.sum = __shfl_xor_sync(~0u, mine.sum, step);
        other.weighted = __shfl_xor_sync(~0u, mine.weighted, step);
        mine.add(other);
    }
    if (threadIdx.x % 32 == 0)
        cell[threadIdx.x / 32] = mine;
    __syncthreads();
    mine = cell[0];
    for (int i = 1; i < threads / 32; ++i)
        mine.add(cell[i]);
    if (threadIdx.x == 0) {
        const float log_sum = logf(mine.sum);
        entropy[r] = log_sum - mine.weighted / mine.sum;
        nll[r] = target[r] < 0 ? 0.0f : log_sum - (l[target[r]] - mine.top);
    }
    if (!p)
        return;
    const float factor = 1 / mine.sum;
    for (int64_t j = threadIdx.x; j < vocabulary; j += threads)
        p[r * vocabulary + j] = from_float<P>(__expf(l[j] - mine.top) * factor);
}

// dl[rows, stride] = (p - onehot) dnll, zeros behind the vocabulary
template <class P, class L>
__global__ void logit_gradient(const P *p, const int32_t *target, const float *dnll, L *dl,
                               int64_t vocabulary, int64_t stride) {
    const int64_t r = blockIdx.y, j = int64_t(blockIdx.x) * threads + threadIdx.x;
    if (j >= stride)
        return;
    const int32_t hit = target[r];
    float d = 0;
    if (hit >= 0 && j < vocabulary)
        d = (to_float(p[r * vocabulary + j]) - (j == hit ? 1.0f : 0.0f)) * dnll[r];
    dl[r * stride + j] = from_float<L>(d);
}

// y[r,:] = share dnll x[r,:] for the sum x of `parts` matrices [rows,width], 0 where there is no
// target. A block for each row, four columns a thread. y may be x.
template <class X, class Y>
__global__ void scale_rows(const X *x, const float *share, const int32_t *target, const float *dnll,
                           Y *y, int parts, int64_t width) {
    wait_for_earlier();
    const int64_t r = blockIdx.x;
    const bool none = target[r] < 0;
    const float factor = share[r] * dnll[r];
    for (int64_t j = 4 * threadIdx.x; j < width; j += 4 * blockDim.x) {
        float sum[4] = {};
#pragma unroll 8
        for (int64_t i = 0; i < parts; ++i) {
            const Pack<X, 4> part = load<4>(x + (i * gridDim.x + r) * width + j);
#pragma unroll
            for (int k = 0; k < 4; ++k)
                sum[k] += part[k];
        }
        Pack<Y, 4> product;
#pragma unroll
        for (int k = 0; k < 4; ++k)
            product.set(k, none ? 0.0f : sum[k] * factor);
        store<4>(y + r * width + j, product);
    }
}

// dtable[j,:] (+)= sum over rows of dl[row,j] h[row,:] for the words that are no multiple of eight
template <class L>
__global__ void last_words(const L *dl, const L *h, float *dtable, int64_t rows, int64_t width,
                           int64_t stride, bool add) {
    __shared__ float cell[32][33];
    const int64_t word = blockIdx.x, c = int64_t(blockIdx.y) * 32 + threadIdx.x;
    float sum = 0;
    if (c < width)
        for (int64_t r = threadIdx.y; r < rows; r += 32)
            sum += to_float(dl[r * stride + word]) * to_float(h[r * width + c]);
    cell[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && c < width) {
        float all = add ? dtable[word * width + c] : 0.0f;
        for (int i = 0; i < 32; ++i)
            all += cell[i][threadIdx.x];
        dtable[word * width + c] = all;
    }
}

// The vocabulary as products take it: rounded up to whole rows of a tile where the table is a
// weight, which ends in zeros (ponder_device::slack()). The library is several times slower for odd
// numbers.
int64_t rounded(const Call &call, size_t table, const Tile &tile, int64_t vocabulary) {
    const size_t row = size_t(call.dim(table, 1)) * size_of(call.type(table));
    return call.op->constant[table] && size_t(tile.stride - vocabulary) * row <=
                                           ponder_device::slack(size_t(vocabulary) * row)
               ? tile.stride
               : vocabulary;
}

// f(first row, number of rows) for each block of rows
template <class F> void each_tile(int64_t rows, int64_t tile, F f) {
    for (int64_t first = 0; first < rows; first += tile)
        f(first, std::min(tile, rows - first));
}

// The product of a whole tile and that of the rows that are left over.
struct TileProducts {
    std::shared_ptr<const Product> whole, rest;
    // shape(rows) describes the product.
    template <class F> TileProducts(const Call &call, int64_t rows, int64_t tile, F shape) {
        whole = call.device->products().get(shape(tile));
        rest = rows % tile ? call.device->products().get(shape(rows % tile)) : whole;
    }
    size_t workspace() const { return std::max(whole->workspace(), rest->workspace()); }
    const Product &of(int64_t n, int64_t tile) const { return n == tile ? *whole : *rest; }
};

} // namespace

int32_t plan_cross_entropy(const Call &call) {
    const int64_t width = call.dim(0, 2), rows = call.count(0) / width;
    const int64_t vocabulary = call.dim(1, 0);
    if (call.type(0) != call.type(1))
        return PONDER_PLAN_NONE;
    if (call.type(0) == PONDER_DTYPE_BF16 && !call.has_out(2) &&
        head_losses_fit(*call.device, rows, width, vocabulary))
        return call.is(head_losses_workspace(rows, vocabulary), [=](const Run &run) {
            head_losses(run, run.at<const bf16>(0), run.at<const bf16>(1), run.at<const int32_t>(2),
                        run.at<float>(3), run.at<float>(4), nullptr, nullptr, rows, width,
                        vocabulary);
        });
    const Tile tile(rows, vocabulary, sizeof(float));
    const int64_t columns = rounded(call, 1, tile, vocabulary);
    const TileProducts products(call, rows, tile.rows, [&](int64_t n) {
        ProductShape shape{n, columns, width, false, true};
        shape.operands = call.type(0);
        shape.ldc = tile.stride;
        return shape;
    });
    const bool keeps = call.has_out(2);
    const size_t logits = tile.bytes(sizeof(float));
    return by_types(call.type(0), keeps ? call.type(5) : PONDER_DTYPE_F32,
                    [&]<class H, class P>(H, P) {
                        return call.is(logits + products.workspace(), [=](const Run &run) {
                            float *l = reinterpret_cast<float *>(run.workspace);
                            each_tile(rows, tile.rows, [&](int64_t first, int64_t n) {
                                products.of(n, tile.rows)
                                    .run(run, run.at<const H>(0) + first * width, run.at(1), l,
                                         nullptr, nullptr, run.workspace + logits);
                                rows_kernel<<<unsigned(n), threads, 0, run.stream>>>(
                                    l, run.at<const int32_t>(2) + first, run.at<float>(3) + first,
                                    run.at<float>(4) + first,
                                    keeps ? run.at<P>(5) + first * vocabulary : nullptr, vocabulary,
                                    tile.stride);
                            });
                        });
                    });
}

int32_t plan_cross_entropy_vjp(const Call &call) {
    const int64_t vocabulary = call.dim(0, 2), rows = call.count(0) / vocabulary;
    const int64_t width = call.dim(1, 1);
    const int32_t type = call.type(1); // of the product
    const Tile tile(rows, vocabulary, size_of(type));
    if (type == PONDER_DTYPE_F32 && call.type(4) == PONDER_DTYPE_BF16)
        return PONDER_PLAN_NONE;
    const int64_t columns = rounded(call, 1, tile, vocabulary);
    const TileProducts products(call, rows, tile.rows, [&](int64_t n) {
        ProductShape shape{n, width, columns};
        shape.operands = type;
        shape.result = call.type(4);
        shape.lda = tile.stride;
        return shape;
    });
    const size_t logits = tile.bytes(size_of(type));
    return by_types(call.type(0), type, [&]<class P, class L>(P, L) {
        return by_type(call.type(4), [&]<class DH>(DH) {
            return call.is(logits + products.workspace(), [=](const Run &run) {
                L *dl = reinterpret_cast<L *>(run.workspace);
                each_tile(rows, tile.rows, [&](int64_t first, int64_t n) {
                    logit_gradient<<<dim3(blocks_for(tile.stride, threads), unsigned(n)), threads,
                                     0, run.stream>>>(
                        run.at<const P>(0) + first * vocabulary, run.at<const int32_t>(2) + first,
                        run.at<const float>(3) + first, dl, vocabulary, tile.stride);
                    products.of(n, tile.rows)
                        .run(run, dl, run.at(1), run.at<DH>(4) + first * width, nullptr, nullptr,
                             run.workspace + logits);
                });
            });
        });
    });
}

int32_t plan_cross_entropy_vjp_table(const Call &call) {
    const int64_t vocabulary = call.dim(0, 2), rows = call.count(0) / vocabulary;
    const int64_t width = call.dim(1, 2);
    const int32_t type = call.type(1);
    const Tile tile(rows, vocabulary, size_of(type));
    const int64_t whole = vocabulary < 64 ? vocabulary : vocabulary / 8 * 8;
    const auto shape_of = [&](bool add) {
        return [=](int64_t n) {
            ProductShape shape{whole, width, n, true, false};
            shape.operands = type;
            shape.lda = tile.stride;
            shape.add = add;
            return shape;
        };
    };
    const TileProducts first_of_all(call, rows, tile.rows, shape_of(false));
    const TileProducts others(call, rows, tile.rows, shape_of(true));
    const size_t logits = tile.bytes(size_of(type));
    const size_t workspace = std::max(first_of_all.workspace(), others.workspace());
    return by_types(call.type(0), type, [&]<class P, class L>(P, L) {
        return call.is(logits + workspace, [=](const Run &run) {
            L *dl = reinterpret_cast<L *>(run.workspace);
            float *dtable = run.at<float>(4);
            each_tile(rows, tile.rows, [&](int64_t first, int64_t n) {
                logit_gradient<<<dim3(blocks_for(tile.stride, threads), unsigned(n)), threads, 0,
                                 run.stream>>>(
                    run.at<const P>(0) + first * vocabulary, run.at<const int32_t>(2) + first,
                    run.at<const float>(3) + first, dl, vocabulary, tile.stride);
                (first == 0 ? first_of_all : others)
                    .of(n, tile.rows)
                    .run(run, dl, run.at<const L>(1) + first * width, dtable, nullptr, dtable,
                         run.workspace + logits);
                if (whole < vocabulary)
                    last_words<<<dim3(unsigned(vocabulary - whole), blocks_for(width, 32)),
                                 dim3(32, 32), 0, run.stream>>>(
                        dl + whole, run.at<const L>(1) + first * width, dtable + whole * width, n,
                        width, tile.stride, first > 0);
            });
        });
    });
}

int32_t plan_cross_entropy_parts(const Call &call) {
    const int64_t width = call.dim(0, 2), rows = call.count(0) / width;
    const int64_t vocabulary = call.dim(1, 0);
    for (size_t i : {0, 1, 5})
        if (call.type(i) != PONDER_DTYPE_BF16)
            return PONDER_PLAN_NONE;
    if (call.dim(5, 2) != head_stride(vocabulary) ||
        !head_losses_fit(*call.device, rows, width, vocabulary))
        return PONDER_PLAN_NONE;
    return call.is(head_losses_workspace(rows, vocabulary), [=](const Run &run) {
        head_losses(run, run.at<const bf16>(0), run.at<const bf16>(1), run.at<const int32_t>(2),
                    run.at<float>(3), run.at<float>(4), run.at<bf16>(5), run.at<float>(6), rows,
                    width, vocabulary);
    });
}

int32_t plan_cross_entropy_parts_vjp(const Call &call) {
    const int64_t stride = call.dim(0, 2), rows = call.count(0) / stride;
    const int64_t vocabulary = call.dim(2, 0), width = call.dim(2, 1);
    const bool for_table = call.has_out(1);
    for (size_t i : {0, 2})
        if (call.type(i) != PONDER_DTYPE_BF16)
            return PONDER_PLAN_NONE;
    if (stride != head_stride(vocabulary) || width % 4 ||
        (for_table && (vocabulary < 64 || call.type(5) != PONDER_DTYPE_BF16)))
        return PONDER_PLAN_NONE;
    const int64_t columns = rounded(call, 2, Tile(rows, vocabulary, sizeof(bf16)), vocabulary);
    // A deep product with few tiles is cut into parts, which the kernel behind it adds up. (The
    // library would do so too, with a kernel of its own for the sum.)
    constexpr int64_t tile = 192 * 128;
    int64_t parts = 8;
    while (parts > 1 &&
           (rows * width * parts > call.device->processors * tile || columns % (8 * parts)))
        parts /= 2;
    ProductShape shape{rows, width, columns / parts};
    shape.operands = PONDER_DTYPE_BF16;
    shape.result = call.type(call.out(0));
    shape.lda = stride;
    if (parts > 1) {
        shape.result = PONDER_DTYPE_F32;
        shape.batch = parts;
        shape.stride_a = shape.k;
        shape.stride_b = shape.k * width;
        shape.stride_c = rows * width;
    }
    const auto product = call.device->products().get(shape);
    size_t scratch = product->workspace();
    std::shared_ptr<const Product> table_product;
    const int64_t whole = vocabulary / 8 * 8;
    if (for_table) {
        ProductShape shape{whole, width, rows, true, false};
        shape.operands = PONDER_DTYPE_BF16;
        shape.lda = stride;
        table_product = call.device->products().get(shape);
        scratch = std::max(scratch, table_product->workspace());
    }
    // Behind it first the product's parts, then h as the other one takes it.
    scratch = (scratch + 255) / 256 * 256;
    const size_t rest = std::max(parts > 1 ? size_t(parts * rows * width) * sizeof(float) : 0,
                                 for_table ? size_t(rows * width) * sizeof(bf16) : 0);
    return by_type(call.type(call.out(0)), [&]<class H>(H) {
        return call.is(scratch + rest, [=](const Run &run) {
            const bf16 *const e = run.at<const bf16>(0);
            H *const dh = run.at<H>(6);
            const auto scale = [&](const auto *x, auto *y, int n) {
                using X = std::remove_cvref_t<decltype(*x)>;
                using Y = std::remove_cvref_t<decltype(*y)>;
                launch(run, scale_rows<X, Y>, unsigned(rows), 192, 0, x, run.at<const float>(1),
                       run.at<const int32_t>(3), run.at<const float>(4), y, n, width);
            };
            if (parts > 1) {
                float *const x = reinterpret_cast<float *>(run.workspace + scratch);
                product->run(run, e, run.at(2), x);
                scale(x, dh, parts);
            } else {
                product->run(run, e, run.at(2), dh);
                scale(dh, dh, 1);
            }
            if (!for_table)
                return;
            bf16 *const h = reinterpret_cast<bf16 *>(run.workspace + scratch);
            float *const dtable = run.at<float>(7);
            scale(run.at<const bf16>(5), h, 1);
            table_product->run(run, e, h, dtable);
            if (whole < vocabulary)
                last_words<<<dim3(unsigned(vocabulary - whole), blocks_for(width, 32)),
                             dim3(32, 32), 0, run.stream>>>(e + whole, h, dtable + whole * width,
                                                            rows, width, stride, false);
        });
    });
}

} // namespace ponder::cuda
