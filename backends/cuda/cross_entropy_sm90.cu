// The losses of a head without its logits: a product h table^T whose tiles are summed up where they
// are computed, for Hopper. Sums of a row start from one of its logits c, the target's, which a
// kernel before computes: each tile leaves the sum of e^(l - c) and that of (l - c) e^(l - c) for
// every row, and a kernel behind adds up the tiles of a row. The sum of all, S, is at least 1, and
// -log of the target's probability is log S. Nothing overflows before l - c is 88; rows that come
// near it are computed anew by the last kernel, from their largest logit.
//
// A cluster of two blocks computes 256 rows by 256 words: the blocks have the rows in common with
// nobody and the words with each other, so each loads its rows and half of the words, and the half
// goes to both (TMA multicast). In a block one warp loads, two groups of four warps multiply
// (wgmma, 64 rows each), through a ring of stages. Blocks stay and take tile after tile, so that
// the loads of the next tile run while the sums of the last are made.
//
// Where the logits' gradient is wanted, each tile leaves e^(l - c) in bf16, which has the exponents
// of f32, and the last kernel 1 / S, and for the target 1 - S: times 1 / S, these are p - onehot.
#include "cluster.cuh"
#include "cross_entropy_rows.cuh"
#include "wgmma.cuh"

namespace ponder::cuda {

namespace {

constexpr int rows = 128, words = 256, depth = 64; // of a block's tile; depth of a stage
constexpr int stages = 4, threads = 384, consumers = 8; // warps
constexpr int bytes_h = rows * depth * 2, bytes_table = words * depth * 2;
constexpr int bytes_staged = 16 * 64 * 2; // of a warp's 16 rows, 64 words; there are two
constexpr size_t memory_bytes =
    size_t(stages) * (bytes_h + bytes_table) + consumers * 2 * bytes_staged + 1024 + 256;

// At the same barrier of block `to` of the cluster. What it says is that a stage has been read, by
// products that were waited for: nothing written is to become visible, and a release at the
// cluster's scope would wait for all of the thread's memory accesses, at every stage.
__device__ inline void barrier_arrive(uint64_t *b, int to) {
    asm volatile("{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
                 "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(
                     address(b)),
                 "r"(to)
                 : "memory");
}
__device__ inline void load_for_both(void *to, const CUtensorMap *map, uint64_t *b, int x, int y) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
                 ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(address(to)),
                 "l"(map), "r"(address(b)), "r"(x), "r"(y), "h"(uint16_t(3))
                 : "memory");
}
__device__ inline uint32_t cluster_rank() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// Four 8 x 8 matrices as a product leaves them; lane l gives the address of row l % 8 of one of
// them, l / 8.
__device__ inline void store_matrices(uint32_t to, const uint32_t (&w)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to),
                 "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3])
                 : "memory");
}
// By one thread; what is outside of the matrix is left out.
__device__ inline void store_tile(const CUtensorMap *map, uint32_t from, int x, int y) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];\n"
                 "cp.async.bulk.commit_group;" ::"l"(map),
                 "r"(from), "r"(x), "r"(y)
                 : "memory");
}

