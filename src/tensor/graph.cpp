#include "tensor/graph.hpp"

#include "base/error.hpp"
#include "tensor/ops.hpp"

#include <algorithm>

namespace ponder {

Graph::Graph(DType act, Mode mode)
    : act(act), wide(act == DType::f64 ? act : DType::f32), mode(mode) {
    if (mode.higher && act != wide)
        throw_error(PONDER_E_UNSUPPORTED, "gradients of gradients (train.higher) need dtype f32");
}

Id Graph::weight(std::string name, DType type, Shape shape, const void *data, bool trained) {
    const auto [at, fresh] = weights_.try_emplace(name, Id(values_.size()));
    if (fresh)
        values_.push_back({std::move(name), type, shape, trained ? Kind::parameter : Kind::constant,
                           data, trained});
    return at->second;
}

Id Graph::scaled_constant(std::string name, Shape shape, const void *data, Shape scales_shape,
                          const void *scales) {
    const Id by = constant(name + "_scale", DType::f32, scales_shape, scales);
    const Id id = constant(std::move(name), DType::i8, shape, data);
    values_[size_t(id)].scales = by;
    return id;
}

Id Graph::literal(Shape shape, const std::vector<double> &values) {
    auto bytes = std::make_shared<std::byte[]>(values.size() * size_of(wide));
    for (size_t i = 0; i < values.size(); ++i)
        if (wide == DType::f64)
            reinterpret_cast<double *>(bytes.get())[i] = values[i];
        else
            reinterpret_cast<float *>(bytes.get())[i] = float(values[i]);
    values_.push_back({"literal", wide, shape, Kind::constant, bytes.get(), false, true});
    literals_.push_back(std::move(bytes));
    return Id(values_.size() - 1);
}

Id Graph::external(std::string name, DType type, Shape shape, bool needs_gradient) {
    values_.push_back({std::move(name), type, shape, Kind::external, nullptr, needs_gradient});
    return Id(values_.size() - 1);
}

Id Graph::temporary(DType type, Shape shape, bool needs_gradient) {
    values_.push_back({"", type, shape, Kind::temporary, nullptr, needs_gradient});
    return Id(values_.size() - 1);
}

void Graph::expose(Id value, std::string name) {
    Value &v = values_[size_t(value)];
    v.kind = Kind::external;
    v.name = std::move(name);
}

void Graph::add_call(const OpRule &rule, std::vector<Id> in, std::vector<Id> out,
                     std::vector<double> attr) {
    bool needs = false;
    for (Id id : in)
        needs = needs || (id != none && value(id).needs_gradient);
    for (Id id : out)
        if (id != none && rule.vjp)
            values_[size_t(id)].needs_gradient = needs;
    if (needs && !rule.vjp && mode.higher)
        throw_error(PONDER_E_INTERNAL, "%s has no gradient of its gradient", rule.name);
    calls_.push_back({&rule, std::move(in), std::move(out), std::move(attr)});
}

void Graph::add_block(size_t begin) {
    if (mode.recompute)
        blocks_.push_back({begin, calls_.size()});
}

std::map<Id, Id> Graph::repeat(Block block) {
    breaks_.push_back(calls_.size());
    std::map<Id, Id> again;
    for (size_t i = block.begin; i < block.end; ++i) {
        Call call = calls_[i];
        for (Id &in : call.in)
            if (const auto found = again.find(in); found != again.end())
                in = found->second;
        for (Id &out : call.out)
            if (out != none)
                out = again[out] = temporary(value(out).type, shape(out));
        add_call(*call.rule, std::move(call.in), std::move(call.out), std::move(call.attr));
    }
    return again;
}

void Graph::drop_unread(size_t begin, size_t end) {
    std::vector<bool> read(values_.size());
    for (size_t i = calls_.size(); i-- > begin;) {
        const Call &call = calls_[i];
        if (i < end && std::none_of(call.out.begin(), call.out.end(),
                                    [&](Id out) { return out != none && read[size_t(out)]; })) {
            calls_.erase(calls_.begin() + std::ptrdiff_t(i));
            continue;
        }
        for (Id in : call.in)
            if (in != none)
                read[size_t(in)] = true;
    }
}

void Graph::replace(const std::vector<size_t> &old, size_t place, Call call) {
    calls_[place] = std::move(call);
    std::vector<Call> left;
    for (size_t i = 0; i < calls_.size(); ++i)
        if (i == place || std::find(old.begin(), old.end(), i) == old.end())
            left.push_back(std::move(calls_[i]));
    calls_ = std::move(left);
}

Id Tape::gradient(Id value) const {
    return value != none && size_t(value) < gradient_.size() ? gradient_[size_t(value)] : none;
}

void Tape::add(Id value, Id gradient) {
    if (gradient_.size() < graph.values().size())
        gradient_.resize(graph.values().size(), none);
    Id &sum = gradient_[size_t(value)];
    sum = sum == none ? gradient : ponder::add(graph, sum, gradient, graph.value(sum).type);
}

Id Tape::take(Id value) {
    const Id so_far = gradient(value);
    if (so_far != none)
        gradient_[size_t(value)] = none;
    return so_far;
}

namespace {

// The calls from `begin` to `end`, backwards; rules append behind them.
void take_back(Tape &tape, size_t begin, size_t end) {
    for (size_t i = end; i-- > begin;) {
        const Call call = tape.graph.calls()[i]; // a copy: the list grows
        bool reached = false;
        for (Id out : call.out)
            reached = reached || (tape.wants(out) && tape.gradient(out) != none);
        if (reached)
            call.rule->vjp(tape, call);
    }
}

void take_back_again(Tape &tape, Graph::Block block) {
    const size_t begin = tape.graph.calls().size();
    for (const auto &[first, second] : tape.graph.repeat(block))
        if (const Id so_far = tape.take(first); so_far != none)
            tape.add(second, so_far);
    const size_t end = tape.graph.calls().size();
    take_back(tape, begin, end);
    tape.graph.drop_unread(begin, end);
}

} // namespace

std::vector<Id> gradients(Graph &graph, const std::vector<Seed> &seeds,
                          const std::vector<Id> &wanted) {
    Tape tape(graph);
    for (const Seed &seed : seeds)
        tape.add(seed.value, seed.gradient);
    const std::vector<Graph::Block> blocks = graph.blocks();
    size_t end = graph.calls().size();
    for (auto block = blocks.rbegin(); block != blocks.rend(); ++block) {
        take_back(tape, block->end, end);
        take_back_again(tape, *block);
        end = block->begin;
    }
    take_back(tape, 0, end);
    std::vector<Id> result;
    for (Id id : wanted) {
        if (tape.gradient(id) == none)
            throw_error(PONDER_E_INTERNAL, "no gradient reaches '%s'",
                        graph.value(id).name.c_str());
        // Each result is a value of its own: no seed, and not another's result.
        Id gradient = tape.gradient(id);
        if (graph.value(gradient).kind == Kind::external ||
            std::find(result.begin(), result.end(), gradient) != result.end())
            gradient = affine(graph, gradient, 1, 0);
        result.push_back(gradient);
    }
    return result;
}

std::vector<Id> gradients(Graph &graph, Id loss, const std::vector<Id> &wanted) {
    return gradients(graph, {{loss, fill(graph, graph.shape(loss), 1.0)}}, wanted);
}

} // namespace ponder
