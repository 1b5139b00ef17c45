// Outer loops: what a trainer is, whatever it trains. Checkpoints are written here once for all.
#pragma once

#include "base/options.hpp"
#include "session/session.hpp"
#include "train/peers.hpp"

#include <memory>
#include <span>
#include <string>

namespace ponder {

class SafeTensors;
class SafeTensorsWriter;

class Trainer {
public:
    Trainer(std::shared_ptr<const Model> model, const char *kind, const Options &options)
        : model_(std::move(model)), kind_(kind), options_(options),
          peers_(options, model_->backbone().hash().substr(0, 32) + options.hash().substr(0, 32)) {}
    virtual ~Trainer() = default;

    // On error nothing has changed.
    virtual ponder_train_record step(std::span<const ponder_stream> streams,
                                     const CallGuard &guard) = 0;
    virtual uint64_t steps() const = 0;
    // Writes what was trained into a folder that exists.
    virtual void export_to(const std::string &folder) const = 0;

    void save(const std::string &path, const std::string &note) const;
    void load(const std::string &path);
    const std::string &note() const { return note_; }

protected:
    // Everything that changes from step to step. What write() adds must live as long as the
    // trainer; read() checks all before it changes anything.
    virtual void write(SafeTensorsWriter &writer) const = 0;
    virtual void read(const SafeTensors &file) = 0;

    std::shared_ptr<const Model> model_;
    const char *kind_;
    const Options options_;
    Peers peers_;
    std::string basis_; // hash of an adapter that is gone by, and that is in no checkpoint

private:
    std::string note_;
};

// The streams' ids, checked against the vocabulary: PONDER_E_ARGUMENT naming stream and place.
void check_streams(std::span<const ponder_stream> streams, int64_t vocabulary);
// A record with NaN where nothing is known.
ponder_train_record empty_record();

std::unique_ptr<Trainer> make_trainer(std::shared_ptr<const Model> model, int32_t kind,
                                      const Options &options);

} // namespace ponder