// c[64,256] (+)= a[64,16] b[256,16]^T
__device__ inline void multiply(float (&c)[128], uint64_t a, uint64_t b, int add) {
    asm volatile(
        "{\n.reg .pred add;\nsetp.ne.b32 add, %130, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
        "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
        "%128, %129, add, 1, 1, 0, 0;\n}"
        :
          "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7]),
          "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15]),
          "+f"(c[16]), "+f"(c[17]), "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]),
          "+f"(c[24]), "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), "+f"(c[28]), "+f"(c[29]), "+f"(c[30]), "+f"(c[31]),
          "+f"(c[32]), "+f"(c[33]), "+f"(c[34]), "+f"(c[35]), "+f"(c[36]), "+f"(c[37]), "+f"(c[38]), "+f"(c[39]),
          "+f"(c[40]), "+f"(c[41]), "+f"(c[42]), "+f"(c[43]), "+f"(c[44]), "+f"(c[45]), "+f"(c[46]), "+f"(c[47]),
          "+f"(c[48]), "+f"(c[49]), "+f"(c[50]), "+f"(c[51]), "+f"(c[52]), "+f"(c[53]), "+f"(c[54]), "+f"(c[55]),
          "+f"(c[56]), "+f"(c[57]), "+f"(c[58]), "+f"(c[59]), "+f"(c[60]), "+f"(c[61]), "+f"(c[62]), "+f"(c[63]),
          "+f"(c[64]), "+f"(c[65]), "+f"(c[66]), "+f"(c[67]), "+f"(c[68]), "+f"(c[69]), "+f"(c[70]), "+f"(c[71]),
          "+f"(c[72]), "+f"(c[73]), "+f"(c[74]), "+f"(c[75]), "+f"(c[76]), "+f"(c[77]), "+f"(c[78]), "+f"(c[79]),
          "+f"(c[80]), "+f"(c[81]), "+f"(c[82]), "+f"(c[83]), "+f"(c[84]), "+f"(c[85]), "+f"(c[86]), "+f"(c[87]),
          "+f"(c[88]), "+f"(c[89]), "+f"(c[90]), "+f"(c[91]), "+f"(c[92]), "+f"(c[93]), "+f"(c[94]), "+f"(c[95]),
          "+f"(c[96]), "+f"(c[97]), "+f"(c[98]), "+f"(c[99]), "+f"(c[100]), "+f"(c[101]), "+f"(c[102]), "+f"(c[103]),
          "+f"(c[104]), "+f"(c[105]), "+f"(c[106]), "+f"(c[107]), "+f"(c[108]), "+f"(c[109]), "+f"(c[110]), "+f"(c[111]),
          "+f"(c[112]), "+f"(c[113]), "+f"(c[114]), "+f"(c[115]), "+f"(c[116]), "+f"(c[117]), "+f"(c[118]), "+f"(c[119]),
          "+f"(c[120]), "+f"(c[121]), "+f"(c[122]), "+f"(c[123]), "+f"(c[124]), "+f"(c[125]), "+f"(c[126]), "+f"(c[127])
        : "l"(a), "l"(b), "r"(add));
}

constexpr float log2_e = 1.4426950408889634f, log_2 = 0.6931471805599453f;

struct Shape {
    int tokens, width, vocabulary;
    int row_tiles, word_tiles; // of a cluster: 256 rows; of a block: 256 words
};

