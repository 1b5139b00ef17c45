// `ponder convert`: a copy of a model folder with int8 weights.
#include "commands.hpp"
#include "json_out.hpp"
#include "setup.hpp"
#include "text.hpp"

#include <cstdio>
#include <filesystem>

namespace fs = std::filesystem;

namespace tool {

namespace {

// Of the safetensors files in the folder, not below it.
uint64_t weight_bytes(const std::string &folder) {
    uint64_t bytes = 0;
    for (const fs::directory_entry &entry : fs::directory_iterator(folder))
        if (entry.path().extension() == ".safetensors")
            bytes += entry.file_size();
    return bytes;
}

} // namespace

int convert_command(const Settings &settings) {
    const std::string &from = settings.paths[0], &out = settings.paths[1];
    const Runtime runtime = open_runtime(settings);
    auto limits = sized<ponder_call>();
    limits.progress = stop_when_interrupted;
    call(ponder_model_convert, runtime.get(), from.c_str(), out.c_str(), settings.weights.c_str(),
         &limits);
    const uint64_t before = weight_bytes(from), after = weight_bytes(out);
    if (settings.json) {
        JsonWriter json;
        json.object().member("from", from).member("out", out).member("weights", settings.weights);
        json.member("bytes_before", before).member("bytes_after", after).end();
        json.print();
    } else if (!settings.quiet) {
        std::printf("%s: %s of weights, %s before\n", out.c_str(), bytes_text(after).c_str(),
                    bytes_text(before).c_str());
    }
    return exit_ok;
}

} // namespace tool
