// dropout: y_i = x_i / (1 - probability), or 0 where the draw of element i is below `probability`:
//     draw_i = mix(mix(i ^ first) + second) / 2^32
// with the mix (lowbias32, C. Wellons' hash prospector) and keys of the reference kernel, so that
// either may run the forward pass and the other its vjp.
#include "ops.hpp"

namespace ponder::cpu::PONDER_ISA {
namespace {

struct Dropout : Kernel {
    int64_t row_count, width;
    double probability;
    uint32_t salt;
    int32_t x, y;
};

#if defined(__AVX512F__)
PONDER_INLINE vi all(uint32_t x) { return _mm512_set1_epi32(int(x)); }
PONDER_INLINE vi plus(vi a, vi b) { return _mm512_add_epi32(a, b); }
PONDER_INLINE vi either(vi a, vi b) { return _mm512_xor_si512(a, b); }
PONDER_INLINE vi times(vi a, vi b) { return _mm512_mullo_epi32(a, b); }
template <int bits> PONDER_INLINE vi down(vi a) { return _mm512_srli_epi32(a, bits); }
PONDER_INLINE vi lanes() {
    return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}
PONDER_INLINE vf unless_below(vi draw, vi limit, vf x) {
    return _mm512_maskz_mov_ps(_mm512_cmpge_epu32_mask(draw, limit), x);
}
#else
PONDER_INLINE vi all(uint32_t x) { return _mm256_set1_epi32(int(x)); }
PONDER_INLINE vi plus(vi a, vi b) { return _mm256_add_epi32(a, b); }
PONDER_INLINE vi either(vi a, vi b) { return _mm256_xor_si256(a, b); }
PONDER_INLINE vi times(vi a, vi b) { return _mm256_mullo_epi32(a, b); }
template <int bits> PONDER_INLINE vi down(vi a) { return _mm256_srli_epi32(a, bits); }
PONDER_INLINE vi lanes() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
PONDER_INLINE vf unless_below(vi draw, vi limit, vf x) {
    const vi top = all(0x80000000u); // there is only a signed comparison
    const vi below = _mm256_cmpgt_epi32(either(limit, top), either(draw, top));
    return _mm256_andnot_ps(_mm256_castsi256_ps(below), x);
}
#endif

PONDER_INLINE vi mix(vi x) {
    x = times(either(x, down<16>(x)), all(0x7feb352du));
    x = times(either(x, down<15>(x)), all(0x846ca68bu));
    return either(x, down<16>(x));
}

PONDER_INLINE uint32_t mix(uint32_t x) {
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x ^ (x >> 16);
}

void run(const Kernel *kernel, void *const *buffers, void *, uint32_t task) {
    const Dropout &k = *static_cast<const Dropout *>(kernel);
    const Span s = span(task, kTile, k.row_count);
    const int64_t begin = s.begin * k.width;
    const int32_t *seed = static_cast<const int32_t *>(buffers[1]);
    const uint32_t first = mix(mix(uint32_t(seed[0])) + k.salt);
    const vi key = all(first), other = all(mix(first ^ uint32_t(seed[1])));
    const double scaled = k.probability * 4294967296.0;
    const vi limit = all(uint32_t(scaled < 4294967295.0 ? scaled : 4294967295.0));
    const vf factor = set(float(1 / (1 - k.probability)));
    const View x = View::of(buffers[0], k.x).at(begin), y = View::of(buffers[2], k.y).at(begin);
    each_vector((s.end - s.begin) * k.width, PONDER_EACH(i, n) {
        const vi place = plus(all(uint32_t(begin + i)), lanes());
        const vi draw = mix(plus(mix(either(place, key)), other));
        y.put(i, unless_below(draw, limit, x.get(i, n) * factor), n);
    });
}

} // namespace

int32_t plan_dropout(const Call &c) {
    if (!floats(in(c, 0)) || in(c, 1).dtype != kI32 || !floats(out(c, 0)) || attr(c, 0) < 0 ||
        attr(c, 0) >= 1)
        return PONDER_PLAN_NONE;
    Dropout *k = new_kernel<Dropout>(run);
    if (!k)
        return PONDER_PLAN_FAILED;
    k->row_count = rows(in(c, 0)), k->width = last(in(c, 0));
    k->probability = attr(c, 0), k->salt = uint32_t(int64_t(attr(c, 1)));
    k->x = in(c, 0).dtype, k->y = out(c, 0).dtype;
    return planned_rows(c, k, k->row_count);
}

} // namespace ponder::cpu::PONDER_ISA
