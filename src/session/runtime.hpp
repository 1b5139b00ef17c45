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
// Whether a folder's weights are kept as int8 here. `weights`: "auto" as the folder has them, int8
// only where the backend has kernels; "int8" (PONDER_E_UNSUPPORTED where it has not); "float".
class Gpt2Folder;
enum class Storage;
Storage choose_storage(const Backend &backend, const Gpt2Folder &folder,
                       const std::string &weights);

} // namespace ponder
