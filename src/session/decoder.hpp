// Streams that generate: their tokens so far, with keys and values in the device's memory, and the
// open mini-batch of a layer that learns inside the pass. Nothing of a session's stream is touched.
//
// The caches hold a window of at most `context` tokens from position 0 on. When it is full, its
// last half is read again from position 0: positions are learned, so shifted keys would be worth
// nothing. A layer after the backbone reads each token once, in chunks and mini-batches as in a
// score.
#pragma once

#include "session/decode_pass.hpp"
#include "session/session.hpp"

#include <mutex>

namespace ponder {

class Decoder {
public:
    struct Form {
        int64_t context, chunk;
        bool with_layer; // the adapter's layer takes part
        bool carry;      // its weights go on from chunk to chunk
        bool alone;      // on the calling thread
    };
    // What it allocates for its streams, without their passes' workspace.
    static uint64_t memory(const Gpt2 &model, const Adapter &adapter, size_t streams,
                           const Form &form);
    // The fast weights of a stream now; each change has a version of its own, 0 is none.
    struct Weights {
        const FastState *fast;
        uint64_t version;
    };

    Decoder(std::shared_ptr<const Model> model, std::shared_ptr<const Adapted> adapted,
            size_t streams, const Form &form);

    size_t streams() const { return slots_.size(); }
    // What slot `slot` of `from` holds; its stream has left that one then.
    void take(size_t slot, Decoder &from, size_t from_slot);
    void leave(size_t slot);
    // Those that are left of a group do not keep its memory: when they are fewer than half of it,
    // their caches go too, and what they read is computed again. Like leaving, from any thread.
    void shrink();

    // Makes `text` what the stream has read, computing what is not cached. Where fast weights have
    // changed since, what depends on them is computed again, or kept if keep_stale. Returns the
    // number of tokens that were cached.
    size_t read(size_t slot, std::span<const int32_t> text, const Weights &weights, bool keep_stale,
                const CallGuard &guard);
    // One more token of each stream; -1: none of this one.
    void step(std::span<const int32_t> ids, std::span<const Weights> weights,
              const CallGuard &guard);
    // Of the next token of each stream, [S, V]; valid until the next call.
    std::span<const float> logits(const CallGuard &guard);

private:
    // The layer's state: fast weights at the start of the open mini-batch, and its rows.
    struct Layer {
        FastState fast, next;
        DeviceVector<float> rows;                // [max(M, piece), C] hidden states
        DeviceVector<float> before, next_before; // [taps, C]
        int64_t open = 0;                        // rows
        int64_t in_chunk = 0;                    // tokens of the chunk so far
    };
    struct Slot {
        std::vector<int32_t> ids; // all tokens read; the caches hold those from `start` on
        size_t start = 0;
        bool has_hidden = false, has_logits = false; // last_, logits_ are the last token's
        uint64_t version = 0; // of the weights that made all of it; 0: of several
        std::unique_ptr<Layer> layer;
        int64_t cached() const { return int64_t(ids.size() - start); }
    };
    struct Sizes; // of its buffers
    class Undo;   // clears the slots of a call that fails

    void clear(size_t slot);

    void append(Slot &slot, size_t index, std::span<const int32_t> ids, const Weights &weights,
                const CallGuard &guard);
    void refill(Slot &slot, size_t index, const Weights &weights, const CallGuard &guard);
    // Tokens of one stream into rows first.. ; hidden states stay in hidden_, or a single token's
    // logits in logits_. from_layer > 0: their residual streams are there.
    void run_rows(size_t index, std::span<const int32_t> ids, int64_t first, int64_t from_layer,
                  bool logits, const Weights &weights, const CallGuard &guard);
    void advance_layer(Slot &slot, size_t index, int64_t rows, const std::byte *hidden,
                       const Weights &weights, const CallGuard &guard);
    void run_head(size_t first_slot, size_t count, const CallGuard &guard);
    Program::Bindings bind(const DecodePass &pass, size_t first_slot, const float *fast,
                           size_t fast_streams) const;
    void run(const Program &program, const Program::Bindings &bindings, const CallGuard &guard);
    std::byte *cache(size_t layer, size_t part, size_t slot) const;
    const float *stack(std::span<const Weights> weights);
    void set_inputs(std::span<const int32_t> ids, std::span<const int32_t> at,
                    std::span<const int32_t> first);
    float *logits_of(size_t slot) const;

    std::shared_ptr<const Model> model_;
    std::shared_ptr<const Adapted> adapted_;
    const DecodePasses &passes_;
    Form form_;
    int64_t width_, layers_, heads_, lowest_;
    size_t act_size_, hidden_size_; // bytes of an element
    std::vector<Slot> slots_;
    std::mutex leaving_; // sessions of several threads may leave at once
    size_t gone_ = 0;    // streams that have left

    DeviceBuffer cache_;           // [L, 2, S, H, N, D]
    DeviceVector<float> residual_; // [S, N, C] at the lowest layer with fast weights
    DeviceVector<float> piece_;    // [rows of a pass, C] of it, to begin there
    DeviceBuffer hidden_;          // [rows of a pass, C]
    DeviceBuffer last_;            // [S, C]: of each stream's last token
    DeviceVector<float> logits_;   // [S, V]: the same
    DeviceVector<int32_t> inputs_; // of a pass: ids, positions, rows before
    std::vector<int32_t> host_inputs_;
    DeviceVector<float> stacked_; // fast weights of all streams, tensor by tensor
    std::vector<Weights> stacked_of_;
    DeviceBuffer out_; // [rows, C] of the layer
    DeviceVector<float> taps_;
    DeviceBuffer arena_, workspace_;
    std::vector<float> host_logits_;
};

} // namespace ponder
