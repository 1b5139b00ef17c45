// Checks the fused scans on a GPU against the reference kernels in double precision, then times
// them.
//
//     ttt_scan_cuda [--check] [--time] [--variants [--kernels 1245]]
//                   [--small KERNEL [--forward] [--unlimited]] [--mlp | --wide] [--short]
//                   [--one CASE] [--json FILE]
//
// Times are medians over replays of a graph in which each call has inputs of its own, together
// larger than the L2 cache, divided by the calls; `alone` is the median of single calls between
// events, launch cost included. "f+b" is the forward scan keeping its trace and the backward pass
// with it; "vjp" the backward pass alone, which computes the trace again. --one runs the calls of
// one case a few times, for a profiler. --variants times the kernels that TttLinearShape can name
// side by side: rounds of one replay each, in turn, so that a change of clocks meets them all
// alike.
// --small checks short scans of one kernel, for compute-sanitizer: the forward pass alone, without
// the one that has a limit on the gradient's norm.
// --mlp leaves the cases of TTT-MLP alone, --wide those of heads of 256, --short of these the short
// ones.
#include "../ttt_scan_cases.hpp"

#include <fstream>

namespace {

using namespace ponder;
using namespace ponder::test;

#define CHECK(x) DeviceTensor::check(x)

std::vector<ScanCase> checks() {
    std::vector<ScanCase> cases;
    uint32_t seed = 5;
    const auto pick = [&](int n) { return int((seed = seed * 1664525u + 1013904223u) >> 16) % n; };
    const auto add = [&](int64_t d, DType type, int tokens) {
        for (const int64_t m : {16, 64})
            for (const bool ponder : {false, true})
                for (int i = 0; i < 3; ++i) {
                    ScanCase c{1 + pick(3), 1 + pick(tokens), 1 + pick(4), d, m, type, ponder};
                    if (i == 0) // one mini-batch or less
                        c.t = 1 + pick(int(m));
                    c.decay = pick(2) ? 0.1 : 0;
                    c.limit = pick(3) ? 0 : 0.5;
                    c.causal_k = pick(2) ? 0 : -pick(3);
                    c.losses = pick(2) == 0;
                    c.lr_scale = pick(2) ? 1 : 4;
                    c.kernel = m == 16 && d != 256 ? i + 1 : 0;
                    cases.push_back(c);
                    if (type == DType::bf16 && m == 16 && d == 64)
                        for (const int kernel : {4, 5}) {
                            c.kernel = kernel;
                            cases.push_back(c);
                        }
                }
    };
    for (const DType type : {DType::f32, DType::bf16})
        for (const int64_t d : {32, 64, 128})
            add(d, type, 400);
    for (const DType type : {DType::f32, DType::bf16})
        add(256, type, 200); // the reference takes long
    for (const DType type : {DType::f32, DType::bf16})
        cases.push_back({2, 2048, 3, 64, 16, type});
    for (const int kernel : {4, 5}) {
        cases.push_back({1, 2048, 3, 64, 16, DType::bf16});
        cases.back().kernel = kernel;
    }
    constexpr std::pair<int64_t, int64_t> mlp_scans[] = {{64, 16}, {64, 64}, {128, 16}};
    for (const DType type : {DType::f32, DType::bf16})
        for (const auto &[d, m] : mlp_scans)
            for (const int64_t t : {1, 25, 50, 300, 2048}) {
                ScanCase c{t == 50 || t == 2048 ? 1 : 2, t, t == 2048 ? 1 : 2, d, m, type};
                c.mlp = true;
                c.losses = t != 300;
                c.lr_scale = t == 2048 ? 1 : 10;
                cases.push_back(c);
                if (type == DType::bf16 && d == 64 && m == 16 && t != 2048)
                    for (const int split : {4, 1}) {
                        c.kernel = split;
                        cases.push_back(c);
                    }
            }
    return cases;
}

struct Timing {
    std::string name, what;
    double graph_us = 0, alone_us = 0;
    double bytes = 0;
};

double median(std::vector<double> v) {
    std::sort(v.begin(), v.end());
    return v[v.size() / 2];
}

class Timer {
public:
    Timer() {
        CHECK(cudaStreamCreate(&stream));
        CHECK(cudaEventCreate(&start_));
        CHECK(cudaEventCreate(&stop_));
    }
    template <class F> double once(F f) {
        CHECK(cudaEventRecord(start_, stream));
        f();
        CHECK(cudaEventRecord(stop_, stream));
        CHECK(cudaEventSynchronize(stop_));
        float ms;
        CHECK(cudaEventElapsedTime(&ms, start_, stop_));
        return double(ms) * 1e3;
    }
    // call(i) for input sets 0..sets-1
    template <class F> void run(Timing &t, int sets, F call) {
        for (int i = 0; i < sets; ++i)
            call(i);
        CHECK(cudaStreamSynchronize(stream));
        cudaGraph_t graph;
        cudaGraphExec_t exec;
        CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
        for (int i = 0; i < sets; ++i)
            call(i);
        CHECK(cudaStreamEndCapture(stream, &graph));
        CHECK(cudaGraphInstantiate(&exec, graph, 0));
        std::vector<double> replays, calls;
        for (int i = 0; i < 23; ++i) {
            const double us = once([&] { CHECK(cudaGraphLaunch(exec, stream)); }) / sets;
            if (i >= 3)
                replays.push_back(us);
        }
        for (int i = 0; i < 20; ++i)
            calls.push_back(once([&] { call(i % sets); }));
        t.graph_us = median(replays);
        t.alone_us = median(calls);
        CHECK(cudaGraphExecDestroy(exec));
        CHECK(cudaGraphDestroy(graph));
    }
    cudaStream_t stream;

private:
    cudaEvent_t start_, stop_;
};

// Random bytes on the device, of a type.
std::unique_ptr<DeviceTensor> filled_with(const Tensor &pattern, DType type, const Shape &shape) {
    Tensor t(type, shape);
    const size_t bytes = size_t(t.count()) * size_of(type),
                 n = size_t(pattern.count()) * size_of(type);
    for (size_t at = 0; at < bytes; at += n)
        std::memcpy(t.block->data() + at, pattern.block->data(), std::min(n, bytes - at));
    return std::make_unique<DeviceTensor>(t);
}

struct Set {
    std::vector<std::unique_ptr<DeviceTensor>> x;
    DeviceTensor *add(std::unique_ptr<DeviceTensor> t) {
        x.push_back(std::move(t));
        return x.back().get();
    }
};

// Inputs and outputs of one shape, and the calls with them by any kernel.
class LinearCalls {
public:
    LinearCalls(const ScanCase &c, bool few)
        : tensor(double(c.s * c.t * c.h * c.d) * double(size_of(c.type))) {
        const int64_t width = c.h * c.d;
        const Shape rows{c.s, c.t, width}, rates{c.s, c.t, c.h}, state{c.s, c.h, c.d, c.d},
            bias{c.s, c.h, c.d}, head{c.h, c.d};
        const cuda::TttType type = c.type == DType::bf16 ? cuda::TttType::bf16 : cuda::TttType::f32;
        shape = {
            c.s,     c.t,  c.h,     c.d,        c.m,     type, type, c.ponder, 1.0 / double(c.d),
            c.decay, 1e-6, c.limit, c.causal_k, c.kernel};
        sets = few ? 1 : std::max(2, std::min(10, int(80e6 / (4 * tensor)) + 1));
        const Tensor pattern = random_tensor(c.type, {999983}, 1),
                     half = random_tensor(c.type, {99991}, 2, 0.5);
        for (int64_t i = 0; i < half.count(); ++i)
            half.set(i, half.at(i) + 0.5);
        const Tensor wide = random_tensor(DType::f32, {99991}, 3, 0.02);
        DeviceTensor *index = all.add(filled_with(filled(DType::f32, {8}, 0), DType::f32, {c.m}));
        DeviceTensor *g = all.add(filled_with(filled(DType::f32, {8}, 1), DType::f32, head));
        DeviceTensor *b = all.add(filled_with(wide, DType::f32, head));
        work = all.add(std::make_unique<DeviceTensor>(bytes_tensor(std::max(
            cuda::ttt_linear_workspace(shape), cuda::ttt_linear_vjp_workspace(shape, false)))));
        tickets = all.add(filled_with(filled(DType::f32, {8}, 0), DType::f32, {c.s}));
        const auto f32 = [&](const Shape &s) { return all.add(filled_with(wide, DType::f32, s)); };
        const auto row = [&] { return all.add(filled_with(pattern, c.type, rows)); };
        const auto rate = [&] { return all.add(filled_with(half, c.type, rates)); };
        vjp = !cuda::ttt_linear_vjp_misses(shape);
        for (int i = 0; i < sets; ++i) {
            Call call;
            auto *q = row(), *k = row(), *v = row(), *lr = rate();
            call.f = {q->data(),
                      k->data(),
                      v->data(),
                      lr->data(),
                      index->floats(),
                      g->floats(),
                      b->floats(),
                      f32(state)->floats(),
                      f32(bias)->floats(),
                      row()->data(),
                      f32(state)->floats(),
                      f32(bias)->floats(),
                      f32({c.s, 3})->floats(),
                      nullptr};
            call.traced = call.f;
            if (vjp) {
                call.traced.trace = all.add(std::make_unique<DeviceTensor>(
                                                bytes_tensor(cuda::ttt_linear_trace(shape))))
                                        ->data();
                call.b = {call.f.q,
                          call.f.k,
                          call.f.v,
                          call.f.lr,
                          call.f.index,
                          call.f.g,
                          call.f.b,
                          call.f.w1,
                          call.f.b1,
                          row()->data(),
                          f32(state)->floats(),
                          f32(bias)->floats(),
                          nullptr,
                          call.traced.trace,
                          row()->data(),
                          row()->data(),
                          row()->data(),
                          rate()->data(),
                          f32({c.m})->floats(),
                          f32(head)->floats(),
                          f32(head)->floats(),
                          f32(state)->floats(),
                          f32(bias)->floats()};
                call.alone = call.b;
                call.alone.trace = nullptr;
            }
            calls.push_back(call);
        }
    }
    void forward(int i, cudaStream_t stream) { forward(calls[size_t(i)].f, stream); }
    void traced(int i, cudaStream_t stream) { forward(calls[size_t(i)].traced, stream); }
    void backward(int i, cudaStream_t stream) { backward(calls[size_t(i)].b, stream); }
    void alone(int i, cudaStream_t stream) { backward(calls[size_t(i)].alone, stream); }

