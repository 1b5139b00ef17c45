// A hard bound above every policy: a token bucket that gains `rate` steps with each chunk and holds
// at most `burst`. Whatever a policy wants, steps never exceed burst + rate x chunks.
#pragma once

#include "ponder/gate_rule.h"

#include <algorithm>

namespace ponder {

class Budget {
public:
    Budget(double rate, double burst) : rate_(rate), burst_(burst), left_(burst) {}
    bool off() const { return std::isinf(rate_); }
    // Once a chunk.
    int64_t grant(int64_t wanted) { return ponder_gate_spend(rate_, burst_, &left_, wanted); }
    double left() const { return off() ? rate_ : left_; }
    void set_left(double left) { left_ = std::clamp(left, 0.0, burst_); }

private:
    double rate_, burst_, left_;
};

} // namespace ponder
