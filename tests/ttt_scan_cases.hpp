// The fused scans against the reference kernels in double precision, on random shapes: for a GPU,
// and for the emulator where there is none.
#pragma once

#include "../backends/cuda/ttt_scan.hpp"
#include "backend/reference/reference.hpp"
#include "op_harness.hpp"

#include <cstdio>
#include <map>
#include <string>

namespace ponder::test {

// A tensor on the device; outputs start as NaN.
class DeviceTensor {
public:
    DeviceTensor() = default;
    explicit DeviceTensor(const Tensor &host)
        : host_(host), bytes_(size_t(host.count()) * size_of(host.type)) {
        if (host.type == DType::none)
            return;
        check(cudaMalloc(&data_, bytes_ ? bytes_ : 1));
        check(cudaMemcpy(data_, host.block->data(), bytes_, cudaMemcpyHostToDevice));
    }
    ~DeviceTensor() { cudaFree(data_); }
    DeviceTensor(const DeviceTensor &) = delete;
    DeviceTensor &operator=(const DeviceTensor &) = delete;

    void *data() const { return data_; }
    float *floats() const { return static_cast<float *>(data_); }
    Tensor back() const {
        Tensor t(host_.type, host_.shape);
        check(cudaMemcpy(t.block->data(), data_, bytes_, cudaMemcpyDeviceToHost));
        return t;
    }
    static void check(cudaError_t e) {
        if (e != cudaSuccess)
            throw std::runtime_error(cudaGetErrorString(e));
    }

private:
    Tensor host_;
    size_t bytes_ = 0;
    void *data_ = nullptr;
};

struct ScanCase {
    int64_t s, t, h, d, m;
    DType type = DType::f32;
    bool ponder = false, mlp = false;
    double decay = 0, limit = 0; // of the gradient's norm
    int64_t causal_k = 0;
    bool losses = true; // with gradients of the losses
    double lr_scale = 1;
    int kernel = 0; // as in TttLinearShape; of an MLP, TttMlpShape's split
    std::string name() const {
        char text[160];
        std::snprintf(text, sizeof text, "%s %s %s s%d t%d h%d d%d m%d%s%s%s%s",
                      mlp ? "mlp" : "linear", type == DType::bf16 ? "bf16" : "f32",
                      ponder ? "ponder" : "official", int(s), int(t), int(h), int(d), int(m),
                      decay ? " decay" : "", limit ? " clip" : "", causal_k ? " shifted" : "",
                      mlp           ? ""
                      : kernel == 1 ? " alike"
                      : kernel == 2 ? " roles"
                      : kernel == 3 ? " mixed"
                      : kernel == 4 ? " lockstep 2+1"
                      : kernel == 5 ? " lockstep 4+4"
                                    : "");
        return mlp && kernel ? std::string(text) + " split " + std::to_string(kernel) : text;
    }
};

struct ScanErrors {
    std::map<std::string, double> forward, gradient;
    double worst(const std::map<std::string, double> &of) const {
        double x = 0;
        for (const auto &[name, e] : of)
            x = std::isfinite(e) ? std::max(x, e) : INFINITY;
        return x;
    }
};

inline Tensor bytes_tensor(size_t n) { return Tensor(DType::f32, {int64_t(n + 3) / 4}); }

class ScanChecker {
public:
    ScanChecker() : reference_(reference_backend()) {}

    ScanErrors run(const ScanCase &c, bool backward = true) {
        return c.mlp ? run_mlp(c, backward) : run_linear(c, backward);
    }

private:
    static uint32_t seed_;
    static Tensor random(DType type, const Shape &shape, double scale, double offset = 0) {
        Tensor t = random_tensor(type, shape, ++seed_, scale);
        if (offset != 0)
            for (int64_t i = 0; i < t.count(); ++i)
                t.set(i, t.at(i) + offset);
        return t;
    }
    static Tensor wide(const Tensor &t) { return t.to(DType::f64); }

