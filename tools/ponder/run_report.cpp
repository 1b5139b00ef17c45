// The result of `ponder run` as a table and as JSON.
#include "json_out.hpp"
#include "run_result.hpp"
#include "setup.hpp"
#include "table.hpp"
#include "terminal.hpp"
#include "text.hpp"

#include <algorithm>
#include <cstdio>

namespace tool {

RangeLoss range_loss(const RunResult &run, uint64_t first, uint64_t count) {
    double skip = 0, adapted = 0, predictions = 0;
    for (uint64_t i = first; i < first + count; ++i) {
        const ponder_record &r = run.chunks[i].record;
        skip += run.chunks[i].skip_loss * r.predictions; // NaN if one is missing
        adapted += r.loss_before * r.predictions;
        predictions += r.predictions;
    }
    return {first, count, skip / predictions, adapted / predictions};
}

RangeLoss compared(const RunResult &run) {
    return range_loss(run, 0, run.has_skip() ? run.skip.chunks : run.chunks.size());
}

std::vector<RangeLoss> ranges(const RunResult &run) {
    std::vector<RangeLoss> result;
    const uint64_t chunks = run.chunks.size(), parts = std::min<uint64_t>(chunks, 8);
    for (uint64_t i = 0; i < parts; ++i) {
        const uint64_t first = i * chunks / parts, end = (i + 1) * chunks / parts;
        result.push_back(range_loss(run, first, end - first));
    }
    return result;
}

namespace {

std::string plural(uint64_t count, const char *what) {
    return with_commas(count) + " " + what + (count == 1 ? "" : "s");
}

struct Colours {
    const char *good, *bad, *strong, *off;
};
Colours colours() {
    if (!stdout_has_colour())
        return {"", "", "", ""};
    return {"\033[34m", "\033[33m", "\033[1m", "\033[0m"}; // as on the page: blue, orange
}

std::string times_text(double gain) {
    const double ratio = std::exp(std::abs(gain));
    return ratio < 1.005 ? "the same"
                         : format("%.2f times %s", ratio, gain > 0 ? "lower" : "higher");
}

void print_summary(const RunResult &run) {
    const Totals &a = run.adapted, &s = run.skip;
    const RangeLoss both = compared(run);
    Table table(run.has_skip() ? "lrrl" : "lr");
    const auto row = [&](const char *name, const std::string &skip, const std::string &adapted,
                         const std::string &change) {
        if (run.has_skip())
            table.row({name, skip, adapted, change});
        else
            table.row({name, adapted});
    };
    const double gain = both.skip - both.adapted;
    row("", "SKIP", "adapted", "");
    row("loss (nats/token)", format("%.4f", both.skip), format("%.4f", both.adapted),
        format("%+.4f (%+.1f %%)", both.adapted - both.skip, -100 * gain / both.skip));
    row("perplexity", format("%.2f", std::exp(both.skip)), format("%.2f", std::exp(both.adapted)),
        times_text(gain));
    row("time", duration_text(s.seconds()), duration_text(a.seconds()),
        format("%.2f times SKIP", a.seconds() / s.seconds() * double(s.tokens) / double(a.tokens)));
    row("tokens/s", with_commas(uint64_t(s.tokens_per_second())),
        with_commas(uint64_t(a.tokens_per_second())), "");
    row("compute", flops_text(double(s.flops)), flops_text(double(a.flops)),
        format("%.2f times SKIP",
               double(a.flops) / double(a.tokens) * double(s.tokens) / double(s.flops)));
    const std::string text = table.text();
    const Colours c = colours();
    const std::string &gain_colour = gain >= 0 ? c.good : c.bad;
    size_t at = 0;
    for (int line = 0; at < text.size(); ++line) { // the loss line is what people look for
        const size_t end = text.find('\n', at);
        const bool strong = line == 1 && run.has_skip();
        std::printf("%s%s%s%s\n", strong ? c.strong : "", strong ? gain_colour.c_str() : "",
                    text.substr(at, end - at).c_str(), strong ? c.off : "");
        at = end + 1;
    }
}

void print_positions(const RunResult &run) {
    const std::vector<RangeLoss> parts = ranges(run);
    if (parts.size() < 2)
        return;
    double best = 1e-9;
    for (const RangeLoss &part : parts)
        best = std::max(best, std::abs(part.skip - part.adapted));
    Table table(run.has_skip() ? "rrrrl" : "rr");
    if (run.has_skip())
        table.row({"chunks", "SKIP", "adapted", "change", ""});
    else
        table.row({"chunks", "adapted"});
    const Colours c = colours();
    for (const RangeLoss &part : parts) {
        const uint64_t last = part.first + part.count - 1;
        const std::string name =
            part.count == 1
                ? format("%llu", (unsigned long long)last)
                : format("%llu-%llu", (unsigned long long)part.first, (unsigned long long)last);
        const std::string adapted = format("%.3f", part.adapted);
        const double gain = part.skip - part.adapted;
        if (run.has_skip() && std::isnan(gain))
            table.row({name, "-", adapted, "-"});
        else if (run.has_skip())
            table.row({name, format("%.3f", part.skip), adapted,
                       format("%+.3f", part.adapted - part.skip),
                       (gain >= 0 ? c.good : c.bad) + unicode_bar(std::abs(gain) / best, 24) +
                           (gain >= 0 ? "" : " worse") + c.off});
        else
            table.row({name, adapted});
    }
    std::printf("\nLoss by position in the stream\n%s", table.text().c_str());
}

} // namespace

void print_run_table(const RunResult &run) {
    const Totals &a = run.adapted;
    std::printf("%s: %s, %s in %s of %llu\n", run.method.c_str(), plural(run.files, "file").c_str(),
                plural(a.tokens, "token").c_str(), plural(a.chunks, "chunk").c_str(),
                (unsigned long long)run.chunk_tokens);
    std::printf("%s (%s), %s, context %s%s\n\n", run.model.backend, run.model.isa,
                types_text(run.model).c_str(), with_commas(run.context_tokens).c_str(),
                a.causal ? "" : ", NOT CAUSAL (analysis)");
    if (run.chunks.empty())
        return;
    print_summary(run);
    print_positions(run);
    std::printf("\nUpdates: %s of %s (%.0f %%), %s (cost %.2f a chunk)",
                with_commas(a.updates).c_str(), plural(a.chunks, "chunk").c_str(),
                100 * a.per_chunk(double(a.updates)), plural(a.steps, "step").c_str(),
                a.per_chunk(double(a.steps)));
    if (a.rollbacks)
        std::printf(", %s rolled back", with_commas(a.rollbacks).c_str());
    if (a.over_budget)
        std::printf(", %s over budget", with_commas(a.over_budget).c_str());
    std::printf("\n");
    if (run.has_skip() && run.skip.chunks < a.chunks)
        std::printf("SKIP has seen the first %s only; losses are compared on those.\n",
                    plural(run.skip.chunks, "chunk").c_str());
    if (run.has_skip() && run.context_tokens > run.chunk_tokens)
        std::printf("SKIP sees the same %s tokens of context: the gain comes on top of it.\n",
                    with_commas(run.context_tokens).c_str());
    if (run.files_left_out)
        std::printf("%s left out (binary, too large or unreadable).\n",
                    plural(run.files_left_out, "file").c_str());
}

namespace {

void pass_json(JsonWriter &json, const char *name, const Totals &t, double loss) {
    json.key(name).object();
    json.member("loss", loss).member("perplexity", std::exp(loss));
    json.member("chunks", t.chunks).member("tokens", t.tokens);
    json.member("predictions", t.predictions).member("flops", t.flops);
    json.member("seconds", t.seconds()).member("tokens_per_second", t.tokens_per_second());
    json.end();
}

void chunk_json(JsonWriter &json, const RunChunk &chunk) {
    const ponder_record &r = chunk.record;
    json.object(true).member("chunk", r.chunk).member("first_token", r.first_token);
    json.member("tokens", r.tokens).member("skip_loss", chunk.skip_loss);
    json.member("loss", r.loss_before).member("steps_wanted", int64_t(r.steps_wanted));
    json.member("steps", int64_t(r.steps)).member("gate_score", r.gate_score);
    json.member("gate_threshold", r.gate_threshold).member("update_norm", r.update_norm);
    json.member("updated", (r.flags & PONDER_RECORD_UPDATED) != 0);
    json.member("rolled_back", (r.flags & PONDER_RECORD_ROLLED_BACK) != 0);
    json.member("over_budget", (r.flags & PONDER_RECORD_OVER_BUDGET) != 0);
    json.member("flops", r.flops).member("score_ns", r.score_ns);
    json.member("decide_ns", r.decide_ns).member("learn_ns", r.learn_ns).end();
}

} // namespace

void print_run_json(const RunResult &run, const ponder_options *options) {
    const Totals &a = run.adapted;
    const RangeLoss both = compared(run);
    JsonWriter json;
    json.object().member("schema_version", 1).member("command", "run");
    json.member("method", run.method).member("backend", run.model.backend);
    json.member("isa", run.model.isa)
        .member("dtype", run.model.dtype)
        .member("weights", run.model.weights);
    json.member("model", run.model.hash).member("causal", a.causal);
    json.member("complete", !run.interrupted);
    json.member("files", run.files).member("files_left_out", run.files_left_out);
    json.member("bytes", run.bytes).member("chunk_tokens", run.chunk_tokens);
    json.member("context_tokens", run.context_tokens);
    pass_json(json, "adapted", a, a.token_loss());
    if (run.has_skip()) {
        pass_json(json, "skip", run.skip, run.skip.token_loss());
        const double gain = both.skip - both.adapted;
        json.key("gain").object().member("nats", gain);
        json.member("percent", 100 * gain / both.skip).member("chunks_compared", both.count).end();
        json.member("time_ratio", run.skip.tokens_per_second() / a.tokens_per_second());
    }
    json.member("updates", a.updates).member("steps", a.steps);
    json.member("update_rate", a.per_chunk(double(a.updates)));
    json.member("cost", a.per_chunk(double(a.steps))).member("rollbacks", a.rollbacks);
    json.member("over_budget", a.over_budget).member("peak_rss_bytes", peak_rss_bytes());
    json.key("by_position").array();
    for (const RangeLoss &part : ranges(run)) {
        json.object(true).member("first_chunk", part.first).member("chunks", part.count);
        json.member("skip_loss", part.skip).member("loss", part.adapted).end();
    }
    json.end().key("records").array();
    for (const RunChunk &chunk : run.chunks)
        chunk_json(json, chunk);
    json.end().key("options");
    options_json(json, options);
    json.end().print();
}

} // namespace tool
