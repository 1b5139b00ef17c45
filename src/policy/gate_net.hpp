// The gate's network: layer norm, two hidden layers with ReLU, a linear head (PonderTTT's shape,
// arXiv 2601.00894). A few thousand parameters: computed on the host, in double.
#pragma once

#include "base/random.hpp"

#include <span>
#include <string>
#include <vector>

namespace ponder {

class GateNet {
public:
    GateNet(size_t inputs, size_t hidden, size_t outputs);
    // Weights uniform within sqrt(6 / in), biases 0: outputs start near zero where the head does.
    void draw(Random &random);
    // Outputs of a drawn network become 0.
    void clear_head();

    size_t inputs() const { return inputs_; }
    size_t hidden() const { return hidden_; }
    size_t outputs() const { return outputs_; }
    // All parameters in one vector; a kernel is [in, out].
    struct Part {
        std::string name; // "fc1.kernel"
        std::vector<size_t> shape;
        size_t offset;
        size_t count() const;
    };
    const std::vector<Part> &parts() const { return parts_; }
    std::span<double> parameters() { return parameters_; }
    std::span<const double> parameters() const { return parameters_; }

    // One input's pass, kept for the gradient.
    struct Pass {
        std::vector<double> normed, first, second, out; // first, second: after the ReLU
        double deviation = 1;
    };
    Pass forward(std::span<const double> x) const;
    // Adds d loss / d parameters to `gradient`, given d loss / d out.
    void backward(const Pass &pass, std::span<const double> dout, std::span<double> gradient) const;

private:
    enum : size_t { norm_scale, norm_bias, fc1, fc1_bias, fc2, fc2_bias, head, head_bias };
    const double *at(size_t part) const { return parameters_.data() + parts_[part].offset; }
    std::vector<double> affine(std::span<const double> x, size_t kernel, size_t out) const;
    std::vector<double> affine_vjp(std::span<const double> x, std::span<const double> dy,
                                   size_t kernel, std::span<double> gradient) const;

    size_t inputs_, hidden_, outputs_;
    std::vector<Part> parts_;
    std::vector<double> parameters_;
};

std::vector<double> softmax(std::span<const double> logits, double temperature = 1);
double sigmoid(double x);

} // namespace ponder
