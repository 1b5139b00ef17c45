// One chunk of a session at a time, timed, with its record.
#pragma once

#include "common.hpp"
#include "totals.hpp"

#include <chrono>
#include <optional>
#include <span>
#include <vector>

namespace tool {

class Stepper {
public:
    explicit Stepper(ponder_session *session) : session_(session) {}

    // Adaptive forward of exactly one full chunk. Nothing: SIGINT came first.
    std::optional<ponder_record> chunk(std::span<const int32_t> ids) {
        return timed([&](ponder_error *error) {
            return ponder_session_adapt(session_, ids.data(), ids.size(), nullptr, error);
        });
    }
    // The same in two calls: everything at first, then chunk by chunk.
    void feed(std::span<const int32_t> ids) {
        call(ponder_session_feed, session_, ids.data(), ids.size());
    }
    std::optional<ponder_record> fed() {
        return timed([&](ponder_error *error) {
            const ponder_status scored = ponder_score(&session_, 1, nullptr, nullptr, error);
            return scored != PONDER_OK ? scored
                                       : ponder_learn(&session_, 1, nullptr, nullptr, error);
        });
    }
    // The stream's end: fewer tokens than a chunk. Nothing also if there are fewer than two.
    std::optional<ponder_record> last(std::span<const int32_t> ids) {
        if (ids.size() < 2)
            return std::nullopt;
        call(ponder_session_feed, session_, ids.data(), ids.size());
        return timed(
            [&](ponder_error *error) { return ponder_session_flush(session_, nullptr, error); });
    }
    // Appends a loss for every token of the chunk; its first token has none (NaN).
    void append_losses(const ponder_record &record, std::vector<float> &to) const {
        size_t count = 0;
        const size_t before = to.size();
        to.resize(before + record.tokens, NAN);
        call(ponder_session_losses, session_, to.data() + before + 1, size_t(record.predictions),
             &count);
    }
    // For a new stream in the same session.
    void restart(uint64_t expected_chunks) {
        call(ponder_session_reset, session_);
        call(ponder_session_expect, session_, expected_chunks);
        next_ = 0;
    }
    const Totals &totals() const { return totals_; }

private:
    template <class Call> std::optional<ponder_record> timed(Call function) {
        using Clock = std::chrono::steady_clock;
        ponder_error error{};
        error.struct_size = sizeof error;
        const auto start = Clock::now();
        const ponder_status status = function(&error);
        auto record = sized<ponder_record>();
        size_t count = 0;
        if (status == PONDER_OK)
            call(ponder_session_records, session_, next_, &record, size_t(1), &count);
        const auto ns = std::chrono::nanoseconds(Clock::now() - start).count();
        if (status == PONDER_E_CANCELLED)
            return std::nullopt;
        check(status, error);
        if (count != 1)
            throw Failure(exit_failure, "the session gave no record for its chunk");
        ++next_;
        totals_.add(record, uint64_t(ns));
        return record;
    }

    ponder_session *session_;
    uint64_t next_ = 0;
    Totals totals_;
};

} // namespace tool
