// What tests of a module's kernels are written with: its calls beside the reference's in f64. The
// CPU module is tested at each instruction set that this machine has. Besides: results do not
// depend on the order of the tasks, and rows not on other rows.
#pragma once

#include "backend/reference/reference.hpp"
#include "op_harness.hpp"

#include <gtest/gtest.h>

#include <dlfcn.h>

namespace ponder::test {

inline const ponder_backend *module() {
    static const ponder_backend *backend = [] {
        const char *path = std::getenv("PONDER_CPU_MODULE");
        void *library = dlopen(path ? path : PONDER_CPU_MODULE, RTLD_NOW | RTLD_LOCAL);
        if (!library)
            throw std::runtime_error(dlerror());
        const auto query =
            reinterpret_cast<ponder_backend_query_fn>(dlsym(library, "ponder_backend_query_v1"));
        return query();
    }();
    return backend;
}

inline bool on_host() { return module()->host_memory != 0; }

struct Case {
    std::string op;
    std::vector<Tensor> in;
    std::vector<Out> out;
    std::vector<double> attr;
};

// One op call on one instruction set, by the level's name in the parameter.
class CpuOps : public testing::TestWithParam<const char *> {
protected:
    void SetUp() override {
        setenv("PONDER_CPU_ISA", GetParam(), 1);
        char why[256] = "";
        if (!module()->probe(why, sizeof why))
            GTEST_SKIP() << why;
        if (std::string(on_host() ? module()->isa() : "device") != GetParam())
            GTEST_SKIP() << "not on this machine";
        runner = std::make_unique<OpRunner>(module());
        oracle = std::make_unique<OpRunner>(reference_backend());
    }
    void TearDown() override { unsetenv("PONDER_CPU_ISA"); }

    // Compares with the reference in f64; both orders of the tasks must agree to the bit.
    void check(const Case &c, double tolerance, const std::string &what) {
        SCOPED_TRACE(c.op + " " + what);
        runner->reversed = false;
        const std::vector<Tensor> ours = runner->run(c.op, c.in, c.out, c.attr);
        runner->reversed = true;
        const std::vector<Tensor> again = runner->run(c.op, c.in, c.out, c.attr);
        std::vector<Tensor> in;
        for (const Tensor &t : c.in)
            in.push_back(t.to(DType::f64));
        std::vector<Out> out = c.out;
        for (Out &o : out)
            if (o.type != DType::none)
                o.type = DType::f64;
        const std::vector<Tensor> expected = oracle->run(c.op, in, out, c.attr);
        for (size_t i = 0; i < ours.size(); ++i) {
            if (ours[i].type == DType::none)
                continue;
            EXPECT_LE(relative_error(ours[i], expected[i]), tolerance) << "output " << i;
            EXPECT_TRUE(identical(ours[i], again[i])) << "output " << i << " depends on the order";
        }
    }

    // Rows of output 0 before the last must not feel the last row of input `changed`.
    void check_rows(Case c, size_t changed) {
        SCOPED_TRACE(c.op + " rows");
        const Tensor before = runner->run(c.op, c.in, c.out, c.attr)[0];
        const Tensor other = c.in[changed].to(DType::f64).to(c.in[changed].type);
        const int64_t width = other.shape.back(), n = other.count();
        for (int64_t i = n - width; i < n; ++i)
            other.set(i, 3.0 + double(i % 7));
        c.in[changed] = other;
        const Tensor after = runner->run(c.op, c.in, c.out, c.attr)[0];
        const size_t row = size_t(before.shape.back()) * size_of(before.type);
        const size_t size = before.block->size() - row;
        EXPECT_EQ(0, std::memcmp(before.block->data(), after.block->data(), size));
        EXPECT_NE(0, std::memcmp(before.block->data() + size, after.block->data() + size, row));
    }

    uint32_t seed = 1;
    Tensor random(DType type, const Shape &shape, double scale = 1) {
        return random_tensor(type, shape, seed++, scale);
    }
    std::unique_ptr<OpRunner> runner, oracle;
};

inline constexpr auto f32 = DType::f32, half = DType::bf16;
inline double limit(DType act, bool gradient = false) {
    return act == half ? 2e-2 : gradient ? 1e-4 : 1e-5;
}
inline std::string shape_name(DType act, int64_t s, int64_t t) {
    return std::string(act == half ? "bf16" : "f32") + " S=" + std::to_string(s) +
           " T=" + std::to_string(t);
}

struct Length {
    int64_t s, t;
};
inline constexpr Length lengths[] = {{1, 1}, {2, 2}, {1, 63}, {1, 64}, {3, 65}, {2, 130}, {1, 512}};

} // namespace ponder::test
