// Matrix products of one tile of rows:  C[m, n] (+)= alpha A[m, k] B[k, n] + ..., m <= 64.
//
// Operands are made of 32-bit units: an f32, or two bf16 that follow each other along k (the even
// one in the low half), as vdpbf16ps and AMX want them. A lies in one of two layouts, both with
// a constant stride so that the inner loop needs one address register:
//     rows:     chunks of 64 units of k; in a chunk unit (i, k) is a[i * 80 + k]. 5 cache lines
//               a row keep the rows of a block in different sets.
//     columns:  unit (i, k) is a[k * 80 + i].
// B lies in panels of kPanel columns, unit (k, j) of a panel is b[k * b_step + j]. pack_b makes
// packed panels; an f32 matrix whose width is a multiple of kPanel can be used where it stands.
// Up to kSpare rows beyond m may be read of A; what stands there does not matter.
//
// A frozen int8 B lies in panels of bytes: element (k, j) of a panel is b[k * kPanel + j], whatever
// the unit. It is widened on its way to the registers when m is small, else a panel at a time,
// which a tile's rows then share. int8 is exact in bf16; the scales of columns come in when the
// sums are finished.
#pragma once

#include "kernel.hpp"

namespace ponder::cpu::PONDER_ISA {

constexpr int64_t kPanel = 2 * W;
constexpr int64_t kChunk = 64, kStride = 80;
constexpr int64_t kSpare = 2;
constexpr int64_t kChunkUnits = (kTile + kSpare) * kStride;

// Units of k elements. AMX takes 16 at a time: the rest of the last 16 is zero in both operands.
#if defined(__AMX_BF16__)
constexpr int64_t kHalfStep = 16;
#else
constexpr int64_t kHalfStep = 1;
#endif
PONDER_INLINE int64_t units(int64_t k, bool half_) {
    return half_ ? tiles(k, 2 * kHalfStep) * kHalfStep : k;
}
PONDER_INLINE size_t a_rows_units(int64_t k_units) {
    return size_t(tiles(k_units, kChunk) * kChunkUnits);
}
PONDER_INLINE size_t a_columns_units(int64_t k_units) { return size_t(k_units * kStride + 16); }
PONDER_INLINE size_t b_units(int64_t k_units, int64_t n) {
    return size_t(tiles(n, kPanel) * kPanel * k_units);
}

// Rows of an int8 panel: whole units.
PONDER_INLINE int64_t byte_rows(int64_t k) { return 2 * units(k, true); }
PONDER_INLINE size_t b_bytes(int64_t k, int64_t n) {
    return size_t(tiles(n, kPanel) * kPanel * byte_rows(k));
}

struct Part {
    const uint32_t *a = nullptr;
    const uint32_t *b = nullptr;
    int64_t k = 0;       // units
    int64_t b_step = 0;  // units from one k to the next
    int64_t b_panel = 0; // units from one panel to the next
    // Only AMX reads A with other strides than those of its layout, see left_operand.
    int64_t a_row = kStride, a_chunk = kChunkUnits;
};

PONDER_INLINE Part packed_part(const uint32_t *a, const uint32_t *b, int64_t k) {
    return {a, b, k, kPanel, kPanel * k, kStride, kChunkUnits};
}
// b f32[k, n] with rows `step` apart, n a multiple of kPanel.
PONDER_INLINE Part direct_part(const uint32_t *a, const float *b, int64_t k, int64_t step) {
    return {a, reinterpret_cast<const uint32_t *>(b), k, step, kPanel, kStride, kChunkUnits};
}

struct Product {
    bool half = false;    // units are bf16 pairs
    bool columns = false; // layout of A
    int parts = 1;        // A B = sum of the parts
    Part part[2];
    const int8_t *bytes = nullptr; // in the place of part[0].b: int8 panels, b_panel bytes apart
    uint32_t *wide = nullptr;      // room for one of them in units; not used for few rows
    float alpha = 1;
    View scales = {nullptr, false}; // [n], in the place of alpha
    View bias = {nullptr, false};   // [n]
    const float *add = nullptr;     // [m, n]
    int64_t add_row = 0;
    bool accumulate = false; // onto y
    View y = {nullptr, false};
    int64_t y_row = 0;
};

void product(const Product &p, int64_t m, int64_t n);

// A frozen weight w[k, n], or w^T from w[n, k], packed: in units, or as the int8 it is.
struct Weight {
    const uint32_t *units;
    const int8_t *bytes;
    int64_t depth; // units
    int64_t panel; // units or bytes from one panel to the next

