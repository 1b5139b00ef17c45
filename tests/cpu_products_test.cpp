// Products of a module: with weights of floats and of int8, of low rank, with what is done in one
// call with them. f32 and bf16, odd sizes, tails, several streams.
#include "cpu_ops.hpp"

#include <array>

namespace ponder::test {
namespace {

TEST_P(CpuOps, Linear) {
    struct {
        int64_t k, n;
    } sizes[] = {{1, 1}, {7, 5}, {64, 192}, {100, 33}, {256, 48}, {129, 70}};
    for (const Length &n : lengths)
        for (DType act : {f32, half})
            for (const auto &z : sizes)
                for (int variant = 0; variant < 4; ++variant) {
                    const bool transposed = variant & 1, full = variant & 2;
                    const Shape y = {n.s, n.t, z.n};
                    check({"linear",
                           {random(act, {n.s, n.t, z.k}),
                            random(act, transposed ? Shape{z.n, z.k} : Shape{z.k, z.n}).frozen(),
                            full ? random(f32, {z.n}).frozen() : none(),
                            full ? random(f32, y) : none()},
                           {{full ? f32 : act, y}},
                           {double(transposed)}},
                          limit(act), shape_name(act, n.s, n.t) + " K=" + std::to_string(z.k));
                }
    // A gradient in f32 meets a bf16 weight.
    check({"linear",
           {random(f32, {1, 66, 40}), random(half, {40, 50}).frozen(), none(), none()},
           {{half, {1, 66, 50}}},
           {0}},
          2e-2, "mixed");
    for (DType act : {f32, half})
        check_rows({"linear",
                    {random(act, {1, 70, 33}), random(act, {33, 40}).frozen(), none(), none()},
                    {{act, {1, 70, 40}}},
                    {0}},
                   0);
}

// As when a text is written: on devices a kernel of its own.
TEST_P(CpuOps, LinearOfFewRows) {
    for (const auto &[t, k, n] :
         {std::array<int64_t, 3>{1, 768, 96}, {2, 64, 2304}, {3, 72, 40}, {5, 1096, 8},
          {8, 136, 1104}, {9, 136, 1104}})
        for (int variant = 0; variant < 4; ++variant) {
            const bool transposed = variant & 1, full = variant & 2;
            const int64_t columns = transposed ? n + 3 : n;
            const Shape y = {1, t, columns};
            check({"linear",
                   {random(half, {1, t, k}),
                    random(half, transposed ? Shape{columns, k} : Shape{k, columns}).frozen(),
                    full ? random(f32, {columns}).frozen() : none(), full ? random(f32, y) : none()},
                   {{full ? f32 : half, y}},
                   {double(transposed)}},
                  limit(half), shape_name(half, 1, t) + " K=" + std::to_string(k));
        }
}

// Products of the same rows, one of them narrow; no op of the reference.
TEST_P(CpuOps, LinearGroup) {
    if (on_host())
        GTEST_SKIP() << "only programs on other devices ask for it";
    for (int64_t k : {64, 448, 768})
        for (bool with_narrow : {false, true}) {
            SCOPED_TRACE(k);
            const int64_t t = with_narrow ? 256 : 128; // an even and an odd number of tiles
            const Tensor x = random(half, {1, t, k});
            struct {
                int64_t n;
                DType weight, out;
                double form;
                bool bias;
            } members[] = {{256, f32, f32, 0, false},
                           {128, half, half, 0, true},
                           {128, f32, half, 1, false},
                           {12, f32, f32, 2, true}};
            std::vector<Tensor> in = {x}, ours;
            std::vector<Out> outs;
            std::vector<double> forms;
            for (const auto &m : members)
                if (m.n > 16 || with_narrow) {
                    in.push_back(random(m.weight, {k, m.n}).frozen());
                    in.push_back(m.bias ? random(f32, {m.n}).frozen() : none());
                    outs.push_back({m.out, {1, t, m.n}});
                    forms.push_back(m.form);
                }
            std::string why;
            const int32_t answer = runner->try_run("linear_group", in, outs, forms, ours, why);
            if (answer == PONDER_PLAN_NONE)
                GTEST_SKIP() << "no such op";
            ASSERT_EQ(PONDER_PLAN_OK, answer) << why;
            for (size_t i = 0; i < outs.size(); ++i) {
                const Out f64{DType::f64, outs[i].shape};
                Tensor y = oracle->run("linear",
                                       {x.to(DType::f64), in[1 + 2 * i].to(DType::f64),
                                        in[2 + 2 * i].to(DType::f64), none()},
                                       {f64}, {0})[0];
                if (forms[i])
                    y = oracle->run(forms[i] == 1 ? "gelu" : "sigmoid", {y}, {f64})[0];
                EXPECT_LE(relative_error(ours[i], y), limit(half)) << i;
            }
        }
}

// Large enough that a device may leave plain f32 arithmetic; elements of very different sizes.
TEST_P(CpuOps, LargeF32Products) {
    const int64_t t = 520, k = 264, n = 256;
    const Tensor x = random(f32, {1, t, k}), w = random(f32, {k, n}), dy = random(f32, {1, t, n});
    for (int64_t i = 0; i < x.count(); i += 7)
        x.set(i, 1e3 * x.at(i));
    for (int64_t i = 0; i < w.count(); i += 5)
        w.set(i, 1e-4 * w.at(i));
    const Tensor bias = random(f32, {n}).frozen(), add = random(f32, {1, t, n});
    check({"linear", {x, w.frozen(), bias, add}, {{f32, {1, t, n}}}, {0}}, limit(f32), "");
    check({"linear", {dy, w.frozen(), none(), none()}, {{f32, {1, t, k}}}, {1}}, limit(f32), "t");
    check({"matmul_tn_sum", {x, dy}, {{f32, {k, n}}}, {}}, limit(f32, true), "tn");
}

// linear and gelu in one; no op of the reference, so this is written out.
TEST_P(CpuOps, LinearGelu) {
    if (on_host())
        GTEST_SKIP() << "only programs on other devices ask for it";
    for (const Length &n : lengths)
        for (bool keeps : {false, true}) {
            const Shape y = {n.s, n.t, 192};
            const Tensor x = random(half, {n.s, n.t, 64}), w = random(half, {64, 192}).frozen(),
                         b = random(f32, {192}).frozen();
            std::vector<Tensor> ours;
            std::string why;
            const int32_t answer =
                runner->try_run("linear_gelu", {x, w, b}, {{half, y}, keeps ? Out{half, y} : Out{}},
                                {0}, ours, why);
            if (answer == PONDER_PLAN_NONE)
                GTEST_SKIP() << "the library has no such product";
            ASSERT_EQ(PONDER_PLAN_OK, answer) << why;
            const Tensor z = oracle->run(
                "linear", {x.to(DType::f64), w.to(DType::f64), b.to(DType::f64), none()},
                {{DType::f64, y}}, {0})[0];
            EXPECT_LE(relative_error(ours[0], oracle->run("gelu", {z}, {{DType::f64, y}})[0]),
                      limit(half));
            if (keeps) {
                EXPECT_LE(relative_error(ours[1], z), limit(half));
            }
        }
}

TEST_P(CpuOps, LoraLinear) {
    struct {
        int64_t k, n, r;
    } sizes[] = {{9, 7, 1},     {64, 192, 16}, {100, 33, 3},
                 {256, 64, 16}, {96, 48, 32},  {48, 260, 40}};
    for (const Length &n : lengths)
        for (DType act : {f32, half})
            for (const auto &z : sizes)
                for (bool full : {false, true}) {
                    const Shape y = {n.s, n.t, z.n}, u = {n.s, n.t, z.r};
                    const Tensor w = random(act, {z.k, z.n}).frozen();
                    const Tensor a = random(f32, {n.s, z.k, z.r}),
                                 bb = random(f32, {n.s, z.r, z.n});
                    check({"lora_linear",
                           {random(act, {n.s, n.t, z.k}), w,
                            full ? random(f32, {z.n}).frozen() : none(), a, bb,
                            full ? random(f32, y) : none()},
                           {{full ? f32 : act, y}, {act, u}},
                           {0.7}},
                          limit(act), shape_name(act, n.s, n.t));
                    check({"lora_linear_vjp",
                           {random(full ? f32 : act, y), w, a, bb},
                           {{act, {n.s, n.t, z.k}}, {act, u}},
                           {0.7}},
                          limit(act, true), shape_name(act, n.s, n.t));
                }
}

// Whole tiles of tokens, which a device may compute in one go: depths and widths that cut the depth
// into different numbers of parts or not at all, with even and odd numbers of tiles.
TEST_P(CpuOps, LoraLinearTiles) {
    struct {
        int64_t s, t, k, n;
    } sizes[] = {{1, 128, 64, 128},  {1, 256, 256, 128},  {2, 128, 512, 384}, {1, 128, 1664, 256},
                 {1, 384, 128, 768}, {1, 256, 128, 2304}, {1, 256, 448, 4352},
                 {1, 128, 64, 8576}, {1, 256, 4352, 64}};
    for (const auto &z : sizes)
        for (bool full : {false, true}) {
            const Shape x = {z.s, z.t, z.k}, y = {z.s, z.t, z.n}, u = {z.s, z.t, 16};
            const Tensor w = random(half, {z.k, z.n}).frozen();
            const Tensor a = random(f32, {z.s, z.k, 16}), bb = random(f32, {z.s, 16, z.n});
            const std::string what = "K=" + std::to_string(z.k) + " N=" + std::to_string(z.n);
            check({"lora_linear",
                   {random(half, x), w, full ? random(f32, {z.n}).frozen() : none(), a, bb,
                    full ? random(f32, y) : none()},
                   {{full ? f32 : half, y}, {half, u}},
                   {0.7}},
                  limit(half), what);
            check({"lora_linear_vjp",
                   {random(full ? f32 : half, y), w, a, bb},
                   {{half, x}, {half, u}},
                   {0.7}},
                  limit(half, true), what);
        }
}

// The same with gelu; no ops of the reference.
TEST_P(CpuOps, LoraLinearGelu) {
    if (on_host())
        GTEST_SKIP() << "only programs on other devices ask for it";
    struct {
        int64_t t, k, n, r;
    } sizes[] = {{128, 64, 128, 16}, {256, 256, 384, 16},  {130, 64, 192, 16},
                 {65, 33, 21, 3},    {256, 448, 4352, 16}, {256, 4352, 448, 16}};
    const auto wide = [](std::vector<Tensor> in) {
        for (Tensor &t : in)
            t = t.to(DType::f64);
        return in;
    };
    for (const auto &z : sizes)
        for (bool keeps : {false, true}) {
            SCOPED_TRACE("T=" + std::to_string(z.t) + " K=" + std::to_string(z.k));
            const Shape x = {1, z.t, z.k}, y = {1, z.t, z.n}, u = {1, z.t, z.r};
            const Tensor w = random(half, {z.k, z.n}).frozen(), b = random(f32, {z.n}).frozen();
            const Tensor a = random(f32, {1, z.k, z.r}), bb = random(f32, {1, z.r, z.n});
            const std::vector<Tensor> in = {random(half, x), w, b, a, bb, none()};
            std::vector<Tensor> ours;
            std::string why;
            const int32_t answer = runner->try_run(
                "lora_linear_gelu", in, {{half, y}, {half, u}, keeps ? Out{half, y} : Out{}}, {0.7},
                ours, why);
            if (answer == PONDER_PLAN_NONE)
                GTEST_SKIP() << "no such op";
            ASSERT_EQ(PONDER_PLAN_OK, answer) << why;
            const auto sums =
                oracle->run("lora_linear", wide(in), {{DType::f64, y}, {DType::f64, u}}, {0.7});
            EXPECT_LE(relative_error(ours[0], oracle->run("gelu", {sums[0]}, {{DType::f64, y}})[0]),
                      limit(half));
            EXPECT_LE(relative_error(ours[1], sums[1]), limit(half));
            if (keeps) {
                EXPECT_LE(relative_error(ours[2], sums[0]), limit(half));
            }
            const std::vector<Tensor> back = {random(keeps ? f32 : half, y), w, a, bb};
            const Tensor before = random(half, x);
            std::vector<Tensor> all = back;
            all.push_back(before);
            ASSERT_EQ(PONDER_PLAN_OK, runner->try_run("lora_linear_vjp_gelu", all,
                                                      {{half, x}, {half, u}}, {0.7}, ours, why))
                << why;
            const auto found = oracle->run("lora_linear_vjp", wide(back),
                                           {{DType::f64, x}, {DType::f64, u}}, {0.7});
            EXPECT_LE(
                relative_error(ours[0], oracle->run("gelu_vjp", {found[0], before.to(DType::f64)},
                                                    {{DType::f64, x}})[0]),
                limit(half, true));
            EXPECT_LE(relative_error(ours[1], found[1]), limit(half, true));
            ASSERT_EQ(PONDER_PLAN_OK, runner->try_run("lora_linear_vjp_narrow", {back[0], bb},
                                                      {{half, u}}, {0.7}, ours, why))
                << why;
            EXPECT_LE(relative_error(ours[0], found[1]), limit(half, true)) << "alone";
        }
}

// The same ops with int8 weights: few rows and many, scales of columns and of rows.
TEST_P(CpuOps, ScaledWeights) {
    if (!module()->supports(PONDER_DTYPE_I8))
        GTEST_SKIP() << "weights are made floats for this device";
    struct {
        int64_t k, n, r;
    } sizes[] = {{1, 1, 1}, {9, 7, 1}, {64, 192, 16}, {101, 33, 3}, {260, 96, 16}};
    std::vector<Length> few(std::begin(lengths), std::end(lengths));
    for (int64_t rows : {2, 3, 5, 7, 11, 16, 17})
        few.push_back({1, rows});
    for (const Length &n : few)
        for (DType act : {f32, half})
            for (const auto &z : sizes)
                for (bool full : {false, true}) {
                    const std::string what =
                        shape_name(act, n.s, n.t) + " K=" + std::to_string(z.k);
                    const Shape x = {n.s, n.t, z.k}, y = {n.s, n.t, z.n}, u = {n.s, n.t, z.r};
                    for (bool transposed : {false, true})
                        for (bool of_rows : {false, true}) {
                            const ScaledTensor w = random_scaled(
                                transposed ? Shape{z.n, z.k} : Shape{z.k, z.n}, seed++, of_rows);
                            check(
                                {"linear",
                                 {random(act, x), w.w, full ? random(f32, {z.n}).frozen() : none(),
                                  full ? random(f32, y) : none(), w.scales},
                                 {{full ? f32 : act, y}},
                                 {double(transposed)}},
                                limit(act), what);
                        }
                    if (z.k == 1 && act == half)
                        continue; // a sum of two products may cancel: few bits are left in bf16
                    const ScaledTensor w = random_scaled({z.k, z.n}, seed++, false);
                    const Tensor a = random(f32, {n.s, z.k, z.r}),
                                 bb = random(f32, {n.s, z.r, z.n});
                    check({"lora_linear",
                           {random(act, x), w.w, full ? random(f32, {z.n}).frozen() : none(), a, bb,
                            full ? random(f32, y) : none(), w.scales},
                           {{full ? f32 : act, y}, {act, u}},
                           {0.7}},
                          limit(act), what);
                    check({"lora_linear_vjp",
                           {random(full ? f32 : act, y), w.w, a, bb, w.scales},
                           {{act, x}, {act, u}},
                           {0.7}},
                          limit(act, true), what);
                }
    for (const Length &n : few)
        for (DType act : {f32, half})
            for (int64_t v : {3, 520, 1500}) {
                const int64_t c = v == 520 ? 64 : 33;
                const std::string what = shape_name(act, n.s, n.t) + " V=" + std::to_string(v);
                const ScaledTensor table = random_scaled({v, c}, seed++, true);
                const Tensor target = random_ids({n.s, n.t}, seed++, -1, int32_t(v));
                const Shape row = {n.s, n.t};
                const Case forward = {
                    "cross_entropy",
                    {random(act, {n.s, n.t, c}, 2), table.w, target, table.scales},
                    {{f32, row}, {f32, row}, {act, {n.s, n.t, v}}},
                    {}};
                check(forward, limit(act), what);
                const Tensor p = runner->run("cross_entropy", forward.in, forward.out)[2];
                check({"cross_entropy_vjp",
                       {p, table.w, target, random(f32, row), table.scales},
                       {{act, {n.s, n.t, c}}},
                       {}},
                      limit(act, true), what);
                check({"embedding",
                       {random_ids({n.s, n.t}, seed++, 0, int32_t(v)), table.w,
                        random(act, {n.t + 3, c}).frozen(), table.scales},
                       {{f32, {n.s, n.t, c}}},
                       {3}},
                      1e-6, what);
                check({"embedding_at",
                       {random_ids({n.s, n.t}, seed++, 0, int32_t(v)),
                        random_ids({n.s, n.t}, seed++, 0, 9), table.w, random(act, {9, c}).frozen(),
                        table.scales},
                       {{f32, {n.s, n.t, c}}},
                       {}},
                      1e-6, what);
            }
    const ScaledTensor w = random_scaled({33, 40}, seed++, false);
    for (DType act : {f32, half})
        for (int64_t rows : {9, 70})
            check_rows({"linear",
                        {random(act, {1, rows, 33}), w.w, none(), none(), w.scales},
                        {{act, {1, rows, 40}}},
                        {0}},
                       0);
}

// A row's result is the same to the bit, however many rows come with it. AMX sums in another order
// than the registers that take few rows.
TEST_P(CpuOps, ScaledWeightsFewRowsAsMany) {
    if (!module()->supports(PONDER_DTYPE_I8))
        GTEST_SKIP() << "weights are made floats for this device";
    const ScaledTensor w = random_scaled({129, 70}, seed++, false);
    for (DType act : {f32, half}) {
        if (act == half && std::string(GetParam()) == "amx_bf16")
            continue;
        const Tensor x = random(act, {1, 40, 129});
        const auto linear = [&](int64_t rows) {
            Tensor part(act, {1, rows, 129});
            for (int64_t i = 0; i < part.count(); ++i)
                part.set(i, x.at(i));
            return runner->run("linear", {part, w.w, none(), none(), w.scales},
                               {{f32, {1, rows, 70}}}, {0})[0];
        };
        const Tensor many = linear(40);
        for (int64_t rows : {1, 2, 3, 8, 16}) {
            const Tensor few = linear(rows);
            EXPECT_EQ(0, std::memcmp(few.block->data(), many.block->data(), few.block->size()))
                << rows;
        }
    }
}

TEST_P(CpuOps, MatmulTn) {
    for (const Length &n : lengths)
        for (DType act : {f32, half})
            for (const auto &[m, w] :
                 {std::pair<int64_t, int64_t>{5, 3}, {16, 192}, {200, 16}, {65, 130}})
                check({"matmul_tn",
                       {random(act, {n.s, n.t, m}), random(act, {n.s, n.t, w})},
                       {{f32, {n.s, m, w}}},
                       {}},
                      limit(act, true), shape_name(act, n.s, n.t));
    check({"matmul_tn",
           {random(half, {1, 1100, 70}), random(f32, {1, 1100, 32})},
           {{f32, {1, 70, 32}}},
           {}},
          2e-2, "long and mixed");
}

// Many of them in one call.
TEST_P(CpuOps, MatmulTnGroup) {
    if (on_host())
        GTEST_SKIP() << "only programs on other devices ask for it";
    for (const Length &n : lengths) {
        std::vector<Tensor> in, ours;
        std::vector<Out> out;
        for (int i = 0; i < 50; ++i) {
            const int64_t rank = 2 * (1 + i % 24), width = 8 * (7 + 2 * (i % 20));
            const bool first = i % 2;
            in.push_back(random(i % 3 ? half : f32, {n.s, n.t, first ? width : rank}));
            in.push_back(random(i % 5 ? half : f32, {n.s, n.t, first ? rank : width}));
            out.push_back({f32, {n.s, in[in.size() - 2].shape[2], in.back().shape[2]}});
        }
        std::string why;
        ASSERT_EQ(PONDER_PLAN_OK, runner->try_run("matmul_tn_group", in, out, {}, ours, why))
            << why;
        for (size_t i = 0; i < out.size(); ++i)
            EXPECT_LE(relative_error(ours[i], oracle->run("matmul_tn",
                                                          {in[2 * i].to(DType::f64),
                                                           in[2 * i + 1].to(DType::f64)},
                                                          {{DType::f64, out[i].shape}}, {})[0]),
                      limit(half, true))
                << i;
    }
}

TEST_P(CpuOps, Matmul) {
    struct {
        int64_t count, m, n, k;
    } sizes[] = {{1, 1, 1, 1},     {3, 5, 7, 9},       {2, 64, 64, 64}, {1, 300, 520, 16},
                 {1, 16, 256, 70}, {1, 256, 16, 1100}, {4, 65, 40, 33}, {1, 130, 96, 600}};
    for (const auto &z : sizes)
        for (DType act : {f32, half})
            for (int flags = 0; flags < 4; ++flags) {
                const bool ta = flags & 1, tb = flags & 2;
                check({"matmul",
                       {random(act, ta ? Shape{z.count, z.k, z.m} : Shape{z.count, z.m, z.k}),
                        random(act, tb ? Shape{z.count, z.n, z.k} : Shape{z.count, z.k, z.n})},
                       {{f32, {z.count, z.m, z.n}}},
                       {double(ta), double(tb)}},
                      limit(act, true),
                      std::to_string(z.m) + "x" + std::to_string(z.n) + "x" + std::to_string(z.k) +
                          " " + std::to_string(flags));
            }
    check({"matmul",
           {random(f32, {2, 3, 20, 30}), random(f32, {2, 3, 30, 10})},
           {{f32, {2, 3, 20, 10}}},
           {0, 0}},
          1e-5, "rank 4");
}

// A weight that changed in place: packed copies follow at refresh, at the same addresses.
TEST_P(CpuOps, Refresh) {
    for (DType act : {f32, half}) {
        const Tensor w = random(act, {40, 70}).frozen(), x = random(act, {1, 66, 40});
        const Tensor dy = random(act, {1, 66, 70});
        const Case there = {"linear", {x, w, none(), none()}, {{act, {1, 66, 70}}}, {0}};
        const Case back = {"linear", {dy, w, none(), none()}, {{act, {1, 66, 40}}}, {1}};
        check(there, limit(act), "before");
        check(back, limit(act), "before");
        const size_t bytes = runner->packed_bytes();
        const Tensor other = random(act, {40, 70});
        std::memcpy(w.block->data(), other.block->data(), size_t(w.count()) * size_of(act));
        runner->refresh(w);
        check(there, limit(act), "after");
        check(back, limit(act), "after");
        EXPECT_EQ(runner->packed_bytes(), bytes);
        runner->refresh(x); // nothing was packed from it
    }
}

// A weight that is gone leaves nothing to the one that comes to lie at its address, but room.
TEST_P(CpuOps, Forget) {
    Tensor w = random(f32, {40, 70}).frozen();
    const Tensor x = random(f32, {1, 66, 40}), wide = random(f32, {1, 66, 70});
    check({"linear", {x, w, none(), none()}, {{f32, {1, 66, 70}}}, {0}}, limit(f32), "before");
    const size_t bytes = runner->packed_bytes();
    runner->forget(w);
    if (on_host()) {
        EXPECT_LT(runner->packed_bytes(), bytes);
    }
    const Tensor other = random(f32, {70, 40});
    std::memcpy(w.block->data(), other.block->data(), size_t(w.count()) * size_of(f32));
    w.shape = other.shape;
    check({"linear", {wide, w, none(), none()}, {{f32, {1, 66, 40}}}, {0}}, limit(f32), "after");
    runner->forget(x); // nothing was packed from it
}

} // namespace
} // namespace ponder::test
