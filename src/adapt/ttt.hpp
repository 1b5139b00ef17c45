// A TTT layer after the backbone: hidden + layer(norm(hidden)), its weights W learning inside the
// pass by the reconstruction loss, one step a mini-batch. Sun et al. 2024 (arXiv 2407.04620),
// TTT-Linear and TTT-MLP; PonderTTT's variant of TTT-Linear (arXiv 2601.00894).
#pragma once

#include "adapt/adapter.hpp"
#include "tensor/ops.hpp"

namespace ponder {

class Ttt : public Adapter {
public:
    Ttt(const Gpt2Config &config, const Options &options, bool mlp);
    bool learns_inside() const override { return true; }
    int64_t mini_batch() const override { return mini_batch_; }
    int64_t taps() const override { return share_qk_ ? 3 + shift() : 0; }
    InsideResult after_backbone(Graph &graph, Id hidden, Id before) const override;

private:
    void draw_initial(std::span<float> fast, Random &random) const override;
    // How a source draws an untrained parameter.
    enum class Draw { zeros, ones, normal, inverse_root, uniform_half };
    void add_slow(const std::string &name, Shape shape, Draw draw, Random &random);
    Id parameter(Graph &graph, const std::string &name) const;
    int64_t shift() const { return form_.ponder ? 1 : 0; } // of the convolutions

    TttScan form_;
    int64_t heads_, mini_batch_;
    double outer_eps_; // of the norm before the layer and the one after the scan
    bool share_qk_, gate_;
};

} // namespace ponder
