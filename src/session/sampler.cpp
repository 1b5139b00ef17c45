#include "session/sampler.hpp"

#include "base/random.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

namespace ponder {

Sampler::Sampler(Sampling form, size_t vocabulary) : form_(std::move(form)), seen_(vocabulary) {}

void Sampler::saw(int32_t id) {
    if (form_.repetition == 1 || seen_[size_t(id)])
        return;
    seen_[size_t(id)] = 1;
    seen_ids_.push_back(id);
}

Largest largest(std::span<const float> logits) {
    constexpr size_t lanes = 16; // independent, so that compilers make vectors of them
    float top[lanes], zero[lanes] = {};
    std::fill_n(top, lanes, -std::numeric_limits<float>::infinity());
    size_t i = 0;
    for (; i + lanes <= logits.size(); i += lanes)
        for (size_t l = 0; l < lanes; ++l) {
            const float x = logits[i + l];
            top[l] = x > top[l] ? x : top[l];
            zero[l] += x * 0; // NaN once x was not finite
        }
    for (; i < logits.size(); ++i) {
        top[0] = std::max(top[0], logits[i]);
        zero[0] += logits[i] * 0;
    }
    Largest result{0, *std::max_element(top, top + lanes), true};
    for (const float x : zero)
        result.finite = result.finite && x == 0;
    result.id = int32_t(std::find(logits.begin(), logits.end(), result.logit) - logits.begin());
    return result;
}

// Bias and repetition.
std::span<const float> Sampler::prepare(std::span<const float> logits) {
    if (form_.bias.empty() && seen_ids_.empty())
        return logits;
    logits_.assign(logits.begin(), logits.end());
    for (const auto &[id, bias] : form_.bias)
        logits_[size_t(id)] += bias;
    const float r = float(form_.repetition);
    for (const int32_t id : seen_ids_) {
        float &l = logits_[size_t(id)];
        l = l > 0 ? l / r : l * r;
    }
    return logits_;
}

// left_: what the filters leave, weights relative to the largest.
void Sampler::filter(std::span<const float> logits, float top) {
    const auto above = [](const Candidate &a, const Candidate &b) {
        return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
    };
    left_.clear();
    // What is 40 temperatures below the largest is not drawn: e^-40 of a whole vocabulary.
    const float floor = float(double(top) - 40 * form_.temperature);
    for (size_t i = 0; i < logits.size(); ++i)
        if (logits[i] >= floor)
            left_.push_back({logits[i], int32_t(i), 0});
    bool ordered = true; // by id
    if (form_.top_k > 0 && size_t(form_.top_k) < left_.size()) {
        std::nth_element(left_.begin(), left_.begin() + form_.top_k, left_.end(), above);
        left_.resize(size_t(form_.top_k));
        ordered = false;
    }
    double sum = 0;
    for (Candidate &c : left_)
        c.weight = std::exp((double(c.logit) - double(top)) / form_.temperature);
    if (form_.top_p < 1) {
        std::sort(left_.begin(), left_.end(), above);
        ordered = false;
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
    if (!ordered) // a draw depends on the distribution alone
        std::sort(left_.begin(), left_.end(),
                  [](const Candidate &a, const Candidate &b) { return a.id < b.id; });
}

int32_t Sampler::next(std::span<const float> logits, uint64_t index) {
    const std::span<const float> l = prepare(logits);
    const Largest top = largest(l);
    if (form_.temperature == 0)
        return top.id;
    filter(l, top.logit);
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
    const std::span<const float> l = prepare(logits);
    const Largest top = largest(l);
    if (form_.temperature == 0)
        return {{top.id, 1.0}};
    filter(l, top.logit);
    double all = 0;
    for (const Candidate &c : left_)
        all += c.weight;
    Candidates result;
    for (const Candidate &c : left_)
        result.emplace_back(c.id, c.weight / all);
    return result;
}

double log_probability(std::span<const float> logits, int32_t id) {
    const float top = largest(logits).logit;
    double sum = 0;
    for (const float l : logits)
        sum += std::exp(l - top);
    return double(logits[size_t(id)]) - double(top) - std::log(sum);
}

} // namespace ponder
