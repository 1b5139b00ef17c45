// What a gate reads: numbers about the chunk scored last and about the stream so far.
#pragma once

#include "base/dtype.hpp"

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <span>
#include <string_view>
#include <vector>

namespace ponder {

// A row-major matrix in f32 or bf16 that somebody else owns. Empty where nothing is known.
struct MatrixView {
    const void *data = nullptr;
    DType type = DType::f32;
    size_t rows = 0, columns = 0;
    bool empty() const { return !data || rows == 0; }
    float at(size_t row, size_t column) const {
        float x = 0;
        read(row, column, 1, &x);
        return x;
    }
    // `count` values of a row from `column` on.
    void read(size_t row, size_t column, size_t count, float *to) const {
        const size_t i = row * columns + column;
        if (type == DType::bf16)
            std::transform(static_cast<const bf16 *>(data) + i,
                           static_cast<const bf16 *>(data) + i + count, to,
                           [](bf16 x) { return to_float(x); });
        else
            std::copy_n(static_cast<const float *>(data) + i, count, to);
    }
};

enum class FeatureSet { ponder, planned };

// The chunk scored last.
struct Observation {
    std::span<const float> nll, entropy; // of its predictions
    std::span<const int32_t> ids;        // of its tokens
    int64_t vocabulary = 0;
    MatrixView hidden;        // [tokens, C] after the last layer norm
    MatrixView qkv;           // [context, 3 C] of the last layer; the chunk's rows are the last
    int64_t heads = 0;        // of qkv
    // [tokens, V], if a backward pass keeps them; only rows of probability_rows() need be there.
    MatrixView probabilities;
};

// ---- PonderTTT's 32 (arXiv 2601.00894, src/ponderttt/utils/features.py), in its order: confidence
// 4, activations 6, attention 4, tokens 8, history 4, sequence 6.

constexpr size_t ponder_feature_count = 32;

struct PonderInputs {
    std::span<const int32_t> ids;
    int64_t vocabulary = 1;
    MatrixView probabilities; // [rows, V]: of every token, or of a sample
    MatrixView hidden;        // [T, C]; empty gives zeros, as in the source
    MatrixView attention;     // [H T, T] of one layer; empty gives zeros
    double difficulty = 0, difficulty_deviation = 0, cost = 0, budget = 1; // see PonderHistory
    double length_norm = 512;                                              // tokens
};
std::vector<double> ponder_features(const PonderInputs &inputs);

// Its running means of difficulty (the chunk's loss) and cost, and the exponentially weighted
// variance of difficulty (West 1979).
struct PonderHistory {
    double difficulty = 0, variance = 0, cost = 0;
    void add(double new_difficulty, double new_cost);
};

// ---- Ours: 64 numbers, NaN where nothing is known yet.

constexpr size_t planned_feature_count = 64;
std::string_view planned_feature_name(size_t index);
// The chunk's loss over the mean of the four before: of single signals the best sign that a step
// pays (something new has begun). Index in the set's features; PonderTTT's has no such, its
// entropy.
size_t leading_feature(FeatureSet set);

size_t feature_count(FeatureSet set);

// The rows of a chunk's probabilities that the set reads: all of them would cost more than they tell.
std::vector<size_t> probability_rows(FeatureSet set, size_t tokens);

// Follows one stream. Ours cost a few hundred thousand operations a chunk: matrices are read in a
// few rows only.
class FeatureTracker {
public:
    explicit FeatureTracker(FeatureSet set) : set_(set) {}
    // Where the stream is.
    struct Place {
        uint64_t chunk = 0, expected = 0; // expected: chunks in the stream, 0 if unknown
        double budget_left = std::numeric_limits<double>::infinity();
        double target = 0; // steps a chunk
    };
    // The chunk that was scored.
    void observe(const Observation &observation);
    // The features now.
    std::vector<double> features(const Place &place) const;
    // What became of it. NaN for norms that are not known.
    void learned(int32_t steps, double update_norm, double gradient_norm);

    double mean_loss() const { return loss_.count > 0 ? loss_.mean : 0; }
    double steps() const { return steps_; }
    double chunks() const { return loss_.count; }

    std::vector<double> state() const;
    // False if the values are no state.
    bool set_state(std::span<const double> values);

private:
    // Mean and variance of what was seen (Welford 1962).
    struct Running {
        double count = 0, mean = 0, square = 0;
        void add(double x);
        double deviation() const;
    };
    static constexpr size_t chunk_features = 46; // those of the chunk alone, first in the list
    static constexpr size_t recent = 5;          // this chunk and four before it

    std::vector<double> planned(const Place &place) const;
    std::vector<double> ponder(const Place &place) const;
    void read_ponder(const Observation &o);
    void read_losses(const Observation &o);
    void read_probabilities(const Observation &o);
    void read_attention(const Observation &o);
    void read_hidden(const Observation &o);
    template <class Self, class F> static void visit(Self &self, F &&f);

    FeatureSet set_;
    std::array<double, chunk_features> chunk_{};
    std::array<double, ponder_feature_count> ponder_{};
    Running loss_, gap_, update_norm_, gradient_norm_;
    std::array<double, recent> last_losses_{}, last_steps_{};
    double least_loss_ = 0, steps_ = 0, last_update_norm_ = 0, last_gradient_norm_ = 0;
    double since_update_ = 0, gain_updated_ = 0, gain_idle_ = 0;
    PonderHistory history_;
    std::vector<double> topic_, last_topic_; // mean hidden state: of the stream, of the last chunk
};

} // namespace ponder
