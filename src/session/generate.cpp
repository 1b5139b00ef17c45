// Several streams of one model generate together: one pass over the weights for a token of each.
#include "session/generate.hpp"

#include "base/error.hpp"
#include "session/decoder.hpp"
#include "session/text_pieces.hpp"

#include <algorithm>
#include <limits>

namespace ponder {

namespace {

// One stream of the call.
struct Writer {
    Writer(const Generation &wish, size_t vocabulary)
        : wish(wish), sampler(wish.sampling, vocabulary), pieces(wish.stop_strings) {
        for (const int32_t id : wish.prompt)
            sampler.saw(id);
    }
    const Generation &wish;
    Sampler sampler;
    TextPieces pieces;
    uint64_t tokens = 0;
    bool done = false;
};

// Takes the next token of a stream, `id`; -1: it has ended.
int32_t write(Writer &w, int32_t id, std::span<const float> logits, const Tokenizer *tokenizer,
              std::vector<int32_t> &text, ponder_generation_result &result) {
    const auto end = [&](int32_t reason, int32_t what) {
        w.done = true;
        result.reason = reason;
        result.stopped_by = what;
        const std::string rest = w.pieces.finish();
        if (!rest.empty() && w.wish.token)
            w.wish.token(w.tokens, -1, std::numeric_limits<double>::quiet_NaN(), rest);
        return -1;
    };
    if (std::find(w.wish.stop_tokens.begin(), w.wish.stop_tokens.end(), id) !=
        w.wish.stop_tokens.end())
        return end(PONDER_STOP_TOKEN, id);
    const std::string piece =
        tokenizer && id < tokenizer->size() ? w.pieces.add(tokenizer->bytes(id)) : std::string();
    const double log_p = w.wish.log_probabilities ? log_probability(logits, id)
                                                  : std::numeric_limits<double>::quiet_NaN();
    text.push_back(id);
    w.sampler.saw(id);
    const bool stop = w.wish.token && w.wish.token(w.tokens, id, log_p, piece);
    result.tokens = ++w.tokens;
    if (w.pieces.stopped() >= 0)
        return end(PONDER_STOP_STRING, w.pieces.stopped());
    if (stop) {
        w.pieces.finish(); // the caller wants no more
        return end(PONDER_STOP_CALLBACK, -1);
    }
    if (w.tokens == w.wish.max_tokens)
        return end(PONDER_STOP_LENGTH, -1);
    return id;
}

} // namespace

// Puts the sessions' streams side by side. A decoder of exactly these sessions is used again.
void Session::gather(std::span<Session *const> sessions) {
    Session &first = *sessions[0];
    bool together = first.decoder_ && first.decoder_->streams() == sessions.size();
    for (size_t i = 0; i < sessions.size(); ++i)
        together =
            together && sessions[i]->decoder_ == first.decoder_ && sessions[i]->decoder_slot_ == i;
    if (together)
        return;
    const Decoder::Form form{first.context_, first.chunk_, first.inside_ && !first.policy_->never(),
                             first.carry_, first.alone_};
    auto decoder = std::make_shared<Decoder>(first.model_, first.adapted_, sessions.size(), form);
    std::vector<std::shared_ptr<Decoder>> before;
    for (size_t i = 0; i < sessions.size(); ++i) {
        Session &s = *sessions[i];
        if (s.decoder_) {
            decoder->take(i, *s.decoder_, s.decoder_slot_);
            before.push_back(std::move(s.decoder_));
        }
        s.decoder_ = decoder;
        s.decoder_slot_ = i;
    }
    for (const auto &group : before)
        group->shrink();
}

void Session::generate(std::span<Session *const> sessions, std::span<const Generation> wishes,
                       std::span<ponder_generation_result> results,
                       std::span<const CallGuard> guards) {
    const Session &first = *sessions[0];
    for (size_t i = 1; i < sessions.size(); ++i)
        if (sessions[i]->adapted_ != first.adapted_ || sessions[i]->context_ != first.context_ ||
            sessions[i]->chunk_ != first.chunk_ || sessions[i]->carry_ != first.carry_ ||
            sessions[i]->policy_->never() != first.policy_->never())
            throw_error(PONDER_E_ARGUMENT,
                        "sessions[%zu] has other options of adapter, chunk, context or policy", i);
    gather(sessions);
    const size_t streams = sessions.size();
    Decoder &decoder = *first.decoder_;
    const size_t vocabulary = size_t(first.model_->backbone().config().vocabulary);
    const Tokenizer *tokenizer = first.model_->tokenizer();

    std::vector<Writer> writers;
    std::vector<Decoder::Weights> weights;
    uint64_t total = 0;
    for (size_t i = 0; i < streams; ++i) {
        writers.emplace_back(wishes[i], vocabulary);
        const Session &s = *sessions[i];
        weights.push_back(
            {s.adapted_->adapter().fast_count() > 0 ? &s.current_ : nullptr, s.weights_version_});
        total += wishes[i].max_tokens;
    }
    for (size_t i = 0; i < streams; ++i) {
        const uint64_t start = now_ns();
        results[i].prompt_tokens = wishes[i].prompt.size();
        results[i].cached_tokens =
            decoder.read(i, wishes[i].prompt, weights[i], wishes[i].keep_cache, guards[i]);
        first.model_->device()->synchronize(); // for an honest time
        sessions[i]->text_ = wishes[i].prompt;
        results[i].prefill_ns = now_ns() - start;
    }
    const uint64_t start = now_ns();
    std::vector<int32_t> ids(streams);
    for (uint64_t done = 0;;) {
        const std::span<const float> logits = decoder.logits(guards[0]);
        const auto of_stream = [&](size_t i) { return logits.subspan(i * vocabulary, vocabulary); };
        // Each stream's sampler reads a whole vocabulary: by all threads.
        const auto draw = [&](uint32_t i, uint32_t = 0) {
            ids[i] = -1;
            if (!writers[i].done && largest(of_stream(i)).finite)
                ids[i] = writers[i].sampler.next(of_stream(i), writers[i].tokens);
        };
        if (streams == 1 || first.alone_)
            for (uint32_t i = 0; i < streams; ++i)
                draw(i);
        else
            first.model_->device()->threads().run_throwing(uint32_t(streams), draw);
        bool more = false;
        for (size_t i = 0; i < streams; ++i) {
            if (writers[i].done)
                continue;
            if (ids[i] < 0)
                throw_error(PONDER_E_STATE, "the model's logits are not finite");
            ids[i] =
                write(writers[i], ids[i], of_stream(i), tokenizer, sessions[i]->text_, results[i]);
            results[i].decode_ns = now_ns() - start;
            done += 1;
            more = more || ids[i] >= 0;
        }
        if (!more)
            return;
        for (const CallGuard &guard : guards)
            guard.check();
        guards[0].progress(done, total);
        decoder.step(ids, weights, guards[0]);
    }
}

// Tokens of the text that was generated last become part of the stream.
void Session::accept_text(uint64_t first, uint64_t count) {
    if (first > text_.size() || count > text_.size() - first)
        throw_error(PONDER_E_ARGUMENT, "tokens %llu .. %llu of a text of %zu",
                    static_cast<unsigned long long>(first),
                    static_cast<unsigned long long>(first + count), text_.size());
    feed(std::span<const int32_t>(text_).subspan(size_t(first), size_t(count)));
}

} // namespace ponder
