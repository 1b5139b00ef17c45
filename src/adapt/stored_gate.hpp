// The gate's part of an adapter folder: tensors "gate.*" in ponder.safetensors, and in ponder.json
//
//   "gate": { "version": 1, "form": "steps", "features": "planned", "hidden": 64,
//             "value_unit": 0.03, "rule": 0.3 },
//   "calibration": { "version": 1, "target": 0.5, "front": 0.7, "front_slope": 0.4, "scale": 1.5,
//                    "scale_last": 0.5, "reference": 2.2, "offset": [0, 0, 0],
//                    "rates": [...], "thresholds": [...] }
#pragma once

#include "base/json.hpp"
#include "formats/safetensors.hpp"
#include "policy/gate.hpp"

namespace ponder {

// nullptr if the folder has none. `file` stands for ponder.json in messages.
std::shared_ptr<const Gate> read_gate(const json::Value &root, const std::string &file,
                                      const SafeTensors &tensors);

// Writes the adapter in `from` with this gate into `folder`, which may be the same; sessions with
// it use policy `adapter` unless they are given another. Two files, each replaced atomically.
void save_gate(const std::string &from, const std::string &folder, const Gate &gate);
// Replaces ponder.json's calibration: atomic.
void save_calibration(const std::string &folder, const Calibration &calibration);

} // namespace ponder
