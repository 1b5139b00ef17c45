// From Settings to a runtime, options and a loaded model.
#pragma once

#include "common.hpp"
#include "json_out.hpp"
#include "settings.hpp"

namespace tool {

// An option that the user set, by flag or --set.
bool given(const Settings &settings, const std::string &name);

Runtime open_runtime(const Settings &settings);

// --model, or the folder that comes with the tool. Throws Failure(exit_file).
std::string model_folder(const Settings &settings);

// The trained adapter beside the default model, for the commands that show what adapting gains;
// empty if there is none or the user asked for something else.
std::string default_adapter(const Settings &settings);

// The command's own defaults, then what the user gave.
Options make_options(const Settings &settings);
// The options in force: these, with what the adapter's folder stores.
Options options_in_force(const Settings &settings);

// Throws Failure(exit_usage) for policies that read what comes next, where only what was read so
// far is known.
void require_causal(const ponder_options *options);

// Throws Failure(exit_backend) when --backend or --dtype is not there: never a fallback.
void require_backend(const ponder_runtime *runtime, const Settings &settings);

// Progress of a long call that ends with an interrupt.
int32_t stop_when_interrupted(void *, uint64_t, uint64_t);

Model load_model(ponder_runtime *runtime, const std::string &folder, const Settings &settings);
ponder_model_options model_options(const Settings &settings);
Session make_session(const ponder_model *model, const ponder_options *options);

// An object with all of them.
void options_json(JsonWriter &json, const ponder_options *options);

// "bf16", "bf16, int8 weights"
std::string types_text(const ponder_model_info &model);

// "lora always, 2 steps"
std::string method_text(const ponder_options *options);

uint64_t peak_rss_bytes();

} // namespace tool
