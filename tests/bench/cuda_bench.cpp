// Times of whole passes on a device, GPT-2 124M with random weights unless told otherwise:
//     cuda_bench [--json FILE] [--only PART,PART] [--backend NAME]
// `alone`: a run and the wait for it, median of many. `queued`: many runs and one wait, for each.
// Weights alone exceed the caches; tokens are new ones in every training step.
#include "adapt/lora.hpp"
#include "adapt/ttt.hpp"
#include "base/options.hpp"
#include "formats/gpt2_create.hpp"
#include "session/generate.hpp"
#include "session/session.hpp"
#include "tensor/compose.hpp"
#include "tensor/ops.hpp"
#include "train/trainer.hpp"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <functional>
#include <random>

using namespace ponder;

namespace {

double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
}

struct Line {
    std::string name;
    double alone_ms, queued_ms, flops, tokens;
    double floor_ms = 0; // to move what has to be moved as fast as copies go, where it is stated
};
std::vector<Line> lines;

void add(Line line) {
    const double s = (line.queued_ms > 0 ? line.queued_ms : line.alone_ms) * 1e-3;
    std::printf("%-44s %9.3f %9.3f %9.1f %12.0f\n", line.name.c_str(), line.alone_ms,
                line.queued_ms, line.flops / s * 1e-12, line.tokens / s);
    if (line.floor_ms > 0)
        std::printf("    floor %.3f ms: %.0f %% of it\n", line.floor_ms,
                    100 * line.floor_ms / (s * 1e3));
    std::fflush(stdout);
    lines.push_back(std::move(line));
}

void time(const std::string &name, const Device &device, double flops, double tokens,
          const std::function<void()> &run) {
    for (int i = 0; i < 4; ++i)
        run();
    device.synchronize();
    std::vector<double> alone;
    const double begin = now();
    while (alone.size() < 50 && now() - begin < 1) {
        const double start = now();
        run();
        device.synchronize();
        alone.push_back((now() - start) * 1e3);
    }
    std::sort(alone.begin(), alone.end());
    const double median = alone[alone.size() / 2];
    const int count = std::clamp(int(500 / median), 5, 200);
    const double start = now();
    for (int i = 0; i < count; ++i)
        run();
    device.synchronize();
    add({name, median, (now() - start) * 1e3 / count, flops, tokens});
}

// A program with memory for everything that it wants bound.
struct Bound {
    std::shared_ptr<const Device> device;
    std::unique_ptr<const Program> program;
    std::vector<DeviceBuffer> buffers;
    Program::Bindings at;
    DeviceBuffer arena, workspace;

    Bound(Graph g, std::vector<size_t> ends, std::shared_ptr<const Device> d) : device(d) {
        program = std::make_unique<Program>(std::move(g), std::move(ends), d);
        const auto &values = program->graph().values();
        at.resize(values.size());
        std::mt19937 random(1);
        for (size_t i = 0; i < values.size(); ++i) {
            if (values[i].kind != Kind::external)
                continue;
            buffers.emplace_back(d, values[i].bytes());
            at[i] = buffers.back().data();
            const size_t count = size_t(values[i].shape.count());
            if (values[i].type == DType::i32) {
                std::vector<int32_t> ids(count);
                for (int32_t &id : ids)
                    id = int32_t(random() % 8000);
                d->upload(at[i], ids.data(), count * 4);
            } else if (values[i].type == DType::f32) {
                std::vector<float> x(count);
                for (float &v : x)
                    v = float(random()) / 4294967296.0f * 0.02f - 0.01f;
                d->upload(at[i], x.data(), count * 4);
            } else if (values[i].type == DType::bf16) {
                std::vector<uint16_t> x(count);
                for (uint16_t &bits : x)
                    bits = uint16_t((random() & 0x80ff) | 0x3c00); // 0.008 to 0.03, both signs
                d->upload(at[i], x.data(), count * 2);
            }
        }
        arena = DeviceBuffer(d, program->arena_bytes());
        workspace = DeviceBuffer(d, program->workspace_bytes() * d->workers());
    }
    void run(size_t segment) const {
        program->run(segment, at, arena.data(), workspace.data(), nullptr);
    }
    double flops(size_t segment) const { return double(program->flops(segment)); }
};

