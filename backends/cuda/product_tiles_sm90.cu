// Products of few rows of bf16 on Hopper: what the library does not do in one launch. A block
// computes 128 x 128; one warp loads tiles through a ring of stages (TMA), two groups of four warps
// multiply (wgmma, 64 rows each).
//
// lora_linear and its vjp: the narrow side u is 16 more columns of the same rows; in the end u
// times the other factor is one more product onto the sums that are in registers already. Fast
// weights are f32 and enter as two bf16 numbers, what fits and the rest of it (fragments.cuh); all
// that a block needs of them is converted before the first product, while the first tiles are on
// their way, and where nobody just wrote them while the kernel before still runs. Where there are
// fewer tiles than multiprocessors the depth is cut into SPLIT parts, the blocks of a cluster: u of
// a part is as good as u of all, since sums over the parts of x w + (x a) bb are what is wanted.
// Sums meet in shared memory, also those of one part: what becomes of them is then a short loop
// over whole rows, and not straight-line code of 64 sums, which takes longer to fetch than to run.
//
// linear_group: tiles of several products of the same rows; blocks of its own have a narrow f32
// matrix, in the place of the narrow side.
#include "cluster.cuh"
#include "gelu.cuh"
#include "launch.cuh"
#include "lora_linear.hpp"
#include "product_tiles.hpp"
#include "wgmma.cuh"

