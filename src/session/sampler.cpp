#include "session/sampler.hpp"

#include "base/random.hpp"

#include <algorithm>
#include <cmath>

namespace ponder {

Sampler::Sampler(Sampling form, size_t vocabulary) : form_(std::move(form)), seen_(vocabulary) {}

void Sampler::saw(int32_t id) {
    if (form_.repetition == 1 || seen_[size_t(id)])
        return;
    seen_[size_t(id)] = 1;
    seen_ids_.push_back(id);
}

// Bias and repetition.
void Sampler::prepare(std::span<const float> logits) {
    logits_.assign(logits.begin(), logits.end());
    for (const auto &[id, bias] : form_.bias)
        logits_[size_t(id)] += bias;
    const float r = float(form_.repetition);
    for (const int32_t id : seen_ids_) {
        float &l = logits_[size_t(id)];
        l = l > 0 ? l / r : l * r;
    }
}

// left_: what the filters leave, weights relative to the largest.
void Sampler::filter() {
    const auto above = [](const Candidate &a, const Candidate &b) {
        return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
    };
    left_.clear();
    const float top = *std::max_element(logits_.begin(), logits_.end());
    // What is 100 temperatures below the largest is never drawn: e^-100.
    const float floor = float(double(top) - 100 * form_.temperature);
    for (size_t i = 0; i < logits_.size(); ++i)
        if (logits_[i] >= floor)
            left_.push_back({logits_[i], int32_t(i), 0});
    if (form_.top_k > 0 && size_t(form_.top_k) < left_.size()) {
        std::nth_element(left_.begin(), left_.begin() + form_.top_k, left_.end(), above);
        left_.resize(size_t(form_.top_k));
    }
    double sum = 0;
    for (Candidate &c : left_)
        c.weight = std::exp((double(c.logit) - double(top)) / form_.temperature);
    if (form_.top_p < 1) {
        std::sort(left_.begin(), left_.end(), above);
        double all = 0;
        for (const Candidate &c : left_)
            all += c.weight;
        size_t n = 0;
        while (n < left_.size() && (n == 0 || sum < form_.top_p * all))
            sum += left_[n++].weight;
        left_.resize(n);
    }
    if (form_.min_p > 0)
        std::erase_if(left_, [&](const Candidate &c) { return c.weight < form_.min_p; });
    // By id: a draw then depends on the distribution alone.
    std::sort(left_.begin(), left_.end(),
              [](const Candidate &a, const Candidate &b) { return a.id < b.id; });
}

int32_t Sampler::next(std::span<const float> logits, uint64_t index) {
    prepare(logits);
    if (form_.temperature == 0)
        return int32_t(std::max_element(logits_.begin(), logits_.end()) - logits_.begin());
    filter();
    double all = 0;
    for (const Candidate &c : left_)
        all += c.weight;
    double rest = uniform_at(form_.seed, index) * all;
    for (const Candidate &c : left_)
        if ((rest -= c.weight) < 0)
            return c.id;
    return left_.back().id; // rounding
}

Sampler::Candidates Sampler::distribution(std::span<const float> logits) {
    prepare(logits);
    if (form_.temperature == 0)
        return {{next(logits, 0), 1.0}};
    filter();
    double all = 0;
    for (const Candidate &c : left_)
        all += c.weight;
    Candidates result;
    for (const Candidate &c : left_)
        result.emplace_back(c.id, c.weight / all);
    return result;
}

double log_probability(std::span<const float> logits, int32_t id) {
    const float top = *std::max_element(logits.begin(), logits.end());
    double sum = 0;
    for (const float l : logits)
        sum += std::exp(l - top);
    return double(logits[size_t(id)]) - double(top) - std::log(sum);
}

} // namespace ponder
