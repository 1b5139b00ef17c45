// Speed of generating, and what cached keys cost in loss. One JSON object on standard output.
//     generate_bench speed [--threads N] [--dtype TYPE] [--weights KIND]
//         read bandwidth of memory in this run, then code-10m and a GPT-2 124M with random weights:
//         prefill, decode of one session and of 16 together. The read floor is bandwidth over the
//         bytes of the weights that a token needs.
//     generate_bench cache TEXT [CHUNKS [ADAPTER]]
//         mean loss of a chunk whose 512 tokens before were cached with the weights before the
//         update: kept, and computed again
#include "formats/gpt2_create.hpp"
#include "session/generate.hpp"
#include "session/session.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>

using namespace ponder;

namespace {

double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
}

std::shared_ptr<const Model> load(const std::string &folder, const std::string &dtype,
                                  uint32_t threads, const std::string &weights = "float") {
    auto runtime = std::make_shared<Runtime>();
    runtime->memory = std::make_shared<Memory>(0, nullptr, nullptr, nullptr);
    runtime->threads = std::make_shared<Threads>(threads);
    runtime->backends = load_backends(PONDER_TEST_BACKENDS, {});
    return std::make_shared<Model>(
        runtime, folder, "auto", dtype, [](uint64_t, uint64_t) {}, weights);
}

typedef uint64_t Lanes __attribute__((vector_size(32)));

__attribute__((target("avx2"))) uint64_t sum_of(const std::byte *from, size_t size) {
    const Lanes *at = reinterpret_cast<const Lanes *>(from);
    Lanes sums[8] = {};
    for (size_t i = 0; i < size / sizeof(Lanes); i += 8)
        for (size_t l = 0; l < 8; ++l)
            sums[l] += at[i + l];
    uint64_t all = 0;
    for (const Lanes &lanes : sums)
        for (int l = 0; l < 4; ++l)
            all += lanes[l];
    return all;
}

// Bytes a second that all threads together read of a buffer far larger than the caches, each thread
// its own part; the best of several sweeps.
double read_bandwidth(uint32_t threads) {
    constexpr size_t size = size_t(1) << 30;
    const size_t each = size / threads / 4096 * 4096;
    Buffer buffer(std::make_shared<Memory>(0, nullptr, nullptr, nullptr), size);
    std::memset(buffer.data(), 1, size);
    Threads pool(threads);
    double best = 0;
    std::atomic<uint64_t> sink{0};
    for (int sweep = 0; sweep < 8; ++sweep) {
        const double start = now();
        pool.run(threads,
                 [&](uint32_t i, uint32_t) { sink += sum_of(buffer.data() + i * each, each); });
        best = std::max(best, double(each * threads) / (now() - start));
    }
    return best;
}

Options options_for(const std::string &adapter) {
    Options options;
    options.set("adapter", adapter);
    options.set("policy", adapter == "none" ? "skip" : "always");
    return options;
}

std::vector<int32_t> some_tokens(size_t count, int64_t vocabulary) {
    Random random(5);
    std::vector<int32_t> ids(count);
    for (int32_t &id : ids)
        id = int32_t(random.next() % uint64_t(vocabulary));
    return ids;
}

struct Speed {
    double prefill, decode; // tokens a second, of all sessions
};

