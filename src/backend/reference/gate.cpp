// gate, commit: whether a chunk is learned from, and whether what was learned is kept, for devices
// that decide without the host.
#include "backend/reference/kernel.hpp"

#include "ponder/gate_rule.h"

#include <cstring>
#include <limits>

namespace ponder::reference {
namespace {

constexpr double unknown = std::numeric_limits<double>::quiet_NaN();

// Words of i32 as a state, changed in place or from one buffer to another.
class State {
public:
    State(const int32_t *from, int32_t *to) : to_(to) { std::memcpy(&gate_, from, sizeof gate_); }
    ~State() { std::memcpy(to_, &gate_, sizeof gate_); }
    State(const State &) = delete;
    ponder_gate *operator->() { return &gate_; }
    ponder_gate &operator*() { return gate_; }

private:
    ponder_gate gate_;
    int32_t *to_;
};

template <class T> void gate(Args<T> &args) {
    State state(args.ids(3), args.ids_out(0));
    const int64_t predictions = args.attr_int(0), told = args.attr_int(1);
    const auto mean = [&](const T *x) {
        double sum = 0;
        for (int64_t t = 0; t < predictions; ++t)
            sum += double(x[t]);
        return sum / double(predictions);
    };
    if (const T *nll = args.in(0))
        state->signals[PONDER_GATE_LOSS] = mean(nll);
    if (const T *entropy = args.in(1))
        state->signals[PONDER_GATE_ENTROPY] = mean(entropy);
    if (const T *reconstruction = args.in(2); reconstruction && state->granted > 0)
        state->signals[PONDER_GATE_RECONSTRUCTION] = double(reconstruction[1]);
    if (told == 0)
        return;
    if (told > 0) {
        state->wanted = state->granted = told;
        state->calibrating = 0;
        state->score = state->compared = unknown;
    } else {
        const bool update = ponder_gate_decide(&*state, state->signals[state->signal]);
        ponder_gate_grant(&*state, update ? state->steps : 0);
    }
    state->accepted = 0;
    state->gradient_norm = state->update_norm = unknown;
    const int64_t count = args['F'] - 1;
    if (int32_t *flags = args.ids_out(1)) {
        for (int64_t k = 0; k < count; ++k)
            flags[k] = k < state->granted;
        flags[count] = state->granted == 0;
    }
    if (T *h = args.out(2)) {
        double power1 = state->power1, power2 = state->power2;
        for (int64_t k = 0; k < args['K']; ++k) {
            power1 *= args.attr(3);
            power2 *= args.attr(4);
            const double row[8] = {args.attr(2), args.attr(3), args.attr(4), args.attr(5),
                                   1 - power1,   1 - power2,   args.attr(6), 0};
            std::transform(row, row + 8, h + 8 * k, [](double x) { return T(x); });
        }
    }
}

template <class T> void commit(Args<T> &args) {
    State state(args.ids(3), args.ids_out(0));
    const T *norms = args.in(0), *fresh = args.in(2);
    T *w = args.out(1);
    state->gradient_norm = norms ? double(norms[0]) : unknown;
    state->update_norm = double(*args.in(1));
    state->accepted = std::isfinite(state->update_norm) && state->update_norm <= state->guard_norm;
    for (int64_t k = 0; norms && k < std::min(state->granted, args['K']); ++k)
        state->accepted &= std::isfinite(norms[k]);
    if (!state->accepted)
        return;
    state->signals[PONDER_GATE_UPDATE_NORM] = state->update_norm;
    state->optimizer_steps += state->granted;
    for (int64_t k = 0; k < state->granted; ++k) {
        state->power1 *= args.attr(0);
        state->power2 *= args.attr(1);
    }
    if (w)
        std::copy_n(fresh, args['n'], w);
}

const char *check_gate(const Sizes &sizes, const double *) {
    if (sizes['N'] * int64_t(sizeof(int32_t)) != int64_t(sizeof(ponder_gate)))
        return "the state is no ponder_gate";
    return nullptr;
}

} // namespace

const Op gate_op = {"gate",
                    "nll?:w[S,T] entropy?:w[S,T] reconstruction?:w[1,3] state:i[N] -> state:i[N] "
                    "flags?:i[F] h?:w[K,8]",
                    7,
                    gate<float>,
                    gate<double>,
                    check_gate};
const Op commit_op = {"commit",
                      "gradient_norms?:w[K] distance:w[1] fresh?:w[n] state:i[N] -> state:i[N] "
                      "w?:w[n]",
                      2,
                      commit<float>,
                      commit<double>,
                      check_gate};

} // namespace ponder::reference