namespace ponder::cuda {

namespace {

constexpr int rows = 128, columns = 128, depth = 64; // of a block's tile; depth of a stage
constexpr int stages = 5, most_depth = 768;          // of a block
constexpr int ranks = 16, threads = 384, consumers = 256;
constexpr int bytes_x = rows * depth * 2, bytes_w = columns * depth * 2;
constexpr int bytes_factor = 2 * ranks * 64 * 2; // for 64 places of depth or columns
constexpr int bytes_ring = stages * (bytes_x + bytes_w);
constexpr int bytes_left = most_depth / 64 * bytes_factor,
              bytes_right = columns / 64 * bytes_factor;
constexpr size_t memory_bytes =
    1024 + bytes_ring + bytes_left + bytes_right + columns * 4 + 2 * stages * 8;
constexpr int pitch = columns + ranks + 4; // of sums in shared memory
static_assert(rows * pitch * 4 <= bytes_ring && memory_bytes <= 227 * 1024);

// c[64,128] (+)= a[64,16] b, which is [128,16]^T or, read across its rows, [16,128]
template <bool across>
__device__ inline void multiply(float (&c)[64], uint64_t a, uint64_t b, int add) {
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %66, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
                 "}, %64, %65, add, 1, 1, 0, %67;\n}"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]),
                   "+f"(c[6]), "+f"(c[7]), "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]),
                   "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15]), "+f"(c[16]), "+f"(c[17]),
                   "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]),
                   "+f"(c[24]), "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), "+f"(c[28]), "+f"(c[29]),
                   "+f"(c[30]), "+f"(c[31]), "+f"(c[32]), "+f"(c[33]), "+f"(c[34]), "+f"(c[35]),
                   "+f"(c[36]), "+f"(c[37]), "+f"(c[38]), "+f"(c[39]), "+f"(c[40]), "+f"(c[41]),
                   "+f"(c[42]), "+f"(c[43]), "+f"(c[44]), "+f"(c[45]), "+f"(c[46]), "+f"(c[47]),
                   "+f"(c[48]), "+f"(c[49]), "+f"(c[50]), "+f"(c[51]), "+f"(c[52]), "+f"(c[53]),
                   "+f"(c[54]), "+f"(c[55]), "+f"(c[56]), "+f"(c[57]), "+f"(c[58]), "+f"(c[59]),
                   "+f"(c[60]), "+f"(c[61]), "+f"(c[62]), "+f"(c[63])
                 : "l"(a), "l"(b), "r"(add), "n"(int(across)));
}
// c[64,32] (+)= a[64,16] b[32,16]^T
__device__ inline void multiply(float (&c)[16], uint64_t a, uint64_t b, int add) {
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %18, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
                 "}, %16, %17, add, 1, 1, 0, 0;\n}"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]),
                   "+f"(c[6]), "+f"(c[7]), "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]),
                   "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15])
                 : "l"(a), "l"(b), "r"(add));
}
// c[64,128] += a[64,16] b[16,128]
__device__ inline void multiply(float (&c)[64], const uint32_t *a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
                 "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]),
                   "+f"(c[6]), "+f"(c[7]), "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]),
                   "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15]), "+f"(c[16]), "+f"(c[17]),
                   "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]),
                   "+f"(c[24]), "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), "+f"(c[28]), "+f"(c[29]),
                   "+f"(c[30]), "+f"(c[31]), "+f"(c[32]), "+f"(c[33]), "+f"(c[34]), "+f"(c[35]),
                   "+f"(c[36]), "+f"(c[37]), "+f"(c[38]), "+f"(c[39]), "+f"(c[40]), "+f"(c[41]),
                   "+f"(c[42]), "+f"(c[43]), "+f"(c[44]), "+f"(c[45]), "+f"(c[46]), "+f"(c[47]),
                   "+f"(c[48]), "+f"(c[49]), "+f"(c[50]), "+f"(c[51]), "+f"(c[52]), "+f"(c[53]),
                   "+f"(c[54]), "+f"(c[55]), "+f"(c[56]), "+f"(c[57]), "+f"(c[58]), "+f"(c[59]),
                   "+f"(c[60]), "+f"(c[61]), "+f"(c[62]), "+f"(c[63])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
// An operand that is read across its rows and wider than 64: `apart` bytes to the next 64 columns.
__device__ inline uint64_t wide_operand(const void *p, int apart) {
    const uint64_t at = (address(p) & 0x3ffff) >> 4;
    return at | uint64_t(apart >> 4) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

// A factor [16, 64 n] in shared memory: for each 64 places two tiles of 16 rows, what fits and the
// rest. Here places i .. i + COUNT - 1 of rank r.
template <int COUNT> __device__ inline void put(std::byte *to, int r, int i, const float *x) {
    uint32_t fits[COUNT / 2], rest[COUNT / 2];
#pragma unroll
    for (int j = 0; j < COUNT / 2; ++j) {
        const float a = x[2 * j], b = x[2 * j + 1];
        fits[j] = pack(a, b);
        rest[j] =
            pack(a - __uint_as_float(fits[j] << 16), b - __uint_as_float(fits[j] & 0xffff0000u));
    }
    std::byte *const at =
        to + i / 64 * bytes_factor + r * 128 + ((i % 64 / 8) ^ (r & 7)) * 16 + i % 8 * 2;
    if constexpr (COUNT == 8) {
        *reinterpret_cast<uint4 *>(at) = make_uint4(fits[0], fits[1], fits[2], fits[3]);
        *reinterpret_cast<uint4 *>(at + ranks * 128) =
            make_uint4(rest[0], rest[1], rest[2], rest[3]);
    } else {
        *reinterpret_cast<uint2 *>(at) = make_uint2(fits[0], fits[1]);
        *reinterpret_cast<uint2 *>(at + ranks * 128) = make_uint2(rest[0], rest[1]);
    }
}
// A thread's share of a factor on its way: all loads first, so that those of two factors run
// together. From [16, stride], `count` places.
template <int MOST> struct Rows {
    static constexpr int turns = (ranks * MOST / 8 + threads - 1) / threads;
    float4 x[turns][2];
    __device__ void load(const float *from, int64_t stride, int count, int) {
        const int each = count / 8;
#pragma unroll
        for (int t = 0; t < turns; ++t)
            if (const int item = t * threads + int(threadIdx.x); item < ranks * each) {
                const float4 *const at =
                    reinterpret_cast<const float4 *>(from + item / each * stride + item % each * 8);
                x[t][0] = at[0];
                x[t][1] = at[1];
            }
    }
    __device__ void put_to(std::byte *to, int count, float scale) const {
        const int each = count / 8;
#pragma unroll
        for (int t = 0; t < turns; ++t)
            if (const int item = t * threads + int(threadIdx.x); item < ranks * each) {
                const float all[8] = {scale * x[t][0].x, scale * x[t][0].y, scale * x[t][0].z,
                                      scale * x[t][0].w, scale * x[t][1].x, scale * x[t][1].y,
                                      scale * x[t][1].z, scale * x[t][1].w};
                put<8>(to, item / each, item % each * 8, all);
            }
    }
};
// From [count, rank]; zeros behind the rank, which is a multiple of 4.
template <int MOST> struct Columns {
    static constexpr int turns = (MOST + threads - 1) / threads;
    float4 x[turns][4];
    __device__ void load(const float *from, int64_t, int count, int rank) {
#pragma unroll
        for (int t = 0; t < turns; ++t)
            if (const int item = t * threads + int(threadIdx.x); item < count)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    x[t][i] = item % 4 * 4 < rank
                                  ? *reinterpret_cast<const float4 *>(
                                        from + (item / 4 * 4 + i) * rank + item % 4 * 4)
                                  : make_float4(0, 0, 0, 0);
    }
    __device__ void put_to(std::byte *to, int count, float scale) const {
#pragma unroll
        for (int t = 0; t < turns; ++t)
            if (const int item = t * threads + int(threadIdx.x); item < count) {
                const int r = item % 4 * 4, i = item / 4 * 4;
                const float all[4][4] = {
                    {scale * x[t][0].x, scale * x[t][1].x, scale * x[t][2].x, scale * x[t][3].x},
                    {scale * x[t][0].y, scale * x[t][1].y, scale * x[t][2].y, scale * x[t][3].y},
                    {scale * x[t][0].z, scale * x[t][1].z, scale * x[t][2].z, scale * x[t][3].z},
                    {scale * x[t][0].w, scale * x[t][1].w, scale * x[t][2].w, scale * x[t][3].w}};
#pragma unroll
                for (int j = 0; j < 4; ++j)
                    put<4>(to, r + j, i, all[j]);
            }
    }
};

// Four neighbours that lie at the same place in each block's memory, on their way.
template <int SPLIT> struct ClusterSum {
    float4 x[SPLIT];
    __device__ void load(const float *mine) {
#pragma unroll
        for (int block = 0; block < SPLIT; ++block)
            if constexpr (SPLIT == 1)
                x[block] = *reinterpret_cast<const float4 *>(mine);
            else
                asm volatile("{\n.reg .b32 at;\nmapa.shared::cluster.u32 at, %4, %5;\n"
                             "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [at];\n}"
                             : "=f"(x[block].x), "=f"(x[block].y), "=f"(x[block].z),
                               "=f"(x[block].w)
                             : "r"(address(mine)), "r"(block)
                             : "memory");
    }
    __device__ float4 sum() const {
        float4 sum = x[0];
#pragma unroll
        for (int block = 1; block < SPLIT; ++block) {
            sum.x += x[block].x;
            sum.y += x[block].y;
            sum.z += x[block].z;
            sum.w += x[block].w;
        }
        // Here and not later: the loads have come.
        asm volatile("" : "+f"(sum.x), "+f"(sum.y), "+f"(sum.z), "+f"(sum.w)::"memory");
        return sum;
    }
};

// What becomes of results: a copy of them is kept, and their gelu is written instead; or they are
// multiplied with the slope of gelu.
struct Finish {
    bf16 *kept;
    bool gelu;
    bool early;         // w is a constant, which no kernel just before this one writes
    bool early_factors; // nor the factors
    const bf16 *slope_at;
    template <int N> __device__ void apply(float (&x)[N], int64_t at) const {
        if (kept)
#pragma unroll
            for (int i = 0; i < N; i += 2)
                *reinterpret_cast<uint32_t *>(kept + at + i) = pack(x[i], x[i + 1]);
        if (gelu)
#pragma unroll
            for (int i = 0; i < N; ++i)
                x[i] = gelu_of(x[i]);
    }
};

// A product with [depth,rank] of which nothing but the result is wanted.
struct Aside {
    const float *b;
    float *y; // [rows,rank]
    bool sigmoid;
};

// The narrow side: none; that of a low-rank product; a product that is nothing else.
enum Narrow { nothing, low_rank, alone };

// Forward: w is [depth,width], read across its rows, left [depth,16], right [16,width].
// Backward: w is [width,depth], left [16,depth], right [width,16].
template <int SPLIT, bool back, Narrow kind, class Y>
__device__ inline void tile_of(const CUtensorMap *x, const CUtensorMap *w,
                               const Prepare<bf16, Y> &p, const Finish &finish, int tile,
                               const Aside &other = {}) {
    constexpr bool lora = kind == low_rank;
    extern __shared__ std::byte raw[];
    std::byte *const memory = raw + (1024 - (address(raw) & 1023)) % 1024;
    std::byte *const at_x = memory, *const at_w = memory + stages * bytes_x,
                     *const left = memory + bytes_ring, *const right = left + bytes_left;
    float *const bias = reinterpret_cast<float *>(right + bytes_right);
    uint64_t *const full = reinterpret_cast<uint64_t *>(bias + columns), *const empty =
                                                                             full + stages;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int part = int(blockIdx.x) % SPLIT;
    const int row0 = int(blockIdx.y) * rows, steps = p.depth / depth / SPLIT,
              depth0 = part * steps * depth;
    const int64_t s = row0 / p.tokens;
    if (threadIdx.x == consumers) {
        for (int i = 0; i < stages; ++i) {
            barrier_init(full + i, 1);
            barrier_init(empty + i, consumers / 32);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncwarp();

    const auto fetch_w = [&](int i) { // by one thread, as the next
        const int stage = i % stages, k = depth0 + i * depth;
        std::byte *const to = at_w + stage * bytes_w;
        barrier_expect(full + stage, bytes_x + (kind == alone ? 0 : bytes_w));
        for (int half = 0; kind != alone && half < 2; ++half)
            load_tile(to + half * (bytes_w / 2), w, full + stage, back ? k : tile + 64 * half,
                      back ? tile + 64 * half : k);
    };
    const auto fetch_x = [&](int i) {
        load_tile(at_x + i % stages * bytes_x, x, full + i % stages, depth0 + i * depth, row0);
    };
    if (finish.early && threadIdx.x == consumers)
        for (int i = 0; i < min(stages, steps); ++i)
            fetch_w(i);
    __syncwarp();
    const auto take_factors = [&] {
        if constexpr (kind != nothing) {
            using Left = std::conditional_t<back, Rows<most_depth>, Columns<most_depth>>;
            using Right = std::conditional_t<back, Columns<columns>, Rows<columns>>;
            const int count = steps * depth;
            Left l;
            l.load(p.left + s * p.depth * p.rank + int64_t(depth0) * (back ? 1 : p.rank), p.depth,
                   count, p.rank);
            if constexpr (lora) {
                Right r;
                r.load(p.right + s * p.width * ranks + int64_t(tile) * (back ? ranks : 1), p.width,
                       columns, ranks);
                l.put_to(left, count, 1);
                r.put_to(right, columns, p.scale_base);
            } else {
                l.put_to(left, count, 1);
            }
        }
    };
    const auto begin = [&] {
        wait_for_earlier();
        if (threadIdx.x == consumers)
            for (int i = 0; i < min(stages, steps); ++i) {
                if (!finish.early)
                    fetch_w(i);
                fetch_x(i);
            }
        __syncwarp();
    };
    if (!finish.early_factors)
        begin();
    take_factors();
    if (finish.early_factors)
        begin();
    if (kind != alone && threadIdx.x < columns)
        bias[threadIdx.x] = p.b ? p.b[tile + threadIdx.x] : 0.0f;
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); // products read what was put
    __syncthreads();

    const int group = warp / 4, row = group * 64 + warp % 4 * 16 + lane / 4, column = lane % 4 * 2;
    // In the end each block adds up some of the rows, `step` at a time, a few times in a row; what
    // it needs of memory for the first few is on its way from here on.
    constexpr int own = rows / SPLIT, step = consumers / (columns / 4), few = 4;
    constexpr int turns = own / step;
    const int own_row = int(threadIdx.x) / (columns / 4),
              own_column = int(threadIdx.x) % (columns / 4) * 4;
    const int64_t first_own = row0 + part * own,
                  own_place = (first_own + own_row) * p.width + tile + own_column;
    struct Few {
        float4 added[few];
        Pack<bf16, 4> before[few];
    };
    const auto fetch_few = [&](int turn) {
        Few f{};
#pragma unroll
        for (int t = 0; t < few; ++t) {
            const int64_t from = own_place + int64_t(turn + t) * step * p.width;
            if (p.add)
                f.added[t] = *reinterpret_cast<const float4 *>(p.add + from);
            if (finish.slope_at)
                f.before[t] = load<4>(finish.slope_at + from);
        }
        return f;
    };
    Few next;
    if constexpr (kind != alone)
        if (threadIdx.x < consumers)
            next = fetch_few(0);
    if (threadIdx.x >= consumers) {
        if (threadIdx.x == consumers)
            for (int i = stages; i < steps; ++i) {
                barrier_wait(empty + i % stages, (i / stages - 1) & 1);
                fetch_w(i);
                fetch_x(i);
            }
        __syncwarp(); // the cluster's barrier wants whole warps
    } else {
        float c[64], u[16];
        for (int i = 0; i < steps; ++i) {
            const int stage = i % stages;
            barrier_wait(full + stage, i / stages & 1);
            const uint64_t a = operand(at_x + stage * bytes_x + group * (bytes_x / 2)),
                           l = operand(left + i * bytes_factor);
            const uint64_t b = back ? operand(at_w + stage * bytes_w)
                                    : wide_operand(at_w + stage * bytes_w, bytes_w / 2);
            pin(c);
            if constexpr (kind != nothing)
                pin(u);
            products_begin();
#pragma unroll
            for (int j = 0; j < depth / 16; ++j) {
                if constexpr (kind != alone)
                    multiply<!back>(c, a + 2 * j, b + (back ? 2 : 128) * j, i + j > 0);
                if constexpr (kind != nothing)
                    multiply(u, a + 2 * j, l + 2 * j, i + j > 0);
            }
            products_commit();
            products_wait<1>(); // the stage before this one has been read
            if (i > 0 && lane == 0)
                barrier_arrive(empty + (i - 1) % stages);
        }
        products_wait<0>();
        pin(c);
        float narrow[8];
        uint32_t packed[4];
        if constexpr (kind == alone) {
            pin(u);
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const int at = j / 2 * 8 + column + j % 2, e = j / 2 * 4 + 2 * half + j % 2;
                    if (at >= p.rank)
                        continue;
                    const float y = u[e] + u[8 + e] + (other.b ? other.b[at] : 0.0f);
                    other.y[int64_t(row0 + row + 8 * half) * p.rank + at] =
                        other.sigmoid ? 1 / (1 + expf(-y)) : y;
                }
        }
        if constexpr (lora) {
            pin(u);
#pragma unroll
            for (int j = 0; j < 8; ++j)
                narrow[j] = p.scale_u * (u[j] + u[8 + j]);
#pragma unroll
            for (int j = 0; j < 4; ++j)
                packed[j] = pack(narrow[2 * j], narrow[2 * j + 1]);
            pin(c);
            products_begin();
            multiply(c, packed, wide_operand(right, bytes_factor));
            multiply(c, packed, wide_operand(right + ranks * 128, bytes_factor));
            products_commit();
            products_wait<0>();
            pin(c);
        }

        if constexpr (lora && SPLIT == 1)
            if (tile == 0)
#pragma unroll
                for (int j = 0; j < 4; ++j) // of row + 8 (j % 2), ranks 8 (j / 2) + column
                    *reinterpret_cast<uint32_t *>(p.u + int64_t(row0 + row + j % 2 * 8) * ranks +
                                                  j / 2 * 8 + column) = packed[j];
        if constexpr (kind != alone) {
            float *const sums = reinterpret_cast<float *>(memory);
            asm volatile("bar.sync 1, %0;" ::"n"(consumers) : "memory"); // stages are free
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float *const to = sums + (row + 8 * half) * pitch + column;
#pragma unroll
                for (int j = 0; j < columns / 8; ++j)
                    *reinterpret_cast<float2 *>(to + 8 * j) =
                        make_float2(c[4 * j + 2 * half], c[4 * j + 2 * half + 1]);
                if constexpr (lora && SPLIT > 1)
#pragma unroll
                    for (int j = 0; j < 2; ++j)
                        *reinterpret_cast<float2 *>(to + columns + 8 * j) =
                            make_float2(narrow[4 * j + 2 * half], narrow[4 * j + 2 * half + 1]);
            }
        }
    }
    let_next_start(); // a block's first call counts: that of warps that neither load nor multiply
    if constexpr (kind == alone)
        return;
    if constexpr (SPLIT > 1) {
        cluster_arrive();
        cluster_wait();
    }
    if (threadIdx.x < consumers) {
        if constexpr (SPLIT == 1)
            asm volatile("bar.sync 1, %0;" ::"n"(consumers) : "memory");
        const float *const mine = reinterpret_cast<const float *>(memory) + part * own * pitch;
        const float4 shift = *reinterpret_cast<const float4 *>(bias + own_column);
        const int r_of_u = int(threadIdx.x) / 4, rank_of_u = int(threadIdx.x) % 4 * 4;
        const bool has_u = lora && SPLIT > 1 && tile == 0 && r_of_u < own;
        ClusterSum<SPLIT> of_u;
        if (has_u)
            of_u.load(mine + r_of_u * pitch + columns + rank_of_u);
#pragma unroll 1
        for (int turn = 0; turn < turns; turn += few) {
            const Few now = next;
            ClusterSum<SPLIT> all[few];
#pragma unroll
            for (int t = 0; t < few; ++t)
                all[t].load(mine + (own_row + (turn + t) * step) * pitch + own_column);
            if (turn + few < turns)
                next = fetch_few(turn + few);
#pragma unroll
            for (int t = 0; t < few; ++t) {
                const float4 x = all[t].sum();
                float y[4] = {x.x + (now.added[t].x + shift.x), x.y + (now.added[t].y + shift.y),
                              x.z + (now.added[t].z + shift.z), x.w + (now.added[t].w + shift.w)};
                const int64_t to = own_place + int64_t(turn + t) * step * p.width;
                finish.apply(y, to);
                if (finish.slope_at)
#pragma unroll
                    for (int j = 0; j < 4; ++j)
                        y[j] *= gelu_slope(now.before[t][j]);
                Pack<Y, 4> out;
#pragma unroll
                for (int j = 0; j < 4; ++j)
                    out.set(j, y[j]);
                store<4>(p.base + to, out);
            }
        }
        if (has_u) {
            const float4 x = of_u.sum();
            *reinterpret_cast<uint2 *>(p.u + (first_own + r_of_u) * ranks + rank_of_u) =
                make_uint2(pack(x.x, x.y), pack(x.z, x.w));
        }
    }
    if constexpr (SPLIT > 1) {
        __syncwarp();
        cluster_arrive_relaxed();
        cluster_wait(); // nobody leaves while another block still reads its sums
    }
}

template <int SPLIT, bool back, class Y>
__global__ __cluster_dims__(SPLIT, 1, 1)
    __launch_bounds__(threads, 1) void tiles_kernel(const __grid_constant__ CUtensorMap x,
                                                    const __grid_constant__ CUtensorMap w,
                                                    const __grid_constant__ Prepare<bf16, Y> p,
                                                    const Finish finish) {
    tile_of<SPLIT, back, low_rank, Y>(&x, &w, p, finish, int(blockIdx.x) / SPLIT * columns);
}

struct Maps {
    CUtensorMap map[most_members];
};

__global__ __launch_bounds__(threads, 1) void group_kernel(const __grid_constant__ CUtensorMap x,
                                                           const __grid_constant__ Maps w,
                                                           const __grid_constant__ ProductGroup g) {
    int which = 0, tile = int(blockIdx.x);
    for (; which < g.count && tile >= g.member[which].width / columns; ++which)
        tile -= g.member[which].width / columns;
    if (which == g.count) { // the blocks behind the last tile
        const Prepare<bf16, float> p{nullptr, g.left,  nullptr, nullptr, nullptr, nullptr, nullptr,
                                     g.rows,  g.depth, 0,       g.rank,  1,       1};
        return tile_of<1, false, alone>(&x, &w.map[0], p, {}, 0,
                                        Aside{g.left_bias, g.narrow, g.sigmoid});
    }
    const GroupMember &m = g.member[which];
    const Finish finish{nullptr, m.gelu, false, false, nullptr};
    const auto run = [&]<class Y>(Y *y) {
        const Prepare<bf16, Y> p{nullptr, g.left,  nullptr, nullptr, nullptr, m.bias, y,
                                 g.rows,  g.depth, m.width, g.rank,  1,       1};
        tile_of<1, false, nothing>(&x, &w.map[which], p, finish, tile * columns);
    };
    if (m.wide)
        run(static_cast<float *>(m.y));
    else
        run(static_cast<bf16 *>(m.y));
}

// Parts of the depth; 0 where the tiles are more than multiprocessors, so that the library and a
// launch before it have enough to do, or there is no way.
int parts(const ponder_device &device, int64_t rows_, int64_t depth_, int64_t width) {
    if (device.major != 9 || rows_ % rows != 0 || width % columns != 0 || depth_ % depth != 0 ||
        rows_ >= (1 << 24) || !encode_function())
        return 0;
    const int64_t tiles = rows_ / rows * (width / columns);
    for (int split : {4, 2, 1})
        if (tiles * split <= device.processors && depth_ % (split * depth) == 0 &&
            depth_ / split <= most_depth)
            return split;
    return 0;
}

template <bool back, class Y>
void queue(const Run &run, const Prepare<bf16, Y> &p, const bf16 *w, int64_t streams,
           const Finish &finish) {
    CUtensorMap map_x, map_w;
    const int64_t all = streams * p.tokens;
    if (!describe(map_x, p.x, p.depth, all, rows) ||
        !(back ? describe(map_w, w, p.depth, p.width, columns / 2)
               : describe(map_w, w, p.width, p.depth, depth)))
        return run.device->fail("product: cuTensorMapEncodeTiled failed");
    const int split = parts(*run.device, all, p.depth, p.width);
    const auto kernel = split == 4   ? tiles_kernel<4, back, Y>
                        : split == 2 ? tiles_kernel<2, back, Y>
                                     : tiles_kernel<1, back, Y>;
    run.device->check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           int(memory_bytes)),
                      "product");
    launch(run, kernel, dim3(unsigned(split * p.width / columns), unsigned(all / rows)), threads,
           memory_bytes, map_x, map_w, p, finish);
}

} // namespace

