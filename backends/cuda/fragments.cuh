// Operands of mma.m16n8k16 straight from device memory, for products too small for tiles in shared
// memory. Lane l = 4 g + q holds rows g and g + 8 of the first operand, column g of the second, and
// of both the places 2q, 2q+1, 2q+8, 2q+9 of the sixteen that are summed over (PTX ISA 9.7.14). Which
// element stands for which place is free as long as both operands agree, so each lane takes
// neighbours.
//
// f32 factors enter as two bf16 numbers, what fits and the rest of it, so that small changes of fast
// weights are not lost.
#pragma once

#include "attention.cuh"

namespace ponder::cuda {

__device__ inline float rest_of(float x) { return x - __bfloat162float(__float2bfloat16(x)); }

// c += a b for an f32 second operand: its four places of this lane
__device__ inline void multiply_wide(float (&c)[4], const uint32_t (&a)[4], const float (&b)[4]) {
    mma_bf16(c, a, pack_bf16(b[0], b[1]), pack_bf16(b[2], b[3]));
    mma_bf16(c, a, pack_bf16(rest_of(b[0]), rest_of(b[1])),
             pack_bf16(rest_of(b[2]), rest_of(b[3])));
}

} // namespace ponder::cuda
