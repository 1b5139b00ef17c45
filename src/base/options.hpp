// The option table: every hyperparameter once, with type, default, range and doc. The C API, the
// tool's flags and its help come from it.
#pragma once

#include "ponder/ponder.h"

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace ponder {

std::span<const ponder_option_info> option_table();

// Values by name; unset ones are defaults. Texts are kept as given, numbers are checked when set.
class Options {
public:
    // PONDER_E_ARGUMENT naming the option and what it accepts.
    void set(std::string_view name, std::string_view value);
    // As set, but the option does not count as given: a value from an adapter's folder.
    void set_default(std::string_view name, std::string_view value);
    bool given(std::string_view name) const; // by set
    const std::string &text(std::string_view name) const;
    double number(std::string_view name) const;
    int64_t integer(std::string_view name) const;
    bool boolean(std::string_view name) const { return integer(name) != 0; }
    // Names and values of those that change what is computed; numbers as short as they can be.
    std::vector<std::pair<std::string, std::string>> computed_by() const;
    std::string hash() const; // of these, for snapshots

    Options();

private:
    std::vector<std::string> values_; // in the table's order
    std::vector<bool> given_;
};

} // namespace ponder
