// Times the CPU module's kernels and a whole SKIP and UPDATE pass made of them; prints JSON.
//
//     cpu_ops_bench [module.so] [--ops] [--pass] [--decode] [--large] [--filter NAME]
//
// ops:  each op at the shapes of code-10m and of GPT-2 124M, f32 and bf16, on 1 and 2 threads.
// pass: the op sequence of a 512-token chunk, row ops chained per tile as the executor does.
// decode: every product with the weights of a model, for few rows and for a chunk, weights as
//       activations and as int8, beside the rate at which the same memory is read.
// Tasks are handed out by a counter to threads that spin between calls; times are the best of
// several runs, since other work may share the machine: on 1 thread its CPU time, on 2 wall clock,
// which needs two idle cores to mean anything.
#include "base/dtype.hpp"
#include "ponder/backend.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <time.h>
#include <vector>

namespace ponder {
namespace {

using Shape = std::vector<int64_t>;
using Clock = std::chrono::steady_clock;

const ponder_backend *backend = nullptr;
ponder_device *device = nullptr;

double seconds_since(Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
}

double thread_seconds() {
    timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

// Random numbers in [-scale, scale), or small ids for i32.
struct Tensor {
    DType type = DType::none;
    Shape shape;
    std::shared_ptr<std::byte[]> data;
    bool constant = false;

    Tensor() = default;
    Tensor(DType type_, Shape shape_, double scale = 1) : type(type_), shape(std::move(shape_)) {
        const int64_t n = count();
        std::byte *p = static_cast<std::byte *>(
            std::aligned_alloc(64, (size_t(n) * size_of(type) + 63) / 64 * 64));
        data = {p, [](std::byte *q) { std::free(q); }};
        static std::mt19937 random(1);
        for (int64_t i = 0; i < n; ++i) {
            const float x = float(scale * (double(random()) / 2147483648.0 - 1));
            if (type == DType::f32)
                reinterpret_cast<float *>(p)[i] = x;
            else if (type == DType::bf16)
                reinterpret_cast<bf16 *>(p)[i] = to_bf16(x);
            else if (type == DType::i8)
                reinterpret_cast<int8_t *>(p)[i] = int8_t(random() % 255 - 127);
            else
                reinterpret_cast<int32_t *>(p)[i] = int32_t(random() % 1000);
        }
    }
    int64_t count() const {
        int64_t n = 1;
        for (int64_t d : shape)
            n *= d;
        return n;
    }
    size_t bytes() const { return size_t(count()) * size_of(type); }
    Tensor frozen() const {
        Tensor t = *this;
        t.constant = true;
        return t;
    }
};

struct Step {
    std::string op;
    ponder_plan plan{};
    std::vector<Tensor> tensors;
    std::vector<void *> buffers;
    double flops = 0;
};

size_t workspace_size = 64;

Step make(const std::string &op, const std::vector<Tensor> &in, const std::vector<Tensor> &out,
          const std::vector<double> &attr, double flops = 0) {
    Step step;
    step.op = op;
    step.flops = flops;
    step.tensors = in;
    step.tensors.insert(step.tensors.end(), out.begin(), out.end());
    std::vector<ponder_tensor> description(step.tensors.size());
    std::vector<const void *> constant(in.size(), nullptr);
    for (size_t i = 0; i < step.tensors.size(); ++i) {
        const Tensor &t = step.tensors[i];
        description[i].dtype = int32_t(t.type);
        description[i].rank = int32_t(t.shape.size());
        std::copy(t.shape.begin(), t.shape.end(), description[i].dim);
        step.buffers.push_back(t.data.get());
        if (i < in.size() && t.constant)
            constant[i] = t.data.get();
    }
    ponder_op_call call{};
    call.struct_size = sizeof call;
    call.version = 1;
    call.op = step.op.c_str();
    call.n_in = uint32_t(in.size());
    call.n_out = uint32_t(out.size());
    call.n_attr = uint32_t(attr.size());
    call.tensor = description.data();
    call.constant = constant.data();
    call.attr = attr.data();
    step.plan.struct_size = sizeof step.plan;
    char why[200] = "";
    if (backend->plan(device, &call, &step.plan, why, sizeof why) != PONDER_PLAN_OK) {
        std::fprintf(stderr, "no kernel for %s: %s\n", op.c_str(), why);
        std::exit(1);
    }
    workspace_size = std::max(workspace_size, step.plan.workspace);
    return step;
}

// Runs steps on n threads: consecutive row ops with equal task counts as one chain per task.
class Team {
public:
    explicit Team(int n) : n_(n) {
        for (int i = 0; i < n; ++i)
            workspace_.push_back(
                {static_cast<std::byte *>(std::aligned_alloc(64, (workspace_size + 63) / 64 * 64)),
                 [](std::byte *p) { std::free(p); }});
        for (int i = 1; i < n; ++i)
            threads_.emplace_back([this, i] {
                for (uint64_t seen = 0;;) {
                    while (generation_.load(std::memory_order_acquire) == seen)
                        if (stop_)
                            return;
                    ++seen;
                    work(i);
                }
            });
    }
    ~Team() {
        stop_ = true;
        for (std::thread &t : threads_)
            t.join();
    }
    void run(const std::vector<Step> &steps) {
        for (size_t i = 0; i < steps.size();) {
            size_t end = i + 1;
            if (steps[i].plan.tiling == PONDER_TILE_ROWS)
                while (end < steps.size() && steps[end].plan.tiling == PONDER_TILE_ROWS &&
                       steps[end].plan.tasks == steps[i].plan.tasks)
                    ++end;
            first_ = &steps[i], count_ = end - i;
            next_ = 0;
            busy_ = n_;
            generation_.fetch_add(1, std::memory_order_release);
            work(0);
            while (busy_.load(std::memory_order_acquire) != 0) {
            }
            i = end;
        }
    }

private:
    void work(int worker) {
        for (uint32_t task; (task = next_++) < first_->plan.tasks;)
            for (size_t i = 0; i < count_; ++i)
                backend->run(first_[i].plan.kernel, first_[i].buffers.data(),
                             workspace_[size_t(worker)].get(), task);
        busy_.fetch_sub(1, std::memory_order_acq_rel);
    }
    int n_;
    std::vector<std::shared_ptr<std::byte[]>> workspace_;
    std::vector<std::thread> threads_;
    const Step *first_ = nullptr;
    size_t count_ = 0;
    std::atomic<uint32_t> next_{0};
    std::atomic<int> busy_{0};
    std::atomic<uint64_t> generation_{0};
    std::atomic<bool> stop_{false};
};

double best_time(const std::vector<Step> &steps, int threads, double budget) {
    Team team(threads);
    team.run(steps);
    double best = 1e9;
    const auto start = Clock::now();
    for (int i = 0; i < 3 || seconds_since(start) < budget; ++i) {
        const auto t = Clock::now();
        const double used = thread_seconds();
        team.run(steps);
        best = std::min(best, threads == 1 ? thread_seconds() - used : seconds_since(t));
    }
    return best;
}

const char *name_of(DType type) {
    return type == DType::bf16 ? "bf16" : type == DType::i8 ? "int8" : "f32";
}

struct Model {
    const char *name;
    int64_t layers, c, heads, v, t, adapted;
};
constexpr Model code10m = {"code-10m", 10, 256, 4, 8192, 512, 5};
constexpr Model gpt2 = {"gpt2-124m", 12, 768, 12, 50257, 512, 5};

void report(const Model &m, DType act, const Step &step) {
    double bytes = 0;
    for (const Tensor &t : step.tensors)
        bytes += double(t.bytes());
    std::vector<Step> one = {step};
    const double t1 = best_time(one, 1, 0.1), t2 = best_time(one, 2, 0.1);
    std::string shape;
    for (int64_t d : step.tensors[0].shape)
        shape += (shape.empty() ? "" : "x") + std::to_string(d);
    std::printf("{\"model\": \"%s\", \"op\": \"%s\", \"in\": \"%s\", \"act\": \"%s\", \"ms_1\": "
                "%.3f, \"ms_2\": %.3f, \"gflops_1\": %.1f, \"gflops_2\": %.1f, \"gb_s_2\": %.1f}\n",
                m.name, step.op.c_str(), shape.c_str(), name_of(act), t1 * 1e3, t2 * 1e3,
                step.flops / t1 * 1e-9, step.flops / t2 * 1e-9, bytes / t2 * 1e-9);
    std::fflush(stdout);
}

void bench_ops(const Model &m, DType act, const std::string &filter) {
    const int64_t t = m.t, c = m.c, v = m.v, r = 16;
    const double tc = double(t) * double(c);
    const DType f32 = DType::f32;
    const auto go = [&](const std::string &op, const std::function<Step()> &f) {
        if (filter.empty() || op.find(filter) != std::string::npos) {
            Step step = f();
            report(m, act, step);
            backend->drop(step.plan.kernel);
        }
    };
    const Tensor wide(f32, {1, t, c}), x(act, {1, t, c}), y(act, {1, t, c}),
        inner(act, {1, t, 4 * c});
    const Tensor inner2(act, {1, t, 4 * c});
    const Tensor qkv(act, {1, t, 3 * c}), g(f32, {c}), stats(f32, {1, t, 2}), u(act, {1, t, r});
    const Tensor lse(f32, {1, m.heads, t}), row(f32, {1, t});
    const Tensor ids(DType::i32, {1, t}), none;
    const auto weight = [&](int64_t k, int64_t n) { return Tensor(act, {k, n}, 0.05).frozen(); };
    go("layer_norm", [&] { return make("layer_norm", {wide, g, g}, {x, stats}, {1e-5}); });
    go("layer_norm_vjp", [&] {
        return make("layer_norm_vjp", {x, wide, g, stats, wide}, {wide}, {});
    });
    go("gelu", [&] { return make("gelu", {inner}, {inner2}, {}); });
    go("gelu_vjp", [&] { return make("gelu_vjp", {inner, inner}, {inner2}, {}); });
    go("linear", [&] {
        return make("linear", {x, weight(c, 3 * c), Tensor(f32, {3 * c}), none}, {qkv}, {0},
                    6 * tc * double(c));
    });
    go("linear", [&] {
        return make("linear", {x, weight(c, c), g, wide}, {wide}, {0}, 2 * tc * double(c));
    });
    go("linear", [&] {
        return make("linear", {x, weight(c, 4 * c), Tensor(f32, {4 * c}), none}, {inner}, {0},
                    8 * tc * double(c));
    });
    go("linear", [&] {
        return make("linear", {inner, weight(4 * c, c), g, wide}, {wide}, {0}, 8 * tc * double(c));
    });
    const double low = 2 * double(t) * double(r) * double(4 * c);
    const Tensor a(f32, {1, c, r}), bb(f32, {1, r, 3 * c});
    go("lora_linear", [&] {
        return make("lora_linear", {x, weight(c, 3 * c), Tensor(f32, {3 * c}), a, bb, none},
                    {qkv, u}, {1}, 6 * tc * double(c) + low);
    });
    go("lora_linear_vjp", [&] {
        return make("lora_linear_vjp", {qkv, weight(c, 3 * c), a, bb}, {y, u}, {1},
                    6 * tc * double(c) + low);
    });
    go("matmul_tn", [&] {
        return make("matmul_tn", {x, u}, {Tensor(f32, {1, c, r})}, {}, 2 * tc * double(r));
    });
    go("matmul_tn", [&] {
        return make("matmul_tn", {u, qkv}, {Tensor(f32, {1, r, 3 * c})}, {}, 6 * tc * double(r));
    });
    // Training: eight streams, summed.
    const Tensor x8(act, {8, t, c}), dy8(act, {8, t, 4 * c}), wide8(f32, {8, t, c});
    const Tensor stats8(f32, {8, t, 2}), ids8(DType::i32, {8, t}), out_c(f32, {c});
    go("matmul_tn_sum", [&] {
        return make("matmul_tn_sum", {x8, wide8}, {Tensor(f32, {c, c})}, {}, 16 * tc * double(c));
    });
    go("matmul_tn_sum", [&] {
        return make("matmul_tn_sum", {x8, dy8}, {Tensor(f32, {c, 4 * c})}, {}, 64 * tc * double(c));
    });
    go("matmul_tn_sum", [&] {
        return make("matmul_tn_sum", {dy8, x8}, {Tensor(f32, {4 * c, c})}, {}, 64 * tc * double(c));
    });
    go("layer_norm_vjp_weight", [&] {
        return make("layer_norm_vjp_weight", {x8, wide8, stats8}, {out_c, out_c}, {});
    });
    go("sum_to", [&] { return make("sum_to", {dy8}, {Tensor(f32, {4 * c})}, {}); });
    go("embedding_vjp", [&] {
        return make("embedding_vjp", {wide8, ids8}, {Tensor(f32, {v, c}), Tensor(f32, {t, c})},
                    {0});
    });
    go("dropout", [&] { return make("dropout", {dy8, Tensor(DType::i32, {2})}, {dy8}, {0.1, 1}); });
    const Tensor state(f32, {4 * c, c}, 0.1), hyper(f32, {8}), length(f32, {1});
    go("adamw", [&] {
        return make("adamw", {state, state, state, state, hyper, length},
                    {Tensor(f32, {4 * c, c}), Tensor(f32, {4 * c, c}), Tensor(f32, {4 * c, c})},
                    {});
    });
    if (act == f32) {
        const int64_t d = c / m.heads;
        const auto rows = [&](int64_t n) { return Tensor(f32, {8, t, n}); };
        const Tensor w1(f32, {8, m.heads, d, d}, 0.1), b1(f32, {8, m.heads, d}, 0.1);
        const Tensor norm(f32, {m.heads, d}), index(f32, {16}, 0.05), loss(f32, {8, 3});
        const std::vector<double> form = {1, 1 / double(d), 0, 1e-6, 0, 0};
        const double flops = 16 * tc * double(3 * d + 17);
        std::vector<Tensor> in = {rows(c), rows(c), rows(c), rows(m.heads), index, norm,
                                  norm,    w1,      b1};
        go("ttt_linear", [&] {
            return make("ttt_linear", in, {rows(c), w1, b1, loss}, form, flops);
        });
        in.insert(in.end(), {rows(c), w1, b1, loss});
        go("ttt_linear_vjp", [&] {
            return make("ttt_linear_vjp", in,
                        {rows(c), rows(c), rows(c), rows(m.heads), Tensor(f32, {16}),
                         Tensor(f32, {m.heads, d}), Tensor(f32, {m.heads, d}),
                         Tensor(f32, {8, m.heads, d, d}), Tensor(f32, {8, m.heads, d})},
                        form, 3 * flops);
        });
    }
    // The second-order path.
    const auto matmul = [&](Shape a, Shape b, Shape y, double ta, double tb, double flops) {
        go("matmul", [&] {
            return make("matmul", {Tensor(f32, a), Tensor(f32, b)}, {Tensor(f32, y)}, {ta, tb},
                        flops);
        });
    };
    if (act == f32) {
        const int64_t d = c / m.heads;
        const double scores = 2 * tc * double(t);
        matmul({1, m.heads, t, d}, {1, m.heads, t, d}, {1, m.heads, t, t}, 0, 1, scores);
        matmul({1, m.heads, t, t}, {1, m.heads, t, d}, {1, m.heads, t, d}, 0, 0, scores);
        matmul({1, m.heads, t, t}, {1, m.heads, t, d}, {1, m.heads, t, d}, 1, 0, scores);
        matmul({1, t, c}, {1, c, 4 * c}, {1, t, 4 * c}, 0, 0, 8 * tc * double(c));
        matmul({1, t, 4 * c}, {1, c, 4 * c}, {1, t, c}, 0, 1, 0);
        matmul({1, t, c}, {1, c, r}, {1, t, r}, 0, 0, 2 * tc * double(r));
        matmul({1, t, r}, {1, r, 4 * c}, {1, t, 4 * c}, 0, 0, 8 * tc * double(r));
        matmul({1, t, c}, {1, t, r}, {1, c, r}, 1, 0, 2 * tc * double(r));
        const Tensor s(f32, {1, m.heads, t, t}), column(f32, {1, t, 1}), wide2(f32, {1, t, c});
        go("softmax", [&] { return make("softmax", {s}, {s}, {1}); });
        go("mul", [&] { return make("mul", {wide, wide}, {wide2}, {}); });
        go("mul [C]", [&] { return make("mul", {wide, g}, {wide2}, {}); });
        go("mul [..,1]", [&] { return make("mul", {wide, column}, {wide2}, {}); });
        go("exp", [&] { return make("exp", {wide}, {wide2}, {}); });
        go("power", [&] { return make("power", {wide}, {wide2}, {-0.5}); });
        go("gelu_derivative", [&] { return make("gelu_derivative", {wide}, {wide2}, {2}); });
        go("sum_last", [&] { return make("sum_last", {wide}, {column}, {}); });
        go("split_heads", [&] {
            return make("split_heads", {wide}, {Tensor(f32, {1, m.heads, t, c / m.heads})},
                        {double(m.heads), 0, 1});
        });
    }
    const double pairs = double(t) * double(t + 1) / 2 * double(c);
    go("attention", [&] {
        return make("attention", {qkv}, {x, lse}, {double(m.heads)}, 4 * pairs);
    });
    go("attention_vjp", [&] {
        return make("attention_vjp", {qkv, x, lse, y}, {qkv}, {double(m.heads)}, 10 * pairs);
    });
    const Tensor table = weight(v, c);
    go("cross_entropy", [&] {
        return make("cross_entropy", {x, table, ids}, {row, row, none}, {}, 2 * tc * double(v));
    });
    if (m.v < 10000 || !filter.empty()) {
        const Tensor p(act, {1, t, v});
        go("cross_entropy p", [&] {
            return make("cross_entropy", {x, table, ids}, {row, row, p}, {}, 2 * tc * double(v));
        });
        go("cross_entropy_vjp_table", [&] {
            return make("cross_entropy_vjp_table", {p, x, ids, row}, {Tensor(f32, {v, c})}, {},
                        2 * tc * double(v));
        });
        go("cross_entropy_vjp", [&] {
            return make("cross_entropy_vjp", {p, table, ids, row}, {x}, {}, 2 * tc * double(v));
        });
    }
}

// The forward pass of a chunk, and with it the backward pass through the last layers, LoRA on
// every linear of those.
struct Pass {
    std::vector<Step> forward, backward;
};

Pass make_pass(const Model &m, DType act, bool learn, bool products_only) {
    const int64_t t = m.t, c = m.c, v = m.v, r = 16;
    const DType f32 = DType::f32;
    const Tensor none, ids(DType::i32, {1, t});
    const auto width = [&](DType type, int64_t n) { return Tensor(type, {1, t, n}); };
    const auto weight = [&](int64_t k, int64_t n) { return Tensor(act, {k, n}, 0.05).frozen(); };
    const auto vector = [&](int64_t n) { return Tensor(f32, {n}, 0.1); };
    const double tc = double(t) * double(c), pairs = double(t) * double(t + 1) / 2 * double(c);
    Pass pass;
    std::vector<std::vector<Step>> reversed;
    const auto forward = [&](Step s) {
        const bool product = s.op.find("linear") != s.op.npos || s.op.find("entropy") != s.op.npos;
        if (!products_only || product)
            pass.forward.push_back(std::move(s));
    };
    const Tensor table = weight(v, c);
    Tensor h = width(f32, c);
    forward(make("embedding", {ids, table, Tensor(act, {t, c})}, {h}, {0}));
    std::vector<std::vector<Step>> backward;
    Tensor dh = width(f32, c);
    for (int64_t layer = 0; layer < m.layers; ++layer) {
        const bool adapted = learn && layer >= m.layers - m.adapted;
        std::vector<Step> back;
        const auto linear = [&](const Tensor &x, int64_t k, int64_t n, const Tensor &y,
                                const Tensor &add, const Tensor &dy, const Tensor &dx) {
            const Tensor w = weight(k, n), b = vector(n);
            const double flops = 2 * double(t) * double(k) * double(n);
            if (!adapted) {
                forward(make("linear", {x, w, b, add}, {y}, {0}, flops));
                return;
            }
            const Tensor a = Tensor(f32, {1, k, r}, 0.1), bb = Tensor(f32, {1, r, n}, 0.1);
            const Tensor u = width(act, r), du = width(act, r);
            const double low = 2 * double(t) * double(r) * double(k + n);
            forward(make("lora_linear", {x, w, b, a, bb, add}, {y, u}, {1}, flops + low));
            back.push_back(make("matmul_tn", {u, dy}, {Tensor(f32, {1, r, n})}, {}));
            back.push_back(make("matmul_tn", {x, du}, {Tensor(f32, {1, k, r})}, {}));
            back.push_back(make("lora_linear_vjp", {dy, w, a, bb}, {dx, du}, {1}, flops + low));
        };
        const Tensor n1 = width(act, c), s1 = width(f32, 2), qkv = width(act, 3 * c);
        const Tensor o = width(act, c), lse = Tensor(f32, {1, m.heads, t}), h1 = width(f32, c);
        const Tensor n2 = width(act, c), s2 = width(f32, 2), f = width(act, 4 * c);
        const Tensor e = width(act, 4 * c), h2 = width(f32, c), g = vector(c);
        const Tensor df = width(act, 4 * c), de = width(act, 4 * c), dn2 = width(act, c);
        const Tensor dh1 = width(f32, c), do_ = width(act, c), dqkv = width(act, 3 * c);
        const Tensor dn1 = width(act, c), dh0 = width(f32, c);
        forward(make("layer_norm", {h, g, g}, {n1, s1}, {1e-5}));
        if (adapted)
            back.push_back(make("layer_norm_vjp", {dn1, h, g, s1, dh1}, {dh0}, {}));
        linear(n1, c, 3 * c, qkv, none, dqkv, dn1);
        forward(make("attention", {qkv}, {o, lse}, {double(m.heads)}, 4 * pairs));
        if (adapted)
            back.push_back(
                make("attention_vjp", {qkv, o, lse, do_}, {dqkv}, {double(m.heads)}, 10 * pairs));
        linear(o, c, c, h1, h, dh1, do_);
        forward(make("layer_norm", {h1, g, g}, {n2, s2}, {1e-5}));
        if (adapted)
            back.push_back(make("layer_norm_vjp", {dn2, h1, g, s2, dh}, {dh1}, {}));
        linear(n2, c, 4 * c, f, none, df, dn2);
        forward(make("gelu", {f}, {e}, {}));
        if (adapted)
            back.push_back(make("gelu_vjp", {de, f}, {df}, {}));
        linear(e, 4 * c, c, h2, h1, dh, de);
        h = h2;
        std::reverse(back.begin(), back.end());
        backward.push_back(std::move(back));
    }
    const Tensor n = width(act, c), s = width(f32, 2), g = vector(c);
    const Tensor nll(f32, {1, t}), entropy(f32, {1, t});
    const Tensor p = learn ? width(act, v) : none;
    forward(make("layer_norm", {h, g, g}, {n, s}, {1e-5}));
    forward(make("cross_entropy", {n, table, ids}, {nll, entropy, p}, {}, 2 * tc * double(v)));
    if (!learn)
        return pass;
    const Tensor dn = width(act, c);
    pass.backward.push_back(
        make("cross_entropy_vjp", {p, table, ids, nll}, {dn}, {}, 2 * tc * double(v)));
    pass.backward.push_back(make("layer_norm_vjp", {dn, h, g, s, none}, {dh}, {}));
    for (size_t layer = backward.size(); layer-- > 0;)
        for (Step &step : backward[layer])
            pass.backward.push_back(std::move(step));
    return pass;
}

void bench_pass(const Model &m, DType act, bool learn) {
    const auto flops = [](const std::vector<Step> &steps) {
        double sum = 0;
        for (const Step &s : steps)
            sum += s.flops;
        return sum;
    };
    for (const bool products_only : {false, true}) {
        if (learn && products_only)
            continue;
        const Pass pass = make_pass(m, act, learn, products_only);
        std::vector<Step> steps = pass.forward;
        steps.insert(steps.end(), pass.backward.begin(), pass.backward.end());
        const double t1 = best_time(steps, 1, 1.5), t2 = best_time(steps, 2, 1.5);
        std::printf("{\"model\": \"%s\", \"pass\": \"%s\", \"act\": \"%s\", \"ms_1\": %.2f, "
                    "\"ms_2\": %.2f, \"tok_s_1\": %.0f, \"tok_s_2\": %.0f, \"gflops_2\": %.1f}\n",
                    m.name,
                    learn           ? "update"
                    : products_only ? "skip, products only"
                                    : "skip",
                    name_of(act), t1 * 1e3, t2 * 1e3, double(m.t) / t1, double(m.t) / t2,
                    flops(steps) / t2 * 1e-9);
        std::fflush(stdout);
        for (const Step &s : steps)
            backend->drop(s.plan.kernel);
    }
}

// Seconds to read `bytes` that no cache holds, on n threads.
double read_time(size_t bytes, int n) {
    const Tensor block(DType::i32, {int64_t(bytes / 4)});
    const int32_t *data = reinterpret_cast<const int32_t *>(block.data.get());
    double best = 1e9;
    for (int repeat = 0; repeat < 10; ++repeat) {
        std::atomic<int64_t> total{0};
        const auto start = Clock::now();
        std::vector<std::thread> threads;
        const size_t share = bytes / 4 / size_t(n);
        for (int i = 0; i < n; ++i)
            threads.emplace_back([&, from = data + size_t(i) * share] {
                int64_t sum = 0;
                for (size_t at = 0; at < share; at += 1024) {
                    int32_t part[16] = {};
                    for (size_t j = 0; j < 1024; j += 16)
                        for (size_t l = 0; l < 16; ++l)
                            part[l] += from[at + j + l];
                    for (int32_t x : part)
                        sum += x;
                }
                total += sum;
            });
        for (std::thread &t : threads)
            t.join();
        best = std::min(best, seconds_since(start));
    }
    return best;
}

void bench_decode(const Model &m, DType act) {
    const size_t block = size_t(256) << 20;
    std::printf("{\"read_gb_s_1\": %.1f, \"read_gb_s_2\": %.1f}\n",
                double(block) / read_time(block, 1) * 1e-9,
                double(block) / read_time(block, 2) * 1e-9);
    for (const DType type : {act, DType::i8}) {
        std::vector<std::pair<Tensor, Tensor>> weights; // and scales
        double bytes = 0;
        const auto add = [&](int64_t k, int64_t n, bool transposed) {
            const Tensor w = Tensor(type, transposed ? Shape{n, k} : Shape{k, n}, 0.05).frozen();
            const Tensor scales(DType::f32, transposed ? Shape{n, 1} : Shape{1, n}, 0.001);
            weights.emplace_back(w, scales.frozen());
            bytes += double(w.bytes());
        };
        for (int64_t layer = 0; layer < m.layers; ++layer) {
            add(m.c, 3 * m.c, false);
            add(m.c, m.c, false);
            add(m.c, 4 * m.c, false);
            add(4 * m.c, m.c, false);
        }
        add(m.c, m.v, true);
        for (const int64_t rows : {int64_t(1), int64_t(4), int64_t(16), m.t}) {
            std::vector<Step> steps;
            double flops = 0;
            for (const auto &[w, scales] : weights) {
                const bool head = &w == &weights.back().first;
                if (head && rows == m.t)
                    continue; // of the last position only
                const int64_t k = w.shape[head], n = w.shape[!head];
                std::vector<Tensor> in = {Tensor(act, {1, rows, k}), w, {}, {}};
                if (type == DType::i8)
                    in.push_back(scales);
                steps.push_back(make("linear", in, {Tensor(head ? DType::f32 : act, {1, rows, n})},
                                     {double(head)}, 2 * double(rows) * double(k) * double(n)));
                flops += steps.back().flops;
            }
            const double t1 = best_time(steps, 1, 1), t2 = best_time(steps, 2, 1.5);
            std::printf("{\"model\": \"%s\", \"rows\": %d, \"act\": \"%s\", \"weights\": \"%s\", "
                        "\"weight_mb\": %.1f, \"ms_1\": %.3f, \"ms_2\": %.3f, \"gb_s_1\": %.1f, "
                        "\"gb_s_2\": %.1f, \"gflops_2\": %.1f}\n",
                        m.name, int(rows), name_of(act), name_of(type), bytes * 1e-6, t1 * 1e3,
                        t2 * 1e3, bytes / t1 * 1e-9, bytes / t2 * 1e-9, flops / t2 * 1e-9);
            std::fflush(stdout);
            for (const Step &s : steps)
                backend->drop(s.plan.kernel);
        }
    }
}

int run(int argc, char **argv) {
    bool ops = false, pass = false, decode = false, large = false;
    std::string filter;
    const char *path = PONDER_CPU_MODULE;
    for (int i = 1; i < argc; ++i) {
        const std::string arg = argv[i];
        if (arg == "--ops")
            ops = true;
        else if (arg == "--pass")
            pass = true;
        else if (arg == "--decode")
            decode = true;
        else if (arg == "--large")
            large = true;
        else if (arg == "--filter" && i + 1 < argc)
            filter = argv[++i];
        else
            path = argv[i];
    }
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        std::fprintf(stderr, "%s\n", dlerror());
        return 1;
    }
    backend =
        reinterpret_cast<ponder_backend_query_fn>(dlsym(library, "ponder_backend_query_v1"))();
    ponder_backend_host host{};
    host.struct_size = sizeof host;
    host.workers = 2;
    char why[200] = "";
    std::printf("{\"isa\": \"%s\"}\n", backend->isa());
    for (const Model &m : {code10m, gpt2}) {
        if (m.v > 10000 && !large)
            continue;
        for (DType act : {DType::f32, DType::bf16}) {
            device = backend->open(&host, why, sizeof why);
            if (!device) {
                std::fprintf(stderr, "%s\n", why);
                return 1;
            }
            if (decode)
                bench_decode(m, act);
            if (ops || (!pass && !decode))
                bench_ops(m, act, filter);
            if (pass || (!ops && !decode)) {
                bench_pass(m, act, false);
                bench_pass(m, act, true);
            }
            backend->close(device);
        }
    }
    return 0;
}

} // namespace
} // namespace ponder

int main(int argc, char **argv) { return ponder::run(argc, argv); }