Bound losses(const Model &model, int64_t streams, int64_t tokens) {
    const Gpt2 &backbone = model.backbone();
    Graph g(backbone.type());
    const Id ids = g.external("tokens", DType::i32, {streams, tokens});
    const Id targets = g.external("targets", DType::i32, {streams, tokens});
    const Id hidden = backbone.hidden(g, ids, tokens, Adapter(), g.act);
    const CrossEntropy ce = cross_entropy(g, hidden, backbone.head(g), targets, false);
    g.expose(ce.nll, "losses");
    g.expose(ce.entropy, "entropies");
    const size_t end = g.calls().size();
    return {std::move(g), {end}, model.device()};
}

Bound pass(const Model &model, const Adapter &adapter, bool learn, bool inside) {
    Recording r = record_pass(model.backbone(), adapter, {512, 512, learn, inside, false});
    return {std::move(r.graph), r.segment_ends, model.device()};
}

// One layer's attention, and its gradient alone: what torch_attention.py times of libraries.
void attend(const Model &model, int64_t streams, int64_t tokens) {
    const Gpt2Config &config = model.backbone().config();
    Graph g(model.backbone().type());
    const Shape shape{streams, tokens, config.width};
    const Id qkv = g.external("qkv", g.act, shape.with_last(3 * config.width));
    const Id o = attention(g, qkv, config.heads, 0);
    const Call call = g.calls().back();
    g.expose(o, "o");
    g.expose(call.out[1], "lse");
    const size_t end = g.calls().size();
    const Id dqkv = g.temporary(g.act, g.shape(qkv));
    g.add_call(attention_vjp_rule, {qkv, o, call.out[1], g.external("do", g.act, shape)}, {dqkv},
               call.attr);
    g.expose(dqkv, "dqkv");
    const Bound b(std::move(g), {end, end + 1}, model.device());
    for (const size_t segment : {0, 1})
        time("attention " + std::string(segment ? "backward" : "forward") +
                 ", 12 heads of 64, B=" + std::to_string(streams) + " T=" + std::to_string(tokens),
             *model.device(), b.flops(segment), double(streams * tokens), [&] { b.run(segment); });
}

// A TTT scan with the gradients of all that it reads: as two calls, or composed of primitives.
void scan(const std::shared_ptr<const Device> &device, bool mlp, int64_t heads, int64_t d,
          int64_t streams, int64_t tokens, bool composed) {
    constexpr int64_t m = 16;
    Graph g(DType::bf16);
    std::vector<Id> in;
    const auto input = [&](DType type, Shape shape) {
        in.push_back(g.external("input", type, shape, true));
        return in.back();
    };
    const Shape rows{streams, tokens, heads * d};
    const Id q = input(g.act, rows), k = input(g.act, rows), v = input(g.act, rows),
             lr = input(g.act, {streams, tokens, heads}), index = input(g.wide, {m}),
             scale = input(g.wide, {heads, d}), shift = input(g.wide, {heads, d});
    const int64_t hidden = mlp ? 4 * d : d;
    std::vector<Id> state{input(g.wide, {streams, heads, d, hidden}),
                          input(g.wide, {streams, heads, hidden})};
    if (mlp) {
        state.push_back(input(g.wide, {streams, heads, hidden, d}));
        state.push_back(input(g.wide, {streams, heads, d}));
    }
    TttScan form;
    form.mlp = mlp;
    form.scale = 0.1 / double(d);
    const TttResult r =
        (composed ? compose::ttt_scan : ttt_scan)(g, q, k, v, lr, index, scale, shift, state, form);
    const std::vector<Seed> seeds{{r.y, g.external("dy", g.value(r.y).type, rows)}};
    for (const Id id : gradients(g, seeds, in))
        g.expose(id, "gradient");
    g.expose(r.y, "y");
    const size_t end = g.calls().size();
    const Bound b(std::move(g), {end}, device);
    time(std::string(mlp ? "TTT-MLP" : "TTT-Linear") + " scan and gradient, " +
             std::to_string(heads) + " x " + std::to_string(d) + ", B=" + std::to_string(streams) +
             " T=" + std::to_string(tokens) + (composed ? ", composed" : ""),
         *device, b.flops(0), double(streams * tokens), [&] { b.run(0); });
    std::printf("    %zu calls, arena %.2f GB, workspace %.2f GB\n", end,
                double(b.program->arena_bytes()) * 1e-9,
                double(b.program->workspace_bytes()) * 1e-9);
}

