#include "adapt/peft.hpp"

#include "adapt/lora.hpp"
#include "adapt/stored.hpp"
#include "base/error.hpp"
#include "base/json.hpp"
#include "base/options.hpp"

#include <algorithm>
#include <cmath>
#include <deque>
#include <set>

namespace ponder {

namespace {

constexpr const char *config_name = "/adapter_config.json";
constexpr const char *tensors_name = "/adapter_model.safetensors";
constexpr std::string_view peft_prefix = "base_model.model.";

json::Value read_object(const std::string &file) {
    json::Value root = json::parse(read_file(file, 1 << 20), file);
    if (root.type != json::Type::object)
        throw_error(PONDER_E_FORMAT, "%s: no object", file.c_str());
    return root;
}

std::string text_of(const json::Value &object, const char *key) {
    const json::Value *value = object.find(key);
    return value && value->type == json::Type::string ? value->string : "";
}

// A, B of one linear: [in,r] and [r,out].
struct Pair {
    int64_t in = 0, out = 0;
    std::vector<float> a, b;
};
struct LoraPairs {
    int64_t rank = 0;
    std::map<std::pair<int64_t, std::string>, Pair> at; // by layer and module
};

// "h.N.MODULE" with a module that GPT-2 has.
bool parse_place(std::string_view name, int64_t &layer, std::string &module) {
    if (!name.starts_with("h."))
        return false;
    const size_t dot = name.find('.', 2);
    if (dot == name.npos || dot == 2 || dot > 8)
        return false;
    layer = 0;
    for (const char digit : name.substr(2, dot - 2)) {
        if (digit < '0' || digit > '9')
            return false;
        layer = 10 * layer + (digit - '0');
    }
    module = name.substr(dot + 1);
    for (int m = 0; m < modules_per_layer; ++m)
        if (module == module_name(Module(m)))
            return true;
    return false;
}

// One of the halves, checked against the other one's rank.
void take(LoraPairs &pairs, int64_t layer, const std::string &module, bool is_a, int64_t rank,
          int64_t other, std::vector<float> values, const SafeTensors &file,
          const std::string &name) {
    if (rank < 1 || (pairs.rank != 0 && pairs.rank != rank))
        throw_error(PONDER_E_UNSUPPORTED, "%s: tensor %s has rank %lld, others have %lld",
                    file.name().c_str(), json::shown(name).c_str(), static_cast<long long>(rank),
                    static_cast<long long>(pairs.rank));
    pairs.rank = rank;
    Pair &pair = pairs.at[{layer, module}];
    std::vector<float> &half = is_a ? pair.a : pair.b;
    if (!half.empty())
        throw_error(PONDER_E_FORMAT, "%s: tensor %s is there twice", file.name().c_str(),
                    json::shown(name).c_str());
    half = std::move(values);
    (is_a ? pair.in : pair.out) = other;
}

void check_complete(const LoraPairs &pairs, const SafeTensors &file) {
    if (pairs.at.empty())
        throw_error(PONDER_E_FORMAT, "%s: holds no pair of LoRA", file.name().c_str());
    for (const auto &[place, pair] : pairs.at)
        if (pair.a.empty() || pair.b.empty())
            throw_error(PONDER_E_FORMAT, "%s: layer %lld, %s: A or B is missing",
                        file.name().c_str(), static_cast<long long>(place.first),
                        place.second.c_str());
}

LoraPairs read_stored(const std::string &folder) {
    const std::string config = folder + "/ponder.json";
    const json::Value root = read_object(config);
    if (text_of(root, "format") != "ponder-adapter")
        throw_error(PONDER_E_FORMAT, "%s: no ponder adapter", config.c_str());
    if (text_of(root, "kind") != "lora")
        throw_error(PONDER_E_UNSUPPORTED, "%s: kind '%.40s' is not lora", config.c_str(),
                    text_of(root, "kind").c_str());
    const SafeTensors file = SafeTensors::open(folder + "/ponder.safetensors");
    LoraPairs pairs;
    for (const auto &[name, info] : file.tensors()) {
        std::string_view place = name;
        if (!place.starts_with("fast."))
            continue;
        place.remove_prefix(5);
        const bool is_a = place.ends_with(".lora_a");
        int64_t layer;
        std::string module;
        if ((!is_a && !place.ends_with(".lora_b")) || info.shape.size() != 3 ||
            !parse_place(place.substr(0, place.size() - 7), layer, module))
            throw_error(PONDER_E_FORMAT, "%s: tensor %s is none of LoRA's", file.name().c_str(),
                        json::shown(name).c_str());
        std::vector<float> values(info.count());
        file.read(name, info.shape, DType::f32, values.data());
        take(pairs, layer, module, is_a, info.shape[is_a ? 2 : 1], info.shape[is_a ? 1 : 2],
             std::move(values), file, name);
    }
    check_complete(pairs, file);
    return pairs;
}

// [rows,columns] -> [columns,rows]
std::vector<float> transposed(const std::vector<float> &values, int64_t rows, int64_t columns) {
    std::vector<float> result(values.size());
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j)
            result[size_t(j * rows + i)] = values[size_t(i * columns + j)];
    return result;
}

template <class List> std::string joined(const List &list, const char *between) {
    std::string text;
    for (const auto &item : list) {
        text += text.empty() ? "" : between;
        if constexpr (std::is_integral_v<std::decay_t<decltype(item)>>)
            text += std::to_string(item);
        else
            text += item;
    }
    return text;
}

struct Places {
    std::set<int64_t> layers;
    std::set<std::string> modules;
    explicit Places(const LoraPairs &pairs) {
        for (const auto &[place, pair] : pairs.at) {
            layers.insert(place.first);
            modules.insert(place.second);
        }
    }
};

std::string peft_config(const LoraPairs &pairs) {
    const Places places(pairs);
    std::vector<std::string> modules;
    for (const std::string &module : places.modules)
        modules.push_back(json::quote(module));
    const std::string rank = std::to_string(pairs.rank);
    return "{\n  \"peft_type\": \"LORA\",\n  \"task_type\": \"CAUSAL_LM\",\n"
           "  \"base_model_name_or_path\": null,\n  \"inference_mode\": true,\n"
           "  \"r\": " +
           rank + ",\n  \"lora_alpha\": " + rank +
           ",\n  \"lora_dropout\": 0.0,\n  \"bias\": \"none\",\n  \"fan_in_fan_out\": true,\n"
           "  \"use_rslora\": false,\n  \"use_dora\": false,\n  \"modules_to_save\": null,\n"
           "  \"rank_pattern\": {},\n  \"alpha_pattern\": {},\n"
           "  \"target_modules\": [" +
           joined(modules, ", ") + "],\n  \"layers_to_transform\": [" +
           joined(places.layers, ", ") + "]\n}\n";
}

// alpha / r, or alpha / sqrt(r). What else PEFT can do to a pair is refused.
double peft_scale(const std::string &file, int64_t rank) {
    const json::Value root = read_object(file);
    if (text_of(root, "peft_type") != "LORA")
        throw_error(PONDER_E_UNSUPPORTED, "%s: peft_type '%.40s' is not LORA", file.c_str(),
                    text_of(root, "peft_type").c_str());
    const auto is_on = [&](const char *key) {
        const json::Value *value = root.find(key);
        if (!value || value->type == json::Type::null)
            return false;
        return value->type == json::Type::boolean ? value->boolean
               : value->type == json::Type::string
                   ? !value->string.empty() && value->string != "none"
                   : !value->items.empty() || !value->members.empty();
    };
    for (const char *key : {"use_dora", "bias", "modules_to_save", "rank_pattern", "alpha_pattern",
                            "layer_replication", "lora_bias"})
        if (is_on(key))
            throw_error(PONDER_E_UNSUPPORTED, "%s: %s is set", file.c_str(), key);
    // These take something out of the base model when training begins: A and B belong to what is
    // left.
    if (const json::Value *init = root.find("init_lora_weights");
        init && init->type == json::Type::string)
        for (const char *way : {"pissa", "olora", "loftq", "corda"})
            if (init->string.starts_with(way))
                throw_error(PONDER_E_UNSUPPORTED,
                            "%s: init_lora_weights is %s: the pair is not for the base model",
                            file.c_str(), json::shown(init->string).c_str());
    const json::Value *r = root.find("r"), *alpha = root.find("lora_alpha");
    if (!r || r->type != json::Type::integer || r->integer != rank)
        throw_error(PONDER_E_FORMAT, "%s: r is not the tensors' rank %lld", file.c_str(),
                    static_cast<long long>(rank));
    if (!alpha || (alpha->type != json::Type::integer && alpha->type != json::Type::number))
        throw_error(PONDER_E_FORMAT, "%s: lora_alpha is missing or no number", file.c_str());
    return alpha->number / (is_on("use_rslora") ? std::sqrt(double(rank)) : double(rank));
}

LoraPairs read_peft(const std::string &folder) {
    const SafeTensors file = SafeTensors::open(folder + tensors_name);
    LoraPairs pairs;
    for (const auto &[name, info] : file.tensors()) {
        std::string_view place = name;
        for (const std::string_view front : {peft_prefix, std::string_view("transformer.")})
            if (place.starts_with(front))
                place.remove_prefix(front.size());
        constexpr std::string_view a = ".lora_A.weight", b = ".lora_B.weight";
        const bool is_a = place.ends_with(a);
        int64_t layer;
        std::string module;
        if ((!is_a && !place.ends_with(b)) || info.shape.size() != 2 ||
            !parse_place(place.substr(0, place.size() - a.size()), layer, module))
            throw_error(PONDER_E_UNSUPPORTED,
                        "%s: tensor %s is no LoRA matrix of one of GPT-2's linears",
                        file.name().c_str(), json::shown(name).c_str());
        std::vector<float> values(info.count());
        file.read(name, info.shape, DType::f32, values.data());
        take(pairs, layer, module, is_a, info.shape[is_a ? 0 : 1], info.shape[is_a ? 1 : 0],
             transposed(values, info.shape[0], info.shape[1]), file, name);
    }
    check_complete(pairs, file);
    const double scale = peft_scale(folder + config_name, pairs.rank);
    for (auto &[place, pair] : pairs.at)
        for (float &value : pair.b)
            value = float(scale * double(value));
    return pairs;
}

void copy_file(const std::string &name, const std::string &from, const std::string &to) {
    const std::string content = read_file(from + "/" + name, size_t(64) << 20);
    replace_file(to + "/" + name, [&](const Sink &sink) { sink(content.data(), content.size()); });
}

// W [in,out] += A [in,r] B [r,out]
void add_product(std::vector<float> &w, const Pair &pair, int64_t rank) {
    const auto out = size_t(pair.out);
    std::vector<double> row(out);
    for (size_t i = 0; i < size_t(pair.in); ++i) {
        std::copy_n(w.begin() + ptrdiff_t(i * out), out, row.begin());
        for (size_t k = 0; k < size_t(rank); ++k)
            for (size_t j = 0; j < out; ++j)
                row[j] += double(pair.a[i * size_t(rank) + k]) * pair.b[k * out + j];
        std::transform(row.begin(), row.end(), w.begin() + ptrdiff_t(i * out),
                       [](double value) { return float(value); });
    }
}

} // namespace

