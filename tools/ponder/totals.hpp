// Sums over the records of a pass.
#pragma once

#include <ponder/ponder.h>

#include <cmath>

namespace tool {

struct Totals {
    uint64_t chunks = 0, tokens = 0, predictions = 0;
    uint64_t updates = 0, steps = 0, rollbacks = 0, over_budget = 0;
    uint64_t flops = 0;
    uint64_t score_ns = 0, decide_ns = 0, learn_ns = 0, wall_ns = 0;
    double chunk_loss_sum = 0; // of mean chunk losses
    double token_loss_sum = 0; // of token losses
    bool causal = true;

    void add(const ponder_record &record, uint64_t ns) {
        chunks += 1;
        tokens += record.tokens;
        predictions += record.predictions;
        updates += (record.flags & PONDER_RECORD_UPDATED) != 0;
        rollbacks += (record.flags & PONDER_RECORD_ROLLED_BACK) != 0;
        over_budget += (record.flags & PONDER_RECORD_OVER_BUDGET) != 0;
        causal = causal && !(record.flags & PONDER_RECORD_NOT_CAUSAL);
        steps += uint64_t(record.steps > 0 ? record.steps : 0);
        flops += record.flops;
        score_ns += record.score_ns;
        decide_ns += record.decide_ns;
        learn_ns += record.learn_ns;
        wall_ns += ns;
        chunk_loss_sum += record.loss_before;
        token_loss_sum += record.loss_before * record.predictions;
    }
    double seconds() const { return double(wall_ns) * 1e-9; }
    double per_chunk(double sum) const { return chunks ? sum / double(chunks) : NAN; }
    double chunk_loss() const { return per_chunk(chunk_loss_sum); }
    double token_loss() const { return predictions ? token_loss_sum / double(predictions) : NAN; }
    double tokens_per_second() const { return wall_ns ? double(tokens) / seconds() : 0; }
};

} // namespace tool
