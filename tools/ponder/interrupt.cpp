#include "interrupt.hpp"

#include <atomic>
#include <csignal>

namespace tool {

namespace {

std::atomic<const ponder_session *> current{nullptr};
std::atomic<bool> flag{false};
static_assert(std::atomic<const ponder_session *>::is_always_lock_free &&
              std::atomic<bool>::is_always_lock_free);

void on_interrupt(int) {
    flag.store(true);
    if (const ponder_session *session = current.load())
        ponder_session_cancel(session);
}

} // namespace

void catch_interrupts() {
    struct sigaction action {};
    action.sa_handler = on_interrupt;
    action.sa_flags = int(SA_RESETHAND); // the second one kills
    sigaction(SIGINT, &action, nullptr);
    std::signal(SIGXFSZ, SIG_IGN); // a file at its size limit is an error like a full disk
}

bool interrupted() { return flag.load(); }

CancelOnInterrupt::CancelOnInterrupt(const ponder_session *session) { current.store(session); }
CancelOnInterrupt::~CancelOnInterrupt() { current.store(nullptr); }

} // namespace tool
