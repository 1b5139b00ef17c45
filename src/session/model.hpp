// A loaded backbone with its tokenizer and device, and the passes recorded on it so far.
#pragma once

#include "adapt/adapter.hpp"
#include "formats/tokenizer.hpp"
#include "session/decode_pass.hpp"
#include "session/pass.hpp"
#include "session/runtime.hpp"

#include <map>
#include <mutex>

namespace ponder {

class Options;
class Model;

// An adapter on a model, with its recorded passes: shared by every session with these options.
class Adapted {
public:
    // stamp: tells contents of an adapter's folder apart; empty for built-in ones.
    Adapted(const Model &model, std::shared_ptr<const Adapter> adapter, std::string stamp = {});
    const Adapter &adapter() const { return *adapter_; }
    const std::string &stamp() const { return stamp_; }
    // Recorded at the first call for this shape; full-chunk shapes are kept, of others the newest
    // few. Any thread.
    std::shared_ptr<const Pass> pass(const PassShape &shape, bool keep) const;
    // For generating, with the adapter's layer after the backbone or without.
    const DecodePasses &decode_passes(bool with_layer) const {
        return with_layer ? decode_with_layer_ : decode_;
    }

private:
    static constexpr size_t kept_odd_shapes = 4;
    // What the device made of the adapter's slow parameters goes after the passes and before them.
    struct OnDevice {
        std::shared_ptr<const Device> device;
        const Adapter &adapter;
        ~OnDevice();
    };
    const Model &model_;
    std::shared_ptr<const Adapter> adapter_;
    std::string stamp_;
    OnDevice on_device_;
    mutable std::mutex mutex_;
    mutable std::map<PassShape, std::shared_ptr<const Pass>> kept_;
    mutable std::vector<std::shared_ptr<const Pass>> odd_; // newest last
    DecodePasses decode_, decode_with_layer_;
};

class Model {
public:
    Model(std::shared_ptr<const Runtime> runtime, const std::string &folder,
          const std::string &backend, const std::string &dtype,
          const std::function<void(uint64_t done, uint64_t total)> &progress,
          const std::string &weights = "auto");

    const Runtime &runtime() const { return *runtime_; }
    const Gpt2 &backbone() const { return *backbone_; }
    const Tokenizer *tokenizer() const { return tokenizer_.get(); }
    const std::shared_ptr<const Device> &device() const { return device_; }
    // Sessions with equal structural options share adapter and passes. They stay for later ones,
    // except those of a folder that was written again since, which go with their last session.
    std::shared_ptr<const Adapted> adapted(const Options &options) const;

private:
    struct AdaptedKey {
        std::string name, stamp, structure; // stamp: of a folder's content
        auto operator<=>(const AdaptedKey &) const = default;
    };
    void drop_outdated(const AdaptedKey &key) const;
    std::shared_ptr<const Runtime> runtime_;
    std::unique_ptr<const Gpt2> backbone_;
    std::unique_ptr<const Tokenizer> tokenizer_;
    mutable std::mutex mutex_;
    mutable std::map<AdaptedKey, std::shared_ptr<const Adapted>> adapted_;
    std::shared_ptr<const Device> device_; // before the weights go
};

} // namespace ponder
