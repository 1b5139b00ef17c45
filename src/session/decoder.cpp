#include "session/decoder.hpp"

#include <algorithm>

namespace ponder {

namespace {

// Tokens of a pass over one stream. Tokens that only fill it up are written behind the others,
// where later ones take their place.
constexpr int64_t pieces[] = {256, 64, 16, 1};
constexpr int64_t largest_piece = pieces[0];

// How many of the tokens left the next pass takes: two full passes rather than one that is mostly
// empty.
int64_t next_piece(int64_t left) {
    return left > 64 && left <= 128 ? 64 : std::min(left, largest_piece);
}

// Inputs of a pass lie in one block: ids, positions, rows before, each padded to 64 bytes.
size_t aligned(size_t count) { return (count + 15) / 16 * 16; }

} // namespace

class Decoder::Undo {
public:
    explicit Undo(Decoder &decoder, size_t first, size_t count)
        : decoder_(decoder), first_(first), count_(count) {}
    ~Undo() {
        for (size_t i = first_; armed_ && i < first_ + count_; ++i)
            decoder_.clear(i);
    }
    void disarm() { armed_ = false; }

private:
    Decoder &decoder_;
    size_t first_, count_;
    bool armed_ = true;
};

// In elements, but for bytes of what is of the model's type.
struct Decoder::Sizes {
    size_t cache, residual = 0, piece = 0, hidden, last, logits, inputs, out = 0, taps = 0;
    size_t rows = 0, before = 0; // of a stream's layer
    size_t fast = 0;

