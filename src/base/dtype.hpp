// Storage types and their conversions.
#pragma once

#include "ponder/backend.h"

#include <bit>
#include <cstddef>
#include <cstdint>

namespace ponder {

enum class DType : int32_t {
    none = PONDER_DTYPE_NONE,
    f32 = PONDER_DTYPE_F32,
    bf16 = PONDER_DTYPE_BF16,
    f64 = PONDER_DTYPE_F64,
    i32 = PONDER_DTYPE_I32,
    i8 = PONDER_DTYPE_I8,
};

constexpr size_t size_of(DType type) {
    switch (type) {
    case DType::f32:
    case DType::i32:
        return 4;
    case DType::bf16:
        return 2;
    case DType::f64:
        return 8;
    case DType::i8:
        return 1;
    default:
        return 0;
    }
}

struct bf16 {
    uint16_t bits;
};

inline float to_float(bf16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }

// Round to nearest, ties to even; NaN stays NaN.
inline bf16 to_bf16(float x) {
    uint32_t u = std::bit_cast<uint32_t>(x);
    if ((u & 0x7fffffffu) > 0x7f800000u)
        return {uint16_t((u >> 16) | 0x40u)};
    return {uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}

} // namespace ponder
