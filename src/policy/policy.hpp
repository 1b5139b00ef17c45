// Policies: signals in, number of inner steps out.
#pragma once

#include "base/random.hpp"
#include "policy/features.hpp"
#include "ponder/backend.h"
#include "ponder/ponder.h"

#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <vector>

namespace ponder {

enum class Signal { none, loss, entropy, reconstruction, gradient_norm, update_norm };

// What is known when a policy decides; NaN where nothing is.
struct Signals {
    double loss = std::numeric_limits<double>::quiet_NaN();
    double entropy = loss, reconstruction = loss, gradient_norm = loss, update_norm = loss;
    double of(Signal signal) const;
};

struct Situation {
    uint64_t chunk = 0;    // index in the stream
    uint64_t expected = 0; // chunks in the stream, 0 if unknown
    Signals signals;
    double budget_left = std::numeric_limits<double>::infinity(); // steps
};

struct Decision {
    bool update = false;
    bool calibrating = false;
    // What was compared, and with what; NaN: nothing was.
    double score = std::numeric_limits<double>::quiet_NaN();
    double threshold = std::numeric_limits<double>::quiet_NaN();
    int32_t steps = -1; // inner steps, -1 = the session's option
    double scale = 1;   // on the update
};

class Policy {
public:
    virtual ~Policy() = default;
    virtual Decision decide(const Situation &situation, Random &random) = 0;
    virtual Signal reads() const { return Signal::none; }
    virtual bool never() const { return false; }        // updates nothing, ever
    virtual bool needs_length() const { return false; } // of the stream, in chunks
    // A policy that observes is shown every scored chunk before it decides on it (layers that learn
    // inside: before it decides on the next one), and then what was done.
    virtual bool observes() const { return false; }
    virtual void observe(const Observation &) {}
    // The rows of probabilities that it looks at then.
    virtual std::vector<size_t> probability_rows(size_t) const { return {}; }
    virtual void learned(const ponder_record &) {}
    virtual std::vector<double> features(const Situation &) const { return {}; }
    // An oracle: decides after the session has tried each number of steps on what comes next.
    virtual bool looks_ahead() const { return false; }
    // `losses` of the coming chunks after 0 steps and after each of `steps`. Returns one of them.
    virtual int32_t choose(const Situation &, std::span<const int32_t>, std::span<const double>) {
        return 0;
    }
    virtual uint64_t horizon() const { return 0; }
    // Where a device can decide in this policy's place: its rule and state, but for what
    // ponder_gate has of the session. Returns whether it can; what became of the state comes back.
    virtual bool to_device(ponder_gate &) const { return false; }
    virtual void from_device(const ponder_gate &) {}
    // Everything that changes over a stream; false of values that are no state of this policy.
    virtual std::vector<double> state() const { return {}; }
    virtual bool set_state(const std::vector<double> &values) { return values.empty(); }
};

// Whether a policy of this text updates nothing, ever.
bool never_learns(const std::string &text);

// skip | always | every:N | first:P | random:P | threshold:SIGNAL:X | ema:SIGNAL:RATE |
// oracle:RATE. PONDER_E_ARGUMENT naming the part that is wrong. `adapter` is the session's to make.
std::unique_ptr<Policy> parse_policy(const std::string &text);

} // namespace ponder
