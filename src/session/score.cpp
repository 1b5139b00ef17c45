// A chunk is scored with the weights of now, and shown to the policy.
#include "session/undo.hpp"

#include "base/error.hpp"

#include <algorithm>
#include <cstring>
#include <limits>

namespace ponder {

// Whole earlier chunks that fit before `scored` tokens.
int64_t Session::context_tokens(int64_t scored) const {
    const int64_t chunks =
        std::min((context_ - scored) / chunk_, int64_t(history_.size()) / chunk_);
    return chunks * chunk_;
}

bool Session::score(const CallGuard &guard) {
    if (open_)
        throw_error(PONDER_E_STATE, "the last scored chunk has not been learned");
    if (int64_t(waiting_.size()) < chunk_)
        return false;
    score_chunk(chunk_, guard);
    return true;
}

void Session::open_next(int64_t tokens) {
    const size_t context = size_t(context_tokens(tokens));
    open_ids_.assign(history_.end() - std::ptrdiff_t(context), history_.end());
    open_ids_.insert(open_ids_.end(), waiting_.begin(), waiting_.begin() + tokens);
    open_tokens_ = tokens;
}

void Session::take(int64_t tokens) {
    history_.insert(history_.end(), waiting_.begin(), waiting_.begin() + tokens);
    waiting_.erase(waiting_.begin(), waiting_.begin() + tokens);
    const size_t keep = size_t(context_);
    if (history_.size() > 2 * keep)
        history_.erase(history_.begin(), history_.end() - std::ptrdiff_t(keep));
    scored_tokens_ += uint64_t(tokens);
    chunks_ += 1;
}

// Of the chunk that comes next; nothing of it is known.
ponder_record Session::new_record(int64_t tokens) const {
    ponder_record record{};
    const double unknown = std::numeric_limits<double>::quiet_NaN();
    record.struct_size = sizeof record;
    record.flags = PONDER_RECORD_SCORED_ONLY;
    record.chunk = chunks_;
    record.first_token = scored_tokens_;
    record.tokens = uint32_t(tokens);
    record.predictions = uint32_t(tokens - 1);
    record.loss_after = record.reconstruction = record.gradient_norm = record.update_norm =
        record.gate_score = record.gate_threshold = unknown;
    return record;
}

void Session::append(const ponder_record &record) {
    records_.push_back(record);
    if (records_.size() > ring_)
        records_.pop_front();
}

void Session::score_chunk(int64_t tokens, const CallGuard &guard) {
    const uint64_t start = now_ns();
    Undo undo(*this);
    open_next(tokens);
    ponder_record record = new_record(tokens);

    ran_inside_ = tape_ = false;
    if (inside_ && !analysis_) {
        // The layer changes this chunk's own scores: decide on earlier chunks only.
        const uint64_t before = now_ns();
        record.steps_wanted = decide(-1, record);
        record.decide_ns = now_ns() - before;
        ran_inside_ = record.steps > 0;
    } else if (inside_) {
        ran_inside_ = true; // look first, decide then
        record.flags |= PONDER_RECORD_NOT_CAUSAL;
    }
    ensure_tape(guard);
    record.flops = open_pass_->program->flops(score_segment);
    if (policy_->observes()) {
        const uint64_t before = now_ns();
        observe();
        record.decide_ns += now_ns() - before;
    }
    if (inside_ && analysis_) {
        signals_.loss = mean(nll_);
        signals_.entropy = mean(entropy_);
        signals_.reconstruction = reconstruction_[1];
        record.steps_wanted = decide(-1, record);
        if (record.steps == 0) {
            ran_inside_ = tape_ = false;
            ensure_tape(guard);
            record.flops += open_pass_->program->flops(score_segment);
        }
    }
    record.loss_before = mean(nll_);
    record.entropy = mean(entropy_);
    if (ran_inside_)
        record.reconstruction = reconstruction_[1];
    record.bytes = arena_.size() + workspace_.size();
    signals_.loss = record.loss_before;
    signals_.entropy = record.entropy;
    if (ran_inside_)
        signals_.reconstruction = record.reconstruction;

    // Only now is the chunk taken from the stream: a cancelled pass leaves everything as it was.
    undo.disarm();
    take(tokens);
    open_ = true;
    record.score_ns = now_ns() - start - record.decide_ns;
    append(record);
}

// Shows the policy the open chunk; its pass has just run.
void Session::observe() {
    const Recording &r = open_pass_->recording;
    const Gpt2Config &config = model_->backbone().config();
    const Graph &graph = open_pass_->program->graph();
    const Device &device = *model_->device();
    const auto view = [&](size_t i) -> MatrixView {
        const Id id = r.watched()[i];
        if (id == none)
            return {};
        const Shape &shape = graph.shape(id);
        const size_t columns = size_t(shape[shape.rank - 1]);
        const size_t rows = size_t(shape.count()) / columns, row = graph.value(id).bytes() / rows;
        const std::byte *data = watched_[i].data();
        if (device.on_host())
            return {data, graph.value(id).type, rows, columns};
        std::byte *const to = seen_[i].data();
        if (id != r.probabilities) {
            device.download(to, data, rows * row);
        } else {
            // Those that are read, side by side in one transfer, then each to its place from the
            // last on: none lies before where it came to.
            const std::vector<size_t> chosen = policy_->probability_rows(rows);
            for (size_t k = 0; k < chosen.size(); ++k)
                device.copy(picked_.data() + k * row, data + chosen[k] * row, row);
            device.download(to, picked_.data(), chosen.size() * row);
            for (size_t k = chosen.size(); k-- > 0;)
                std::memmove(to + chosen[k] * row, to + k * row, row);
        }
        return {to, graph.value(id).type, rows, columns};
    };
    Observation o;
    const size_t predictions = size_t(open_tokens_) - 1;
    o.nll = {nll_.data(), predictions};
    o.entropy = {entropy_.data(), predictions};
    o.ids = std::span(open_ids_).last(size_t(open_tokens_));
    o.vocabulary = config.vocabulary;
    o.hidden = view(0);
    o.qkv = view(1);
    o.heads = config.heads;
    o.probabilities = view(2);
    policy_->observe(o);
}

std::vector<double> Session::features() const {
    return policy_->features({chunks_ - open_, expected_, signals_, budget_.left()});
}

} // namespace ponder
