// Fits a gate's calibration on streams, without labels: thresholds for a range of rates, how much
// of a declared stream's steps come first, and how large updates are when there are fewer of them.
#pragma once

#include "session/session.hpp"

#include <optional>
#include <span>

namespace ponder {

struct CalibrationGoal {
    double target = 0;                          // steps a chunk; 0 = as stored
    std::optional<std::array<double, 4>> share; // of chunks with K = 0, 1, 2, 4, instead
    bool search = true;                         // front and scale too, by the streams' loss
    int rounds = 3;                             // scores depend on updates: measure, fit, repeat
};

// Runs the streams with the gate stored in the options' adapter folder, stores what was fitted
// there, and reports how it holds on `held`.
ponder_calibration calibrate(std::shared_ptr<const Model> model, const Options &options,
                             std::span<const ponder_stream> streams,
                             std::span<const ponder_stream> held, const CalibrationGoal &goal,
                             const CallGuard &guard);

} // namespace ponder