Speed measure(const std::shared_ptr<const Model> &model, const std::string &adapter, size_t streams,
              size_t prompt, uint64_t tokens, int repeats) {
    const int64_t vocabulary = model->backbone().config().vocabulary;
    std::vector<std::unique_ptr<Session>> sessions;
    std::vector<Session *> list;
    std::vector<Generation> wishes(streams);
    std::vector<CallGuard> guards;
    for (size_t i = 0; i < streams; ++i) {
        sessions.push_back(std::make_unique<Session>(model, options_for(adapter)));
        list.push_back(sessions.back().get());
        guards.emplace_back(list.back()->cancel_flag(), nullptr);
        wishes[i].max_tokens = tokens;
    }
    std::vector<double> prefill, decode;
    for (int repeat = 0; repeat <= repeats; ++repeat) {
        std::vector<ponder_generation_result> results(streams);
        for (size_t i = 0; i < streams; ++i) {
            wishes[i].prompt = some_tokens(prompt, vocabulary);
            wishes[i].prompt[0] = int32_t(repeat * 31 + int(i)); // nothing is cached
        }
        Session::generate(list, wishes, results, guards);
        double fill = 0, write = 0;
        for (const auto &r : results) {
            fill += double(r.prefill_ns) * 1e-9;
            write = std::max(write, double(r.decode_ns) * 1e-9);
        }
        if (repeat == 0)
            continue; // recording, packing
        prefill.push_back(double(prompt * streams) / fill);
        decode.push_back(double(tokens * streams) / write);
    }
    std::sort(prefill.begin(), prefill.end());
    std::sort(decode.begin(), decode.end());
    return {prefill[prefill.size() / 2], decode[decode.size() / 2]};
}

// Of the weights that each token needs: all but the positions' and, where they are no head, the
// tokens' embeddings.
double bytes_of_a_token(const Gpt2 &model) {
    const Gpt2Config &c = model.config();
    double bytes =
        double(model.bytes()) - double(c.context * c.width) * double(size_of(model.type()));
    if (!c.tied)
        bytes -= double(c.vocabulary * c.width) *
                 double(model.storage() == Storage::int8 ? 1 : size_of(model.type()));
    return bytes;
}

void speed(uint32_t threads, const std::string &dtype, const std::string &weights) {
    const auto folder = std::filesystem::temp_directory_path() / "ponder-generate-bench";
    std::filesystem::create_directories(folder);
    if (!std::filesystem::exists(folder / "model.safetensors")) {
        Gpt2Config config;
        config.layers = 12, config.width = 768, config.heads = 12, config.inner = 3072;
        config.context = 1024, config.vocabulary = 50257, config.tied = true;
        create_gpt2(folder.string(), config, 1);
    }
    const double bandwidth = read_bandwidth(threads);
    std::printf("{\"threads\": %u, \"dtype\": \"%s\", \"weights\": \"%s\", \"read_bandwidth\": "
                "%.3e, \"models\": [\n",
                threads, dtype.c_str(), weights.c_str(), bandwidth);
    const auto report = [&](const char *name, const std::shared_ptr<const Model> &model,
                            bool last) {
        const double bytes = bytes_of_a_token(model->backbone()), floor = bandwidth / bytes;
        const bool large = model->backbone().config().width > 512;
        std::printf("  {\"model\": \"%s\", \"bytes_a_token\": %.4e, \"floor_tokens_per_second\": "
                    "%.1f, \"runs\": [\n",
                    name, bytes, floor);
        struct Run {
            const char *adapter;
            size_t streams, prompt;
            uint64_t tokens;
        };
        const std::vector<Run> runs =
            large
                ? std::vector<Run>{{"none", 1, 512, 32}, {"lora", 1, 512, 32}, {"none", 16, 32, 16}}
                : std::vector<Run>{{"none", 1, 512, 256},
                                   {"lora", 1, 512, 256},
                                   {"ttt-linear", 1, 512, 256},
                                   {"none", 16, 64, 128},
                                   {"lora", 16, 64, 128}};
        for (size_t i = 0; i < runs.size(); ++i) {
            const Run &r = runs[i];
            const Speed s = measure(model, r.adapter, r.streams, r.prompt, r.tokens, 3);
            std::printf("    {\"adapter\": \"%s\", \"sessions\": %zu, \"prompt\": %zu, \"tokens\": "
                        "%llu, \"prefill_tokens_per_second\": %.0f, \"decode_tokens_per_second\": "
                        "%.1f, \"of_floor\": %.3f}%s\n",
                        r.adapter, r.streams, r.prompt, static_cast<unsigned long long>(r.tokens),
                        s.prefill, s.decode, s.decode / floor, i + 1 < runs.size() ? "," : "");
            std::fflush(stdout);
        }
        std::printf("  ]}%s\n", last ? "" : ",");
    };
    report("code-10m", load(PONDER_MODEL_CODE10M, dtype, threads, weights), false);
    report("gpt2-124m-random", load(folder.string(), dtype, threads, weights), true);
    std::printf("]}\n");
}

