#include "policy/features.hpp"

#include <algorithm>
#include <cmath>

namespace ponder {

namespace {

constexpr double unknown = std::numeric_limits<double>::quiet_NaN();

// Of the chunk alone first, then of the stream.
enum Feature : size_t {
    loss,
    loss_quarter,
    loss_trend = loss_quarter + 4,
    loss_deviation,
    loss_low,
    loss_median,
    loss_high,
    loss_most,
    share_hard,
    share_easy,
    entropy_mean,
    entropy_deviation,
    entropy_most,
    entropy_end,
    gap,
    loss_entropy_correlation,
    overconfidence,
    confidence,
    top_five,
    confidence_deviation,
    share_sure,
    share_hit,
    attention_entropy,
    attention_peak = attention_entropy + 4,
    attention_first,
    attention_near,
    hidden_mean,
    hidden_deviation,
    hidden_most,
    hidden_sparse,
    hidden_row_norm,
    hidden_row_norm_deviation,
    hidden_movement,
    topic_shift,
    topic_step,
    distinct,
    end_of_chunk, // what follows depends on the stream
    loss_to_mean = end_of_chunk,
    loss_ratio,
    loss_score,
    loss_to_recent,
    loss_to_least,
    gap_to_mean,
    mean_loss_now,
    last_k,
    recent_k,
    last_norm,
    norm_mean,
    last_gradient,
    gradient_deviation,
    idle,
    gain_after_update,
    place_log,
    progress,
    rate_to_target,
    end_of_features
};
// clang-format off
constexpr std::string_view names[planned_feature_count] = {
    "loss", "loss, 1st quarter", "loss, 2nd quarter", "loss, 3rd quarter", "loss, 4th quarter",
    "loss trend", "loss deviation", "loss 10 %", "loss 50 %", "loss 90 %", "loss maximum",
    "share of losses above 5", "share of losses below 0.1",
    "entropy", "entropy deviation", "entropy maximum", "entropy, 4th quarter",
    "loss - entropy", "correlation of loss and entropy", "overconfidence",
    "top probability", "top 5 probability", "top probability deviation", "share above 0.9",
    "share of hits",
    "attention entropy, head 0 mod 4", "attention entropy, head 1 mod 4",
    "attention entropy, head 2 mod 4", "attention entropy, head 3 mod 4",
    "attention peak", "attention on the first token", "attention on the last 16 tokens",
    "hidden mean", "hidden deviation", "hidden maximum", "hidden sparsity", "hidden row norm",
    "hidden row norm deviation", "hidden movement", "topic shift", "topic step",
    "distinct tokens",
    "loss - mean loss", "loss / mean loss", "loss score in the stream", "loss - four before",
    "loss - least loss", "gap - mean gap", "mean loss",
    "last K", "mean of last four K", "last update norm", "mean update norm",
    "last gradient norm", "gradient norm deviation", "chunks since an update",
    "loss drop after updates", "log position", "progress", "rate / target",
    "remaining share", "budget left", "loss drop without update", "log steps"};
// clang-format on
constexpr size_t remaining_share = end_of_features, budget_left = remaining_share + 1,
                 gain_idle = budget_left + 1, steps_log = gain_idle + 1;
static_assert(steps_log + 1 == planned_feature_count);

// About n rows, evenly spread, the last one included.
std::vector<size_t> sample(size_t rows, size_t n) {
    std::vector<size_t> chosen;
    for (size_t i = 1; i <= std::min(n, rows); ++i)
        chosen.push_back(rows * i / std::min(n, rows) - 1);
    return chosen;
}

double mean_of(std::span<const float> x) {
    double sum = 0;
    for (float v : x)
        sum += double(v);
    return x.empty() ? unknown : sum / double(x.size());
}

double deviation_of(std::span<const float> x, double mean) {
    double square = 0;
    for (float v : x)
        square += (double(v) - mean) * (double(v) - mean);
    return x.empty() ? unknown : std::sqrt(square / double(x.size()));
}

double quantile(const std::vector<float> &sorted, double q) {
    return double(sorted[size_t(q * double(sorted.size() - 1) + 0.5)]);
}

double cosine(const std::vector<double> &a, const std::vector<double> &b) {
    double ab = 0, aa = 0, bb = 0;
    for (size_t i = 0; i < a.size(); ++i) {
        ab += a[i] * b[i];
        aa += a[i] * a[i];
        bb += b[i] * b[i];
    }
    return ab / std::sqrt(std::max(aa * bb, 1e-30));
}

// The newest value first.
template <size_t N> void push(std::array<double, N> &list, double value) {
    std::copy_backward(list.begin(), list.end() - 1, list.end());
    list[0] = value;
}

// Of the values before the newest; the newest where there are none.
template <size_t N> double mean_before(const std::array<double, N> &list, double count) {
    const size_t n = std::min(N, size_t(count));
    double sum = 0;
    for (size_t i = 1; i < n; ++i)
        sum += list[i];
    return n > 1 ? sum / double(n - 1) : list[0];
}

} // namespace

size_t feature_count(FeatureSet set) {
    return set == FeatureSet::ponder ? ponder_feature_count : planned_feature_count;
}

// Ours compares with the token that came next.
std::vector<size_t> probability_rows(FeatureSet set, size_t tokens) {
    return set == FeatureSet::ponder ? sample(tokens, 16) : sample(tokens - 1, 8);
}

std::string_view planned_feature_name(size_t index) { return names[index]; }

void FeatureTracker::Running::add(double x) {
    if (!std::isfinite(x))
        return;
    count += 1;
    const double before = x - mean;
    mean += before / count;
    square += before * (x - mean);
}

double FeatureTracker::Running::deviation() const {
    return count > 1 ? std::sqrt(square / count) : 0;
}

void FeatureTracker::observe(const Observation &o) {
    static_assert(end_of_chunk <= chunk_features);
    chunk_.fill(unknown);
    const double before = loss_.count > 0 ? last_losses_[0] : unknown;
    read_losses(o);
    if (set_ == FeatureSet::ponder) {
        read_ponder(o);
    } else {
        read_probabilities(o);
        read_attention(o);
        read_hidden(o);
        std::vector<int32_t> ids(o.ids.begin(), o.ids.end());
        std::sort(ids.begin(), ids.end());
        const auto different = std::unique(ids.begin(), ids.end()) - ids.begin();
        chunk_[distinct] = double(different) / double(ids.size());
    }

    const double now = chunk_[loss];
    if (!std::isnan(before)) {
        double &gain = last_steps_[0] > 0 ? gain_updated_ : gain_idle_;
        gain += 0.3 * (before - now - gain);
    }
    least_loss_ = loss_.count > 0 ? std::min(least_loss_, now) : now;
    loss_.add(now);
    gap_.add(chunk_[gap]);
    push(last_losses_, now);
}

void FeatureTracker::read_losses(const Observation &o) {
    const size_t n = o.nll.size();
    const double mean = mean_of(o.nll), deviation = deviation_of(o.nll, mean);
    chunk_[loss] = mean;
    for (size_t q = 0; q < 4; ++q)
        chunk_[loss_quarter + q] = mean_of(o.nll.subspan(n * q / 4, n * (q + 1) / 4 - n * q / 4));
    double slope = 0, width = 0;
    for (size_t t = 0; t < n; ++t) {
        const double x = double(t) / double(n) - 0.5;
        slope += x * (double(o.nll[t]) - mean);
        width += x * x;
    }
    chunk_[loss_trend] = slope / std::max(width, 1e-12);
    chunk_[loss_deviation] = deviation;
    std::vector<float> sorted(o.nll.begin(), o.nll.end());
    std::sort(sorted.begin(), sorted.end());
    chunk_[loss_low] = quantile(sorted, 0.1);
    chunk_[loss_median] = quantile(sorted, 0.5);
    chunk_[loss_high] = quantile(sorted, 0.9);
    chunk_[loss_most] = double(sorted.back());
    double hard = 0, easy = 0;
    for (float v : sorted) {
        hard += v > 5;
        easy += v < 0.1f;
    }
    chunk_[share_hard] = hard / double(n);
    chunk_[share_easy] = easy / double(n);

    if (o.entropy.size() != n)
        return;
    const double entropy = mean_of(o.entropy), spread = deviation_of(o.entropy, entropy);
    chunk_[entropy_mean] = entropy;
    chunk_[entropy_deviation] = spread;
    chunk_[entropy_most] = double(*std::max_element(o.entropy.begin(), o.entropy.end()));
    chunk_[entropy_end] = mean_of(o.entropy.subspan(n * 3 / 4));
    chunk_[gap] = mean - entropy;
    double together = 0, over = 0;
    for (size_t t = 0; t < n; ++t) {
        together += (double(o.nll[t]) - mean) * (double(o.entropy[t]) - entropy) / double(n);
        over += std::max(0.0, double(o.nll[t]) - double(o.entropy[t]) - 2) / double(n);
    }
    chunk_[loss_entropy_correlation] = together / std::max(deviation * spread, 1e-12);
    chunk_[overconfidence] = over;
}

void FeatureTracker::read_probabilities(const Observation &o) {
    const MatrixView &p = o.probabilities;
    if (p.empty())
        return;
    const std::vector<size_t> chosen = probability_rows(set_, std::min(p.rows, o.ids.size()));
    std::vector<float> row(p.columns);
    double top = 0, square = 0, five = 0, sure = 0, hit = 0;
    for (size_t r : chosen) {
        p.read(r, 0, p.columns, row.data());
        float best[5] = {};
        for (float x : row) {
            if (x <= best[4])
                continue;
            size_t i = 4;
            for (; i > 0 && best[i - 1] < x; --i)
                best[i] = best[i - 1];
            best[i] = x;
        }
        top += double(best[0]);
        square += double(best[0]) * double(best[0]);
        sure += best[0] > 0.9f;
        hit += row[size_t(o.ids[r + 1])] >= best[0];
        for (float x : best)
            five += double(x);
    }
    const double n = double(chosen.size());
    chunk_[confidence] = top / n;
    chunk_[top_five] = five / n;
    chunk_[confidence_deviation] = std::sqrt(std::max(0.0, square / n - top / n * top / n));
    chunk_[share_sure] = sure / n;
    chunk_[share_hit] = hit / n;
}

// PonderTTT's, which it takes of every row: the hidden states whole, probabilities of some rows.
// Attention is left out, as where it trains its gate.
void FeatureTracker::read_ponder(const Observation &o) {
    std::vector<float> rows;
    PonderInputs inputs{o.ids, o.vocabulary, {}, o.hidden, {}};
    if (const MatrixView &p = o.probabilities; !p.empty()) {
        const std::vector<size_t> chosen = probability_rows(set_, std::min(p.rows, o.ids.size()));
        rows.resize(chosen.size() * p.columns);
        for (size_t i = 0; i < chosen.size(); ++i)
            p.read(chosen[i], 0, p.columns, rows.data() + i * p.columns);
        inputs.probabilities = {rows.data(), DType::f32, chosen.size(), p.columns};
    }
    const std::vector<double> values = ponder_features(inputs);
    std::copy(values.begin(), values.end(), ponder_.begin());
}

// softmax(q k^T / sqrt(D)) of two rows of the last layer.
void FeatureTracker::read_attention(const Observation &o) {
    const MatrixView &m = o.qkv;
    if (m.empty() || o.heads <= 0)
        return;
    const size_t heads = size_t(o.heads), width = m.columns / 3, dim = width / heads;
    const size_t first = m.rows - std::min(m.rows, o.ids.size());
    const std::vector<size_t> chosen = sample(m.rows - first, 2);
    double entropy_sum[4] = {}, counted[4] = {}, peak = 0, start = 0, near = 0;
    std::vector<float> query(width), keys(width), score(m.rows * heads);
    const float scale = 1 / std::sqrt(float(dim));
    for (size_t offset : chosen) {
        const size_t row = first + offset;
        m.read(row, 0, width, query.data());
        for (size_t s = 0; s <= row; ++s) {
            m.read(s, width, width, keys.data());
            for (size_t h = 0; h < heads; ++h) {
                float lane[8] = {}; // a fixed order of sums that compilers turn into vectors
                size_t d = 0;
                for (; d + 8 <= dim; d += 8)
                    for (size_t i = 0; i < 8; ++i)
                        lane[i] += query[h * dim + d + i] * keys[h * dim + d + i];
                for (; d < dim; ++d)
                    lane[0] += query[h * dim + d] * keys[h * dim + d];
                score[h * m.rows + s] = scale * (((lane[0] + lane[1]) + (lane[2] + lane[3])) +
                                                 ((lane[4] + lane[5]) + (lane[6] + lane[7])));
            }
        }
        for (size_t h = 0; h < heads; ++h) {
            const std::span<const float> x(score.data() + h * m.rows, row + 1);
            const double top = double(*std::max_element(x.begin(), x.end()));
            double sum = 0, weighted = 0, tail = 0;
            for (size_t s = 0; s <= row; ++s) {
                const double p = std::exp(double(x[s]) - top);
                sum += p;
                weighted += p * (double(x[s]) - top);
                tail += row - s < 16 ? p : 0;
            }
            peak += 1 / sum;
            start += std::exp(double(x[0]) - top) / sum;
            near += tail / sum;
            entropy_sum[h % 4] += std::log(sum) - weighted / sum;
            counted[h % 4] += 1;
        }
    }
    const double all = double(chosen.size() * heads);
    for (size_t i = 0; i < 4; ++i)
        chunk_[attention_entropy + i] = counted[i] > 0 ? entropy_sum[i] / counted[i] : unknown;
    chunk_[attention_peak] = peak / all;
    chunk_[attention_first] = start / all;
    chunk_[attention_near] = near / all;
}

// Of 32 rows.
void FeatureTracker::read_hidden(const Observation &o) {
    const MatrixView &h = o.hidden;
    if (h.empty())
        return;
    std::vector<float> row(h.columns), last;
    std::vector<double> mean(h.columns, 0.0);
    const std::vector<size_t> chosen = sample(h.rows, 32);
    const double n = double(chosen.size()), count = n * double(h.columns);
    double sum = 0, square = 0, most = 0, sparse = 0, norms = 0, moved = 0;
    for (size_t r : chosen) {
        h.read(r, 0, h.columns, row.data());
        double own = 0, step = 0;
        for (size_t c = 0; c < h.columns; ++c) {
            const double x = double(row[c]);
            mean[c] += x / n;
            sum += x;
            own += x * x;
            most = std::max(most, std::abs(x));
            sparse += std::abs(x) < 0.01;
            step += last.empty() ? 0 : (x - double(last[c])) * (x - double(last[c]));
        }
        norms += std::sqrt(own);
        square += own;
        moved += std::sqrt(step);
        last = row;
    }
    chunk_[hidden_mean] = sum / count;
    chunk_[hidden_deviation] = std::sqrt(std::max(0.0, square / count - sum / count * sum / count));
    chunk_[hidden_most] = most;
    chunk_[hidden_sparse] = sparse / count;
    chunk_[hidden_row_norm] = norms / n;
    chunk_[hidden_row_norm_deviation] =
        std::sqrt(std::max(0.0, square / n - norms / n * norms / n));
    chunk_[hidden_movement] = moved / std::max(n - 1, 1.0);
    if (topic_.size() == mean.size()) {
        chunk_[topic_shift] = 1 - cosine(mean, topic_);
        chunk_[topic_step] = 1 - cosine(mean, last_topic_);
    } else {
        topic_ = mean;
    }
    for (size_t c = 0; c < mean.size(); ++c)
        topic_[c] += (mean[c] - topic_[c]) / (loss_.count + 1);
    last_topic_ = std::move(mean);
}

size_t leading_feature(FeatureSet set) {
    return set == FeatureSet::ponder ? 0 : size_t(loss_to_recent);
}

std::vector<double> FeatureTracker::features(const Place &place) const {
    return set_ == FeatureSet::ponder ? ponder(place) : planned(place);
}

std::vector<double> FeatureTracker::planned(const Place &place) const {
    std::vector<double> f(planned_feature_count, unknown);
    std::copy_n(chunk_.begin(), size_t(end_of_chunk), f.begin());
    const double seen = loss_.count, now = chunk_[loss];
    if (seen > 0) {
        f[loss_to_mean] = now - loss_.mean;
        f[loss_ratio] = now / std::max(loss_.mean, 1e-6);
        f[loss_score] = (now - loss_.mean) / std::max(loss_.deviation(), 0.05);
        f[loss_to_recent] = now - mean_before(last_losses_, seen);
        f[loss_to_least] = now - least_loss_;
        f[gap_to_mean] = chunk_[gap] - gap_.mean;
        f[mean_loss_now] = loss_.mean;
    }
    f[last_k] = last_steps_[0];
    f[recent_k] = (last_steps_[0] + last_steps_[1] + last_steps_[2] + last_steps_[3]) / 4;
    if (update_norm_.count > 0) {
        f[last_norm] = last_update_norm_;
        f[norm_mean] = update_norm_.mean;
    }
    if (gradient_norm_.count > 0) {
        f[last_gradient] = last_gradient_norm_;
        f[gradient_deviation] = gradient_norm_.deviation();
    }
    f[idle] = std::log1p(since_update_);
    f[gain_after_update] = gain_updated_;
    f[gain_idle] = gain_idle_;
    f[place_log] = std::log1p(double(place.chunk));
    f[steps_log] = std::log1p(steps_);
    if (place.expected > 0) {
        f[progress] = std::min(1.0, double(place.chunk) / double(place.expected));
        f[remaining_share] = 1 - f[progress];
    }
    const double rate = steps_ / std::max(double(place.chunk), 1.0);
    if (place.target > 0)
        f[rate_to_target] = std::min(rate / place.target, 4.0);
    f[budget_left] = std::log1p(std::min(place.budget_left, 1e6));
    return f;
}

std::vector<double> FeatureTracker::ponder(const Place &place) const {
    std::vector<double> f(ponder_.begin(), ponder_.end());
    f[22] = history_.difficulty;
    f[23] = std::sqrt(history_.variance);
    f[24] = history_.cost;
    const double budget =
        place.target > 0
            ? std::clamp(1 - steps_ / (place.target * double(place.chunk + 1)), 0.0, 1.0)
            : 1;
    f[25] = budget;
    return f;
}

void FeatureTracker::learned(int32_t steps, double update_norm, double gradient_norm) {
    push(last_steps_, double(steps));
    steps_ += double(steps);
    since_update_ = steps > 0 ? 0 : since_update_ + 1;
    history_.add(last_losses_[0], double(steps));
    if (std::isfinite(update_norm)) {
        last_update_norm_ = update_norm;
        update_norm_.add(update_norm);
    }
    if (std::isfinite(gradient_norm)) {
        last_gradient_norm_ = gradient_norm;
        gradient_norm_.add(gradient_norm);
    }
}

// Every number of the state in one order, for writing and reading.
template <class Self, class F> void FeatureTracker::visit(Self &s, F &&f) {
    for (auto *list : {&s.last_losses_, &s.last_steps_})
        for (auto &x : *list)
            f(x);
    for (auto &x : s.chunk_)
        f(x);
    for (auto &x : s.ponder_)
        f(x);
    for (auto *r : {&s.loss_, &s.gap_, &s.update_norm_, &s.gradient_norm_}) {
        f(r->count);
        f(r->mean);
        f(r->square);
    }
    for (auto *x : {&s.least_loss_, &s.steps_, &s.last_update_norm_, &s.last_gradient_norm_,
                    &s.since_update_, &s.gain_updated_, &s.gain_idle_, &s.history_.difficulty,
                    &s.history_.variance, &s.history_.cost})
        f(*x);
}

std::vector<double> FeatureTracker::state() const {
    std::vector<double> values;
    visit(*this, [&](double x) { values.push_back(x); });
    values.insert(values.end(), topic_.begin(), topic_.end());
    values.insert(values.end(), last_topic_.begin(), last_topic_.end());
    return values;
}

bool FeatureTracker::set_state(std::span<const double> values) {
    FeatureTracker fresh(set_);
    size_t fixed = 0;
    visit(fresh, [&](double &) { ++fixed; });
    if (values.size() < fixed || (values.size() - fixed) % 2 != 0)
        return false;
    size_t i = 0;
    visit(fresh, [&](double &x) { x = values[i++]; });
    const size_t width = (values.size() - fixed) / 2;
    fresh.topic_.assign(values.begin() + std::ptrdiff_t(fixed),
                        values.begin() + std::ptrdiff_t(fixed + width));
    fresh.last_topic_.assign(values.begin() + std::ptrdiff_t(fixed + width), values.end());
    *this = std::move(fresh);
    return true;
}

} // namespace ponder
