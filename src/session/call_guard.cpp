#include "session/call_guard.hpp"

#include "base/error.hpp"

#include <chrono>

namespace ponder {

uint64_t now_ns() {
    return uint64_t(
        std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count());
}

CallGuard::CallGuard(std::atomic<bool> &cancel, const ponder_call *call)
    : cancel_(cancel), call_(call) {
    if (const uint64_t now = now_ns(); call && call->timeout_ns)
        deadline_ns_ = call->timeout_ns < UINT64_MAX - now ? now + call->timeout_ns : UINT64_MAX;
    cancel_.store(false, std::memory_order_relaxed);
}

void CallGuard::check() const {
    if (cancel_.load(std::memory_order_relaxed))
        throw_error(PONDER_E_CANCELLED, "cancelled");
    if (deadline_ns_ && now_ns() > deadline_ns_)
        throw_error(PONDER_E_DEADLINE, "deadline passed after %llu ns",
                    static_cast<unsigned long long>(call_->timeout_ns));
}

bool CallGuard::stops(uint64_t done, uint64_t total) const {
    return call_ && call_->progress && std::this_thread::get_id() == caller_ &&
           call_->progress(call_->user_data, done, total);
}

void CallGuard::progress(uint64_t done, uint64_t total) const {
    if (stops(done, total))
        throw_error(PONDER_E_CANCELLED, "cancelled by the progress callback");
}

void CallGuard::finished(uint64_t total) const { stops(total, total); }

} // namespace ponder
