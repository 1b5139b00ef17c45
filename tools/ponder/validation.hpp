// How well what is trained does on packages that it does not learn from.
#pragma once

#include "setup.hpp"
#include "terminal.hpp"
#include "train_log.hpp"
#include "training_data.hpp"

#include <optional>
#include <string>

namespace tool {

class Validator {
public:
    // Reads the first `valid_chunks` whole chunks of every package; `folder` is for the exports
    // that are measured.
    Validator(ponder_runtime *runtime, const ponder_model *model, const Settings &settings,
              const DataSplit &split, std::string folder);
    ~Validator(); // removes the folder

    // Mean chunk loss of sessions with what the trainer would export now, as `ponder eval` counts
    // it. Nothing: SIGINT came first.
    std::optional<Validation> measure(const ponder_trainer *trainer, Progress &progress) const;

private:
    ponder_runtime *runtime_;
    const ponder_model *model_;
    const Settings &settings_;
    const DataSplit &split_;
    std::string folder_;
};

} // namespace tool
