// The command line as plain data.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace tool {

enum class Command {
    run,
    generate,
    eval,
    train,
    calibrate,
    report,
    adapter,
    convert,
    info,
    backends,
    bench
};

enum class TrainKind { adapter, gate, backbone };

struct TrainSettings {
    TrainKind kind = TrainKind::adapter;
    std::vector<std::string> data, valid;
    double valid_share = 0; // of the packages of `data`, where `valid` is empty
    std::string out;
    std::string log;   // empty = log.jsonl in `out`
    std::string cache; // folder; empty = the user's
    bool resume = false;
    bool create = false; // backbone: a new tokenizer and new weights
    uint32_t vocabulary = 8192;
    uint32_t batch = 0; // streams a step; 0 = by kind
    uint64_t chunks = 16;
    uint64_t checkpoint_every = 50, keep = 3;
    uint64_t valid_every = 100, valid_chunks = 16;
};

// What `ponder generate` writes, and how.
struct GenerateSettings {
    std::vector<std::string> read; // learned from before
    std::string prompt;            // "-": standard input
    bool compare = false;          // with and without adapting, side by side
    uint64_t max_tokens = 128;
    double temperature = 0, top_p = 0, min_p = 0, repetition = 0;
    uint32_t top_k = 0;
    std::vector<std::string> stop;
};

enum class AdapterAction { export_peft, import_peft, merge };

struct Settings {
    Command command = Command::run;

    std::string model; // folder; empty = the one that comes with the tool
    std::string backend = "auto";
    std::string dtype = "f32";
    std::string weights = "auto";                             // convert: int8
    std::string backend_path;                                 // empty = the library's places
    uint32_t threads = 0;                                     // 0 = cores this process may use
    uint64_t memory_limit = 0;                                // bytes, 0 = none
    std::vector<std::pair<std::string, std::string>> options; // flags, then --set, in order

    bool json = false;
    bool quiet = false;

    std::vector<std::string> paths; // run: empty = the current directory; adapter: from, to
    bool list = false;              // run: only say which files would be read
    bool baseline = true;           // run
    std::string html;               // run: empty = no page; report: the page

    std::string stream;       // eval
    uint64_t min_chunks = 8;  // eval
    uint64_t max_chunks = 48; // eval

    std::vector<std::string> streams, held; // calibrate
    std::string shares;                     // calibrate: of chunks with 0, 1, 2, 4 steps
    bool search = true;                     // calibrate

    TrainSettings train;
    GenerateSettings generate;

    std::vector<std::string> logs; // report

    AdapterAction adapter_action = AdapterAction::merge;

    bool load = true; // info: false = the plan alone, from the files' headers

    uint32_t bench_chunks = 4;  // bench: chunks a repeat
    uint32_t bench_repeats = 5; // bench
};

} // namespace tool
