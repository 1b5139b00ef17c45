#include "train/outer.hpp"

#include "base/error.hpp"
#include "base/options.hpp"
#include "formats/safetensors.hpp"
#include "train/peers.hpp"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <numbers>

namespace ponder {

Outer::Outer(const Options &options, std::shared_ptr<const Device> device,
             std::vector<Segment> segments)
    : lr_(options.number("train.lr")), end_(options.number("train.end")),
      beta1_(options.number("train.beta1")), beta2_(options.number("train.beta2")),
      epsilon_(options.number("train.epsilon")), decay_(options.number("train.decay")),
      clip_(options.number("train.clip")), average_(options.number("train.average")),
      schedule_(uint64_t(options.integer("train.steps"))),
      warmup_(uint64_t(options.integer("train.warmup"))), device_(device),
      segments_(std::move(segments)) {
    for (const Segment &segment : segments_)
        count_ += segment.count;
    data_ = DeviceVector<float>(device, (averages() ? 5 : 4) * count_);
    scalars_ = DeviceVector<float>(device, 16 * (1 + segments_.size()));
    const Shape all{int64_t(std::max<size_t>(count_, 1))};
    size_t workspace = 0;
    const auto program = [&](Graph g) {
        const size_t end = g.calls().size();
        auto made = std::make_unique<Program>(std::move(g), std::vector{end}, device);
        workspace = std::max(workspace, made->workspace_bytes());
        return made;
    };
    for (const Segment &segment : segments_) {
        Graph g(DType::f32);
        const auto vector = [&](const char *name) {
            return g.external(name, g.wide, {int64_t(std::max<size_t>(segment.count, 1))});
        };
        Update u{};
        u.in.w = vector("values");
        u.in.g = vector("gradient");
        u.in.m = vector("first moment");
        u.in.v = vector("second moment");
        u.in.h = g.external("hyperparameters", g.wide, {8});
        u.in.norm = g.external("gradient norm", g.wide, {1});
        u.w2 = vector("new values");
        u.m2 = vector("new first moment");
        u.v2 = vector("new second moment");
        adamw(g, u.in, u.w2, u.m2, u.v2);
        u.program = program(std::move(g));
        updates_.push_back(std::move(u));
    }
    Graph g(DType::f32);
    norm_.a = g.external("gradient", g.wide, all);
    norm_.out = norm(g, norm_.a, none);
    g.expose(norm_.out, "gradient norm");
    norm_.program = program(std::move(g));
    if (averages()) { // average -= share (average - values)
        Graph m(DType::f32);
        Step step{};
        step.w = mean_.average = m.external("average", m.wide, all);
        mean_.values = m.external("values", m.wide, all);
        step.g = mean_.difference = ponder::sub(m, mean_.average, mean_.values);
        m.expose(mean_.difference, "difference");
        step.h = mean_.h = m.external("hyperparameters", m.wide, {8});
        step.norm = mean_.norm = m.external("norm", m.wide, {1});
        mean_.out = m.external("new average", m.wide, all);
        sgd(m, step, mean_.out);
        mean_.program = program(std::move(m));
    }
    workspace_ = DeviceBuffer(device, workspace * device->workers());
}

std::vector<float> Outer::read_values() const {
    std::vector<float> result(count_);
    data_.read(result.data(), count_);
    return result;
}

std::vector<float> Outer::read_average() const {
    if (!averages() || steps_ == 0)
        return read_values();
    std::vector<float> result(count_);
    data_.read(result.data(), count_, 4 * count_);
    return result;
}

// The mean of all steps so far until there are 1 / (1 - average_) of them; from then on older ones
// fade. (Polyak & Juditsky 1992, "Acceleration of stochastic approximation by averaging")
void Outer::add_to_average() {
    const float h[8] = {float(std::max(1 - average_, 1 / double(steps_)))};
    scalars_.write(h, 8);
    Program::Bindings at(mean_.program->graph().values().size());
    at[size_t(mean_.average)] = at[size_t(mean_.out)] = average();
    at[size_t(mean_.values)] = values();
    at[size_t(mean_.difference)] = gradient();
    at[size_t(mean_.h)] = scalars_.data();
    at[size_t(mean_.norm)] = scalars_.data() + 8;
    mean_.program->run(0, at, nullptr, workspace_.data(), nullptr);
}

double Outer::learning_rate(uint64_t step) const {
    if (step <= warmup_)
        return lr_ * double(step) / double(warmup_ + 1);
    const uint64_t length = schedule_ > warmup_ ? schedule_ - warmup_ : 1;
    const double share = std::min(1.0, double(step - warmup_) / double(length));
    return lr_ * (end_ + (1 - end_) * 0.5 * (1 + std::cos(std::numbers::pi * share)));
}

void Outer::sum_gradient(Peers &peers, const CallGuard &guard) {
    peers.sum(*device_, gradient(), count_, guard);
}

Outer::Taken Outer::step() {
    steps_ += 1;
    const double rate = learning_rate(steps_);
    float norm = 0;
    {
        Program::Bindings at(norm_.program->graph().values().size());
        at[size_t(norm_.a)] = gradient();
        at[size_t(norm_.out)] = scalars_.data();
        norm_.program->run(0, at, nullptr, workspace_.data(), nullptr);
        scalars_.read(&norm, 1);
    }
    const bool finite = std::isfinite(norm);
    size_t offset = 0;
    for (size_t i = 0; finite && i < segments_.size(); ++i) {
        const Segment &segment = segments_[i];
        const Update &u = updates_[i];
        if (segment.rate > 0 && segment.count > 0) {
            const float h[8] = {float(rate * segment.rate),
                                float(beta1_),
                                float(beta2_),
                                float(epsilon_),
                                float(1 - std::pow(beta1_, double(steps_))),
                                float(1 - std::pow(beta2_, double(steps_))),
                                float(clip_),
                                segment.decays ? float(decay_) : 0.0f};
            float *const at_h = scalars_.data() + 16 * (1 + i);
            scalars_.write(h, 8, 16 * (1 + i));
            Program::Bindings at(u.program->graph().values().size());
            const auto bind = [&](Id id, float *data) { at[size_t(id)] = data; };
            bind(u.in.w, values() + offset);
            bind(u.in.g, gradient() + offset);
            bind(u.in.m, first_moment() + offset);
            bind(u.in.v, second_moment() + offset);
            bind(u.in.h, at_h);
            bind(u.in.norm, scalars_.data());
            bind(u.w2, values() + offset);
            bind(u.m2, first_moment() + offset);
            bind(u.v2, second_moment() + offset);
            u.program->run(0, at, nullptr, workspace_.data(), nullptr);
        }
        offset += segment.count;
    }
    if (averages())
        add_to_average();
    return {double(norm), rate, finite};
}

void Outer::write(SafeTensorsWriter &writer) const {
    writer.metadata["steps"] = std::to_string(steps_);
    const std::vector<int64_t> shape{int64_t(count_)};
    written_ = data_.values();
    writer.add("outer.values", DType::f32, shape, written_.data());
    writer.add("outer.first_moment", DType::f32, shape, written_.data() + 2 * count_);
    writer.add("outer.second_moment", DType::f32, shape, written_.data() + 3 * count_);
    if (averages())
        writer.add("outer.average", DType::f32, shape, written_.data() + 4 * count_);
}

void Outer::read(const SafeTensors &file) {
    std::vector<float> fresh((averages() ? 4 : 3) * count_);
    const std::vector<int64_t> shape{int64_t(count_)};
    file.read("outer.values", shape, DType::f32, fresh.data());
    file.read("outer.first_moment", shape, DType::f32, fresh.data() + count_);
    file.read("outer.second_moment", shape, DType::f32, fresh.data() + 2 * count_);
    if (averages())
        file.read("outer.average", shape, DType::f32, fresh.data() + 3 * count_);
    uint64_t steps = 0;
    const auto text = file.metadata().find("steps");
    const char *end =
        text == file.metadata().end() ? nullptr : text->second.data() + text->second.size();
    if (!end || std::from_chars(text->second.data(), end, steps).ptr != end || steps > 1ull << 53)
        throw_error(PONDER_E_FORMAT, "%s: 'steps' is no count", file.name().c_str());
    for (float value : fresh)
        if (!std::isfinite(value))
            throw_error(PONDER_E_FORMAT, "%s: 'outer.*' is not finite", file.name().c_str());
    steps_ = steps;
    data_.write(fresh.data(), count_);
    data_.write(fresh.data() + count_, fresh.size() - count_, 2 * count_);
}

} // namespace ponder
