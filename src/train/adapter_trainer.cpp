#include "train/adapter_trainer.hpp"

#include "adapt/stored.hpp"
#include "base/error.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <exception>

namespace ponder {

namespace {

// Untrained decay towards the initial fast weights: 0.1 % of the distance a step.
constexpr float initial_decay = -6.9f;

bool is_matrix(const Shape &shape) {
    int wide = 0;
    for (int i = 0; i < shape.rank; ++i)
        wide += shape[i] > 1;
    return wide > 1;
}

// Meta-augmentation (Rajendran et al. 2020, arXiv 2007.05549): a stream under a random change of
// ids cannot be predicted from the initial weights alone, only by learning from its beginning. The
// share of ids that move is uniform in 0..most.
std::vector<int32_t> permuted(const ponder_stream &stream, int64_t vocabulary, double most,
                              Random random) {
    std::vector<int32_t> map(static_cast<size_t>(vocabulary)), moving;
    const double share = most * random.uniform();
    for (int32_t id = 0; id < vocabulary; ++id) {
        map[size_t(id)] = id;
        if (random.uniform() < share)
            moving.push_back(id);
    }
    for (size_t i = moving.size(); i > 1; --i)
        std::swap(map[size_t(moving[i - 1])], map[size_t(moving[random.next() % i])]);
    std::vector<int32_t> ids(stream.count);
    for (size_t i = 0; i < ids.size(); ++i)
        ids[i] = map[size_t(stream.ids[i])];
    return ids;
}

// A static adapter takes no inner steps: a TTT layer stores that it has none.
Options training_options(const Options &given) {
    Options options = with_stored_options(given);
    if (!options.boolean("train.inner"))
        options.set_default("ttt.learns", "0");
    return options;
}

// What a record tells of a stream.
struct Found {
    double loss, first, reconstruction;
    uint64_t predictions, chunks, steps, flops;
};

} // namespace

AdapterTrainer::AdapterTrainer(std::shared_ptr<const Model> model, const Options &options)
    : Trainer(std::move(model), "adapter", training_options(options)) {
    const Gpt2 &backbone = model_->backbone();
    adapter_ = make_adapter(backbone.config(), options_, backbone.hash());
    if (adapter_->fast_count() == 0)
        throw_error(PONDER_E_ARGUMENT, "option 'adapter' is '%s': nothing to train",
                    options_.text("adapter").c_str());
    const Runtime &runtime = model_->runtime();
    const auto open = [&] {
        return std::make_shared<Device>(runtime.backend(model_->device()->backend().name),
                                        runtime.memory, runtime.threads, runtime.log);
    };
    device_ = open();
    const bool between = !adapter_->learns_inside(), inner = options_.boolean("train.inner");
    const size_t n = adapter_->fast_count();
    const double rates = between && inner ? options_.number("train.rate_lr") : 0;
    std::vector<Outer::Segment> segments{{n, 1, true},
                                         {adapter_->fast_tensors().size(), rates, false},
                                         {adapter_->groups(), rates, false}};
    for (const auto &[name, slow] : adapter_->slow())
        segments.push_back({size_t(slow.shape.count()), 1, is_matrix(slow.shape)});
    outer_ = std::make_unique<Outer>(options_, device_, std::move(segments));
    if (outer_->averages())
        average_ = make_adapter(backbone.config(), options_, backbone.hash());

    values_.resize(outer_->count());
    const Parts values = parts(values_);
    Random random(uint64_t(options_.integer("seed")));
    adapter_->initial(values.fast, random);
    if (adapter_->rates().log_rate.empty()) {
        std::fill(values.log_rate.begin(), values.log_rate.end(), 0.0f);
        std::fill(values.decay.begin(), values.decay.end(), initial_decay);
    } else {
        std::copy_n(adapter_->rates().log_rate.begin(), values.log_rate.size(),
                    values.log_rate.begin());
        std::copy_n(adapter_->rates().decay.begin(), values.decay.size(), values.decay.begin());
    }
    float *slow_value = values.slow.data();
    for (const auto &[name, slow] : adapter_->slow())
        slow_value = std::copy(slow.values.begin(), slow.values.end(), slow_value);

    rate_.resize(n);
    keep_.resize(n);
    lanes_.resize(device_->on_host() ? 1 : runtime.threads->count());
    for (Lane &l : lanes_) {
        l.device = &l == &lanes_[0] ? device_ : open();
        l.learned = DeviceVector<float>(l.device, 3 * n);
        float *const rate = l.learned.data();
        l.unroll =
            std::make_unique<Unroll<float>>(backbone, *adapter_, options_, l.device,
                                            LearnedRates<float>{rate, rate + n, rate + 2 * n});
    }
    for (uint32_t i = 0; i < runtime.threads->count(); ++i)
        work_.push_back(lane(i).unroll->make_work());
    spread();
}

AdapterTrainer::Parts AdapterTrainer::parts(std::span<float> all) const {
    const auto take = [&](size_t count) {
        const std::span<float> part = all.first(count);
        all = all.subspan(count);
        return part;
    };
    const std::span<float> fast = take(adapter_->fast_count());
    const std::span<float> log_rate = take(adapter_->fast_tensors().size());
    const std::span<float> decay = take(adapter_->groups());
    return {fast, log_rate, decay, all};
}

void AdapterTrainer::put(const Parts &values, Adapter &to) {
    to.store_rates({{values.log_rate.begin(), values.log_rate.end()},
                    {values.decay.begin(), values.decay.end()}});
    const float *from = values.slow.data();
    for (const auto &[name, slow] : to.slow()) {
        std::copy_n(from, slow.values.size(), to.slow_values(name).begin());
        from += slow.values.size();
    }
}

// From values_ to everything that follows from it.
void AdapterTrainer::spread() {
    const Parts values = parts(values_);
    for (float &x : values.log_rate)
        x = std::clamp(x, -20.0f, 20.0f);
    for (float &x : values.decay)
        x = std::clamp(x, -20.0f, 20.0f);
    outer_->write_values(values_);
    put(values, *adapter_);
    adapter_->expand_rates(options_.number("inner.lr"), rate_, keep_);
    for (const Lane &l : lanes_) {
        const size_t n = rate_.size();
        l.learned.write(rate_.data(), n);
        l.learned.write(keep_.data(), n, n);
        l.learned.write(values.fast.data(), n, 2 * n);
    }
    for (const auto &[name, slow] : adapter_->slow())
        for (const Lane &l : lanes_)
            l.device->refresh(slow.values.data());
}

// The streams' part in the mean gradient, each weighing as many predictions as it has. Sums run in
// the order of the streams, whoever computed them.
void AdapterTrainer::collect(std::span<const Unroll<float>::Result> results, double predictions) {
    std::vector<float> gradient(outer_->count());
    const Parts to = parts(gradient);
    std::vector<double> log_rate(to.log_rate.size()), decay(to.decay.size());
    const std::vector<FastTensor> &fast = adapter_->fast_tensors();
    for (const auto &r : results) {
        const double share = double(r.predictions) / predictions;
        for (size_t i = 0; i < to.fast.size(); ++i)
            to.fast[i] += float(share) * r.fast[i];
        for (size_t i = 0; i < to.slow.size(); ++i)
            to.slow[i] += float(share) * r.slow[i];
        // rate = inner.lr exp(log_rate), keep = 1 - s(decay)
        for (size_t t = 0; t < fast.size(); ++t) {
            double rate = 0, keep = 0;
            for (size_t i = fast[t].offset; i < fast[t].offset + fast[t].count(); ++i) {
                rate += double(r.rate[i]) * double(rate_[i]);
                keep += double(r.keep[i]);
            }
            const double kept = double(keep_[fast[t].offset]);
            log_rate[t] += share * rate;
            decay[fast[t].group] -= share * keep * kept * (1 - kept);
        }
    }
    std::copy(log_rate.begin(), log_rate.end(), to.log_rate.begin());
    std::copy(decay.begin(), decay.end(), to.decay.begin());
    outer_->write_gradient(gradient);
}

ponder_train_record AdapterTrainer::step(std::span<const ponder_stream> streams,
                                         const CallGuard &guard) {
    check_streams(streams, model_->backbone().config().vocabulary);
    for (size_t s = 0; s < streams.size(); ++s)
        if (lanes_[0].unroll->chunks_of(streams[s].count) < 2)
            throw_error(PONDER_E_ARGUMENT, "streams[%zu]: %zu tokens are less than two chunks", s,
                        streams[s].count);
    const uint64_t start = now_ns();
    const double permute = options_.number("train.permute");
    const uint64_t seed = uint64_t(options_.integer("seed")) + 0x9e3779b97f4a7c15u * (steps() + 1);
    const Peers::Share mine = peers_.share(streams.size());
    const size_t count = mine.end - mine.begin;
    std::vector<Unroll<float>::Result> results(count);
    std::atomic<uint64_t> done{0}; // streams
    const auto check = [&] {
        guard.check();
        guard.progress(done, count);
    };
    peers_.together(steps(), guard, [&] {
        check(); // other threads may take all of the work
        device_->threads().run_throwing(uint32_t(count), [&](uint32_t i, uint32_t worker) {
            check();
            const size_t s = mine.begin + i;
            const std::span<const int32_t> ids{streams[s].ids, streams[s].count};
            std::vector<int32_t> changed;
            if (permute > 0)
                changed = permuted(streams[s], model_->backbone().config().vocabulary, permute,
                                   Random(seed + s));
            results[i] = lane(worker).unroll->run(
                permute > 0 ? std::span<const int32_t>(changed) : ids, *work_[worker], check);
            ++done;
        });
        guard.finished(count);
    });
    std::vector<Found> own;
    for (const auto &r : results)
        own.push_back(
            {r.loss, r.first, r.reconstruction, r.predictions, r.chunks, r.steps, r.flops});
    const std::vector<Found> found = peers_.gather<Found>(own, guard);
    uint64_t predictions = 0;
    for (const Found &f : found)
        predictions += f.predictions;
    collect(results, double(predictions));
    outer_->sum_gradient(peers_, guard);
    ponder_train_record r = empty_record();
    const Outer::Taken taken = outer_->step();
    if (taken.finite) {
        values_ = outer_->read_values();
        spread();
    } else {
        r.flags |= PONDER_TRAIN_NOT_FINITE;
    }
    uint64_t chunks = 0, steps = 0;
    double first = 0, reconstruction = 0;
    for (const Found &result : found) {
        r.tokens += result.predictions;
        r.loss += result.loss * double(result.predictions);
        r.flops += result.flops;
        first += result.first;
        reconstruction += result.reconstruction;
        chunks += result.chunks;
        steps += result.steps;
    }
    r.step = outer_->steps();
    r.loss /= double(r.tokens);
    r.loss_first = first / double(found.size());
    if (adapter_->learns_inside())
        r.reconstruction = reconstruction / double(found.size());
    r.gradient_norm = taken.norm;
    r.learning_rate = taken.rate;
    double log_sum = 0;
    for (float x : parts(values_).log_rate)
        log_sum += double(x);
    if (!adapter_->learns_inside())
        r.inner_rate = options_.number("inner.lr") *
                       std::exp(log_sum / double(adapter_->fast_tensors().size()));
    r.cost = double(steps) / double(chunks);
    r.ns = now_ns() - start;
    uint64_t tokens = 0;
    for (const ponder_stream &stream : streams)
        tokens += stream.count;
    r.tokens_per_second = double(tokens) * 1e9 / double(std::max<uint64_t>(r.ns, 1));
    return r;
}

void AdapterTrainer::export_to(const std::string &folder) const {
    std::vector<float> all = average_ ? outer_->read_average() : values_;
    const Parts values = parts(all);
    if (average_)
        put(values, *average_);
    save_adapter(folder, adapter_kind(options_), model_->backbone().hash(), options_,
                 average_ ? *average_ : *adapter_, values.fast);
}

void AdapterTrainer::write(SafeTensorsWriter &writer) const { outer_->write(writer); }

void AdapterTrainer::read(const SafeTensors &file) {
    outer_->read(file);
    values_ = outer_->read_values();
    spread();
}

} // namespace ponder
