// What a process shares on purpose: memory under one limit, threads, backends, the log.
#pragma once

#include "backend/registry.hpp"

namespace ponder {

struct Runtime {
    std::shared_ptr<Memory> memory;
    std::shared_ptr<Threads> threads;
    Log log;
    std::vector<Backend> backends; // best first

    // By name; "auto" is the best available one. PONDER_E_NOT_FOUND with the reason otherwise.
    const Backend &backend(const std::string &name) const;
};

DType parse_dtype(const std::string &name); // "f32", "bf16"
// PONDER_E_UNSUPPORTED when the backend cannot hold activations of this type.
void require_dtype(const Backend &backend, DType type);

} // namespace ponder
