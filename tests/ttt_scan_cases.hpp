// The fused scans against the reference kernels in double precision, on random shapes: for a GPU,
// and for the emulator where there is none.
#pragma once

#include "../backends/cuda/ttt_scan_tensors.hpp"
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
    // shift: bytes by which it misses a round address.
    explicit DeviceTensor(const Tensor &host, size_t shift = 0)
        : host_(host), bytes_(size_t(host.count()) * size_of(host.type)) {
        if (host.type == DType::none)
            return;
        check(cudaMalloc(&block_, shift + bytes_ + 1));
        data_ = static_cast<std::byte *>(block_) + shift;
        check(cudaMemcpy(data_, host.block->data(), bytes_, cudaMemcpyHostToDevice));
    }
    ~DeviceTensor() { cudaFree(block_); }
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
    void *block_ = nullptr, *data_ = nullptr;
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
    std::string no_gradient; // why there is none
    double worst(const std::map<std::string, double> &of) const {
        double x = 0;
        for (const auto &[name, e] : of)
            x = std::isfinite(e) ? std::max(x, e) : INFINITY;
        return x;
    }
};

inline Tensor bytes_tensor(size_t n) { return Tensor(DType::f32, {int64_t(n + 3) / 4}); }

// A fused scan's functions; see ttt_scan.hpp.
template <class S, class F, class B> struct ScanFunctions {
    using Forward = F;
    using Backward = B;
    const char *op;
    const char *(*misses)(const S &), *(*vjp_misses)(const S &);
    size_t (*trace)(const S &), (*workspace)(const S &), (*vjp_workspace)(const S &, bool);
    cudaError_t (*forward)(const S &, const F &, void *, unsigned *, cudaStream_t);
    cudaError_t (*backward)(const S &, const B &, void *, cudaStream_t);
};
inline constexpr ScanFunctions<cuda::TttLinearShape, cuda::TttLinearForward,
                               cuda::TttLinearBackward>
    linear_scan{"ttt_linear",           cuda::ttt_linear_misses,    cuda::ttt_linear_vjp_misses,
                cuda::ttt_linear_trace, cuda::ttt_linear_workspace, cuda::ttt_linear_vjp_workspace,
                cuda::ttt_linear,       cuda::ttt_linear_vjp};
inline constexpr ScanFunctions<cuda::TttMlpShape, cuda::TttMlpForward, cuda::TttMlpBackward>
    mlp_scan{"ttt_mlp",           cuda::ttt_mlp_misses,    cuda::ttt_mlp_vjp_misses,
             cuda::ttt_mlp_trace, cuda::ttt_mlp_workspace, cuda::ttt_mlp_vjp_workspace,
             cuda::ttt_mlp,       cuda::ttt_mlp_vjp};

constexpr double bf16_limit = 2e-2; // of relative errors

class ScanChecker {
public:
    ScanChecker() : reference_(reference_backend()) {}

    // A case has its own numbers, the same for all kernels, whatever ran before.
    ScanErrors run(const ScanCase &c, bool backward = true) {
        ScanCase any = c;
        any.kernel = 0;
        seed_ = 2166136261u; // FNV-1a of the name
        for (const char x : any.name())
            seed_ = (seed_ ^ uint8_t(x)) * 16777619u;
        const cuda::TttType type = c.type == DType::bf16 ? cuda::TttType::bf16 : cuda::TttType::f32;
        if (c.mlp) {
            const double scale = 0.1 * c.lr_scale / double(c.d), eps = 1e-6;
            return compare(mlp_scan, {c.s, c.t, c.h, c.d, c.m, type, type, scale, eps, c.kernel},
                           {scale, eps},
                           {{c.s, c.h, c.d, 4 * c.d},
                            {c.s, c.h, 4 * c.d},
                            {c.s, c.h, 4 * c.d, c.d},
                            {c.s, c.h, c.d}},
                           c, backward);
        }
        const double scale = c.lr_scale / double(c.d), eps = 1e-6;
        return compare(linear_scan,
                       {c.s, c.t, c.h, c.d, c.m, type, type, c.ponder, scale, c.decay, eps, c.limit,
                        c.causal_k, c.kernel},
                       {double(c.ponder), scale, c.decay, eps, c.limit, double(c.causal_k)},
                       {{c.s, c.h, c.d, c.d}, {c.s, c.h, c.d}}, c, backward);
    }

private:
    Tensor random(DType type, const Shape &shape, double scale, double offset = 0) {
        Tensor t = random_tensor(type, shape, ++seed_, scale);
        if (offset != 0)
            for (int64_t i = 0; i < t.count(); ++i)
                t.set(i, t.at(i) + offset);
        return t;
    }

