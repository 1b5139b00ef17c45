#include "formats/int8_weights.hpp"

#include <algorithm>
#include <cmath>

namespace ponder {

namespace {

constexpr int64_t block_elements = 256 << 10;

float scale_of(float largest) { return largest < int8_smallest ? 1 : largest / 127; }

// |x / scale| <= 127 up to rounding, which the limits take back.
int8_t rounded(float x, float scale) {
    return int8_t(std::clamp(std::nearbyint(x / scale), -127.0f, 127.0f));
}

float largest_of(const float *x, int64_t n) {
    float largest = 0;
    for (int64_t i = 0; i < n; ++i)
        largest = std::max(largest, std::abs(x[i]));
    return largest;
}

} // namespace

bool int8_scales_rows(const std::string &tensor) {
    return tensor == "wte.weight" || tensor == "lm_head.weight";
}

bool is_int8_weight(const std::string &tensor) {
    return int8_scales_rows(tensor) ||
           (tensor.starts_with("h.") &&
            (tensor.ends_with(".c_attn.weight") || tensor.ends_with(".c_proj.weight") ||
             tensor.ends_with(".c_fc.weight")));
}

std::vector<int64_t> int8_scales_shape(const std::string &tensor,
                                       const std::vector<int64_t> &shape) {
    if (int8_scales_rows(tensor))
        return {shape[0], 1};
    return {1, shape[1]};
}

void to_int8(int64_t m, int64_t n, bool scale_rows, const ReadRows &read, int8_t *q,
             float *scales) {
    const int64_t most = std::clamp<int64_t>(block_elements / n, 1, m);
    std::vector<float> block(size_t(most * n));
    const auto each_row = [&](const auto &take) {
        for (int64_t first = 0; first < m; first += most) {
            const int64_t count = std::min(most, m - first);
            read(first, count, block.data());
            for (int64_t i = 0; i < count; ++i)
                take(first + i, block.data() + i * n);
        }
    };
    if (scale_rows) {
        each_row([&](int64_t i, const float *row) {
            scales[i] = scale_of(largest_of(row, n));
            for (int64_t j = 0; j < n; ++j)
                q[i * n + j] = rounded(row[j], scales[i]);
        });
        return;
    }
    std::fill_n(scales, n, 0.0f);
    each_row([&](int64_t, const float *row) {
        for (int64_t j = 0; j < n; ++j)
            scales[j] = std::max(scales[j], std::abs(row[j]));
    });
    std::transform(scales, scales + n, scales, scale_of);
    each_row([&](int64_t i, const float *row) {
        for (int64_t j = 0; j < n; ++j)
            q[i * n + j] = rounded(row[j], scales[j]);
    });
}

} // namespace ponder
