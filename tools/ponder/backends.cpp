// `ponder backends`: what was found, and why not.
#include "commands.hpp"
#include "common.hpp"
#include "json_out.hpp"
#include "setup.hpp"
#include "table.hpp"

#include <cstdio>

namespace tool {

int backends_command(const Settings &settings) {
    const Runtime runtime = open_runtime(settings);
    std::vector<ponder_backend_info> backends(ponder_backend_count(runtime.get()));
    for (uint32_t i = 0; i < backends.size(); ++i) {
        backends[i] = sized<ponder_backend_info>();
        call(ponder_backend_get, runtime.get(), i, &backends[i]);
    }
    if (settings.json) {
        JsonWriter json;
        json.object().member("schema_version", 1).member("command", "backends");
        json.key("backends").array();
        for (const ponder_backend_info &b : backends) {
            json.object().member("name", b.name).member("available", b.available != 0);
            json.member("version", b.version).member("isa", b.isa);
            json.key("dtypes").array(true);
            if (b.available)
                json.value("f32");
            if (b.bf16)
                json.value("bf16");
            json.end().member("priority", int64_t(b.priority)).member("path", b.path);
            json.member("reason", b.reason).end();
        }
        json.end().end().print();
        return exit_ok;
    }
    Table table("llll");
    table.row({"backend", "usable", "instructions", "dtypes"});
    for (const ponder_backend_info &b : backends)
        table.row({b.name, b.available ? "yes" : "no", b.isa,
                   !b.available ? ""
                   : b.bf16     ? "f32 bf16"
                                : "f32"});
    std::printf("%s\n", table.text(0).c_str());
    for (const ponder_backend_info &b : backends) {
        std::printf("%s: %s\n", b.name, b.path[0] ? b.path : "built in");
        if (b.reason[0])
            std::printf("    not usable: %s\n", b.reason);
    }
    return exit_ok;
}

} // namespace tool
