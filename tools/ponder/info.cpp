// `ponder info`: the memory plan, from headers alone; then the model as loaded.
#include "commands.hpp"
#include "common.hpp"
#include "json_out.hpp"
#include "setup.hpp"
#include "table.hpp"
#include "terminal.hpp"
#include "text.hpp"

#include <cstdio>

namespace tool {

namespace {

struct PlanRow {
    const char *name, *key;
    uint64_t ponder_memory_plan::*bytes;
    const char *what;
};
constexpr PlanRow plan_rows[] = {
    {"weights", "weights", &ponder_memory_plan::weights, "frozen, as stored"},
    {"packed weights", "packed_weights", &ponder_memory_plan::packed_weights,
     "the backend's copies for its products"},
    {"fast weights", "fast_weights", &ponder_memory_plan::fast_weights, "with their shadow"},
    {"optimizer", "optimizer", &ponder_memory_plan::optimizer, "gradients and moments"},
    {"activations", "activations", &ponder_memory_plan::activations, "arena of the largest pass"},
    {"workspace", "workspace", &ponder_memory_plan::workspace, "of all workers"},
    {"total", "total", &ponder_memory_plan::total, ""},
    {"to generate", "generation", &ponder_memory_plan::generation, "besides: keys, values, passes"},
};

void print_plan(const ponder_memory_plan &plan, const std::string &folder,
                const ponder_options *options) {
    std::printf("%s\n\nMemory plan (nothing is loaded yet)\n", valid_utf8(folder).c_str());
    Table table("lrl");
    for (const PlanRow &row : plan_rows)
        table.row({row.name, bytes_text(plan.*row.bytes), row.what});
    std::printf("%s\nA chunk of %s tokens, context %s\n", table.text().c_str(),
                value_of(options, "chunk").c_str(),
                value_of(options, "context") == "0" ? "full"
                                                    : value_of(options, "context").c_str());
    Table compute("lrl");
    compute.row({"score", flops_text(double(plan.flops_score)), "one forward pass"});
    compute.row({"a step adds", flops_text(double(plan.flops_step)),
                 plan.flops_score ? format("%.2f times the score",
                                           double(plan.flops_step) / double(plan.flops_score))
                                  : ""});
    std::printf("%s\nAdapter: %s, %s fast parameters\n", compute.text().c_str(),
                method_text(options).c_str(), with_commas(plan.fast_parameters).c_str());
}

void print_model(const ponder_model_info &m) {
    Table table("ll");
    table.row({"architecture", format("%s, %d layers, width %d, %d heads, inner %d", m.architecture,
                                      m.layers, m.width, m.heads, m.inner_width)});
    table.row({"parameters", with_commas(m.parameters)});
    table.row({"vocabulary",
               with_commas(uint64_t(m.vocabulary)) + (m.has_tokenizer ? "" : ", no tokenizer")});
    table.row({"context", with_commas(uint64_t(m.context)) + " tokens"});
    table.row({"runs on", format("%s (%s), %s", m.backend, m.isa, types_text(m).c_str())});
    table.row({"hash", m.hash});
    std::printf("\nModel\n%s", table.text().c_str());
}

// All of them, with a mark where they are not the default.
void print_options(const ponder_options *options) {
    Table table("lrl");
    for (uint32_t i = 0; i < ponder_option_count(); ++i) {
        auto option = sized<ponder_option_info>();
        call(ponder_option_get, i, &option);
        const std::string value = value_of(options, option.name);
        table.row({option.name, value, value == option.default_value ? "" : "(set)"});
    }
    std::printf("\nOptions in force\n%s", table.text().c_str());
}

void model_json(JsonWriter &json, const ponder_model_info &m) {
    json.key("model").object().member("architecture", m.architecture);
    json.member("layers", m.layers).member("width", m.width).member("heads", m.heads);
    json.member("inner_width", m.inner_width).member("vocabulary", m.vocabulary);
    json.member("context", m.context).member("parameters", m.parameters);
    json.member("dtype", m.dtype)
        .member("weights", m.weights)
        .member("backend", m.backend)
        .member("isa", m.isa);
    json.member("hash", m.hash).member("has_tokenizer", m.has_tokenizer != 0);
    json.member("end_of_text", m.end_of_text).end();
}

} // namespace

int info_command(const Settings &settings) {
    const Runtime runtime = open_runtime(settings);
    const Options options = options_in_force(settings);
    const std::string folder = model_folder(settings);
    require_backend(runtime.get(), settings);
    const ponder_model_options how = model_options(settings);
    auto plan = sized<ponder_memory_plan>();
    bool planned = true;
    try {
        call(ponder_plan_memory, runtime.get(), folder.c_str(), &how, options.get(), &plan);
    } catch (const Failure &failure) {
        // A backbone with fewer positions than a chunk has can be looked at all the same.
        if (failure.code != exit_usage || !settings.load)
            throw;
        note(settings.quiet, std::string("no memory plan: ") + failure.what());
        planned = false;
    }
    if (!settings.json) {
        if (planned)
            print_plan(plan, folder, options.get());
        std::fflush(stdout);
    }
    Model model;
    if (settings.load)
        model = load_model(runtime.get(), folder, settings);
    if (!settings.json) {
        if (model)
            print_model(info_of(model.get()));
        print_options(options.get());
        return exit_ok;
    }
    JsonWriter json;
    json.object().member("schema_version", 1).member("command", "info");
    json.member("path", folder).member("adapter", method_text(options.get()));
    if (model)
        model_json(json, info_of(model.get()));
    if (planned) {
        json.key("memory_plan").object();
        for (const PlanRow &row : plan_rows)
            json.member(row.key, plan.*row.bytes);
        json.member("fast_parameters", plan.fast_parameters);
        json.member("flops_score", plan.flops_score).member("flops_step", plan.flops_step).end();
    }
    json.key("options");
    options_json(json, options.get());
    json.end().print();
    return exit_ok;
}

} // namespace tool
