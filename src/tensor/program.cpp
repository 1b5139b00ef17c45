#include "tensor/program.hpp"

#include "base/error.hpp"
#include "tensor/fuse.hpp"
#include "tensor/ops.hpp"

#include <algorithm>
#include <chrono>
#include <numeric>
#include <string_view>

namespace ponder {

namespace {

int64_t rows_of(const Graph &graph, const Call &call) {
    const Shape &s = graph.shape(call.out[0]);
    return s.rank < 1 ? 1 : s.count() / s[s.rank - 1];
}

size_t align(size_t bytes) { return (bytes + 63) / 64 * 64; }

} // namespace

std::vector<Group> schedule(const Graph &graph, const std::vector<size_t> &segment_ends) {
    std::vector<Group> groups;
    std::vector<bool> computed(graph.values().size(), true);
    for (const Call &call : graph.calls())
        for (Id out : call.out)
            if (out != none)
                computed[size_t(out)] = false;

    const auto ready = [&](const Call &call) {
        return std::all_of(call.in.begin(), call.in.end(),
                           [&](Id in) { return in == none || computed[size_t(in)]; });
    };
    const auto mark = [&](const Call &call) {
        for (Id out : call.out)
            if (out != none)
                computed[size_t(out)] = true;
    };

    size_t begin = 0;
    for (size_t segment = 0; segment < segment_ends.size(); ++segment) {
        std::vector<size_t> waiting(segment_ends[segment] - begin);
        std::iota(waiting.begin(), waiting.end(), begin);
        begin = segment_ends[segment];
        while (!waiting.empty()) {
            // As many row ops as can follow each other, each task staying on its rows.
            Group chain{{}, true, segment};
            int64_t rows = 0;
            std::erase_if(waiting, [&](size_t i) {
                const Call &call = graph.calls()[i];
                if (!call.rule->rows || !ready(call))
                    return false;
                if (!chain.calls.empty() && rows_of(graph, call) != rows)
                    return false;
                rows = rows_of(graph, call);
                chain.calls.push_back(i);
                mark(call);
                return true;
            });
            if (!chain.calls.empty())
                groups.push_back(std::move(chain));
            // Then everything else that is ready now.
            Group together{{}, false, segment};
            std::erase_if(waiting, [&](size_t i) {
                const Call &call = graph.calls()[i];
                if (call.rule->rows || !ready(call))
                    return false;
                together.calls.push_back(i);
                return true;
            });
            for (size_t i : together.calls)
                mark(graph.calls()[i]);
            if (!together.calls.empty())
                groups.push_back(std::move(together));
            else if (groups.empty() || groups.back().segment != segment)
                throw_error(PONDER_E_INTERNAL, "schedule: a call waits for itself");
        }
    }
    return groups;
}

ArenaPlan plan_arena(const Graph &graph, const std::vector<Group> &groups) {
    struct Life {
        size_t value, first, last;
    };
    constexpr size_t never = size_t(-1);
    std::vector<Life> lives(graph.values().size());
    for (size_t v = 0; v < lives.size(); ++v)
        lives[v] = {v, never, 0};
    for (size_t g = 0; g < groups.size(); ++g)
        for (size_t c : groups[g].calls) {
            const auto touch = [&](Id id) {
                if (id == none || graph.value(id).kind != Kind::temporary)
                    return;
                Life &life = lives[size_t(id)];
                life.first = std::min(life.first, g);
                life.last = std::max(life.last, g);
            };
            for (Id id : graph.calls()[c].in)
                touch(id);
            for (Id id : graph.calls()[c].out)
                touch(id);
        }
    std::erase_if(lives, [](const Life &life) { return life.first == never; });

    // Largest first, each at the lowest place that is free for its whole life.
    const auto bytes = [&](const Life &life) { return align(graph.value(Id(life.value)).bytes()); };
    std::stable_sort(lives.begin(), lives.end(),
                     [&](const Life &a, const Life &b) { return bytes(a) > bytes(b); });
    ArenaPlan plan;
    plan.offset.resize(graph.values().size(), 0);
    std::vector<Life> placed; // by offset
    for (const Life &life : lives) {
        size_t offset = 0;
        for (const Life &other : placed) {
            if (other.last < life.first || life.last < other.first)
                continue;
            const size_t start = plan.offset[other.value];
            if (offset + bytes(life) <= start)
                break;
            offset = std::max(offset, start + bytes(other));
        }
        plan.offset[life.value] = offset;
        plan.bytes = std::max(plan.bytes, offset + bytes(life));
        placed.insert(std::upper_bound(placed.begin(), placed.end(), life,
                                       [&](const Life &a, const Life &b) {
                                           return plan.offset[a.value] < plan.offset[b.value];
                                       }),
                      life);
    }
    return plan;
}

uint64_t count_flops(const Graph &graph, const std::vector<Group> &groups, size_t segment) {
    uint64_t flops = 0;
    for (const Group &group : groups)
        if (group.segment == segment)
            for (size_t c : group.calls)
                flops += graph.calls()[c].rule->flops(graph, graph.calls()[c]);
    return flops;
}

Program::Program(Graph graph, std::vector<size_t> segment_ends,
                 std::shared_ptr<const Device> device)
    : graph_(std::move(graph)), device_(std::move(device)) {
    if (!device_->on_host())
        fuse(graph_, segment_ends,
             [&](const Call &call) { return plan(call, false).owner != nullptr; });
    const std::vector<Group> groups = schedule(graph_, segment_ends);
    arena_ = plan_arena(graph_, groups);
    for (size_t s = 0; s < segment_ends.size(); ++s)
        flops_.push_back(count_flops(graph_, groups, s));
    for (const Call &call : graph_.calls()) {
        argument_.push_back(arguments_.size());
        for (const auto *ids : {&call.in, &call.out})
            arguments_.insert(arguments_.end(), ids->begin(), ids->end());
        kernels_.push_back(plan(call, true));
        workspace_bytes_ = std::max(workspace_bytes_, align(kernels_.back().plan.workspace));
    }
    for (const Group &group : groups)
        add_batches(group);
    settle_constants();
}

Device::Kernel Program::plan(const Call &call, bool required) const {
    std::vector<ponder_tensor> tensors;
    std::vector<const void *> constants;
    const auto describe = [&](Id id) {
        ponder_tensor tensor{};
        if (id != none) {
            const Value &value = graph_.value(id);
            tensor.dtype = int32_t(value.type);
            tensor.rank = value.shape.rank;
            std::copy_n(value.shape.dim, PONDER_MAX_RANK, tensor.dim);
        }
        tensors.push_back(tensor);
    };
    for (Id id : call.in) {
        describe(id);
        constants.push_back(id != none ? graph_.value(id).data : nullptr);
    }
    for (Id id : call.out)
        describe(id);
    const ponder_op_call described{sizeof(ponder_op_call),
                                   1,
                                   call.rule->name,
                                   uint32_t(call.in.size()),
                                   uint32_t(call.out.size()),
                                   uint32_t(call.attr.size()),
                                   tensors.data(),
                                   constants.data(),
                                   call.attr.data()};
    return device_->plan(described, required);
}

Program::~Program() {
    if (recorded_.empty())
        return;
    const Device::Queue queue(*device_);
    for (const Recorded &r : recorded_)
        if (r.work)
            queue.drop(r.work);
}

// Constants outlive the device and are shared between programs; literals go with this one.
void Program::settle_constants() {
    const auto is_weight = [](const Value &value) {
        return value.kind == Kind::constant || value.kind == Kind::parameter;
    };
    constant_.resize(graph_.values().size());
    size_t bytes = 0;
    std::vector<size_t> literals;
    for (size_t i = 0; i < constant_.size(); ++i) {
        const Value &value = graph_.value(Id(i));
        if (!is_weight(value))
            continue;
        if (value.owned && !device_->on_host()) {
            literals.push_back(i);
            bytes += align(value.bytes());
        } else {
            constant_[i] = device_->resident(value.data, value.bytes());
        }
    }
    if (literals.empty())
        return;
    literals_ = DeviceBuffer(device_, bytes);
    std::byte *at = literals_.data();
    for (const size_t i : literals) {
        const Value &value = graph_.value(Id(i));
        device_->upload(at, value.data, value.bytes());
        constant_[i] = at;
        at += align(value.bytes());
    }
}

// A chain breaks where a kernel does not keep to its rows.
void Program::add_batches(const Group &group) {
    Batch *open = nullptr;
    for (size_t c : group.calls) {
        const ponder_plan &plan = kernels_[c].plan;
        const bool rows = group.chain && plan.tiling == PONDER_TILE_ROWS;
        const bool joins =
            open && (group.chain ? rows && open->chain && open->tasks == plan.tasks : true);
        if (!joins) {
            batches_.push_back({{}, {}, 0, rows, group.segment});
            open = &batches_.back();
        }
        open->calls.push_back(c);
        open->first_task.push_back(open->tasks);
        open->tasks = rows ? plan.tasks : open->tasks + plan.tasks;
    }
}

std::vector<void *> Program::addresses(const Bindings &bindings, std::byte *arena) const {
    std::vector<void *> result;
    result.reserve(arguments_.size());
    for (Id id : arguments_) {
        void *address = nullptr;
        if (id != none) {
            const Value &value = graph_.value(id);
            switch (value.kind) {
            case Kind::constant:
            case Kind::parameter:
                address = constant_[size_t(id)];
                break;
            case Kind::temporary:
                address = arena + arena_.offset[size_t(id)];
                break;
            case Kind::external:
                address = size_t(id) < bindings.size() ? bindings[size_t(id)] : nullptr;
                if (!address)
                    throw_error(PONDER_E_INTERNAL, "'%s' is not bound", value.name.c_str());
            }
        }
        result.push_back(address);
    }
    return result;
}

void Program::run_task(const Batch &batch, void *const *addresses, std::byte *workspace,
                       uint32_t task) const {
    const auto run = [&](size_t c, uint32_t i) {
        const Device::Kernel &kernel = kernels_[c];
        kernel.owner->run(kernel.plan.kernel, addresses + argument_[c], workspace, i);
    };
    if (batch.chain) {
        for (size_t c : batch.calls)
            run(c, task);
    } else {
        const size_t at =
            size_t(std::upper_bound(batch.first_task.begin(), batch.first_task.end(), task) -
                   batch.first_task.begin()) -
            1;
        run(batch.calls[at], task - batch.first_task[at]);
    }
}

void Program::run_batch(const Batch &batch, void *const *addresses, std::byte *workspace) const {
    device_->threads().run(batch.tasks, [&](uint32_t task, uint32_t worker) {
        run_task(batch, addresses, workspace + worker * workspace_bytes_, task);
    });
}

void Program::run(size_t segment, const Bindings &bindings, std::byte *arena, std::byte *workspace,
                  const std::function<void()> &check) const {
    if (!device_->on_host())
        return run_serial(segment, bindings, arena, workspace, check);
    const std::vector<void *> places = addresses(bindings, arena);
    for (const Batch &batch : batches_) {
        if (batch.segment != segment)
            continue;
        if (check)
            check();
        run_batch(batch, places.data(), workspace);
    }
}

void Program::run_serial(size_t segment, const Bindings &bindings, std::byte *arena,
                         std::byte *workspace, const std::function<void()> &check) const {
    std::vector<void *> places = addresses(bindings, arena);
    if (!device_->on_host()) {
        if (check)
            check();
        return queue(segment, std::move(places), workspace);
    }
    for (const Batch &batch : batches_) {
        if (batch.segment != segment)
            continue;
        if (check)
            check();
        for (uint32_t task = 0; task < batch.tasks; ++task)
            run_task(batch, places.data(), workspace, task);
    }
}

// Addresses come again: a session has two sets of fast weights and one arena. What is run a second
// time with the same ones is noted down and replayed from then on.
Program::Recorded &Program::recorded(const Device::Queue &queue, size_t segment,
                                     const std::vector<void *> &addresses) const {
    constexpr size_t most = 64;
    for (Recorded &r : recorded_)
        if (r.segment == segment && r.addresses == addresses)
            return r;
    if (recorded_.size() < most)
        return recorded_.emplace_back(Recorded{segment, addresses});
    Recorded &oldest =
        *std::min_element(recorded_.begin(), recorded_.end(),
                          [](const Recorded &a, const Recorded &b) { return a.used < b.used; });
    if (oldest.work)
        queue.drop(oldest.work);
    return oldest = {segment, addresses};
}

// Every call, one after the other.
void Program::run_calls(size_t segment, void *const *addresses, std::byte *workspace) const {
    for (const Batch &batch : batches_)
        if (batch.segment == segment)
            for (uint32_t task = 0; task < batch.tasks; ++task)
                run_task(batch, addresses, workspace, task);
}

void Program::enqueue(size_t segment, const Bindings &bindings, std::byte *arena,
                      std::byte *workspace, const Device::Queue &) const {
    run_calls(segment, addresses(bindings, arena).data(), workspace);
}

void Program::queue(size_t segment, std::vector<void *> addresses, std::byte *workspace) const {
    constexpr size_t worth_recording = 4; // calls
    const auto run_all = [&] { run_calls(segment, addresses.data(), workspace); };
    const Device::Queue queue(*device_);
    if (!queue.can_record() || kernels_.size() < worth_recording)
        return run_all();
    addresses.push_back(workspace);
    Recorded &r = recorded(queue, segment, addresses);
    r.used = ++uses_;
    if (!r.work && r.seen++ == 1 && queue.record()) {
        run_all();
        r.work = queue.record_end();
    }
    if (r.work)
        queue.replay(r.work);
    else
        run_all();
}

void Program::profile(size_t segment, const Bindings &bindings, std::byte *arena,
                      std::byte *workspace, std::vector<CallTime> &times) const {
    using Clock = std::chrono::steady_clock;
    const std::vector<void *> places = addresses(bindings, arena);
    for (const Batch &batch : batches_) {
        if (batch.segment != segment)
            continue;
        for (size_t c : batch.calls) {
            const Call &call = graph_.calls()[c];
            const Batch alone{{c}, {0}, kernels_[c].plan.tasks, false, segment};
            device_->synchronize();
            const auto start = Clock::now();
            if (device_->on_host()) {
                run_batch(alone, places.data(), workspace);
            } else {
                const Device::Queue queue(*device_);
                for (uint32_t task = 0; task < alone.tasks; ++task)
                    run_task(alone, places.data(), workspace, task);
            }
            device_->synchronize();
            const auto ns = std::chrono::nanoseconds(Clock::now() - start).count();
            const char *owner = kernels_[c].owner->name;
            auto entry = std::find_if(times.begin(), times.end(), [&](const CallTime &t) {
                return t.op == call.rule->name && t.backend == owner; // same literals
            });
            if (entry == times.end()) {
                times.push_back({call.rule->name, owner});
                entry = times.end() - 1;
            }
            entry->calls += 1;
            entry->flops += call.rule->flops(graph_, call);
            entry->ns += uint64_t(ns);
        }
    }
}

} // namespace ponder