    __attribute__((always_inline)) explicit operator bool() const { return units || bytes; }
    // B of part 0: columns from c on, a multiple of kPanel, units of k from u on, a multiple of
    // kHalfStep.
    __attribute__((always_inline)) void use(Product &p, int64_t c, int64_t u) const {
        p.part[0].k = depth;
        p.part[0].b_step = kPanel, p.part[0].b_panel = panel;
        if (bytes)
            p.bytes = bytes + c / kPanel * panel + u * (p.half ? 2 * kPanel : kPanel);
        else
            p.part[0].b = units + c / kPanel * panel + u * kPanel;
    }
};

// Up to kFewRows an int8 panel is widened for each block of rows; beyond, once.
constexpr int64_t kFewRows = 16;

// A in the rows layout from x[m, k], rows `step` apart, times factor[k] where that is given.
void pack_a(uint32_t *to, View x, int64_t step, int64_t m, int64_t k, bool half_,
            View factor = {nullptr, false});

// Makes x[m, k], times factor[k] where that is given, the left operand of a part: packed into `to`,
// or where it stands when AMX can load it. A distance of a multiple of 4 KiB would put all rows of
// a tile into one cache set.
PONDER_INLINE void left_operand(Part &part, uint32_t *to, View x, int64_t step, int64_t m,
                                int64_t k, bool half_, View factor = {nullptr, false}) {
    part.a = to, part.a_row = kStride, part.a_chunk = kChunkUnits;
    if (kHalfStep > 1 && !factor.data && half_ && x.narrow && m > kFewRows && m % 16 == 0 &&
        k % (2 * kHalfStep) == 0 && step % 2048 != 0 && step % 2 == 0) {
        part.a = reinterpret_cast<const uint32_t *>(x.data);
        part.a_row = step / 2, part.a_chunk = kChunk;
    } else {
        pack_a(to, x, step, m, k, half_, factor);
    }
}

// A in bf16 from its transpose x[k, m], rows `step` apart: in the columns layout, or in rows where
// AMX is to take it.
#if defined(__AMX_BF16__)
constexpr bool kTransposedIsColumns = false;
#else
constexpr bool kTransposedIsColumns = true;
#endif
PONDER_INLINE size_t a_transposed_units(int64_t k) {
    return kTransposedIsColumns ? a_columns_units(units(k, true)) : a_rows_units(units(k, true));
}
void pack_a_transposed(uint32_t *to, View x, int64_t step, int64_t k, int64_t m);

// Packed panels of B from x[k, n]: element (k, j) is x[k * k_step + j * n_step], and one of the
// steps is 1.
void pack_b(uint32_t *to, View x, int64_t k_step, int64_t n_step, int64_t k, int64_t n, bool half_);

// The packed form of input i, a frozen weight w[k, n], or of w^T from w[n, k]: units of its type,
// or bytes, which `half_` then says how to widen. Null when memory ran out.
Weight pack_weight(const Call &c, uint32_t i, int64_t k, int64_t n, bool transposed, bool half_);

// Whether products with input i are made in bf16: by the weight's type, and where that is int8 by
// that of what it is multiplied with or gives.
PONDER_INLINE bool is_half(const Call &c, uint32_t i, const ponder_tensor &x,
                           const ponder_tensor &y) {
    return scaled(c, i) ? x.dtype == kBF16 || y.dtype == kBF16 : in(c, i).dtype == kBF16;
}

// Where the scales of an int8 weight come in, the last input: on the n columns of the product, or
// on the depth, so with the left operand.
PONDER_INLINE bool scales_columns(const Call &c, int64_t n, bool transposed) {
    const ponder_tensor &s = in(c, c.op->n_in - 1);
    return s.dim[transposed ? 0 : 1] == n && s.dim[transposed ? 1 : 0] == 1;
}

// Units of Product::wide for products of up to m rows and k units with input i.
PONDER_INLINE size_t wide_units(const Call &c, uint32_t i, int64_t m, int64_t k) {
    return scaled(c, i) && m > kFewRows ? size_t(k * kPanel) : 0;
}

} // namespace ponder::cpu::PONDER_ISA
