// Backends: found, checked, and opened. The reference backend is always there.
#pragma once

#include "ponder/backend.h"

#include "base/dtype.hpp"
#include "base/memory.hpp"
#include "base/threads.hpp"

#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace ponder {

using Log = std::function<void(int32_t level, const char *message)>;

// One backend or one candidate that could not be used.
struct Backend {
    const ponder_backend *descriptor = nullptr; // nullptr if the module did not load
    std::string name, path;
    std::string reason; // why not; empty if available
    bool available() const { return descriptor && reason.empty(); }
};

// Loads every module of the first existing folder among: `folder`, PONDER_BACKEND_PATH (not in
// set-user-id programs), beside the library, in the build tree, the configured one. Never the
// working directory. Modules stay loaded for good. Best first.
std::vector<Backend> load_backends(const std::string &folder, const Log &log);

// A backend opened for one model: its kernels see the model's weights.
class Device {
public:
    Device(const Backend &backend, std::shared_ptr<Memory> memory, std::shared_ptr<Threads> threads,
           Log log);
    ~Device();
    Device(const Device &) = delete;

    // A kernel for the call, by this backend or by the reference kernels; PONDER_E_BACKEND when
    // there is none.
    struct Kernel {
        const ponder_backend *owner = nullptr;
        ponder_plan plan{};
        Kernel(const ponder_backend *owner) : owner(owner) { plan.struct_size = sizeof plan; }
        Kernel(Kernel &&other) noexcept
            : owner(std::exchange(other.owner, nullptr)), plan(other.plan) {}
        Kernel &operator=(Kernel &&other) noexcept {
            std::swap(owner, other.owner);
            std::swap(plan, other.plan);
            return *this;
        }
        ~Kernel() {
            if (owner)
                owner->drop(plan.kernel);
        }
    };
    Kernel plan(const ponder_op_call &call) const;

    // The data at this constant has changed; no pass runs on it meanwhile.
    void refresh(const void *constant) const {
        if (backend_->refresh)
            backend_->refresh(device_, constant);
    }

    const ponder_backend &backend() const { return *backend_; }
    size_t packed_bytes() const { return backend_->packed_bytes(device_); }
    const std::shared_ptr<Memory> &memory() const { return memory_; }
    Threads &threads() const { return *threads_; }

private:
    std::shared_ptr<Memory> memory_;
    std::shared_ptr<Threads> threads_;
    Log log_;
    ponder_backend_host host_{};
    const ponder_backend *backend_;
    ponder_device *device_ = nullptr;
    ponder_device *fallback_ = nullptr; // the reference backend's, for host-memory backends
};

} // namespace ponder