    // Of the op on the reference, in f64.
    std::vector<Tensor> exact(const std::string &op, const std::vector<Tensor> &in,
                              const std::vector<Out> &out, const std::vector<double> &attr) {
        std::vector<Tensor> wide;
        for (const Tensor &t : in)
            wide.push_back(t.to(DType::f64));
        std::vector<Out> results = out;
        for (Out &o : results)
            o.type = DType::f64;
        return reference_.run(op, wide, results, attr);
    }

    // A call's tensors on the device, inputs first. Those of the parameters' gradients, three from
    // output `anywhere` on, may lie at any number.
    class Call {
    public:
        Call(const std::vector<Tensor> &in, const std::vector<Out> &out, size_t anywhere)
            : first_out_(in.size()) {
            for (const Tensor &t : in)
                tensor_.push_back(std::make_unique<DeviceTensor>(t));
            for (size_t i = 0; i < out.size(); ++i)
                tensor_.push_back(std::make_unique<DeviceTensor>(
                    Tensor(out[i].type, out[i].shape),
                    i >= anywhere && i < anywhere + 3 ? sizeof(float) : 0));
        }
        std::vector<void *> addresses() const {
            std::vector<void *> a;
            for (const auto &t : tensor_)
                a.push_back(t->data());
            return a;
        }
        // What `queue` leaves, which is run twice.
        template <class F> std::vector<Tensor> results(const std::string &name, F queue) const {
            std::vector<Tensor> first = once(queue), second = once(queue);
            for (size_t i = 0; i < first.size(); ++i)
                if (!identical(first[i], second[i]))
                    throw std::runtime_error(name + ": a second run gives other results");
            return second;
        }

    private:
        template <class F> std::vector<Tensor> once(F queue) const {
            DeviceTensor::check(queue());
            DeviceTensor::check(cudaDeviceSynchronize());
            std::vector<Tensor> results;
            for (size_t i = first_out_; i < tensor_.size(); ++i)
                results.push_back(tensor_[i]->back());
            return results;
        }
        std::vector<std::unique_ptr<DeviceTensor>> tensor_;
        size_t first_out_;
    };

    static std::map<std::string, double> errors(const std::vector<std::string> &names,
                                                const std::vector<Tensor> &results,
                                                const std::vector<Tensor> &expected) {
        std::map<std::string, double> e;
        for (size_t i = 0; i < names.size(); ++i)
            e[names[i]] = relative_error(results[i], expected[i]);
        return e;
    }

