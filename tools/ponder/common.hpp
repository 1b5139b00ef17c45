// The C ABI as C++ values: handles that destroy themselves, errors that carry an exit code.
#pragma once

#include "exit_codes.hpp"

#include <ponder/ponder.h>

#include <memory>
#include <stdexcept>
#include <string>

namespace tool {

// Ends the command: main prints the message to stderr and exits with the code.
struct Failure : std::runtime_error {
    Failure(ExitCode exit_code, const std::string &message)
        : std::runtime_error(message), code(exit_code) {}
    ExitCode code;
};

struct Destroy {
    void operator()(ponder_runtime *p) const { ponder_runtime_destroy(p); }
    void operator()(ponder_options *p) const { ponder_options_destroy(p); }
    void operator()(ponder_session *p) const { ponder_session_destroy(p); }
    void operator()(const ponder_model *p) const { ponder_model_release(p); }
    void operator()(ponder_trainer *p) const { ponder_trainer_destroy(p); }
};
using Runtime = std::unique_ptr<ponder_runtime, Destroy>;
using Options = std::unique_ptr<ponder_options, Destroy>;
using Session = std::unique_ptr<ponder_session, Destroy>;
using Trainer = std::unique_ptr<ponder_trainer, Destroy>;
using Model = std::unique_ptr<const ponder_model, Destroy>;

inline ExitCode exit_code_of(ponder_status status) {
    switch (status) {
    case PONDER_OK:
        return exit_ok;
    case PONDER_E_ARGUMENT:
        return exit_usage;
    case PONDER_E_NOT_FOUND:
    case PONDER_E_IO:
    case PONDER_E_FORMAT:
    case PONDER_E_UNSUPPORTED:
    case PONDER_E_MISMATCH:
        return exit_file;
    case PONDER_E_NO_MEMORY:
        return exit_memory;
    case PONDER_E_BACKEND:
        return exit_backend;
    case PONDER_E_CANCELLED:
        return exit_interrupted;
    default:
        return exit_failure;
    }
}

inline void check(ponder_status status, const ponder_error &error) {
    if (status == PONDER_OK)
        return;
    const std::string message = error.message[0] ? error.message : ponder_status_name(status);
    throw Failure(exit_code_of(status), message);
}

// call(ponder_model_get, model, &info): any function whose last argument is the error.
template <class Function, class... Arguments> void call(Function function, Arguments... arguments) {
    ponder_error error{};
    error.struct_size = sizeof error;
    check(function(arguments..., &error), error);
}

// A struct of the ABI, zeroed, with its size set.
template <class Struct> Struct sized() {
    Struct value{};
    value.struct_size = sizeof value;
    return value;
}

inline ponder_model_info info_of(const ponder_model *model) {
    auto info = sized<ponder_model_info>();
    call(ponder_model_get, model, &info);
    return info;
}

inline ponder_session_info info_of(const ponder_session *session) {
    auto info = sized<ponder_session_info>();
    call(ponder_session_get, session, &info);
    return info;
}

inline std::string value_of(const ponder_options *options, const char *name) {
    const char *value = nullptr;
    call(ponder_options_value, options, name, &value);
    return value;
}

// Of an integer option. Its text may be any that the option table accepts for one, such as 1e3.
inline uint64_t number_of(const ponder_options *options, const char *name) {
    return uint64_t(std::stod(value_of(options, name)));
}

} // namespace tool
