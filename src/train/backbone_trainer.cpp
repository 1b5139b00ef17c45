#include "train/backbone_trainer.hpp"

#include "base/error.hpp"
#include "formats/gpt2_write.hpp"

#include <algorithm>

namespace ponder {

BackboneTrainer::BackboneTrainer(std::shared_ptr<const Model> model, const Options &options)
    : Trainer(std::move(model), "backbone", options),
      device_(std::make_shared<Device>(model_->runtime().backend(model_->device()->backend().name),
                                       model_->runtime().memory, model_->runtime().threads,
                                       model_->runtime().log)),
      working_(model_->backbone(), model_->runtime().memory) {
    if (working_.storage() == Storage::int8)
        throw_error(PONDER_E_UNSUPPORTED,
                    "int8 weights cannot be trained; load the model with weights 'float'");
    size_t matrices = 0, offset = 0;
    for (const bool matrix : {true, false}) {
        for (const Gpt2::Weight &w : working_.weights()) {
            if ((w.shape.rank == 2) != matrix)
                continue;
            weights_.push_back({w.name, w.shape, w.type, w.data, offset});
            offset += size_t(w.shape.count());
        }
        if (matrix)
            matrices = offset;
    }
    outer_ = std::make_unique<Outer>(
        options_, device_,
        std::vector<Outer::Segment>{{matrices, 1, true}, {offset - matrices, 1, false}});
    std::vector<float> values(outer_->count());
    for (const Weight &w : weights_) {
        float *to = values.data() + w.offset;
        const size_t count = size_t(w.shape.count());
        if (w.type == DType::bf16)
            std::transform(reinterpret_cast<const bf16 *>(w.data),
                           reinterpret_cast<const bf16 *>(w.data) + count, to, to_float);
        else
            std::copy_n(reinterpret_cast<const float *>(w.data), count, to);
    }
    outer_->write_values(values);
    loss_ = DeviceVector<float>(device_, 1);
    if (device_->on_host())
        return;
    Graph cast(working_.type());
    for (const Weight &w : weights_) {
        const Shape flat{w.shape.count()};
        cast_.from.push_back(cast.external("master", DType::f32, flat));
        cast_.to.push_back(cast.external("working copy", w.type, flat));
        convert(cast, cast_.from.back(), cast_.to.back());
    }
    const auto program = [&](Graph g) {
        const size_t end = g.calls().size();
        return std::make_unique<const Program>(std::move(g), std::vector{end}, device_);
    };
    cast_.program = program(std::move(cast));
    Graph g(DType::f32);
    const Shape flat{int64_t(outer_->count())};
    sum_.total = g.external("total", DType::f32, flat);
    sum_.gradient = g.external("gradient", DType::f32, flat);
    sum_.keep = g.external("keep", DType::f32, {1});
    sum_.share = g.external("share", DType::f32, {1});
    sum_.kept = mul(g, sum_.total, sum_.keep);
    sum_.shared = mul(g, sum_.gradient, sum_.share);
    sum_.sum = add(g, sum_.kept, sum_.shared, DType::f32);
    for (const Id id : {sum_.kept, sum_.shared, sum_.sum})
        g.expose(id, "sum");
    sum_.program = program(std::move(g));
    factors_ = DeviceVector<float>(device_, 2);
}

void BackboneTrainer::spread_on_device() {
    Program::Bindings at(cast_.program->graph().values().size());
    for (size_t i = 0; i < weights_.size(); ++i) {
        const Weight &w = weights_[i];
        at[size_t(cast_.from[i])] = outer_->values() + w.offset;
        at[size_t(cast_.to[i])] =
            device_->resident(w.data, size_t(w.shape.count()) * size_of(w.type));
    }
    cast_.program->run(0, at, nullptr, workspace_.data(), nullptr);
    for (const Weight &w : weights_)
        device_->refresh_packed(w.data);
}

void BackboneTrainer::accumulate(float keep, float share, const float *gradient) {
    float *const total = outer_->gradient();
    if (device_->on_host()) {
        constexpr size_t block = size_t(1) << 16;
        const size_t count = outer_->count();
        device_->threads().run(uint32_t((count + block - 1) / block), [&](uint32_t i, uint32_t) {
            const size_t end = std::min(count, (i + 1) * block);
            for (size_t j = i * block; j < end; ++j)
                total[j] = (keep > 0 ? total[j] : 0.0f) + share * gradient[j];
        });
        return;
    }
    // The first pass has written where the sum is kept, the others beside it in micro_, and what
    // is not yet in use there serves as scratch.
    const float factors[2] = {keep, share};
    factors_.write(factors, 2);
    Program::Bindings at(sum_.program->graph().values().size());
    const auto bind = [&](Id id, const float *data) { at[size_t(id)] = const_cast<float *>(data); };
    bind(sum_.total, total);
    bind(sum_.gradient, gradient);
    bind(sum_.keep, factors_.data());
    bind(sum_.share, factors_.data() + 1);
    bind(sum_.kept, keep > 0 ? total : micro_.data());
    bind(sum_.shared, gradient);
    bind(sum_.sum, total);
    sum_.program->run(0, at, nullptr, workspace_.data(), nullptr);
}

void BackboneTrainer::spread() {
    if (!device_->on_host())
        return spread_on_device();
    device_->threads().run(uint32_t(weights_.size()), [&](uint32_t i, uint32_t) {
        const Weight &w = weights_[i];
        const float *from = outer_->values() + w.offset;
        const size_t count = size_t(w.shape.count());
        if (w.type == DType::bf16)
            std::transform(from, from + count, reinterpret_cast<bf16 *>(w.data), to_bf16);
        else
            std::copy_n(from, count, reinterpret_cast<float *>(w.data));
        device_->refresh(w.data);
    });
}

const BackboneTrainer::Pass &BackboneTrainer::pass(int64_t streams, int64_t tokens) {
    const auto found = passes_.find({streams, tokens});
    if (found != passes_.end())
        return found->second;
    Mode mode;
    mode.train_backbone = true;
    mode.dropout = options_.number("train.dropout");
    mode.attention_dropout = options_.number("train.attention_dropout");
    mode.recompute = options_.boolean("train.recompute");
    Graph g(working_.type(), mode);
    Pass p{};
    p.tokens = g.external("tokens", DType::i32, {streams, tokens});
    p.targets = g.external("targets", DType::i32, {streams, tokens});
    p.seed = g.mode.dropout_seed = g.external("seed", DType::i32, {2});
    const Id hidden = working_.hidden(g, p.tokens, tokens, Adapter(), g.act);
    const CrossEntropy ce = cross_entropy(g, hidden, working_.head(g), p.targets, true);
    p.loss = mean(g, ce.nll, streams * tokens);
    std::vector<Id> wanted;
    for (const Weight &w : weights_)
        wanted.push_back(g.weight(w.name, w.type, w.shape, w.data, true));
    p.gradient = gradients(g, p.loss, wanted);
    g.expose(p.loss, "loss");
    for (Id id : p.gradient)
        g.expose(id, "gradient");
    std::vector<size_t> ends = g.breaks();
    ends.push_back(g.calls().size());
    p.program = std::make_unique<Program>(std::move(g), std::move(ends), device_);
    const auto fit = [&](DeviceBuffer &buffer, size_t size) {
        if (buffer.size() < size) {
            buffer = DeviceBuffer();
            buffer = DeviceBuffer(device_, size);
        }
    };
    fit(arena_, p.program->arena_bytes());
    fit(workspace_, p.program->workspace_bytes() * device_->workers());
    return passes_.emplace(std::pair(streams, tokens), std::move(p)).first->second;
}

void BackboneTrainer::differentiate(std::span<const ponder_stream> streams, Peers::Share mine,
                                    ponder_train_record &r, const CallGuard &guard) {
    const int64_t tokens = int64_t(streams[0].count) - 1;
    const size_t most = size_t(options_.integer("train.micro")), all = mine.end - mine.begin;
    std::vector<int32_t> ids, targets;
    for (size_t first = mine.begin; first < mine.end; first += most) {
        const std::span<const ponder_stream> micro =
            streams.subspan(first, std::min(most, mine.end - first));
        ids.clear();
        targets.clear();
        for (const ponder_stream &s : micro) {
            ids.insert(ids.end(), s.ids, s.ids + tokens);
            targets.insert(targets.end(), s.ids + 1, s.ids + 1 + tokens);
        }
        const Pass &p = pass(int64_t(micro.size()), tokens);
        // The first pass writes where the sum is kept, the others beside it.
        const double share = double(micro.size()) / double(streams.size());
        float *gradient = outer_->gradient();
        if (first > mine.begin || (share < 1 && !device_->on_host()))
            if (micro_.size() == 0)
                micro_ = DeviceVector<float>(device_, outer_->count());
        if (first > mine.begin)
            gradient = micro_.data();
        const int32_t seed[2] = {int32_t(options_.integer("seed") * 0x9e3779b1 + int64_t(first)),
                                 int32_t(outer_->steps() + 1)};
        const size_t count = ids.size();
        if (inputs_.size() < 2 * count + 2) {
            inputs_ = {};
            inputs_ = DeviceVector<int32_t>(device_, 2 * count + 2);
        }
        ids.insert(ids.end(), targets.begin(), targets.end());
        ids.insert(ids.end(), seed, seed + 2);
        inputs_.write(ids.data(), ids.size());
        Program::Bindings at(p.program->graph().values().size());
        const auto bind = [&](Id id, void *data) {
            if (id != none)
                at[size_t(id)] = data;
        };
        bind(p.tokens, inputs_.data());
        bind(p.targets, inputs_.data() + count);
        bind(p.seed, inputs_.data() + 2 * count);
        bind(p.loss, loss_.data());
        for (size_t i = 0; i < weights_.size(); ++i)
            bind(p.gradient[i], gradient + weights_[i].offset);
        for (size_t i = 0; i < p.program->segments(); ++i) {
            p.program->run(i, at, arena_.data(), workspace_.data(), [&] {
                guard.check();
                guard.progress(first - mine.begin, all);
            });
            r.flops += p.program->flops(i);
        }
        float loss = 0;
        loss_.read(&loss, 1);

        r.loss += share * double(loss);
        if (share < 1)
            accumulate(first > mine.begin ? 1.0f : 0.0f, float(share), gradient);
    }
    guard.finished(all);
}

ponder_train_record BackboneTrainer::step(std::span<const ponder_stream> streams,
                                          const CallGuard &guard) {
    const Gpt2Config &config = working_.config();
    check_streams(streams, config.vocabulary);
    const int64_t tokens = int64_t(streams[0].count) - 1;
    for (size_t s = 0; s < streams.size(); ++s)
        if (int64_t(streams[s].count) != tokens + 1 || tokens < 1 || tokens > config.context)
            throw_error(PONDER_E_ARGUMENT,
                        "streams[%zu]: %zu tokens; all windows have the same length, 2..%d", s,
                        streams[s].count, int(config.context) + 1);
    const uint64_t start = now_ns();
    const Peers::Share mine = peers_.share(streams.size());
    ponder_train_record own = empty_record(), r = empty_record();
    peers_.together(steps(), guard, [&] { differentiate(streams, mine, own, guard); });
    for (const ponder_train_record &part : peers_.gather<ponder_train_record>({&own, 1}, guard)) {
        r.loss += part.loss;
        r.flops += part.flops;
    }
    outer_->sum_gradient(peers_, guard);
    const Outer::Taken taken = outer_->step();
    if (taken.finite)
        spread();
    else
        r.flags |= PONDER_TRAIN_NOT_FINITE;
    r.step = outer_->steps();
    r.tokens = uint64_t(tokens) * streams.size();
    r.gradient_norm = taken.norm;
    r.learning_rate = taken.rate;
    r.ns = now_ns() - start;
    r.tokens_per_second = double(r.tokens) * 1e9 / double(std::max<uint64_t>(r.ns, 1));
    return r;
}

void BackboneTrainer::export_to(const std::string &folder) const {
    const DType type = working_.type();
    std::vector<std::vector<bf16>> narrow; // vectors, which passes keep in f32
    std::vector<Gpt2Tensor> tensors;
    const std::vector<float> values = outer_->read_average();
    for (const Weight &w : weights_) {
        const float *from = values.data() + w.offset;
        const void *data = from;
        if (type == DType::bf16) {
            std::vector<bf16> &to = narrow.emplace_back(size_t(w.shape.count()));
            std::transform(from, from + to.size(), to.begin(), to_bf16);
            data = to.data();
        }
        tensors.push_back({w.name, {w.shape.dim, w.shape.dim + w.shape.rank}, data});
    }
    write_gpt2(folder, working_.config(), type, tensors,
               model_->tokenizer() ? model_->tokenizer()->end_of_text() : -1);
}

void BackboneTrainer::write(SafeTensorsWriter &writer) const { outer_->write(writer); }

void BackboneTrainer::read(const SafeTensors &file) {
    outer_->read(file);
    spread();
}

} // namespace ponder
