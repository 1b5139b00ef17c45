#include "adapt/update_rule.hpp"

#include "base/options.hpp"
#include "tensor/ops.hpp"

#include <algorithm>
#include <cmath>

namespace ponder {

UpdateRule::UpdateRule(const Options &options, size_t count, DType wide,
                       std::shared_ptr<const Device> device)
    : adam_(options.text("inner.optimizer") == "adam"), lr_(options.number("inner.lr")),
      beta1_(options.number("inner.beta1")), beta2_(options.number("inner.beta2")),
      epsilon_(options.number("inner.epsilon")), clip_(options.number("inner.clip")) {
    const Shape flat{int64_t(count)};
    {
        Graph g(wide);
        const auto vector = [&](const char *name) { return g.external(name, g.wide, flat); };
        step_.w = vector("weights");
        step_.g = vector("gradient");
        step_.h = g.external("hyperparameters", g.wide, {8});
        step_.norm = ponder::norm(g, step_.g, none);
        g.expose(step_.norm, "gradient norm");
        step_.w2 = vector("new weights");
        if (adam_) {
            step_.m = vector("first moment");
            step_.v = vector("second moment");
            step_.m2 = vector("new first moment");
            step_.v2 = vector("new second moment");
            adam(g, step_.w, step_.g, step_.m, step_.v, step_.h, step_.norm, step_.w2, step_.m2,
                 step_.v2);
        } else {
            sgd(g, step_.w, step_.g, step_.h, step_.norm, step_.w2);
        }
        const size_t end = g.calls().size();
        step_program_ = std::make_unique<Program>(std::move(g), std::vector{end}, device);
    }
    const auto norm_program = [&](auto &ids, bool difference) {
        Graph g(wide);
        ids.a = g.external("a", g.wide, flat);
        ids.b = difference ? g.external("b", g.wide, flat) : none;
        ids.out = ponder::norm(g, ids.a, ids.b);
        g.expose(ids.out, "norm");
        return std::make_unique<Program>(std::move(g), std::vector<size_t>{1}, device);
    };
    distance_program_ = norm_program(distance_, true);
    norm_program_ = norm_program(norm_, false);
}

double UpdateRule::step(const State &old, const State &fresh, const float *gradient, uint64_t step,
                        std::byte *workspace) {
    const float correction1 = float(1 - std::pow(beta1_, double(step)));
    const float correction2 = float(1 - std::pow(beta2_, double(step)));
    float h[8] = {float(lr_),  float(beta1_), float(beta2_), float(epsilon_),
                  correction1, correction2,   float(clip_),  0};
    float norm = 0;
    Program::Bindings at(step_program_->graph().values().size());
    const auto bind = [&](Id id, const void *address) {
        at[size_t(id)] = const_cast<void *>(address);
    };
    bind(step_.w, old.weights);
    bind(step_.g, gradient);
    bind(step_.h, h);
    bind(step_.w2, fresh.weights);
    bind(step_.norm, &norm);
    if (adam_) {
        bind(step_.m, old.first_moment);
        bind(step_.v, old.second_moment);
        bind(step_.m2, fresh.first_moment);
        bind(step_.v2, fresh.second_moment);
    }
    step_program_->run(0, at, nullptr, workspace, nullptr);
    return norm;
}

double UpdateRule::distance(const float *a, const float *b, std::byte *workspace) {
    float result = 0;
    Program::Bindings at(distance_program_->graph().values().size());
    at[size_t(distance_.a)] = const_cast<float *>(a);
    at[size_t(distance_.b)] = const_cast<float *>(b);
    at[size_t(distance_.out)] = &result;
    distance_program_->run(0, at, nullptr, workspace, nullptr);
    return result;
}

double UpdateRule::norm(const float *a, std::byte *workspace) {
    float result = 0;
    Program::Bindings at(norm_program_->graph().values().size());
    at[size_t(norm_.a)] = const_cast<float *>(a);
    at[size_t(norm_.out)] = &result;
    norm_program_->run(0, at, nullptr, workspace, nullptr);
    return result;
}

size_t UpdateRule::workspace_bytes() const {
    return std::max({step_program_->workspace_bytes(), distance_program_->workspace_bytes(),
                     norm_program_->workspace_bytes()});
}

} // namespace ponder
