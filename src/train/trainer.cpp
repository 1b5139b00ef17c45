#include "train/trainer.hpp"

#include "base/error.hpp"
#include "base/json.hpp"
#include "formats/safetensors.hpp"
#include "train/adapter_trainer.hpp"
#include "train/backbone_trainer.hpp"
#include "train/gate_trainer.hpp"

#include <limits>

namespace ponder {

namespace {

constexpr const char *format = "ponder-checkpoint", *version = "2";
constexpr size_t longest_note = size_t(64) << 10;

void expect(const SafeTensors &file, const char *key, const std::string &wanted) {
    const auto at = file.metadata().find(key);
    const char *found = at == file.metadata().end() ? "missing" : at->second.c_str();
    if (found != wanted)
        throw_error(PONDER_E_MISMATCH, "%s: '%s' is '%.60s', this trainer has '%.60s'",
                    file.name().c_str(), key, found, wanted.c_str());
}

// What a checkpoint says of the options: "\nNAME=VALUE" for each.
std::string options_text(const Options &options) {
    std::string text;
    for (const auto &[name, value] : options.computed_by())
        text += "\n" + name + "=" + value;
    return text;
}

void expect_options(const SafeTensors &file, const Options &wanted) {
    const auto at = file.metadata().find("options");
    const std::string found = at == file.metadata().end() ? "" : at->second;
    if (found == options_text(wanted))
        return;
    for (const auto &[name, value] : wanted.computed_by()) {
        const std::string front = "\n" + name + "=";
        const size_t begin = found.find(front);
        if (begin == found.npos)
            throw_error(PONDER_E_MISMATCH, "%s: says nothing of option '%s'", file.name().c_str(),
                        name.c_str());
        const size_t from = begin + front.size();
        const std::string other = found.substr(from, found.find('\n', from) - from);
        if (other != value)
            throw_error(PONDER_E_MISMATCH, "%s: option '%s' was %s, and is now %s",
                        file.name().c_str(), name.c_str(), json::shown(other).c_str(),
                        json::shown(value).c_str());
    }
    throw_error(PONDER_E_MISMATCH, "%s: has options that this trainer does not know",
                file.name().c_str());
}

} // namespace

void Trainer::save(const std::string &path, const std::string &note) const {
    if (note.size() > longest_note)
        throw_error(PONDER_E_ARGUMENT, "note: %zu bytes are more than %zu", note.size(),
                    longest_note);
    SafeTensorsWriter writer;
    writer.metadata = {{"format", format},
                       {"version", version},
                       {"kind", kind_},
                       {"model", model_->backbone().hash()},
                       {"options", options_text(options_)},
                       {"basis", basis_},
                       {"note", note}};
    write(writer);
    replace_file(path, [&](const Sink &sink) { writer.write(sink); });
}

void Trainer::load(const std::string &path) {
    const SafeTensors file = SafeTensors::open(path);
    expect(file, "format", format);
    expect(file, "version", version);
    expect(file, "kind", kind_);
    expect(file, "model", model_->backbone().hash());
    expect_options(file, options_);
    if (const auto at = file.metadata().find("basis");
        at == file.metadata().end() || at->second != basis_)
        throw_error(PONDER_E_MISMATCH, "%s: was made on another adapter", file.name().c_str());
    const auto note = file.metadata().find("note");
    std::string found = note == file.metadata().end() ? "" : note->second;
    read(file);
    note_ = std::move(found);
}

void check_streams(std::span<const ponder_stream> streams, int64_t vocabulary) {
    if (streams.empty())
        throw_error(PONDER_E_ARGUMENT, "no streams");
    for (size_t s = 0; s < streams.size(); ++s) {
        if (!streams[s].ids)
            throw_error(PONDER_E_ARGUMENT, "streams[%zu].ids is NULL", s);
        for (size_t i = 0; i < streams[s].count; ++i)
            if (streams[s].ids[i] < 0 || streams[s].ids[i] >= vocabulary)
                throw_error(PONDER_E_ARGUMENT, "streams[%zu].ids[%zu] = %d is not in 0..%d", s, i,
                            streams[s].ids[i], int(vocabulary - 1));
    }
}

ponder_train_record empty_record() {
    const double unknown = std::numeric_limits<double>::quiet_NaN();
    ponder_train_record r{};
    r.struct_size = sizeof r;
    r.loss_first = r.reconstruction = r.inner_rate = r.cost = r.temperature = unknown;
    return r;
}

std::unique_ptr<Trainer> make_trainer(std::shared_ptr<const Model> model, int32_t kind,
                                      const Options &options) {
    switch (kind) {
    case PONDER_TRAIN_ADAPTER:
        return std::make_unique<AdapterTrainer>(std::move(model), options);
    case PONDER_TRAIN_GATE:
        return std::make_unique<GateTrainer>(std::move(model), options);
    case PONDER_TRAIN_BACKBONE:
        return std::make_unique<BackboneTrainer>(std::move(model), options);
    default:
        throw_error(PONDER_E_ARGUMENT, "kind %d is none of the trainer kinds", int(kind));
    }
}

} // namespace ponder
