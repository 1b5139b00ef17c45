// The next token from its logits. Filters apply in this order, each to what the one before has
// left:
//
//     l_i += bias_i
//     l_i  = l_i > 0 ? l_i / r : r l_i   for tokens of the text so far   Keskar et al. 2019
//     temperature 0: the largest (the smaller id of equals)
//     p    = softmax(l / temperature)
//     top k      the k largest
//     top p      the fewest whose sum reaches p of what is left            Holtzman et al. 2019
//     min p      those with at least min_p times the largest               Nguyen et al. 2024
//
// Then one is drawn in proportion. Equal logits are ordered by id, so nothing depends on how they
// were sorted.
#pragma once

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

namespace ponder {

struct Sampling {
    double temperature = 0;
    int64_t top_k = 0;           // 0: off
    double top_p = 1, min_p = 0; // 1, 0: off
    double repetition = 1;       // 1: off
    std::vector<std::pair<int32_t, float>> bias;
    uint64_t seed = 0;
};

class Sampler {
public:
    Sampler(Sampling form, size_t vocabulary);

    // A token of the text that repetition counts.
    void saw(int32_t id);
    // The next one; draw number `index` of the seed.
    int32_t next(std::span<const float> logits, uint64_t index);
    // The distribution that `next` draws from, as pairs of id and probability.
    using Candidates = std::vector<std::pair<int32_t, double>>;
    Candidates distribution(std::span<const float> logits);

private:
    std::span<const float> prepare(std::span<const float> logits);
    void filter(std::span<const float> logits, float top);

    Sampling form_;
    std::vector<char> seen_;
    std::vector<int32_t> seen_ids_;
    std::vector<float> logits_;
    struct Candidate {
        float logit;
        int32_t id;
        double weight;
    };
    std::vector<Candidate> left_;
};

// The largest, the smallest id of equals; false where a logit is not finite. One sweep: it is made
// for every token.
struct Largest {
    int32_t id;
    float logit;
    bool finite;
};
Largest largest(std::span<const float> logits);

// log softmax(logits)[id]
double log_probability(std::span<const float> logits, int32_t id);

} // namespace ponder
