#include "eval/calibrate.hpp"

#include "adapt/stored.hpp"
#include "adapt/stored_gate.hpp"
#include "base/error.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <iterator>

namespace ponder {

namespace {

// What a list of streams did under one calibration.
struct Run {
    double loss = 0, rate = 0, farthest = 0; // farthest: the rate farthest from the target
    double ratio = 0; // mean over streams of their loss over that of the first run
    double share[4] = {};
    std::vector<std::vector<double>> outputs; // of the gate, for every chunk
};

class Calibrator {
public:
    Calibrator(std::shared_ptr<const Model> model, const Options &options, const Gate &gate,
               const CallGuard &guard)
        : model_(std::move(model)), options_(options), gate_(gate), guard_(guard) {}

    Run run(std::span<const ponder_stream> streams, const Calibration &calibration) {
        auto gate = std::make_shared<Gate>(gate_);
        gate->calibration = calibration;
        gate->seal();
        std::vector<Stream> all(streams.size());
        const auto report = [&](uint64_t done) { guard_.progress(done, std::max(done, total_)); };
        model_->runtime().threads->run_throwing(uint32_t(streams.size()),
                                                [&](uint32_t s, uint32_t) {
                                                    all[s] = run_one(streams[s], gate);
                                                    report(++done_);
                                                });
        report(done_); // with the host's pool no task may have run on this thread

        Run run;
        double predictions = 0;
        for (Stream &one : all) {
            const double chunks = double(one.outputs.size()), rate = one.steps / chunks;
            if (&one == &all[0] ||
                std::abs(rate - calibration.target) >= std::abs(run.farthest - calibration.target))
                run.farthest = rate;
            const double mean = one.loss / one.predictions;
            const size_t place = size_t(&one - &all[0]);
            if (first_.size() <= place)
                first_.push_back(mean);
            run.ratio += mean / first_[place] / double(all.size());
            run.loss += one.loss;
            predictions += one.predictions;
            run.rate += one.steps;
            for (size_t i = 0; i < std::size(run.share); ++i)
                run.share[i] += one.share[i];
            std::move(one.outputs.begin(), one.outputs.end(), std::back_inserter(run.outputs));
        }
        run.loss /= predictions;
        run.rate /= double(run.outputs.size());
        for (double &share : run.share)
            share /= double(run.outputs.size());
        return run;
    }
    void plan(uint64_t streams) { total_ = streams; }

private:
    // What one stream did; sums.
    struct Stream {
        double loss = 0, predictions = 0, steps = 0, share[4] = {};
        std::vector<std::vector<double>> outputs;
    };
    Stream run_one(const ponder_stream &stream, const std::shared_ptr<const Gate> &gate) {
        Session session(model_, options_);
        session.run_alone();
        session.use_gate(gate);
        const uint64_t chunk = session.info().chunk_tokens, chunks = stream.count / chunk;
        if (chunks == 0)
            throw_error(PONDER_E_ARGUMENT, "a stream of %zu tokens has no chunk of %llu",
                        stream.count, static_cast<unsigned long long>(chunk));
        session.expect(chunks);
        Stream all;
        for (uint64_t i = 0; i < chunks; ++i) {
            session.feed({stream.ids + i * chunk, size_t(chunk)});
            session.score(guard_);
            all.outputs.push_back(gate->evaluate(session.features()));
            session.learn(-1, guard_);
            const ponder_record &r = session.records().back();
            all.steps += r.steps;
            all.loss += r.loss_before * r.predictions;
            all.predictions += r.predictions;
            all.share[r.steps <= 0 ? 0 : r.steps == 1 ? 1 : r.steps < 4 ? 2 : 3] += 1;
            guard_.check();
        }
        return all;
    }

