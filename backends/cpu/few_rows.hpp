// Products of a tile of rows or less, as in decoding. Their time is that of reading the weights, so
// the work is cut by columns: each task takes all rows and some panels of B.
#pragma once

#include "gemm.hpp"

namespace ponder::cpu::PONDER_ISA {

// Columns of a task: whole panels, about 64 KiB, at most 32 tasks.
PONDER_INLINE int64_t few_columns(int64_t n, const Weight &w) {
    const int64_t by_size = (64 << 10) / (w.panel * (w.bytes ? 1 : 4));
    return kPanel * larger(larger(by_size, 1), tiles(tiles(n, kPanel), 32));
}

struct FewRows {
    int64_t rows, k, n; // n: columns of w
    bool half_;
    Weight w;
    View x = {nullptr, false};      // [rows, k]
    View scales = {nullptr, false}; // [n], of an int8 w
    View bias = {nullptr, false};   // [n]
    const float *add = nullptr;     // [rows, n]
    View y = {nullptr, false};      // [rows, y_row], from the task's first column on
    int64_t y_row = 0;
};

// y = add + x w + b for `count` columns of w from c on. `work` holds a_rows_units(w.depth); rows of
// an int8 w are at most kFewRows.
void few_rows(const FewRows &f, int64_t c, int64_t count, uint32_t *work);

} // namespace ponder::cpu::PONDER_ISA