void session(const std::shared_ptr<const Model> &model, const std::string &name,
             std::initializer_list<std::pair<const char *, const char *>> values) {
    Options options;
    options.set("chunk", "512");
    options.set("context", "512");
    options.set("budget.rate", "inf");
    options.set("guard.norm", "inf");
    for (const auto &[key, value] : values)
        options.set(key, value);
    Session s(model, options);
    std::mt19937 random(2);
    const auto feed = [&](int chunks) {
        std::vector<int32_t> ids(size_t(512 * chunks));
        for (int32_t &id : ids)
            id = int32_t(random() % 8000);
        s.feed(ids);
    };
    const CallGuard guard(s.cancel_flag(), nullptr);
    std::vector<double> times, decisions;
    for (int i = 0; i < 60; ++i) { // by hand: score, then decide and learn
        feed(1);
        const double start = now();
        s.score(guard);
        s.learn(-1, guard);
        if (i >= 10) {
            times.push_back((now() - start) * 1e3);
            decisions.push_back(double(s.records().back().decide_ns) * 1e-3);
        }
    }
    const auto median = [](std::vector<double> &values) {
        std::sort(values.begin(), values.end());
        return values[values.size() / 2];
    };
    // Many in one call, queued ahead where the device decides.
    constexpr int chunks = 64;
    std::vector<double> ahead;
    for (int i = 0; i < 12; ++i) {
        feed(chunks);
        const double start = now();
        s.adapt(guard);
        if (i >= 2)
            ahead.push_back((now() - start) * 1e3 / chunks);
    }
    uint64_t steps = 0;
    for (size_t i = s.records().size() - chunks; i < s.records().size(); ++i)
        steps += uint64_t(s.records()[i].steps);
    add({name, median(times), median(ahead), double(s.records().back().flops), 512});
    std::printf("    decision %.2f us on the host; %.2f steps a chunk\n", median(decisions),
                double(steps) / chunks);
}

void train(const std::shared_ptr<const Model> &model, const char *name, size_t streams,
           size_t tokens, int steps) {
    Options options;
    options.set("train.micro", std::to_string(streams));
    options.set("train.steps", "1000");
    const auto trainer = make_trainer(model, PONDER_TRAIN_BACKBONE, options);
    std::atomic<bool> cancel{false};
    std::mt19937 random(3);
    std::vector<double> times;
    double flops = 0, loss = 0;
    for (int i = 0; i < steps; ++i) {
        std::vector<int32_t> ids(streams * (tokens + 1));
        for (int32_t &id : ids)
            id = int32_t(random() % 8000);
        std::vector<ponder_stream> given(streams);
        for (size_t s = 0; s < streams; ++s)
            given[s] = {ids.data() + s * (tokens + 1), tokens + 1};
        const double start = now();
        const ponder_train_record r = trainer->step(given, CallGuard(cancel, nullptr));
        if (i >= 3)
            times.push_back((now() - start) * 1e3);
        flops = double(r.flops);
        loss = r.loss;
    }
    std::sort(times.begin(), times.end());
    add({name, times[times.size() / 2], 0, flops, double(streams * tokens)});
    std::printf("    loss %.4f after %d steps\n", loss, steps);
}

// Bytes a second of a copy, read and written.
double bandwidth(const std::shared_ptr<const Device> &device) {
    constexpr size_t size = size_t(512) << 20;
    const DeviceBuffer from(device, size), to(device, size);
    double best = 0;
    for (int i = 0; i < 5; ++i) {
        device->synchronize();
        const double start = now();
        for (int j = 0; j < 4; ++j)
            device->copy(to.data(), from.data(), size);
        device->synchronize();
        best = std::max(best, 8 * double(size) / (now() - start));
    }
    return best;
}