    ScanErrors run_linear(const ScanCase &c, bool backward) {
        const int64_t width = c.h * c.d;
        const Shape rows{c.s, c.t, width}, rates{c.s, c.t, c.h}, state{c.s, c.h, c.d, c.d},
            bias{c.s, c.h, c.d}, head{c.h, c.d};
        std::vector<Tensor> in{random(c.type, rows, 1),        random(c.type, rows, 1),
                               random(c.type, rows, 1),        random(c.type, rates, 0.5, 0.5),
                               random(DType::f32, {c.m}, 0.2), random(DType::f32, head, 0.5, 1),
                               random(DType::f32, head, 0.3),  random(DType::f32, state, 0.2, 0.02),
                               random(DType::f32, bias, 0.2)};
        in[4].set(c.m / 2, -2); // a rate below 0, which counts as 0
        const std::vector<double> attr{double(c.ponder), c.lr_scale / double(c.d), c.decay, 1e-6,
                                       c.limit,          double(c.causal_k)};
        const cuda::TttType type = c.type == DType::bf16 ? cuda::TttType::bf16 : cuda::TttType::f32;
        const cuda::TttLinearShape shape{c.s,     c.t,     c.h,        c.d,     c.m,
                                         type,    type,    c.ponder,   attr[1], c.decay,
                                         attr[3], c.limit, c.causal_k, c.kernel};
        const char *misses = cuda::ttt_linear_misses(shape);
        if (misses)
            throw NoKernel(misses);

        std::vector<Tensor> exact;
        for (const Tensor &t : in)
            exact.push_back(wide(t));
        const auto expected = reference_.run(
            "ttt_linear", exact,
            {{DType::f64, rows}, {DType::f64, state}, {DType::f64, bias}, {DType::f64, {c.s, 3}}},
            attr);
        std::vector<std::unique_ptr<DeviceTensor>> x;
        for (const Tensor &t : in)
            x.push_back(std::make_unique<DeviceTensor>(t));
        const DeviceTensor y{Tensor(c.type, rows)}, w_out{Tensor(DType::f32, state)},
            b_out{Tensor(DType::f32, bias)}, loss{Tensor(DType::f32, {c.s, 3})},
            trace{bytes_tensor(cuda::ttt_linear_trace(shape))},
            work{bytes_tensor(cuda::ttt_linear_workspace(shape))},
            tickets{filled(DType::f32, {c.s}, 0)};
        cuda::TttLinearForward f{x[0]->data(),   x[1]->data(),
                                 x[2]->data(),   x[3]->data(),
                                 x[4]->floats(), x[5]->floats(),
                                 x[6]->floats(), x[7]->floats(),
                                 x[8]->floats(), y.data(),
                                 w_out.floats(), b_out.floats(),
                                 loss.floats(),  backward && c.s % 2 ? trace.data() : nullptr};
        DeviceTensor::check(cuda::ttt_linear(shape, f, work.data(),
                                             static_cast<unsigned *>(tickets.data()), nullptr));
        DeviceTensor::check(cudaDeviceSynchronize());
        const Tensor first = y.back(), first_loss = loss.back();
        DeviceTensor::check(cuda::ttt_linear(shape, f, work.data(),
                                             static_cast<unsigned *>(tickets.data()), nullptr));
        DeviceTensor::check(cudaDeviceSynchronize());
        if (!identical(first, y.back()) || !identical(first_loss, loss.back()))
            throw std::runtime_error(c.name() + ": a second run gives other results");
        ScanErrors errors;
        const char *names[] = {"y", "w1", "b1", "loss"};
        const DeviceTensor *results[] = {&y, &w_out, &b_out, &loss};
        for (int i = 0; i < 4; ++i)
            errors.forward[names[i]] = relative_error(results[i]->back(), expected[size_t(i)]);
        if (!backward)
            return errors;
        if ((misses = cuda::ttt_linear_vjp_misses(shape)))
            throw NoKernel(misses);

        const std::vector<Tensor> upstream{
            random(c.type, rows, 1), random(DType::f32, state, 1), random(DType::f32, bias, 1),
            // of one sign: the three losses' gradients are nearly parallel, and where they cancel
            // bf16 has little left
            c.losses ? random(DType::f32, {c.s, 3}, 0.5 * double(c.t), double(c.t))
                     : filled(DType::f32, {c.s, 3}, 0)};
        for (const Tensor &t : upstream)
            exact.push_back(wide(t));
        const std::vector<Shape> shapes{rows, rows, rows, rates, {c.m}, head, head, state, bias};
        std::vector<Out> outs;
        for (const Shape &s : shapes)
            outs.push_back({DType::f64, s});
        const auto gradients = reference_.run("ttt_linear_vjp", exact, outs, attr);
        std::vector<std::unique_ptr<DeviceTensor>> d, up;
        for (const Tensor &t : upstream)
            up.push_back(std::make_unique<DeviceTensor>(t));
        for (size_t i = 0; i < shapes.size(); ++i)
            d.push_back(
                std::make_unique<DeviceTensor>(Tensor(i < 4 ? c.type : DType::f32, shapes[i])));
        const DeviceTensor vjp_work{
            bytes_tensor(cuda::ttt_linear_vjp_workspace(shape, f.trace != nullptr))};
        const cuda::TttLinearBackward b{f.q,
                                        f.k,
                                        f.v,
                                        f.lr,
                                        f.index,
                                        f.g,
                                        f.b,
                                        f.w1,
                                        f.b1,
                                        up[0]->data(),
                                        up[1]->floats(),
                                        up[2]->floats(),
                                        c.losses || c.t % 2 ? up[3]->floats() : nullptr,
                                        f.trace,
                                        d[0]->data(),
                                        d[1]->data(),
                                        d[2]->data(),
                                        d[3]->data(),
                                        d[4]->floats(),
                                        d[5]->floats(),
                                        d[6]->floats(),
                                        d[7]->floats(),
                                        d[8]->floats()};
        DeviceTensor::check(cuda::ttt_linear_vjp(shape, b, vjp_work.data(), nullptr));
        DeviceTensor::check(cudaDeviceSynchronize());
        const Tensor first_dk = d[1]->back(), first_dw = d[7]->back();
        DeviceTensor::check(cuda::ttt_linear_vjp(shape, b, vjp_work.data(), nullptr));
        DeviceTensor::check(cudaDeviceSynchronize());
        if (!identical(first_dk, d[1]->back()) || !identical(first_dw, d[7]->back()))
            throw std::runtime_error(c.name() + ": a second run gives other gradients");
        const char *gradient_names[] = {"dq", "dk", "dv",  "dlr", "dindex",
                                        "dg", "db", "dw1", "db1"};
        for (size_t i = 0; i < shapes.size(); ++i)
            errors.gradient[gradient_names[i]] = relative_error(d[i]->back(), gradients[i]);
        return errors;
    }

