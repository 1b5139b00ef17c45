// Calibration of gates.
#include "api/handles.hpp"

#include "eval/calibrate.hpp"
#include "train/trainer.hpp"

#include <cmath>

using namespace ponder;
using namespace ponder::api;

ponder_status ponder_calibrate(const ponder_model *model, const ponder_options *options,
                               const ponder_stream *streams, uint32_t count,
                               const ponder_stream *held, uint32_t held_count, const double *share,
                               int32_t search, ponder_calibration *report, const ponder_call *call,
                               ponder_error *error) {
    return guard(error, [&] {
        const auto &m = check(model, "model").model;
        const Options &o = check(options, "options").options;
        require(streams, "streams");
        if (held_count > 0)
            require(held, "held");
        if (report)
            check_out(report, "report");
        const std::span<const ponder_stream> list(streams, count), other(held, held_count);
        const int64_t vocabulary = m->backbone().config().vocabulary;
        check_streams(list, vocabulary);
        if (held_count > 0)
            check_streams(other, vocabulary);
        CalibrationGoal goal;
        goal.target = o.number("policy.target_rate");
        goal.search = search != 0;
        if (share) {
            double sum = 0;
            for (int i = 0; i < 4; ++i) {
                if (!(share[i] >= 0 && share[i] <= 1))
                    throw_error(PONDER_E_ARGUMENT, "share[%d] = %g is not in 0..1", i, share[i]);
                sum += share[i];
            }
            if (std::abs(sum - 1) > 1e-6)
                throw_error(PONDER_E_ARGUMENT, "the shares sum to %g", sum);
            goal.share = {share[0], share[1], share[2], share[3]};
        }
        const ponder_call limits = read_struct(call, "call");
        std::atomic<bool> cancel{false};
        const CallGuard bounds(cancel, &limits);
        const ponder_calibration result = calibrate(m, o, list, other, goal, bounds);
        if (report)
            write_struct(report, result);
    });
}