// Prompts of new tokens until the first one is generated, and each of the 64 after it, as a caller
// times them: medians. What has to move: the matrices once for a pass, and keys and values so far.
void generate(const std::shared_ptr<const Model> &model, const std::string &name, size_t streams,
              size_t prompt, const char *adapter) {
    constexpr uint64_t more = 64;
    const Gpt2 &backbone = model->backbone();
    const Gpt2Config &config = backbone.config();
    Options options;
    options.set("adapter", adapter);
    options.set("policy", std::strcmp(adapter, "none") ? "always" : "skip");
    std::vector<std::unique_ptr<Session>> sessions;
    std::vector<Session *> list;
    std::vector<CallGuard> guards;
    std::vector<Generation> wishes(streams);
    for (size_t i = 0; i < streams; ++i) {
        sessions.push_back(std::make_unique<Session>(model, options));
        list.push_back(sessions[i].get());
        guards.emplace_back(list[i]->cancel_flag(), nullptr);
    }
    std::mt19937 random(4);
    const auto run = [&](uint64_t tokens) { // milliseconds
        std::vector<ponder_generation_result> results(streams);
        for (Generation &wish : wishes) {
            wish.max_tokens = tokens;
            wish.prompt.resize(prompt);
            for (int32_t &id : wish.prompt)
                id = int32_t(random() % 8000);
        }
        const double start = now();
        Session::generate(list, wishes, results, guards);
        return (now() - start) * 1e3;
    };
    for (int i = 0; i < 3; ++i)
        run(1 + more); // passes are noted down
    std::vector<double> fill, write;
    for (int i = 0; i < 5; ++i) {
        fill.push_back(run(1));
        write.push_back(run(1 + more));
    }
    std::sort(fill.begin(), fill.end());
    std::sort(write.begin(), write.end());
    const double first = fill[2], each = (write[2] - first) / double(more);
    const double speed = bandwidth(model->device()) * 1e-3, // bytes a millisecond
        element = double(size_of(backbone.type())),
                 matrices = double(backbone.packed_estimate(false, 0)),
                 rest = matrices - double(config.vocabulary * config.width) * element,
                 row = double(config.layers * 2 * config.width) * element; // keys and values
    const std::string what = name + ", " + adapter;
    if (streams == 1)
        add({what + ", prompt of " + std::to_string(prompt) + ", first token", first, 0,
             2 * rest / element * double(prompt), double(prompt),
             (matrices + row * double(prompt)) / speed});
    const double before = double(prompt) + double(more) / 2;
    add({what + ", a token, " + std::to_string(streams) + " sessions", each, 0,
         2 * matrices / element * double(streams), double(streams),
         (matrices + double(streams) * row * before) / speed});
}

} // namespace

