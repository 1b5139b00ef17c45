// A backend whose memory is not the host's, for tests without a device: the reference kernels on
// addresses that no processor accepts. Work is done late, when a download or synchronize asks for
// it, in the order in which it was queued, and fresh memory is full of NaN. What the core does
// wrong with a device's memory then crashes or gives wrong numbers here.
#pragma once

#include "backend/reference/reference.hpp"
#include "backend/registry.hpp"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <utility>
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

using Work = std::vector<std::function<void()>>;

struct Recording {
    Work work;
};

struct Mailbox {
    std::vector<std::byte> bytes;
    size_t end = 0; // of the queue's work, counted from the device's first, when it was sent
};

struct Device {
    ponder_device *reference;
    Work queue;
    size_t done = 0; // of all work so far
    std::unique_ptr<Recording> recording;
    // Conditions that are open: their flags, and what was recorded around each.
    std::vector<std::pair<const int32_t *, Work>> conditions;
    std::map<void *, size_t> blocks;
    size_t in_use = 0, under_way = 0; // bytes; mailboxes sent and not received

    void add(std::function<void()> work) {
        (recording ? recording->work : queue).push_back(std::move(work));
    }
    void drain() { drain_to(done + queue.size()); }
    void drain_to(size_t end) {
        const size_t count = end > done ? end - done : 0;
        for (size_t i = 0; i < count; ++i)
            queue[i]();
        queue.erase(queue.begin(), queue.begin() + std::ptrdiff_t(count));
        done += count;
    }
};

