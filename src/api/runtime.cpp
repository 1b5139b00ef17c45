// Status names, versions, runtime, backends.
#include "api/handles.hpp"

using namespace ponder;
using namespace ponder::api;

const char *ponder_status_name(ponder_status status) {
    switch (status) {
    case PONDER_OK:
        return "PONDER_OK";
    case PONDER_E_ARGUMENT:
        return "PONDER_E_ARGUMENT";
    case PONDER_E_STATE:
        return "PONDER_E_STATE";
    case PONDER_E_NOT_FOUND:
        return "PONDER_E_NOT_FOUND";
    case PONDER_E_IO:
        return "PONDER_E_IO";
    case PONDER_E_FORMAT:
        return "PONDER_E_FORMAT";
    case PONDER_E_UNSUPPORTED:
        return "PONDER_E_UNSUPPORTED";
    case PONDER_E_MISMATCH:
        return "PONDER_E_MISMATCH";
    case PONDER_E_NO_MEMORY:
        return "PONDER_E_NO_MEMORY";
    case PONDER_E_BACKEND:
        return "PONDER_E_BACKEND";
    case PONDER_E_CANCELLED:
        return "PONDER_E_CANCELLED";
    case PONDER_E_DEADLINE:
        return "PONDER_E_DEADLINE";
    case PONDER_E_BUFFER:
        return "PONDER_E_BUFFER";
    case PONDER_E_INTERNAL:
        return "PONDER_E_INTERNAL";
    }
    return "unknown";
}

const char *ponder_version(void) { return PONDER_VERSION; }
uint32_t ponder_abi_version(void) { return PONDER_ABI; }

ponder_status ponder_runtime_create(ponder_runtime **out, const ponder_runtime_options *options,
                                    ponder_error *error) {
    return guard(error, [&] {
        require(out, "out");
        const ponder_runtime_options o = read_struct(options, "options");
        if (o.threads > 256)
            throw_error(PONDER_E_ARGUMENT, "options.threads = %u", o.threads);
        if (!o.allocate != !o.release)
            throw_error(PONDER_E_ARGUMENT, "options.allocate and options.release go together");
        auto runtime = std::make_shared<Runtime>();
        runtime->memory =
            std::make_shared<Memory>(o.memory_limit, o.user_data, o.allocate, o.release);
        runtime->threads = o.parallel_for
                               ? std::make_shared<Threads>(o.threads, o.parallel_for, o.user_data)
                               : std::make_shared<Threads>(o.threads);
        if (o.log)
            runtime->log = [log = o.log, user = o.user_data](int32_t level, const char *message) {
                log(user, level, message);
            };
        runtime->backends = load_backends(o.backend_path ? o.backend_path : "", runtime->log);
        auto handle = std::make_unique<ponder_runtime>();
        handle->runtime = std::move(runtime);
        *out = handle.release();
    });
}

void ponder_runtime_destroy(ponder_runtime *runtime) {
    if (runtime && ponder_runtime::is(runtime))
        delete runtime;
}

uint32_t ponder_backend_count(const ponder_runtime *runtime) {
    return runtime && ponder_runtime::is(runtime) ? uint32_t(runtime->runtime->backends.size()) : 0;
}

ponder_status ponder_backend_get(const ponder_runtime *runtime, uint32_t index,
                                 ponder_backend_info *out, ponder_error *error) {
    return guard(error, [&] {
        const auto &backends = check(runtime, "runtime").runtime->backends;
        check_out(out, "out");
        if (index >= backends.size())
            throw_error(PONDER_E_ARGUMENT, "index %u of %zu backends", index, backends.size());
        const Backend &backend = backends[index];
        const ponder_backend *d = backend.descriptor;
        ponder_backend_info info{};
        info.available = backend.available();
        info.name = backend.name.c_str();
        info.version = d ? d->version : "";
        info.isa = info.available ? d->isa() : "";
        info.path = backend.path.c_str();
        info.reason = backend.reason.c_str();
        info.bf16 = info.available && d->supports(PONDER_DTYPE_BF16);
        info.priority = d ? d->priority : 0;
        write_struct(out, info);
    });
}
