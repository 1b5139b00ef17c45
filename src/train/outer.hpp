// The outer optimizer: AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) over one flat vector of
// trained values, with warm-up, cosine decay and clipping.
#pragma once

#include "base/memory.hpp"
#include "tensor/ops.hpp"
#include "tensor/program.hpp"

#include <memory>
#include <span>
#include <vector>

namespace ponder {

class CallGuard;
class Options;
class Peers;
class SafeTensors;
class SafeTensorsWriter;

class Outer {
public:
    // A run of values that are treated alike.
    struct Segment {
        size_t count;
        double rate = 1; // times the learning rate; 0 = not trained
        bool decays = false;
    };
    Outer(const Options &options, std::shared_ptr<const Device> device,
          std::vector<Segment> segments);

    // In the device's memory:
    size_t count() const { return count_; }
    float *values() const { return data_.data(); }
    float *gradient() const { return data_.data() + count_; }
    // Copies of it:
    std::vector<float> read_values() const;
    bool averages() const { return average_ > 0; }
    std::vector<float> read_average() const; // train.average; before the first step the values
    void write_values(std::span<const float> values) { data_.write(values.data(), count_); }
    void write_gradient(std::span<const float> gradient) {
        data_.write(gradient.data(), count_, count_);
    }

    // gradient() = its sum over all processes.
    void sum_gradient(Peers &peers, const CallGuard &guard);

    uint64_t steps() const { return steps_; }
    double learning_rate(uint64_t step) const; // of step 1, 2, ...

    // One step along gradient(). Where that is not finite, values and moments stay as they are.
    // gradient() may hold something else afterwards.
    struct Taken {
        double norm, rate;
        bool finite;
    };
    Taken step();

    // Values, moments and the average as tensors "outer.*", the number of steps as metadata. What
    // write() adds stays until its next call.
    void write(SafeTensorsWriter &writer) const;
    void read(const SafeTensors &file);

private:
    float *first_moment() const { return data_.data() + 2 * count_; }
    float *second_moment() const { return data_.data() + 3 * count_; }

    float *average() const { return data_.data() + 4 * count_; }
    void add_to_average();

    double lr_, end_, beta1_, beta2_, epsilon_, decay_, clip_, average_;
    uint64_t schedule_, warmup_, steps_ = 0;
    std::shared_ptr<const Device> device_;
    std::vector<Segment> segments_;
    size_t count_ = 0;
    DeviceVector<float> data_;    // values, gradient, moments, perhaps the average
    DeviceVector<float> scalars_; // the gradient's norm; hyperparameters of each segment
    DeviceBuffer workspace_;
    mutable std::vector<float> written_;
    struct Update {
        Step in;
        Id w2, m2, v2;
        std::unique_ptr<const Program> program;
    };
    std::vector<Update> updates_; // of each segment
    struct {
        Id a, out;
        std::unique_ptr<const Program> program;
    } norm_;
    struct {
        Id average, values, difference, h, norm, out;
        std::unique_ptr<const Program> program;
    } mean_;
};

} // namespace ponder
