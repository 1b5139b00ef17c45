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
    float alpha = 1;
    View bias = {nullptr, false}; // [n]
    const float *add = nullptr;   // [m, n]
    int64_t add_row = 0;
    bool accumulate = false; // onto y
    View y = {nullptr, false};
    int64_t y_row = 0;
};

void product(const Product &p, int64_t m, int64_t n);

// A in the rows layout from x[m, k], rows `step` apart.
void pack_a(uint32_t *to, View x, int64_t step, int64_t m, int64_t k, bool half_);

// Makes x[m, k] the left operand of a part: packed into `to`, or where it stands when AMX can load
// it. A distance of a multiple of 4 KiB would put all rows of a tile into one cache set.
PONDER_INLINE void left_operand(Part &part, uint32_t *to, View x, int64_t step, int64_t m,
                                int64_t k, bool half_) {
    part.a = to, part.a_row = kStride, part.a_chunk = kChunkUnits;
    if (kHalfStep > 1 && half_ && x.narrow && m % 16 == 0 && k % (2 * kHalfStep) == 0 &&
        step % 2048 != 0 && step % 2 == 0) {
        part.a = reinterpret_cast<const uint32_t *>(x.data);
        part.a_row = step / 2, part.a_chunk = kChunk;
    } else {
        pack_a(to, x, step, m, k, half_);
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

// The packed form of a frozen weight w[k, n], or of w^T from w[n, k]; its type decides the units.
// NULL when memory ran out.
const uint32_t *pack_weight(const Call &c, const void *w, int32_t dtype, int64_t k, int64_t n,
                            bool transposed);

} // namespace ponder::cpu::PONDER_ISA
