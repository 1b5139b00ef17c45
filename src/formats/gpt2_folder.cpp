#include "formats/gpt2_folder.hpp"

#include "base/error.hpp"
#include "base/json.hpp"
#include "formats/int8_weights.hpp"

#include <algorithm>
#include <initializer_list>
#include <string_view>

namespace ponder {

namespace {

constexpr size_t config_bytes_limit = 4u << 20;
constexpr size_t index_bytes_limit = 64u << 20;
constexpr size_t index_entries_limit = 1u << 20;
constexpr size_t shards_limit = 4096;

// config.json as a set of optional fields. The defaults are those of GPT2Config in transformers.
class ConfigReader {
public:
    explicit ConfigReader(const std::string &path) : path_(path) {
        json::Limits limits;
        limits.bytes = config_bytes_limit;
        root_ = json::parse(read_file(path, limits.bytes), path, limits);
        if (root_.type != json::Type::object)
            throw_error(PONDER_E_FORMAT, "%s: is no JSON object", path.c_str());
    }

    // `names` are one field's spellings; where several are present they agree. A null is absent.
    int64_t integer(std::initializer_list<const char *> names, int64_t low, int64_t high,
                    int64_t otherwise) const {
        const json::Value *first = nullptr;
        for (const char *name : names) {
            const json::Value *value = present(name);
            if (!value)
                continue;
            if (value->type != json::Type::integer || value->integer < low || value->integer > high)
                throw_error(PONDER_E_FORMAT, "%s: %s (at offset %zu) is no integer in %lld .. %lld",
                            path_.c_str(), name, value->offset, static_cast<long long>(low),
                            static_cast<long long>(high));
            if (first && first->integer != value->integer)
                throw_error(PONDER_E_FORMAT, "%s: %s (at offset %zu) differs from %s (at %zu)",
                            path_.c_str(), name, value->offset, *names.begin(), first->offset);
            if (!first)
                first = value;
        }
        return first ? first->integer : otherwise;
    }

    double number(const char *name, double above, double high, double otherwise) const {
        const json::Value *value = present(name);
        if (!value)
            return otherwise;
        if ((value->type != json::Type::integer && value->type != json::Type::number) ||
            !(value->number > above && value->number <= high))
            throw_error(PONDER_E_FORMAT, "%s: %s (at offset %zu) is no number above %g up to %g",
                        path_.c_str(), name, value->offset, above, high);
        return value->number;
    }

    bool boolean(const char *name, bool otherwise) const {
        const json::Value *value = present(name);
        if (!value)
            return otherwise;
        if (value->type != json::Type::boolean)
            throw_error(PONDER_E_FORMAT, "%s: %s (at offset %zu) is neither true nor false",
                        path_.c_str(), name, value->offset);
        return value->boolean;
    }

    std::string string(const char *name, const char *otherwise) const {
        const json::Value *value = present(name);
        if (!value)
            return otherwise;
        if (value->type != json::Type::string)
            throw_error(PONDER_E_FORMAT, "%s: %s (at offset %zu) is no string", path_.c_str(), name,
                        value->offset);
        return value->string;
    }

    void require(const char *name, bool supported) const {
        if (supported)
            return;
        const json::Value *value = present(name);
        throw_error(PONDER_E_UNSUPPORTED,
                    "%s: %s (at offset %zu) has a value that is not supported", path_.c_str(), name,
                    value ? value->offset : 0);
    }

