// Trains every weight of a backbone on next-token loss. The master copy is f32; passes run on a
// working copy of the model's dtype, made again after each step together with the device's packed
// forms (Micikevicius et al. 2018, arXiv 1710.03740; bf16 needs no loss scaling).
#pragma once

#include "train/outer.hpp"
#include "train/trainer.hpp"

#include <map>

namespace ponder {

class BackboneTrainer : public Trainer {
public:
    BackboneTrainer(std::shared_ptr<const Model> model, const Options &options);
    ponder_train_record step(std::span<const ponder_stream> streams,
                             const CallGuard &guard) override;
    uint64_t steps() const override { return outer_->steps(); }
    void export_to(const std::string &folder) const override;

protected:
    void write(SafeTensorsWriter &writer) const override;
    void read(const SafeTensors &file) override;

private:
    struct Pass {
        Id tokens, targets, seed, loss;
        std::vector<Id> gradient; // in the order of weights_
        std::unique_ptr<const Program> program;
    };
    const Pass &pass(int64_t streams, int64_t tokens);
    // The gradient of a share of the batch's streams, as its part of the batch's mean; loss and
    // flops are added to the record.
    void differentiate(std::span<const ponder_stream> streams, Peers::Share mine,
                       ponder_train_record &record, const CallGuard &guard);
    void spread(); // master -> working copy -> packed forms
    void spread_on_device();
    // total = keep total + share gradient
    void accumulate(float keep, float share, const float *gradient);

    std::shared_ptr<const Device> device_; // its own: what it packs changes with every step
    Gpt2 working_;
    struct Weight {
        std::string name;
        Shape shape;
        DType type;
        std::byte *data;
        size_t offset; // in the master copy: matrices first, then vectors
    };
    std::vector<Weight> weights_;
    std::unique_ptr<Outer> outer_;
    std::map<std::pair<int64_t, int64_t>, Pass> passes_; // by streams and tokens
    DeviceVector<float> micro_;                          // gradient of one pass
    DeviceVector<int32_t> inputs_;                       // tokens, targets, seed
    DeviceVector<float> loss_;
    DeviceBuffer arena_, workspace_;
    // Where the weights' copies are not the host's: from master to working copy there, and sums.
    struct {
        std::vector<Id> from, to;
        std::unique_ptr<const Program> program;
    } cast_;
    struct {
        Id total, gradient, keep, share, kept, shared, sum;
        std::unique_ptr<const Program> program;
    } sum_{};
    DeviceVector<float> factors_;
};

} // namespace ponder
