#include "adapt/update_rule.hpp"

#include "base/options.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>

namespace ponder {

namespace {

void put(Program::Bindings &at, Id id, const void *address) {
    if (id != none)
        at[size_t(id)] = const_cast<void *>(address);
}

} // namespace

// The inputs of a step as externals.
template <class T> Step UpdateRuleOf<T>::record(Graph &g) const {
    const Shape flat{int64_t(count_)};
    const auto vector = [&](const char *name) { return g.external(name, g.wide, flat); };
    Step s{};
    s.w = vector("weights");
    s.g = vector("gradient");
    s.m = adam_ ? vector("first moment") : none;
    s.v = adam_ ? vector("second moment") : none;
    s.h = g.external("hyperparameters", g.wide, {8});
    if (learned_.rate) {
        s.rate = vector("rates");
        s.keep = vector("keep");
        s.start = vector("start");
    }
    s.norm = ponder::norm(g, s.g, none);
    g.expose(s.norm, "gradient norm");
    return s;
}

template <class T>
UpdateRuleOf<T>::UpdateRuleOf(const Options &options, size_t count,
                              std::shared_ptr<const Device> device, LearnedRates<T> learned,
                              bool serial)
    : device_(device), adam_(options.text("inner.optimizer") == "adam"),
      lr_(options.number("inner.lr")), beta1_(options.number("inner.beta1")),
      beta2_(options.number("inner.beta2")), epsilon_(options.number("inner.epsilon")),
      clip_(options.number("inner.clip")), count_(count), learned_(learned), serial_(serial) {
    const DType type = sizeof(T) == 8 ? DType::f64 : DType::f32;
    const Shape flat{int64_t(count)};
    const auto program = [&](Graph g) {
        const size_t end = g.calls().size();
        return std::make_unique<Program>(std::move(g), std::vector{end}, device);
    };
    {
        Graph g(type);
        const auto vector = [&](const char *name) { return g.external(name, g.wide, flat); };
        step_.in = record(g);
        step_.w2 = vector("new weights");
        if (adam_) {
            step_.m2 = vector("new first moment");
            step_.v2 = vector("new second moment");
            adam(g, step_.in, step_.w2, step_.m2, step_.v2);
        } else {
            sgd(g, step_.in, step_.w2);
        }
        step_program_ = program(std::move(g));
    }
    if (learned_.rate) {
        Graph g(type);
        const auto vector = [&](const char *name) { return g.external(name, g.wide, flat); };
        vjp_.in = record(g);
        vjp_.dw2 = vector("adjoint of new weights");
        vjp_.to = {vector("dw"),    vector("dg"),    none, none, vector("drate"),
                   vector("dkeep"), vector("dstart")};
        if (adam_) {
            vjp_.dm2 = vector("adjoint of first moment");
            vjp_.dv2 = vector("adjoint of second moment");
            vjp_.to.m = vector("dm");
            vjp_.to.v = vector("dv");
            adam_vjp(g, vjp_.in, vjp_.dw2, vjp_.dm2, vjp_.dv2, vjp_.to);
        } else {
            sgd_vjp(g, vjp_.in, vjp_.dw2, vjp_.to);
        }
        vjp_program_ = program(std::move(g));
    }
    const auto norm_program = [&](auto &ids, bool difference) {
        Graph g(type);
        ids.a = g.external("a", g.wide, flat);
        ids.b = difference ? g.external("b", g.wide, flat) : none;
        ids.out = ponder::norm(g, ids.a, ids.b);
        g.expose(ids.out, "norm");
        return program(std::move(g));
    };
    distance_program_ = norm_program(distance_, true);
    norm_program_ = norm_program(norm_, false);
    {
        Graph g(type);
        rescale_.from = g.external("from", g.wide, flat);
        rescale_.to = g.external("to", g.wide, flat);
        rescale_.scale = g.external("scale", g.wide, {1});
        rescale_.difference = mul(g, sub(g, rescale_.to, rescale_.from), rescale_.scale);
        rescale_.out = add(g, rescale_.from, rescale_.difference, g.wide);
        for (const Call &call : g.calls())
            g.expose(call.out[0], "scaled difference");
        rescale_program_ = program(std::move(g));
    }
}

template <class T> std::array<T, 8> UpdateRuleOf<T>::hyperparameters(uint64_t step) const {
    const double correction1 = 1 - std::pow(beta1_, double(step));
    const double correction2 = 1 - std::pow(beta2_, double(step));
    return {T(lr_), T(beta1_), T(beta2_), T(epsilon_), T(correction1), T(correction2), T(clip_), 0};
}

template <class T>
void UpdateRuleOf<T>::bind(Program::Bindings &at, const Step &ids, const State &old,
                           const T *gradient, const T *h, const T *norm) const {
    put(at, ids.w, old.weights);
    put(at, ids.m, old.first_moment);
    put(at, ids.v, old.second_moment);
    put(at, ids.g, gradient);
    put(at, ids.h, h);
    put(at, ids.norm, norm);
    put(at, ids.rate, learned_.rate);
    put(at, ids.keep, learned_.keep);
    put(at, ids.start, learned_.start);
}

template <class T>
void UpdateRuleOf<T>::run(const Program &program, const Program::Bindings &at,
                          std::byte *workspace) const {
    workspace += sizeof(Scalars);
    if (serial_)
        program.run_serial(0, at, nullptr, workspace, nullptr);
    else
        program.run(0, at, nullptr, workspace, nullptr);
}

template <class T>
Program::Bindings UpdateRuleOf<T>::of_step(const State &old, const State &fresh, const T *gradient,
                                           const T *h, T *norm) const {
    Program::Bindings at(step_program_->graph().values().size());
    bind(at, step_.in, old, gradient, h, norm);
    put(at, step_.w2, fresh.weights);
    put(at, step_.m2, fresh.first_moment);
    put(at, step_.v2, fresh.second_moment);
    return at;
}

template <class T>
void UpdateRuleOf<T>::step(const State &old, const State &fresh, const T *gradient, uint64_t step,
                           std::byte *workspace) const {
    Scalars *const at_front = scalars(workspace);
    const std::array<T, 8> h = hyperparameters(step);
    device_->upload(at_front->h, h.data(), sizeof h);
    run(*step_program_, of_step(old, fresh, gradient, at_front->h, &at_front->norm), workspace);
}

template <class T>
void UpdateRuleOf<T>::enqueue_step(const State &old, const State &fresh, const T *gradient,
                                   const T *h, T *norm, std::byte *workspace,
                                   const Device::Queue &queue) const {
    step_program_->enqueue(0, of_step(old, fresh, gradient, h, norm), nullptr,
                           workspace + sizeof(Scalars), queue);
}

template <class T>
void UpdateRuleOf<T>::vjp(const State &old, const T *gradient, uint64_t step, const State &after,
                          const State &before, const Adjoint &to, std::byte *workspace) const {
    Scalars *const at_front = scalars(workspace);
    const std::array<T, 8> h = hyperparameters(step);
    device_->upload(at_front->h, h.data(), sizeof h);
    Program::Bindings at(vjp_program_->graph().values().size());
    bind(at, vjp_.in, old, gradient, at_front->h, &at_front->norm);
    put(at, vjp_.dw2, after.weights);
    put(at, vjp_.dm2, after.first_moment);
    put(at, vjp_.dv2, after.second_moment);
    put(at, vjp_.to.w, before.weights);
    put(at, vjp_.to.m, before.first_moment);
    put(at, vjp_.to.v, before.second_moment);
    put(at, vjp_.to.g, to.gradient);
    put(at, vjp_.to.rate, to.rate);
    put(at, vjp_.to.keep, to.keep);
    put(at, vjp_.to.start, to.start);
    run(*vjp_program_, at, workspace);
}

template <class T>
Program::Bindings UpdateRuleOf<T>::of_distance(const T *a, const T *b, T *distance) const {
    Program::Bindings at(distance_program_->graph().values().size());
    put(at, distance_.a, a);
    put(at, distance_.b, b);
    put(at, distance_.out, distance);
    return at;
}

template <class T>
void UpdateRuleOf<T>::distance(const T *a, const T *b, std::byte *workspace) const {
    run(*distance_program_, of_distance(a, b, &scalars(workspace)->distance), workspace);
}

template <class T>
void UpdateRuleOf<T>::enqueue_distance(const T *a, const T *b, T *distance, std::byte *workspace,
                                       const Device::Queue &queue) const {
    distance_program_->enqueue(0, of_distance(a, b, distance), nullptr,
                               workspace + sizeof(Scalars), queue);
}

template <class T> void UpdateRuleOf<T>::hyperparameters(GateCall &call) const {
    call.lr = lr_;
    call.beta1 = beta1_;
    call.beta2 = beta2_;
    call.epsilon = epsilon_;
    call.clip = clip_;
}

template <class T> void UpdateRuleOf<T>::norm(const T *a, std::byte *workspace) const {
    Program::Bindings at(norm_program_->graph().values().size());
    put(at, norm_.a, a);
    put(at, norm_.out, &scalars(workspace)->norm);
    run(*norm_program_, at, workspace);
}

template <class T>
void UpdateRuleOf<T>::rescale(const T *from, T *to, double scale, T *scratch,
                              std::byte *workspace) const {
    const T factor = T(scale);
    device_->upload(&scalars(workspace)->scale, &factor, sizeof factor);
    const std::vector<Call> &calls = rescale_program_->graph().calls();
    Program::Bindings at(rescale_program_->graph().values().size());
    put(at, rescale_.from, from);
    put(at, rescale_.to, to);
    put(at, rescale_.scale, &scalars(workspace)->scale);
    put(at, calls[0].out[0], to);
    put(at, rescale_.difference, scratch);
    put(at, rescale_.out, to);
    run(*rescale_program_, at, workspace);
}

template <class T>
typename UpdateRuleOf<T>::Numbers UpdateRuleOf<T>::numbers(std::byte *workspace) const {
    T both[2];
    static_assert(offsetof(Scalars, distance) == offsetof(Scalars, norm) + sizeof(T));
    device_->download(both, &scalars(workspace)->norm, sizeof both);
    return {double(both[0]), double(both[1])};
}

template <class T> size_t UpdateRuleOf<T>::workspace_bytes() const {
    return sizeof(Scalars) +
           std::max({step_program_->workspace_bytes(), distance_program_->workspace_bytes(),
                     norm_program_->workspace_bytes(), rescale_program_->workspace_bytes(),
                     vjp_program_ ? vjp_program_->workspace_bytes() : 0});
}

template class UpdateRuleOf<float>;
template class UpdateRuleOf<double>;

} // namespace ponder
