// One stream: score a chunk, decide, learn, record. Nothing in a score depends on a later token.
#pragma once

#include "base/options.hpp"
#include "formats/safetensors.hpp"
#include "policy/budget.hpp"
#include "policy/policy.hpp"
#include "session/call_guard.hpp"
#include "session/fast_state.hpp"
#include "session/model.hpp"

#include <atomic>
#include <deque>

namespace ponder {

class Decoder;
struct Generation;

class Session {
public:
    Session(std::shared_ptr<const Model> model, const Options &options);
    ~Session();
    // Decides by this gate from now on, at its calibration's target, as if the option `policy` were
    // `adapter` and the gate stored.
    void use_gate(std::shared_ptr<const Gate> gate);
    // Passes run on the calling thread from now on, for callers that run many sessions at once;
    // forks do as well.
    void run_alone() {
        alone_ = true;
        if (rule_)
            rule_->run_alone();
    }
    std::unique_ptr<Session> fork() const;
    void reset();

    const Model &model() const { return *model_; }
    const Options &options() const { return options_; }
    void expect(uint64_t chunks);
    void feed(std::span<const int32_t> ids);

    bool score(const CallGuard &guard); // false: no full chunk waits
    // steps < 0: the policy decides.
    void learn(int32_t steps, const CallGuard &guard);
    void adapt(const CallGuard &guard);
    // PONDER_E_STATE: the policy needs a length that nobody has told; these steps are none that it
    // allows.
    void require_length() const;
    void require_steps(int32_t forced) const;
    void flush(const CallGuard &guard);

    bool has_open() const { return open_; }
    // What the open chunk would be worth: for each number of steps on it and none later, the mean
    // loss of the next `horizon` waiting chunks, and the chunk's own after the steps if wanted.
    // Layers that learn inside are decided on before a chunk: the first of the waiting chunks runs
    // with the layer (any steps) or without. Not causal; the session stays as it is.
    struct After {
        double later, own;
    };
    std::vector<After> losses_after(std::span<const int32_t> steps, uint64_t horizon, bool own,
                                    const CallGuard &guard) const;
    uint64_t chunks_waiting() const { return waiting_.size() / uint64_t(chunk_); }
    // The policy's features of the stream so far; empty for policies that do not observe.
    std::vector<double> features() const;
    std::span<const float> losses() const;
    const std::deque<ponder_record> &records() const { return records_; }
    ponder_session_info info() const;
    std::vector<CallTime> profile(Segment segment, uint32_t repeat, const CallGuard &guard);
    void cancel() const { cancel_.store(true, std::memory_order_relaxed); }
    std::atomic<bool> &cancel_flag() const { return cancel_; }

    // generate.cpp. The stream stays as it is. Sessions of one adapter and equal form.
    static void generate(std::span<Session *const> sessions, std::span<const Generation> wishes,
                         std::span<ponder_generation_result> results,
                         std::span<const CallGuard> guards);
    void accept_text(uint64_t first, uint64_t count);

    // snapshot.cpp
    std::vector<std::byte> save() const;
    void load(const SafeTensors &file);
    void load(std::span<const std::byte> snapshot, const std::string &name) {
        load(SafeTensors::view(snapshot, name));
    }

private:
    static constexpr size_t most_waiting = size_t(1) << 24;
    // Elements until the next part of a buffer starts, so that each is aligned.
    static size_t padded(int64_t count) { return (size_t(count) + 15) / 16 * 16; }

