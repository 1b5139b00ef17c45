#include "session/plan.hpp"

#include "adapt/stored.hpp"
#include "policy/policy.hpp"
#include "session/decoder.hpp"
#include "session/pass.hpp"
#include "tensor/fuse.hpp"

#include <algorithm>

namespace ponder {

namespace {

// Panels that a backend rounds up to, and the blocks it allocates packed weights in.
uint64_t with_packing_slack(uint64_t bytes) {
    constexpr uint64_t block = uint64_t(4) << 20;
    return bytes + bytes / 20 + (bytes > block ? block : 0);
}

// A worker's scratch: one row tile of logits, of the widest product, and packed operands.
uint64_t workspace_of_worker(const Gpt2Config &c) {
    const uint64_t widest = uint64_t(std::max({c.vocabulary, c.inner, 3 * c.width}));
    return 4 * PONDER_ROW_TILE * widest + (uint64_t(1) << 20);
}

// A device's share for logits and for the products of its library, at most.
constexpr uint64_t workspace_of_device = uint64_t(192) << 20;

// On a device some calls may be joined, which gives other temporaries: the larger of both.
size_t arena_of(Graph graph, std::vector<size_t> segment_ends, bool may_join) {
    const size_t apart = plan_arena(graph, schedule(graph, segment_ends)).bytes;
    if (!may_join)
        return apart;
    fuse(graph, segment_ends, [](const Call &) { return true; });
    return std::max(apart, plan_arena(graph, schedule(graph, segment_ends)).bytes);
}

} // namespace

ponder_memory_plan plan_memory(const Runtime &runtime, const std::string &folder,
                               const std::string &backend_name, const std::string &dtype,
                               const std::string &weights, const Options &session) {
    const Options options = with_stored_options(session);
    const Backend &backend = runtime.backend(backend_name);
    const DType type = parse_dtype(dtype);
    require_dtype(backend, type);
    const Gpt2Folder source(folder);
    const Gpt2 model(source.config(), type,
                     choose_storage(backend, source, weights)); // no memory: shapes only
    const Gpt2Config &config = model.config();
    const bool never = never_learns(options.text("policy"));
    const auto adapter = make_adapter(config, effective_options(options, never), "");

    const auto [chunk, context] = window_of(options, config);
    const bool inside = adapter->learns_inside(), fast = adapter->fast_count() > 0;
    const bool learn = fast && !inside && !never;
    const bool watch = options.text("policy") == "adapter";
    const int64_t whole = context / chunk * chunk;
    const auto pass_of = [&](int64_t tokens, int64_t scored) {
        return record_pass(model, *adapter, {tokens, scored, learn, inside, watch});
    };
    const Recording pass = pass_of(whole, chunk);
    const std::vector<Group> groups = schedule(pass.graph, pass.segment_ends);

    ponder_memory_plan plan{};
    plan.weights = model.bytes();
    const bool packs = backend.name != "reference";
    const bool own_memory = !backend.descriptor->host_memory; // holds the weights again
    plan.packed_weights =
        own_memory ? model.bytes()
        : packs    ? with_packing_slack(model.packed_estimate(learn, adapter->lowest_layer()))
                   : 0;
    const uint64_t vector = adapter->fast_count() * sizeof(float);
    const uint64_t moments = !learn ? 0 : options.text("inner.optimizer") == "adam" ? 2 : 0;
    plan.fast_parameters = adapter->fast_count();
    const bool learned = !adapter->rates().log_rate.empty();
    plan.fast_weights = (3 + 3 * learned) * vector; // now, shadow, initial; learned rates
    plan.optimizer = vector * (2 * moments + (learn ? 1 : 0));
    const auto activations = [&](const Recording &of) {
        uint64_t bytes = arena_of(of.graph, of.segment_ends, own_memory);
        for (Id id : of.watched())
            bytes += id == none ? 0 : of.graph.value(id).bytes();
        return bytes;
    };
    plan.activations = activations(pass);
    if (context - whole >= 2) // the stream's end behind a full context
        plan.activations =
            std::max(plan.activations, activations(pass_of(context, context - whole)));
    plan.workspace = own_memory ? workspace_of_device
                     : packs    ? workspace_of_worker(config) * runtime.threads->count()
                                : 0;
    plan.total = plan.weights + plan.packed_weights + plan.fast_weights + plan.optimizer +
                 plan.activations + plan.workspace;
    plan.generation =
        Decoder::memory(model, *adapter, 1, {context, chunk, inside && !never, true, false}) +
        plan.workspace;
    plan.flops_score = count_flops(pass.graph, groups, score_segment);
    plan.flops_step = learn ? count_flops(pass.graph, groups, learn_segment) : 0;
    return plan;
}

} // namespace ponder
