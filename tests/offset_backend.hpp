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
    std::atomic<size_t> replays{0}, downloads{0}, joined{0};
    std::atomic<bool> broken{false};
};
inline Control control;

inline Device &device_of(ponder_device *device) { return *reinterpret_cast<Device *>(device); }

struct Kernel {
    Device *device;
    std::function<void(void *const *host, void *workspace, uint32_t task)> run;
    std::vector<void *> inner; // the reference's
    size_t tensors;
};

inline size_t bytes_of(const ponder_tensor &t) {
    size_t n = size_of(DType(t.dtype));
    for (int32_t i = 0; i < t.rank; ++i)
        n *= size_t(t.dim[i]);
    return n;
}

// linear_gelu, which the reference backend lacks, so that programs join linear and gelu here too.
inline int32_t plan_linear_gelu(Device &d, const ponder_op_call &call, ponder_plan &out, char *why,
                                size_t size) {
    const ponder_tensor *t = call.tensor;
    const ponder_tensor linear[] = {t[0], t[1], t[2], {}, t[3]}, gelu[] = {t[3], t[3]};
    const void *const constants[] = {call.constant[0], call.constant[1], call.constant[2], nullptr};
    ponder_op_call first = call, second = call;
    first.op = "linear";
    first.n_in = 4;
    first.n_out = second.n_in = second.n_out = 1;
    first.tensor = linear;
    first.constant = constants;
    second.op = "gelu";
    second.n_attr = 0;
    second.tensor = gelu;
    ponder_plan a{}, b{};
    a.struct_size = b.struct_size = sizeof(ponder_plan);
    if (reference_backend()->plan(d.reference, &first, &a, why, size) != PONDER_PLAN_OK)
        return PONDER_PLAN_FAILED;
    if (reference_backend()->plan(d.reference, &second, &b, why, size) != PONDER_PLAN_OK) {
        reference_backend()->drop(a.kernel);
        return PONDER_PLAN_FAILED;
    }
    out.tasks = 1;
    out.tiling = PONDER_TILE_WHOLE;
    out.workspace = (bytes_of(t[3]) + 63) / 64 * 64; // for z where nobody wants it
    out.kernel = new Kernel{&d,
                            [=](void *const *host, void *workspace, uint32_t) {
                                void *z = host[4] ? host[4] : workspace;
                                void *const one[] = {host[0], host[1], host[2], nullptr, z};
                                void *const two[] = {z, host[3]};
                                for (uint32_t i = 0; i < a.tasks; ++i)
                                    reference_backend()->run(a.kernel, one, workspace, i);
                                for (uint32_t i = 0; i < b.tasks; ++i)
                                    reference_backend()->run(b.kernel, two, workspace, i);
                            },
                            {a.kernel, b.kernel},
                            5};
    return PONDER_PLAN_OK;
}

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
            if (std::strcmp(call->op, "linear_gelu") == 0) {
                ++control.joined;
                return plan_linear_gelu(d, *call, *out, why, size);
            }
            const int32_t answer = reference_backend()->plan(d.reference, call, out, why, size);
            if (answer == PONDER_PLAN_OK) {
                void *inner = out->kernel;
                out->kernel = new Kernel{&d,
                                         [=](void *const *host, void *workspace, uint32_t task) {
                                             reference_backend()->run(inner, host, workspace, task);
                                         },
                                         {inner},
                                         call->n_in + call->n_out};
            }
            return answer;
        };
        b.run = [](void *kernel, void *const *buffers, void *workspace, uint32_t task) {
            const Kernel &k = *static_cast<const Kernel *>(kernel);
            std::vector<void *> host;
            for (size_t i = 0; i < k.tensors; ++i)
                host.push_back(to_host(buffers[i]));
            k.device->add([host, &k, at = to_host(workspace), task] {
                k.run(host.data(), at, task);
            });
        };
        b.drop = [](void *kernel) {
            Kernel *k = static_cast<Kernel *>(kernel);
            k->device->drain();
            for (void *inner : k->inner)
                reference_backend()->drop(inner);
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