    const double tensor; // bytes of [S,T,C]
    cuda::TttLinearShape shape;
    int sets = 1;
    bool vjp = false;

private:
    struct Call {
        cuda::TttLinearForward f, traced;
        cuda::TttLinearBackward b, alone;
    };
    void forward(const cuda::TttLinearForward &f, cudaStream_t stream) {
        CHECK(cuda::ttt_linear(shape, f, work->data(), static_cast<unsigned *>(tickets->data()),
                               stream));
    }
    void backward(const cuda::TttLinearBackward &x, cudaStream_t stream) {
        CHECK(cuda::ttt_linear_vjp(shape, x, work->data(), stream));
    }
    Set all;
    std::vector<Call> calls;
    DeviceTensor *work, *tickets;
};

std::vector<Timing> time_linear(Timer &timer, const ScanCase &c, bool few) {
    LinearCalls x(c, few);
    const cudaStream_t stream = timer.stream;
    if (few) {
        for (int i = 0; i < 3; ++i) {
            x.forward(0, stream);
            if (x.vjp)
                x.traced(0, stream), x.backward(0, stream), x.alone(0, stream);
        }
        CHECK(cudaStreamSynchronize(stream));
        return {};
    }
    std::vector<Timing> out;
    Timing t{c.name(), "fwd", 0, 0, 4 * x.tensor};
    timer.run(t, x.sets, [&](int i) { x.forward(i, stream); });
    out.push_back(t);
    if (!x.vjp)
        return out;
    t = {c.name(), "f+b", 0, 0, 12 * x.tensor};
    timer.run(t, x.sets, [&](int i) {
        x.traced(i, stream);
        x.backward(i, stream);
    });
    out.push_back(t);
    t = {c.name(), "vjp", 0, 0, 8 * x.tensor};
    timer.run(t, x.sets, [&](int i) { x.alone(i, stream); });
    out.push_back(t);
    return out;
}

// All kernels for some numbers of heads, in turn.
void time_variants(Timer &timer, const std::string &kernels, std::ostream &out) {
    struct Variant {
        int kernel;
        const char *what;
        cudaGraphExec_t graph = nullptr;
        std::vector<double> us = {};
    };
    for (const int64_t s : {1, 8, 11, 16, 22, 32}) {
        ScanCase c{s, 2048, 12, 64, 16, DType::bf16};
        LinearCalls x(c, false);
        std::vector<Variant> variants;
        for (const char *what : {"fwd", "traced", "bwd"})
            for (const char kernel : kernels)
                if (what[0] != 'b' || kernel <= '2') // backward, there are the two
                    variants.push_back({kernel - '0', what});
        for (Variant &v : variants) {
            x.shape.kernel = v.kernel;
            const auto calls = [&] {
                for (int i = 0; i < x.sets; ++i)
                    v.what[0] == 'f'   ? x.forward(i, timer.stream)
                    : v.what[0] == 't' ? x.traced(i, timer.stream)
                                       : x.backward(i, timer.stream);
            };
            calls();
            CHECK(cudaStreamSynchronize(timer.stream));
            cudaGraph_t graph;
            CHECK(cudaStreamBeginCapture(timer.stream, cudaStreamCaptureModeThreadLocal));
            calls();
            CHECK(cudaStreamEndCapture(timer.stream, &graph));
            CHECK(cudaGraphInstantiate(&v.graph, graph, 0));
            CHECK(cudaGraphDestroy(graph));
        }
        for (int round = 0; round < 18; ++round)
            for (Variant &v : variants) {
                const double us =
                    timer.once([&] { CHECK(cudaGraphLaunch(v.graph, timer.stream)); }) / x.sets;
                if (round >= 3)
                    v.us.push_back(us);
            }
        for (Variant &v : variants) {
            CHECK(cudaGraphExecDestroy(v.graph));
            c.kernel = v.kernel;
            std::printf("%-55s %-6s %8.1f us (best %.1f)\n", c.name().c_str(), v.what, median(v.us),
                        *std::min_element(v.us.begin(), v.us.end()));
            out << "{\"case\": \"" << c.name() << "\", \"what\": \"" << v.what
                << "\", \"kernel\": " << v.kernel << ", \"us\": " << median(v.us)
                << ", \"best_us\": " << *std::min_element(v.us.begin(), v.us.end()) << "}\n";
        }
        std::fflush(stdout);
        out.flush();
    }
}

std::vector<Timing> time_mlp(Timer &timer, const ScanCase &c, bool few) {
    const int64_t width = c.h * c.d, f = 4 * c.d;
    const Shape rows{c.s, c.t, width}, rates{c.s, c.t, c.h}, head{c.h, c.d};
    const std::vector<Shape> states{
        {c.s, c.h, c.d, f}, {c.s, c.h, f}, {c.s, c.h, f, c.d}, {c.s, c.h, c.d}};
    const cuda::TttType type = c.type == DType::bf16 ? cuda::TttType::bf16 : cuda::TttType::f32;
    const cuda::TttMlpShape shape{c.s,  c.t,     c.h, c.d, c.m, type, type, 0.1 / double(c.d),
                                  1e-6, c.kernel};
    if (cuda::ttt_mlp_misses(shape))
        return {};
    const double tensor = double(c.s * c.t * width) * double(size_of(c.type));
    const int sets = few ? 1 : std::max(2, std::min(10, int(80e6 / (4 * tensor)) + 1));
    const Tensor pattern = random_tensor(c.type, {999983}, 1),
                 wide = random_tensor(DType::f32, {99991}, 3, 0.02);
    Set all;
    std::vector<cuda::TttMlpForward> calls, traced;
    std::vector<cuda::TttMlpBackward> back, alone;
    const auto f32 = [&](const Shape &s) {
        return all.add(filled_with(wide, DType::f32, s))->floats();
    };
    const auto row = [&] { return all.add(filled_with(pattern, c.type, rows))->data(); };
    DeviceTensor *tickets = all.add(filled_with(filled(DType::f32, {8}, 0), DType::f32, {c.s}));
    DeviceTensor *work = all.add(std::make_unique<DeviceTensor>(bytes_tensor(
        std::max(cuda::ttt_mlp_workspace(shape), cuda::ttt_mlp_vjp_workspace(shape, false)))));
    const bool vjp = !cuda::ttt_mlp_vjp_misses(shape);
    const float *index = f32({c.m}), *g = f32(head), *b = f32(head);
    for (int i = 0; i < sets; ++i) {
        calls.push_back({row(), row(), row(), all.add(filled_with(pattern, c.type, rates))->data(),
                         index, g, b, f32(states[0]), f32(states[1]), f32(states[2]),
                         f32(states[3]), row(), f32(states[0]), f32(states[1]), f32(states[2]),
                         f32(states[3]), f32({c.s, 3}), nullptr});
        if (!vjp)
            continue;
        const auto &x = calls.back();
        traced.push_back(x);
        traced.back().trace =
            all.add(std::make_unique<DeviceTensor>(bytes_tensor(cuda::ttt_mlp_trace(shape))))
                ->data();
        back.push_back({x.q,
                        x.k,
                        x.v,
                        x.lr,
                        index,
                        g,
                        b,
                        x.w1,
                        x.b1,
                        x.w2,
                        x.b2,
                        row(),
                        f32(states[0]),
                        f32(states[1]),
                        f32(states[2]),
                        f32(states[3]),
                        nullptr,
                        traced.back().trace,
                        row(),
                        row(),
                        row(),
                        all.add(filled_with(pattern, c.type, rates))->data(),
                        f32({c.m}),
                        f32(head),
                        f32(head),
                        f32(states[0]),
                        f32(states[1]),
                        f32(states[2]),
                        f32(states[3])});
        alone.push_back(back.back());
        alone.back().trace = nullptr;
    }
    const auto forward = [&](const cuda::TttMlpForward &x) {
        CHECK(cuda::ttt_mlp(shape, x, work->data(), static_cast<unsigned *>(tickets->data()),
                            timer.stream));
    };
    const auto backward = [&](const cuda::TttMlpBackward &x) {
        CHECK(cuda::ttt_mlp_vjp(shape, x, work->data(), timer.stream));
    };
    if (few) {
        for (int i = 0; i < 3; ++i) {
            forward(calls[0]);
            if (vjp)
                forward(traced[0]), backward(back[0]), backward(alone[0]);
        }
        CHECK(cudaStreamSynchronize(timer.stream));
        return {};
    }
    Timing t{c.name(), "fwd", 0, 0, 4 * tensor};
    timer.run(t, sets, [&](int i) { forward(calls[size_t(i)]); });
    std::vector<Timing> out{t};
    if (!vjp)
        return out;
    t = {c.name(), "f+b", 0, 0, 12 * tensor};
    timer.run(t, sets, [&](int i) {
        forward(traced[size_t(i)]);
        backward(back[size_t(i)]);
    });
    out.push_back(t);
    t = {c.name(), "vjp", 0, 0, 8 * tensor};
    timer.run(t, sets, [&](int i) { backward(alone[size_t(i)]); });
    out.push_back(t);
    return out;
}

} // namespace

