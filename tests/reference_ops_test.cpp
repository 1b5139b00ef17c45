// The reference kernels against what does not come from them: complete layers of other
// implementations (tests/data), and sums written out here.
#include "formats/safetensors.hpp"
#include "reference_calls.hpp"

#include <gtest/gtest.h>

namespace ponder::test {
namespace {

// ---- Layers of other implementations ----

class Fixture {
public:
    Fixture(const std::string &name, DType type)
        : file_(SafeTensors::open(std::string(PONDER_TEST_DATA) + "/" + name + ".safetensors")),
          type_(type) {}

    bool has(const std::string &name) const { return file_.find(name) != nullptr; }
    Tensor operator[](const std::string &name) const {
        const TensorInfo *info = file_.find(name);
        if (!info)
            throw std::runtime_error("no tensor " + name);
        Tensor t(type_, info->shape);
        file_.read(name, info->shape, type_, t.block->data());
        return t;
    }
    double number(const std::string &key, double otherwise) const {
        const auto found = file_.metadata().find(key);
        if (found == file_.metadata().end() || found->second == "None")
            return otherwise;
        return std::stod(found->second);
    }
    DType type() const { return type_; }

private:
    SafeTensors file_;
    DType type_;
};

// [H, ...] -> [S, H, ...]: every stream starts from the same fast weights.
Tensor for_streams(const Tensor &t, Shape shape) {
    Tensor all(t.type, shape);
    for (int64_t i = 0; i < all.count(); ++i)
        all.set(i, t.at(i % t.count()));
    return all;
}

Tensor transposed(const Tensor &t, int64_t rows, int64_t columns) {
    Tensor r(t.type, {columns, rows});
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j)
            r.set(j * rows + i, t.at(i * columns + j));
    return r;
}

// A layer in ops, whatever its origin: the parts that differ are parameters.
struct Layer {
    Tensor x, wq, wk, wv, wo; // projections, [out, in] if `out_in`
    bool out_in = false;
    Tensor conv_q, conv_q_bias, conv_k, conv_k_bias; // [4, C], absent without convolution
    double shift = 0;
    Tensor lr_weight, lr_bias;    // [H, C], [H]
    Tensor index, norm_g, norm_b; // [M], [H, D], [H, D]
    std::vector<Tensor> state;    // w1, b1 (, w2, b2) per stream
    std::vector<double> scan;     // attributes of the scan
    Tensor post_g, post_b, gate;  // gate absent: none
    double eps = 1e-6, theta = 10000;