// What tests may change and look at.
struct Control {
    std::atomic<size_t> limit{SIZE_MAX}; // of device memory in use
    std::atomic<size_t> replays{0}, downloads{0}, joined{0};
    std::atomic<size_t> uploads{0}, copies{0}, kernels{0}; // kernels: not of a replay
    std::atomic<size_t> sent{0}, most_under_way{0}; // downloads that were not waited for at once
    std::atomic<bool> broken{false}, no_conditions{false};
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

// Calls that programs make out of others and the reference backend lacks, done by its kernels one
// after the other, so that programs join calls here too.
class Joined {
public:
    Joined(Device &device, const ponder_op_call &call) : device_(device), call_(call) {}
    ~Joined() {
        for (const ponder_plan &plan : plans_)
            reference_backend()->drop(plan.kernel);
    }
    // A step's tensors; none of them is a constant to the reference, which packs nothing.
    void step(const char *op, std::vector<ponder_tensor> tensors, uint32_t inputs,
              std::vector<double> attributes = {}) {
        const std::vector<const void *> constants(tensors.size(), nullptr);
        ponder_op_call inner = call_;
        inner.op = op;
        inner.n_in = inputs;
        inner.n_out = uint32_t(tensors.size()) - inputs;
        inner.tensor = tensors.data();
        inner.constant = constants.data();
        inner.n_attr = uint32_t(attributes.size());
        inner.attr = attributes.data();
        ponder_plan plan{};
        plan.struct_size = sizeof plan;
        char why[200];
        ok_ = ok_ && reference_backend()->plan(device_.reference, &inner, &plan, why, sizeof why) ==
                         PONDER_PLAN_OK;
        if (ok_)
            plans_.push_back(plan);
    }
    // f(run, host, workspace), where run(i, addresses) does step i
    template <class F> int32_t is(size_t workspace, F f, ponder_plan &out) {
        if (!ok_)
            return PONDER_PLAN_FAILED;
        size_t inner = 0;
        for (const ponder_plan &plan : plans_)
            inner = std::max(inner, plan.workspace);
        workspace = (workspace + 63) / 64 * 64;
        out.tasks = 1;
        out.tiling = PONDER_TILE_WHOLE;
        out.workspace = workspace + inner;
        std::vector<void *> kernels;
        for (const ponder_plan &plan : plans_)
            kernels.push_back(plan.kernel);
        out.kernel = new Kernel{&device_,
                                [=, plans = plans_](void *const *host, void *at, uint32_t) {
                                    const auto run = [&](size_t i, std::vector<void *> addresses) {
                                        for (uint32_t task = 0; task < plans[i].tasks; ++task)
                                            reference_backend()->run(
                                                plans[i].kernel, addresses.data(),
                                                static_cast<std::byte *>(at) + workspace, task);
                                    };
                                    f(run, host, static_cast<std::byte *>(at));
                                },
                                kernels, call_.n_in + call_.n_out};
        plans_.clear();
        ++control.joined;
        return PONDER_PLAN_OK;
    }

private:
    Device &device_;
    const ponder_op_call &call_;
    std::vector<ponder_plan> plans_;
    bool ok_ = true;
};

inline int32_t plan_linear_gelu(Device &d, const ponder_op_call &call, ponder_plan &out) {
    const ponder_tensor *t = call.tensor;
    Joined joined(d, call);
    joined.step("linear", {t[0], t[1], t[2], {}, t[3]}, 4, {call.attr[0]});
    joined.step("gelu", {t[3], t[3]}, 1);
    return joined.is(
        bytes_of(t[3]), // for z where nobody wants it
        [](const auto &run, void *const *host, std::byte *workspace) {
            void *z = host[4] ? host[4] : workspace;
            run(0, {host[0], host[1], host[2], nullptr, z});
            run(1, {z, host[3]});
        },
        out);
}

inline int32_t plan_linear_group(Device &d, const ponder_op_call &call, ponder_plan &out) {
    const ponder_tensor *t = call.tensor;
    Joined joined(d, call);
    const size_t count = call.n_out;
    size_t most = 0;
    std::vector<bool> behind(count); // something follows the product
    for (size_t i = 0; i < count; ++i) {
        const ponder_tensor &y = t[call.n_in + i];
        joined.step("linear", {t[0], t[1 + 2 * i], t[2 + 2 * i], {}, y}, 4, {0});
        behind[i] = call.attr[i] != 0;
        if (behind[i])
            joined.step(call.attr[i] == 1 ? "gelu" : "sigmoid", {y, y}, 1);
        most = std::max(most, bytes_of(y));
    }
    return joined.is(
        most,
        [behind, n_in = call.n_in](const auto &run, void *const *host, std::byte *workspace) {
            for (size_t i = 0, step = 0; i < behind.size(); ++i) {
                void *const y = host[n_in + i], *const sum = behind[i] ? workspace : y;
                run(step++, {host[0], host[1 + 2 * i], host[2 + 2 * i], nullptr, sum});
                if (behind[i])
                    run(step++, {sum, y});
            }
        },
        out);
}

inline int32_t plan_conv1d_rope(Device &d, const ponder_op_call &call, ponder_plan &out) {
    const ponder_tensor *t = call.tensor;
    Joined joined(d, call);
    const std::vector<double> turn = {call.attr[1], call.attr[2], call.attr[3], 0};
    const bool before = t[1].dtype != PONDER_DTYPE_NONE;
    for (size_t i = 0; i < call.n_out; ++i) {
        std::vector<ponder_tensor> conv = {t[0], t[2 + 2 * i], t[3 + 2 * i]};
        if (before)
            conv.push_back(t[1]);
        conv.push_back(t[0]);
        joined.step("conv1d", conv, uint32_t(conv.size()) - 1, {call.attr[0]});
        joined.step("rope", {t[0], t[0]}, 1, turn);
        joined.step("affine", {t[0], t[call.n_in + i]}, 1, {1, 0});
    }
    const size_t bytes = (bytes_of(t[0]) + 63) / 64 * 64;
    return joined.is(
        2 * bytes,
        [before, bytes, n_in = call.n_in, n_out = call.n_out](const auto &run, void *const *host,
                                                              std::byte *workspace) {
            for (size_t i = 0; i < n_out; ++i) {
                std::vector<void *> conv = {host[0], host[2 + 2 * i], host[3 + 2 * i]};
                if (before)
                    conv.push_back(host[1]);
                conv.push_back(workspace);
                run(3 * i, conv);
                run(3 * i + 1, {workspace, workspace + bytes});
                run(3 * i + 2, {workspace + bytes, host[n_in + i]});
            }
        },
        out);
}

inline int32_t plan_lora_linear_gelu(Device &d, const ponder_op_call &call, ponder_plan &out) {
    const ponder_tensor *t = call.tensor;
    Joined joined(d, call);
    joined.step("lora_linear", {t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7]}, 6, {call.attr[0]});
    joined.step("gelu", {t[6], t[6]}, 1);
    return joined.is(
        bytes_of(t[6]),
        [](const auto &run, void *const *host, std::byte *workspace) {
            void *const z = host[8] ? host[8] : workspace;
            run(0, {host[0], host[1], host[2], host[3], host[4], host[5], z, host[7]});
            run(1, {z, host[6]});
        },
        out);
}