int main(int argc, char **argv) {
    bool check = false, time = false, variants = false, backward = true, limited = true;
    bool mlp = false, wide = false, few_tokens = false;
    int one = -1, small = -1;
    std::string json, kernels = "1245";
    for (int i = 1; i < argc; ++i) {
        const std::string a = argv[i];
        check |= a == "--check";
        time |= a == "--time";
        variants |= a == "--variants";
        backward &= a != "--forward";
        limited &= a != "--unlimited";
        if (a == "--kernels" && i + 1 < argc)
            kernels = argv[++i];
        if (a == "--small" && i + 1 < argc)
            small = std::atoi(argv[++i]);
        mlp |= a == "--mlp";
        wide |= a == "--wide";
        few_tokens |= a == "--short";
        if (a == "--one" && i + 1 < argc)
            one = std::atoi(argv[++i]);
        if (a == "--json" && i + 1 < argc)
            json = argv[++i];
    }
    bool good = true;
    if (check) {
        std::vector<ScanCase> cases = checks();
        if (mlp)
            std::erase_if(cases,
                          [&](const ScanCase &c) { return !c.mlp || (few_tokens && c.t != 25); });
        if (wide)
            std::erase_if(cases, [&](const ScanCase &c) {
                return c.d != 256 || (few_tokens && c.t > 2 * c.m);
            });
        good = check_scans(cases, true);
        std::printf("checks: %s\n", good ? "all good" : "FAILED");
    }
    if (small >= 0) {
        std::vector<ScanCase> cases;
        for (const int64_t t : {37, 160})
            for (const int64_t d : {64, 32}) {
                const double limit = t == 37 && limited ? 0.5 : 0;
                cases.push_back({1, t, 2, d, 16, DType::bf16, t == 37, false, 0, limit});
                cases.back().kernel = small;
            }
        if (small >= 4) // there is one head dim of those
            std::erase_if(cases, [](const ScanCase &c) { return c.d != 64; });
        good = check_scans(cases, backward) && good;
    }
    std::vector<ScanCase> cases;
    for (const int64_t s : {1, 8, 32})
        cases.push_back({s, 2048, 12, 64, 16, DType::bf16});
    cases.push_back(cases.back());
    cases.back().kernel = 2;
    cases.push_back({1, 16384, 12, 64, 16, DType::bf16});
    cases.push_back({1, 512, 12, 64, 16, DType::bf16});
    for (const int64_t s : {1, 8})
        cases.push_back({s, 2048, 12, 64, 16, DType::f32});
    cases.push_back({8, 2048, 12, 64, 64, DType::bf16});
    cases.push_back({8, 2048, 24, 32, 16, DType::bf16});
    cases.push_back({8, 2048, 6, 128, 16, DType::bf16});
    cases.push_back({8, 2048, 6, 128, 64, DType::bf16});
    cases.push_back({1, 512, 12, 64, 16, DType::bf16, true, false, 0.1, 1.0, -1});
    for (const int64_t s : {1, 2, 4, 8}) {
        ScanCase c{s, 2048, 12, 64, 16, DType::bf16};
        c.mlp = true;
        for (const int split : {4, 1}) { // both, to choose by
            c.kernel = split;
            cases.push_back(c);
        }
    }
    for (const int64_t s : {1, 8}) {
        cases.push_back({s, 2048, 12, 64, 64, DType::bf16});
        cases.back().mlp = true;
    }
    for (const int64_t m : {16, 64}) {
        cases.push_back({1, 2048, 12, 64, m, DType::f32});
        cases.back().mlp = true;
    }
    for (const int64_t s : {1, 8})
        for (const int64_t m : {16, 64})
            cases.push_back({s, 2048, 4, 256, m, DType::bf16});
    cases.push_back({1, 2048, 4, 256, 16, DType::f32});
    for (const int64_t s : {1, 8}) {
        cases.push_back({s, 2048, 6, 128, 16, DType::bf16});
        cases.back().mlp = true;
    }
    cases.push_back({1, 2048, 6, 128, 16, DType::f32});
    cases.back().mlp = true;
    if (small >= 0 && !time && !variants && one < 0)
        return good ? 0 : 1;
    if (mlp)
        std::erase_if(cases, [](const ScanCase &c) { return !c.mlp; });
    if (wide)
        std::erase_if(cases, [](const ScanCase &c) { return c.d != 256; });
    Timer timer;
    if (variants) { // results are lines of JSON, one each
        std::ofstream out(json.empty() ? "/dev/null" : json, std::ios::app);
        time_variants(timer, kernels, out);
    }
    if (one >= 0) {
        const ScanCase &c = cases.at(size_t(one));
        c.mlp ? time_mlp(timer, c, true) : time_linear(timer, c, true);
    }
    if (time) {
        cudaDeviceProp device;
        CHECK(cudaGetDeviceProperties(&device, 0));
        void *a, *b;
        const size_t size = size_t(1) << 30;
        CHECK(cudaMalloc(&a, size));
        CHECK(cudaMalloc(&b, size));
        CHECK(cudaMemset(a, 1, size));
        std::vector<double> copies;
        for (int i = 0; i < 12; ++i)
            copies.push_back(timer.once([&] {
                CHECK(cudaMemcpyAsync(b, a, size, cudaMemcpyDeviceToDevice, timer.stream));
            }));
        CHECK(cudaFree(a));
        CHECK(cudaFree(b));
        const double rate = 2 * double(size) / median(copies) * 1e6; // bytes a second
        std::printf("%s, %d multiprocessors; device copy %.2f TB/s\n", device.name,
                    device.multiProcessorCount, rate / 1e12);
        std::ofstream out(json.empty() ? "/dev/null" : json);
        out << "{\"device\": \"" << device.name << "\", \"copy_bytes_per_second\": " << rate
            << ", \"results\": [";
        std::printf("%-50s %-4s %10s %10s %12s %12s\n", "case", "", "us", "alone us", "us/mini-b.",
                    "floor us");
        const char *comma = "\n";
        for (const ScanCase &c : cases)
            for (const Timing &t :
                 c.mlp ? time_mlp(timer, c, false) : time_linear(timer, c, false)) {
                const double steps = double((c.t + c.m - 1) / c.m);
                std::printf("%-50s %-4s %10.1f %10.1f %12.3f %12.1f\n", t.name.c_str(),
                            t.what.c_str(), t.graph_us, t.alone_us, t.graph_us / steps,
                            t.bytes / rate * 1e6);
                std::fflush(stdout);
                out << comma << "{\"case\": \"" << t.name << "\", \"what\": \"" << t.what
                    << "\", \"us\": " << t.graph_us << ", \"alone_us\": " << t.alone_us
                    << ", \"bandwidth_floor_us\": " << t.bytes / rate * 1e6 << "}";
                comma = ",\n";
            }
        out << "\n]}\n";
    }
    return good ? 0 : 1;
}
