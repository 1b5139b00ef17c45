// SIGINT: the running call of the current session is cancelled, the command reports what it
// has and exits with 130. A second SIGINT ends the process at once.
#pragma once

#include <ponder/ponder.h>

namespace tool {

void catch_interrupts();
bool interrupted();

// While it lives, SIGINT cancels this session.
class CancelOnInterrupt {
public:
    explicit CancelOnInterrupt(const ponder_session *session);
    ~CancelOnInterrupt();
    CancelOnInterrupt(const CancelOnInterrupt &) = delete;
};

} // namespace tool
