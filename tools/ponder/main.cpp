// ponder: the command-line tool over libponder's C ABI. Data goes to stdout, all else to stderr.
#include "cli_options.hpp"
#include "commands.hpp"
#include "common.hpp"
#include "interrupt.hpp"

#include <cstdio>
#include <new>

namespace tool {

namespace {

int run(int argc, char **argv) {
    const std::optional<Settings> settings = parse_command_line(argc, argv);
    if (!settings)
        return exit_ok;
    catch_interrupts();
    switch (settings->command) {
    case Command::run:
        return run_command(*settings);
    case Command::generate:
        return generate_command(*settings);
    case Command::eval:
        return eval_command(*settings);
    case Command::train:
        return train_command(*settings);
    case Command::calibrate:
        return calibrate_command(*settings);
    case Command::report:
        return report_command(*settings);
    case Command::adapter:
        return adapter_command(*settings);
    case Command::convert:
        return convert_command(*settings);
    case Command::info:
        return info_command(*settings);
    case Command::backends:
        return backends_command(*settings);
    case Command::bench:
        return bench_command(*settings);
    }
    return exit_failure;
}

int complain(const char *message, ExitCode code) {
    std::fflush(stdout);
    std::fprintf(stderr, "ponder: %s\n", message);
    return code;
}

} // namespace

} // namespace tool

int main(int argc, char **argv) {
    using namespace tool;
    int code = exit_failure;
    try {
        code = run(argc, argv);
    } catch (const Failure &failure) {
        code = complain(failure.what(), failure.code);
    } catch (const std::bad_alloc &) {
        code = complain("out of memory", exit_memory);
    } catch (const std::exception &error) {
        code = complain(error.what(), exit_failure);
    }
    // A full disk or a closed pipe must not look like success.
    if (std::fflush(stdout) != 0 && code == exit_ok)
        code = complain("writing to standard output failed", exit_failure);
    return code;
}
