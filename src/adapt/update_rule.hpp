// Update rules: from gradient to new fast weights, over all of them as one flat vector.
#pragma once

#include "tensor/program.hpp"

#include <memory>

namespace ponder {

class Options;

class UpdateRule {
public:
    UpdateRule(const Options &options, size_t count, DType wide,
               std::shared_ptr<const Device> device);

    size_t moments() const { return adam_ ? 2 : 0; } // vectors kept beside the weights
    // One step from `old` to `fresh`, which may be the same. `step` counts from 1 (bias
    // correction). Returns the gradient's norm before clipping.
    struct State {
        float *weights, *first_moment, *second_moment;
    };
    double step(const State &old, const State &fresh, const float *gradient, uint64_t step,
                std::byte *workspace);
    // |a - b|
    double distance(const float *a, const float *b, std::byte *workspace);
    double norm(const float *a, std::byte *workspace);

    size_t workspace_bytes() const; // of one worker

private:
    bool adam_;
    double lr_, beta1_, beta2_, epsilon_, clip_;
    struct {
        Id w, g, m, v, h, w2, m2, v2, norm;
    } step_{};
    struct {
        Id a, b, out;
    } distance_{}, norm_{};
    std::unique_ptr<const Program> step_program_, distance_program_, norm_program_;
};

} // namespace ponder
