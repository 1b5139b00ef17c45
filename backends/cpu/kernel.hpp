// Helpers of the kernels' plan functions: shapes, row tiles, workspace.
#pragma once

#include "device.hpp"
#include "simd.hpp"

namespace ponder::cpu::PONDER_ISA {

constexpr int64_t kTile = PONDER_ROW_TILE;
constexpr int32_t kF32 = PONDER_DTYPE_F32, kBF16 = PONDER_DTYPE_BF16, kI32 = PONDER_DTYPE_I32,
                  kI8 = PONDER_DTYPE_I8;

PONDER_INLINE const ponder_tensor &in(const Call &c, uint32_t i) { return c.op->tensor[i]; }
PONDER_INLINE const ponder_tensor &out(const Call &c, uint32_t i) {
    return c.op->tensor[c.op->n_in + i];
}
PONDER_INLINE double attr(const Call &c, uint32_t i) {
    return i < c.op->n_attr ? c.op->attr[i] : 0.0;
}
PONDER_INLINE bool given(const ponder_tensor &t) { return t.dtype != PONDER_DTYPE_NONE; }
PONDER_INLINE bool floats(const ponder_tensor &t) { return t.dtype == kF32 || t.dtype == kBF16; }
PONDER_INLINE bool f32_or_none(const ponder_tensor &t) { return !given(t) || t.dtype == kF32; }
PONDER_INLINE bool floats_or_none(const ponder_tensor &t) { return !given(t) || floats(t); }
// A frozen weight, int8 only with scales, which are the last input then.
PONDER_INLINE bool is_weight(const ponder_tensor &t) { return floats(t) || t.dtype == kI8; }
PONDER_INLINE bool scaled(const Call &c, uint32_t w) { return in(c, w).dtype == kI8; }
PONDER_INLINE int64_t last(const ponder_tensor &t) { return t.rank ? t.dim[t.rank - 1] : 1; }
PONDER_INLINE int64_t count(const ponder_tensor &t) {
    int64_t n = 1;
    for (int i = 0; i < t.rank; ++i)
        n *= t.dim[i];
    return n;
}
// All dims but the last.
PONDER_INLINE int64_t rows(const ponder_tensor &t) {
    int64_t n = 1;
    for (int i = 0; i + 1 < t.rank; ++i)
        n *= t.dim[i];
    return n;
}
PONDER_INLINE int64_t tiles(int64_t n, int64_t tile) { return (n + tile - 1) / tile; }
PONDER_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
PONDER_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
PONDER_INLINE size_t padded(size_t bytes) { return (bytes + 63) / 64 * 64; }

// A kernel object of type K and its run function; K derives from Kernel.
template <class K>
PONDER_INLINE K *new_kernel(void (*run)(const Kernel *, void *const *, void *, uint32_t)) {
    K *k = static_cast<K *>(kernel_memory(sizeof(K)));
    if (k)
        k->run = run;
    return k;
}

// A plan that ran out of memory half-way.
PONDER_INLINE int32_t forget(Kernel *kernel) {
    kernel_release(kernel);
    return PONDER_PLAN_FAILED;
}

PONDER_INLINE int32_t planned(const Call &c, Kernel *kernel, int64_t tasks, int32_t tiling,
                              size_t workspace = 0) {
    if (!kernel)
        return PONDER_PLAN_FAILED;
    c.plan->tasks = uint32_t(larger(tasks, 1));
    c.plan->tiling = tiling;
    c.plan->workspace = padded(workspace);
    c.plan->kernel = kernel;
    return PONDER_PLAN_OK;
}

PONDER_INLINE int32_t planned_rows(const Call &c, Kernel *kernel, int64_t row_count,
                                   size_t workspace = 0) {
    return planned(c, kernel, tiles(row_count, kTile), PONDER_TILE_ROWS, workspace);
}

// Rows [begin, end) of a row task.
struct Span {
    int64_t begin, end;
};
PONDER_INLINE Span span(uint32_t task, int64_t tile, int64_t n) {
    return {int64_t(task) * tile, smaller(int64_t(task) * tile + tile, n)};
}

// Cuts a workspace into aligned pieces.
struct Carver {
    char *at;
    template <class T> __attribute__((always_inline)) T *take(size_t n) {
        T *p = reinterpret_cast<T *>(at);
        at += padded(n * sizeof(T));
        return p;
    }
};

} // namespace ponder::cpu::PONDER_ISA
