#include "adapt/stored.hpp"

#include "adapt/lora.hpp"
#include "adapt/stored_gate.hpp"
#include "adapt/ttt.hpp"
#include "base/error.hpp"
#include "base/hash.hpp"
#include "base/json.hpp"
#include "base/options.hpp"

#include <cmath>

namespace ponder {

namespace {

const std::string &text_field(const json::Value &object, const char *key, const std::string &file) {
    const json::Value *value = object.find(key);
    if (!value || value->type != json::Type::string)
        throw_error(PONDER_E_FORMAT, "%s: '%s' is missing or no string", file.c_str(), key);
    return value->string;
}

std::vector<int64_t> dims(const Shape &shape) { return {shape.dim, shape.dim + shape.rank}; }

json::Value read_description(const std::string &folder) {
    const std::string file = folder + "/ponder.json";
    json::Value root = json::parse(read_file(file, 1 << 20), file);
    if (root.type != json::Type::object || text_field(root, "format", file) != "ponder-adapter")
        throw_error(PONDER_E_FORMAT, "%s: no ponder adapter", file.c_str());
    const json::Value *version = root.find("version");
    if (!version || version->type != json::Type::integer || version->integer != 1)
        throw_error(PONDER_E_UNSUPPORTED, "%s: 'version' is not 1", file.c_str());
    return root;
}

bool fixes_structure(std::string_view option) {
    return option.starts_with("lora.") || option.starts_with("ttt.");
}

// The session's options under those that the folder's description stores.
Options under(const json::Value &root, const std::string &file, const Options &session) {
    Options options = session;
    const json::Value *stored = root.find("options");
    if (!stored)
        return options;
    for (const auto &[name, value] : stored->members) {
        if (value.type != json::Type::string)
            throw_error(PONDER_E_FORMAT, "%s: option %s is no string", file.c_str(),
                        json::shown(name).c_str());
        if (name == "adapter" || name.starts_with("train.") || name.starts_with("model."))
            throw_error(PONDER_E_FORMAT, "%s: option %s cannot be stored", file.c_str(),
                        json::shown(name).c_str());
        if (fixes_structure(name) || !session.given(name))
            options.set_default(name, value.string);
    }
    return options;
}

} // namespace

Options with_stored_options(const Options &session) {
    const std::string &folder = session.text("adapter");
    if (is_built_in(folder))
        return session;
    const std::string file = folder + "/ponder.json";
    if (!file_exists(file))
        throw_error(PONDER_E_ARGUMENT,
                    "adapter '%.200s' is none of none, lora, ttt-linear, ttt-mlp, and no folder "
                    "with a ponder.json",
                    folder.c_str());
    return under(read_description(folder), file, session);
}

std::string adapter_stamp(const std::string &folder) {
    Hash hash;
    for (const char *name : {"/ponder.json", "/ponder.safetensors"})
        hash.add(read_file(folder + name, size_t(1) << 32));
    return hash.hex();
}

std::shared_ptr<Adapter> load_adapter(const std::string &folder, const Gpt2Config &config,
                                      const Options &session, const std::string &model_hash) {
    const std::string file = folder + "/ponder.json";
    const json::Value root = read_description(folder);
    const std::string &hash = text_field(root, "model", file);
    if (!model_hash.empty() && hash != model_hash)
        throw_error(PONDER_E_MISMATCH, "%s: 'model' is %.40s, the loaded backbone is %s",
                    file.c_str(), hash.c_str(), model_hash.c_str());
    const Options options = under(root, file, session);
    const std::string &kind = text_field(root, "kind", file);
    std::shared_ptr<Adapter> adapter;
    if (kind == "lora")
        adapter = std::make_shared<Lora>(config, options);
    else if (kind == "ttt-linear" || kind == "ttt-mlp")
        adapter = std::make_shared<Ttt>(config, options, kind == "ttt-mlp");
    else
        throw_error(PONDER_E_UNSUPPORTED, "%s: kind '%.40s'", file.c_str(), kind.c_str());

    const SafeTensors tensors = SafeTensors::open(folder + "/ponder.safetensors");
    std::vector<float> fast(adapter->fast_count());
    for (const FastTensor &tensor : adapter->fast_tensors())
        tensors.read("fast." + tensor.name, dims(tensor.shape), DType::f32,
                     fast.data() + tensor.offset);
    adapter->store_initial(std::move(fast));
    for (const auto &[name, slow] : adapter->slow())
        tensors.read("slow." + name, dims(slow.shape), DType::f32,
                     adapter->slow_values(name).data());
    if (tensors.find("rates.log_rate")) {
        Adapter::Rates rates{std::vector<float>(adapter->fast_tensors().size()),
                             std::vector<float>(adapter->groups())};
        tensors.read("rates.log_rate", {int64_t(rates.log_rate.size())}, DType::f32,
                     rates.log_rate.data());
        tensors.read("rates.decay", {int64_t(rates.decay.size())}, DType::f32, rates.decay.data());
        for (const auto *values : {&rates.log_rate, &rates.decay})
            for (float value : *values)
                if (!(std::abs(value) <= 80))
                    throw_error(PONDER_E_FORMAT, "%s/ponder.safetensors: rates.*: %g is no rate",
                                folder.c_str(), double(value));
        adapter->store_rates(std::move(rates));
    }
    adapter->store_gate(read_gate(root, file, tensors));
    return adapter;
}

std::string adapter_kind(const Options &options) {
    const std::string &name = options.text("adapter");
    if (is_built_in(name))
        return name;
    return text_field(read_description(name), "kind", name + "/ponder.json");
}

void save_adapter(const std::string &folder, const std::string &kind, const std::string &model_hash,
                  const Options &options, const Adapter &adapter, std::span<const float> fast) {
    SafeTensorsWriter writer;
    writer.metadata["format"] = "ponder-adapter";
    for (const FastTensor &tensor : adapter.fast_tensors())
        writer.add("fast." + tensor.name, DType::f32, dims(tensor.shape),
                   fast.data() + tensor.offset);
    for (const auto &[name, slow] : adapter.slow())
        writer.add("slow." + name, DType::f32, dims(slow.shape), slow.values.data());
    const Adapter::Rates &rates = adapter.rates();
    if (!rates.log_rate.empty()) {
        writer.add("rates.log_rate", DType::f32, {int64_t(rates.log_rate.size())},
                   rates.log_rate.data());
        writer.add("rates.decay", DType::f32, {int64_t(rates.decay.size())}, rates.decay.data());
    }
    std::string text = "{\n  \"format\": \"ponder-adapter\",\n  \"version\": 1,\n  \"kind\": " +
                       json::quote(kind) + ",\n  \"model\": " + json::quote(model_hash) +
                       ",\n  \"options\": {";
    const char *separator = "\n    ";
    for (const ponder_option_info &info : option_table()) {
        const std::string_view name = info.name;
        const bool stored = kind == "lora" ? name.starts_with("lora.") ||
                                                 name.starts_with("inner.") || name == "steps"
                                           : name.starts_with("ttt.");
        if (!stored)
            continue;
        text += separator + json::quote(name) + ": " + json::quote(options.text(name));
        separator = ",\n    ";
    }
    text += "\n  }\n}\n";
    replace_file(folder + "/ponder.safetensors", [&](const Sink &sink) { writer.write(sink); });
    replace_file(folder + "/ponder.json",
                 [&](const Sink &sink) { sink(text.data(), text.size()); });
}

} // namespace ponder
