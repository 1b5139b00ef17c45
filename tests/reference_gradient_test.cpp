// Gradients of the reference kernels against central finite differences, in f64.
#include "reference_calls.hpp"

#include <gtest/gtest.h>

#include <functional>

namespace ponder::test {
namespace {

double weighted_sum(const Tensor &y, const Tensor &weights) {
    double sum = 0;
    for (int64_t i = 0; i < y.count(); ++i)
        sum += y.at(i) * weights.at(i);
    return sum;
}

// d (weights . forward(x)) / dx
Tensor difference_quotient(const std::function<Tensor(const Tensor &)> &forward, const Tensor &x,
                           const Tensor &weights) {
    constexpr double h = 1e-5;
    Tensor gradient(f64, x.shape), moved = x.to(f64);
    for (int64_t i = 0; i < x.count(); ++i) {
        const double here = x.at(i);
        moved.set(i, here + h);
        const double above = weighted_sum(forward(moved), weights);
        moved.set(i, here - h);
        const double below = weighted_sum(forward(moved), weights);
        moved.set(i, here);
        gradient.set(i, (above - below) / (2 * h));
    }
    return gradient;
}

constexpr double gradient_bound = 1e-6;

TEST(Gradient, LayerNorm) {
    const Shape shape = {2, 3, 7};
    const Out full{f64, shape}, stats{f64, {2, 3, 2}};
    const Tensor x = random_tensor(f64, shape, 1), g = random_tensor(f64, {7}, 2);
    const Tensor b = random_tensor(f64, {7}, 3), dy = random_tensor(f64, shape, 4);
    const Tensor carry = random_tensor(f64, shape, 5);
    const auto forward = [&](const Tensor &at) {
        return call("layer_norm", {at, g, b}, {full, stats}, {1e-5});
    };
    const Tensor expected =
        difference_quotient([&](const Tensor &at) { return forward(at)[0]; }, x, dy);
    const Tensor s = forward(x)[1];
    const Tensor alone = call("layer_norm_vjp", {dy, x, g, s, none()}, {full})[0];
    EXPECT_LE(relative_error(alone, expected), gradient_bound);
    const Tensor carried = call("layer_norm_vjp", {dy, x, g, s, carry}, {full})[0];
    const Tensor sum = call("add", {expected, carry}, {full})[0];
    EXPECT_LE(relative_error(carried, sum), gradient_bound);
}

TEST(Gradient, LinearIsLinearTheOtherWay) {
    const Tensor x = random_tensor(f64, {2, 3, 5}, 1), dy = random_tensor(f64, {2, 3, 4}, 2);
    for (const double flag : {0.0, 1.0}) {
        const Tensor w = random_tensor(f64, flag ? Shape{4, 5} : Shape{5, 4}, 3);
        const Tensor expected = difference_quotient(
            [&](const Tensor &at) {
                return call("linear", {at, w, none(), none()}, {{f64, dy.shape}}, {flag})[0];
            },
            x, dy);
        const Tensor dx = call("linear", {dy, w, none(), none()}, {{f64, x.shape}}, {1 - flag})[0];
        EXPECT_LE(relative_error(dx, expected), gradient_bound);
    }
}

TEST(Gradient, LoraLinearWithItsFactors) {
    const double scale = 0.7;
    const Tensor x = random_tensor(f64, {2, 3, 5}, 1), w = random_tensor(f64, {5, 4}, 2);
    const Tensor b = random_tensor(f64, {4}, 3), a = random_tensor(f64, {2, 5, 2}, 4);
    const Tensor bb = random_tensor(f64, {2, 2, 4}, 5), add = random_tensor(f64, {2, 3, 4}, 6);
    const Tensor dy = random_tensor(f64, {2, 3, 4}, 7);
    const auto forward = [&](const Tensor &x_, const Tensor &a_, const Tensor &bb_) {
        return call("lora_linear", {x_, w, b, a_, bb_, add}, {{f64, dy.shape}, {f64, {2, 3, 2}}},
                    {scale});
    };
    const auto back =
        call("lora_linear_vjp", {dy, w, a, bb}, {{f64, x.shape}, {f64, {2, 3, 2}}}, {scale});
    const auto y = [&](const Tensor &x_, const Tensor &a_, const Tensor &bb_) {
        return forward(x_, a_, bb_)[0];
    };
    const Tensor dx = difference_quotient([&](const Tensor &at) { return y(at, a, bb); }, x, dy);
    EXPECT_LE(relative_error(back[0], dx), gradient_bound);

    const Tensor da = difference_quotient([&](const Tensor &at) { return y(x, at, bb); }, a, dy);
    EXPECT_LE(relative_error(call("matmul_tn", {x, back[1]}, {{f64, a.shape}})[0], da),
              gradient_bound);
    const Tensor dbb = difference_quotient([&](const Tensor &at) { return y(x, a, at); }, bb, dy);
    const Tensor u = forward(x, a, bb)[1];
    Tensor scaled = dy.to(f64);
    for (int64_t i = 0; i < dy.count(); ++i)
        scaled.set(i, scale * dy.at(i));
    EXPECT_LE(relative_error(call("matmul_tn", {u, scaled}, {{f64, bb.shape}})[0], dbb),
              gradient_bound);
}

TEST(Gradient, Gelu) {
    const Tensor x = random_tensor(f64, {2, 3, 7}, 1, 4), dy = random_tensor(f64, {2, 3, 7}, 2);
    const Tensor expected = difference_quotient(
        [&](const Tensor &at) {
            return call("gelu", {at}, {{f64, at.shape}})[0];
        },
        x, dy);
    EXPECT_LE(relative_error(call("gelu_vjp", {dy, x}, {{f64, x.shape}})[0], expected),
              gradient_bound);
}

TEST(Gradient, SliceRows) {
    const Tensor x = random_tensor(f64, {2, 5, 3}, 1), dy = random_tensor(f64, {2, 2, 3}, 2);
    const Tensor expected = difference_quotient(
        [&](const Tensor &at) {
            return call("slice_rows", {at}, {{f64, dy.shape}}, {2})[0];
        },
        x, dy);
    EXPECT_LE(relative_error(call("slice_rows_vjp", {dy}, {{f64, x.shape}}, {2})[0], expected),
              gradient_bound);
}

TEST(Gradient, CrossEntropy) {
    const Tensor h = random_tensor(f64, {2, 3, 5}, 1), table = random_tensor(f64, {11, 5}, 2);
    const Tensor dnll = random_tensor(f64, {2, 3}, 3);
    Tensor target = random_ids({2, 3}, 4, 0, 11);
    target.set(4, -1);
    const Out row{f64, {2, 3}};
    const auto forward = [&](const Tensor &at) {
        return call("cross_entropy", {at, table, target}, {row, row, {f64, {2, 3, 11}}});
    };
    const auto full = forward(h);
    EXPECT_EQ(full[0].at(4), 0);
    EXPECT_GT(full[1].at(4), 0);
    const auto short_form = call("cross_entropy", {h, table, target}, {row, row, {}});
    EXPECT_TRUE(identical(full[0], short_form[0]));
    const Tensor expected =
        difference_quotient([&](const Tensor &at) { return forward(at)[0]; }, h, dnll);
    const Tensor dh =
        call("cross_entropy_vjp", {full[2], table, target, dnll}, {{f64, h.shape}})[0];
    EXPECT_LE(relative_error(dh, expected), gradient_bound);

    for (int64_t r = 0; r < 6; ++r) {
        double entropy = 0;
        for (int64_t j = 0; j < 11; ++j)
            entropy -= full[2].at(r * 11 + j) * std::log(full[2].at(r * 11 + j));
        EXPECT_NEAR(full[1].at(r), entropy, 1e-12);
        if (r == 4)
            continue;
        EXPECT_NEAR(full[0].at(r), -std::log(full[2].at(r * 11 + int64_t(target.at(r)))), 1e-12);
    }
}

TEST(Gradient, Attention) {
    const Tensor qkv = random_tensor(f64, {2, 5, 18}, 1, 2),
                 grad = random_tensor(f64, {2, 5, 6}, 2);
    const auto forward = [&](const Tensor &at) {
        return call("attention", {at}, {{f64, grad.shape}, {f64, {2, 2, 5}}}, {2});
    };
    const Tensor expected =
        difference_quotient([&](const Tensor &at) { return forward(at)[0]; }, qkv, grad);
    const auto o = forward(qkv);
    const Tensor dqkv = call("attention_vjp", {qkv, o[0], o[1], grad}, {{f64, qkv.shape}}, {2})[0];
    EXPECT_LE(relative_error(dqkv, expected), gradient_bound);
}

TEST(Gradient, Mean) {
    const Tensor x = random_tensor(f64, {2, 5}, 1), dy = filled(f64, {1}, 1.5);
    const Tensor expected = difference_quotient(
        [&](const Tensor &at) {
            return call("mean", {at}, {{f64, {1}}}, {8})[0];
        },
        x, dy);
    EXPECT_LE(relative_error(call("mean_vjp", {dy}, {{f64, x.shape}}, {8})[0], expected),
              gradient_bound);
}

// `gradient` is d (sum of weights . outputs) / d in[which], outputs without weights not counted.
void expect_gradient(const std::string &op, const std::vector<Tensor> &in, size_t which,
                     const std::vector<Out> &out, const std::vector<double> &attr,
                     const std::vector<Tensor> &weights, const Tensor &gradient) {
    SCOPED_TRACE(op + ", input " + std::to_string(which));
    Tensor expected = filled(f64, in[which].shape, 0);
    for (size_t o = 0; o < weights.size(); ++o) {
        if (!weights[o].block)
            continue;
        const Tensor part = difference_quotient(
            [&](const Tensor &at) {
                std::vector<Tensor> moved = in;
                moved[which] = at;
                return call(op, moved, out, attr)[o];
            },
            in[which], weights[o]);
        for (int64_t i = 0; i < part.count(); ++i)
            expected.set(i, expected.at(i) + part.at(i));
    }
    EXPECT_LE(relative_error(gradient, expected), gradient_bound);
}

TEST(Gradient, Embedding) {
    const Tensor table = random_tensor(f64, {9, 4}, 1), position = random_tensor(f64, {6, 4}, 2);
    const Tensor ids = random_ids({2, 3}, 3, 0, 5), dy = random_tensor(f64, {2, 3, 4}, 4);
    const auto back =
        call("embedding_vjp", {dy, ids}, {{f64, table.shape}, {f64, position.shape}}, {2});
    for (size_t i : {1, 2})
        expect_gradient("embedding", {ids, table, position}, i, {{f64, dy.shape}}, {2}, {dy},
                        back[i - 1]);
}

TEST(Gradient, LayerNormWeights) {
    const Tensor x = random_tensor(f64, {2, 3, 7}, 1), g = random_tensor(f64, {7}, 2);
    const Tensor b = random_tensor(f64, {7}, 3), dy = random_tensor(f64, {2, 3, 7}, 4);
    const std::vector<Out> out = {{f64, x.shape}, {f64, {2, 3, 2}}};
    const Tensor stats = call("layer_norm", {x, g, b}, out, {1e-5})[1];
    const auto back = call("layer_norm_vjp_weight", {dy, x, stats}, {{f64, {7}}, {f64, {7}}});
    for (size_t i : {1, 2})
        expect_gradient("layer_norm", {x, g, b}, i, out, {1e-5}, {dy}, back[i - 1]);
}

TEST(Gradient, LinearWeight) {
    const Tensor x = random_tensor(f64, {2, 3, 5}, 1), w = random_tensor(f64, {5, 4}, 2);
    const Tensor b = random_tensor(f64, {4}, 3), dy = random_tensor(f64, {2, 3, 4}, 4);
    const std::vector<Out> y = {{f64, dy.shape}};
    expect_gradient("linear", {x, w, b, none()}, 1, y, {0}, {dy},
                    call("matmul_tn_sum", {x, dy}, {{f64, w.shape}})[0]);
    expect_gradient("linear", {x, w, b, none()}, 2, y, {0}, {dy},
                    call("sum_to", {dy}, {{f64, {4}}})[0]);
}

TEST(Gradient, CrossEntropyTable) {
    const Tensor h = random_tensor(f64, {2, 3, 5}, 1), table = random_tensor(f64, {11, 5}, 2);
    const Tensor dnll = random_tensor(f64, {2, 3}, 3);
    Tensor target = random_ids({2, 3}, 4, 0, 11);
    target.set(4, -1);
    const std::vector<Out> out = {{f64, {2, 3}}, {f64, {2, 3}}, {f64, {2, 3, 11}}};
    const Tensor p = call("cross_entropy", {h, table, target}, out)[2];
    expect_gradient("cross_entropy", {h, table, target}, 1, out, {}, {dnll},
                    call("cross_entropy_vjp_table", {p, h, target, dnll}, {{f64, table.shape}})[0]);
}

TEST(Gradient, DropoutIsItsOwn) {
    const Tensor x = random_tensor(f64, {20, 30}, 1), seed = random_ids({2}, 2, -9, 9);
    const Out full{f64, x.shape};
    const std::vector<double> attr = {0.3, 5};
    const Tensor y = call("dropout", {x, seed}, {full}, attr)[0];
    int64_t zeros = 0;
    for (int64_t i = 0; i < x.count(); ++i) {
        zeros += y.at(i) == 0;
        if (y.at(i) != 0) {
            EXPECT_NEAR(y.at(i), x.at(i) / 0.7, 1e-15);
        }
    }
    EXPECT_NEAR(double(zeros) / 600, 0.3, 0.06);
    EXPECT_TRUE(identical(call("dropout", {x, seed}, {full}, attr)[0], y));
    for (const std::vector<double> &other : {std::vector<double>{0.3, 6}, {0.3, 0}})
        EXPECT_FALSE(identical(call("dropout", {x, seed}, {full}, other)[0], y));
    EXPECT_TRUE(identical(call("dropout", {x, seed}, {full}, {0, 5})[0], x));
    const Tensor small = random_tensor(f64, {3, 4}, 3), dy = random_tensor(f64, {3, 4}, 4);
    expect_gradient("dropout", {small, seed}, 0, {{f64, {3, 4}}}, attr, {dy},
                    call("dropout", {dy, seed}, {{f64, {3, 4}}}, attr)[0]);
}

TEST(Gradient, Conv1d) {
    const Tensor x = random_tensor(f64, {2, 6, 3}, 1), w = random_tensor(f64, {4, 3}, 2);
    const Tensor b = random_tensor(f64, {3}, 3), dy = random_tensor(f64, {2, 6, 3}, 4);
    for (const double shift : {0.0, 1.0}) {
        const auto back = call("conv1d_vjp", {dy, x, w},
                               {{f64, x.shape}, {f64, w.shape}, {f64, b.shape}}, {shift});
        for (size_t i = 0; i < 3; ++i)
            expect_gradient("conv1d", {x, w, b}, i, {{f64, x.shape}}, {shift}, {dy}, back[i]);
    }
}

TEST(Gradient, RopeTurnsBack) {
    const Tensor x = random_tensor(f64, {2, 6, 8}, 1), dy = random_tensor(f64, {2, 6, 8}, 2);
    const std::vector<double> there = {2, 4, 100, 0}, back = {2, 4, 100, 1};
    const std::vector<Out> full = {{f64, x.shape}};
    expect_gradient("rope", {x}, 0, full, there, {dy}, call("rope", {dy}, full, back)[0]);
}

TEST(Gradient, Primitives) {
    const Tensor x = random_tensor(f64, {2, 3, 4}, 1, 2), dy = random_tensor(f64, {2, 3, 4}, 2);
    const std::vector<Out> full = {{f64, x.shape}};
    const auto times = [&](const Tensor &slope) { return call("mul", {dy, slope}, full)[0]; };
    expect_gradient("gelu", {x}, 0, full, {}, {dy},
                    times(call("gelu_derivative", {x}, full, {1})[0]));
    for (const double order : {1.0, 2.0})
        expect_gradient("gelu_derivative", {x}, 0, full, {order}, {dy},
                        times(call("gelu_derivative", {x}, full, {order + 1})[0]));
    expect_gradient("relu", {x}, 0, full, {}, {dy}, times(call("step", {x}, full)[0]));
    expect_gradient("exp", {x}, 0, full, {}, {dy}, times(call("exp", {x}, full)[0]));
    expect_gradient("affine", {x}, 0, full, {-1.5, 0.25}, {dy},
                    call("affine", {dy}, full, {-1.5, 0})[0]);
    const Tensor positive = call("affine", {call("mul", {x, x}, full)[0]}, full, {1, 0.5})[0];
    expect_gradient(
        "power", {positive}, 0, full, {-0.5}, {dy},
        times(call("affine", {call("power", {positive}, full, {-1.5})[0]}, full, {-0.5, 0})[0]));
    const Tensor zeros = filled(f64, x.shape, 0);
    EXPECT_TRUE(identical(call("power", {zeros}, full, {-0.5})[0], zeros));

    const Out column{f64, {2, 3, 1}};
    const Tensor dsum = random_tensor(f64, {2, 3, 1}, 3);
    expect_gradient("sum_last", {x}, 0, {column}, {}, {dsum}, call("broadcast", {dsum}, full)[0]);
    expect_gradient("log_sum_exp", {x}, 0, {column}, {}, {dsum},
                    call("mul", {call("softmax", {x}, full, {0})[0], dsum}, full)[0]);
    Tensor target = random_ids({2, 3}, 4, 0, 4);
    target.set(2, -1);
    expect_gradient("pick", {x, target}, 0, {column}, {}, {dsum},
                    call("pick_vjp", {dsum, target}, full)[0]);
    for (const double causal : {0.0, 1.0}) { // dx = y (dy - sum(dy y))
        const Tensor y = call("softmax", {x}, full, {causal})[0];
        const Tensor sum = call("sum_last", {times(y)}, {column})[0];
        expect_gradient("softmax", {x}, 0, full, {causal}, {dy},
                        call("mul", {y, call("sub", {dy, sum}, full)[0]}, full)[0]);
    }
    for (const Shape &shape : {Shape{4}, {3, 1}, {2, 1, 4}, {1, 3, 4}, {1}, {2, 3, 4}}) {
        const Tensor other = random_tensor(f64, shape, 5);
        const Out small{f64, shape};
        for (const char *op : {"add", "sub", "mul"})
            for (const size_t which : {0, 1}) {
                const Tensor &a = which ? x : other, &b = which ? other : x;
                const std::vector<Tensor> in = {a, b};
                Tensor slope = filled(f64, x.shape, op[0] == 's' ? -1 : 1);
                if (which == 0)
                    slope = filled(f64, x.shape, 1);
                if (op[0] == 'm')
                    slope = x;
                expect_gradient(op, in, which, full, {}, {dy},
                                call("sum_to", {times(slope)}, {small})[0]);
            }
        expect_gradient("broadcast", {other}, 0, full, {}, {dy}, call("sum_to", {dy}, {small})[0]);
        expect_gradient("sum_to", {x}, 0, {small}, {}, {other},
                        call("broadcast", {other}, full)[0]);
    }
    const Tensor flat = call("reshape", {x}, {{f64, {6, 4}}})[0];
    EXPECT_TRUE(identical(flat, x.reshaped({6, 4})));
}

TEST(Gradient, Matmul) {
    for (const double ta : {0.0, 1.0})
        for (const double tb : {0.0, 1.0}) {
            const Shape sa = ta ? Shape{2, 2, 5, 3} : Shape{2, 2, 3, 5};
            const Shape sb = tb ? Shape{2, 2, 4, 5} : Shape{2, 2, 5, 4};
            const Tensor a = random_tensor(f64, sa, 1), b = random_tensor(f64, sb, 2);
            const Tensor dc = random_tensor(f64, {2, 2, 3, 4}, 3);
            const std::vector<Out> c = {{f64, dc.shape}};
            const Tensor da = ta ? call("matmul", {b, dc}, {{f64, sa}}, {tb, 1})[0]
                                 : call("matmul", {dc, b}, {{f64, sa}}, {0, 1 - tb})[0];
            const Tensor db = tb ? call("matmul", {dc, a}, {{f64, sb}}, {1, ta})[0]
                                 : call("matmul", {a, dc}, {{f64, sb}}, {1 - ta, 0})[0];
            expect_gradient("matmul", {a, b}, 0, c, {ta, tb}, {dc}, da);
            expect_gradient("matmul", {a, b}, 1, c, {ta, tb}, {dc}, db);
        }
}

TEST(Gradient, Heads) {
    const Tensor x = random_tensor(f64, {2, 3, 12}, 1), dy = random_tensor(f64, {2, 2, 3, 2}, 2);
    for (const double part : {0.0, 1.0, 2.0}) {
        const std::vector<double> attr = {2, part, 3};
        expect_gradient("split_heads", {x}, 0, {{f64, dy.shape}}, attr, {dy},
                        call("merge_heads", {dy}, {{f64, x.shape}}, attr)[0]);
        expect_gradient("merge_heads", {dy}, 0, {{f64, x.shape}}, attr, {x},
                        call("split_heads", {x}, {{f64, dy.shape}}, attr)[0]);
    }
    const Tensor y = call("split_heads", {x}, {{f64, dy.shape}}, {2, 1, 3})[0];
    EXPECT_EQ(y.at(((1 * 2 + 1) * 3 + 2) * 2 + 1), x.at((1 * 3 + 2) * 12 + 4 + 2 + 1));
}

TEST(Gradient, SliceRowsOfAnyRank) {
    for (const Shape &whole : {Shape{5, 3}, {2, 2, 5, 3}}) {
        Shape part = whole;
        part[part.size() - 2] = 2;
        const Tensor x = random_tensor(f64, whole, 1), dy = random_tensor(f64, part, 2);
        expect_gradient("slice_rows", {x}, 0, {{f64, part}}, {2}, {dy},
                        call("slice_rows_vjp", {dy}, {{f64, whole}}, {2})[0]);
    }
}

// The optimizers with gnorm = |g|, which moves with g.
TEST(Gradient, Optimizers) {
    const int64_t n = 6;
    const auto r = [&](uint32_t seed) { return random_tensor(f64, {n}, seed); };
    Tensor v = r(4);
    for (int64_t i = 0; i < n; ++i)
        v.set(i, std::abs(v.at(i)) + 0.1);
    const Out full{f64, {n}};
    for (const bool extended : {false, true})
        for (const double clip : {0.0, 0.7, 1e6}) {
            const Tensor h =
                from_values(f64, {8}, {0.3, 0.9, 0.99, 1e-3, 1 - 0.81, 1 - 0.9801, clip, 0});
            const std::vector<Tensor> three = extended
                                                  ? std::vector<Tensor>{r(5), r(6), r(7)}
                                                  : std::vector<Tensor>{none(), none(), none()};
            for (const bool adam : {true, false}) {
                const size_t states = adam ? 4 : 2;
                const std::vector<Tensor> state = {r(1), r(2), r(3), v};
                std::vector<Tensor> in(state.begin(), state.begin() + int64_t(states));
                in.push_back(h);
                in.push_back(call("norm", {in[1], none()}, {{f64, {1}}})[0]);
                in.insert(in.end(), three.begin(), three.end());
                const std::vector<Out> out(adam ? 3 : 1, full);
                std::vector<Tensor> weights, all = in;
                for (size_t o = 0; o < out.size(); ++o)
                    weights.push_back(r(uint32_t(8 + o)));
                all.insert(all.end(), weights.begin(), weights.end());
                std::vector<Out> gradients(states, full);
                gradients.resize(states + 3, extended ? full : Out{});
                const std::string op = adam ? "adam" : "sgd";
                const auto back = call(op + "_vjp", all, gradients);
                for (size_t i = 0; i < states + (extended ? 3 : 0); ++i) {
                    const size_t at = i < states ? i : i + 2;
                    SCOPED_TRACE(op + ", input " + std::to_string(at));
                    const Tensor expected = difference_quotient(
                        [&](const Tensor &x) {
                            std::vector<Tensor> moved = in;
                            moved[at] = x;
                            moved[states + 1] = call("norm", {moved[1], none()}, {{f64, {1}}})[0];
                            const auto next = call(op, moved, out);
                            Tensor y = filled(f64, {n}, 0);
                            for (size_t o = 0; o < out.size(); ++o)
                                for (int64_t j = 0; j < n; ++j)
                                    y.set(j, y.at(j) + weights[o].at(j) * next[o].at(j));
                            return y;
                        },
                        in[at], filled(f64, {n}, 1));
                    EXPECT_LE(relative_error(back[i], expected), gradient_bound);
                }
            }
        }
    // Nothing passes the root where v' = 0.
    const Tensor zero = filled(f64, {1}, 0), one = filled(f64, {1}, 1);
    const Tensor h = from_values(f64, {8}, {0.3, 0.9, 0.99, 1e-3, 0.1, 0.01, 1, 0});
    const Out single{f64, {1}};
    const auto back =
        call("adam_vjp", {one, zero, zero, zero, h, zero, none(), none(), none(), one, zero, zero},
             {single, single, single, single, {}, {}, {}});
    EXPECT_EQ(back[0].at(0), 1);
    EXPECT_NEAR(back[1].at(0), -0.3 / 1e-3, 1e-9);
    EXPECT_EQ(back[3].at(0), 0);
}

TEST(Gradient, TttLinear) {
    const int64_t s = 2, t = 7, h = 2, d = 3, c = h * d, m = 4;
    const auto r = [&](const Shape &shape, uint32_t seed, double scale = 1) {
        return random_tensor(f64, shape, seed, scale);
    };
    std::vector<Tensor> in = {r({s, t, c}, 1), r({s, t, c}, 2),    r({s, t, c}, 3),
                              r({s, t, h}, 4), r({m}, 5, 0.2),     r({h, d}, 6),
                              r({h, d}, 7),    r({s, h, d, d}, 8), r({s, h, d}, 9)};
    in[4].set(2, -0.6); // max(0, ..) cuts this one off
    const std::vector<Out> out = {
        {f64, {s, t, c}}, {f64, {s, h, d, d}}, {f64, {s, h, d}}, {f64, {s, 3}}};
    std::vector<Out> gradients;
    for (const Tensor &x : in)
        gradients.push_back({f64, x.shape});
    const std::vector<Tensor> weights = {r({s, t, c}, 10), r({s, h, d, d}, 11), r({s, h, d}, 12),
                                         r({s, 3}, 13, 5)};
    for (const double form : {0.0, 1.0})
        for (const std::vector<double> &rest : {std::vector<double>{0.3, 0, 1e-2, 0, 0},
                                                {0.3, 0.1, 1e-2, 0.8, -1},
                                                {0.3, 0, 1e-2, 1e6, 0}}) {
            std::vector<double> attr = {form};
            attr.insert(attr.end(), rest.begin(), rest.end());
            std::vector<Tensor> all = in;
            all.insert(all.end(), weights.begin(), weights.end());
            const auto back = call("ttt_linear_vjp", all, gradients, attr);
            for (size_t i = 0; i < in.size(); ++i)
                expect_gradient("ttt_linear", in, i, out, attr, weights, back[i]);
            // One output alone, the others' gradients absent.
            for (size_t only = 0; only < 4; ++only) {
                std::vector<Tensor> one(4);
                one[only] = weights[only];
                std::vector<Tensor> some = in;
                some.insert(some.end(), one.begin(), one.end());
                const auto part = call("ttt_linear_vjp", some, gradients, attr);
                expect_gradient("ttt_linear", in, 1, out, attr, one, part[1]);
            }
        }
}

TEST(Gradient, TttMlp) {
    const int64_t s = 2, t = 7, h = 2, d = 3, f = 4 * d, c = h * d, m = 4;
    const auto r = [&](const Shape &shape, uint32_t seed, double scale = 1) {
        return random_tensor(f64, shape, seed, scale);
    };
    const std::vector<Shape> states = {{s, h, d, f}, {s, h, f}, {s, h, f, d}, {s, h, d}};
    std::vector<Tensor> in = {r({s, t, c}, 1), r({s, t, c}, 2), r({s, t, c}, 3), r({s, t, h}, 4),
                              r({m}, 5, 0.2),  r({h, d}, 6),    r({h, d}, 7)};
    in[4].set(2, -0.6); // max(0, ..) cuts this one off
    std::vector<Tensor> weights = {r({s, t, c}, 10)};
    std::vector<Out> out = {{f64, {s, t, c}}};
    for (size_t i = 0; i < states.size(); ++i) {
        in.push_back(r(states[i], uint32_t(20 + i), 0.5));
        weights.push_back(r(states[i], uint32_t(30 + i)));
        out.push_back({f64, states[i]});
    }
    weights.push_back(r({s, 3}, 13, 5));
    out.push_back({f64, {s, 3}});
    std::vector<Out> gradients;
    for (const Tensor &x : in)
        gradients.push_back({f64, x.shape});
    const std::vector<double> attr = {0.3, 1e-2};
    std::vector<Tensor> all = in;
    all.insert(all.end(), weights.begin(), weights.end());
    const auto back = call("ttt_mlp_vjp", all, gradients, attr);
    for (size_t i = 0; i < in.size(); ++i)
        expect_gradient("ttt_mlp", in, i, out, attr, weights, back[i]);
    // One output alone, the others' gradients absent.
    for (size_t only = 0; only < out.size(); ++only) {
        std::vector<Tensor> one(out.size());
        one[only] = weights[only];
        std::vector<Tensor> some = in;
        some.insert(some.end(), one.begin(), one.end());
        const auto part = call("ttt_mlp_vjp", some, gradients, attr);
        expect_gradient("ttt_mlp", in, 1, out, attr, one, part[1]);
    }
}

} // namespace
} // namespace ponder::test
