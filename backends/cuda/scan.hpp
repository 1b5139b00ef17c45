// What plans of TTT scans share, and the plain ones; see scan_plain.cuh.
#pragma once

#include "kernel.hpp"

#include <initializer_list>

namespace ponder::cuda {

// One type of q, k, v, y and their like, the `rows`; f32 of the `wide`; the rates have any.
inline bool types_fit(const Call &call, std::initializer_list<size_t> rows,
                      std::initializer_list<size_t> wide) {
    for (const size_t i : rows)
        if (call.has(i) && call.type(i) != call.type(0))
            return false;
    for (const size_t i : wide)
        if (call.has(i) && call.type(i) != PONDER_DTYPE_F32)
            return false;
    return true;
}

int32_t plan_plain_ttt_linear(const Call &);
int32_t plan_plain_ttt_mlp(const Call &);
int32_t plan_plain_ttt_linear_vjp(const Call &);
int32_t plan_plain_ttt_mlp_vjp(const Call &);

} // namespace ponder::cuda