bool lora_tiles_fit(const ponder_device &device, int64_t streams, int64_t tokens, int64_t depth,
                    int64_t width, int64_t rank) {
    return rank == ranks && tokens % rows == 0 && parts(device, streams * tokens, depth, width) > 0;
}

template <bool back, class Y>
void lora_tiles(const Run &run, const Prepare<bf16, Y> &p, const bf16 *w, int64_t streams,
                bool constant, const LoraGelu &gelu) {
    const auto settled = [&](const float *factor, int64_t length) {
        return run.device->settled(factor, size_t(streams * length * ranks) * sizeof(float));
    };
    queue<back>(run, p, w, streams,
                {gelu.kept, gelu.forward, constant,
                 settled(p.left, p.depth) && settled(p.right, p.width), gelu.slope_at});
}

template void lora_tiles<false>(const Run &, const Prepare<bf16, bf16> &, const bf16 *, int64_t,
                                bool, const LoraGelu &);
template void lora_tiles<false>(const Run &, const Prepare<bf16, float> &, const bf16 *, int64_t,
                                bool, const LoraGelu &);
template void lora_tiles<true>(const Run &, const Prepare<bf16, bf16> &, const bf16 *, int64_t,
                               bool, const LoraGelu &);

bool product_group_fit(const ponder_device &device, int64_t rows_, int64_t depth_, int64_t width,
                       int64_t rank) {
    return device.major == 9 && rows_ % rows == 0 && depth_ % depth == 0 && width % columns == 0 &&
           rows_ < (1 << 24) && depth_ < (1 << 24) && encode_function() &&
           rows_ / rows * (width / columns + (rank > 0)) <= device.processors &&
           (rank == 0 || (rank <= ranks && rank % 4 == 0 && depth_ <= most_depth));
}

void product_group(const Run &run, const ProductGroup &g) {
    CUtensorMap x;
    Maps w{};
    int tiles = 0;
    bool ok = describe(x, g.x, g.depth, g.rows, rows);
    for (int i = 0; i < g.count; ++i) {
        tiles += g.member[i].width / columns;
        ok = ok && describe(w.map[i], g.member[i].w, g.member[i].width, g.depth, depth);
    }
    if (!ok)
        return run.device->fail("linear_group: cuTensorMapEncodeTiled failed");
    run.device->check(cudaFuncSetAttribute(group_kernel,
                                           cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           int(memory_bytes)),
                      "linear_group");
    launch(run, group_kernel, dim3(unsigned(tiles + (g.left != nullptr)), unsigned(g.rows / rows)),
           threads, memory_bytes, x, w, g);
}

} // namespace ponder::cuda