// Mean loss of the last `scored` tokens of the text, token by token on the session's cache.
double loss_of(Session &session, std::span<const int32_t> text, size_t scored, bool keep) {
    double sum = 0;
    const CallGuard guard(session.cancel_flag(), nullptr);
    for (size_t t = text.size() - scored; t < text.size(); ++t) {
        std::vector<Generation> wish(1);
        wish[0].prompt.assign(text.begin(), text.begin() + std::ptrdiff_t(t));
        wish[0].max_tokens = 1;
        wish[0].sampling.bias = {{text[t], 10000.0f}};
        wish[0].log_probabilities = true;
        // Once kept, the cache is of several weights until the end of this chunk.
        wish[0].keep_cache = keep;
        wish[0].token = [&](uint64_t, int32_t id, double log_p, std::string_view) {
            if (id >= 0) // else text that was held back
                sum -= log_p;
            return false;
        };
        std::vector<ponder_generation_result> result(1);
        Session *one = &session;
        Session::generate({&one, 1}, wish, result, {&guard, 1});
    }
    return sum / double(scored);
}

void cache(const std::string &path, size_t chunks, const std::string &adapter) {
    std::ifstream file(path, std::ios::binary);
    const std::string text{std::istreambuf_iterator<char>(file), {}};
    const auto model = load(PONDER_MODEL_CODE10M, "f32", 0);
    const std::vector<int32_t> ids = model->tokenizer()->encode(text);
    constexpr size_t chunk = 512;
    double kept = 0, again = 0, none = 0;
    Session session(model, options_for(adapter));
    const CallGuard guard(session.cancel_flag(), nullptr);
    size_t n = 0;
    for (; n < chunks && (n + 2) * chunk <= ids.size(); ++n) {
        const std::span<const int32_t> both = std::span(ids).subspan(n * chunk, 2 * chunk);
        // Cached with the weights of before, as an editor has it when the update comes.
        const auto keeps = session.fork();
        loss_of(*keeps, both.first(chunk), 1, false);
        for (Session *s : {&session, keeps.get()}) {
            s->feed(both.first(chunk));
            s->adapt(CallGuard(s->cancel_flag(), nullptr));
        }
        again += loss_of(session, both, chunk - 1, false);
        kept += loss_of(*keeps, both, chunk - 1, true);
        Session frozen(model, options_for("none"));
        none += loss_of(frozen, both, chunk - 1, false);
    }
    const double c = double(n);
    std::printf("{\"text\": \"%s\", \"adapter\": \"%s\", \"chunks\": %zu, \"recomputed\": %.4f, "
                "\"kept\": %.4f, \"difference\": %.4f, \"frozen\": %.4f}\n",
                std::filesystem::path(path).filename().c_str(), adapter.c_str(), n, again / c,
                kept / c, (kept - again) / c, none / c);
}

} // namespace

int main(int argc, char **argv) {
    const std::string part = argc > 1 ? argv[1] : "";
    if (part == "cache" && argc > 2) {
        cache(argv[2], argc > 3 ? size_t(std::atoi(argv[3])) : 16, argc > 4 ? argv[4] : "lora");
        return 0;
    }
    if (part != "speed") {
        std::fprintf(stderr,
                     "generate_bench speed [--threads N] [--dtype TYPE] [--weights KIND] | cache "
                     "TEXT ...\n");
        return 2;
    }
    uint32_t threads = 2;
    std::string dtype = "bf16", weights = "float";
    for (int i = 2; i + 1 < argc; i += 2) {
        if (!std::strcmp(argv[i], "--threads"))
            threads = uint32_t(std::atoi(argv[i + 1]));
        if (!std::strcmp(argv[i], "--dtype"))
            dtype = argv[i + 1];
        if (!std::strcmp(argv[i], "--weights"))
            weights = argv[i + 1];
    }
    speed(threads, dtype, weights);
    return 0;
}