    Sizes(const Gpt2 &model, const Adapter &adapter, size_t streams, const Form &form) {
        const Gpt2Config &config = model.config();
        const size_t act = size_of(model.type()), width = size_t(config.width);
        const size_t context = size_t(form.context), most = size_t(largest_piece);
        const int64_t lowest = adapter.lowest_stale_layer(config.layers);
        cache = size_t(config.layers) * 2 * streams * context * width * act;
        if (lowest > 0 && lowest < config.layers) {
            residual = streams * context * width;
            piece = most * width;
        }
        hidden = std::max(most, streams) * width * (form.with_layer ? sizeof(float) : act);
        last = streams * width * act;
        logits = streams * size_t(config.vocabulary);
        inputs = 2 * aligned(std::max(most, streams)) + streams;
        if (!form.with_layer)
            return;
        const size_t longest = std::max(most, size_t(adapter.mini_batch()));
        out = longest * width * act;
        taps = rows = longest * width;
        before = size_t(adapter.taps()) * width;
        fast = adapter.fast_count();
    }
};

uint64_t Decoder::memory(const Gpt2 &model, const Adapter &adapter, size_t streams,
                         const Form &form) {
    const Sizes s(model, adapter, streams, form);
    // A block of Memory is aligned and has a header.
    const auto block = [](size_t bytes) { return bytes ? (bytes + 63) / 64 * 64 + 64 : 0; };
    const auto floats = [&](size_t count) { return block(count * sizeof(float)); };
    uint64_t all = block(s.cache) + floats(s.residual) + floats(s.piece) + block(s.hidden) +
                   block(s.last) + floats(s.logits) + floats(s.inputs) + block(s.out) +
                   floats(s.taps);
    if (form.with_layer)
        all += streams *
               (floats(s.rows) + 2 * floats(std::max<size_t>(s.before, 1)) + 2 * floats(s.fast));
    else if (streams > 1)
        all += floats(streams * adapter.fast_count());
    const auto arena = [](const Graph &graph) {
        return plan_arena(graph, schedule(graph, {graph.calls().size()})).bytes;
    };
    size_t passes = 0;
    int64_t tokens = largest_piece;
    for (const int64_t piece : pieces)
        if (piece >= std::min(form.context, largest_piece))
            tokens = piece;
    for (const DecodeShape &shape :
         {DecodeShape{1, tokens, form.context, 0, false},
          DecodeShape{int64_t(streams), 1, form.context, 0, !form.with_layer}}) {
        Graph g(model.type());
        record_decode(g, model, adapter, form.with_layer, shape);
        passes = std::max(passes, arena(g));
    }
    if (form.with_layer) {
        const int64_t batch = adapter.mini_batch();
        const bool many = form.chunk >= largest_piece && largest_piece % batch == 0;
        Graph g(model.type());
        record_layer(g, model, adapter, {many ? largest_piece : batch, false});
        passes = std::max(passes, arena(g));
    }
    return all + block(passes);
}

Decoder::Decoder(std::shared_ptr<const Model> model, std::shared_ptr<const Adapted> adapted,
                 size_t streams, const Form &form)
    : model_(std::move(model)), adapted_(std::move(adapted)),
      passes_(adapted_->decode_passes(form.with_layer)), form_(form), slots_(streams) {
    const Gpt2 &backbone = model_->backbone();
    const Gpt2Config &config = backbone.config();
    const Adapter &adapter = adapted_->adapter();
    const std::shared_ptr<const Device> &device = model_->device();
    width_ = config.width, layers_ = config.layers, heads_ = config.heads;
    lowest_ = adapter.lowest_stale_layer(layers_);
    act_size_ = size_of(backbone.type());
    hidden_size_ = form_.with_layer ? sizeof(float) : act_size_;
    const Sizes sizes(backbone, adapter, streams, form_);
    cache_ = DeviceBuffer(device, sizes.cache);
    if (sizes.residual > 0) {
        residual_ = DeviceVector<float>(device, sizes.residual);
        piece_ = DeviceVector<float>(device, sizes.piece);
    }
    hidden_ = DeviceBuffer(device, sizes.hidden);
    last_ = DeviceBuffer(device, sizes.last);
    logits_ = DeviceVector<float>(device, sizes.logits);
    inputs_ = DeviceVector<int32_t>(device, sizes.inputs);
    if (form_.with_layer) {
        out_ = DeviceBuffer(device, sizes.out);
        taps_ = DeviceVector<float>(device, sizes.taps);
    }
}

void Decoder::clear(size_t slot) { slots_[slot] = {}; }

std::byte *Decoder::cache(size_t layer, size_t part, size_t slot) const {
    const size_t each = size_t(form_.context * width_) * act_size_;
    return cache_.data() + ((layer * 2 + part) * slots_.size() + slot) * each;
}

void Decoder::leave(size_t slot) {
    std::lock_guard lock(leaving_);
    clear(slot);
    ++gone_;
}

void Decoder::shrink() {
    std::lock_guard lock(leaving_);
    if (2 * gone_ <= slots_.size())
        return;
    for (size_t i = 0; i < slots_.size(); ++i)
        clear(i);
    for (DeviceBuffer *const buffer : {&cache_, &last_, &hidden_, &out_, &arena_, &workspace_})
        *buffer = DeviceBuffer();
    for (DeviceVector<float> *const floats : {&residual_, &piece_, &logits_, &stacked_, &taps_})
        *floats = DeviceVector<float>();
}

void Decoder::take(size_t slot, Decoder &from, size_t from_slot) {
    std::lock_guard lock(from.leaving_);
    const Device &device = *model_->device();
    const Slot &there = from.slots_[from_slot];
    const size_t head = size_t(form_.context * (width_ / heads_)) * act_size_;
    const size_t used = size_t(there.cached() * (width_ / heads_)) * act_size_;
    for (size_t layer = 0; used > 0 && layer < size_t(layers_); ++layer)
        for (size_t part = 0; part < 2; ++part)
            for (size_t h = 0; h < size_t(heads_); ++h)
                device.copy(cache(layer, part, slot) + h * head,
                            from.cache(layer, part, from_slot) + h * head, used);
    const size_t rows = size_t(form_.context * width_);
    if (residual_.size() > 0 && used > 0)
        residual_.copy(from.residual_.data() + from_slot * rows, size_t(there.cached() * width_),
                       slot * rows);
    const size_t row = size_t(width_) * act_size_;
    if (there.has_hidden)
        device.copy(last_.data() + slot * row, from.last_.data() + from_slot * row, row);
    if (there.has_logits)
        device.copy(logits_of(slot), from.logits_of(from_slot),
                    logits_.size() / slots_.size() * sizeof(float));
    slots_[slot] = std::move(from.slots_[from_slot]);
    from.clear(from_slot);
    ++from.gone_;
}

size_t Decoder::read(size_t index, std::span<const int32_t> text, const Weights &weights,
                     bool keep_stale, const CallGuard &guard) {
    Slot &slot = slots_[index];
    Undo undo(*this, index, 1);
    const bool stale = slot.version != weights.version;
    const size_t same =
        size_t(std::mismatch(slot.ids.begin(), slot.ids.end(), text.begin(), text.end()).first -
               slot.ids.begin());
    size_t reused = 0;
    if (form_.with_layer) {
        // Its state cannot go back: the cached tokens are taken as they are or not at all.
        if (stale || same < slot.ids.size())
            clear(index);
        reused = slot.ids.size();
    } else {
        // The window as if token after token had been read.
        const size_t context = size_t(form_.context), turn = context - context / 2;
        const size_t start =
            text.size() <= context ? 0 : (text.size() - context + turn - 1) / turn * turn;
        const bool whole =
            same == text.size() && same == slot.ids.size() && (slot.has_hidden || slot.has_logits);
        size_t cached = 0;
        if (slot.start == start && same > start)
            cached = std::min(same, whole && !stale ? text.size() : text.size() - 1) - start;
        if (stale && !keep_stale && lowest_ == 0)
            cached = 0;
        slot.start = start;
        slot.ids.assign(text.begin(), text.begin() + std::ptrdiff_t(start + cached));
        if (stale && !keep_stale && lowest_ < layers_)
            for (size_t at = 0; at < cached; at += size_t(largest_piece)) {
                const size_t n = std::min(cached - at, size_t(largest_piece));
                run_rows(index, std::span(slot.ids).subspan(start + at, n), int64_t(at), lowest_,
                         false, weights, guard);
            }
        reused = cached;
        if (stale && keep_stale && cached > 0 && lowest_ < layers_)
            slot.version = 0;
        else
            slot.version = weights.version;
    }
    if (!slot.layer && form_.with_layer) {
        const std::shared_ptr<const Device> &device = model_->device();
        const Adapter &adapter = adapted_->adapter();
        const Sizes sizes(model_->backbone(), adapter, slots_.size(), form_);
        slot.layer = std::make_unique<Layer>();
        slot.layer->fast = FastState(device, sizes.fast, 0);
        slot.layer->next = FastState(device, sizes.fast, 0);
        slot.layer->fast.all().copy(weights.fast->weights(), sizes.fast);
        slot.layer->rows = DeviceVector<float>(device, sizes.rows);
        slot.layer->before = DeviceVector<float>(device, sizes.before);
        slot.layer->next_before = DeviceVector<float>(device, sizes.before);
        slot.version = weights.version;
    }
    append(slot, index, text.subspan(slot.ids.size()), weights, guard);
    undo.disarm();
    return reused;
}

void Decoder::append(Slot &slot, size_t index, std::span<const int32_t> ids, const Weights &weights,
                     const CallGuard &guard) {
    const Device &device = *model_->device();
    const size_t row = size_t(width_) * act_size_;
    while (!ids.empty()) {
        if (slot.cached() == form_.context)
            refill(slot, index, weights, guard);
        const int64_t room = form_.context - slot.cached();
        const size_t n = size_t(next_piece(std::min(int64_t(ids.size()), room)));
        // Several streams' logits are one product afterwards.
        const bool logits = !slot.layer && ids.size() == 1 && slots_.size() == 1;
        run_rows(index, ids.first(n), slot.cached(), 0, logits, weights, guard);
        if (slot.layer) {
            advance_layer(slot, index, int64_t(n), hidden_.data(), weights, guard);
        } else {
            if (!logits)
                device.copy(last_.data() + index * row, hidden_.data() + (n - 1) * row, row);
            slot.has_logits = logits, slot.has_hidden = !logits;
        }
        slot.ids.insert(slot.ids.end(), ids.begin(), ids.begin() + std::ptrdiff_t(n));
        ids = ids.subspan(n);
    }
}

void Decoder::refill(Slot &slot, size_t index, const Weights &weights, const CallGuard &guard) {
    slot.start += size_t(form_.context - form_.context / 2);
    const std::span<const int32_t> kept = std::span(slot.ids).subspan(slot.start);
    for (size_t at = 0; at < kept.size();) {
        const size_t n = size_t(next_piece(int64_t(kept.size() - at)));
        run_rows(index, kept.subspan(at, n), int64_t(at), 0, false, weights, guard);
        at += n;
    }
}

void Decoder::set_inputs(std::span<const int32_t> ids, std::span<const int32_t> at,
                         std::span<const int32_t> first) {
    const size_t next = aligned(ids.size());
    host_inputs_.resize(2 * next + first.size());
    std::copy(ids.begin(), ids.end(), host_inputs_.begin());
    std::copy(at.begin(), at.end(), host_inputs_.begin() + std::ptrdiff_t(next));
    std::copy(first.begin(), first.end(), host_inputs_.begin() + std::ptrdiff_t(2 * next));
    inputs_.write(host_inputs_.data(), host_inputs_.size());
}

float *Decoder::logits_of(size_t slot) const {
    return logits_.data() + logits_.size() / slots_.size() * slot;
}

Program::Bindings Decoder::bind(const DecodePass &pass, size_t first_slot, const float *fast,
                                size_t fast_streams) const {
    Program::Bindings bindings(pass.program->graph().values().size());
    const auto at = [&](Id id, const void *address) {
        if (id != none)
            bindings[size_t(id)] = const_cast<void *>(address);
    };
    const std::vector<FastTensor> &tensors = adapted_->adapter().fast_tensors();
    for (size_t i = 0; fast && i < tensors.size(); ++i)
        at(Adapter::fast_id(i), fast + tensors[i].offset * fast_streams);
    const size_t next = aligned(size_t(pass.shape.streams * pass.shape.tokens));
    at(pass.ids, inputs_.data());
    at(pass.at, inputs_.data() + next);
    at(pass.first, inputs_.data() + 2 * next);
    at(pass.residual, piece_.data());
    for (const Id kept : {pass.kept, pass.kept_new})
        at(kept, residual_.data() + first_slot * size_t(form_.context * width_));
    at(pass.hidden, hidden_.data());
    at(pass.logits, logits_of(first_slot));
    for (size_t layer = 0; layer < size_t(layers_); ++layer) {
        at(pass.k[layer], cache(layer, 0, first_slot));
        at(pass.v[layer], cache(layer, 1, first_slot));
        at(pass.k_new[layer], cache(layer, 0, first_slot));
        at(pass.v_new[layer], cache(layer, 1, first_slot));
    }
    return bindings;
}

void Decoder::run(const Program &program, const Program::Bindings &bindings,
                  const CallGuard &guard) {
    const std::shared_ptr<const Device> &device = model_->device();
    const auto fit = [&](DeviceBuffer &buffer, size_t bytes) {
        if (bytes <= buffer.size())
            return;
        buffer = DeviceBuffer();
        buffer = DeviceBuffer(device, bytes);
    };
    fit(arena_, program.arena_bytes());
    fit(workspace_, program.workspace_bytes() * (form_.alone ? 1 : device->workers()));
    const auto method = form_.alone ? &Program::run_serial : &Program::run;
    (program.*method)(0, bindings, arena_.data(), workspace_.data(), [&] { guard.check(); });
}

void Decoder::run_rows(size_t index, std::span<const int32_t> ids, int64_t first,
                       int64_t from_layer, bool logits, const Weights &weights,
                       const CallGuard &guard) {
    const int64_t n = int64_t(ids.size());
    int64_t tokens = largest_piece;
    for (const int64_t piece : pieces)
        if (piece >= n)
            tokens = piece;
    const DecodePass &pass = passes_.decode({1, tokens, form_.context, from_layer, logits});
    int32_t padded[largest_piece] = {}, at[largest_piece];
    std::copy(ids.begin(), ids.end(), padded);
    const int64_t positions = model_->backbone().config().context;
    for (int64_t t = 0; t < tokens; ++t)
        at[t] = int32_t(std::min(first + t, positions - 1));
    const int32_t rows_before = int32_t(first);
    set_inputs({padded, size_t(tokens)}, {at, size_t(tokens)}, {&rows_before, 1});
    if (from_layer > 0)
        piece_.copy(residual_.data() + (int64_t(index) * form_.context + first) * width_,
                    size_t(n * width_));
    run(*pass.program, bind(pass, index, weights.fast ? weights.fast->weights() : nullptr, 1),
        guard);
}

// All streams' fast weights, tensor by tensor, so that one product does for all.
const float *Decoder::stack(std::span<const Weights> weights) {
    const Adapter &adapter = adapted_->adapter();
    const size_t streams = slots_.size(), count = adapter.fast_count();
    if (lowest_ == layers_)
        return weights[0].fast ? weights[0].fast->weights() : nullptr; // no pass reads them
    if (stacked_.size() == 0) {
        stacked_ = DeviceVector<float>(model_->device(), streams * count);
        stacked_of_.assign(streams, {});
    }
    for (size_t s = 0; s < streams; ++s) {
        if (stacked_of_[s].version == weights[s].version)
            continue;
        for (const FastTensor &tensor : adapter.fast_tensors())
            stacked_.copy(weights[s].fast->weights() + tensor.offset, tensor.count(),
                          tensor.offset * streams + s * tensor.count());
        stacked_of_[s] = weights[s];
    }
    return stacked_.data();
}

void Decoder::step(std::span<const int32_t> ids, std::span<const Weights> weights,
                   const CallGuard &guard) {
    const size_t streams = slots_.size();
    Undo undo(*this, 0, streams);
    if (streams == 1) {
        append(slots_[0], 0, ids, weights[0], guard);
        return undo.disarm();
    }
    const int64_t positions = model_->backbone().config().context;
    std::vector<int32_t> tokens(streams), at(streams), first(streams);
    for (size_t s = 0; s < streams; ++s) {
        Slot &slot = slots_[s];
        if (ids[s] >= 0 && slot.cached() == form_.context)
            refill(slot, s, weights[s], guard);
        tokens[s] = std::max(ids[s], 0); // one that waits writes behind its rows
        first[s] = int32_t(slot.cached());
        at[s] = int32_t(std::min<int64_t>(first[s], positions - 1));
    }
    set_inputs(tokens, at, first);
    const bool logits = !form_.with_layer;
    const DecodePass &pass = passes_.decode({int64_t(streams), 1, form_.context, 0, logits});
    run(*pass.program, bind(pass, 0, stack(weights), streams), guard);
    const size_t row = size_t(width_) * hidden_size_;
    for (size_t s = 0; s < streams; ++s) {
        Slot &slot = slots_[s];
        if (logits) // of no use where a stream waits
            slot.has_logits = ids[s] >= 0, slot.has_hidden = false;
        else if (ids[s] >= 0)
            advance_layer(slot, s, 1, hidden_.data() + s * row, weights[s], guard);
        if (ids[s] >= 0)
            slot.ids.push_back(ids[s]);
    }
    undo.disarm();
}

// The open mini-batch is run as a whole: its result for the last row is what the dual form gives a
// query that sees the keys so far. Complete, it becomes the state of the next one.
void Decoder::advance_layer(Slot &slot, size_t index, int64_t rows, const std::byte *hidden,
                            const Weights &weights, const CallGuard &guard) {
    Layer &layer = *slot.layer;
    const Device &device = *model_->device();
    const Adapter &adapter = adapted_->adapter();
    const int64_t batch = adapter.mini_batch(), taps = adapter.taps();
    const size_t row = size_t(width_) * sizeof(float);
    const bool logits = rows == 1 && slots_.size() == 1;
    for (int64_t done = 0; done < rows;) {
        const int64_t left = std::min(rows - done, form_.chunk - layer.in_chunk);
        const bool many = layer.open == 0 && left >= largest_piece && largest_piece % batch == 0;
        const int64_t n = many ? largest_piece : std::min(left, batch - layer.open);
        device.copy(layer.rows.data() + layer.open * width_, hidden + size_t(done) * row,
                    size_t(n) * row);
        const int64_t all = layer.open + n;
        const LayerPass &pass = passes_.layer({all, logits});
        Program::Bindings bindings(pass.program->graph().values().size());
        const auto at = [&](Id id, void *address) {
            if (id != none)
                bindings[size_t(id)] = address;
        };
        const std::vector<FastTensor> &tensors = adapter.fast_tensors();
        for (size_t i = 0; i < tensors.size(); ++i) {
            at(Adapter::fast_id(i), layer.fast.weights() + tensors[i].offset);
            at(pass.state[i], layer.next.weights() + tensors[i].offset);
        }
        at(pass.hidden, layer.rows.data());
        at(pass.before, layer.before.data());
        at(pass.taps, taps_.data());
        at(pass.out, out_.data());
        at(pass.logits, logits_of(index));
        run(*pass.program, bindings, guard);
        layer.open = all;
        layer.in_chunk += n;
        done += n;
        if (done == rows && !logits) {
            const size_t bytes = size_t(width_) * act_size_;
            device.copy(last_.data() + index * bytes, out_.data() + size_t(all - 1) * bytes, bytes);
        }
        const bool ends = layer.in_chunk == form_.chunk;
        if (all % batch != 0 && !ends)
            continue;
        layer.fast.swap(layer.next);
        const int64_t old = std::max<int64_t>(taps - all, 0); // rows of `before` that stay in it
        if (taps > 0) {
            if (old > 0)
                layer.next_before.copy(layer.before.data() + (taps - old) * width_,
                                       size_t(old * width_));
            layer.next_before.copy(taps_.data() + (all - (taps - old)) * width_,
                                   size_t((taps - old) * width_), size_t(old * width_));
            layer.before.swap(layer.next_before);
        }
        layer.open = 0;
        if (!ends)
            continue;
        layer.in_chunk = 0;
        layer.before.clear();
        if (!form_.carry)
            layer.fast.all().copy(weights.fast->weights(), adapter.fast_count());
    }
    slot.has_logits = logits, slot.has_hidden = !logits;
}

// Of the hidden states in last_.
void Decoder::run_head(size_t first_slot, size_t count, const CallGuard &guard) {
    const HeadPass &pass = passes_.head(int64_t(count));
    Program::Bindings bindings(pass.program->graph().values().size());
    bindings[size_t(pass.hidden)] = last_.data() + first_slot * size_t(width_) * act_size_;
    bindings[size_t(pass.logits)] = logits_of(first_slot);
    run(*pass.program, bindings, guard);
    for (size_t s = first_slot; s < first_slot + count; ++s)
        slots_[s].has_logits = true;
}

std::span<const float> Decoder::logits(const CallGuard &guard) {
    const size_t streams = slots_.size();
    const auto count = [&](bool Slot::*what) {
        return size_t(std::count_if(slots_.begin(), slots_.end(),
                                    [&](const Slot &slot) { return slot.*what; }));
    };
    if (count(&Slot::has_logits) < streams && count(&Slot::has_hidden) == streams)
        run_head(0, streams, guard);
    else
        for (size_t s = 0; s < streams; ++s)
            if (slots_[s].has_hidden && !slots_[s].has_logits)
                run_head(s, 1, guard);
    if (model_->device()->on_host())
        return {logits_.data(), logits_.size()};
    host_logits_.resize(logits_.size());
    logits_.read(host_logits_.data(), host_logits_.size());
    return host_logits_;
}

} // namespace ponder