inline int32_t plan_lora_linear_vjp_gelu(Device &d, const ponder_op_call &call, ponder_plan &out) {
    const ponder_tensor *t = call.tensor;
    Joined joined(d, call);
    joined.step("lora_linear_vjp", {t[0], t[1], t[2], t[3], t[5], t[6]}, 4, {call.attr[0]});
    joined.step("gelu_vjp", {t[5], t[4], t[5]}, 2);
    return joined.is(
        bytes_of(t[5]),
        [](const auto &run, void *const *host, std::byte *workspace) {
            run(0, {host[0], host[1], host[2], host[3], workspace, host[6]});
            run(1, {workspace, host[4], host[5]});
        },
        out);
}

inline int32_t plan_lora_linear_vjp_narrow(Device &d, const ponder_op_call &call,
                                           ponder_plan &out) {
    const ponder_tensor *t = call.tensor;
    ponder_tensor dx = t[2], w = t[0], a = t[1]; // any of one column before: dx is not looked at
    dx.dim[2] = 1;
    w.rank = 2;
    w.dim[0] = 1;
    w.dim[1] = t[0].dim[2];
    a.dim[1] = 1;
    a.dim[2] = t[2].dim[2];
    Joined joined(d, call);
    joined.step("lora_linear_vjp", {t[0], w, a, t[1], dx, t[2]}, 4, {call.attr[0]});
    const size_t bytes = (bytes_of(w) + bytes_of(a) + bytes_of(dx) + 191) / 64 * 64;
    return joined.is(
        bytes,
        [bytes, at_a = (bytes_of(w) + 63) / 64 * 64, at_dx = bytes - (bytes_of(dx) + 63) / 64 * 64](
            const auto &run, void *const *host, std::byte *workspace) {
            std::memset(workspace, 0, bytes);
            run(0, {host[0], workspace, workspace + at_a, host[1], workspace + at_dx, host[2]});
        },
        out);
}

inline int32_t plan_layer_norm_gated(Device &d, const ponder_op_call &call, ponder_plan &out) {
    const ponder_tensor *t = call.tensor;
    ponder_tensor wide = t[4];
    wide.dtype = t[5].dtype;
    Joined joined(d, call);
    joined.step("layer_norm", {t[0], t[1], t[2], wide, t[5]}, 3, {call.attr[0]});
    joined.step("mul", {t[3], wide, t[4]}, 2);
    return joined.is(
        bytes_of(wide),
        [](const auto &run, void *const *host, std::byte *workspace) {
            run(0, {host[0], host[1], host[2], workspace, host[5]});
            run(1, {host[3], workspace, host[4]});
        },
        out);
}

inline int32_t plan_matmul_tn_group(Device &d, const ponder_op_call &call, ponder_plan &out) {
    Joined joined(d, call);
    const size_t count = call.n_out;
    for (size_t i = 0; i < count; ++i)
        joined.step("matmul_tn",
                    {call.tensor[2 * i], call.tensor[2 * i + 1], call.tensor[2 * count + i]}, 2);
    return joined.is(
        0,
        [count](const auto &run, void *const *host, std::byte *) {
            for (size_t i = 0; i < count; ++i)
                run(i, {host[2 * i], host[2 * i + 1], host[2 * count + i]});
        },
        out);
}

// Probabilities in parts: here e is the probabilities themselves, in longer rows; the share is not
// used.
struct Rows {
    size_t rows, width, stride; // bytes of the last two
    explicit Rows(const ponder_tensor &e, const ponder_tensor &table) {
        const size_t element = e.dtype == PONDER_DTYPE_BF16  ? 2
                               : e.dtype == PONDER_DTYPE_F64 ? 8
                                                             : 4;
        rows = size_t(e.dim[0] * e.dim[1]);
        width = size_t(table.dim[0]) * element;
        stride = size_t(e.dim[2]) * element;
    }
    void copy(void *to, size_t to_stride, const void *from, size_t from_stride) const {
        for (size_t r = 0; r < rows; ++r)
            std::memcpy(static_cast<std::byte *>(to) + r * to_stride,
                        static_cast<const std::byte *>(from) + r * from_stride, width);
    }
};
inline ponder_tensor probabilities(ponder_tensor e, const ponder_tensor &table) {
    e.dim[2] = table.dim[0];
    return e;
}

