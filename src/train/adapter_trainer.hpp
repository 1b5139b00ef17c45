// Trains an adapter through its inner loop: initial fast weights, step sizes and decay of what
// learns between chunks, slow parameters of what learns inside. Streams of a batch run beside each
// other, one thread each; on a device with a queue, each thread has a queue of its own.
#pragma once

#include "train/outer.hpp"
#include "train/trainer.hpp"
#include "train/unroll.hpp"

namespace ponder {

class AdapterTrainer : public Trainer {
public:
    AdapterTrainer(std::shared_ptr<const Model> model, const Options &options);
    ponder_train_record step(std::span<const ponder_stream> streams,
                             const CallGuard &guard) override;
    uint64_t steps() const override { return outer_->steps(); }
    void export_to(const std::string &folder) const override;

protected:
    void write(SafeTensorsWriter &writer) const override;
    void read(const SafeTensors &file) override;

private:
    // The trained values in their order: fast weights, log step sizes, decay, slow parameters.
    struct Parts {
        std::span<float> fast, log_rate, decay, slow;
    };
    Parts parts(std::span<float> all) const;
    static void put(const Parts &values, Adapter &to); // all but the fast weights
    void spread(); // from the values to adapter, step sizes and the device's copies
    void collect(std::span<const Unroll<float>::Result> results, double predictions);

    std::shared_ptr<Adapter> adapter_, average_; // that one for its export, if there is one
    std::shared_ptr<const Device> device_;       // its own: what it packs changes with every step
    std::unique_ptr<Outer> outer_;
    std::vector<float> values_;      // as the outer optimizer has them
    std::vector<float> rate_, keep_; // per element
    // One for all threads on the host; elsewhere one for each, with its own copy of all weights.
    struct Lane {
        std::shared_ptr<const Device> device;
        DeviceVector<float> learned; // step sizes, what decay keeps, initial fast weights
        std::unique_ptr<const Unroll<float>> unroll;
    };
    std::vector<Lane> lanes_;
    const Lane &lane(uint32_t worker) const { return lanes_[worker % lanes_.size()]; }
    std::vector<std::shared_ptr<Unroll<float>::Work>> work_; // of each worker
};

} // namespace ponder