int main(int argc, char **argv) {
    std::string json, only, backend = "cuda";
    for (int i = 1; i + 1 < argc; i += 2) {
        (!std::strcmp(argv[i], "--json")   ? json
         : !std::strcmp(argv[i], "--only") ? only
                                           : backend) = argv[i + 1];
    }
    const auto wanted = [&](const std::string &part) {
        return only.empty() || ("," + only + ",").find("," + part + ",") != std::string::npos;
    };
    try {
        const std::string folder = "/tmp/ponder-bench-gpt2", small = "/tmp/ponder-bench-10m";
        const Gpt2Config gpt2{12, 768, 12, 3072, 1024, 50257, 1e-5, true},
            code10m{10, 256, 4, 1024, 1024, 8192, 1e-5, true};
        for (const auto &[path, config] : {std::pair(folder, gpt2), {small, code10m}})
            if (!std::filesystem::exists(path + "/model.safetensors")) {
                std::filesystem::create_directories(path);
                create_gpt2(path, config, 1);
            }
        auto runtime = std::make_shared<Runtime>();
        runtime->memory = std::make_shared<Memory>(0, nullptr, nullptr, nullptr);
        runtime->threads = std::make_shared<Threads>(8);
        runtime->backends = load_backends("", {});
        const auto load = [&](const std::string &path) {
            return std::make_shared<Model>(runtime, path, backend, "bf16",
                                           [](uint64_t, uint64_t) {});
        };
        const std::shared_ptr<const Model> model = load(folder);
        const Device &device = *model->device();
        std::printf("%s %s\n%-44s %9s %9s %9s %12s\n", device.backend().name,
                    device.backend().isa(), "", "alone ms", "queued ms", "TFLOP/s", "tokens/s");
        Options lora_options;
        lora_options.set("lora.layers", "last:3");
        const Lora lora(model->backbone().config(), lora_options);
        if (wanted("skip")) {
            const Bound b = losses(*model, 1, 512);
            time("SKIP, B=1 T=512, losses", device, b.flops(0), 512, [&] { b.run(0); });
        }
        if (wanted("lora")) {
            const Bound b = pass(*model, lora, true, false);
            time("LoRA last 3 layers, score with tape", device, b.flops(0), 512, [&] { b.run(0); });
            time("LoRA last 3 layers, score and gradient", device, b.flops(0) + b.flops(1), 512,
                 [&] {
                     b.run(0);
                     b.run(1);
                 });
        }
        if (wanted("ttt")) {
            const Ttt ttt(model->backbone().config(), Options(), false);
            const Bound skip = pass(*model, ttt, false, false), b = pass(*model, ttt, false, true);
            time("TTT-Linear layer, SKIP", device, skip.flops(0), 512, [&] { skip.run(0); });
            time("TTT-Linear layer, UPDATE", device, b.flops(0), 512, [&] { b.run(0); });
        }
        if (wanted("scans"))
            for (const int64_t streams : {1, 8}) {
                for (const bool composed : {false, true})
                    scan(model->device(), true, 12, 64, streams, 2048, composed);
                scan(model->device(), true, 4, 128, streams, 2048, false);
                scan(model->device(), false, 4, 256, streams, 2048, false);
                // 96 is none of the fused kernels'
                scan(model->device(), true, 4, 96, streams, 2048, false);
                scan(model->device(), false, 4, 96, streams, 2048, false);
            }
        if (wanted("batch")) {
            const Bound b = losses(*model, 16, 1024);
            time("SKIP, B=16 T=1024, losses", device, b.flops(0), 16384, [&] { b.run(0); });
        }
        if (wanted("attention")) {
            attend(*model, 1, 512);
            attend(*model, 16, 1024);
            attend(*model, 32, 1024);
        }
        if (wanted("session")) {
            for (const auto &[name, m] :
                 {std::pair<std::string, std::shared_ptr<const Model>>("session", model),
                  {"code-10m's shape", load(small)}}) {
                session(m, name + ", policy skip", {{"policy", "skip"}});
                session(m, name + ", LoRA last 3, policy always",
                        {{"policy", "always"}, {"lora.layers", "last:3"}});
                session(m, name + ", LoRA last 3, every fourth",
                        {{"policy", "every:4"}, {"lora.layers", "last:3"}});
                session(m, name + ", LoRA last 3, schedule that skips",
                        {{"policy", "random:0"}, {"lora.layers", "last:3"}});
                session(m, name + ", LoRA last 3, gate that skips",
                        {{"policy", "threshold:loss:1000"}, {"lora.layers", "last:3"}});
                session(m, name + ", TTT-Linear, policy always",
                        {{"adapter", "ttt-linear"}, {"policy", "always"}});
            }
        }
        if (wanted("generate"))
            for (const auto &[name, m] :
                 {std::pair("GPT-2 124M", model), {"code-10m's shape", load(small)}})
                for (const char *adapter : {"none", "lora", "ttt-linear"}) {
                    generate(m, name, 1, 512, adapter);
                    generate(m, name, 16, 64, adapter);
                }
        if (wanted("train"))
            train(model, "train GPT-2 124M, B=32 T=1024", 32, 1024, 13);
        if (wanted("train10m"))
            train(load(small), "train code-10m's shape, B=128 T=1024", 128, 1024, 13);
    } catch (const std::exception &e) {
        std::fprintf(stderr, "cuda_bench: %s\n", e.what());
        return 1;
    }
    if (!json.empty())
        if (FILE *file = std::fopen(json.c_str(), "w")) {
            std::fprintf(file, "[");
            for (size_t i = 0; i < lines.size(); ++i)
                std::fprintf(file,
                             "%s\n {\"name\": \"%s\", \"alone_ms\": %.4f, \"queued_ms\": %.4f, "
                             "\"flops\": %.6g, \"tokens\": %.0f, \"floor_ms\": %.4f}",
                             i ? "," : "", lines[i].name.c_str(), lines[i].alone_ms,
                             lines[i].queued_ms, lines[i].flops, lines[i].tokens,
                             lines[i].floor_ms);
            std::fprintf(file, "\n]\n");
            std::fclose(file);
        }
    return 0;
}
