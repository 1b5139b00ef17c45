// Matrices as int8 with one f32 scale for each output channel: w = q scale, q = round(w / scale),
// scale = max |w| / 127. Symmetric, so that products need no sums of their other side.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace ponder {

// What is stored so in a model: the linears, the embedding and the head. Positions and vectors are
// a hundredth of a model and stay floats.
bool is_int8_weight(const std::string &tensor);
// Output channels are the columns of a linear, [in, out], and the rows of embedding and head, [V,
// C].
bool int8_scales_rows(const std::string &tensor);
std::vector<int64_t> int8_scales_shape(const std::string &tensor,
                                       const std::vector<int64_t> &shape);
inline std::string int8_scales_name(const std::string &tensor) { return tensor + "_scale"; }

// Smaller maxima count as 0: scales and their inverses stay far from the ends of f32.
constexpr float int8_smallest = 1e-30f;
constexpr float int8_smallest_scale = int8_smallest / 128;

// w [m, n], read in order and some rows at a time: once, or twice where columns are scaled. An
// output channel of zeros has scale 1.
using ReadRows = std::function<void(int64_t first, int64_t count, float *to)>;
void to_int8(int64_t m, int64_t n, bool scale_rows, const ReadRows &read, int8_t *q, float *scales);

} // namespace ponder
