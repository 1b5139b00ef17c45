// Errors inside the library: one exception type that carries a status and a message.
// Only src/api catches.
#pragma once

#include "ponder/ponder.h"

#include <cstdarg>
#include <cstdio>
#include <exception>
#include <string>

namespace ponder {

class Error : public std::exception {
public:
    Error(ponder_status status, std::string message)
        : status_(status), message_(std::move(message)) {}
    ponder_status status() const noexcept { return status_; }
    const char *what() const noexcept override { return message_.c_str(); }

private:
    ponder_status status_;
    std::string message_;
};

// throw_error(PONDER_E_FORMAT, "%s: header at offset %zu ...", ...)
[[noreturn, gnu::format(printf, 2, 3)]] inline void throw_error(ponder_status status,
                                                                const char *format, ...) {
    char text[480];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    throw Error(status, text);
}

} // namespace ponder