// kept: [tokens, head_stride] or nothing
template <bool keep>
__global__ __cluster_dims__(2, 1, 1) __launch_bounds__(threads, 1)
void head_kernel(const __grid_constant__ CUtensorMap h, const __grid_constant__ CUtensorMap table,
                 const __grid_constant__ CUtensorMap kept, Shape s, const float *reference,
                 float2 *part) {
    extern __shared__ std::byte raw[];
    std::byte *const memory =
        raw + (1024 - (address(raw) & 1023)) % 1024; // the same in both blocks
    std::byte *const at_h = memory, *const at_table = memory + stages * bytes_h;
    std::byte *const at_staged = at_table + stages * bytes_table,
                    *const behind_all = at_staged + consumers * 2 * bytes_staged;
    uint64_t *const full = reinterpret_cast<uint64_t *>(behind_all), *const empty = full + stages;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int rank = int(cluster_rank()), cluster = blockIdx.x / 2, clusters = gridDim.x / 2;
    if (threadIdx.x == 0) {
        for (int i = 0; i < stages; ++i) {
            barrier_init(full + i, 1);
            barrier_init(empty + i, 2 * consumers);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    cluster_arrive();
    cluster_wait();

    const int tiles = s.row_tiles * s.word_tiles, steps = (s.width + depth - 1) / depth;
    if (warp < 4) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        // Only the kernel before may still run, the references': it let this one start when h was
        // there.
        if (warp == 0 && lane == 0) {
            int stage = 0, phase = 0;
            for (int tile = cluster; tile < tiles; tile += clusters) {
                const int row = tile % s.row_tiles * 2 * rows + rank * rows,
                          word = tile / s.row_tiles * words + rank * (words / 2);
                for (int k = 0; k < steps; ++k) {
                    barrier_wait(empty + stage, phase ^ 1);
                    barrier_expect(full + stage, bytes_h + bytes_table);
                    load_tile(at_h + stage * bytes_h, &h, full + stage, k * depth, row);
                    load_for_both(at_table + stage * bytes_table + rank * (bytes_table / 2),
                                  &table, full + stage, k * depth, word);
                    if (++stage == stages) {
                        stage = 0;
                        phase ^= 1;
                    }
                }
            }
        }
        __syncwarp(); // the cluster's barrier wants whole warps
        if (warp == 0) // perhaps before the references are there: finish_kernel waits for this one
            let_next_start();
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
        const int group = warp / 4 - 1;
        int stage = 0, phase = 0;
        const uint32_t staged = address(at_staged) + (warp - 4) * 2 * bytes_staged;
        float c[128];
        for (int tile = cluster; tile < tiles; tile += clusters) {
            const int word = tile / s.row_tiles * words, column = word + lane % 4 * 2;
            const int first = tile % s.row_tiles * 2 * rows + rank * rows + group * 64 +
                              warp % 4 * 16 + lane / 4;
            float from[2];
            for (int k = 0; k < steps; ++k) {
                if (k + 1 == steps) { // while products run
                    wait_for_earlier();
#pragma unroll
                    for (int half = 0; half < 2; ++half)
                        from[half] = first + 8 * half < s.tokens ? reference[first + 8 * half] : 0;
                }
                barrier_wait(full + stage, phase);
                const uint64_t a = operand(at_h + stage * bytes_h + group * (bytes_h / 2)),
                               b = operand(at_table + stage * bytes_table);
                pin(c);
                products_begin();
#pragma unroll
                for (int i = 0; i < depth / 16; ++i) // 32 bytes on
                    multiply(c, a + 2 * i, b + 2 * i, k + i > 0);
                products_commit();
                products_wait<1>(); // the stage before this one has been read
                if (k > 0 && lane < 2)
                    barrier_arrive(empty + (stage + stages - 1) % stages, lane);
                if (++stage == stages) {
                    stage = 0;
                    phase ^= 1;
                }
            }
            products_wait<0>();
            pin(c);
            if (lane < 2)
                barrier_arrive(empty + (stage + stages - 1) % stages, lane);

            const int behind = s.vocabulary - column; // columns from here on are none
            if (word + words > s.vocabulary)
#pragma unroll
                for (int j = 0; j < 32; ++j)
#pragma unroll
                    for (int i = 0; i < 4; ++i)
                        if (8 * j + i % 2 >= behind)
                            c[4 * j + i] = nothing;
            // In units of log 2. Two sums each, so that fewer wait in a row.
            float sums[2][2] = {}, weighteds[2][2] = {};
            const float offset[2] = {from[0] * log2_e, from[1] * log2_e};
#pragma unroll
            for (int q = 0; q < 4; ++q) {
                const uint32_t to = staged + q % 2 * bytes_staged; // 64 words, 128-byte swizzle
                if (keep) {
                    if (lane == 0) // the store before the last one has been read
                        asm volatile("cp.async.bulk.wait_group.read 1;" ::: "memory");
                    __syncwarp();
                }
#pragma unroll
                for (int j = 8 * q; j < 8 * q + 8; j += 2) {
                    uint32_t w[4];
#pragma unroll
                    for (int n = 0; n < 4; ++n) {
                        const int half = n % 2;
                        float x[2];
#pragma unroll
                        for (int i = 0; i < 2; ++i) {
                            const float d = fmaf(c[4 * (j + n / 2) + 2 * half + i], log2_e,
                                                 -offset[half]);
                            x[i] = power_of_two(d);
                            sums[half][i] += x[i];
                            weighteds[half][i] = fmaf(d, x[i], weighteds[half][i]);
                        }
                        w[n] = pack(x[0], x[1]);
                    }
                    if (keep)
                        store_matrices(to + lane % 16 * 128 +
                                           ((j % 8 + lane / 16) ^ lane % 8) * 16,
                                       w);
                }
                if (keep) {
                    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
                    __syncwarp();
                    if (lane == 0)
                        store_tile(&kept, to, word + 64 * q, first);
                }
            }
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float sum = sums[half][0] + sums[half][1],
                      weighted = weighteds[half][0] + weighteds[half][1];
                sum += __shfl_xor_sync(~0u, sum, 1);
                sum += __shfl_xor_sync(~0u, sum, 2);
                weighted += __shfl_xor_sync(~0u, weighted, 1);
                weighted += __shfl_xor_sync(~0u, weighted, 2);
                const int row = first + 8 * half;
                if (lane % 4 == 0 && row < s.tokens)
                    part[int64_t(row) * s.word_tiles + tile / s.row_tiles] =
                        make_float2(sum, weighted * log_2);
            }
        }
        if (keep && lane == 0) // memory stays until it has been read
            asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
        __syncwarp();
    }
    cluster_arrive(); // nobody leaves while the other block still writes here
    cluster_wait();
}

} // namespace

