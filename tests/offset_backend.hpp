// A backend whose memory is not the host's, for tests without a device: the reference kernels on
// addresses that no processor accepts. Work is done late, when a download or synchronize asks for
// it, in the order in which it was queued, and fresh memory is full of NaN. What the core does
// wrong with a device's memory then crashes or gives wrong numbers here.
#pragma once

#include "backend/reference/reference.hpp"
#include "backend/registry.hpp"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <vector>

namespace ponder::test::offset {

// Not canonical on x86-64 and Arm: using such an address as it is ends the process.
constexpr uint64_t distance = uint64_t(0x5a) << 48;

inline void *to_host(const void *address) {
    return address ? reinterpret_cast<void *>(uint64_t(address) - distance) : nullptr;
}
inline void *to_device(void *address) {
    return address ? reinterpret_cast<void *>(uint64_t(address) + distance) : nullptr;
}

struct Recording {
    std::vector<std::function<void()>> work;
};

struct Device {
    ponder_device *reference;
    std::vector<std::function<void()>> queue;
    std::unique_ptr<Recording> recording;
    std::map<void *, size_t> blocks;
    size_t in_use = 0;

    void add(std::function<void()> work) {
        (recording ? recording->work : queue).push_back(std::move(work));
    }
    void drain() {
        for (const auto &work : queue)
            work();
        queue.clear();
    }
};

// What tests may change and look at.
struct Control {
    std::atomic<size_t> limit{SIZE_MAX}; // of device memory in use
    std::atomic<size_t> replays{0}, downloads{0};
    std::atomic<bool> broken{false};
};
inline Control control;

inline Device &device_of(ponder_device *device) { return *reinterpret_cast<Device *>(device); }

struct Kernel {
    Device *device;
    void *inner;
    size_t tensors, workspace;
};

inline const ponder_backend *backend() {
    static ponder_backend b = [] {
        ponder_backend b = *reference_backend();
        b.struct_size = sizeof b;
        b.name = "offset";
        b.priority = -1;
        b.host_memory = 0;
        b.open = [](const ponder_backend_host *host, char *why, size_t size) -> ponder_device * {
            auto device = std::make_unique<Device>();
            device->reference = reference_backend()->open(host, why, size);
            return reinterpret_cast<ponder_device *>(device.release());
        };
        b.close = [](ponder_device *device) {
            Device &d = device_of(device);
            if (!d.blocks.empty())
                std::abort(); // something was not released
            reference_backend()->close(d.reference);
            delete &d;
        };
        b.allocate = [](ponder_device *device, size_t size) -> void * {
            Device &d = device_of(device);
            if (d.in_use + size > control.limit)
                return nullptr;
            void *block = std::aligned_alloc(256, (size + 255) / 256 * 256);
            std::memset(block, 0xff, size);
            d.blocks[block] = size;
            d.in_use += size;
            return to_device(block);
        };
        b.release = [](ponder_device *device, void *buffer) {
            Device &d = device_of(device);
            d.drain(); // queued work may still use it
            void *block = to_host(buffer);
            d.in_use -= d.blocks.at(block);
            d.blocks.erase(block);
            std::free(block);
        };
        b.upload = [](ponder_device *device, void *to, const void *from, size_t size) -> int32_t {
            const auto *bytes = static_cast<const std::byte *>(from);
            device_of(device).add([to, data = std::vector<std::byte>(bytes, bytes + size)] {
                std::memcpy(to_host(to), data.data(), data.size());
            });
            return control.broken;
        };
        b.download = [](ponder_device *device, void *to, const void *from, size_t size) -> int32_t {
            device_of(device).drain();
            std::memcpy(to, to_host(from), size);
            ++control.downloads;
            return control.broken;
        };
        b.copy = [](ponder_device *device, void *to, const void *from, size_t size) -> int32_t {
            device_of(device).add([=] { std::memmove(to_host(to), to_host(from), size); });
            return control.broken;
        };
        b.clear = [](ponder_device *device, void *buffer, size_t size) -> int32_t {
            device_of(device).add([=] { std::memset(to_host(buffer), 0, size); });
            return control.broken;
        };
        b.synchronize = [](ponder_device *device) -> int32_t {
            device_of(device).drain();
            return control.broken;
        };
        b.problem = [](ponder_device *) -> const char * {
            return control.broken ? "broken on purpose" : nullptr;
        };
        b.plan = [](ponder_device *device, const ponder_op_call *call, ponder_plan *out, char *why,
                    size_t size) -> int32_t {
            Device &d = device_of(device);
            const int32_t answer = reference_backend()->plan(d.reference, call, out, why, size);
            if (answer == PONDER_PLAN_OK)
                out->kernel =
                    new Kernel{&d, out->kernel, call->n_in + call->n_out, out->workspace};
            return answer;
        };
        b.run = [](void *kernel, void *const *buffers, void *workspace, uint32_t task) {
            const Kernel &k = *static_cast<const Kernel *>(kernel);
            std::vector<void *> host;
            for (size_t i = 0; i < k.tensors; ++i)
                host.push_back(to_host(buffers[i]));
            k.device->add([host, inner = k.inner, at = to_host(workspace), task] {
                reference_backend()->run(inner, host.data(), at, task);
            });
        };
        b.drop = [](void *kernel) {
            Kernel *k = static_cast<Kernel *>(kernel);
            k->device->drain();
            reference_backend()->drop(k->inner);
            delete k;
        };
        b.packed_bytes = [](ponder_device *) -> size_t { return 0; };
        b.refresh = nullptr;
        b.record = [](ponder_device *device) -> int32_t {
            device_of(device).recording = std::make_unique<Recording>();
            return 0;
        };
        b.record_end = [](ponder_device *device) -> void * {
            return device_of(device).recording.release();
        };
        b.replay = [](ponder_device *device, void *recording) -> int32_t {
            for (const auto &work : static_cast<Recording *>(recording)->work)
                device_of(device).add(work);
            ++control.replays;
            return control.broken;
        };
        b.drop_recording = [](ponder_device *, void *recording) {
            delete static_cast<Recording *>(recording);
        };
        return b;
    }();
    return &b;
}

} // namespace ponder::test::offset
