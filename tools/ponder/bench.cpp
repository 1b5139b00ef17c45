// `ponder bench`: SKIP and one update, by turns in one run, on made-up tokens. Ratios of one run
// hold where absolute times do not.
#include "commands.hpp"
#include "common.hpp"
#include "interrupt.hpp"
#include "json_out.hpp"
#include "setup.hpp"
#include "stepper.hpp"
#include "table.hpp"
#include "terminal.hpp"
#include "text.hpp"

#include <algorithm>
#include <cstdio>
#include <cstring>

namespace tool {

namespace {

// Any ids do: no kernel's time depends on which they are.
class TokenStream {
public:
    TokenStream(uint64_t seed, int32_t vocabulary)
        : state_(seed * 2 + 1), vocabulary_(uint64_t(vocabulary)) {}
    std::vector<int32_t> take(size_t count) {
        std::vector<int32_t> ids(count);
        for (int32_t &id : ids) {
            state_ = state_ * 6364136223846793005u + 1442695040888963407u;
            id = int32_t((state_ >> 33) % vocabulary_);
        }
        return ids;
    }

private:
    uint64_t state_, vocabulary_;
};

struct Timing {
    // Of a chunk, medians over the repeats. Overhead: what is neither score nor learn.
    double seconds = 0, flops = 0, score = 0, decide = 0, learn = 0, overhead = 0;
};

double median(std::vector<double> values) {
    if (values.empty())
        return NAN;
    std::sort(values.begin(), values.end());
    const size_t n = values.size();
    return (values[(n - 1) / 2] + values[n / 2]) / 2;
}

// One side of the comparison: a session and its times, one entry a repeat.
class Side {
public:
    Side(const ponder_model *model, const ponder_options *options)
        : session_(make_session(model, options)) {}

    bool repeat(const std::vector<int32_t> &ids, size_t chunk, bool count) {
        const CancelOnInterrupt cancel(session_.get());
        Stepper stepper(session_.get());
        stepper.restart(ids.size() / chunk);
        stepper.feed(ids);
        for (size_t at = 0; at < ids.size(); at += chunk)
            if (interrupted() || !stepper.fed())
                return false;
        if (!count)
            return true;
        const Totals &t = stepper.totals();
        const double chunks = double(t.chunks);
        seconds_.push_back(t.seconds() / chunks);
        score_.push_back(double(t.score_ns) * 1e-9 / chunks);
        decide_.push_back(double(t.decide_ns) * 1e-9 / chunks);
        learn_.push_back(double(t.learn_ns) * 1e-9 / chunks);
        overhead_.push_back(seconds_.back() - score_.back() - learn_.back());
        flops_ = double(t.flops) / chunks;
        return true;
    }
    Timing timing() const {
        return {median(seconds_), flops_,         median(score_),
                median(decide_),  median(learn_), median(overhead_)};
    }
    ponder_session *session() const { return session_.get(); }

private:
    Session session_;
    std::vector<double> seconds_, score_, decide_, learn_, overhead_;
    double flops_ = 0;
};

bool is_matrix_product(const char *op) {
    for (const char *name : {"linear", "lora_linear", "cross_entropy", "matmul"})
        if (std::strncmp(op, name, std::strlen(name)) == 0)
            return true;
    return false;
}

// Times by op: one profile a repeat, so that they come from the same minutes as the passes they
// are compared with; then the median of each entry.
class Profile {
public:
    void add(ponder_session *session) {
        std::vector<ponder_profile_entry> entries(256);
        for (ponder_profile_entry &entry : entries)
            entry = sized<ponder_profile_entry>();
        size_t count = 0;
        call(ponder_session_profile, session, uint32_t(2), entries.data(), entries.size(), &count);
        entries.resize(count);
        entries_ = std::move(entries);
        ns_.resize(entries_.size());
        for (size_t i = 0; i < entries_.size(); ++i)
            ns_[i].push_back(double(entries_[i].ns));
    }
    // Slowest first.
    std::vector<ponder_profile_entry> take() {
        for (size_t i = 0; i < entries_.size(); ++i)
            entries_[i].ns = uint64_t(median(ns_[i]));
        std::sort(entries_.begin(), entries_.end(),
                  [](const auto &a, const auto &b) { return a.ns > b.ns; });
        return std::move(entries_);
    }

private:
    std::vector<ponder_profile_entry> entries_; // the same calls every time
    std::vector<std::vector<double>> ns_;       // of each entry, by repeat
};

struct BenchResult {
    Timing skip, update;
    std::vector<ponder_profile_entry> profile;
    size_t chunk = 0;
    uint32_t repeats = 0;
    double matrix_rate = 0; // flop/s of the matrix products alone, from the profile
    bool complete = true;