void adapter_to_peft(const std::string &adapter, const std::string &out) {
    const LoraPairs pairs = read_stored(adapter);
    std::deque<std::vector<float>> kept;
    SafeTensorsWriter writer;
    writer.metadata["format"] = "pt";
    for (const auto &[place, pair] : pairs.at) {
        const std::string name = std::string(peft_prefix) + "transformer.h." +
                                 std::to_string(place.first) + "." + place.second;
        kept.push_back(transposed(pair.a, pair.in, pairs.rank));
        writer.add(name + ".lora_A.weight", DType::f32, {pairs.rank, pair.in}, kept.back().data());
        kept.push_back(transposed(pair.b, pairs.rank, pair.out));
        writer.add(name + ".lora_B.weight", DType::f32, {pair.out, pairs.rank}, kept.back().data());
    }
    const std::string text = peft_config(pairs);
    make_folder(out);
    replace_file(out + tensors_name, [&](const Sink &sink) { writer.write(sink); });
    replace_file(out + config_name, [&](const Sink &sink) { sink(text.data(), text.size()); });
}

void adapter_from_peft(const Gpt2Config &config, const std::string &model_hash,
                       const std::string &peft, const std::string &out) {
    const LoraPairs pairs = read_peft(peft);
    const Places places(pairs);
    if (places.layers.size() * places.modules.size() != pairs.at.size())
        throw_error(PONDER_E_UNSUPPORTED, "%s: not the same linears in every adapted layer",
                    peft.c_str());
    if (*places.layers.rbegin() >= config.layers)
        throw_error(PONDER_E_MISMATCH, "%s: adapts layer %lld, the model has %lld", peft.c_str(),
                    static_cast<long long>(*places.layers.rbegin()),
                    static_cast<long long>(config.layers));
    Options options;
    options.set("adapter", "lora");
    options.set("lora.rank", std::to_string(pairs.rank));
    options.set("lora.layers", joined(places.layers, ","));
    options.set("lora.modules", joined(places.modules, ","));
    const Lora lora(config, options);
    std::vector<float> fast(lora.fast_count());
    for (const FastTensor &tensor : lora.fast_tensors()) {
        int64_t layer = 0;
        std::string module;
        parse_place(tensor.name.substr(0, tensor.name.size() - 7), layer, module);
        const Pair &pair = pairs.at.at({layer, module});
        const std::vector<float> &values = tensor.name.ends_with(".lora_a") ? pair.a : pair.b;
        if (values.size() != tensor.count())
            throw_error(PONDER_E_MISMATCH, "%s: %s: the model's linear has another size",
                        peft.c_str(), tensor.name.c_str());
        std::copy(values.begin(), values.end(), fast.begin() + ptrdiff_t(tensor.offset));
    }
    make_folder(out);
    save_adapter(out, "lora", model_hash, options, lora, fast);
}

