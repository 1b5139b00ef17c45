#include "policy/gate.hpp"

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

std::vector<double> Gate::evaluate(std::span<const double> f) const {
    std::vector<double> out = net.forward(normalise(f)).out;
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
        const double worth = std::isinf(threshold) ? (i == 0 ? 1 : 0) : out[i] - threshold * steps;
        if (worth > most) {
            most = worth;
            best = gate_steps[i];
        }
    }
    return {best, score};
}

} // namespace ponder