    template <class S, class F, class B>
    ScanErrors compare(const ScanFunctions<S, F, B> &scan, const std::type_identity_t<S> &shape,
                       const std::vector<double> &attr, const std::vector<Shape> &states,
                       const ScanCase &c, bool backward) {
        const Shape rows{c.s, c.t, c.h * c.d}, rates{c.s, c.t, c.h}, head{c.h, c.d};
        std::vector<Tensor> in{random(c.type, rows, 1),        random(c.type, rows, 1),
                               random(c.type, rows, 1),        random(c.type, rates, 0.5, 0.5),
                               random(DType::f32, {c.m}, 0.2), random(DType::f32, head, 0.5, 1),
                               random(DType::f32, head, 0.3)};
        in[4].set(c.m / 2, -2); // a rate below 0, which counts as 0
        std::vector<std::string> names{"y"},
            gradient_names{"dq", "dk", "dv", "dlr", "dindex", "dg", "db"};
        std::vector<Out> out{{c.type, rows}},
            gradients{{c.type, rows},      {c.type, rows},     {c.type, rows},    {c.type, rates},
                      {DType::f32, {c.m}}, {DType::f32, head}, {DType::f32, head}};
        for (size_t i = 0; i < states.size(); ++i) {
            in.push_back(random(DType::f32, states[i], c.mlp ? 0.15 : 0.2, c.mlp ? 0.01 : 0.02));
            out.push_back({DType::f32, states[i]});
            gradients.push_back(out.back());
            names.push_back((i % 2 ? "b" : "w") + std::to_string(i / 2 + 1));
            gradient_names.push_back("d" + names.back());
        }
        names.push_back("loss");
        out.push_back({DType::f32, {c.s, 3}});
        if (const char *misses = scan.misses(shape))
            throw NoKernel(misses);

        const DeviceTensor trace{bytes_tensor(scan.trace(shape))},
            work{bytes_tensor(scan.workspace(shape))}, tickets{filled(DType::f32, {c.s}, 0)};
        const Call call(in, out, out.size());
        F f = cuda::tensors_at<F>(call.addresses().data());
        f.trace = backward && c.s % 2 ? trace.data() : nullptr;
        const auto results = call.results(c.name(), [&] {
            return scan.forward(shape, f, work.data(), static_cast<unsigned *>(tickets.data()),
                                nullptr);
        });
        ScanErrors all;
        all.forward = errors(names, results, exact(scan.op, in, out, attr));
        if (!backward)
            return all;
        if (const char *misses = scan.vjp_misses(shape)) {
            all.no_gradient = misses;
            return all;
        }

        in.push_back(random(c.type, rows, 1));
        for (const Shape &s : states)
            in.push_back(random(DType::f32, s, 1));
        // of one sign: the three losses' gradients are nearly parallel, and where they cancel bf16
        // has little left
        in.push_back(c.losses ? random(DType::f32, {c.s, 3}, 0.5 * double(c.t), double(c.t))
                              : filled(DType::f32, {c.s, 3}, 0));
        const Call vjp(in, gradients, 4);
        const DeviceTensor vjp_work{bytes_tensor(scan.vjp_workspace(shape, f.trace != nullptr))};
        B b = cuda::tensors_at<B>(vjp.addresses().data());
        b.trace = f.trace;
        if (!c.losses && c.t % 2 == 0)
            b.dloss = nullptr;
        const auto back = vjp.results(
            c.name(), [&] { return scan.backward(shape, b, vjp_work.data(), nullptr); });
        const auto expected = exact(std::string(scan.op) + "_vjp", in, gradients, attr);
        all.gradient = errors(gradient_names, back, expected);
        // dindex sums terms with signs over all tokens, heads and dims. Where they cancel, it is
        // measured by how far twice bf16's rounding of the inputs alone moves it: the kernels round
        // at some ten places more.
        double &of_index = all.gradient["dindex"];
        if (c.type == DType::bf16 && of_index > bf16_limit) {
            std::vector<Tensor> near = in;
            for (Tensor &t : near)
                if (t.type == DType::bf16) {
                    t = t.to(DType::f64);
                    const Tensor noise = random(DType::f64, t.shape, 1.0 / 256);
                    for (int64_t k = 0; k < t.count(); ++k)
                        t.set(k, t.at(k) * (1 + noise.at(k)));
                }
            const auto moved = exact(std::string(scan.op) + "_vjp", near, gradients, attr);
            of_index *=
                bf16_limit / std::max(4 * relative_error(moved[4], expected[4]), bf16_limit);
        }
        return all;
    }

    OpRunner reference_;
    uint32_t seed_ = 0;
};

// Prints a line a case; false if one is off.
inline bool check_scans(const std::vector<ScanCase> &cases, bool backward) {
    ScanChecker checker;
    bool good = true;
    for (const ScanCase &c : cases) {
        const bool half = c.type == DType::bf16;
        try {
            const ScanErrors e = checker.run(c, backward);
            const double forward = e.worst(e.forward), gradient = e.worst(e.gradient);
            const bool fine =
                forward <= (half ? bf16_limit : 1e-5) && gradient <= (half ? bf16_limit : 1e-4);
            std::printf("%-4s %-60s forward %.1e gradient %.1e", fine ? "ok" : "BAD",
                        c.name().c_str(), forward, gradient);
            for (const auto *errors : {&e.forward, &e.gradient})
                for (const auto &[name, x] : *errors)
                    std::printf(" %s %.0e", name.c_str(), x);
            if (!e.no_gradient.empty())
                std::printf(" NO GRADIENT: %s", e.no_gradient.c_str());
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
