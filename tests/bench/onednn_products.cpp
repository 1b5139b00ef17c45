// The library's own products are measured against oneDNN 2's in cpu_ops_bench; this is the other
// side: its matmul with packed weights, f32 accumulation and a bias, on the shapes of code-10m, in
// 64-row tiles, one core. Prints JSON. Built on request where oneDNN is installed:
//
//     ninja -C build tests/onednn_products && build/tests/onednn_products
#include <oneapi/dnnl/dnnl.hpp>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <omp.h>
#include <vector>

namespace {

using dnnl::memory;

struct Shape {
    int64_t in, out;
};
constexpr Shape shapes[] = {{256, 768}, {256, 256}, {256, 1024}, {1024, 256}, {256, 8192}};
constexpr int64_t rows = 512, tile = 64;

double gflops(const Shape &s, memory::data_type type, size_t element) {
    using tag = memory::format_tag;
    const dnnl::engine engine(dnnl::engine::kind::cpu, 0);
    dnnl::stream stream(engine);
    const memory::desc x({tile, s.in}, type, tag::ab), w({s.in, s.out}, type, tag::any),
        b({1, s.out}, memory::data_type::f32, tag::ab),
        y({tile, s.out}, memory::data_type::f32, tag::ab);
    const dnnl::matmul::primitive_desc description(dnnl::matmul::desc(x, w, b, y), engine);
    dnnl::matmul product(description);
    memory weights(description.weights_desc(), engine), bias(b, engine);
    std::vector<std::byte> in(size_t(rows * s.in) * element);
    std::vector<float> out(size_t(rows * s.out));
    double best = 1e9;
    for (int repeat = 0; repeat < 30; ++repeat) {
        const auto start = std::chrono::steady_clock::now();
        for (int64_t r = 0; r < rows; r += tile) {
            memory from(x, engine, in.data() + size_t(r * s.in) * element),
                to(y, engine, out.data() + r * s.out);
            product.execute(stream, {{DNNL_ARG_SRC, from},
                                     {DNNL_ARG_WEIGHTS, weights},
                                     {DNNL_ARG_BIAS, bias},
                                     {DNNL_ARG_DST, to}});
        }
        const std::chrono::duration<double> time = std::chrono::steady_clock::now() - start;
        best = std::min(best, time.count());
    }
    return 2e-9 * double(rows * s.in * s.out) / best;
}

} // namespace

int main() {
    omp_set_num_threads(1);
    std::printf("{\"library\": \"onednn\", \"tile\": %d, \"threads\": 1, \"products\": [",
                int(tile));
    const char *separator = "";
    for (const Shape &s : shapes) {
        std::printf("%s\n  {\"in\": %d, \"out\": %d, \"f32_gflops\": %.0f, \"bf16_gflops\": %.0f}",
                    separator, int(s.in), int(s.out), gflops(s, memory::data_type::f32, 4),
                    gflops(s, memory::data_type::bf16, 2));
        separator = ",";
    }
    std::printf("\n]}\n");
}
