#include "setup.hpp"

#include "interrupt.hpp"
#include "terminal.hpp"
#include "text.hpp"

#include <filesystem>

#include <sys/resource.h>

namespace tool {

namespace fs = std::filesystem;

namespace {

void log_to_stderr(void *user_data, int32_t level, const char *message) {
    const bool quiet = *static_cast<const bool *>(user_data);
    if (level <= PONDER_LOG_WARNING)
        note(quiet, message);
}

// The reference kernels are there to compare with. Whoever did not ask for them should know.
void warn_if_slow(const ponder_runtime *runtime, const ponder_model_info &model,
                  const Settings &settings) {
    if (settings.backend != "auto" || std::string(model.backend) != "reference")
        return;
    std::string why = "no other backend was found";
    for (uint32_t i = 0; i < ponder_backend_count(runtime); ++i) {
        auto backend = sized<ponder_backend_info>();
        call(ponder_backend_get, runtime, i, &backend);
        if (!backend.available)
            why = std::string(backend.name) + ": " + backend.reason;
    }
    note(settings.quiet, "running on the slow reference kernels (" + why + ")");
}

} // namespace

int32_t stop_when_interrupted(void *, uint64_t, uint64_t) { return interrupted(); }

bool given(const Settings &settings, const std::string &name) {
    for (const auto &option : settings.options)
        if (option.first == name)
            return true;
    return false;
}

Runtime open_runtime(const Settings &settings) {
    auto options = sized<ponder_runtime_options>();
    options.threads = settings.threads;
    options.memory_limit = settings.memory_limit;
    options.backend_path = settings.backend_path.empty() ? nullptr : settings.backend_path.c_str();
    options.user_data = const_cast<bool *>(&settings.quiet);
    options.log = log_to_stderr;
    ponder_runtime *runtime = nullptr;
    call(ponder_runtime_create, &runtime, &options);
    return Runtime(runtime);
}

std::string model_folder(const Settings &settings) {
    if (!settings.model.empty())
        return settings.model;
    std::error_code ignored;
    const fs::path here = fs::read_symlink("/proc/self/exe", ignored).parent_path();
    const fs::path candidates[] = {here / "models/code-10m", here / PONDER_MODEL_FROM_BINDIR,
                                   PONDER_SOURCE_MODEL};
    for (const fs::path &folder : candidates)
        if (fs::exists(folder / "config.json", ignored))
            return folder.lexically_normal().string();
    throw Failure(exit_file, "no default model beside this tool (looked in " +
                                 candidates[0].string() + " and " +
                                 candidates[1].lexically_normal().string() +
                                 "); name one with --model");
}

std::string default_adapter(const Settings &settings) {
    if (!settings.model.empty() ||
        (settings.command != Command::run && settings.command != Command::generate &&
         settings.command != Command::info))
        return "";
    // Whoever shapes an adapter wants one of that shape.
    for (const auto &[name, value] : settings.options)
        if (name == "adapter" || name.rfind("lora.", 0) == 0 || name.rfind("ttt.", 0) == 0)
            return "";
    const fs::path folder = fs::path(model_folder(settings)) / "adapter";
    std::error_code ignored;
    return fs::exists(folder / "ponder.json", ignored) ? folder.string() : "";
}

Options make_options(const Settings &settings) {
    ponder_options *raw = nullptr;
    call(ponder_options_create, &raw);
    Options options(raw);
    const auto set = [&](const char *name, const std::string &value) {
        call(ponder_options_set, options.get(), name, value.c_str());
    };
    const bool trains = settings.command == Command::train;
    if (settings.command == Command::eval || trains) {
        set("guard.norm", "inf");
        set("budget.rate", "inf");
    }
    if (settings.command == Command::bench) {
        set("policy", "always"); // an update a chunk, also where the adapter has a gate
        if (!given(settings, "lora.layers"))
            set("lora.layers", "half");
    }
    if (const std::string adapter = default_adapter(settings); !adapter.empty())
        set("adapter", adapter);
    for (const auto &[name, value] : settings.options)
        set(name.c_str(), value);
    // These look at each chunk alone unless they are told otherwise.
    if ((settings.command == Command::eval || settings.command == Command::bench ||
         (trains && settings.train.kind != TrainKind::backbone)) &&
        !given(settings, "context"))
        set("context", value_of(options.get(), "chunk"));
    return options;
}

Options options_in_force(const Settings &settings) {
    const Options given = make_options(settings);
    ponder_options *resolved = nullptr;
    call(ponder_options_resolve, &resolved, static_cast<const ponder_options *>(given.get()));
    return Options(resolved);
}

void require_causal(const ponder_options *options) {
    if (const std::string policy = value_of(options, "policy"); policy.starts_with("oracle"))
        throw Failure(exit_usage, "policy '" + policy +
                                      "' reads what comes next: it is for `ponder eval`, which "
                                      "has whole streams");
}

void require_backend(const ponder_runtime *runtime, const Settings &settings) {
    std::string names;
    bool some_bf16 = false;
    for (uint32_t i = 0; i < ponder_backend_count(runtime); ++i) {
        auto backend = sized<ponder_backend_info>();
        call(ponder_backend_get, runtime, i, &backend);
        if (backend.available) {
            some_bf16 |= backend.bf16 != 0;
            names += (names.empty() ? "" : ", ") + std::string(backend.name);
        }
        if (settings.backend != backend.name)
            continue;
        if (!backend.available)
            throw Failure(exit_backend,
                          "backend '" + settings.backend + "' cannot be used: " + backend.reason);
        if (settings.dtype == "bf16" && !backend.bf16)
            throw Failure(exit_backend, "backend '" + settings.backend +
                                            "' has no bf16 on this machine; use --dtype f32");
        return;
    }
    if (settings.backend != "auto")
        throw Failure(exit_backend, "backend '" + settings.backend + "' was not found; there " +
                                        (names.empty() ? "is none" : "are: " + names) +
                                        " (see ponder backends)");
    if (settings.dtype == "bf16" && !some_bf16)
        throw Failure(exit_backend, "no backend here has bf16; use --dtype f32");
}

ponder_model_options model_options(const Settings &settings) {
    auto options = sized<ponder_model_options>();
    options.backend = settings.backend.c_str();
    options.dtype = settings.dtype.c_str();
    options.weights = settings.weights.c_str();
    return options;
}

Model load_model(ponder_runtime *runtime, const std::string &folder, const Settings &settings) {
    require_backend(runtime, settings);
    const ponder_model_options options = model_options(settings);
    auto limits = sized<ponder_call>();
    limits.progress = stop_when_interrupted;
    ponder_model *model = nullptr;
    call(ponder_model_load, &model, runtime, folder.c_str(), &options, &limits);
    Model loaded(model);
    warn_if_slow(runtime, info_of(model), settings);
    return loaded;
}

Session make_session(const ponder_model *model, const ponder_options *options) {
    ponder_session *session = nullptr;
    call(ponder_session_create, &session, model, options);
    return Session(session);
}

void options_json(JsonWriter &json, const ponder_options *options) {
    json.object();
    for (uint32_t i = 0; i < ponder_option_count(); ++i) {
        auto option = sized<ponder_option_info>();
        call(ponder_option_get, i, &option);
        json.member(option.name, value_of(options, option.name));
    }
    json.end();
}

std::string types_text(const ponder_model_info &model) {
    const std::string weights = model.weights;
    return model.dtype + std::string(weights == "int8" ? ", int8 weights" : "");
}

std::string method_text(const ponder_options *options) {
    std::string adapter = value_of(options, "adapter");
    if (const fs::path folder = adapter; folder.is_absolute()) // its end says enough
        adapter = (folder.parent_path().filename() / folder.filename()).string();
    const std::string policy = value_of(options, "policy");
    const std::string steps = value_of(options, "steps");
    if (adapter == "none")
        return "skip";
    if (policy == "skip" || steps == "1")
        return adapter + " " + policy;
    return adapter + " " + policy + ", " + steps + " steps";
}

uint64_t peak_rss_bytes() {
    rusage usage{};
    getrusage(RUSAGE_SELF, &usage);
    return uint64_t(usage.ru_maxrss) * 1024;
}

} // namespace tool
