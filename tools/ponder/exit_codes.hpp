// What the tool's exit status means. `ponder --help` prints the same list, tests check it.
#pragma once

namespace tool {

enum ExitCode : int {
    exit_ok = 0,
    exit_failure = 1,      // anything that has no code of its own
    exit_usage = 2,        // command line: unknown flag, option, value
    exit_file = 3,         // a model, adapter, stream or text file is missing, malformed, unfit
    exit_backend = 4,      // the backend or its dtype is not there, or it failed
    exit_memory = 5,       // out of memory, or over --memory-limit
    exit_interrupted = 130 // SIGINT; what was done so far has been reported
};

} // namespace tool