    const std::string &path() const { return path_; }
    const json::Value *present(const char *name) const {
        const json::Value *value = root_.find(name);
        return value && value->type != json::Type::null ? value : nullptr;
    }

private:
    std::string path_;
    json::Value root_;
};

constexpr const char *int8_method = "ponder-int8";

bool is_hash(const json::Value *value) {
    return value && value->type == json::Type::string && value->string.size() == 32 &&
           value->string.find_first_not_of("0123456789abcdef") == std::string::npos;
}

std::optional<Int8Origin> read_int8_origin(const ConfigReader &file) {
    const json::Value *value = file.present("quantization_config");
    if (!value)
        return std::nullopt;
    const json::Value *method = value->find("quant_method");
    file.require("quantization_config", value->type == json::Type::object && method &&
                                            method->type == json::Type::string &&
                                            method->string == int8_method);
    const json::Value *source = value->find("source"), *content = value->find("content");
    if (!is_hash(source) || !is_hash(content))
        throw_error(PONDER_E_FORMAT,
                    "%s: quantization_config (at offset %zu): source or content is no hash",
                    file.path().c_str(), value->offset);
    return Int8Origin{source->string, content->string};
}

struct NamePlace {
    std::string tensor; // as stored
    size_t shard;
};

bool starts_with_any(std::string_view text, std::initializer_list<std::string_view> prefixes) {
    return std::any_of(prefixes.begin(), prefixes.end(),
                       [&](std::string_view prefix) { return text.starts_with(prefix); });
}

std::string_view plain_name(std::string_view stored) {
    constexpr std::string_view prefix = "transformer.";
    return stored.starts_with(prefix) ? stored.substr(prefix.size()) : stored;
}

// Causal masks that old checkpoints store beside the weights: h.N.attn.bias, h.N.attn.masked_bias.
bool is_mask_buffer(std::string_view name) {
    if (!name.starts_with("h."))
        return false;
    size_t end = name.find_first_not_of("0123456789", 2);
    if (end == 2 || end == name.npos)
        return false;
    std::string_view rest = name.substr(end);
    return rest == ".attn.bias" || rest == ".attn.masked_bias";
}

// The index names each tensor's shard. Opens the shards and checks that names and contents agree
// in both directions, so that no tensor has two places.
std::vector<SafeTensors> open_indexed(const std::string &folder, const std::string &index_path) {
    json::Limits limits;
    limits.bytes = index_bytes_limit;
    limits.values = index_entries_limit;
    limits.depth = 4;
    json::Value index = json::parse(read_file(index_path, limits.bytes), index_path, limits);
    const json::Value *map = index.find("weight_map");
    if (!map || map->type != json::Type::object || map->members.empty())
        throw_error(PONDER_E_FORMAT, "%s: weight_map (at offset %zu) is no object with entries",
                    index_path.c_str(), map ? map->offset : 0);

    std::map<std::string, std::vector<const std::string *>> names_of; // by shard
    for (const auto &[tensor, shard] : map->members) {
        if (shard.type != json::Type::string)
            throw_error(PONDER_E_FORMAT, "%s: weight_map %s (at offset %zu) is no string",
                        index_path.c_str(), json::shown(tensor).c_str(), shard.offset);
        names_of[shard.string].push_back(&tensor);
        if (names_of.size() > shards_limit)
            throw_error(PONDER_E_FORMAT,
                        "%s: weight_map names more than %zu shards (at offset %zu)",
                        index_path.c_str(), shards_limit, shard.offset);
    }

    std::vector<SafeTensors> shards;
    for (const auto &[shard, names] : names_of) {
        std::string path = join_component(folder, shard, index_path + ": weight_map");
        if (!file_exists(path))
            throw_error(PONDER_E_NOT_FOUND, "%s: weight_map names %s, which is not there",
                        index_path.c_str(), shard.c_str());
        SafeTensors file = SafeTensors::open(path);
        for (const std::string *name : names)
            if (!file.find(*name))
                throw_error(PONDER_E_FORMAT, "%s: weight_map puts %s in %s, which lacks it",
                            index_path.c_str(), json::shown(*name).c_str(), shard.c_str());
        // Names are unique and all present, so equal numbers mean equal sets.
        if (file.tensors().size() != names.size())
            throw_error(PONDER_E_FORMAT, "%s: weight_map names %zu tensors of %s, which has %zu",
                        index_path.c_str(), names.size(), shard.c_str(), file.tensors().size());
        shards.push_back(std::move(file));
    }
    return shards;
}

} // namespace

Gpt2Config read_gpt2_config(const std::string &folder) {
    ConfigReader file(folder + "/config.json");
    file.require("model_type", file.string("model_type", "gpt2") == "gpt2");
    if (const json::Value *architectures = file.present("architectures")) {
        bool known = architectures->type == json::Type::array;
        for (const json::Value &item : architectures->items)
            known = known && item.type == json::Type::string &&
                    (item.string == "GPT2LMHeadModel" || item.string == "GPT2Model");
        file.require("architectures", known);
    } else if (!file.present("model_type")) {
        throw_error(PONDER_E_FORMAT, "%s/config.json: neither model_type nor architectures",
                    folder.c_str());
    }
    std::string activation = file.string("activation_function", "gelu_new");
    file.require("activation_function",
                 activation == "gelu_new" || activation == "gelu_pytorch_tanh");
    file.require("scale_attn_weights", file.boolean("scale_attn_weights", true));
    for (const char *variant : {"scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn",
                                "add_cross_attention", "is_encoder_decoder"})
        file.require(variant, !file.boolean(variant, false));
    file.require("rope_scaling", !file.present("rope_scaling"));
    read_int8_origin(file);

    Gpt2Config config;
    config.layers = file.integer({"n_layer", "num_hidden_layers"}, 1, 1024, 12);
    config.width = file.integer({"n_embd", "hidden_size"}, 1, 65536, 768);
    config.heads = file.integer({"n_head", "num_attention_heads"}, 1, 65536, 12);
    config.inner = file.integer({"n_inner"}, 1, int64_t(1) << 20, 4 * config.width);
    config.context = file.integer({"n_positions", "max_position_embeddings", "n_ctx"}, 1,
                                  int64_t(1) << 20, 1024);
    config.vocabulary = file.integer({"vocab_size"}, 1, int64_t(1) << 24, 50257);
    config.norm_epsilon = file.number("layer_norm_epsilon", 0, 1, 1e-5);
    config.tied = file.boolean("tie_word_embeddings", true);
    if (config.width % config.heads != 0)
        throw_error(PONDER_E_FORMAT, "%s/config.json: n_embd %lld is no multiple of n_head %lld",
                    folder.c_str(), static_cast<long long>(config.width),
                    static_cast<long long>(config.heads));
    return config;
}

std::string int8_config(const std::string &folder, const Int8Origin &origin) {
    const std::string path = folder + "/config.json";
    json::Value root = json::parse(read_file(path, config_bytes_limit), path);
    std::erase_if(root.members, [](const auto &m) { return m.first == "quantization_config"; });
    const auto text = [](const std::string &string) {
        json::Value value;
        value.type = json::Type::string;
        value.string = string;
        return value;
    };
    json::Value entry;
    entry.type = json::Type::object;
    entry.members = {{"quant_method", text(int8_method)},
                     {"source", text(origin.source)},
                     {"content", text(origin.content)}};
    root.members.emplace_back("quantization_config", std::move(entry));
    return json::text(root) + "\n";
}

std::vector<std::pair<std::string, std::vector<int64_t>>> gpt2_tensors(const Gpt2Config &config) {
    int64_t width = config.width, inner = config.inner;
    std::vector<std::pair<std::string, std::vector<int64_t>>> list;
    list.push_back({"wte.weight", {config.vocabulary, width}});
    list.push_back({"wpe.weight", {config.context, width}});
    for (int64_t layer = 0; layer < config.layers; ++layer) {
        std::string block = "h." + std::to_string(layer) + ".";
        list.push_back({block + "ln_1.weight", {width}});
        list.push_back({block + "ln_1.bias", {width}});
        list.push_back({block + "attn.c_attn.weight", {width, 3 * width}});
        list.push_back({block + "attn.c_attn.bias", {3 * width}});
        list.push_back({block + "attn.c_proj.weight", {width, width}});
        list.push_back({block + "attn.c_proj.bias", {width}});
        list.push_back({block + "ln_2.weight", {width}});
        list.push_back({block + "ln_2.bias", {width}});
        list.push_back({block + "mlp.c_fc.weight", {width, inner}});
        list.push_back({block + "mlp.c_fc.bias", {inner}});
        list.push_back({block + "mlp.c_proj.weight", {inner, width}});
        list.push_back({block + "mlp.c_proj.bias", {width}});
    }
    list.push_back({"ln_f.weight", {width}});
    list.push_back({"ln_f.bias", {width}});
    if (!config.tied)
        list.push_back({"lm_head.weight", {config.vocabulary, width}});
    return list;
}

Gpt2Folder::Gpt2Folder(const std::string &path)
    : path_(path), config_(read_gpt2_config(path)),
      int8_(read_int8_origin(ConfigReader(path + "/config.json"))),
      expected_(gpt2_tensors(config_)) {
    std::string single = path + "/model.safetensors";
    std::string index = path + "/model.safetensors.index.json";
    if (file_exists(single))
        shards_.push_back(SafeTensors::open(single));
    else if (file_exists(index))
        shards_ = open_indexed(path, index);
    else
        throw_error(PONDER_E_NOT_FOUND,
                    "%s: has neither model.safetensors nor model.safetensors.index.json",
                    path.c_str());

    std::map<std::string, NamePlace, std::less<>> stored; // by plain name
    for (size_t shard = 0; shard < shards_.size(); ++shard)
        for (const auto &[name, info] : shards_[shard].tensors()) {
            auto [entry, added] =
                stored.try_emplace(std::string(plain_name(name)), NamePlace{name, shard});
            if (!added)
                throw_error(PONDER_E_FORMAT, "%s: tensor %s is stored twice, also as %s",
                            shards_[shard].name().c_str(), json::shown(name).c_str(),
                            json::shown(entry->second.tensor).c_str());
        }

    const auto claim = [&](const std::string &name, const std::vector<int64_t> &shape,
                           std::initializer_list<std::string_view> types, const char *needed) {
        auto entry = stored.find(name);
        if (entry == stored.end())
            throw_error(PONDER_E_FORMAT, "%s: tensor \"%s\" of config.json is missing",
                        path.c_str(), name.c_str());
        const SafeTensors &shard = shards_[entry->second.shard];
        const TensorInfo *info = shard.find(entry->second.tensor);
        if (info->shape != shape)
            throw_error(PONDER_E_FORMAT, "%s: tensor \"%s\" has shape %s, config.json needs %s",
                        shard.name().c_str(), name.c_str(), shape_text(info->shape).c_str(),
                        shape_text(shape).c_str());
        if (std::find(types.begin(), types.end(), info->dtype) == types.end())
            throw_error(PONDER_E_UNSUPPORTED, "%s: tensor \"%s\" has dtype %s, %s",
                        shard.name().c_str(), name.c_str(), info->dtype.c_str(), needed);
        place_.emplace(name, std::pair(entry->second.shard, entry->second.tensor));
        stored.erase(entry);
    };
    for (const auto &[name, shape] : expected_)
        if (int8_ && is_int8_weight(name)) {
            claim(name, shape, {"I8"}, "config.json needs I8");
            claim(int8_scales_name(name), int8_scales_shape(name, shape), {"F32"},
                  "scales are F32");
        } else {
            claim(name, shape, {"F32", "BF16", "F16", "F64"}, "no float type");
        }
    // What is left may be another head or a mask; a leftover of the blocks themselves means that
    // config.json describes a different model.
    for (const auto &[name, place] : stored)
        if (starts_with_any(name, {"h.", "wte.", "wpe.", "ln_f."}) && !is_mask_buffer(name))
            throw_error(PONDER_E_FORMAT, "%s: tensor %s is not part of config.json's model",
                        shards_[place.shard].name().c_str(), json::shown(name).c_str());
}

const TensorInfo &Gpt2Folder::stored(const std::string &tensor, const SafeTensors *&file) const {
    auto place = place_.find(tensor);
    if (place == place_.end())
        throw_error(PONDER_E_INTERNAL, "%s: no tensor %s", path_.c_str(),
                    json::shown(tensor).c_str());
    file = &shards_[place->second.first];
    return *file->find(place->second.second);
}

void Gpt2Folder::read(const std::string &tensor, DType type, void *out) const {
    const SafeTensors *file;
    const TensorInfo &info = stored(tensor, file);
    file->read(info.name, info.shape, type, out);
}

void Gpt2Folder::read_rows(const std::string &tensor, int64_t first, int64_t count,
                           float *out) const {
    const SafeTensors *file;
    const TensorInfo &info = stored(tensor, file);
    const uint64_t width = uint64_t(info.shape[1]);
    file->read_part(info.name, info.shape, DType::f32, uint64_t(first) * width,
                    uint64_t(count) * width, out);
}

void Gpt2Folder::read_int8(const std::string &tensor, int8_t *q, float *scales) const {
    read(tensor, DType::i8, q);
    read(int8_scales_name(tensor), DType::f32, scales);
    const SafeTensors *file;
    const TensorInfo &info = stored(int8_scales_name(tensor), file);
    for (uint64_t i = 0; i < info.count(); ++i)
        if (!(scales[i] >= int8_smallest_scale))
            throw_error(PONDER_E_FORMAT, "%s: tensor %s: element %llu is below %g",
                        file->name().c_str(), json::shown(info.name).c_str(),
                        static_cast<unsigned long long>(i), double(int8_smallest_scale));
}

DType Gpt2Folder::stored_type(const std::string &tensor) const {
    const auto &[shard, name] = place_.at(tensor);
    const std::string &type = shards_[shard].find(name)->dtype;
    return type == "BF16" ? DType::bf16 : type == "F64" ? DType::f64 : DType::f32;
}

uint64_t Gpt2Folder::stored_bytes() const {
    uint64_t total = 0;
    for (const auto &[name, place] : place_) {
        const TensorInfo *info = shards_[place.first].find(place.second);
        total += info->end - info->begin;
    }
    return total;
}

} // namespace ponder