    struct Result {
        Tensor y, loss;
        std::vector<Tensor> state;
    };
    // segment: tokens per scan call, 0 for all at once; losses of each call in `segments`.
    Result run(int64_t segment = 0, std::vector<Tensor> *segments = nullptr) const {
        const DType type = x.type;
        const int64_t s = x.shape[0], t = x.shape[1], c = x.shape[2], h = norm_g.shape[0];
        const Out full{type, {s, t, c}};
        const auto project = [&](const Tensor &in, const Tensor &w) {
            return call("linear", {in, w.frozen(), none(), none()}, {full}, {double(out_in)})[0];
        };
        const auto mix = [&](const Tensor &in, const Tensor &w, const Tensor &b) {
            const Tensor y = w.block ? call("conv1d", {in, w, b}, {full}, {shift})[0] : in;
            return call("rope", {y}, {full}, {double(h), double(index.count()), theta, 0})[0];
        };
        const Tensor q = mix(project(x, wq), conv_q, conv_q_bias);
        const Tensor k = mix(project(x, wk), conv_k, conv_k_bias);
        const Tensor v = project(x, wv);
        const Out gates{type, {s, t, h}};
        const Tensor lr = call(
            "sigmoid", call("linear", {x, lr_weight, lr_bias, none()}, {gates}, {1}), {gates})[0];

        Result r;
        r.state = state;
        r.y = Tensor(type, {s, t, c});
        const int64_t step = segment ? segment : t;
        for (int64_t first = 0; first < t; first += step) {
            const int64_t n = std::min(step, t - first);
            std::vector<Tensor> in;
            for (const Tensor &part : {q, k, v, lr})
                in.push_back(call("slice_rows", {part}, {{type, {s, n, part.shape[2]}}},
                                  {double(first)})[0]);
            in.insert(in.end(), {index, norm_g, norm_b});
            in.insert(in.end(), r.state.begin(), r.state.end());
            std::vector<Out> out = {{type, {s, n, c}}};
            for (const Tensor &w : r.state)
                out.push_back({type, w.shape});
            out.push_back({type, {s, 3}});
            const auto result = call(state.size() == 2 ? "ttt_linear" : "ttt_mlp", in, out, scan);
            for (int64_t i = 0; i < s; ++i)
                for (int64_t j = 0; j < n * c; ++j)
                    r.y.set((i * t + first) * c + j, result[0].at(i * n * c + j));
            r.state.assign(result.begin() + 1, result.end() - 1);
            r.loss = result.back();
            if (segments)
                segments->push_back(r.loss);
        }
        Tensor o = call("layer_norm", {r.y, post_g, post_b}, {full, {type, {s, t, 2}}}, {eps})[0];
        if (gate.block)
            o = call("mul", {call("gelu", {project(x, gate)}, {full})[0], o}, {full})[0];
        r.y = project(o, wo);
        return r;
    }
};

Layer ponder_layer(const Fixture &f) {
    Layer l;
    l.x = f["input"];
    const int64_t s = l.x.shape[0], c = l.x.shape[2];
    const int64_t h = int64_t(f.number("num_heads", 0)), d = c / h;
    l.wq = l.wk = f["param.wq.kernel"];
    l.wv = f["param.wv.kernel"];
    l.wo = f["param.wo.kernel"];
    l.gate = f["param.wg.kernel"];
    l.conv_q = f["param.conv_q.kernel"].reshaped({4, c});
    l.conv_k = f["param.conv_k.kernel"].reshaped({4, c});
    l.conv_q_bias = f["param.conv_q.bias"];
    l.conv_k_bias = f["param.conv_k.bias"];
    l.shift = 1;
    l.lr_weight = Tensor(f.type(), {h, c});
    l.lr_bias = Tensor(f.type(), {h});
    for (int64_t i = 0; i < h; ++i) {
        const std::string name = "param.learnable_ttt_lr_layers." + std::to_string(i);
        const Tensor w = f[name + ".kernel"];
        for (int64_t j = 0; j < c; ++j)
            l.lr_weight.set(i * c + j, w.at(j));
        l.lr_bias.set(i, f[name + ".bias"].at(0));
    }
    l.index = f["param.learnable_token_idx"];
    l.norm_g = f["param.ttt_norm.scale"].reshaped({h, d});
    l.norm_b = f["param.ttt_norm.bias"].reshaped({h, d});
    l.state = {for_streams(f["param.W1"], {s, h, d, d}), for_streams(f["param.b1"], {s, h, d})};
    l.eps = 1e-5;
    const double scale =
        f.number("ttt_base_lr", 1) * 768 / double(c) / double(d) * f.number("gating_scale", 1);
    l.scan = {1,
              scale,
              f.number("eta_decay_rate", 0),
              l.eps,
              f.number("max_grad_norm", 0),
              f.number("causal_k", 0)};
    l.post_g = f["param.post_norm.scale"];
    l.post_b = f["param.post_norm.bias"];
    return l;
}

Layer official_layer(const Fixture &f, bool mlp) {
    Layer l;
    l.x = f["input"];
    const int64_t s = l.x.shape[0], c = l.x.shape[2];
    const int64_t h = int64_t(f.number("heads", 0)), d = c / h;
    l.out_in = true;
    l.wq = f["param.q_proj.weight"];
    l.wk = f.has("param.k_proj.weight") ? f["param.k_proj.weight"] : l.wq;
    l.wv = f["param.v_proj.weight"];
    l.wo = f["param.o_proj.weight"];
    if (f.has("param.g_proj.weight"))
        l.gate = f["param.g_proj.weight"];
    if (f.has("param.conv_q.weight")) {
        l.conv_q = transposed(f["param.conv_q.weight"], c, 4);
        l.conv_k = transposed(f["param.conv_k.weight"], c, 4);
        l.conv_q_bias = f["param.conv_q.bias"];
        l.conv_k_bias = f["param.conv_k.bias"];
    }
    l.lr_weight = f["param.learnable_ttt_lr_weight"].reshaped({h, c});
    l.lr_bias = f["param.learnable_ttt_lr_bias"].reshaped({h});
    l.index = f["param.learnable_token_idx"];
    l.norm_g = f["param.ttt_norm_weight"];
    l.norm_b = f["param.ttt_norm_bias"];
    const int64_t width = mlp ? 4 * d : d;
    l.state = {for_streams(f["param.W1"], {s, h, d, width}),
               for_streams(f["param.b1"], {s, h, width})};
    const double scale = f.number("ttt_base_lr", 1) / double(d);
    l.scan = {0, scale, 0, l.eps, 0, 0};
    if (mlp) {
        l.state.push_back(for_streams(f["param.W2"], {s, h, width, d}));
        l.state.push_back(for_streams(f["param.b2"], {s, h, d}));
        l.scan = {scale, l.eps};
    }
    l.post_g = f["param.post_norm.weight"];
    l.post_b = f["param.post_norm.bias"];
    return l;
}

// Mean over streams of one of the three losses.
double mean_loss(const Tensor &loss, int64_t which) {
    double sum = 0;
    for (int64_t s = 0; s < loss.shape[0]; ++s)
        sum += loss.at(s * 3 + which);
    return sum / double(loss.shape[0]);
}

class Parity : public testing::TestWithParam<DType> {
protected:
    // The fixtures are stored as f32, so f64 is held to their rounding.
    double bound() const { return GetParam() == f64 ? 1e-6 : 1e-5; }
};
INSTANTIATE_TEST_SUITE_P(, Parity, testing::Values(f32, f64),
                         [](const auto &info) { return info.param == f64 ? "f64" : "f32"; });

TEST_P(Parity, PonderLayers) {
    for (const char *name : {"ponder_ttt_layer_a", "ponder_ttt_layer_b", "ponder_ttt_layer_c"}) {
        SCOPED_TRACE(name);
        const Fixture f(name, GetParam());
        const Layer layer = ponder_layer(f);
        const auto whole = layer.run();
        EXPECT_LE(relative_error(whole.y, f["output"]), bound());

        const Tensor reference[3] = {f["stat.ttt_loss_init"], f["stat.ttt_loss_step_0"],
                                     f["stat.ttt_loss_step_1"]};
        for (int64_t i = 0; i < 3; ++i) {
            double mean = 0;
            for (double v : reference[i].values())
                mean += v / double(reference[i].count());
            EXPECT_NEAR(mean_loss(whole.loss, i), mean, 1e-5 * mean) << "statistic " << i;
        }
        // Mini-batch by mini-batch the carried state gives the same, and each one's losses.
        std::vector<Tensor> segments;
        const auto parts = layer.run(16, &segments);
        EXPECT_TRUE(identical(parts.y, whole.y));
        EXPECT_TRUE(identical(parts.state[0], whole.state[0]));
        ASSERT_EQ(int64_t(segments.size()), reference[1].count());
        for (int64_t b = 0; b < int64_t(segments.size()); ++b)
            for (int64_t i = 1; i < 3; ++i)
                EXPECT_NEAR(mean_loss(segments[size_t(b)], i), reference[i].at(b),
                            1e-5 * reference[i].at(b));
    }
}

TEST_P(Parity, OfficialLayers) {
    for (const bool mlp : {false, true})
        for (const char *which : {"a", "b"}) {
            const std::string name =
                std::string(mlp ? "ttt_official_mlp_" : "ttt_official_linear_") + which;
            SCOPED_TRACE(name);
            const Fixture f(name, GetParam());
            const Layer layer = official_layer(f, mlp);
            const auto whole = layer.run();
            EXPECT_LE(relative_error(whole.y, f["output"]), bound());

            std::vector<Tensor> segments;
            const auto parts = layer.run(16, &segments);
            EXPECT_TRUE(identical(parts.y, whole.y));
            for (size_t i = 0; i < whole.state.size(); ++i)
                EXPECT_TRUE(identical(parts.state[i], whole.state[i]));
            double after = 0;
            for (const Tensor &l : segments)
                after += mean_loss(l, 2) / double(segments.size());
            EXPECT_NEAR(mean_loss(whole.loss, 2), after, 1e-6 * after);
            EXPECT_LT(mean_loss(whole.loss, 2), mean_loss(whole.loss, 1));
        }
}

// ---- Values written out ----

TEST(Values, Embedding) {
    const Tensor table = random_tensor(f32, {9, 4}, 1), position = random_tensor(f32, {6, 4}, 2);
    const Tensor ids = random_ids({2, 3}, 3, 0, 9);
    const Tensor y =
        call("embedding", {ids, table.frozen(), position.frozen()}, {{f32, {2, 3, 4}}}, {2})[0];
    for (int64_t r = 0; r < 6; ++r)
        for (int64_t c = 0; c < 4; ++c)
            EXPECT_EQ(float(y.at(r * 4 + c)), float(table.at(int64_t(ids.at(r)) * 4 + c)) +
                                                  float(position.at((2 + r % 3) * 4 + c)));
}

TEST(Values, AttentionIsCausal) {
    const Tensor qkv = random_tensor(f32, {2, 5, 18}, 1);
    Tensor changed = qkv.to(f32);
    for (int64_t s = 0; s < 2; ++s)
        for (int64_t c = 0; c < 18; ++c)
            changed.set((s * 5 + 3) * 18 + c, NAN);
    const std::vector<Out> out = {{f32, {2, 5, 6}}, {f32, {2, 2, 5}}};
    const auto a = call("attention", {qkv}, out, {2}), b = call("attention", {changed}, out, {2});
    for (int64_t s = 0; s < 2; ++s)
        for (int64_t i = 0; i < 3 * 6; ++i)
            EXPECT_EQ(a[0].at(s * 30 + i), b[0].at(s * 30 + i));
    for (int64_t c = 0; c < 6; ++c) // the first token sees itself only
        EXPECT_EQ(float(a[0].at(c)), float(qkv.at(12 + c)));
}

TEST(Values, Conv1dShift) {
    const Tensor x = random_tensor(f64, {2, 6, 3}, 1), w = random_tensor(f64, {4, 3}, 2);
    const Tensor b = random_tensor(f64, {3}, 3);
    for (const int64_t shift : {0, 1}) {
        const Tensor y = call("conv1d", {x, w, b}, {{f64, x.shape}}, {double(shift)})[0];
        for (int64_t s = 0; s < 2; ++s)
            for (int64_t t = 0; t < 6; ++t)
                for (int64_t c = 0; c < 3; ++c) {
                    double sum = b.at(c);
                    for (int64_t j = 0; j < 4; ++j)
                        if (const int64_t at = t - 3 - shift + j; at >= 0)
                            sum += w.at(j * 3 + c) * x.at((s * 6 + at) * 3 + c);
                    EXPECT_NEAR(y.at((s * 6 + t) * 3 + c), sum, 1e-15);
                }
    }
}

TEST(Values, MeanFillNorm) {
    const Tensor a = random_tensor(f32, {1000}, 1), b = random_tensor(f32, {1000}, 2);
    double sum = 0, square = 0, distance = 0;
    for (int64_t i = 0; i < 1000; ++i) {
        sum += a.at(i);
        square += a.at(i) * a.at(i);
        distance += (a.at(i) - b.at(i)) * (a.at(i) - b.at(i));
    }
    EXPECT_EQ(call("mean", {a}, {{f32, {1}}}, {500})[0].at(0), float(sum / 500));
    EXPECT_EQ(call("norm", {a, none()}, {{f32, {1}}})[0].at(0), float(std::sqrt(square)));
    EXPECT_EQ(call("norm", {a, b}, {{f32, {1}}})[0].at(0), float(std::sqrt(distance)));
    EXPECT_TRUE(identical(call("fill", {}, {{f32, {3, 2}}}, {0.25})[0], filled(f32, {3, 2}, 0.25)));
}

TEST(Values, AdamAndSgd) {
    const int64_t n = 17;
    const Tensor w = random_tensor(f64, {n}, 1), g = random_tensor(f64, {n}, 2, 3);
    const Tensor m = random_tensor(f64, {n}, 3), v = random_tensor(f64, {n}, 4);
    for (int64_t i = 0; i < n; ++i)
        v.set(i, std::abs(v.at(i)));
    const Out full{f64, {n}};
    for (const double clip : {0.0, 1.5, 1e6}) {
        const double lr = 3e-3, beta1 = 0.9, beta2 = 0.999, eps = 1e-8, t = 3, gnorm = 6;
        const Tensor h = from_values(
            f64, {8},
            {lr, beta1, beta2, eps, 1 - std::pow(beta1, t), 1 - std::pow(beta2, t), clip, 0.1});
        const Tensor norm = filled(f64, {1}, gnorm);
        const auto adam = call("adam", {w, g, m, v, h, norm}, {full, full, full});
        const auto adamw = call("adamw", {w, g, m, v, h, norm}, {full, full, full});
        const Tensor sgd = call("sgd", {w, g, h, norm}, {full})[0];
        const double factor = clip > 0 ? std::min(1.0, clip / (gnorm + 1e-6)) : 1;
        for (int64_t i = 0; i < n; ++i) {
            const double gi = factor * g.at(i), mi = beta1 * m.at(i) + (1 - beta1) * gi;
            const double vi = beta2 * v.at(i) + (1 - beta2) * gi * gi;
            const double step = lr * (mi / (1 - std::pow(beta1, t))) /
                                (std::sqrt(vi / (1 - std::pow(beta2, t))) + eps);
            EXPECT_NEAR(adam[0].at(i), w.at(i) - step, 1e-15);
            EXPECT_NEAR(adam[1].at(i), mi, 1e-15);
            EXPECT_NEAR(adam[2].at(i), vi, 1e-15);
            EXPECT_NEAR(sgd.at(i), w.at(i) - lr * gi, 1e-15);
            EXPECT_NEAR(adamw[0].at(i), w.at(i) - step - lr * 0.1 * w.at(i), 1e-15);
            EXPECT_EQ(adamw[1].at(i), adam[1].at(i));
            EXPECT_EQ(adamw[2].at(i), adam[2].at(i));
        }
    }
}

// With q = k and no learning, y - v is the reconstruction error itself: y = k + LN(z).
TEST(Values, ScanLossesAreErrorsOfTheLastToken) {
    const int64_t t = 3, h = 2, d = 4, c = h * d;
    const Tensor q = random_tensor(f64, {1, t, c}, 1), k = random_tensor(f64, {1, t, c}, 2);
    const Tensor v = random_tensor(f64, {1, t, c}, 3), lr = filled(f64, {1, t, h}, 0.8);
    const Tensor index = random_tensor(f64, {4}, 4, 0.1), g = filled(f64, {h, d}, 1.1);
    const Tensor b = random_tensor(f64, {h, d}, 5);
    const auto rows = [&](const Tensor &x) {
        return call("slice_rows", {x}, {{f64, {1, 1, x.shape[2]}}}, {double(t - 1)})[0];
    };
    for (const bool mlp : {false, true}) {
        const int64_t f = mlp ? 4 * d : d;
        std::vector<Tensor> state = {random_tensor(f64, {1, h, d, f}, 6),
                                     random_tensor(f64, {1, h, f}, 7)};
        if (mlp) {
            state.push_back(random_tensor(f64, {1, h, f, d}, 8));
            state.push_back(random_tensor(f64, {1, h, d}, 9));
        }
        const auto scan = [&](const std::vector<Tensor> &tokens, const std::vector<Tensor> &from) {
            std::vector<Tensor> in = tokens;
            in.insert(in.end(), {index, g, b});
            in.insert(in.end(), from.begin(), from.end());
            std::vector<Out> out = {{f64, tokens[0].shape}};
            for (const Tensor &w : from)
                out.push_back({f64, w.shape});
            out.push_back({f64, {1, 3}});
            return mlp ? call("ttt_mlp", in, out, {0.3, 1e-6})
                       : call("ttt_linear", in, out, {0, 0.3, 0, 1e-6, 0, 0});
        };
        const auto error_under = [&](const std::vector<Tensor> &weights) {
            const Tensor key = rows(k), value = rows(v);
            const Tensor y = scan({key, key, value, filled(f64, {1, 1, h}, 0)}, weights)[0];
            double sum = 0;
            for (int64_t j = 0; j < c; ++j)
                sum += (y.at(j) - value.at(j)) * (y.at(j) - value.at(j));
            return sum / double(c);
        };
        const auto result = scan({q, k, v, lr}, state);
        const Tensor &loss = result.back();
        EXPECT_NEAR(loss.at(0), error_under(state), 1e-12);
        EXPECT_NEAR(loss.at(1), error_under(state), 1e-12);
        EXPECT_NEAR(loss.at(2), error_under({result.begin() + 1, result.end() - 1}), 1e-12);
        EXPECT_LT(loss.at(2), loss.at(1));
    }
}

// ---- bf16 against f64 ----

// Activations and frozen weights in bf16, what the list calls wide in f32.
void compare_bf16(const std::string &op, const std::vector<Tensor> &in, const std::string &wide_in,
                  const std::vector<Shape> &out, const std::string &wide_out,
                  const std::vector<double> &attr = {}) {
    SCOPED_TRACE(op);
    std::vector<Tensor> exact, small;
    for (size_t i = 0; i < in.size(); ++i) {
        const bool wide = wide_in[i] == 'w';
        small.push_back(in[i].to(wide ? f32 : DType::bf16));
        exact.push_back(small.back().to(f64)); // the same numbers
    }
    std::vector<Out> exact_out, small_out;
    for (size_t i = 0; i < out.size(); ++i) {
        exact_out.push_back({f64, out[i]});
        small_out.push_back({wide_out[i] == 'w' ? f32 : DType::bf16, out[i]});
    }
    const auto a = call(op, small, small_out, attr), b = call(op, exact, exact_out, attr);
    for (size_t i = 0; i < out.size(); ++i)
        EXPECT_LE(relative_error(a[i], b[i]), 2e-2) << i;
}

TEST(Bf16, FollowsF64) {
    const auto r = [](const Shape &shape, uint32_t seed) {
        return random_tensor(f64, shape, seed);
    };
    const Shape x = {2, 6, 8};
    const Tensor ids = random_ids({2, 6}, 1, 0, 20);
    compare_bf16("embedding", {ids, r({20, 8}, 2), r({9, 8}, 3)}, "   ", {x}, "w", {3});
    compare_bf16("layer_norm", {r(x, 1), r({8}, 2), r({8}, 3)}, "   ", {x, {2, 6, 2}}, " w",
                 {1e-5});
    compare_bf16("linear", {r(x, 1), r({8, 5}, 2), r({5}, 3), r({2, 6, 5}, 4)}, "   w", {{2, 6, 5}},
                 " ", {0});
    compare_bf16("lora_linear",
                 {r(x, 1), r({8, 5}, 2), none(), r({2, 8, 3}, 3), r({2, 3, 5}, 4), none()},
                 "   ww ", {{2, 6, 5}, {2, 6, 3}}, "  ", {2});
    compare_bf16("lora_linear_vjp",
                 {r({2, 6, 5}, 1), r({8, 5}, 2), r({2, 8, 3}, 3), r({2, 3, 5}, 4)}, "  ww",
                 {x, {2, 6, 3}}, "  ", {2});
    compare_bf16("gelu", {r(x, 1)}, " ", {x}, " ");
    compare_bf16("gelu_vjp", {r(x, 1), r(x, 2)}, "  ", {x}, " ");
    compare_bf16("mul", {r(x, 1), r(x, 2)}, "  ", {x}, " ");
    compare_bf16("sigmoid", {r(x, 1)}, " ", {x}, " ");
    compare_bf16("cross_entropy", {r(x, 1), r({20, 8}, 2), ids}, "   ",
                 {{2, 6}, {2, 6}, {2, 6, 20}}, "ww ");
    compare_bf16("attention", {r({2, 6, 24}, 1)}, " ", {x, {2, 4, 6}}, " w", {4});
    compare_bf16("conv1d", {r(x, 1), r({4, 8}, 2), r({8}, 3)}, "   ", {x}, " ", {0});
    compare_bf16("rope", {r(x, 1)}, " ", {x}, " ", {2, 4, 10000, 0});
    compare_bf16("matmul_tn", {r(x, 1), r({2, 6, 3}, 2)}, "  ", {{2, 8, 3}}, "w");
    const std::vector<Tensor> scan = {
        r(x, 1),        r(x, 2),      r(x, 3),      r({2, 6, 2}, 4),
        r({4}, 5),      r({2, 4}, 6), r({2, 4}, 7), r({2, 2, 4, 4}, 8),
        r({2, 2, 4}, 9)};
    for (const double form : {0.0, 1.0})
        compare_bf16("ttt_linear", scan, "       ww", {x, {2, 2, 4, 4}, {2, 2, 4}, {2, 3}}, " www",
                     {form, 0.25, 0, 1e-6, 0, 0});
}

// ---- int8 weights ----

// An int8 matrix with scales does what their product does, for scales of rows and of columns.
TEST(ScaledWeights, StandForTheirProduct) {
    const Shape x = {2, 3, 5}, y = {2, 3, 4};
    for (const bool of_rows : {false, true})
        for (const DType type : {f32, f64}) {
            SCOPED_TRACE(of_rows);
            const double bound = type == f64 ? 1e-13 : 1e-5;
            const auto same = [&](const std::string &op, std::vector<Tensor> in, size_t w,
                                  const ScaledTensor &scaled, const std::vector<Out> &out,
                                  const std::vector<double> &attr) {
                SCOPED_TRACE(op);
                in[w] = scaled.product(f64);
                std::vector<Out> exact = out;
                for (Out &o : exact)
                    o.type = f64;
                std::vector<Tensor> wide = in;
                for (Tensor &t : wide)
                    t = t.to(f64);
                const auto expected = call(op, wide, exact, attr);
                in[w] = scaled.w;
                in.push_back(scaled.scales);
                const auto ours = call(op, in, out, attr);
                for (size_t i = 0; i < ours.size(); ++i)
                    EXPECT_LE(relative_error(ours[i], expected[i]), bound) << i;
            };
            const auto r = [&](const Shape &shape, uint32_t seed) {
                return random_tensor(type, shape, seed);
            };
            const ScaledTensor w = random_scaled({5, 4}, 1, of_rows);
            const ScaledTensor table = random_scaled({11, 5}, 2, of_rows);
            same("linear", {r(x, 1), none(), r({4}, 2), r(y, 3)}, 1, w, {{type, y}}, {0});
            same("linear", {r(y, 1), none(), none(), none()}, 1, w, {{type, x}}, {1});
            same("lora_linear",
                 {r(x, 1), none(), r({4}, 2), r({2, 5, 2}, 3), r({2, 2, 4}, 4), r(y, 5)}, 1, w,
                 {{type, y}, {type, {2, 3, 2}}}, {0.7});
            same("lora_linear_vjp", {r(y, 1), none(), r({2, 5, 2}, 3), r({2, 2, 4}, 4)}, 1, w,
                 {{type, x}, {type, {2, 3, 2}}}, {0.7});
            Tensor target = random_ids({2, 3}, 4, 0, 11);
            same("embedding", {target, none(), r({6, 5}, 1)}, 1, table, {{type, x}}, {2});
            same("embedding_at", {target, random_ids({2, 3}, 5, 0, 6), none(), r({6, 5}, 1)}, 2,
                 table, {{type, x}}, {});
            target.set(4, -1);
            same("cross_entropy", {r(x, 1), none(), target}, 1, table,
                 {{type, {2, 3}}, {type, {2, 3}}, {type, {2, 3, 11}}}, {});
            same("cross_entropy_vjp", {r({2, 3, 11}, 1), none(), target, r({2, 3}, 2)}, 1, table,
                 {{type, x}}, {});
        }
}

// ---- The contract of a backend ----

TEST(Contract, RefusesWhatItCannotDo) {
    OpRunner ops(reference_backend());
    std::vector<Tensor> results;
    std::string why;
    const Tensor x = random_tensor(f32, {1, 2, 3}, 1), w = random_tensor(f32, {4, 5}, 2);
    const std::vector<Out> y = {{f32, {1, 2, 5}}};
    EXPECT_EQ(ops.try_run("no such op", {x}, y, {}, results, why), PONDER_PLAN_NONE);
    EXPECT_EQ(ops.try_run("gelu", {x}, {{f32, x.shape}}, {}, results, why, 2), PONDER_PLAN_NONE);
    EXPECT_EQ(ops.try_run("linear", {x, w, none(), none()}, y, {0}, results, why),
              PONDER_PLAN_FAILED);
    EXPECT_NE(why.find("linear: tensor 1"), std::string::npos) << why;
    const Tensor fits = random_tensor(f32, {3, 5}, 2);
    EXPECT_EQ(ops.try_run("linear", {x, fits, none()}, y, {0}, results, why), PONDER_PLAN_FAILED);
    EXPECT_EQ(ops.try_run("linear", {x, fits, none(), none()}, y, {}, results, why),
              PONDER_PLAN_FAILED);
    EXPECT_EQ(ops.try_run("linear", {none(), fits, none(), none()}, y, {0}, results, why),
              PONDER_PLAN_FAILED);
    EXPECT_NE(why.find("linear: tensor 0 (x)"), std::string::npos) << why;
    EXPECT_EQ(ops.try_run("linear", {x, fits, none(), none()}, y, {0}, results, why),
              PONDER_PLAN_OK);
    EXPECT_EQ(ops.plan.tasks, 1u);
    EXPECT_EQ(ops.plan.tiling, PONDER_TILE_WHOLE);
    EXPECT_EQ(ops.try_run("attention", {random_tensor(f32, {1, 2, 12}, 1)},
                          {{f32, {1, 2, 4}}, {f32, {1, 3, 2}}}, {3}, results, why),
              PONDER_PLAN_FAILED);

    // Shapes that a signature cannot say.
    const auto refused = [&](const std::string &op, const std::vector<Tensor> &in,
                             const Shape &shape, const std::vector<double> &attr) {
        return ops.try_run(op, in, {{f32, shape}}, attr, results, why) == PONDER_PLAN_FAILED &&
               why.starts_with(op + ": ");
    };
    const Tensor four = random_tensor(f32, {4}, 3), deep = random_tensor(f32, {2, 3, 4}, 4);
    EXPECT_TRUE(refused("add", {four, x}, {1, 2, 3}, {}));
    EXPECT_TRUE(refused("mul", {deep, four}, {3, 4}, {}));
    EXPECT_TRUE(refused("broadcast", {deep}, {4}, {}));
    EXPECT_TRUE(refused("sum_to", {deep}, {3}, {}));
    EXPECT_TRUE(refused("softmax", {deep}, {2, 4, 3}, {0}));
    EXPECT_TRUE(refused("softmax", {four}, {4}, {1}));
    EXPECT_TRUE(refused("log_sum_exp", {deep}, {2, 3}, {}));
    EXPECT_TRUE(refused("matmul", {deep, deep}, {2, 3, 3}, {0, 0}));
    EXPECT_TRUE(refused("matmul", {deep, w}, {2, 3, 5}, {0, 0}));
    EXPECT_TRUE(refused("slice_rows", {deep}, {2, 2, 4}, {2}));
    EXPECT_TRUE(refused("slice_rows", {deep}, {1, 2, 4}, {0}));
    EXPECT_TRUE(refused("reshape", {deep}, {5, 5}, {}));
    EXPECT_TRUE(refused("split_heads", {deep}, {2, 2, 3, 1}, {2, 2, 2}));
    EXPECT_TRUE(refused("gelu_derivative", {deep}, deep.shape, {4}));
    EXPECT_TRUE(refused("dropout", {deep, random_ids({2}, 1, 0, 9)}, deep.shape, {1, 0}));
    EXPECT_FALSE(refused("add", {four, deep}, deep.shape, {}));

    // int8 weights come with scales that fit, other weights without, nothing else is int8.
    const ScaledTensor q = random_scaled({3, 5}, 5, false),
                       of_rows = random_scaled({3, 5}, 6, true);
    const auto linear = [&](const Tensor &w_, const std::vector<Tensor> &scales) {
        std::vector<Tensor> in = {x, w_, none(), none()};
        in.insert(in.end(), scales.begin(), scales.end());
        return refused("linear", in, {1, 2, 5}, {0});
    };
    EXPECT_FALSE(linear(q.w, {q.scales}));
    EXPECT_FALSE(linear(q.w, {of_rows.scales}));
    EXPECT_FALSE(linear(fits, {none()}));
    EXPECT_TRUE(linear(q.w, {}));
    EXPECT_TRUE(linear(q.w, {none()}));
    EXPECT_TRUE(linear(fits, {q.scales}));
    EXPECT_TRUE(linear(q.w, {q.scales.reshaped({5})}));
    EXPECT_TRUE(linear(q.w, {q.scales.reshaped({5, 1})}));
    EXPECT_TRUE(linear(q.w, {q.scales.to(DType::bf16)}));
    EXPECT_TRUE(linear(q.w, {random_tensor(f32, {3, 5}, 7)}));
    EXPECT_TRUE(refused("gelu", {q.w}, {3, 5}, {}));
    EXPECT_TRUE(
        refused("embedding", {random_ids({1, 2}, 1, 0, 3), fits, q.w, q.scales}, {1, 2, 5}, {0}));
}

} // namespace
} // namespace ponder::test
