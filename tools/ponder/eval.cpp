// `ponder eval`: package streams -> one number with its cost. Its contract is fixed: other
// measurements are compared with it.
#include "commands.hpp"
#include "common.hpp"
#include "interrupt.hpp"
#include "json_out.hpp"
#include "packages.hpp"
#include "setup.hpp"
#include "stepper.hpp"
#include "table.hpp"
#include "terminal.hpp"
#include "text.hpp"

#include <cstdio>

namespace tool {

namespace {

constexpr size_t position_width = 4; // chunks in a place of by_position

struct PackageResult {
    std::string name;
    uint64_t chunks;
    double loss;
};

struct Evaluation {
    Totals totals;
    std::vector<PackageResult> packages;
    std::vector<double> position_sum;
    std::vector<uint64_t> position_count;
    uint64_t packages_skipped = 0;
    bool complete = true;
};

std::string progress_line(const Totals &t, double share, const std::string &package) {
    return format("%s %3.0f %%  %s chunks  loss %.4f  %.0f tok/s  %s",
                  progress_bar(share, 16).c_str(), 100 * share, with_commas(t.chunks).c_str(),
                  t.chunk_loss(), t.tokens_per_second(), package.c_str());
}

Evaluation evaluate(const ponder_model *model, const ponder_options *options,
                    const Settings &settings) {
    const Session session = make_session(model, options);
    const CancelOnInterrupt cancel(session.get());
    const size_t chunk = info_of(session.get()).chunk_tokens;
    Packages packages(settings.stream, model, settings.max_chunks * chunk);
    Stepper stepper(session.get());
    // An oracle reads what comes next, so it gets the whole package at once.
    const bool looks_ahead = value_of(options, "policy").starts_with("oracle");
    Progress progress(settings.quiet);
    Evaluation result;

    std::string name;
    std::vector<int32_t> ids;
    while (!interrupted() && packages.next(name, ids)) {
        const uint64_t chunks = std::min<uint64_t>(ids.size() / chunk, settings.max_chunks);
        if (chunks < settings.min_chunks || chunks == 0) {
            ++result.packages_skipped;
            continue;
        }
        stepper.restart(chunks);
        if (looks_ahead)
            stepper.feed(std::span(ids).first(chunks * chunk));
        PackageResult package{name, 0, 0};
        for (uint64_t i = 0; i < chunks && !interrupted(); ++i) {
            const auto record = looks_ahead
                                    ? stepper.fed()
                                    : stepper.chunk(std::span(ids).subspan(i * chunk, chunk));
            if (!record)
                break;
            const size_t place = i / position_width;
            if (place >= result.position_sum.size()) {
                result.position_sum.push_back(0);
                result.position_count.push_back(0);
            }
            result.position_sum[place] += record->loss_before;
            result.position_count[place] += 1;
            package.loss += record->loss_before;
            package.chunks += 1;
            if (progress.due())
                progress.show(progress_line(stepper.totals(), packages.share(), name));
        }
        if (package.chunks == 0)
            break;
        package.loss /= double(package.chunks);
        result.packages.push_back(package);
    }
    result.totals = stepper.totals();
    result.complete = !interrupted();
    return result;
}

void print_json(const Evaluation &e, const ponder_model_info &model, const ponder_options *options,
                const Settings &settings) {
    const Totals &t = e.totals;
    JsonWriter json;
    json.object().member("schema_version", 1).member("command", "eval");
    json.member("method", method_text(options)).member("backend", model.backend);
    json.member("isa", model.isa)
        .member("dtype", model.dtype)
        .member("weights", model.weights)
        .member("model", model.hash);
    json.member("stream", settings.stream).member("causal", t.causal);
    json.member("complete", e.complete);
    json.member("chunks", t.chunks).member("predictions", t.predictions);
    json.member("loss", t.chunk_loss());
    json.member("updates", t.updates).member("steps", t.steps);
    json.member("update_rate", t.per_chunk(double(t.updates)));
    json.member("cost", t.per_chunk(double(t.steps)));
    json.member("rollbacks", t.rollbacks);
    json.member("flops", t.flops).member("seconds", t.seconds());
    json.member("tokens_per_second", t.tokens_per_second());
    json.member("peak_rss_bytes", peak_rss_bytes());
    json.key("by_position").array(true);
    for (size_t i = 0; i < e.position_sum.size(); ++i)
        json.value(e.position_sum[i] / double(e.position_count[i]));
    json.end().key("packages").array();
    for (const PackageResult &package : e.packages) {
        json.object(true).member("name", package.name).member("chunks", package.chunks);
        json.member("loss", package.loss).end();
    }
    json.end().member("packages_skipped", e.packages_skipped);
    json.key("options");
    options_json(json, options);
    json.end().print();
}

void print_table(const Evaluation &e, const ponder_model_info &model,
                 const ponder_options *options) {
    const Totals &t = e.totals;
    Table table("lr");
    table.row({"method", method_text(options)});
    table.row(
        {"backend", format("%s (%s), %s", model.backend, model.isa, types_text(model).c_str())});
    table.row({"loss", format("%.4f nats/token%s", t.chunk_loss(),
                              t.causal ? "" : "  (not causal: analysis)")});
    table.row({"chunks", with_commas(t.chunks)});
    table.row({"predictions", with_commas(t.predictions)});
    table.row({"updates", format("%s (%.0f %% of chunks)", with_commas(t.updates).c_str(),
                                 100 * t.per_chunk(double(t.updates)))});
    table.row({"cost", format("%.2f steps a chunk", t.per_chunk(double(t.steps)))});
    table.row({"compute", flops_text(double(t.flops))});
    table.row({"time", format("%s, %.0f tokens/s", duration_text(t.seconds()).c_str(),
                              t.tokens_per_second())});
    table.row({"peak memory", bytes_text(peak_rss_bytes())});
    std::printf("%s\n  loss by position in the package\n", table.text().c_str());
    Table positions("rrl");
    for (size_t i = 0; i < e.position_sum.size(); ++i) {
        const double loss = e.position_sum[i] / double(e.position_count[i]);
        positions.row({format("%zu-%zu", i * position_width, (i + 1) * position_width - 1),
                       format("%.3f", loss), unicode_bar(loss / 5, 30)});
    }
    std::printf("%s\n", positions.text(4).c_str());
    Table packages("lrr");
    packages.row({"package", "chunks", "loss"});
    for (const PackageResult &package : e.packages)
        packages.row({package.name, with_commas(package.chunks), format("%.4f", package.loss)});
    std::fputs(packages.text().c_str(), stdout);
}

} // namespace

int eval_command(const Settings &settings) {
    const Runtime runtime = open_runtime(settings);
    const Options options = options_in_force(settings);
    const Model model = load_model(runtime.get(), model_folder(settings), settings);
    const Evaluation result = evaluate(model.get(), options.get(), settings);
    if (!result.complete)
        note(settings.quiet, "interrupted; this is what was done so far");
    if (result.packages_skipped > 0)
        note(settings.quiet, format("%llu packages with fewer than %llu chunks were left out",
                                    (unsigned long long)result.packages_skipped,
                                    (unsigned long long)settings.min_chunks));
    if (result.complete && result.totals.chunks == 0)
        throw Failure(exit_file, settings.stream + ": no package has " +
                                     std::to_string(settings.min_chunks) + " chunks");
    const ponder_model_info info = info_of(model.get());
    if (settings.json)
        print_json(result, info, options.get(), settings);
    else
        print_table(result, info, options.get());
    return result.complete ? exit_ok : exit_interrupted;
}

} // namespace tool
