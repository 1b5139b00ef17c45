// A trained gate: features in, a score out, and the calibration that turns scores into decisions.
#pragma once

#include "policy/features.hpp"
#include "policy/gate_net.hpp"

#include <memory>
#include <string>

namespace ponder {

// binary: logits of skip and update. soft: logit of a scale in 0..1 on the update. steps: for each
// of gate_steps what K steps lower the loss of later chunks by, in units of value_unit.
enum class GateForm { binary, soft, steps };
constexpr int32_t gate_steps[] = {1, 2, 4};
constexpr size_t gate_step_count = 3;
size_t gate_outputs(GateForm form);

// Fitted on streams, without labels. A score above threshold(rate) spends about `rate` steps a
// chunk.
struct Calibration {
    struct Point {
        double rate, threshold; // rates rise, thresholds do not
    };
    std::vector<Point> points;
    double target = 0.5; // default operating point, steps a chunk
    // Added to the price of gate_steps[i] steps, for a target distribution over K.
    double offset[gate_step_count] = {};
    // Early steps serve every later chunk: where the stream's length is declared, a share of its
    // steps is spent at once, the more the further it is from what the backbone knows: front +
    // front_slope (mean loss - reference), within 0 and 1. The gate places the rest.
    double front = 0.7, front_slope = 0.4, reference = 2.2;
    // Fewer steps may be larger, and the last ones have to settle: a factor on every update that
    // goes from `scale` to `scale_last` as a declared stream's steps are spent. Others: their mean.
    double scale = 1.5, scale_last = 0.5;

    bool empty() const { return points.empty(); }
    // Linear between points; above the last rate everything passes.
    double threshold(double rate) const;
};

struct Gate {
    FeatureSet features = FeatureSet::planned;
    GateForm form = GateForm::steps;
    GateNet net{planned_feature_count, 64, gate_step_count};
    std::vector<double> mean, deviation; // of each feature
    double value_unit = 1;
    // What the network's outputs are added to: for every number of steps (update, scale) this times
    // the leading feature in its deviations. No layer norm is in its way: it means the same in a
    // stream that is like none the gate was trained on.
    double rule = 0;
    Calibration calibration;
    std::string hash; // of all of it; see seal()
    void seal();

    // Centred, scaled, cut at 5 deviations; what is not known is 0.
    std::vector<double> normalise(std::span<const double> features) const;
    // The network's outputs with the rule's, for normalised features.
    std::vector<double> with_rule(std::span<const double> z, std::vector<double> out) const;
    // The outputs for raw features; of the form `steps` in nats.
    std::vector<double> evaluate(std::span<const double> features) const;
    // The best K among 0 and gate_steps at a price of a step, and its score: value per step for
    // `steps`, else the (difference of) logits.
    struct Choice {
        int32_t steps; // -1: the session's
        double score;
    };
    Choice choose(std::span<const double> outputs, double threshold) const;
};

// Thresholds for the usual rates: at each, choosing among `outputs` (of many chunks) spends that
// many steps a chunk on average.
void fit_thresholds(const Gate &gate, std::span<const std::vector<double>> outputs,
                    Calibration &calibration);
// Mean steps a chunk of choosing at a threshold, and the share of chunks with 0 and each of
// gate_steps (K = -1 counts as one step).
struct Spending {
    double steps, share[1 + gate_step_count];
};
Spending spending(const Gate &gate, std::span<const std::vector<double>> outputs, double threshold);

class Policy;
// Follows the gate's scores at `target` steps a chunk; 0 = the calibration's target.
std::unique_ptr<Policy> make_gate_policy(std::shared_ptr<const Gate> gate, double target);

} // namespace ponder