    double rate(const Timing &t) const { return t.flops / t.seconds; }
    double tokens_per_second(const Timing &t) const { return double(chunk) / t.seconds; }
};

BenchResult measure(const ponder_model *model, const Settings &settings) {
    const Options update = options_in_force(settings), skip = make_options(settings);
    call(ponder_options_set, skip.get(), "adapter", "none");
    call(ponder_options_set, skip.get(), "policy", "skip");
    Side skip_side(model, skip.get()), update_side(model, update.get());
    BenchResult result;
    result.chunk = info_of(skip_side.session()).chunk_tokens;
    TokenStream stream(number_of(update.get(), "seed"), info_of(model).vocabulary);
    Progress progress(settings.quiet);
    Profile profile;

    const std::vector<int32_t> warm_up = stream.take(result.chunk * 2);
    result.complete = skip_side.repeat(warm_up, result.chunk, false) &&
                      update_side.repeat(warm_up, result.chunk, false);
    for (uint32_t r = 0; r < settings.bench_repeats && result.complete; ++r) {
        progress.show(format("repeat %u of %u", r + 1, settings.bench_repeats));
        const std::vector<int32_t> ids = stream.take(result.chunk * settings.bench_chunks);
        result.complete = skip_side.repeat(ids, result.chunk, true) &&
                          update_side.repeat(ids, result.chunk, true);
        result.repeats += result.complete;
        if (result.complete)
            profile.add(update_side.session());
    }
    result.skip = skip_side.timing();
    result.update = update_side.timing();
    result.profile = profile.take();
    double flops = 0, ns = 0;
    for (const ponder_profile_entry &entry : result.profile)
        if (is_matrix_product(entry.op))
            flops += double(entry.flops), ns += double(entry.ns);
    result.matrix_rate = ns > 0 ? flops / ns * 1e9 : NAN;
    return result;
}

void timing_json(JsonWriter &json, const char *name, const BenchResult &b, const Timing &t) {
    json.key(name).object().member("tokens_per_second", b.tokens_per_second(t));
    json.member("seconds_per_chunk", t.seconds).member("score_seconds", t.score);
    json.member("decide_seconds", t.decide).member("learn_seconds", t.learn);
    json.member("flops_per_chunk", t.flops).member("gflops_per_second", b.rate(t) * 1e-9);
    json.member("share_of_matrix_rate", b.rate(t) / b.matrix_rate);
    json.member("overhead_seconds", t.overhead).end();
}

void print_json(const BenchResult &b, const ponder_model_info &model, const std::string &method,
                const Settings &settings) {
    double total = 0;
    for (const ponder_profile_entry &entry : b.profile)
        total += double(entry.ns);
    JsonWriter json;
    json.object().member("schema_version", 1).member("command", "bench");
    json.member("method", method).member("backend", model.backend).member("isa", model.isa);
    json.member("dtype", model.dtype)
        .member("weights", model.weights)
        .member("threads", settings.threads);
    json.member("complete", b.complete).member("chunk", uint64_t(b.chunk));
    json.member("chunks", settings.bench_chunks).member("repeats", b.repeats);
    timing_json(json, "skip", b, b.skip);
    timing_json(json, "update", b, b.update);
    json.member("update_over_skip", b.update.seconds / b.skip.seconds);
    json.member("overhead_share_of_skip", b.update.overhead / b.skip.seconds);
    json.member("matrix_gflops_per_second", b.matrix_rate * 1e-9);
    json.key("profile").array();
    for (const ponder_profile_entry &e : b.profile) {
        json.object(true).member("op", e.op).member("where", e.where);
        json.member("backend", e.backend).member("calls", e.calls).member("ns", e.ns);
        json.member("flops", e.flops).member("share", double(e.ns) / total);
        json.member("gflops_per_second", double(e.flops) / double(e.ns)).end();
    }
    json.end().member("peak_rss_bytes", peak_rss_bytes()).end().print();
}

void print_table(const BenchResult &b, const ponder_model_info &model, const std::string &method) {
    std::printf("%s on %s (%s), %s: chunks of %zu tokens, median of %u repeats\n\n", method.c_str(),
                model.backend, model.isa, types_text(model).c_str(), b.chunk, b.repeats);
    Table table("lrrrrr");
    table.row({"", "tokens/s", "ms/chunk", "GFLOP/s", "of products", "overhead"});
    for (const auto &[name, t] : {std::pair("SKIP", b.skip), std::pair("update", b.update)})
        table.row({name, with_commas(uint64_t(b.tokens_per_second(t))),
                   format("%.2f", 1e3 * t.seconds), format("%.1f", b.rate(t) * 1e-9),
                   format("%.0f %%", 100 * b.rate(t) / b.matrix_rate),
                   format("%.2f %%", 100 * t.overhead / b.skip.seconds)});
    std::printf("%s\n", table.text().c_str());
    std::printf("  An update pass takes %.2f times SKIP.\n", b.update.seconds / b.skip.seconds);
    std::printf("  of products: of the rate that the matrix products alone reach, %.1f GFLOP/s\n"
                "  overhead: deciding, recording and the call, as a share of SKIP\n\n",
                b.matrix_rate * 1e-9);
    double total = 0;
    for (const ponder_profile_entry &entry : b.profile)
        total += double(entry.ns);
    Table ops("llrrrrl");
    ops.row({"op", "where", "calls", "ms", "share", "GFLOP/s", "backend"});
    for (const ponder_profile_entry &e : b.profile)
        ops.row({e.op, e.where, with_commas(e.calls), format("%.3f", double(e.ns) * 1e-6),
                 format("%.1f %%", 100 * double(e.ns) / total),
                 e.flops ? format("%.1f", double(e.flops) / double(e.ns)) : "", e.backend});
    std::printf("Each op timed apart\n%s", ops.text().c_str());
}

} // namespace

int bench_command(const Settings &settings) {
    const Runtime runtime = open_runtime(settings);
    const Options options = options_in_force(settings);
    const Model model = load_model(runtime.get(), model_folder(settings), settings);
    const BenchResult result = measure(model.get(), settings);
    if (!result.complete)
        note(settings.quiet, result.repeats ? "interrupted; this is what was done so far"
                                            : "interrupted before the first repeat was done");
    std::string method = method_text(options.get());
    if (value_of(options.get(), "adapter") == "lora")
        method += ", layers " + value_of(options.get(), "lora.layers");
    if (settings.json)
        print_json(result, info_of(model.get()), method, settings);
    else if (result.repeats > 0)
        print_table(result, info_of(model.get()), method);
    return result.complete ? exit_ok : exit_interrupted;
}

} // namespace tool
