// Fast weights with their optimizer's moments, in one block of the device's memory.
#pragma once

#include "adapt/update_rule.hpp"

namespace ponder {

class FastState {
public:
    FastState() = default;
    FastState(std::shared_ptr<const Device> device, size_t count, size_t moments)
        : block_(std::move(device), count * (1 + moments)), count_(count), moments_(moments) {}
    UpdateRule::State view() const {
        return {weights(), moments_ > 0 ? weights() + count_ : nullptr,
                moments_ > 1 ? weights() + 2 * count_ : nullptr};
    }
    float *weights() const { return block_.data(); }
    const DeviceVector<float> &all() const { return block_; }
    void swap(FastState &other) { block_.swap(other.block_); }

private:
    DeviceVector<float> block_;
    size_t count_ = 0, moments_ = 0;
};

} // namespace ponder
