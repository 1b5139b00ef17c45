#include "policy/gate_net.hpp"

#include <algorithm>
#include <cmath>

namespace ponder {

namespace {

constexpr double norm_epsilon = 1e-6; // PonderTTT's

} // namespace

size_t GateNet::Part::count() const {
    size_t n = 1;
    for (size_t dim : shape)
        n *= dim;
    return n;
}

GateNet::GateNet(size_t inputs, size_t hidden, size_t outputs)
    : inputs_(inputs), hidden_(hidden), outputs_(outputs) {
    size_t offset = 0;
    const auto add = [&](const char *name, std::vector<size_t> shape) {
        parts_.push_back({name, std::move(shape), offset});
        offset += parts_.back().count();
    };
    add("input_norm.scale", {inputs});
    add("input_norm.bias", {inputs});
    add("fc1.kernel", {inputs, hidden});
    add("fc1.bias", {hidden});
    add("fc2.kernel", {hidden, hidden});
    add("fc2.bias", {hidden});
    add("head.kernel", {hidden, outputs});
    add("head.bias", {outputs});
    parameters_.assign(offset, 0.0);
    std::fill_n(parameters_.begin(), inputs, 1.0);
}

void GateNet::draw(Random &random) {
    for (size_t part : {fc1, fc2, head}) {
        const double bound =
            std::sqrt(6 / double(parts_[part].shape[0])) * (part == head ? 0.1 : 1);
        for (size_t i = 0; i < parts_[part].count(); ++i)
            parameters_[parts_[part].offset + i] = bound * (2 * random.uniform() - 1);
    }
}

void GateNet::clear_head() {
    std::fill_n(parameters_.begin() + std::ptrdiff_t(parts_[head].offset), parts_[head].count(),
                0.0);
}

std::vector<double> GateNet::affine(std::span<const double> x, size_t kernel, size_t out) const {
    std::vector<double> y(at(kernel + 1), at(kernel + 1) + out);
    const double *w = at(kernel);
    for (size_t i = 0; i < x.size(); ++i)
        for (size_t j = 0; j < out; ++j)
            y[j] += x[i] * w[i * out + j];
    return y;
}

std::vector<double> GateNet::affine_vjp(std::span<const double> x, std::span<const double> dy,
                                        size_t kernel, std::span<double> gradient) const {
    const double *w = at(kernel);
    double *dw = gradient.data() + parts_[kernel].offset;
    double *db = gradient.data() + parts_[kernel + 1].offset;
    std::vector<double> dx(x.size());
    for (size_t j = 0; j < dy.size(); ++j)
        db[j] += dy[j];
    for (size_t i = 0; i < x.size(); ++i)
        for (size_t j = 0; j < dy.size(); ++j) {
            dw[i * dy.size() + j] += x[i] * dy[j];
            dx[i] += w[i * dy.size() + j] * dy[j];
        }
    return dx;
}

GateNet::Pass GateNet::forward(std::span<const double> x) const {
    Pass pass;
    double mean = 0, square = 0;
    for (double v : x)
        mean += v / double(inputs_);
    for (double v : x)
        square += (v - mean) * (v - mean) / double(inputs_);
    pass.deviation = std::sqrt(square + norm_epsilon);
    pass.normed.resize(inputs_);
    std::vector<double> scaled(inputs_);
    for (size_t i = 0; i < inputs_; ++i) {
        pass.normed[i] = (x[i] - mean) / pass.deviation;
        scaled[i] = pass.normed[i] * at(norm_scale)[i] + at(norm_bias)[i];
    }
    const auto relu = [](std::vector<double> y) {
        for (double &v : y)
            v = std::max(v, 0.0);
        return y;
    };
    pass.first = relu(affine(scaled, fc1, hidden_));
    pass.second = relu(affine(pass.first, fc2, hidden_));
    pass.out = affine(pass.second, head, outputs_);
    return pass;
}

void GateNet::backward(const Pass &pass, std::span<const double> dout,
                       std::span<double> gradient) const {
    const auto through_relu = [](std::vector<double> dy, std::span<const double> y) {
        for (size_t i = 0; i < dy.size(); ++i)
            dy[i] = y[i] > 0 ? dy[i] : 0;
        return dy;
    };
    const std::vector<double> dsecond =
        through_relu(affine_vjp(pass.second, dout, head, gradient), pass.second);
    const std::vector<double> dfirst =
        through_relu(affine_vjp(pass.first, dsecond, fc2, gradient), pass.first);
    std::vector<double> scaled(inputs_);
    for (size_t i = 0; i < inputs_; ++i)
        scaled[i] = pass.normed[i] * at(norm_scale)[i] + at(norm_bias)[i];
    const std::vector<double> dscaled = affine_vjp(scaled, dfirst, fc1, gradient);
    for (size_t i = 0; i < inputs_; ++i) {
        gradient[parts_[norm_scale].offset + i] += dscaled[i] * pass.normed[i];
        gradient[parts_[norm_bias].offset + i] += dscaled[i];
    }
}

std::vector<double> softmax(std::span<const double> logits, double temperature) {
    const double top = *std::max_element(logits.begin(), logits.end());
    std::vector<double> p(logits.size());
    double sum = 0;
    for (size_t i = 0; i < p.size(); ++i)
        sum += p[i] = std::exp((logits[i] - top) / temperature);
    for (double &v : p)
        v /= sum;
    return p;
}

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

} // namespace ponder
