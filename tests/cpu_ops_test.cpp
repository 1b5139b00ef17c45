// Every kernel of a module but products: f32 and bf16, odd sizes, tails, several streams; and that
// results do not depend on the number of threads.
#include "cpu_ops.hpp"

#include <atomic>
#include <dirent.h>
#include <thread>

namespace ponder::test {
namespace {

TEST_P(CpuOps, Embedding) {
    for (const Length &n : lengths)
        for (DType act : {f32, half}) {
            const int64_t v = 50, c = 37;
            check({"embedding",
                   {random_ids({n.s, n.t}, seed++, 0, int32_t(v)), random(act, {v, c}).frozen(),
                    random(act, {n.t + 3, c}).frozen()},
                   {{f32, {n.s, n.t, c}}},
                   {3}},
                  1e-6, shape_name(act, n.s, n.t));
            check({"embedding_at",
                   {random_ids({n.s, n.t}, seed++, 0, int32_t(v)),
                    random_ids({n.s, n.t}, seed++, 0, 9), random(act, {v, c}).frozen(),
                    random(act, {9, c}).frozen()},
                   {{f32, {n.s, n.t, c}}},
                   {}},
                  1e-6, shape_name(act, n.s, n.t));
        }
}

TEST_P(CpuOps, LayerNorm) {
    for (const Length &n : lengths)
        for (DType act : {f32, half})
            for (int64_t c : {5, 64, 100, 256, 768}) {
                const Tensor x = random(f32, {n.s, n.t, c}, 2), g = random(f32, {c}).frozen();
                for (int64_t i = 0; c == 768 && i < x.count(); ++i)
                    if (i % c < 4) // far from the row's mean
                        x.set(i, x.at(i) + 30);
                const Case forward = {"layer_norm",
                                      {x, g, random(f32, {c}).frozen()},
                                      {{act, {n.s, n.t, c}}, {f32, {n.s, n.t, 2}}},
                                      {1e-5}};
                check(forward, limit(act), shape_name(act, n.s, n.t));
                std::vector<Tensor> gated; // no op of the reference
                std::string why;
                std::vector<Tensor> in = forward.in;
                in.push_back(random(half, {n.s, n.t, c}));
                if (!on_host() && act == half &&
                    runner->try_run("layer_norm_gated", in, forward.out, {1e-5}, gated, why) ==
                        PONDER_PLAN_OK) {
                    for (Tensor &t : in)
                        t = t.to(DType::f64);
                    const Out f64{DType::f64, {n.s, n.t, c}};
                    const Tensor y = oracle->run("layer_norm", {in[0], in[1], in[2]},
                                                 {f64, {DType::f64, {n.s, n.t, 2}}}, {1e-5})[0];
                    EXPECT_LE(relative_error(gated[0], oracle->run("mul", {in[3], y}, {f64})[0]),
                              limit(act));
                }
                const Tensor stats = runner->run("layer_norm", forward.in, forward.out, {1e-5})[1];
                for (bool carry : {false, true}) {
                    const Case back = {"layer_norm_vjp",
                                       {random(act, {n.s, n.t, c}), x, g, stats,
                                        carry ? random(f32, {n.s, n.t, c}) : none()},
                                       {{f32, {n.s, n.t, c}}},
                                       {}};
                    check(back, limit(f32, true), shape_name(act, n.s, n.t));
                    if (on_host())
                        continue;
                    std::vector<Tensor> both; // with a narrow copy
                    if (runner->try_run("layer_norm_vjp_copy", back.in,
                                        {back.out[0], {half, {n.s, n.t, c}}}, {}, both,
                                        why) != PONDER_PLAN_OK)
                        continue;
                    for (int64_t i = 0; i < both[0].count(); ++i)
                        ASSERT_EQ(to_float(to_bf16(both[0].as<float>()[i])), both[1].at(i));
                }
            }
    check_rows({"layer_norm",
                {random(f32, {1, 70, 33}), random(f32, {33}), random(f32, {33})},
                {{f32, {1, 70, 33}}, {f32, {1, 70, 2}}},
                {1e-5}},
               0);
}

TEST_P(CpuOps, Elementwise) {
    for (const Length &n : lengths)
        for (DType act : {f32, half})
            for (int64_t c : {1, 37, 128}) {
                const Shape shape = {n.s, n.t, c};
                const std::string what = shape_name(act, n.s, n.t);
                const Tensor a = random(act, shape, 4), b = random(act, shape, 4);
                check({"gelu", {a}, {{act, shape}}, {}}, limit(act), what);
                check({"gelu_vjp", {b, a}, {{act, shape}}, {}}, limit(act), what);
                check({"add", {a, b}, {{act, shape}}, {}}, limit(act), what);
                check({"mul", {a, b}, {{f32, shape}}, {}}, limit(f32), what);
                check({"sigmoid", {a}, {{act, shape}}, {}}, limit(act), what);
            }
    // Far out the exponential is cut off, not wrong.
    const Tensor wide = random(f32, {40, 16}, 200);
    check({"gelu", {wide}, {{f32, {40, 16}}}, {}}, 1e-5, "wide");
    check({"gelu_vjp", {wide, wide}, {{f32, {40, 16}}}, {}}, 1e-5, "wide");
    check({"sigmoid", {wide}, {{f32, {40, 16}}}, {}}, 1e-5, "wide");
}

TEST_P(CpuOps, SliceRows) {
    for (DType act : {f32, half}) {
        check({"slice_rows", {random(act, {3, 70, 19})}, {{act, {3, 65, 19}}}, {4}}, 1e-6, "");
        check({"slice_rows_vjp", {random(act, {3, 65, 19})}, {{f32, {3, 70, 19}}}, {4}}, 1e-6, "");
    }
}

// Tiles of keys that several groups of warps of a device share, fewer than groups and many.
TEST_P(CpuOps, AttentionOfFewRows) {
    if (on_host())
        GTEST_SKIP() << "there are no such groups";
    for (int64_t t : {64, 192, 704, 832}) {
        const int64_t heads = 2, c = heads * 64;
        const Tensor qkv = random(half, {1, t, 3 * c}, 2);
        const Case forward = {
            "attention", {qkv}, {{half, {1, t, c}}, {f32, {1, heads, t}}}, {double(heads)}};
        check(forward, limit(half), std::to_string(t));
        const auto out = runner->run("attention", forward.in, forward.out, forward.attr);
        check({"attention_vjp",
               {qkv, out[0], out[1], random(half, {1, t, c})},
               {{half, {1, t, 3 * c}}},
               {double(heads)}},
              limit(half, true), std::to_string(t));
    }
}

TEST_P(CpuOps, Attention) {
    for (const Length &n : lengths)
        for (DType act : {f32, half})
            for (int64_t d : {8, 20, 64})
                for (int64_t heads : {1, 3}) {
                    const int64_t c = heads * d;
                    const std::string what = shape_name(act, n.s, n.t) + " D=" + std::to_string(d);
                    const Tensor qkv = random(act, {n.s, n.t, 3 * c}, 2);
                    const Case forward = {"attention",
                                          {qkv},
                                          {{act, {n.s, n.t, c}}, {f32, {n.s, heads, n.t}}},
                                          {double(heads)}};
                    check(forward, limit(act), what);
                    const auto out =
                        runner->run("attention", forward.in, forward.out, forward.attr);
                    check({"attention_vjp",
                           {qkv, out[0], out[1], random(act, {n.s, n.t, c})},
                           {{act, {n.s, n.t, 3 * c}}},
                           {double(heads)}},
                          limit(act, true), what);
                }
    if (!on_host()) // enough of them for kernels with large blocks
        for (int64_t t : {128, 384}) {
            const int64_t s = 2, heads = 72, c = heads * 64;
            const Tensor qkv = random(half, {s, t, 3 * c}, 2);
            const Case forward = {
                "attention", {qkv}, {{half, {s, t, c}}, {f32, {s, heads, t}}}, {double(heads)}};
            check(forward, limit(half), "many heads");
            const auto out = runner->run("attention", forward.in, forward.out, forward.attr);
            check({"attention_vjp",
                   {qkv, out[0], out[1], random(half, {s, t, c})},
                   {{half, {s, t, 3 * c}}},
                   {double(heads)}},
                  limit(half, true), "many heads");
        }
    for (DType act : {f32, half})
        check_rows({"attention",
                    {random(act, {1, 150, 3 * 64}, 2)},
                    {{act, {1, 150, 64}}, {f32, {1, 1, 150}}},
                    {1}},
                   0);
}

// Few new tokens and many, an empty cache and a full one, streams of different lengths.
TEST_P(CpuOps, AttentionCached) {
    struct Length {
        int64_t t, places;
        std::vector<double> first;
    };
    const std::vector<Length> cases = {{1, 300, {0, 299, 40}},  {1, 17, {16}},
                                       {3, 300, {297, 0, 130}}, {70, 200, {0, 130}},
                                       {150, 150, {0}},         {64, 400, {200}}};
    for (const auto &n : cases)
        for (DType act : {f32, half})
            for (int64_t d : {8, 20, 64, 128}) {
                const int64_t s = int64_t(n.first.size()), heads = 2, c = heads * d;
                const Shape cache = {s, heads, n.places, d};
                const Tensor first = from_values(DType::i32, {s}, n.first);
                check({"attention_cached",
                       {random(act, {s, n.t, 3 * c}, 2), first, random(act, cache),
                        random(act, cache)},
                       {{act, {s, n.t, c}}, {act, cache}, {act, cache}},
                       {}},
                      limit(act), shape_name(act, s, n.t) + " D=" + std::to_string(d));
            }
}

// Drawn shapes: heads that fill no tile, and on devices tokens that the caches have no room for,
// which passes of a fixed length have where a text ends.
TEST_P(CpuOps, AttentionCachedOfDrawnShapes) {
    std::mt19937 draw(7);
    const auto up_to = [&](int64_t n) { return 1 + int64_t(draw() % uint64_t(n)); };
    for (int i = 0; i < 24; ++i) {
        const DType act = i % 2 ? half : f32;
        const int64_t t = i % 4 < 2 ? up_to(8) : 8 + up_to(120), s = up_to(3), heads = up_to(3);
        const int64_t d = 8 * up_to(16), places = t + up_to(500), c = heads * d;
        std::vector<double> firsts;
        for (int64_t j = 0; j < s; ++j)
            firsts.push_back(double(up_to(places - (on_host() ? t : t / 2)) - 1));
        const Shape cache = {s, heads, places, d};
        check({"attention_cached",
               {random(act, {s, t, 3 * c}, 2), from_values(DType::i32, {s}, firsts),
                random(act, cache), random(act, cache)},
               {{act, {s, t, c}}, {act, cache}, {act, cache}},
               {}},
              limit(act),
              shape_name(act, s, t) + " D=" + std::to_string(d) + " N=" + std::to_string(places));
    }
}

TEST_P(CpuOps, KeepRows) {
    if (on_host())
        GTEST_SKIP() << "left to the reference";
    for (const auto &[t, first] :
         {std::pair<int64_t, std::vector<double>>{1, {0, 19, 20}}, {7, {16}}, {20, {0, 3}}}) {
        const int64_t s = int64_t(first.size()), places = 20, c = 37;
        check({"keep_rows",
               {random(f32, {s, t, c}), from_values(DType::i32, {s}, first),
                random(f32, {s, places, c})},
               {{f32, {s, places, c}}},
               {}},
              0, "T=" + std::to_string(t));
    }
}

// Decoding is attention: token by token over a cache as all at once.
TEST_P(CpuOps, AttentionCachedIsAttention) {
    const int64_t t = 40, c = 64, heads = 2, d = c / heads;
    const Tensor qkv = random(f32, {1, t, 3 * c}, 2);
    const Tensor whole = runner->run("attention", {qkv}, {{f32, {1, t, c}}, {f32, {1, heads, t}}},
                                     {double(heads)})[0];
    Tensor k = filled(f32, {1, heads, t, d}, 0), v = filled(f32, {1, heads, t, d}, 0);
    for (int64_t i = 0; i < t; ++i) {
        Tensor row(f32, {1, 1, 3 * c});
        std::copy_n(qkv.as<float>() + i * 3 * c, 3 * c, row.as<float>());
        const auto out =
            runner->run("attention_cached", {row, from_values(DType::i32, {1}, {double(i)}), k, v},
                        {{f32, {1, 1, c}}, {f32, k.shape}, {f32, v.shape}}, {});
        k = out[1], v = out[2];
        for (int64_t j = 0; j < c; ++j)
            ASSERT_NEAR(whole.at(i * c + j), out[0].at(j), 1e-5) << i;
    }
}

TEST_P(CpuOps, CrossEntropy) {
    for (const Length &n : lengths)
        for (DType act : {f32, half})
            for (int64_t v : {3, 520, 1500}) {
                const int64_t c = v == 520 ? 64 : 33;
                const std::string what = shape_name(act, n.s, n.t) + " V=" + std::to_string(v);
                const Tensor h = random(act, {n.s, n.t, c}, 2),
                             table = random(act, {v, c}).frozen();
                const Tensor target = random_ids({n.s, n.t}, seed++, -1, int32_t(v));
                const Shape row = {n.s, n.t};
                const Case forward = {"cross_entropy",
                                      {h, table, target},
                                      {{f32, row}, {f32, row}, {act, {n.s, n.t, v}}},
                                      {}};
                check(forward, limit(act), what);
                check({"cross_entropy", {h, table, target}, {{f32, row}, {f32, row}, {}}, {}},
                      limit(act), what);
                const Tensor p = runner->run("cross_entropy", forward.in, forward.out)[2];
                check({"cross_entropy_vjp",
                       {p, table, target, random(f32, row)},
                       {{act, {n.s, n.t, c}}},
                       {}},
                      limit(act, true), what);
            }
}

// What programs put in the place of cross_entropy and its vjps on devices that have it. `far`: in
// some rows a few words are that far above all others, among which the target may be or not.
TEST_P(CpuOps, CrossEntropyInParts) {
    if (on_host())
        GTEST_SKIP() << "only programs on other devices ask for it";
    struct Size {
        int64_t s, t, c, v;
        double far;
    };
    for (const auto &[s, t, c, v, far] : {Size{1, 200, 64, 1500, 0},
                                          {2, 130, 72, 513, 0},
                                          {1, 300, 96, 4096, 0},
                                          {1, 203, 64, 1501, 100},
                                          {1, 77, 200, 769, 500}}) {
        const std::string what =
            shape_name(half, s, t) + " V=" + std::to_string(v) + " far=" + std::to_string(int(far));
        const int64_t stride = (v + 63) / 64 * 64;
        const Tensor h = random(half, {s, t, c}, 2), table = random(half, {v, c}).frozen();
        const Tensor target = random_ids({s, t}, seed++, 0, int32_t(v));
        for (int64_t r = 0; r < s * t; r += 7)
            target.set(r, -1);
        if (far > 0) { // the first column raises words 1, 257, 513, ...
            for (int64_t j = 0; j < v; ++j)
                table.set(j * c, j % 256 == 1 ? 1 : 0);
            for (int64_t r = 0; r < s * t; ++r) {
                h.set(r * c, far / 2 * double(r % 3));
                if (r % 7 == 1)
                    target.set(r, 257);
            }
        }
        const Tensor dnll = random(f32, {s, t});
        const Shape row = {s, t}, wide = {s, t, stride};
        // e share, which is p - onehot, and p, as the reference has it
        const auto joined = [&](const Tensor &e, const Tensor &share, bool onehot) {
            Tensor p(DType::f64, {s, t, v});
            for (int64_t r = 0; r < s * t; ++r)
                for (int64_t j = 0; j < v; ++j)
                    p.set(r * v + j,
                          e.at(r * stride + j) * share.at(r) + (onehot && j == target.at(r)));
            return p;
        };
        Tensor e = random(half, wide), share = random(f32, row);
        for (int64_t r = 0; r < s * t; ++r)
            for (int64_t j = v; j < stride; ++j)
                e.set(r * stride + j, 0);
        std::vector<Tensor> ours;
        std::string why;
        if (runner->try_run("cross_entropy_parts", {h, table, target},
                            {{f32, row}, {f32, row}, {half, wide}, {f32, row}}, {}, ours,
                            why) == PONDER_PLAN_OK) {
            const auto theirs =
                oracle->run("cross_entropy", {h.to(DType::f64), table.to(DType::f64), target},
                            {{DType::f64, row}, {DType::f64, row}, {DType::f64, {s, t, v}}}, {});
            e = ours[2];
            share = ours[3];
            EXPECT_LE(relative_error(ours[0], theirs[0]), limit(half)) << what;
            EXPECT_LE(relative_error(ours[1], theirs[1]), limit(half)) << what;
            for (int64_t r = 0; r < s * t; ++r)
                if (const auto hit = int64_t(target.at(r)); hit >= 0)
                    theirs[2].set(r * v + hit, theirs[2].at(r * v + hit) - 1);
            EXPECT_LE(relative_error(joined(e, share, false), theirs[2]), limit(half)) << what;
            double worst[2] = {}; // of each row
            for (int64_t r = 0; r < s * t; ++r)
                for (int i : {0, 1})
                    worst[i] = std::max(worst[i], std::abs(ours[i].at(r) - theirs[i].at(r)) /
                                                      (1 + std::abs(theirs[i].at(r))));
            EXPECT_LE(worst[0], 1e-3) << what;
            EXPECT_LE(worst[1], 1e-3) << what;
            for (int64_t r = 0; r < s * t; ++r)
                for (int64_t j = v; j < stride; ++j)
                    ASSERT_EQ(0, e.at(r * stride + j)) << what;
            const auto alone =
                runner->run("cross_entropy", {h, table, target}, {{f32, row}, {f32, row}, {}}, {});
            for (int64_t r = 0; r < s * t; ++r)
                for (int i : {0, 1})
                    ASSERT_EQ(ours[i].at(r), alone[i].at(r)) << what << " row " << r;
        }
        const Tensor p = joined(e, share, true);
        for (bool for_table : {false, true}) {
            ASSERT_EQ(PONDER_PLAN_OK,
                      runner->try_run("cross_entropy_parts_vjp",
                                      {e, share, table, target, dnll, for_table ? h : none()},
                                      {{half, {s, t, c}}, for_table ? Out{f32, {v, c}} : Out{}}, {},
                                      ours, why))
                << why;
            const Tensor up = dnll.to(DType::f64), words = table.to(DType::f64);
            EXPECT_LE(
                relative_error(ours[0], oracle->run("cross_entropy_vjp", {p, words, target, up},
                                                    {{DType::f64, {s, t, c}}}, {})[0]),
                limit(half, true))
                << what;
            if (for_table) {
                EXPECT_LE(relative_error(ours[1], oracle->run("cross_entropy_vjp_table",
                                                              {p, h.to(DType::f64), target, up},
                                                              {{DType::f64, {v, c}}}, {})[0]),
                          limit(half, true))
                    << what;
            }
        }
    }
}

// No op of the reference either.
TEST_P(CpuOps, ConvolutionsThatTurn) {
    if (on_host())
        GTEST_SKIP() << "only programs on other devices ask for it";
    for (const Length &n : lengths)
        for (DType out : {f32, half})
            for (bool before : {false, true})
                for (size_t count : {1, 2}) {
                    SCOPED_TRACE(shape_name(out, n.s, n.t));
                    const int64_t c = 24, heads = 3, period = 16;
                    const Shape shape = {n.s, n.t, c};
                    const Tensor x = random(f32, shape),
                                 first = before ? random(f32, {n.s, 4, c}) : none();
                    std::vector<Tensor> in = {x, first}, ours;
                    std::vector<Out> outs;
                    for (size_t i = 0; i < count; ++i) {
                        in.push_back(random(f32, {4, c}));
                        in.push_back(random(f32, {c}));
                        outs.push_back({out, shape});
                    }
                    std::string why;
                    const int32_t answer =
                        runner->try_run("conv1d_rope", in, outs,
                                        {1, double(heads), double(period), 1e4}, ours, why);
                    if (answer == PONDER_PLAN_NONE)
                        GTEST_SKIP() << "no such op";
                    ASSERT_EQ(PONDER_PLAN_OK, answer) << why;
                    for (size_t i = 0; i < count; ++i) {
                        std::vector<Tensor> wide = {x.to(DType::f64), in[2 + 2 * i].to(DType::f64),
                                                    in[3 + 2 * i].to(DType::f64)};
                        if (before)
                            wide.push_back(first.to(DType::f64));
                        const Out f64{DType::f64, shape};
                        const Tensor y =
                            oracle->run("rope", {oracle->run("conv1d", wide, {f64}, {1})[0]}, {f64},
                                        {double(heads), double(period), 1e4, 0})[0];
                        EXPECT_LE(relative_error(ours[i], y), limit(out));
                    }
                }
}

TEST_P(CpuOps, ConvolutionAndRope) {
    for (const Length &n : lengths)
        for (DType act : {f32, half}) {
            const std::string what = shape_name(act, n.s, n.t);
            for (double shift : {0.0, 1.0})
                for (bool before : {false, true}) {
                    Case c = {
                        "conv1d",
                        {random(act, {n.s, n.t, 37}), random(f32, {4, 37}), random(f32, {37})},
                        {{act, {n.s, n.t, 37}}},
                        {shift}};
                    if (before)
                        c.in.push_back(random(act, {n.s, 3 + int64_t(shift), 37}));
                    check(c, limit(act), what);
                }
            for (double shift : {0.0, 1.0})
                check({"conv1d_vjp",
                       {random(act, {n.s, n.t, 101}), random(act, {n.s, n.t, 101}),
                        random(f32, {4, 101})},
                       {{act, {n.s, n.t, 101}}, {f32, {4, 101}}, {f32, {101}}},
                       {shift}},
                      limit(act, true), what);
            for (int64_t d : {6, 64})
                check({"rope",
                       {random(act, {n.s, n.t, 3 * d})},
                       {{act, {n.s, n.t, 3 * d}}},
                       {3, 16, 10000, double(d == 6)}},
                      limit(act), what);
        }
}

// Chunk after chunk, every field of the state: by a rule, told, and with losses alone.
TEST_P(CpuOps, Gates) {
    if (on_host())
        GTEST_SKIP() << "the host decides by its policies";
    constexpr int64_t words = int64_t(sizeof(ponder_gate) / sizeof(int32_t));
    const auto tensor_of = [](const ponder_gate &gate) {
        const Tensor t(DType::i32, {words});
        std::memcpy(t.block->data(), &gate, sizeof gate);
        return t;
    };
    const auto expect_same = [](const Tensor &ours, const Tensor &expected) {
        ponder_gate a, b;
        std::memcpy(&a, ours.block->data(), sizeof a);
        std::memcpy(&b, expected.block->data(), sizeof b);
        const auto same = [](double x, double y) {
            return (std::isnan(x) && std::isnan(y)) || x == y ||
                   std::abs(x - y) <= 1e-12 * std::abs(y);
        };
        for (int i = 0; i < PONDER_GATE_SIGNALS; ++i)
            EXPECT_TRUE(same(a.signals[i], b.signals[i])) << i;
        for (int i = 0; i < PONDER_GATE_FIRST; ++i)
            EXPECT_TRUE(same(a.first[i], b.first[i])) << i;
        for (const auto field :
             {&ponder_gate::threshold, &ponder_gate::rate, &ponder_gate::budget_left,
              &ponder_gate::power1, &ponder_gate::power2, &ponder_gate::score,
              &ponder_gate::compared, &ponder_gate::gradient_norm, &ponder_gate::update_norm})
            EXPECT_TRUE(same(a.*field, b.*field)) << a.*field << " " << b.*field;
        for (const auto field :
             {&ponder_gate::seen, &ponder_gate::count, &ponder_gate::optimizer_steps,
              &ponder_gate::calibrating, &ponder_gate::wanted, &ponder_gate::granted,
              &ponder_gate::accepted})
            EXPECT_EQ(a.*field, b.*field);
    };
    for (const int64_t rule : {PONDER_GATE_THRESHOLD, PONDER_GATE_CONTROLLED})
        for (const int64_t signal : {PONDER_GATE_LOSS, PONDER_GATE_RECONSTRUCTION})
            for (const double budget : {double(INFINITY), 0.6})
                for (const int64_t steps : {1, 3}) {
                    SCOPED_TRACE(std::to_string(rule) + std::to_string(signal) +
                                 std::to_string(steps) + " " + std::to_string(budget));
                    ponder_gate g{};
                    g.rule = rule, g.signal = signal, g.steps = steps;
                    g.target = 0.4, g.gain = 0.1, g.rate = 0.4, g.threshold = 0.1;
                    g.budget_rate = budget, g.budget_burst = 4, g.budget_left = 2;
                    g.guard_norm = g.power1 = g.power2 = 1;
                    for (double &x : g.signals)
                        x = NAN;
                    Tensor state = tensor_of(g);
                    for (int chunk = 0; chunk < 30; ++chunk) {
                        const int64_t tokens = 5 + 40 * (chunk % 9);
                        const double told = chunk % 10 == 7   ? double(steps)
                                            : chunk % 10 == 8 ? 0
                                                              : -1;
                        const bool more = chunk % 3 != 0;
                        const std::vector<Tensor> in{random(f32, {1, tokens}, 3),
                                                     more ? random(f32, {1, tokens}, 3) : none(),
                                                     more ? random(f32, {1, 3}, 1) : none(), state};
                        const std::vector<Out> out{{DType::i32, {words}},
                                                   told != 0 ? Out{DType::i32, {steps + 1}} : Out{},
                                                   told != 0 ? Out{f32, {steps, 8}} : Out{}};
                        const std::vector<double> attr{
                            double(tokens - 1), told, 0.01, 0.9, 0.99, 1e-8, 0.5};
                        const auto ours = runner->run("gate", in, out, attr),
                                   expected = oracle->run("gate", in, out, attr);
                        expect_same(ours[0], expected[0]);
                        if (told != 0) {
                            EXPECT_TRUE(identical(ours[1], expected[1]));
                            EXPECT_LE(relative_error(ours[2], expected[2]), 1e-6);
                        }
                        const int64_t n = 1000 + 77 * chunk;
                        const Tensor norms = filled(f32, {steps}, 2);
                        if (chunk % 5 == 4)
                            reinterpret_cast<float *>(norms.block->data())[steps - 1] = NAN;
                        const std::vector<Tensor> update{
                            more ? norms : none(), filled(f32, {1}, chunk % 4 == 3 ? 1.5 : 0.3),
                            random(f32, {n}), ours[0]};
                        const std::vector<Out> kept{{DType::i32, {words}}, {f32, {n}}};
                        const auto taken = runner->run("commit", update, kept, {0.9, 0.99}),
                                   wanted = oracle->run("commit", update, kept, {0.9, 0.99});
                        expect_same(taken[0], wanted[0]);
                        EXPECT_TRUE(identical(taken[1], wanted[1])); // or both untouched
                        state = taken[0];
                    }
                }
}

TEST_P(CpuOps, Reductions) {
    for (int64_t n : {1, 7, 100, 20000}) {
        const Tensor x = random(f32, {n}), y = random(f32, {n});
        check({"mean", {x}, {{f32, {1}}}, {double(n)}}, 1e-5, "");
        check({"mean_vjp", {random(f32, {1})}, {{f32, {n}}}, {double(n)}}, 1e-6, "");
        check({"fill", {}, {{f32, {n}}}, {0.5}}, 1e-6, "");
        check({"norm", {x, y}, {{f32, {1}}}, {}}, 1e-6, "");
        check({"norm", {x, none()}, {{f32, {1}}}, {}}, 1e-6, "");
        for (double clip : {0.0, 0.5}) {
            const Tensor h =
                from_values(f32, {8}, {0.01, 0.9, 0.99, 1e-8, 0.271, 0.0297, clip, 0.1});
            const Tensor m = random(f32, {n}, 0.1), v = filled(f32, {n}, 0.01);
            const Tensor gnorm = filled(f32, {1}, 2);
            check({"adam", {x, y, m, v, h, gnorm}, {{f32, {n}}, {f32, {n}}, {f32, {n}}}, {}}, 1e-5,
                  "");
            check({"adamw", {x, y, m, v, h, gnorm}, {{f32, {n}}, {f32, {n}}, {f32, {n}}}, {}}, 1e-5,
                  "");
            check({"sgd", {x, y, h, gnorm}, {{f32, {n}}}, {}}, 1e-5, "");
            const Tensor rate = random(f32, {n}), keep = random(f32, {n}), start = random(f32, {n});
            for (const std::vector<Tensor> &three : {std::vector<Tensor>{rate, keep, start},
                                                     {none(), keep, none()},
                                                     {rate, none(), none()},
                                                     {none(), none(), none()}}) {
                std::vector<Tensor> adam = {x, y, m, v, h, gnorm}, sgd = {x, y, h, gnorm};
                adam.insert(adam.end(), three.begin(), three.end());
                sgd.insert(sgd.end(), three.begin(), three.end());
                check({"adam", adam, {{f32, {n}}, {f32, {n}}, {f32, {n}}}, {}}, 1e-5, "three");
                check({"sgd", sgd, {{f32, {n}}}, {}}, 1e-5, "three");
                std::vector<Out> gradients(4, {f32, {n}});
                for (const Tensor &t : three)
                    gradients.push_back(t.block ? Out{f32, {n}} : Out{});
                adam.insert(adam.end(), {rate, keep, start});
                sgd.push_back(keep);
                check({"adam_vjp", adam, gradients, {}}, 1e-4, "");
                gradients.erase(gradients.begin(), gradients.begin() + 2);
                check({"sgd_vjp", sgd, gradients, {}}, 1e-4, "");
            }
        }
    }
}

TEST_P(CpuOps, TttLinear) {
    for (const Length &n : lengths)
        for (DType act : {f32, half})
            for (int64_t d : {8, 20, 64, 96, 256})
                for (double form : {0.0, 1.0}) {
                    if (d == 256 && n.t > 65) // takes long
                        continue;
                    const int64_t heads = on_host() ? d == 64 ? 3 : 2 : n.s == 2 ? 3 : 4;
                    const int64_t c = heads * d, m = d == 20 ? 5 : 16;
                    const Shape rows = {n.s, n.t, c}, w = {n.s, heads, d, d}, b = {n.s, heads, d};
                    const Tensor lr = random(act, {n.s, n.t, heads});
                    for (int64_t i = 0; i < lr.count(); ++i)
                        lr.set(i, 0.5 + 0.4 * lr.at(i));
                    check({"ttt_linear",
                           {random(act, rows), random(act, rows), random(act, rows), lr,
                            random(f32, {m}, 0.05), random(f32, {heads, d}),
                            random(f32, {heads, d}), random(f32, w, 0.1), random(f32, b, 0.1)},
                           {{act, rows}, {f32, w}, {f32, b}, {f32, {n.s, 3}}},
                           {form, 1.0 / double(d), form * 0.1, 1e-6, form * 2, -form}},
                          limit(act, true), shape_name(act, n.s, n.t) + " D=" + std::to_string(d));
                }
}

// Head dims and mini-batches: of 64 and 16 or 64, and of 128 and 16, the scans are fused.
constexpr std::pair<int64_t, int64_t> mlp_scans[] = {
    {8, 16}, {20, 5}, {64, 16}, {64, 64}, {128, 16}};

TEST_P(CpuOps, TttMlp) {
    if (on_host())
        GTEST_SKIP() << "left to the reference";
    for (const Length &n : {Length{1, 1}, {2, 2}, {3, 65}})
        for (DType act : {f32, half})
            for (const auto &[d, m] : mlp_scans) {
                const int64_t heads = 4, c = heads * d;
                const Shape rows = {n.s, n.t, c}, w1 = {n.s, heads, d, 4 * d},
                            b1 = {n.s, heads, 4 * d}, w2 = {n.s, heads, 4 * d, d},
                            b2 = {n.s, heads, d};
                const Tensor lr = random(act, {n.s, n.t, heads});
                for (int64_t i = 0; i < lr.count(); ++i)
                    lr.set(i, 0.5 + 0.4 * lr.at(i));
                check({"ttt_mlp",
                       {random(act, rows), random(act, rows), random(act, rows), lr,
                        random(f32, {m}, 0.05), random(f32, {heads, d}), random(f32, {heads, d}),
                        random(f32, w1, 0.1), random(f32, b1, 0.1), random(f32, w2, 0.1),
                        random(f32, b2, 0.1)},
                       {{act, rows}, {f32, w1}, {f32, b1}, {f32, w2}, {f32, b2}, {f32, {n.s, 3}}},
                       {0.1 / double(d), 1e-6}},
                      limit(act, true),
                      shape_name(act, n.s, n.t) + " D=" + std::to_string(d) +
                          " M=" + std::to_string(m));
            }
}

TEST_P(CpuOps, TttMlpGradient) {
    if (on_host())
        GTEST_SKIP() << "left to the reference";
    const auto check_gradient = [&](const Length &n, DType act, int64_t d, int64_t m, bool all) {
        const int64_t heads = 4, c = heads * d;
        const Shape rows = {n.s, n.t, c}, gates = {n.s, n.t, heads};
        const std::vector<Shape> states = {
            {n.s, heads, d, 4 * d}, {n.s, heads, 4 * d}, {n.s, heads, 4 * d, d}, {n.s, heads, d}};
        const Tensor lr = random(act, gates);
        for (int64_t i = 0; i < lr.count(); ++i)
            lr.set(i, 0.5 + 0.4 * lr.at(i));
        std::vector<Tensor> in = {
            random(act, rows),      random(act, rows),       random(act, rows),      lr,
            random(f32, {m}, 0.05), random(f32, {heads, d}), random(f32, {heads, d})};
        std::vector<Out> out = {{act, rows}, {act, rows},       {act, rows},      {act, gates},
                                {f32, {m}},  {f32, {heads, d}}, {f32, {heads, d}}};
        for (const Shape &s : states)
            in.push_back(random(f32, s, 0.1));
        in.push_back(random(act, rows));
        for (const Shape &s : states) {
            in.push_back(all ? random(f32, s) : none());
            out.push_back({f32, s});
        }
        in.push_back(all ? random(f32, {n.s, 3}) : none());
        check({"ttt_mlp_vjp", in, out, {0.1 / double(d), 1e-4}}, act == half ? 2e-2 : 1e-3,
              shape_name(act, n.s, n.t) + " D=" + std::to_string(d) + " M=" + std::to_string(m));
    };
    // Heads of 128 last: the others' numbers stay, as with few tokens dindex may cancel in bf16.
    for (const bool wide : {false, true})
        for (const Length &n : {Length{1, 1}, {2, 2}, {1, 65}})
            for (DType act : {f32, half})
                for (const auto &[d, m] : mlp_scans)
                    for (bool all : {true, false})
                        if ((d == 128) == wide)
                            check_gradient(n, act, d, m, all);
}

TEST_P(CpuOps, TttLinearGradient) {
    for (const Length &n : {Length{1, 1}, {2, 2}, {3, 65}, {1, 96}})
        for (DType act : {f32, half})
            for (int64_t d : {8, 20, 64, 96, 256})
                for (double form : {0.0, 1.0})
                    for (bool all : {true, false}) {
                        if (d == 256 && n.s == 3) // takes long
                            continue;
                        const int64_t heads = on_host() ? d == 64 ? 3 : 2 : n.s == 2 ? 3 : 4;
                        const int64_t c = heads * d, m = d == 20 ? 5 : 16;
                        const Shape rows = {n.s, n.t, c}, w = {n.s, heads, d, d};
                        const Shape b = {n.s, heads, d}, gates = {n.s, n.t, heads};
                        const Tensor lr = random(act, gates);
                        for (int64_t i = 0; i < lr.count(); ++i)
                            lr.set(i, 0.5 + 0.4 * lr.at(i));
                        check(
                            {"ttt_linear_vjp",
                             {random(act, rows), random(act, rows), random(act, rows), lr,
                              random(f32, {m}, 0.05), random(f32, {heads, d}),
                              random(f32, {heads, d}), random(f32, w, 0.1), random(f32, b, 0.1),
                              random(act, rows), all ? random(f32, w) : none(),
                              all ? random(f32, b) : none(), all ? random(f32, {n.s, 3}) : none()},
                             {{act, rows},
                              {act, rows},
                              {act, rows},
                              {act, gates},
                              {f32, {m}},
                              {f32, {heads, d}},
                              {f32, {heads, d}},
                              {f32, w},
                              {f32, b}},
                             {form, 1.0 / double(d), form * 0.1, 1e-4, form * 2, -form}},
                            act == half ? 2e-2 : 1e-3,
                            shape_name(act, n.s, n.t) + " D=" + std::to_string(d));
                    }
}

// Gradients of trainable weights.
TEST_P(CpuOps, WeightGradients) {
    for (const Length &n : lengths)
        for (DType act : {f32, half}) {
            const std::string what = shape_name(act, n.s, n.t);
            for (const auto &[m, w] :
                 {std::pair<int64_t, int64_t>{5, 3}, {16, 192}, {200, 16}, {65, 130}, {300, 520}})
                check({"matmul_tn_sum",
                       {random(act, {n.s, n.t, m}), random(act, {n.s, n.t, w})},
                       {{f32, {m, w}}},
                       {}},
                      limit(act, true), what);
            for (int64_t c : {5, 64, 100, 256}) {
                const Tensor x = random(f32, {n.s, n.t, c}, 2), dy = random(act, {n.s, n.t, c});
                const Tensor stats =
                    runner->run("layer_norm", {x, filled(f32, {c}, 1), filled(f32, {c}, 0)},
                                {{f32, x.shape}, {f32, {n.s, n.t, 2}}}, {1e-5})[1];
                check({"layer_norm_vjp_weight", {dy, x, stats}, {{f32, {c}}, {f32, {c}}}, {}}, 1e-4,
                      what);
                check({"sum_to", {dy}, {{f32, {c}}}, {}}, 1e-5, what);
            }
            const int64_t v = 70, c = 37, positions = n.t + 5;
            check({"embedding_vjp",
                   {random(f32, {n.s, n.t, c}), random_ids({n.s, n.t}, seed++, 0, 40)},
                   {{f32, {v, c}}, {f32, {positions, c}}},
                   {3}},
                  1e-5, what);
            for (int64_t vocabulary : {3, 520}) {
                const Tensor p = random(act, {n.s, n.t, vocabulary});
                check({"cross_entropy_vjp_table",
                       {p, random(act, {n.s, n.t, c}),
                        random_ids({n.s, n.t}, seed++, -1, int32_t(vocabulary)),
                        random(f32, {n.s, n.t})},
                       {{f32, {vocabulary, c}}},
                       {}},
                      limit(act, true), what);
            }
            const Tensor bits = random_ids({2}, seed++, -1000, 1000);
            check({"dropout", {random(act, {n.s, n.t, c}), bits}, {{act, {n.s, n.t, c}}}, {0.1, 7}},
                  limit(act), what);
            check({"dropout", {random(act, {n.s, n.t, c}), bits}, {{f32, {n.s, n.t, c}}}, {0.9, 0}},
                  limit(f32), what);
        }
    check({"matmul_tn_sum",
           {random(half, {3, 700, 70}), random(f32, {3, 700, 32})},
           {{f32, {70, 32}}},
           {}},
          2e-2, "long and mixed");
    check({"cross_entropy_vjp_table",
           {random(half, {2, 600, 1500}), random(half, {2, 600, 96}),
            random_ids({2, 600}, seed++, -1, 1500), random(f32, {2, 600})},
           {{f32, {1500, 96}}},
           {}},
          2e-2, "long");
}

TEST_P(CpuOps, Primitives) {
    for (const Shape &shape : {Shape{3}, {5, 37}, {2, 65, 16}, {2, 3, 70, 19}, {1, 130, 128}})
        for (DType act : {f32, half}) {
            const std::string what = shape_name(act, shape[0], int64_t(shape.size()));
            const Tensor x = random(act, shape, 3);
            const std::vector<Out> same = {{act, shape}};
            check({"affine", {x}, same, {-1.5, 0.25}}, limit(act), what);
            check({"exp", {x}, same, {}}, limit(act), what);
            check({"relu", {x}, same, {}}, limit(act), what);
            check({"step", {x}, same, {}}, limit(act), what);
            for (double order : {1.0, 2.0, 3.0})
                check({"gelu_derivative", {x}, same, {order}}, limit(act), what);
            Tensor positive = random(act, shape);
            for (int64_t i = 0; i < x.count(); ++i)
                positive.set(i, i == 0 ? 0 : 1.5 + positive.at(i));
            for (double exponent : {-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 3.0, 0.3, -1.7})
                check({"power", {positive}, same, {exponent}}, limit(act), what);
            check({"power", {x}, same, {3}}, limit(act), what);
            Shape column = shape, half_rows = shape;
            column.back() = 1;
            check({"sum_last", {x}, {{f32, column}}, {}}, 1e-4, what);
            check({"log_sum_exp", {x}, {{f32, column}}, {}}, 1e-5, what);
            check({"softmax", {x}, same, {0}}, limit(act), what);
            if (shape.size() > 1)
                check({"softmax", {x}, same, {1}}, limit(act), what);
            check({"reshape", {x}, {{f32, {x.count()}}}, {}}, 1e-6, what);
            // Operands of every shape that broadcasts, by the dims that they keep.
            for (uint32_t keep = 0; keep < 1u << shape.size(); ++keep) {
                Shape other = shape;
                for (size_t i = 0; i < shape.size(); ++i)
                    if (!(keep >> i & 1))
                        other[i] = 1;
                const Tensor b = random(f32, other);
                for (const char *op : {"add", "sub", "mul"}) {
                    check({op, {x, b}, same, {}}, limit(act), what);
                    check({op, {b, x}, {{f32, shape}}, {}}, limit(f32), what);
                }
                check({"broadcast", {b}, same, {}}, limit(act), what);
                std::vector<Tensor> out;
                std::string why;
                if (runner->try_run("sum_to", {x}, {{f32, other}}, {}, out, why) == PONDER_PLAN_OK)
                    check({"sum_to", {x}, {{f32, other}}, {}}, 1e-4, what);
            }
            for (size_t from = 1; from < shape.size(); ++from) { // without the leading dims
                const Shape tail(shape.begin() + int64_t(from), shape.end());
                check({"mul", {random(f32, tail), x}, same, {}}, limit(act), what);
                check({"sum_to", {x}, {{f32, tail}}, {}}, 1e-4, what);
            }
            if (shape.size() == 3) {
                const Shape rows = {shape[0], shape[1]}, one = {shape[0], shape[1], 1};
                const Tensor target = random_ids(rows, seed++, -1, int32_t(shape[2]));
                check({"pick", {x, target}, {{f32, one}}, {}}, 1e-6, what);
                check({"pick_vjp", {random(act, one), target}, same, {}}, 1e-6, what);
            }
            if (shape.size() > 1) {
                Shape part = shape;
                part[shape.size() - 2] -= 2;
                if (part[shape.size() - 2] > 0) {
                    check({"slice_rows", {x}, {{act, part}}, {1}}, 1e-6, what);
                    check({"slice_rows_vjp", {random(act, part)}, same, {1}}, 1e-6, what);
                }
            }
        }
    for (DType act : {f32, half})
        for (double part : {0.0, 2.0}) {
            const Tensor x = random(act, {2, 70, 3 * 60}), y = random(act, {2, 5, 70, 12});
            check({"split_heads", {x}, {{act, y.shape}}, {5, part, 3}}, 1e-6, "");
            check({"merge_heads", {y}, {{act, x.shape}}, {5, part, 3}}, 1e-6, "");
        }
}

TEST_P(CpuOps, LeavesTheRestToTheReference) {
    std::vector<Tensor> results;
    std::string why;
    const Tensor x = random(DType::f64, {1, 4, 8});
    EXPECT_EQ(PONDER_PLAN_NONE,
              runner->try_run("gelu", {x}, {{DType::f64, {1, 4, 8}}}, {}, results, why));
    const Tensor y = random(f32, {1, 4, 8});
    EXPECT_EQ(PONDER_PLAN_NONE,
              runner->try_run("no_such_op", {y}, {{f32, {1, 4, 8}}}, {}, results, why));
    EXPECT_EQ(PONDER_PLAN_NONE,
              runner->try_run("gelu", {y}, {{f32, {1, 4, 8}}}, {}, results, why, 2));
}

// And two entries that are no threads.
size_t threads_now() {
    size_t n = 0;
    DIR *const threads = opendir("/proc/self/task");
    if (!threads)
        throw std::runtime_error("/proc/self/task");
    while (readdir(threads))
        ++n;
    closedir(threads);
    return n;
}

// Four threads take the tasks of several calls at once, each with its own workspace.
TEST_P(CpuOps, ManyThreads) {
    if (!on_host())
        GTEST_SKIP() << "a device has one queue";
    ponder_backend_host host{};
    host.struct_size = sizeof host;
    host.workers = 4;
    char why[128] = "";
    ponder_device *device = module()->open(&host, why, sizeof why);
    ASSERT_NE(nullptr, device) << why;
    const int64_t t = 300, c = 128, v = 700;
    for (DType act : {f32, half}) {
        const Tensor x = random(act, {1, t, c}), w = random(act, {c, 3 * c}).frozen();
        const Tensor table = random(act, {v, c}).frozen();
        const std::vector<Case> cases = {
            {"linear", {x, w, none(), none()}, {{act, {1, t, 3 * c}}}, {0}},
            {"attention", {random(act, {1, t, 3 * c})}, {{act, {1, t, c}}, {f32, {1, 2, t}}}, {2}},
            {"cross_entropy",
             {x, table, random_ids({1, t}, seed++, 0, int32_t(v))},
             {{f32, {1, t}}, {f32, {1, t}}, {act, {1, t, v}}},
             {}},
        };
        for (const Case &k : cases) {
            SCOPED_TRACE(k.op);
            const std::vector<Tensor> serial = runner->run(k.op, k.in, k.out, k.attr);
            std::vector<Tensor> all = k.in;
            for (const Out &o : k.out)
                all.push_back(Tensor(o.type, o.shape));
            std::vector<ponder_tensor> description(all.size());
            std::vector<const void *> constant(k.in.size(), nullptr);
            std::vector<void *> buffers(all.size(), nullptr);
            for (size_t i = 0; i < all.size(); ++i) {
                description[i].dtype = int32_t(all[i].type);
                description[i].rank = int32_t(all[i].shape.size());
                std::copy(all[i].shape.begin(), all[i].shape.end(), description[i].dim);
                if (all[i].block)
                    buffers[i] = all[i].block->data();
                if (i < k.in.size() && all[i].constant)
                    constant[i] = buffers[i];
            }
            ponder_op_call call{};
            call.struct_size = sizeof call;
            call.version = 1;
            call.op = k.op.c_str();
            call.n_in = uint32_t(k.in.size()), call.n_out = uint32_t(k.out.size());
            call.n_attr = uint32_t(k.attr.size());
            call.tensor = description.data(), call.constant = constant.data();
            call.attr = k.attr.data();
            ponder_plan plan{};
            plan.struct_size = sizeof plan;
            ASSERT_EQ(PONDER_PLAN_OK, module()->plan(device, &call, &plan, why, sizeof why));
            std::atomic<uint32_t> next{0};
            std::atomic<size_t> most_threads{0};
            const size_t before = threads_now();
            std::vector<std::thread> threads;
            for (int i = 0; i < 4; ++i)
                threads.emplace_back([&] {
                    Block workspace(plan.workspace);
                    for (uint32_t task; (task = next++) < plan.tasks;)
                        module()->run(plan.kernel, buffers.data(), workspace.data(), task);
                    most_threads = std::max(most_threads.load(), threads_now());
                });
            for (std::thread &thread : threads)
                thread.join();
            EXPECT_LE(most_threads.load(), before + 4) << "a kernel started threads";
            for (size_t i = 0; i < serial.size(); ++i)
                EXPECT_TRUE(identical(serial[i], all[k.in.size() + i]));
            module()->drop(plan.kernel);
        }
    }
    EXPECT_GT(module()->packed_bytes(device), size_t(0));
    module()->close(device);
}

INSTANTIATE_TEST_SUITE_P(Levels, CpuOps,
                         testing::Values("avx2", "avx512", "avx512_bf16", "amx_bf16", "device"),
                         [](const auto &info) { return std::string(info.param); });

} // namespace
} // namespace ponder::test
