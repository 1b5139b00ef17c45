// The boundary: handles are checked, exceptions become statuses. The only place with catch.
#pragma once

#include "base/error.hpp"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <new>

namespace ponder::api {

// Objects behind handles start with a word that tells their kind; it is wiped on destruction.
template <uint32_t Kind> struct Tagged {
    uint32_t kind = Kind;
    ~Tagged() { *const_cast<volatile uint32_t *>(&kind) = 0; }
    static bool is(const void *object) {
        uint32_t word;
        std::memcpy(&word, object, sizeof word);
        return word == Kind;
    }
};

template <class Handle> Handle &check(Handle *handle, const char *argument) {
    if (!handle)
        throw_error(PONDER_E_ARGUMENT, "%s is NULL", argument);
    if (reinterpret_cast<uintptr_t>(handle) % alignof(uint32_t) != 0 || !Handle::is(handle))
        throw_error(PONDER_E_ARGUMENT, "%s is no live handle of its kind", argument);
    return *handle;
}

template <class T> T &require(T *pointer, const char *argument) {
    if (!pointer)
        throw_error(PONDER_E_ARGUMENT, "%s is NULL", argument);
    return *pointer;
}

// A caller's struct as ours: the missing tail of a smaller one is zero, the unknown tail of a
// larger one must be.
template <class T> T read_struct(const T *given, const char *name) {
    T ours{};
    ours.struct_size = sizeof ours;
    if (!given)
        return ours;
    const uint32_t size = given->struct_size;
    if (size < 2 * sizeof(uint32_t) || size > 65536)
        throw_error(PONDER_E_ARGUMENT, "%s.struct_size = %u", name, size);
    const auto *bytes = reinterpret_cast<const unsigned char *>(given);
    for (size_t i = sizeof(T); i < size; ++i)
        if (bytes[i] != 0)
            throw_error(PONDER_E_UNSUPPORTED,
                        "%s: this version does not know the field at offset %zu", name, i);
    std::memcpy(&ours, given, size < sizeof(T) ? size : sizeof(T));
    ours.struct_size = sizeof ours;
    return ours;
}

// Ours into a caller's struct, never past its size.
template <class T> void check_out(const T *out, const char *name) {
    require(out, name);
    if (out->struct_size < 2 * sizeof(uint32_t) || out->struct_size > 65536)
        throw_error(PONDER_E_ARGUMENT, "%s->struct_size = %u", name, out->struct_size);
}
template <class T> void write_struct(T *out, T ours) {
    const uint32_t size = out->struct_size;
    ours.struct_size = size;
    std::memcpy(out, &ours, size < sizeof(T) ? size : sizeof(T));
}

inline void report(ponder_error *error, ponder_status status, const char *message) {
    if (!error || error->struct_size < offsetof(ponder_error, message) + 2)
        return;
    error->code = status;
    const size_t room =
        std::min<size_t>(error->struct_size, sizeof *error) - offsetof(ponder_error, message);
    std::snprintf(error->message, room, "%s", message);
}

template <class F> ponder_status guard(ponder_error *error, F &&function) noexcept {
    try {
        function();
        report(error, PONDER_OK, "");
        return PONDER_OK;
    } catch (const Error &e) {
        report(error, e.status(), e.what());
        return e.status();
    } catch (const std::bad_alloc &) {
        report(error, PONDER_E_NO_MEMORY, "out of memory");
        return PONDER_E_NO_MEMORY;
    } catch (const std::exception &e) {
        report(error, PONDER_E_INTERNAL, e.what());
        return PONDER_E_INTERNAL;
    } catch (...) {
        report(error, PONDER_E_INTERNAL, "unknown exception");
        return PONDER_E_INTERNAL;
    }
}

} // namespace ponder::api
