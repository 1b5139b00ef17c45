// Update rules: from gradient to new fast weights, over all of them as one flat vector.
#pragma once

#include "tensor/ops.hpp"
#include "tensor/program.hpp"

#include <array>
#include <memory>

namespace ponder {

class Options;

// What an adapter has learned about its own updates, per element: w' = start + keep (w - start) -
// rate x update. Without it keep is 1 and the rate is inner.lr.
template <class T> struct LearnedRates {
    const T *rate = nullptr, *keep = nullptr, *start = nullptr;
};

// Compute type T: float, or double in tests.
template <class T> class UpdateRuleOf {
public:
    // serial: steps run on the calling thread alone.
    UpdateRuleOf(const Options &options, size_t count, std::shared_ptr<const Device> device,
                 LearnedRates<T> learned = {}, bool serial = false);

    void run_alone() { serial_ = true; }
    size_t moments() const { return adam_ ? 2 : 0; } // vectors kept beside the weights
    // Everything is in the device's memory, and nothing here waits for it but numbers().
    // One step from `old` to `fresh`, which may be the same. `step` counts from 1 (bias
    // correction).
    struct State {
        T *weights, *first_moment, *second_moment;
    };
    void step(const State &old, const State &fresh, const T *gradient, uint64_t step,
              std::byte *workspace) const;
    // The vjp of step(): `after` holds the adjoint of what it wrote, `before` receives that of the
    // old state, `to` that of the rest; to.keep and to.start only where rates are learned.
    struct Adjoint {
        T *gradient, *rate, *keep, *start;
    };
    void vjp(const State &old, const T *gradient, uint64_t step, const State &after,
             const State &before, const Adjoint &to, std::byte *workspace) const;

    void distance(const T *a, const T *b, std::byte *workspace) const; // |a - b|
    // The same two as part of what a caller records: the hyperparameters of the step come from `h`,
    // the numbers go to `norm` and `distance`, all in the device's memory.
    void enqueue_step(const State &old, const State &fresh, const T *gradient, const T *h, T *norm,
                      std::byte *workspace, const Device::Queue &queue) const;
    void enqueue_distance(const T *a, const T *b, T *distance, std::byte *workspace,
                          const Device::Queue &queue) const;
    void norm(const T *a, std::byte *workspace) const;
    // to = from + scale (to - from); may use `scratch`, as long as the two.
    void rescale(const T *from, T *to, double scale, T *scratch, std::byte *workspace) const;

    // Of the last step() or norm(), before clipping, and of the last distance().
    struct Numbers {
        double norm, distance;
    };
    Numbers numbers(std::byte *workspace) const;

    size_t workspace_bytes() const; // of one worker
    void hyperparameters(GateCall &) const; // what a device makes hyperparameters of

private:
    // In front of the workspace.
    struct Scalars {
        alignas(64) T h[8];
        alignas(64) T norm;
        T distance;
        alignas(64) T scale;
    };
    static Scalars *scalars(std::byte *workspace) {
        return reinterpret_cast<Scalars *>(workspace);
    }
    Step record(Graph &graph) const;
    void bind(Program::Bindings &at, const Step &ids, const State &old, const T *gradient,
              const T *h, const T *norm) const;
    std::array<T, 8> hyperparameters(uint64_t step) const;
    Program::Bindings of_step(const State &old, const State &fresh, const T *gradient, const T *h,
                              T *norm) const;
    Program::Bindings of_distance(const T *a, const T *b, T *distance) const;
    void run(const Program &program, const Program::Bindings &at, std::byte *workspace) const;

    std::shared_ptr<const Device> device_;
    bool adam_;
    double lr_, beta1_, beta2_, epsilon_, clip_;
    size_t count_;
    LearnedRates<T> learned_;
    bool serial_;
    struct {
        Step in;
        Id w2 = none, m2 = none, v2 = none;
    } step_;
    struct {
        Step in;
        Id dw2 = none, dm2 = none, dv2 = none;
        StepGradient to;
    } vjp_;
    struct {
        Id a, b, out;
    } distance_{}, norm_{};
    struct {
        Id from, to, scale, difference, out;
    } rescale_{};
    std::unique_ptr<const Program> step_program_, vjp_program_, distance_program_, norm_program_,
        rescale_program_;
};

using UpdateRule = UpdateRuleOf<float>;

} // namespace ponder
