// JSON values. The only file that includes nlohmann/json is json.cpp.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace ponder::json {

enum class Type { null, boolean, integer, number, string, array, object };

// A parsed value. Objects keep the order of the text; keys are unique (checked).
class Value {
public:
    Type type = Type::null;
    bool boolean = false;
    int64_t integer = 0; // exact when type is integer
    double number = 0;   // set for integer and number
    size_t offset = 0;   // in the file, for messages: where its text ends; of [ and { the start
    std::string string;
    std::vector<Value> items;                           // array
    std::vector<std::pair<std::string, Value>> members; // object

    // The member of that name, or nullptr. Linear for small objects; use members for large ones.
    const Value *find(std::string_view key) const;
};

struct Limits {
    size_t bytes = 64u << 20; // of text
    int depth = 32;
    size_t values = 8u << 20; // nodes in all, members and items counted
    size_t offset = 0;        // of the text in its file, added to the offsets in messages
};

// Parses a whole text as UTF-8 JSON. Throws Error(PONDER_E_FORMAT) that names `file`, the
// byte offset and what was wrong: syntax, duplicate key, depth, size, non-finite number.
Value parse(std::string_view text, const std::string &file, const Limits &limits = {});

// A value as indented text.
std::string text(const Value &value, int depth = 0);
// A string as a JSON literal with quotes; bytes that are no UTF-8 become U+FFFD.
std::string quote(std::string_view text);
// A name out of a file for a one-line message: quoted, cut after 80 bytes.
std::string shown(std::string_view name);
// A number with the fewest digits that read back the same; NaN and infinities become null.
std::string number(double value);

} // namespace ponder::json
