#include "policy/gate.hpp"

#include "base/hash.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

namespace ponder {

size_t gate_outputs(GateForm form) {
    return form == GateForm::binary ? 2 : form == GateForm::soft ? 1 : gate_step_count;
}

double Calibration::threshold(double rate) const {
    if (points.empty())
        return 0;
    if (rate <= points.front().rate)
        return points.front().threshold;
    for (size_t i = 1; i < points.size(); ++i)
        if (rate <= points[i].rate) {
            const Point &a = points[i - 1], &b = points[i];
            const double share = (rate - a.rate) / std::max(b.rate - a.rate, 1e-12);
            return a.threshold + share * (b.threshold - a.threshold);
        }
    return -std::numeric_limits<double>::infinity();
}

std::vector<double> Gate::normalise(std::span<const double> f) const {
    std::vector<double> z(f.size());
    for (size_t i = 0; i < z.size(); ++i) {
        const double x = (f[i] - mean[i]) / deviation[i];
        z[i] = std::isfinite(x) ? std::clamp(x, -5.0, 5.0) : 0;
    }
    return z;
}

std::vector<double> Gate::with_rule(std::span<const double> z, std::vector<double> out) const {
    if (rule != 0)
        for (size_t i = form == GateForm::binary; i < out.size(); ++i)
            out[i] += rule * z[leading_feature(features)];
    return out;
}

std::vector<double> Gate::evaluate(std::span<const double> f) const {
    const std::vector<double> z = normalise(f);
    std::vector<double> out = with_rule(z, net.forward(z).out);
    if (form == GateForm::steps)
        for (double &v : out)
            v *= value_unit;
    return out;
}

Gate::Choice Gate::choose(std::span<const double> out, double threshold) const {
    if (form != GateForm::steps) {
        const double score = form == GateForm::binary ? out[1] - out[0] : out[0];
        return {score > threshold ? -1 : 0, score};
    }
    int32_t best = 0;
    double most = 0, score = -std::numeric_limits<double>::infinity();
    for (size_t i = 0; i < gate_step_count; ++i) {
        const double steps = gate_steps[i];
        score = std::max(score, out[i] / steps);
        // At no price at all one step a chunk is what calibration stands for.
        const double worth = std::isinf(threshold)
                                 ? (i == 0 ? 1 : 0)
                                 : out[i] - threshold * steps - calibration.offset[i];
        if (worth > most) {
            most = worth;
            best = gate_steps[i];
        }
    }
    return {best, score};
}

void Gate::seal() {
    Hash all;
    const auto add = [&](std::span<const double> values) {
        all.add(values.data(), values.size() * sizeof(double));
    };
    all.add_number(uint64_t(features));
    all.add_number(uint64_t(form));
    all.add_number(net.hidden());
    add(net.parameters());
    add(mean);
    add(deviation);
    for (const Calibration::Point &p : calibration.points)
        add(std::vector{p.rate, p.threshold});
    add(calibration.offset);
    add(std::vector{value_unit, rule, calibration.target, calibration.front,
                    calibration.front_slope, calibration.scale, calibration.scale_last,
                    calibration.reference});
    hash = all.hex();
}

Spending spending(const Gate &gate, std::span<const std::vector<double>> outputs,
                  double threshold) {
    Spending all{};
    for (const std::vector<double> &out : outputs) {
        const int32_t steps = std::abs(gate.choose(out, threshold).steps);
        all.steps += double(steps) / double(outputs.size());
        size_t i = 0;
        while (i < gate_step_count && steps >= gate_steps[i])
            ++i;
        all.share[i] += 1 / double(outputs.size());
    }
    return all;
}

void fit_thresholds(const Gate &gate, std::span<const std::vector<double>> outputs,
                    Calibration &calibration) {
    static constexpr double rates[] = {0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4,
                                       0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8,
                                       0.85, 0.9, 0.95, 1.0, 1.25, 1.5, 1.75, 2.0};
    calibration.points.clear();
    if (outputs.empty())
        return;
    double low = INFINITY, high = -INFINITY;
    for (const std::vector<double> &out : outputs) {
        const double score = gate.choose(out, 0).score;
        low = std::min(low, score);
        high = std::max(high, score);
    }
    const double width = std::max(high - low, 1e-9);
    for (const double rate : rates) {
        if (rate > 1 && gate.form != GateForm::steps)
            break;
        // Spending falls with the threshold.
        double below = low - 2 * width, above = high + width;
        for (int i = 0; i < 60; ++i) {
            const double middle = (below + above) / 2;
            (spending(gate, outputs, middle).steps > rate ? below : above) = middle;
        }
        if (!calibration.points.empty())
            above = std::min(above, calibration.points.back().threshold);
        calibration.points.push_back({rate, above});
    }
}

} // namespace ponder
