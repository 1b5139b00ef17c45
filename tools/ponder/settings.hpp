// The command line as plain data.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace tool {

enum class Command { run, eval, info, backends, bench };

struct Settings {
    Command command = Command::run;

    std::string model; // folder; empty = the one that comes with the tool
    std::string backend = "auto";
    std::string dtype = "f32";
    std::string backend_path;                                 // empty = the library's places
    uint32_t threads = 0;                                     // 0 = cores this process may use
    uint64_t memory_limit = 0;                                // bytes, 0 = none
    std::vector<std::pair<std::string, std::string>> options; // flags, then --set, in order

    bool json = false;
    bool quiet = false;

    std::vector<std::string> paths; // run; empty = the current directory
    bool list = false;              // run: only say which files would be read
    bool baseline = true;           // run
    std::string html;               // run; empty = no page

    std::string stream;       // eval
    uint64_t min_chunks = 8;  // eval
    uint64_t max_chunks = 48; // eval

    bool load = true; // info: false = the plan alone, from the files' headers

    uint32_t bench_chunks = 4;  // bench: chunks a repeat
    uint32_t bench_repeats = 5; // bench
};

} // namespace tool
