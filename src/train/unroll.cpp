#include "train/unroll.hpp"

#include "adapt/adapter.hpp"
#include "base/error.hpp"
#include "base/options.hpp"

#include <algorithm>
#include <cstring>

namespace ponder {

// One chunk, recorded: to its loss; to the fast weights' gradient (adapters that learn between
// chunks); to the adjoint.
template <class T> struct Unroll<T>::Pass {
    int64_t context;
    Id tokens, targets, loss;
    Id reconstruction = none;
    std::vector<Id> after;    // inside: new fast weights
    std::vector<Id> gradient; // between
    Id loss_seed = none, reconstruction_seed = none;
    std::vector<Id> seed; // of `after` or of `gradient`
    std::vector<Id> fast_adjoint, slow_adjoint;
    std::unique_ptr<const Program> program;
};

// A step that was taken, or a chunk that was only scored.
template <class T> struct Unroll<T>::Node {
    size_t chunk;
    size_t slot;   // of its weights, gradient and, where kept, arena
    uint64_t step; // of the update rule, from 1; 0: none was taken
    bool counts;   // its loss is part of the outer loss
};

template <class T> class Unroll<T>::Work {
public:
    Work(const Unroll &u) : u_(u) {}
    using State = typename UpdateRuleOf<T>::State;

    // Single numbers, on the device.
    struct Scalars {
        alignas(64) T loss;
        alignas(64) T reconstruction[3];
        alignas(64) T loss_seed;
        alignas(64) T reconstruction_seed[3];
    };
    std::vector<int32_t> tokens, targets;
    T loss = 0, reconstruction[3] = {};
    size_t counted = 0; // chunks in the outer loss

    // In the device's memory:
    DeviceVector<int32_t> inputs; // tokens, targets
    DeviceBuffer numbers;
    DeviceVector<T> state; // weights and moments now
    DeviceVector<T> lambda, next, dgradient, drate, dkeep, dstart, adjoint, slow;
    DeviceVector<T> sum_fast, sum_rate, sum_keep, sum_slow; // of the result
    std::vector<Node> nodes; // of the window
    uint64_t taken = 0;      // steps of the update rule so far

    size_t state_size() const {
        return u_.fast_count_ * (1 + (u_.inside_ ? 0 : u_.rule_.moments()));
    }
    State view(T *base) const {
        const size_t n = u_.fast_count_, moments = u_.inside_ ? 0 : u_.rule_.moments();
        return {base, moments > 0 ? base + n : nullptr, moments > 1 ? base + 2 * n : nullptr};
    }
    Scalars *scalars() const { return numbers.template data<Scalars>(); }
    void write(T *to, const T *from, size_t count) const {
        u_.device_->upload(to, from, count * sizeof(T));
    }
    // Weights and moments before the step of a slot, and its gradient.
    T *before(size_t slot) { return vector(before_, slot, state_size()); }
    T *gradient(size_t slot) { return vector(gradient_, slot, u_.fast_count_); }
    std::byte *arena(size_t slot) {
        const size_t at = u_.keep_ ? slot : 0;
        while (arenas_.size() <= at)
            arenas_.emplace_back(u_.device_, u_.arena_);
        return arenas_[at].data();
    }
    std::byte *workspace() {
        if (workspace_.size() < u_.workspace_)
            workspace_ = DeviceBuffer(u_.device_, u_.workspace_);
        return workspace_.data();
    }

private:
    T *vector(std::vector<DeviceVector<T>> &all, size_t slot, size_t count) {
        while (all.size() <= slot)
            all.emplace_back(u_.device_, count);
        return all[slot].data();
    }
    const Unroll &u_;
    std::vector<DeviceVector<T>> before_, gradient_;
    std::vector<DeviceBuffer> arenas_;
    DeviceBuffer workspace_;
};

template <class T>
Unroll<T>::Unroll(const Gpt2 &model, const Adapter &adapter, const Options &options,
                  std::shared_ptr<const Device> device, LearnedRates<T> learned)
    : model_(model), adapter_(adapter), device_(std::move(device)),
      rule_(options, adapter.fast_count(), device_, learned, true), learned_(learned),
      steps_(uint64_t(options.integer("steps"))),
      window_(uint64_t(options.integer("train.window"))), inner_(options.boolean("train.inner")),
      keep_(options.boolean("train.keep")), carry_(options.boolean("ttt.carry")),
      inside_(adapter.learns_inside()), reconstruction_(options.number("train.reconstruction")),
      fast_count_(adapter.fast_count()), slow_count_(0) {
    higher_ = options.boolean("train.higher") && inner_ && !inside_;
    inner_ = inner_ && (inside_ || steps_ > 0);
    const int64_t positions = model.config().context;
    chunk_ = options.integer("chunk");
    context_ = options.integer("context") == 0 ? positions : options.integer("context");
    context_ = std::max(context_, chunk_);
    if (context_ > positions)
        throw_error(PONDER_E_ARGUMENT,
                    "options 'chunk' %d and 'context' %d: the backbone has %d "
                    "positions",
                    int(chunk_), int(context_), int(positions));
    for (const auto &[name, slow] : adapter.slow())
        slow_count_ += size_t(slow.shape.count());
    for (int64_t before = 0; before + chunk_ <= context_; before += chunk_) {
        passes_[before] = record(before);
        arena_ = std::max(arena_, passes_[before]->program->arena_bytes());
        workspace_ = std::max(workspace_, passes_[before]->program->workspace_bytes());
    }
    workspace_ = std::max(workspace_, rule_.workspace_bytes());
    sum_fast_ = record_sum(fast_count_, false);
    sum_scaled_ = record_sum(fast_count_, true);
    if (slow_count_ > 0)
        sum_slow_ = record_sum(slow_count_, false);
    for (const Sum *sum : {&sum_fast_, &sum_scaled_, &sum_slow_})
        if (sum->program)
            workspace_ = std::max(workspace_, sum->program->workspace_bytes());
}

template <class T> typename Unroll<T>::Sum Unroll<T>::record_sum(size_t count, bool factor) const {
    Graph g(sizeof(T) == 8 ? DType::f64 : DType::f32);
    const Shape flat{int64_t(count)};
    Sum s{};
    s.a = g.external("a", g.wide, flat);
    s.b = g.external("b", g.wide, flat);
    s.factor = s.scaled = none;
    if (factor) {
        s.factor = g.external("factor", g.wide, {1});
        s.scaled = mul(g, s.b, s.factor);
        g.expose(s.scaled, "scaled");
    }
    s.sum = ponder::add(g, s.a, factor ? s.scaled : s.b, g.wide);
    g.expose(s.sum, "sum");
    const size_t end = g.calls().size();
    s.program = std::make_unique<Program>(std::move(g), std::vector{end}, device_);
    return s;
}

template <class T>
void Unroll<T>::add(const Sum &sum, T *to, const T *from, const T *factor, Work &work) const {
    Program::Bindings at(sum.program->graph().values().size());
    at[size_t(sum.a)] = at[size_t(sum.sum)] = to;
    at[size_t(sum.b)] = const_cast<T *>(from);
    if (factor) {
        at[size_t(sum.factor)] = const_cast<T *>(factor);
        at[size_t(sum.scaled)] = work.adjoint.data();
    }
    sum.program->run_serial(0, at, nullptr, work.workspace(), nullptr);
}

template <class T>
std::shared_ptr<const typename Unroll<T>::Pass> Unroll<T>::record(int64_t context) const {
    Mode mode;
    mode.higher = higher_;
    mode.train_adapter = inside_;
    mode.compose_mlp = device_->on_host();
    Graph g(model_.type(), mode);
    auto p = std::make_shared<Pass>();
    p->context = context;
    adapter_.bind(g);
    p->tokens = g.external("tokens", DType::i32, {1, context + chunk_});
    p->targets = g.external("targets", DType::i32, {1, chunk_});
    std::vector<Id> fast;
    for (size_t i = 0; i < adapter_.fast_tensors().size(); ++i)
        fast.push_back(Adapter::fast_id(i));
    const auto expose = [&](const std::vector<Id> &ids, const char *what) {
        for (Id id : ids)
            g.expose(id, what);
    };

    Id hidden = model_.hidden(g, p->tokens, chunk_, adapter_, inside_ ? g.wide : g.act);
    if (inside_) {
        const InsideResult result = adapter_.after_backbone(g, hidden);
        hidden = result.hidden;
        p->after = result.state;
        p->reconstruction = result.loss;
    }
    const CrossEntropy ce = cross_entropy(g, hidden, model_.head(g), p->targets, true);
    p->loss = mean(g, ce.nll, chunk_ - 1);
    std::vector<size_t> ends{g.calls().size()};

    std::vector<Seed> seeds;
    const auto seed_of = [&](Id value, const char *name) {
        const Id seed = g.external(name, g.wide, g.shape(value));
        seeds.push_back({value, seed});
        return seed;
    };
    if (inside_) {
        p->loss_seed = seed_of(p->loss, "weight of the loss");
        p->reconstruction_seed = seed_of(p->reconstruction, "weight of the reconstruction loss");
        for (Id id : p->after)
            p->seed.push_back(seed_of(id, "adjoint of new fast weights"));
        std::vector<Id> wanted = fast;
        for (const auto &[name, slow] : adapter_.slow())
            wanted.push_back(g.weight(name, DType::f32, slow.shape, slow.values.data(), true));
        const std::vector<Id> adjoint = gradients(g, seeds, wanted);
        p->fast_adjoint.assign(adjoint.begin(), adjoint.begin() + std::ptrdiff_t(fast.size()));
        p->slow_adjoint.assign(adjoint.begin() + std::ptrdiff_t(fast.size()), adjoint.end());
        expose(p->after, "new fast weights");
        g.expose(p->reconstruction, "reconstruction loss");
        ends.push_back(ends.back()); // no gradient_segment
        ends.push_back(g.calls().size());
    } else {
        p->gradient = gradients(g, p->loss, fast);
        ends.push_back(g.calls().size());
        if (higher_) {
            p->loss_seed = seed_of(p->loss, "weight of the loss");
            for (Id id : p->gradient)
                p->seed.push_back(seed_of(id, "adjoint of the gradient"));
            p->fast_adjoint = gradients(g, seeds, fast);
            ends.push_back(g.calls().size());
        }
        expose(p->gradient, "gradient");
    }
    g.expose(p->loss, "loss");
    expose(p->fast_adjoint, "adjoint of fast weights");
    expose(p->slow_adjoint, "gradient of slow weights");
    p->program = std::make_unique<Program>(std::move(g), ends, device_);
    return p;
}

// Whole earlier chunks that fit before this one.
template <class T> const typename Unroll<T>::Pass &Unroll<T>::pass(size_t chunk) const {
    const int64_t fit = (context_ - chunk_) / chunk_;
    return *passes_.at(std::min(int64_t(chunk), fit) * chunk_);
}

template <class T>
void Unroll<T>::load(std::span<const int32_t> stream, size_t chunk, Work &work) const {
    const Pass &p = pass(chunk);
    const auto end = stream.begin() + std::ptrdiff_t(chunk + 1) * chunk_;
    work.tokens.assign(end - chunk_ - p.context, end);
    work.targets.assign(end - chunk_ + 1, end);
    work.targets.push_back(-1);
    work.inputs.write(work.tokens.data(), work.tokens.size());
    work.inputs.write(work.targets.data(), work.targets.size(), size_t(context_));
}

template <class T>
Program::Bindings Unroll<T>::bind(const Pass &p, Work &work, const Node &node) const {
    Program::Bindings at(p.program->graph().values().size());
    const auto put = [&](Id id, const void *address) {
        if (id != none)
            at[size_t(id)] = const_cast<void *>(address);
    };
    T *const weights = work.before(node.slot);
    T *const gradient = work.gradient(node.slot);
    const std::vector<FastTensor> &fast = adapter_.fast_tensors();
    for (size_t i = 0; i < fast.size(); ++i) {
        put(Adapter::fast_id(i), weights + fast[i].offset);
        if (!p.gradient.empty())
            put(p.gradient[i], gradient + fast[i].offset);
        if (!p.after.empty())
            put(p.after[i], work.next.data() + fast[i].offset);
        if (!p.seed.empty())
            put(p.seed[i], (inside_ ? work.lambda : work.dgradient).data() + fast[i].offset);
        if (!p.fast_adjoint.empty())
            put(p.fast_adjoint[i], work.adjoint.data() + fast[i].offset);
    }
    T *slow = work.slow.data();
    for (Id id : p.slow_adjoint) {
        put(id, slow);
        slow += p.program->graph().shape(id).count();
    }
    put(p.tokens, work.inputs.data());
    put(p.targets, work.inputs.data() + context_);
    put(p.loss, &work.scalars()->loss);
    put(p.reconstruction, work.scalars()->reconstruction);
    put(p.loss_seed, &work.scalars()->loss_seed);
    put(p.reconstruction_seed, work.scalars()->reconstruction_seed);
    return at;
}

template <class T>
void Unroll<T>::run_segment(PassSegment segment, const Node &node, Work &work, Result &result,
                            const std::function<void()> &check) const {
    const Pass &p = pass(node.chunk);
    p.program->run_serial(segment, bind(p, work, node), work.arena(node.slot), work.workspace(),
                          check);
    result.flops += p.program->flops(segment);
}

template <class T> std::shared_ptr<typename Unroll<T>::Work> Unroll<T>::make_work() const {
    auto work = std::make_shared<Work>(*this);
    work->inputs = DeviceVector<int32_t>(device_, size_t(context_ + chunk_));
    work->numbers = DeviceBuffer(device_, sizeof(typename Work::Scalars));
    for (auto *vector : {&work->state, &work->lambda, &work->next})
        *vector = DeviceVector<T>(device_, work->state_size());
    for (auto *vector : {&work->dgradient, &work->drate, &work->dkeep, &work->dstart,
                         &work->adjoint, &work->sum_fast})
        *vector = DeviceVector<T>(device_, fast_count_);
    if (learned_.rate)
        for (auto *vector : {&work->sum_rate, &work->sum_keep})
            *vector = DeviceVector<T>(device_, fast_count_);
    for (auto *vector : {&work->slow, &work->sum_slow})
        *vector = DeviceVector<T>(device_, slow_count_);
    return work;
}

template <class T> double Unroll<T>::weight(size_t chunk, const Work &work) const {
    const bool first_counts = inside_ || !inner_;
    return chunk > 0 || first_counts ? 1 / double(work.counted) : 0;
}

template <class T>
typename Unroll<T>::Result Unroll<T>::run(std::span<const int32_t> stream, Work &work,
                                          const std::function<void()> &check) const {
    const size_t chunks = chunks_of(stream.size());
    if (chunks < 2)
        throw_error(PONDER_E_ARGUMENT, "a stream of %zu tokens has less than two chunks of %d",
                    stream.size(), int(chunk_));
    Result result;
    for (const auto *sum : {&work.sum_fast, &work.sum_rate, &work.sum_keep, &work.sum_slow})
        if (sum->size() > 0)
            sum->clear();
    result.chunks = chunks;
    work.counted = inside_ || !inner_ ? chunks : chunks - 1;
    result.predictions = work.counted * uint64_t(chunk_ - 1);
    work.state.clear();
    work.state.copy(learned_.start, fast_count_);
    work.taken = 0;
    for (size_t first = 0; first < chunks; first += window_) {
        work.nodes.clear();
        for (size_t c = first; c < std::min<size_t>(first + window_, chunks); ++c)
            forward(stream, c, work, result, check);
        backward(stream, work, result, check);
        if (first == 0)
            add(sum_fast_, work.sum_fast.data(), work.lambda.data(), nullptr, work);
    }
    result.fast = work.sum_fast.values();
    result.rate = learned_.rate ? work.sum_rate.values() : std::vector<T>();
    result.keep = learned_.rate ? work.sum_keep.values() : std::vector<T>();
    result.slow = work.sum_slow.size() > 0 ? work.sum_slow.values() : std::vector<T>();
    result.reconstruction /= double(chunks);
    return result;
}

template <class T>
void Unroll<T>::forward(std::span<const int32_t> stream, size_t chunk, Work &work, Result &result,
                        const std::function<void()> &check) const {
    const bool last = (chunk + 1) * size_t(chunk_) + size_t(chunk_) > stream.size();
    const uint64_t steps = inside_ ? uint64_t(inner_) : inner_ && !last ? steps_ : 0;
    const double counts = weight(chunk, work);
    load(stream, chunk, work);
    for (uint64_t k = 0; k < std::max<uint64_t>(steps, 1); ++k) {
        Node node{chunk, work.nodes.size(), 0, k == 0 && counts > 0};
        device_->copy(work.before(node.slot), work.state.data(), work.state_size() * sizeof(T));
        run_segment(forward_segment, node, work, result, check);
        if (k == 0)
            device_->download(&work.loss, &work.scalars()->loss, sizeof work.loss);
        if (inside_)
            device_->download(work.reconstruction, work.scalars()->reconstruction,
                              sizeof work.reconstruction);
        if (k == 0) {
            result.loss += counts * double(work.loss);
            if (chunk == 0)
                result.first = double(work.loss);
        }
        if (inside_) {
            result.reconstruction += double(work.reconstruction[1]);
            if (inner_ && carry_)
                work.state.copy(work.next.data(), fast_count_);
        } else if (steps > 0 || node.counts) {
            run_segment(gradient_segment, node, work, result, check);
            if (steps > 0) {
                node.step = ++work.taken;
                rule_.step(work.view(work.before(node.slot)), work.view(work.state.data()),
                           work.gradient(node.slot), node.step, work.workspace());
            }
        }
        work.nodes.push_back(node);
    }
    result.steps += steps;
}

template <class T>
void Unroll<T>::backward(std::span<const int32_t> stream, Work &work, Result &result,
                         const std::function<void()> &check) const {
    work.lambda.clear();
    for (size_t i = work.nodes.size(); i-- > 0;) {
        const Node &node = work.nodes[i];
        const T seed = node.counts ? T(weight(node.chunk, work)) : T(0);
        work.write(&work.scalars()->loss_seed, &seed, 1);
        load(stream, node.chunk, work);
        if (inside_)
            backward_inside(node, work, result, check);
        else
            backward_between(node, work, result, check);
    }
}

template <class T>
void Unroll<T>::backward_between(const Node &node, Work &work, Result &result,
                                 const std::function<void()> &check) const {
    work.dgradient.clear();
    if (node.step > 0) {
        rule_.vjp(work.view(work.before(node.slot)), work.gradient(node.slot), node.step,
                  work.view(work.lambda.data()), work.view(work.next.data()),
                  {work.dgradient.data(), work.drate.data(), work.dkeep.data(), work.dstart.data()},
                  work.workspace());
        work.lambda.swap(work.next);
        if (learned_.rate) {
            add(sum_fast_, work.sum_rate.data(), work.drate.data(), nullptr, work);
            add(sum_fast_, work.sum_keep.data(), work.dkeep.data(), nullptr, work);
            add(sum_fast_, work.sum_fast.data(), work.dstart.data(), nullptr, work);
        }
    }
    if (higher_) {
        if (!keep_) {
            run_segment(forward_segment, node, work, result, check);
            run_segment(gradient_segment, node, work, result, check);
        }
        run_segment(adjoint_segment, node, work, result, check);
        add(sum_fast_, work.lambda.data(), work.adjoint.data(), nullptr, work);
    } else if (node.counts) {
        add(sum_scaled_, work.lambda.data(), work.gradient(node.slot), &work.scalars()->loss_seed,
            work);
    }
}

template <class T>
void Unroll<T>::backward_inside(const Node &node, Work &work, Result &result,
                                const std::function<void()> &check) const {
    const double each = reconstruction_ / double(work.counted);
    const T seed = T(inner_ ? each : 0);
    work.write(&work.scalars()->reconstruction_seed[1], &seed, 1);
    if (!keep_)
        run_segment(forward_segment, node, work, result, check);
    run_segment(adjoint_segment, node, work, result, check);
    if (slow_count_ > 0)
        add(sum_slow_, work.sum_slow.data(), work.slow.data(), nullptr, work);
    if (inner_ && carry_)
        work.lambda.copy(work.adjoint.data(), fast_count_);
    else // every chunk starts from the initial values
        add(sum_fast_, work.sum_fast.data(), work.adjoint.data(), nullptr, work);
}

template class Unroll<float>;
template class Unroll<double>;

} // namespace ponder
