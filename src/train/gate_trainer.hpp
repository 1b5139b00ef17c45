// Trains a gate on what steps were worth: along training streams the session is forked at sampled
// chunks, every number of steps is tried, and the loss of the chunks that follow is measured. The
// network then learns, on all that was measured so far, either each K's gain (advantage), or
// PonderTTT's L = CE + beta L_TTT + gamma L_cost through Gumbel-Softmax samples.
#pragma once

#include "policy/gate.hpp"
#include "train/trainer.hpp"

#include <array>
#include <functional>

namespace ponder {

// A chunk's features and what came after 0, 1, 2, 4 steps on it, in nats a token.
struct GateSample {
    std::vector<double> features;
    std::array<double, 1 + gate_step_count> later{}, own{};
};

struct GateObjective {
    bool ponder = false; // else advantage
    double beta = 0, gamma = 0, target = 0.5, temperature = 1;
    // Advantage: targets are the mean gain of each K, in value units, with the gate's rule, moved
    // by this share towards what was measured.
    double trust = 1;
    std::array<double, gate_step_count> mean_gain{};
};
// The objective's mean over the samples, and its gradient (added) by the network's parameters.
// Ponder draws Gumbel noise from `random`. `cost`: mean steps a chunk, expected.
struct GateLoss {
    double loss, cost;
};
GateLoss gate_loss(const Gate &gate, std::span<const GateSample *const> samples,
                   const GateObjective &objective, Random &random, std::span<double> gradient);

class GateTrainer : public Trainer {
public:
    GateTrainer(std::shared_ptr<const Model> model, const Options &options);
    ponder_train_record step(std::span<const ponder_stream> streams,
                             const CallGuard &guard) override;
    uint64_t steps() const override { return steps_; }
    void export_to(const std::string &folder) const override;

protected:
    void write(SafeTensorsWriter &writer) const override;
    void read(const SafeTensors &file) override;

private:
    struct Measured {
        std::vector<GateSample> samples;
        uint64_t predictions = 0, flops = 0, chunks = 0, steps = 0;
        double loss = 0, first = 0; // sums
    };
    Measured measure(const ponder_stream &stream, Random random, const CallGuard &guard,
                     const std::function<void()> &check) const;
    Measured of_all(std::span<const Measured> own, const CallGuard &guard);
    void normalise();
    GateObjective objective() const;
    double temperature() const;
    double learning_rate() const;
    struct Fit {
        double loss, cost, norm;
    };
    Fit fit();
    std::vector<double> numbers() const; // all that changes
    static constexpr size_t minibatch = 32;

    std::string folder_; // of the adapter
    bool inside_;
    std::shared_ptr<Gate> gate_;
    std::vector<double> first_, second_; // moments
    std::vector<GateSample> seen_;
    uint64_t steps_ = 0, updates_ = 0;
    Random random_;
    mutable std::vector<double> written_;
};

} // namespace ponder