void merge_adapter(const std::string &model, const std::string &adapter, const std::string &out) {
    const LoraPairs pairs = read_stored(adapter);
    const Gpt2Folder folder(model);
    if (folder.int8())
        throw_error(PONDER_E_UNSUPPORTED,
                    "%s: has int8 weights; merge into the plain model, then convert",
                    model.c_str());
    const auto no_progress = [](uint64_t, uint64_t) {};
    const auto memory = std::make_shared<Memory>(0, nullptr, nullptr, nullptr);
    const std::string hash = Gpt2(folder, DType::bf16, memory, no_progress).hash();
    const std::string made_for = text_of(read_object(adapter + "/ponder.json"), "model");
    if (made_for != hash)
        throw_error(PONDER_E_MISMATCH, "%s/ponder.json: 'model' is %.40s, the backbone is %s",
                    adapter.c_str(), made_for.c_str(), hash.c_str());
    for (const char *file : {"model.safetensors", "model.safetensors.index.json"}) // written last
        if (file_exists(out + "/" + file))
            throw_error(PONDER_E_STATE, "%s: holds weights already: %s", out.c_str(), file);
    std::set<std::pair<int64_t, std::string>> left;
    for (const auto &[place, pair] : pairs.at)
        left.insert(place);

    std::deque<std::vector<std::byte>> kept;
    SafeTensorsWriter writer;
    writer.metadata["format"] = "pt";
    for (const auto &[name, shape] : folder.tensors()) {
        size_t count = 1;
        for (const int64_t size : shape)
            count *= size_t(size);
        const DType type = folder.stored_type(name);
        int64_t layer;
        std::string module;
        std::vector<std::byte> &bytes = kept.emplace_back(count * size_of(type));
        const std::string_view linear =
            name.ends_with(".weight") ? std::string_view(name).substr(0, name.size() - 7) : "";
        const auto pair =
            parse_place(linear, layer, module) ? pairs.at.find({layer, module}) : pairs.at.end();
        if (pair == pairs.at.end()) {
            folder.read(name, type, bytes.data());
        } else {
            if (std::vector<int64_t>{pair->second.in, pair->second.out} != shape)
                throw_error(PONDER_E_MISMATCH, "%s: %s has another shape than the backbone's",
                            adapter.c_str(), name.c_str());
            std::vector<float> w(count);
            folder.read(name, DType::f32, w.data());
            add_product(w, pair->second, pairs.rank);
            for (size_t i = 0; i < count; ++i)
                if (type == DType::bf16)
                    reinterpret_cast<bf16 *>(bytes.data())[i] = to_bf16(w[i]);
                else if (type == DType::f64)
                    reinterpret_cast<double *>(bytes.data())[i] = double(w[i]);
                else
                    reinterpret_cast<float *>(bytes.data())[i] = w[i];
            left.erase(pair->first);
        }
        writer.add((name == "lm_head.weight" ? "" : "transformer.") + name, type, shape,
                   bytes.data());
    }
    if (!left.empty())
        throw_error(PONDER_E_MISMATCH, "%s: adapts layer %lld, which the backbone lacks",
                    adapter.c_str(), static_cast<long long>(left.begin()->first));
    make_folder(out);
    for (const char *name : {"tokenizer.json", "vocab.json", "merges.txt"})
        if (file_exists(model + "/" + name))
            copy_file(name, model, out);
    copy_file("config.json", model, out);
    replace_file(out + "/model.safetensors", [&](const Sink &sink) { writer.write(sink); });
}

} // namespace ponder
