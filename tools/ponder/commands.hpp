// One function a subcommand; the result is the exit code. Throws Failure.
#pragma once

#include "settings.hpp"

namespace tool {

int run_command(const Settings &settings);
int generate_command(const Settings &settings);
int eval_command(const Settings &settings);
int train_command(const Settings &settings);
int calibrate_command(const Settings &settings);
int report_command(const Settings &settings);
int adapter_command(const Settings &settings);
int convert_command(const Settings &settings);
int info_command(const Settings &settings);
int backends_command(const Settings &settings);
int bench_command(const Settings &settings);

} // namespace tool