    ScanErrors run_mlp(const ScanCase &c, bool backward) {
        const int64_t width = c.h * c.d, f = 4 * c.d;
        const Shape rows{c.s, c.t, width}, rates{c.s, c.t, c.h}, head{c.h, c.d};
        const std::vector<Shape> states{
            {c.s, c.h, c.d, f}, {c.s, c.h, f}, {c.s, c.h, f, c.d}, {c.s, c.h, c.d}};
        std::vector<Tensor> in{random(c.type, rows, 1),        random(c.type, rows, 1),
                               random(c.type, rows, 1),        random(c.type, rates, 0.5, 0.5),
                               random(DType::f32, {c.m}, 0.2), random(DType::f32, head, 0.5, 1),
                               random(DType::f32, head, 0.3)};
        for (const Shape &s : states)
            in.push_back(random(DType::f32, s, 0.15, 0.01));
        in[4].set(c.m / 2, -2);
        const std::vector<double> attr{0.1 * c.lr_scale / double(c.d), 1e-6};
        const cuda::TttType type = c.type == DType::bf16 ? cuda::TttType::bf16 : cuda::TttType::f32;
        const cuda::TttMlpShape shape{c.s,  c.t,  c.h,     c.d,     c.m,
                                      type, type, attr[0], attr[1], c.kernel};
        if (const char *misses = cuda::ttt_mlp_misses(shape))
            throw NoKernel(misses);
        std::vector<Tensor> exact;
        for (const Tensor &t : in)
            exact.push_back(wide(t));
        std::vector<Out> outs{{DType::f64, rows}};
        for (const Shape &s : states)
            outs.push_back({DType::f64, s});
        outs.push_back({DType::f64, {c.s, 3}});
        const auto expected = reference_.run("ttt_mlp", exact, outs, attr);
        std::vector<std::unique_ptr<DeviceTensor>> x, o;
        for (const Tensor &t : in)
            x.push_back(std::make_unique<DeviceTensor>(t));
        for (size_t i = 0; i < outs.size(); ++i)
            o.push_back(std::make_unique<DeviceTensor>(
                Tensor(i == 0 ? c.type : DType::f32, outs[i].shape)));
        const DeviceTensor work{bytes_tensor(cuda::ttt_mlp_workspace(shape))},
            tickets{filled(DType::f32, {c.s}, 0)}, trace{bytes_tensor(cuda::ttt_mlp_trace(shape))};
        const cuda::TttMlpForward call{
            x[0]->data(),   x[1]->data(),    x[2]->data(),
            x[3]->data(),   x[4]->floats(),  x[5]->floats(),
            x[6]->floats(), x[7]->floats(),  x[8]->floats(),
            x[9]->floats(), x[10]->floats(), o[0]->data(),
            o[1]->floats(), o[2]->floats(),  o[3]->floats(),
            o[4]->floats(), o[5]->floats(),  backward && c.s % 2 ? trace.data() : nullptr};
        DeviceTensor::check(cuda::ttt_mlp(shape, call, work.data(),
                                          static_cast<unsigned *>(tickets.data()), nullptr));
        DeviceTensor::check(cudaDeviceSynchronize());
        ScanErrors errors;
        const char *names[] = {"y", "w1", "b1", "w2", "b2", "loss"};
        for (size_t i = 0; i < outs.size(); ++i)
            errors.forward[names[i]] = relative_error(o[i]->back(), expected[i]);
        if (!backward)
            return errors;
        if (cuda::ttt_mlp_vjp_misses(shape))
            return errors; // of the forward pass alone

        std::vector<Tensor> upstream{random(c.type, rows, 1)};
        for (const Shape &s : states)
            upstream.push_back(random(DType::f32, s, 1));
        upstream.push_back(c.losses ? random(DType::f32, {c.s, 3}, 0.5 * double(c.t), double(c.t))
                                    : filled(DType::f32, {c.s, 3}, 0));
        for (const Tensor &t : upstream)
            exact.push_back(wide(t));
        std::vector<Shape> shapes{rows, rows, rows, rates, {c.m}, head, head};
        shapes.insert(shapes.end(), states.begin(), states.end());
        outs.clear();
        for (const Shape &s : shapes)
            outs.push_back({DType::f64, s});
        const auto gradients = reference_.run("ttt_mlp_vjp", exact, outs, attr);
        std::vector<std::unique_ptr<DeviceTensor>> d, up;
        for (const Tensor &t : upstream)
            up.push_back(std::make_unique<DeviceTensor>(t));
        for (size_t i = 0; i < shapes.size(); ++i)
            d.push_back(
                std::make_unique<DeviceTensor>(Tensor(i < 4 ? c.type : DType::f32, shapes[i])));
        const DeviceTensor vjp_work{
            bytes_tensor(cuda::ttt_mlp_vjp_workspace(shape, call.trace != nullptr))};
        const cuda::TttMlpBackward b{call.q,
                                     call.k,
                                     call.v,
                                     call.lr,
                                     call.index,
                                     call.g,
                                     call.b,
                                     call.w1,
                                     call.b1,
                                     call.w2,
                                     call.b2,
                                     up[0]->data(),
                                     up[1]->floats(),
                                     up[2]->floats(),
                                     up[3]->floats(),
                                     up[4]->floats(),
                                     c.losses || c.t % 2 ? up[5]->floats() : nullptr,
                                     call.trace,
                                     d[0]->data(),
                                     d[1]->data(),
                                     d[2]->data(),
                                     d[3]->data(),
                                     d[4]->floats(),
                                     d[5]->floats(),
                                     d[6]->floats(),
                                     d[7]->floats(),
                                     d[8]->floats(),
                                     d[9]->floats(),
                                     d[10]->floats()};
        DeviceTensor::check(cuda::ttt_mlp_vjp(shape, b, vjp_work.data(), nullptr));
        DeviceTensor::check(cudaDeviceSynchronize());
        const Tensor first_dk = d[1]->back(), first_dw = d[7]->back();
        DeviceTensor::check(cuda::ttt_mlp_vjp(shape, b, vjp_work.data(), nullptr));
        DeviceTensor::check(cudaDeviceSynchronize());
        if (!identical(first_dk, d[1]->back()) || !identical(first_dw, d[7]->back()))
            throw std::runtime_error(c.name() + ": a second run gives other gradients");
        const char *gradient_names[] = {"dq", "dk",  "dv",  "dlr", "dindex", "dg",
                                        "db", "dw1", "db1", "dw2", "db2"};
        for (size_t i = 0; i < shapes.size(); ++i)
            errors.gradient[gradient_names[i]] = relative_error(d[i]->back(), gradients[i]);
        return errors;
    }

    OpRunner reference_;
};
inline uint32_t ScanChecker::seed_ = 1000;

// Prints a line a case; false if one is off.
inline bool check_scans(const std::vector<ScanCase> &cases, bool backward) {
    ScanChecker checker;
    bool good = true;
    for (const ScanCase &c : cases) {
        const bool half = c.type == DType::bf16;
        try {
            const ScanErrors e = checker.run(c, backward);
            const double forward = e.worst(e.forward), gradient = e.worst(e.gradient);
            const bool fine = forward <= (half ? 2e-2 : 1e-5) && gradient <= (half ? 2e-2 : 1e-4);
            std::printf("%-4s %-60s forward %.1e gradient %.1e", fine ? "ok" : "BAD",
                        c.name().c_str(), forward, gradient);
            for (const auto *errors : {&e.forward, &e.gradient})
                for (const auto &[name, x] : *errors)
                    std::printf(" %s %.0e", name.c_str(), x);
            std::printf("\n");
            good = good && fine;
        } catch (const NoKernel &e) {
            std::printf("none %-60s %s\n", c.name().c_str(), e.what());
        }
        std::fflush(stdout);
    }
    return good;
}

} // namespace ponder::test