inline int32_t plan_cross_entropy_parts(Device &d, const ponder_op_call &call, ponder_plan &out) {
    const ponder_tensor *t = call.tensor;
    const ponder_tensor p = probabilities(t[5], t[1]);
    const Rows rows(t[5], t[1]);
    Joined joined(d, call);
    joined.step("cross_entropy", {t[0], t[1], t[2], t[3], t[4], p}, 3);
    return joined.is(
        bytes_of(p),
        [rows, e_bytes = bytes_of(t[5])](const auto &run, void *const *host, std::byte *workspace) {
            run(0, {host[0], host[1], host[2], host[3], host[4], workspace});
            std::memset(host[5], 0, e_bytes);
            rows.copy(host[5], rows.stride, workspace, rows.width);
        },
        out);
}

inline int32_t plan_cross_entropy_parts_vjp(Device &d, const ponder_op_call &call,
                                            ponder_plan &out) {
    const ponder_tensor *t = call.tensor;
    const ponder_tensor p = probabilities(t[0], t[2]);
    const Rows rows(t[0], t[2]);
    const bool for_table = t[7].dtype != PONDER_DTYPE_NONE;
    Joined joined(d, call);
    joined.step("cross_entropy_vjp", {p, t[2], t[3], t[4], t[6]}, 4);
    if (for_table)
        joined.step("cross_entropy_vjp_table", {p, t[5], t[3], t[4], t[7]}, 4);
    return joined.is(
        bytes_of(p),
        [rows, for_table, e_bytes = bytes_of(t[0])](const auto &run, void *const *host,
                                                    std::byte *workspace) {
            rows.copy(workspace, rows.width, host[0], rows.stride);
            std::memset(host[0], 0xff, e_bytes); // a device leaves something else there
            run(0, {workspace, host[2], host[3], host[4], host[6]});
            if (for_table)
                run(1, {workspace, host[5], host[3], host[4], host[7]});
        },
        out);
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
            ++control.uploads;
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
            ++control.copies;
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
            const std::pair<const char *, decltype(&plan_linear_gelu)> more[] = {
                {"linear_gelu", plan_linear_gelu},
                {"linear_group", plan_linear_group},
                {"conv1d_rope", plan_conv1d_rope},
                {"layer_norm_gated", plan_layer_norm_gated},
                {"lora_linear_vjp_narrow", plan_lora_linear_vjp_narrow},
                {"lora_linear_gelu", plan_lora_linear_gelu},
                {"lora_linear_vjp_gelu", plan_lora_linear_vjp_gelu},
                {"matmul_tn_group", plan_matmul_tn_group},
                {"cross_entropy_parts", plan_cross_entropy_parts},
                {"cross_entropy_parts_vjp", plan_cross_entropy_parts_vjp}};
            for (const auto &[name, plan] : more)
                if (std::strcmp(call->op, name) == 0)
                    return plan(d, *call, *out);
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
            control.kernels += !k.device->recording;
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
        b.record_if = [](ponder_device *device, const int32_t *flag) -> int32_t {
            Device &d = device_of(device);
            if (control.no_conditions)
                return 1;
            d.conditions.emplace_back(flag, std::exchange(d.recording->work, {}));
            return 0;
        };
        b.record_end_if = [](ponder_device *device) -> int32_t {
            Device &d = device_of(device);
            auto [flag, around] = std::move(d.conditions.back());
            d.conditions.pop_back();
            around.push_back([flag = flag, inner = std::move(d.recording->work)] {
                if (*static_cast<const int32_t *>(to_host(flag)))
                    for (const auto &work : inner)
                        work();
            });
            d.recording->work = std::move(around);
            return 0;
        };
        b.mailbox = [](ponder_device *, size_t size) -> void * {
            return new Mailbox{std::vector<std::byte>(size), 0};
        };
        b.drop_mailbox = [](ponder_device *device, void *mailbox) {
            device_of(device).drain();
            delete static_cast<Mailbox *>(mailbox);
        };
        b.send = [](ponder_device *device, void *mailbox, const void *from,
                    size_t size) -> int32_t {
            Device &d = device_of(device);
            auto *const box = static_cast<Mailbox *>(mailbox);
            d.add([=] { std::memcpy(box->bytes.data(), to_host(from), size); });
            box->end = d.done + d.queue.size();
            ++control.sent;
            ++d.under_way;
            control.most_under_way = std::max<size_t>(control.most_under_way, d.under_way);
            return control.broken;
        };
        b.receive = [](ponder_device *device, void *mailbox, void *to, size_t size) -> int32_t {
            Device &d = device_of(device);
            const auto *const box = static_cast<Mailbox *>(mailbox);
            d.drain_to(box->end);
            std::memcpy(to, box->bytes.data(), size);
            --d.under_way;
            return control.broken;
        };
        return b;
    }();
    return &b;
}

} // namespace ponder::test::offset
