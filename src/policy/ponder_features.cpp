#include "policy/features.hpp"

#include <algorithm>
#include <cmath>

namespace ponder {

namespace {

constexpr double tiny = 1e-10;

double root(double x) { return std::sqrt(std::max(x, tiny)); }

} // namespace

std::vector<double> ponder_features(const PonderInputs &in) {
    std::vector<double> f(ponder_feature_count, 0.0);
    const double tokens = double(in.ids.size()), vocabulary = double(in.vocabulary);

    // Confidence: entropy and top probability; top 5 of each row, renormalised.
    double confidence = 0, diversity = 0, uncertainty = 0;
    if (const MatrixView &p = in.probabilities; !p.empty()) {
        double sum = 0, most = 0, log_top = 0, least_log_top = INFINITY;
        std::vector<double> row(p.columns);
        const size_t top = std::min<size_t>(5, p.columns);
        for (size_t r = 0; r < p.rows; ++r) {
            double entropy = 0;
            for (size_t v = 0; v < p.columns; ++v) {
                row[v] = double(p.at(r, v));
                entropy -= row[v] * std::log(row[v] + tiny);
            }
            sum += entropy;
            most = r == 0 ? entropy : std::max(most, entropy);
            std::partial_sort(row.begin(), row.begin() + std::ptrdiff_t(top), row.end(),
                              std::greater<>());
            confidence += row[0];
            log_top += std::log(row[0] + tiny);
            least_log_top = std::min(least_log_top, std::log(row[0] + tiny));
            double whole = 0, mean = 0, square = 0;
            for (size_t k = 0; k < top; ++k)
                whole += row[k];
            for (size_t k = 0; k < top; ++k) {
                row[k] /= whole;
                diversity -= row[k] * std::log(row[k] + tiny);
                mean += row[k] / double(top);
            }
            for (size_t k = 0; k < top; ++k)
                square += (row[k] - mean) * (row[k] - mean) / double(top);
            uncertainty += std::sqrt(square);
        }
        const double rows = double(p.rows);
        f[0] = sum / rows;
        f[1] = most;
        f[2] = std::log(std::exp(-log_top / rows) + tiny);
        f[3] = std::log(std::exp(-least_log_top) + tiny);
        confidence /= rows;
        diversity /= rows;
        uncertainty /= rows;
    }

    if (const MatrixView &h = in.hidden; !h.empty()) {
        const double count = double(h.rows * h.columns);
        double mean = 0, square = 0, sparse = 0, high = -INFINITY, low = INFINITY;
        for (size_t r = 0; r < h.rows; ++r)
            for (size_t c = 0; c < h.columns; ++c)
                mean += double(h.at(r, c));
        mean /= count;
        for (size_t r = 0; r < h.rows; ++r)
            for (size_t c = 0; c < h.columns; ++c) {
                const double x = double(h.at(r, c));
                square += (x - mean) * (x - mean);
                sparse += std::abs(x) < 0.01;
                high = std::max(high, x);
                low = std::min(low, x);
            }
        f[4] = mean;
        f[5] = root(square / count);
        f[6] = sparse / count;
        f[7] = high;
        f[8] = low;
        f[9] = high - low;
    }

    if (const MatrixView &a = in.attention; !a.empty()) {
        const size_t length = a.columns, heads = a.rows / length;
        double sum = 0, most = -INFINITY, range = 0, sparse = 0;
        for (size_t t = 0; t < length; ++t) {
            double entropy = 0;
            for (size_t s = 0; s < length; ++s) {
                double mean = 0;
                for (size_t h = 0; h < heads; ++h)
                    mean += double(a.at(h * length + t, s)) / double(heads);
                entropy -= mean * std::log(mean + tiny);
            }
            sum += entropy;
            most = std::max(most, entropy);
        }
        for (size_t r = 0; r < a.rows; ++r) {
            float high = a.at(r, 0), low = high;
            for (size_t s = 0; s < length; ++s) {
                high = std::max(high, a.at(r, s));
                low = std::min(low, a.at(r, s));
                sparse += a.at(r, s) < 0.01f;
            }
            range += double(high - low);
        }
        f[10] = sum / std::max(double(length) - 1, 1.0);
        f[11] = most;
        f[12] = range / double(length); // summed over heads, as in the source
        f[13] = sparse / double(a.rows * length);
    }

    // Token ids as numbers.
    double mean = 0, square = 0, repeated = 0, step = 0, highest = 0;
    for (int32_t id : in.ids) {
        mean += double(id) / tokens;
        highest = std::max(highest, double(id));
    }
    for (size_t t = 0; t < in.ids.size(); ++t) {
        square += (in.ids[t] - mean) * (in.ids[t] - mean) / tokens;
        if (t > 0) {
            const double jump = double(in.ids[t]) - double(in.ids[t - 1]);
            repeated += jump == 0;
            step += jump * jump;
        }
    }
    const double pairs = std::max(tokens - 1, 1.0);
    f[14] = root(square) / vocabulary;
    f[15] = repeated / pairs;
    f[16] = mean / vocabulary;
    f[17] = f[14];
    f[18] = uncertainty;
    f[19] = confidence;
    f[20] = diversity;
    f[21] = root(step / pairs) / vocabulary;

    f[22] = in.difficulty;
    f[23] = in.difficulty_deviation;
    f[24] = in.cost;
    f[25] = in.budget;

    f[26] = tokens / in.length_norm;
    f[27] = std::log(mean / vocabulary + 1);
    f[28] = std::log(highest / vocabulary + 1);
    double spread = 0; // of positions 0, 1 / (T - 1), ..., 1 around their mean
    for (size_t t = 0; t < in.ids.size(); ++t)
        spread += std::pow(double(t) / pairs - 0.5, 2) / tokens;
    f[29] = in.ids.size() > 1 ? 0.5 : 0;
    f[30] = root(in.ids.size() > 1 ? spread : 0);
    f[31] = 1; // share of tokens that are no padding
    return f;
}

void PonderHistory::add(double new_difficulty, double new_cost) {
    constexpr double newest = 0.1;
    const double difference = new_difficulty - difficulty;
    difficulty += newest * difference;
    variance = (1 - newest) * (variance + newest * difference * difference);
    cost += newest * (new_cost - cost);
}

} // namespace ponder
