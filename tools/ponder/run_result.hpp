// What `ponder run` found, for the table, the JSON object and the page.
#pragma once

#include "common.hpp"
#include "totals.hpp"

#include <string>
#include <vector>

namespace tool {

struct RunChunk {
    ponder_record record; // of the adaptive pass
    double skip_loss;     // NaN without a baseline
};

struct RunResult {
    ponder_model_info model;
    std::string method, policy;
    uint64_t chunk_tokens = 0, context_tokens = 0;

    uint64_t files = 0, files_left_out = 0, bytes = 0;
    std::vector<RunChunk> chunks;
    Totals adapted, skip; // skip.chunks == 0 without a baseline
    bool interrupted = false;

    // Of the stream's front, as far as it is kept; NaN where a token has no prediction.
    std::vector<int32_t> tokens;
    std::vector<float> losses, skip_losses;
    bool all_kept = true;
    struct Start {
        uint64_t token; // position in the stream
        std::string path;
    };
    std::vector<Start> documents; // that begin in the kept front

    bool has_skip() const { return skip.chunks > 0; }
};

// Mean token losses over chunks [first, first + count).
struct RangeLoss {
    uint64_t first, count;
    double skip, adapted;
};
RangeLoss range_loss(const RunResult &run, uint64_t first, uint64_t count);
// The chunks that both passes have seen.
RangeLoss compared(const RunResult &run);
// At most eight ranges of about equal length over the stream.
std::vector<RangeLoss> ranges(const RunResult &run);

void print_run_table(const RunResult &run);
void print_run_json(const RunResult &run, const ponder_options *options);
// The whole page. `model` gives the tokens' bytes.
std::string html_report(const RunResult &run, const ponder_model *model);

} // namespace tool
