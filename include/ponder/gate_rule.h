/* How a gate decides (struct ponder_gate): for modules whose devices decide by themselves and for
 * the core, which decides where they do not. Both get the same bits from the same signals; compilers
 * that fuse products with sums have to be told not to (GCC on Arm: -ffp-contract=off). C99. */
#ifndef PONDER_GATE_RULE_H
#define PONDER_GATE_RULE_H

#include "ponder/backend.h"

#include <math.h>

#ifdef __CUDACC__
#define PONDER_GATE_FUNCTION static __host__ __device__ __forceinline__
#else
#define PONDER_GATE_FUNCTION static inline
#endif
#ifdef __CUDA_ARCH__ /* code is fetched for every chunk: small is fast */
#define PONDER_GATE_LOOP _Pragma("unroll 1")
#else
#define PONDER_GATE_LOOP
#endif

/* Rounded, before it is added to something: a GPU's compiler would fuse the two. */
PONDER_GATE_FUNCTION double ponder_gate_product(double a, double b) {
#ifdef __CUDA_ARCH__
    return __dmul_rn(a, b);
#else
    return a * b;
#endif
}

/* Linear between order statistics; 0 of none. Sorts the values. */
PONDER_GATE_FUNCTION double ponder_gate_quantile(double *values, int64_t count, double q) {
    if (count == 0)
        return 0;
    PONDER_GATE_LOOP
    for (int i = 1; i < (int)count; ++i)
        PONDER_GATE_LOOP
        for (int j = i; j > 0 && values[j] < values[j - 1]; --j) {
            const double larger = values[j - 1];
            values[j - 1] = values[j];
            values[j] = larger;
        }
    const double at = ponder_gate_product(q, (double)(count - 1));
    const int low = (int)at, high = low + 1 < (int)count ? low + 1 : low;
    return values[low] + ponder_gate_product(at - (double)low, values[high] - values[low]);
}

/* Whether a chunk with this score (NaN: it has none) asks for an update. Controlled thresholds are
 * those of PonderTTT (arXiv 2601.00894): a quantile of the first chunks' scores, then proportional
 * control of the running rate of updates towards the target. */
PONDER_GATE_FUNCTION int ponder_gate_decide(ponder_gate *g, double score) {
    g->score = score;
    g->compared = (double)NAN;
    if (g->rule == PONDER_GATE_THRESHOLD) {
        /* A layer that decides before its first pass knows nothing yet and looks. */
        g->calibrating = isnan(score) ? 1 : 0;
        g->compared = g->threshold;
        return g->calibrating || score > g->threshold;
    }
    g->calibrating = g->seen < PONDER_GATE_FIRST;
    if (g->calibrating) {
        if (!isnan(score))
            g->first[g->count++] = score;
        if (++g->seen == PONDER_GATE_FIRST)
            g->threshold = ponder_gate_quantile(g->first, g->count, 1 - g->target);
        return 1;
    }
    g->compared = g->threshold;
    const int update = score > g->threshold;
    g->rate = ponder_gate_product(1 - g->gain, g->rate) + ponder_gate_product(g->gain, update);
    g->threshold += ponder_gate_product(ponder_gate_product(g->gain, g->rate - g->target),
                                        fabs(g->threshold));
    return update;
}

/* A chunk's steps out of a token bucket: what it has of those that are wanted. */
PONDER_GATE_FUNCTION int64_t ponder_gate_spend(double rate, double burst, double *left,
                                               int64_t wanted) {
    if (isinf(rate))
        return wanted;
    *left = fmin(burst, *left + rate);
    const int64_t granted = (double)wanted > *left ? (int64_t)*left : wanted;
    *left -= (double)granted;
    return granted;
}
PONDER_GATE_FUNCTION void ponder_gate_grant(ponder_gate *g, int64_t wanted) {
    g->wanted = wanted;
    g->granted = ponder_gate_spend(g->budget_rate, g->budget_burst, &g->budget_left, wanted);
}

#undef PONDER_GATE_FUNCTION
#undef PONDER_GATE_LOOP
#endif