PFN_cuTensorMapEncodeTiled_v12000 encode_function() {
    static const auto function = [] {
        void *f = nullptr;
        cudaDriverEntryPointQueryResult found;
        if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000,
                                             cudaEnableDefault, &found) != cudaSuccess)
            f = nullptr;
        return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(f);
    }();
    return function;
}

bool describe(CUtensorMap &map, const bf16 *data, int64_t width, int64_t count, int rows) {
    const cuuint64_t size[2] = {cuuint64_t(width), cuuint64_t(count)};
    const cuuint64_t stride[1] = {cuuint64_t(width) * 2};
    const cuuint32_t box[2] = {64, cuuint32_t(rows)}, step[2] = {1, 1};
    return encode_function()(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<bf16 *>(data),
                             size, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
                             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

bool head_losses_fit(const ponder_device &device, int64_t tokens, int64_t width,
                     int64_t vocabulary) {
    return device.major == 9 && width % 8 == 0 && vocabulary >= words && tokens >= 64 &&
           tokens < (1 << 24) && encode_function();
}

size_t head_losses_workspace(int64_t tokens, int64_t vocabulary) {
    const int64_t tiles = (vocabulary + words - 1) / words;
    return size_t(tokens * tiles) * sizeof(float2) + size_t(tokens) * sizeof(float);
}

void head_losses(const Run &run, const bf16 *h, const bf16 *table, const int32_t *target,
                 float *nll, float *entropy, bf16 *e, float *share, int64_t tokens, int64_t width,
                 int64_t vocabulary) {
    const int stride = int(head_stride(vocabulary));
    CUtensorMap map_h, map_table, map_e{};
    if (!describe(map_h, h, width, tokens, rows) ||
        !describe(map_table, table, width, vocabulary, words / 2) ||
        (e && !describe(map_e, e, stride, tokens, 16)))
        return run.device->fail("cross_entropy: cuTensorMapEncodeTiled failed");
    const Shape shape{int(tokens), int(width), int(vocabulary),
                      int((tokens + 2 * rows - 1) / (2 * rows)),
                      int((vocabulary + words - 1) / words)};
    float2 *const part = reinterpret_cast<float2 *>(run.workspace);
    float *const reference = reinterpret_cast<float *>(part + tokens * shape.word_tiles);
    const auto kernel = e ? head_kernel<true> : head_kernel<false>;
    run.device->check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           int(memory_bytes)),
                      "cross_entropy");
    const int clusters =
        std::min(run.device->processors / 2, shape.row_tiles * shape.word_tiles);
    launch(run, reference_kernel, blocks_for(tokens, 8), 256, 0, h, table, target, reference,
           int(tokens), int(width));
    launch(run, kernel, 2 * clusters, threads, memory_bytes, map_h, map_table, map_e, shape,
           reference, part);
    const Head head{h, table, target, nll, entropy, share, e, int(tokens), int(width),
                    int(vocabulary), stride};
    launch(run, finish_kernel, blocks_for(tokens, 8), 256, 0, part, reference, head,
           shape.word_tiles);
}

} // namespace ponder::cuda
