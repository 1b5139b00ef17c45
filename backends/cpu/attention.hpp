// One tile of at most 64 queries of one head over all keys before them.
#pragma once

#include "gemm.hpp"

namespace ponder::cpu::PONDER_ISA {

// Neighbouring keys with their values, `row` elements from one to the next.
struct Keys {
    View k, v;
    int64_t row, count;
};

struct AttentionTile {
    int64_t head; // D
    bool half_;
    View q; // [m, D], rows q_row apart
    int64_t q_row, m;
    int64_t first; // query i sees keys 0 .. first + i
    Keys part[2];  // the keys in order; `first` + m of them in all
    View o;        // [m, D], rows o_row apart
    int64_t o_row;
    float *lse; // [m], may be NULL
};

size_t attention_workspace(int64_t head, bool half_);
void attention_tile(const AttentionTile &t, void *workspace);

} // namespace ponder::cpu::PONDER_ISA
