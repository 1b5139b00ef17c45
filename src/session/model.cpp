#include "session/model.hpp"

#include "adapt/stored.hpp"
#include "base/error.hpp"
#include "base/options.hpp"

namespace ponder {

const Backend &Runtime::backend(const std::string &name) const {
    for (const Backend &candidate : backends) {
        if (name != "auto" && candidate.name != name)
            continue;
        if (candidate.available())
            return candidate;
        if (name != "auto")
            throw_error(PONDER_E_NOT_FOUND, "backend '%s' is not available: %s", name.c_str(),
                        candidate.reason.c_str());
    }
    throw_error(PONDER_E_NOT_FOUND, "backend '%.80s' does not exist here", name.c_str());
}

DType parse_dtype(const std::string &name) {
    if (name == "f32")
        return DType::f32;
    if (name == "bf16")
        return DType::bf16;
    throw_error(PONDER_E_ARGUMENT, "dtype '%.40s' is none of f32, bf16", name.c_str());
}

void require_dtype(const Backend &backend, DType type) {
    if (!backend.descriptor->supports(int32_t(type)))
        throw_error(PONDER_E_UNSUPPORTED, "backend '%s' does not support dtype %s",
                    backend.name.c_str(), type == DType::bf16 ? "bf16" : "f32");
}

Storage choose_storage(const Backend &backend, const Gpt2Folder &folder,
                       const std::string &weights) {
    const bool has_int8 = backend.descriptor->supports(PONDER_DTYPE_I8) != 0;
    if (weights == "auto")
        return folder.int8() && has_int8 ? Storage::int8 : Storage::plain;
    if (weights == "float")
        return Storage::plain;
    if (weights != "int8")
        throw_error(PONDER_E_ARGUMENT, "weights '%.40s' is none of auto, int8, float",
                    weights.c_str());
    if (!has_int8)
        throw_error(PONDER_E_UNSUPPORTED, "backend '%s' has no int8 weights", backend.name.c_str());
    return Storage::int8;
}

Model::Model(std::shared_ptr<const Runtime> runtime, const std::string &folder,
             const std::string &backend_name, const std::string &dtype,
             const std::function<void(uint64_t, uint64_t)> &progress, const std::string &weights)
    : runtime_(std::move(runtime)) {
    const Backend &backend = runtime_->backend(backend_name);
    const DType type = parse_dtype(dtype);
    require_dtype(backend, type);
    const Gpt2Folder source(folder);
    backbone_ = std::make_unique<Gpt2>(source, type, runtime_->memory, progress,
                                       choose_storage(backend, source, weights));
    tokenizer_ = Tokenizer::load(folder);
    device_ = std::make_shared<Device>(backend, runtime_->memory, runtime_->threads, runtime_->log);
}

std::shared_ptr<const Adapted> Model::adapted(const Options &options) const {
    const bool stored_or_drawn_once = options.text("adapter") != "lora";
    AdaptedKey key{options.text("adapter"), "", ""};
    if (!is_built_in(key.name))
        key.stamp = adapter_stamp(key.name); // a folder that was written again is another adapter
    for (const ponder_option_info &info : option_table()) {
        const std::string_view name = info.name;
        if (name.starts_with("lora.") || name.starts_with("ttt.") ||
            (stored_or_drawn_once && name == "seed"))
            key.structure += '\n' + options.text(name);
    }
    std::lock_guard lock(mutex_);
    drop_outdated(key);
    if (const auto at = adapted_.find(key); at != adapted_.end())
        return at->second;
    return adapted_[key] = std::make_shared<Adapted>(
               *this, make_adapter(backbone_->config(), options, backbone_->hash()), key.stamp);
}

// Those that a session has are found at a later call.
void Model::drop_outdated(const AdaptedKey &key) const {
    std::erase_if(adapted_, [&](const auto &entry) {
        const auto &[other, adapted] = entry;
        return other.name == key.name && other.stamp != key.stamp && adapted.use_count() == 1 &&
               (adapted->adapter().slow().empty() || device_->can_forget());
    });
}

Adapted::OnDevice::~OnDevice() {
    if (device->can_forget())
        for (const auto &[name, slow] : adapter.slow())
            device->forget(slow.values.data());
}

Adapted::Adapted(const Model &model, std::shared_ptr<const Adapter> adapter, std::string stamp)
    : model_(model), adapter_(std::move(adapter)),
      stamp_(std::move(stamp)), on_device_{model.device(), *adapter_},
      decode_(model.backbone(), *adapter_, model.device(), false),
      decode_with_layer_(model.backbone(), *adapter_, model.device(), true) {}

std::shared_ptr<const Pass> Adapted::pass(const PassShape &shape, bool keep) const {
    std::lock_guard lock(mutex_);
    if (const auto at = kept_.find(shape); at != kept_.end())
        return at->second;
    for (auto at = odd_.begin(); at != odd_.end(); ++at)
        if (auto pass = *at; pass->shape == shape) {
            if (keep) {
                kept_[shape] = pass;
                odd_.erase(at);
            }
            return pass;
        }
    auto pass = std::make_shared<Pass>(
        Pass{shape, record_pass(model_.backbone(), *adapter_, shape), nullptr});
    pass->program = std::make_unique<Program>(std::move(pass->recording.graph),
                                              pass->recording.segment_ends, model_.device());
    if (keep)
        kept_[shape] = pass;
    else
        odd_.push_back(pass);
    if (odd_.size() > kept_odd_shapes)
        odd_.erase(odd_.begin());
    return pass;
}

} // namespace ponder
