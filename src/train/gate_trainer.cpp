#include "train/gate_trainer.hpp"

#include "adapt/stored.hpp"
#include "adapt/stored_gate.hpp"
#include "base/error.hpp"
#include "base/hash.hpp"
#include "formats/safetensors.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <numbers>

namespace ponder {

namespace {

constexpr int32_t tried[] = {0, 1, 2, 4};
constexpr double leading_rule = 0.3; // gain in value units for a deviation of the leading feature

// What stands behind each of the form's choices: an index into `tried`.
size_t choices(GateForm form) { return form == GateForm::steps ? std::size(tried) : 2; }

// One logit for each choice.
std::vector<double> logits_of(GateForm form, std::span<const double> out) {
    switch (form) {
    case GateForm::binary:
        return {out[0], out[1]};
    case GateForm::soft:
        return {0, out[0]};
    case GateForm::steps:
        break;
    }
    return {0, out[0], out[1], out[2]};
}

std::vector<double> to_outputs(GateForm form, std::span<const double> dlogits) {
    if (form == GateForm::binary)
        return {dlogits[0], dlogits[1]};
    return {dlogits.begin() + 1, dlogits.end()};
}

// d sum_k f_k p_k / d logits, for p = softmax(logits / temperature)
std::vector<double> through_softmax(std::span<const double> p, std::span<const double> f,
                                    double temperature) {
    double mean = 0;
    for (size_t k = 0; k < p.size(); ++k)
        mean += p[k] * f[k];
    std::vector<double> d(p.size());
    for (size_t k = 0; k < p.size(); ++k)
        d[k] = p[k] * (f[k] - mean) / temperature;
    return d;
}

// Of all that sessions with the adapter compute by. A gate that is stored beside it, and that makes
// itself the policy, is not part of it: training may put it there.
std::string content_hash(const Adapter &adapter, Options stored) {
    stored.set_default("policy", "always");
    Hash hash;
    hash.add(stored.hash());
    std::vector<float> fast(adapter.fast_count());
    Random random(uint64_t(stored.integer("seed")));
    adapter.initial(fast, random);
    const auto add = [&](const std::vector<float> &values) {
        hash.add(values.data(), values.size() * sizeof(float));
    };
    add(fast);
    for (const auto &[name, slow] : adapter.slow())
        add(slow.values);
    add(adapter.rates().log_rate);
    add(adapter.rates().decay);
    return hash.hex();
}

} // namespace

GateLoss gate_loss(const Gate &gate, std::span<const GateSample *const> samples,
                   const GateObjective &objective, Random &random, std::span<double> gradient) {
    const double n = double(samples.size());
    const size_t count = choices(gate.form);
    GateLoss result{};
    std::vector<GateNet::Pass> passes;
    std::vector<std::vector<double>> outputs;
    for (const GateSample *sample : samples) {
        const std::vector<double> z = gate.normalise(sample->features);
        passes.push_back(gate.net.forward(z));
        outputs.push_back(gate.with_rule(z, passes.back().out));
    }
    std::vector<double> cost_of(count);
    for (size_t k = 0; k < count; ++k)
        cost_of[k] = tried[k];
    for (const std::vector<double> &out : outputs) {
        const std::vector<double> p = softmax(logits_of(gate.form, out));
        for (size_t k = 0; k < count; ++k)
            result.cost += p[k] * cost_of[k] / n;
    }
    for (size_t s = 0; s < samples.size(); ++s) {
        const GateSample &sample = *samples[s];
        const std::vector<double> &out = outputs[s];
        std::vector<double> dout;
        if (!objective.ponder) {
            // Squared error of each K's gain; of forms with one decision, of that of one step.
            dout.assign(out.size(), 0.0);
            for (size_t k = 1; k < count; ++k) {
                const double measured = (sample.later[0] - sample.later[k]) / gate.value_unit;
                const bool difference = gate.form == GateForm::binary;
                const size_t at = k - 1 + difference;
                const double found = out[at] - (difference ? out[0] : 0);
                const double net = passes[s].out[at] - (difference ? passes[s].out[0] : 0);
                const double rule = objective.mean_gain[k - 1] + found - net;
                const double gain = rule + objective.trust * (measured - rule);
                const double error = found - gain;
                result.loss += error * error / double(count - 1) / n;
                dout[at] += 2 * error / double(count - 1) / n;
                if (difference)
                    dout[0] -= 2 * error / double(count - 1) / n;
            }
        } else {
            const std::vector<double> logits = logits_of(gate.form, out);
            // What each choice would cost in nats: the later loss, and beta times the inner one.
            std::vector<double> nats(count);
            for (size_t k = 0; k < count; ++k)
                nats[k] = sample.later[k] + objective.beta * sample.own[k];
            std::vector<double> d;
            if (gate.form == GateForm::soft) {
                const std::vector<double> p = softmax(logits);
                result.loss += (p[0] * nats[0] + p[1] * nats[1]) / n;
                d = through_softmax(p, nats, 1);
            } else {
                // Straight-through: the hard sample is what is paid, the soft one has the gradient.
                std::vector<double> noisy = logits;
                for (double &v : noisy)
                    v -= std::log(-std::log(random.uniform() * (1 - 2e-12) + 1e-12));
                const std::vector<double> y = softmax(noisy, objective.temperature);
                const size_t hard =
                    size_t(std::max_element(noisy.begin(), noisy.end()) - noisy.begin());
                result.loss += nats[hard] / n;
                d = through_softmax(y, nats, objective.temperature);
            }
            // The rate is held from both sides, on probabilities without noise.
            const std::vector<double> rate = through_softmax(softmax(logits), cost_of, 1);
            for (size_t k = 0; k < count; ++k)
                d[k] =
                    d[k] / n + objective.gamma * 2 * (result.cost - objective.target) * rate[k] / n;
            dout = to_outputs(gate.form, d);
        }
        gate.net.backward(passes[s], dout, gradient);
    }
    if (objective.ponder)
        result.loss += objective.gamma * std::pow(result.cost - objective.target, 2);
    return result;
}

GateTrainer::GateTrainer(std::shared_ptr<const Model> model, const Options &options)
    : Trainer(std::move(model), "gate", options), folder_(options.text("adapter")),
      random_(uint64_t(options.integer("seed")) ^ 0x67617465u) {
    if (is_built_in(folder_))
        throw_error(PONDER_E_ARGUMENT,
                    "option 'adapter' is '%s': a gate is trained for an adapter "
                    "folder",
                    folder_.c_str());
    const Gpt2 &backbone = model_->backbone();
    const Options stored = with_stored_options(options_);
    const auto adapter = make_adapter(backbone.config(), stored, backbone.hash());
    inside_ = adapter->learns_inside();
    basis_ = content_hash(*adapter, stored);
    gate_ = std::make_shared<Gate>();
    const std::string &form = options_.text("gate.form");
    gate_->form = form == "steps"    ? GateForm::steps
                  : form == "binary" ? GateForm::binary
                                     : GateForm::soft;
    if (inside_ && gate_->form == GateForm::steps)
        throw_error(PONDER_E_ARGUMENT, "gate.form 'steps': a TTT layer takes its own steps; its "
                                       "gates are binary or soft");
    gate_->features =
        options_.text("gate.features") == "ponder" ? FeatureSet::ponder : FeatureSet::planned;
    const size_t inputs = feature_count(gate_->features);
    gate_->net =
        GateNet(inputs, size_t(options_.integer("gate.hidden")), gate_outputs(gate_->form));
    gate_->net.draw(random_);
    if (options_.text("gate.loss") == "advantage") {
        gate_->net.clear_head();
        gate_->rule = leading_rule;
    }
    gate_->mean.assign(inputs, 0.0);
    gate_->deviation.assign(inputs, 1.0);
    gate_->calibration.points = {{0.5, 0.0}};
    gate_->seal();
    first_.assign(gate_->net.parameters().size(), 0.0);
    second_ = first_;
}

// One stream, learned from more often at its start, as policies do. Half of the streams declare
// their length.
GateTrainer::Measured GateTrainer::measure(const ponder_stream &stream, Random random,
                                           const CallGuard &guard,
                                           const std::function<void()> &check) const {
    Session session(model_, options_);
    session.run_alone();
    session.use_gate(gate_); // for its features
    const uint64_t chunk = session.info().chunk_tokens, chunks = stream.count / chunk;
    if (chunks < 2)
        throw_error(PONDER_E_ARGUMENT, "a stream of %zu tokens has fewer than two chunks of %llu",
                    stream.count, static_cast<unsigned long long>(chunk));
    if (random.next() % 2 == 0)
        session.expect(chunks);
    session.feed({stream.ids, size_t(chunks * chunk)});
    const double wanted =
        std::min(1.0, double(options_.integer("gate.samples")) / double(chunks - 1));
    const uint64_t horizon = uint64_t(options_.integer("gate.horizon"));
    const size_t kinds = choices(gate_->form);
    const std::span<const int32_t> ks(tried, kinds);
    Measured to;
    const auto try_now = [&] {
        if (random.uniform() >= wanted || session.chunks_waiting() == 0)
            return;
        // A layer that learns inside is worth what it does to the chunk that it reads.
        const auto after = session.losses_after(ks, inside_ ? 1 : horizon,
                                                options_.text("gate.loss") == "ponder", guard);
        GateSample sample;
        sample.features = session.features();
        for (size_t k = 0; k < kinds; ++k) {
            sample.later[k] = after[k].later;
            sample.own[k] = std::isfinite(after[k].own) ? after[k].own : 0;
        }
        to.samples.push_back(std::move(sample));
    };
    for (uint64_t at = 0; at < chunks; ++at) {
        if (!session.score(guard))
            break;
        if (!inside_)
            try_now();
        const bool update = random.uniform() < 1 - 0.75 * double(at) / double(chunks);
        session.learn(update ? 1 : 0, guard);
        if (inside_)
            try_now();
        const ponder_record &record = session.records().back();
        to.loss += record.loss_before * record.predictions;
        to.first += at == 0 ? record.loss_before : 0;
        to.predictions += record.predictions;
        to.flops += record.flops;
        to.chunks += 1;
        to.steps += uint64_t(record.steps);
        check();
    }
    return to;
}

// Features and gains in units of what was seen.
void GateTrainer::normalise() {
    const size_t inputs = feature_count(gate_->features);
    for (size_t i = 0; i < inputs; ++i) {
        double count = 0, mean = 0, square = 0;
        for (const GateSample &sample : seen_)
            if (const double x = sample.features[i]; std::isfinite(x)) {
                count += 1;
                const double before = x - mean;
                mean += before / count;
                square += before * (x - mean);
            }
        gate_->mean[i] = float(mean);
        gate_->deviation[i] = float(std::max(std::sqrt(square / std::max(count, 1.0)), 1e-6));
    }
    double square = 0;
    for (const GateSample &sample : seen_)
        square += std::pow(sample.later[0] - sample.later[1], 2) / double(seen_.size());
    gate_->value_unit = std::max(std::sqrt(square), 1e-6);
}

double GateTrainer::temperature() const {
    const double share = std::min(1.0, double(steps_) / double(options_.integer("train.steps")));
    const double first = options_.number("gate.temperature"),
                 last = options_.number("gate.temperature_end");
    return first * std::pow(last / first, share);
}

double GateTrainer::learning_rate() const {
    const double share = std::min(1.0, double(steps_) / double(options_.integer("train.steps")));
    const double end = options_.number("train.end");
    return options_.number("train.lr") *
           (end + (1 - end) * 0.5 * (1 + std::cos(std::numbers::pi * share)));
}

GateObjective GateTrainer::objective() const {
    GateObjective objective;
    objective.ponder = options_.text("gate.loss") == "ponder";
    objective.beta = options_.number("gate.beta");
    objective.gamma = options_.number("gate.gamma");
    objective.target = options_.number("gate.target");
    objective.temperature = temperature();
    const double prior = double(options_.integer("gate.prior")), count = double(seen_.size());
    objective.trust = count / std::max(count + prior, 1.0);
    for (size_t k = 1; k < choices(gate_->form); ++k)
        for (const GateSample &sample : seen_)
            objective.mean_gain[k - 1] +=
                (sample.later[0] - sample.later[k]) / gate_->value_unit / count;
    return objective;
}

// AdamW (Loshchilov & Hutter 2019) on minibatches of everything measured so far.
GateTrainer::Fit GateTrainer::fit() {
    const GateObjective objective = this->objective();
    const double rate = learning_rate(), beta1 = options_.number("train.beta1"),
                 beta2 = options_.number("train.beta2"), epsilon = options_.number("train.epsilon"),
                 decay = options_.number("train.decay"), clip = options_.number("train.clip");
    const int64_t rounds = options_.integer("gate.replay");
    Fit mean{};
    const std::span<double> w = gate_->net.parameters();
    std::vector<double> gradient(w.size());
    for (int64_t round = 0; round < rounds; ++round) {
        std::vector<const GateSample *> batch;
        for (size_t i = 0; i < std::min(minibatch, seen_.size()); ++i)
            batch.push_back(&seen_[random_.next() % seen_.size()]);
        std::fill(gradient.begin(), gradient.end(), 0.0);
        const GateLoss loss = gate_loss(*gate_, batch, objective, random_, gradient);
        double norm = 0;
        for (double g : gradient)
            norm += g * g;
        norm = std::sqrt(norm);
        const double factor = clip > 0 ? std::min(1.0, clip / (norm + 1e-6)) : 1;
        updates_ += 1;
        const double c1 = 1 - std::pow(beta1, double(updates_)),
                     c2 = 1 - std::pow(beta2, double(updates_));
        for (const GateNet::Part &part : gate_->net.parts())
            for (size_t i = part.offset; i < part.offset + part.count(); ++i) {
                const double g = factor * gradient[i];
                first_[i] = beta1 * first_[i] + (1 - beta1) * g;
                second_[i] = beta2 * second_[i] + (1 - beta2) * g * g;
                const double step = first_[i] / c1 / (std::sqrt(second_[i] / c2) + epsilon);
                w[i] -= rate * (step + (part.shape.size() > 1 ? decay * w[i] : 0));
            }
        mean.loss += loss.loss / double(rounds);
        mean.cost += loss.cost / double(rounds);
        mean.norm += norm / double(rounds);
    }
    return mean;
}

// Of all processes, in the order of their streams.
GateTrainer::Measured GateTrainer::of_all(std::span<const Measured> own, const CallGuard &guard) {
    struct Counts {
        uint64_t predictions, flops, chunks, steps;
        double loss, first;
    };
    std::vector<Counts> counts;
    std::vector<double> numbers;
    for (const Measured &one : own) {
        counts.push_back({one.predictions, one.flops, one.chunks, one.steps, one.loss, one.first});
        for (const GateSample &sample : one.samples) {
            numbers.insert(numbers.end(), sample.features.begin(), sample.features.end());
            numbers.insert(numbers.end(), sample.later.begin(), sample.later.end());
            numbers.insert(numbers.end(), sample.own.begin(), sample.own.end());
        }
    }
    Measured all;
    for (const Counts &one : peers_.gather<Counts>(counts, guard)) {
        all.predictions += one.predictions;
        all.flops += one.flops;
        all.chunks += one.chunks;
        all.steps += one.steps;
        all.loss += one.loss;
        all.first += one.first;
    }
    numbers = peers_.gather<double>(numbers, guard);
    const size_t inputs = feature_count(gate_->features);
    for (auto at = numbers.begin(); at != numbers.end();) {
        GateSample &sample = all.samples.emplace_back();
        sample.features.assign(at, at + std::ptrdiff_t(inputs));
        at += std::ptrdiff_t(inputs);
        for (auto *values : {&sample.later, &sample.own}) {
            std::copy_n(at, values->size(), values->begin());
            at += std::ptrdiff_t(values->size());
        }
    }
    return all;
}

ponder_train_record GateTrainer::step(std::span<const ponder_stream> streams,
                                      const CallGuard &guard) {
    const uint64_t start = now_ns();
    check_streams(streams, model_->backbone().config().vocabulary);
    Random random = random_;
    std::vector<Random> randoms;
    for (size_t s = 0; s < streams.size(); ++s)
        randoms.emplace_back(random.next());
    const Peers::Share mine = peers_.share(streams.size());
    const size_t count = mine.end - mine.begin;
    std::vector<Measured> measured(count);
    std::atomic<uint64_t> done{0};
    const auto check = [&] {
        guard.check();
        guard.progress(done, count);
    };
    peers_.together(steps_, guard, [&] {
        check(); // other threads may take all of the work
        model_->runtime().threads->run_throwing(uint32_t(count), [&](uint32_t i, uint32_t) {
            measured[i] = measure(streams[mine.begin + i], randoms[mine.begin + i], guard, check);
            ++done;
        });
        guard.finished(count);
    });
    const Measured found = of_all(measured, guard);
    // Nothing was changed up to here, and nothing fails from here on.
    random_ = random;
    steps_ += 1;
    ponder_train_record r = empty_record();
    for (const GateSample &sample : found.samples)
        if (std::all_of(sample.later.begin(), sample.later.end(),
                        [](double x) { return std::isfinite(x); }))
            seen_.push_back(sample);
        else
            r.flags |= PONDER_TRAIN_NOT_FINITE;
    r.learning_rate = learning_rate();
    if (options_.text("gate.loss") == "ponder")
        r.temperature = temperature();
    if (!seen_.empty()) {
        normalise();
        const Fit mean = fit();
        gate_->seal();
        r.gradient_norm = mean.norm;
        r.loss = mean.loss;
        if (options_.text("gate.loss") == "ponder")
            r.cost = mean.cost;
    }
    r.step = steps_;
    r.tokens = found.predictions;
    r.loss_first = found.first / double(streams.size());
    r.flops = found.flops;
    r.ns = now_ns() - start;
    r.tokens_per_second = double(found.predictions) * 1e9 / double(std::max<uint64_t>(r.ns, 1));
    return r;
}

// With thresholds from the samples themselves; ponder_calibrate fits better ones.
void GateTrainer::export_to(const std::string &folder) const {
    Gate gate = *gate_;
    std::vector<std::vector<double>> outputs;
    for (const GateSample &sample : seen_)
        outputs.push_back(gate.evaluate(sample.features));
    if (!outputs.empty())
        fit_thresholds(gate, outputs, gate.calibration);
    save_gate(folder_, folder, gate);
}

// Counts, random state, parameters, moments, samples: one vector of numbers.
std::vector<double> GateTrainer::numbers() const {
    std::vector<double> v{double(steps_), double(updates_), double(seen_.size())};
    for (uint64_t word : random_.state) { // halves: a double holds 53 bits
        v.push_back(double(word >> 32));
        v.push_back(double(word & 0xffffffffu));
    }
    for (const auto values : {gate_->net.parameters(), std::span<double>(gate_->mean),
                              std::span<double>(gate_->deviation)})
        v.insert(v.end(), values.begin(), values.end());
    v.push_back(gate_->value_unit);
    for (const auto *values : {&first_, &second_})
        v.insert(v.end(), values->begin(), values->end());
    for (const GateSample &sample : seen_) {
        v.insert(v.end(), sample.features.begin(), sample.features.end());
        v.insert(v.end(), sample.later.begin(), sample.later.end());
        v.insert(v.end(), sample.own.begin(), sample.own.end());
    }
    return v;
}

void GateTrainer::write(SafeTensorsWriter &writer) const {
    written_ = numbers();
    writer.add("gate", DType::f64, {int64_t(written_.size())}, written_.data());
}

void GateTrainer::read(const SafeTensors &file) {
    const TensorInfo *info = file.find("gate");
    if (!info || info->dtype != "F64" || info->shape.size() != 1)
        throw_error(PONDER_E_FORMAT, "%s: no state of a gate's training", file.name().c_str());
    std::vector<double> v(info->count());
    const std::vector<std::byte> bytes = file.raw("gate"); // features may be NaN
    std::memcpy(v.data(), bytes.data(), bytes.size());
    const size_t inputs = feature_count(gate_->features), weights = first_.size(), words = 8;
    const size_t fixed = 3 + words + 3 * weights + 2 * inputs + 1;
    const size_t each = inputs + 2 * (1 + gate_step_count);
    if (v.size() < fixed || (v.size() - fixed) % each != 0 ||
        v[2] != double((v.size() - fixed) / each) || !(v[0] >= 0 && v[0] < 0x1p53) ||
        !(v[1] >= 0 && v[1] < 0x1p53))
        throw_error(PONDER_E_FORMAT, "%s: tensor 'gate' has %zu numbers", file.name().c_str(),
                    v.size());
    const double *at = v.data() + 3;
    std::array<uint64_t, 4> state;
    for (uint64_t &word : state) {
        for (int i = 0; i < 2; ++i)
            if (!(at[i] >= 0 && at[i] < 0x1p32))
                throw_error(PONDER_E_FORMAT, "%s: tensor 'gate': no random state",
                            file.name().c_str());
        word = uint64_t(at[0]) << 32 | uint64_t(at[1]);
        at += 2;
    }
    for (const double *p = at; p < v.data() + fixed; ++p)
        if (!std::isfinite(*p))
            throw_error(PONDER_E_FORMAT, "%s: tensor 'gate' is not finite", file.name().c_str());
    steps_ = uint64_t(v[0]);
    updates_ = uint64_t(v[1]);
    random_.state = state;
    const auto take = [&](std::span<double> to) {
        std::copy_n(at, to.size(), to.begin());
        at += to.size();
    };
    take(gate_->net.parameters());
    take(gate_->mean);
    take(gate_->deviation);
    take({&gate_->value_unit, 1});
    take(first_);
    take(second_);
    seen_.assign(size_t(v[2]), {});
    for (GateSample &sample : seen_) {
        sample.features.resize(inputs);
        take(sample.features);
        take(sample.later);
        take(sample.own);
    }
    gate_->seal();
}

} // namespace ponder