    std::shared_ptr<const Model> model_;
    const Options &options_;
    const Gate &gate_;
    const CallGuard &guard_;
    std::atomic<uint64_t> done_{0}; // streams
    uint64_t total_ = 0;
    std::vector<double> first_; // losses of the first run's streams, in order
};

// Offsets on the prices of 2 and 4 steps, so that shares are met at the threshold that meets the
// rate: by turns, since each moves the other.
void fit_shares(Gate &gate, std::span<const std::vector<double>> outputs,
                const std::array<double, 4> &share, double target) {
    double width = 0;
    for (const std::vector<double> &out : outputs)
        for (double v : out)
            width = std::max(width, std::abs(v));
    width = std::max(width, 1e-9);
    for (int round = 0; round < 40; ++round) {
        fit_thresholds(gate, outputs, gate.calibration);
        const Spending now = spending(gate, outputs, gate.calibration.threshold(target));
        const double step = width * 0.5 / (1 + round);
        for (size_t i = 0; i < gate_step_count; ++i)
            gate.calibration.offset[i] += step * (now.share[1 + i] - share[1 + i]);
    }
    fit_thresholds(gate, outputs, gate.calibration);
}

} // namespace

ponder_calibration calibrate(std::shared_ptr<const Model> model, const Options &given,
                             std::span<const ponder_stream> streams,
                             std::span<const ponder_stream> held, const CalibrationGoal &goal,
                             const CallGuard &guard) {
    const std::string &folder = given.text("adapter");
    if (is_built_in(folder))
        throw_error(PONDER_E_ARGUMENT, "option 'adapter' is '%s': an adapter folder is calibrated",
                    folder.c_str());
    const Gpt2 &backbone = model->backbone();
    const auto stored =
        make_adapter(backbone.config(), with_stored_options(given), backbone.hash());
    if (!stored->gate())
        throw_error(PONDER_E_STATE, "adapter '%.200s' has no gate", folder.c_str());
    Options options = given;
    options.set("policy", "adapter");
    options.set("policy.target_rate", "0");
    Gate gate = *stored->gate();
    Calibration &best = gate.calibration;
    if (goal.target > 0)
        best.target = goal.target;
    if (goal.share) {
        if (gate.form != GateForm::steps)
            throw_error(PONDER_E_ARGUMENT, "shares of K: the gate is not of the form 'steps'");
        best.target = (*goal.share)[1] + 2 * (*goal.share)[2] + 4 * (*goal.share)[3];
        if (!(best.target > 0))
            throw_error(PONDER_E_ARGUMENT, "shares of K: there is nothing to spend");
    }

    Calibrator calibrator(model, options, gate, guard);
    // How early and how large steps are: two members at a time, one pair after the other.
    struct Part {
        double Calibration::*first, Calibration::*second;
        std::vector<std::array<double, 2>> values;
    };
    const std::vector<Part> parts{
        {&Calibration::scale, &Calibration::scale_last, {{1, 1}, {1.25, 0.75}, {1.5, 0.5}}},
        {&Calibration::front,
         &Calibration::front_slope,
         {{0.5, 0.4}, {0.7, 0}, {0.7, 0.4}, {1, 0}}}};
    uint64_t tries = uint64_t(goal.rounds) + 1;
    if (goal.search) {
        tries += 1; // what was chosen, with thresholds of its own
        for (const Part &part : parts)
            tries += part.values.size() - 1; // the present values are measured already
    }
    calibrator.plan(tries * streams.size() + held.size());

    ponder_calibration report{};
    report.struct_size = sizeof report;
    Run run = calibrator.run(streams, best);
    for (int round = 0; round < goal.rounds; ++round) {
        std::fill(std::begin(best.offset), std::end(best.offset), 0.0);
        if (goal.share)
            fit_shares(gate, run.outputs, *goal.share, best.target);
        else
            fit_thresholds(gate, run.outputs, best);
        run = calibrator.run(streams, best);
        report.rounds += 1;
    }
    if (goal.search) {
        best.reference = run.loss;
        for (const Part &part : parts) {
            Calibration chosen = best;
            for (const auto &[first, second] : part.values) {
                Calibration other = best;
                other.*part.first = first;
                other.*part.second = second;
                if (first == best.*part.first && second == best.*part.second)
                    continue; // measured already
                Run measured = calibrator.run(streams, other);
                if (measured.ratio < run.ratio) {
                    run = std::move(measured);
                    chosen = other;
                }
            }
            best = chosen;
        }
        fit_thresholds(gate, run.outputs, best);
        if (goal.share)
            fit_shares(gate, run.outputs, *goal.share, best.target);
        run = calibrator.run(streams, best);
    }
    report.target = best.target;
    report.loss = run.loss;
    report.rate = run.rate;
    report.rate_farthest = run.farthest;
    std::copy(std::begin(run.share), std::end(run.share), report.share);
    const double unknown = std::numeric_limits<double>::quiet_NaN();
    report.held_loss = report.held_rate = report.held_farthest = unknown;
    std::fill(std::begin(report.held_share), std::end(report.held_share), unknown);
    if (!held.empty()) {
        const Run other = calibrator.run(held, best);
        report.held_loss = other.loss;
        report.held_rate = other.rate;
        report.held_farthest = other.farthest;
        std::copy(std::begin(other.share), std::end(other.share), report.held_share);
    }
    report.front = best.front;
    report.scale = best.scale;
    report.scale_last = best.scale_last;
    report.front_slope = best.front_slope;
    report.reference = best.reference;
    save_calibration(folder, best);
    return report;
}

} // namespace ponder