    Session(std::shared_ptr<const Model> model, const Options &options,
            std::shared_ptr<const Adapted> adapted, std::shared_ptr<const Gate> gate);
    std::unique_ptr<Policy> new_policy() const;
    PassShape shape(int64_t tokens, int64_t scored, bool inside) const;
    void observe();
    int32_t look_ahead(ponder_record &record, const CallGuard &guard);
    void apply_scale();
    int64_t context_tokens(int64_t scored) const;
    void reserve(const Pass &pass);
    void score_chunk(int64_t tokens, const CallGuard &guard);
    void open_next(int64_t tokens); // the next ones, with their context, as a pass's inputs
    void upload_inputs();
    void take(int64_t tokens); // from what waits
    // Forward; the losses go to `nll`, which is nll_ for the score that counts.
    void run_score(const FastState &weights, std::vector<float> &nll, const CallGuard &guard);
    void run_backward(const FastState &weights, const CallGuard &guard);
    void run_segment(Segment segment, const Program::Bindings &bindings, const CallGuard &guard);
    void ensure_tape(const CallGuard &guard);
    Program::Bindings bindings(const Pass &pass, const FastState &weights);
    double mean(const std::vector<float> &per_token) const; // over the open chunk's predictions
    bool records_gradients() const;
    int32_t decide(int32_t forced, ponder_record &record);
    class Undo;
    class Ahead;
    class ChunkWork;
    void learn_between(int32_t steps, ponder_record &record, const CallGuard &guard);
    void learn_inside(ponder_record &record);
    bool accept(double update_norm) const;
    ponder_record new_record(int64_t tokens) const;
    void append(const ponder_record &record);
    void finish(ponder_record &record);
    static void gather(std::span<Session *const> sessions);
    void forget_text(); // what was generated, and its caches
    void leave_group();

    // ---- fixed at creation
    std::shared_ptr<const Model> model_;
    Options options_;
    std::shared_ptr<const Adapted> adapted_;
    std::shared_ptr<const Gate> gate_; // of policy `adapter`
    bool inside_ = false;              // the adapter learns inside the pass
    int64_t chunk_, context_, steps_;
    double guard_norm_;
    bool carry_, loss_after_, analysis_;
    bool alone_ = false; // passes use no other thread
    size_t ring_;

    // ---- buffers
    // In the device's memory:
    DeviceBuffer arena_, workspace_;
    DeviceVector<float> gradient_;
    FastState current_, shadow_;
    std::array<DeviceBuffer, 3> watched_; // what a gate reads
    DeviceBuffer picked_;                 // rows of it
    DeviceVector<float> learned_;         // rates, what is kept, initial values; see LearnedRates
    DeviceVector<int32_t> inputs_;        // of the pass: tokens, targets
    DeviceVector<float> outputs_;         // losses, entropies, reconstruction losses
    // In the host's:
    std::array<std::vector<std::byte>, 3> seen_; // of watched_, where it cannot be read directly
    std::vector<float> initial_;
    std::vector<int32_t> ids_;   // tokens and targets, as in inputs_
    std::vector<float> results_; // as in outputs_
    std::vector<float> nll_, entropy_, later_nll_;
    float reconstruction_[3] = {};
    std::unique_ptr<UpdateRule> rule_;
    std::unique_ptr<Ahead> ahead_; // where chunks can be queued ahead

    // ---- state of the stream
    std::vector<int32_t> history_; // scored tokens that may serve as context
    std::deque<int32_t> waiting_;
    std::unique_ptr<Policy> policy_;
    Random random_;
    Budget budget_;
    Signals signals_;
    uint64_t expected_ = 0, chunks_ = 0, fed_ = 0, scored_tokens_ = 0;
    uint64_t updated_ = 0, steps_taken_ = 0; // in the stream
    uint64_t optimizer_steps_ = 0;           // inner steps since the moments began
    std::deque<ponder_record> records_;
    bool open_ = false;             // a scored chunk waits for learn
    bool ran_inside_ = false;       // it ran with the adapter's layer
    double scale_ = 1;              // on its update
    std::vector<int32_t> open_ids_; // the pass's tokens, to run it again after a restore
    int64_t open_tokens_ = 0;       // scored ones among them

    // ---- of the open chunk, not part of snapshots
    std::shared_ptr<const Pass> open_pass_;
    bool tape_ = false; // the arena holds the activations of the open chunk
    bool gradient_ready_ = false;
    mutable std::atomic<bool> cancel_{false};

    // ---- for generating, not part of snapshots
    uint64_t weights_version_ = 1;     // rises when the fast weights change
    std::shared_ptr<Decoder> decoder_; // shared by sessions that generated together
    size_t decoder_slot_ = 0;
    std::vector<int32_t> text_; // prompt and what was generated
};

} // namespace ponder
