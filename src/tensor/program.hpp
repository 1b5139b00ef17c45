// A graph made runnable: order of calls, places in one arena, a kernel for each call. Recorded once
// per shape, replayed for every chunk; immutable, shared between sessions.
#pragma once

#include "backend/registry.hpp"
#include "tensor/graph.hpp"

#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace ponder {

// Calls that run in one parallel region: a chain of row ops, each task taking its rows through all
// of them, or calls that do not depend on each other.
struct Group {
    std::vector<size_t> calls;
    bool chain = false;
    size_t segment = 0;
};

// Segments are runs of calls that are started apart (score, learn): `segment_ends` holds the
// number of calls up to the end of each. Within a segment calls move to form long chains.
std::vector<Group> schedule(const Graph &graph, const std::vector<size_t> &segment_ends);

struct ArenaPlan {
    std::vector<size_t> offset; // of each temporary value
    size_t bytes = 0;
};
// Places temporaries so that those alive in a common group never overlap.
ArenaPlan plan_arena(const Graph &graph, const std::vector<Group> &groups);

// 2 per multiply-add of the segment's matrix products.
uint64_t count_flops(const Graph &graph, const std::vector<Group> &groups, size_t segment);

struct CallTime {
    const char *op, *backend; // static names
    uint32_t calls = 0;
    uint64_t flops = 0, ns = 0;
};

class Program {
public:
    Program(Graph graph, std::vector<size_t> segment_ends, std::shared_ptr<const Device> device);
    Program(const Program &) = delete;
    ~Program();

    const Graph &graph() const { return graph_; }
    size_t arena_bytes() const { return arena_.bytes; }
    size_t workspace_bytes() const { return workspace_bytes_; } // of one worker
    size_t segments() const { return flops_.size(); }
    uint64_t flops(size_t segment) const { return flops_[segment]; }

    // Addresses of externals by value id, in the device's memory like arena and workspace; entries
    // of other values are ignored.
    using Bindings = std::vector<void *>;
    // `check` is called between groups and may throw to stop there. The arena holds what later
    // segments need.
    void run(size_t segment, const Bindings &bindings, std::byte *arena, std::byte *workspace,
             const std::function<void()> &check) const;
    // The same on the calling thread alone, for callers that run many passes at once.
    void run_serial(size_t segment, const Bindings &bindings, std::byte *arena,
                    std::byte *workspace, const std::function<void()> &check) const;
    // The same as part of what a caller records, or queues, on a device of its own memory.
    void enqueue(size_t segment, const Bindings &bindings, std::byte *arena,
                 std::byte *workspace, const Device::Queue &) const;
    // The same, one call after the other, adding each call's time under its op's name.
    void profile(size_t segment, const Bindings &bindings, std::byte *arena, std::byte *workspace,
                 std::vector<CallTime> &times) const;

private:
    // Planned calls that share a parallel region.
    struct Batch {
        std::vector<size_t> calls;
        std::vector<uint32_t> first_task; // of each call, when they do not form a chain
        uint32_t tasks = 0;
        bool chain = false;
        size_t segment = 0;
    };
    // Work that a device noted down, by segment and addresses; it replays them in one call.
    struct Recorded {
        size_t segment;
        std::vector<void *> addresses;
        uint64_t used = 0;
        uint32_t seen = 0;
        void *work = nullptr;
    };
    Device::Kernel plan(const Call &call, bool required) const;
    void add_batches(const Group &group);
    void settle_constants();
    void queue(size_t segment, std::vector<void *> addresses, std::byte *workspace) const;
    void run_calls(size_t segment, void *const *addresses, std::byte *workspace) const;
    Recorded &recorded(const Device::Queue &queue, size_t segment,
                       const std::vector<void *> &addresses) const;
    std::vector<void *> addresses(const Bindings &bindings, std::byte *arena) const;
    void run_task(const Batch &batch, void *const *addresses, std::byte *workspace,
                  uint32_t task) const;
    void run_batch(const Batch &batch, void *const *addresses, std::byte *workspace) const;

    Graph graph_;
    std::shared_ptr<const Device> device_;
    ArenaPlan arena_;
    std::vector<Device::Kernel> kernels_; // of each call
    std::vector<size_t> argument_;        // of each call: its first in arguments_
    std::vector<Id> arguments_;
    std::vector<Batch> batches_;
    std::vector<uint64_t> flops_;
    size_t workspace_bytes_ = 0;
    std::vector<void *> constant_; // of each constant and parameter: its address
    DeviceBuffer literals_;
    mutable std::vector<Recorded> recorded_; // under the device's lock
    mutable uint64_t uses_ = 0;
};

} // namespace ponder
