#include "adapt/stored.hpp"

#include "adapt/lora.hpp"
#include "adapt/ttt.hpp"
#include "base/error.hpp"
#include "base/json.hpp"
#include "base/options.hpp"

namespace ponder {

namespace {

const std::string &text_field(const json::Value &object, const char *key, const std::string &file) {
    const json::Value *value = object.find(key);
    if (!value || value->type != json::Type::string)
        throw_error(PONDER_E_FORMAT, "%s: '%s' is missing or no string", file.c_str(), key);
    return value->string;
}

std::vector<int64_t> dims(const Shape &shape) { return {shape.dim, shape.dim + shape.rank}; }

} // namespace

std::shared_ptr<const Adapter> load_adapter(const std::string &folder, const Gpt2Config &config,
                                            const Options &session, const std::string &model_hash) {
    const std::string file = folder + "/ponder.json";
    const json::Value root = json::parse(read_file(file, 1 << 20), file);
    if (root.type != json::Type::object || text_field(root, "format", file) != "ponder-adapter")
        throw_error(PONDER_E_FORMAT, "%s: no ponder adapter", file.c_str());
    const json::Value *version = root.find("version");
    if (!version || version->type != json::Type::integer || version->integer != 1)
        throw_error(PONDER_E_UNSUPPORTED, "%s: 'version' is not 1", file.c_str());
    const std::string &hash = text_field(root, "model", file);
    if (!model_hash.empty() && hash != model_hash)
        throw_error(PONDER_E_MISMATCH, "%s: 'model' is %.40s, the loaded backbone is %s",
                    file.c_str(), hash.c_str(), model_hash.c_str());

    Options options = session;
    if (const json::Value *stored = root.find("options"))
        for (const auto &[name, value] : stored->members) {
            if (value.type != json::Type::string)
                throw_error(PONDER_E_FORMAT, "%s: option '%.80s' is no string", file.c_str(),
                            name.c_str());
            options.set(name, value.string);
        }
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
    for (const auto &[name, slow] : adapter->slow()) {
        std::vector<float> values(slow.values.size());
        tensors.read("slow." + name, dims(slow.shape), DType::f32, values.data());
        adapter->store_slow(name, std::move(values));
    }
    return adapter;
}

void save_adapter(const std::string &folder, const std::string &kind, const std::string &model_hash,
                  const Options &options, const std::vector<std::string> &structure,
                  const Adapter &adapter, std::span<const float> fast) {
    SafeTensorsWriter writer;
    writer.metadata["format"] = "ponder-adapter";
    for (const FastTensor &tensor : adapter.fast_tensors())
        writer.add("fast." + tensor.name, DType::f32, dims(tensor.shape),
                   fast.data() + tensor.offset);
    for (const auto &[name, slow] : adapter.slow())
        writer.add("slow." + name, DType::f32, dims(slow.shape), slow.values.data());
    std::string text = "{\n  \"format\": \"ponder-adapter\",\n  \"version\": 1,\n  \"kind\": " +
                       json::quote(kind) + ",\n  \"model\": " + json::quote(model_hash) +
                       ",\n  \"options\": {";
    for (size_t i = 0; i < structure.size(); ++i)
        text += (i ? ",\n    " : "\n    ") + json::quote(structure[i]) + ": " +
                json::quote(options.text(structure[i]));
    text += "\n  }\n}\n";
    replace_file(folder + "/ponder.safetensors", [&](const Sink &sink) { writer.write(sink); });
    replace_file(folder + "/ponder.json",
                 [&](const Sink &sink) { sink(text.data(), text.size()); });
}

} // namespace ponder
