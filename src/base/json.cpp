#include "base/json.hpp"

#include "base/error.hpp"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstring>
#include <iterator>

namespace ponder::json {

namespace {

// Reads the text and leaves its position where the event handler can see it: nlohmann's events
// carry no offsets.
class Cursor {
public:
    using iterator_category = std::forward_iterator_tag;
    using value_type = char;
    using difference_type = std::ptrdiff_t;
    using pointer = const char *;
    using reference = const char &;

    Cursor(const char *at, const char **seen) : at_(at), seen_(seen) {}
    reference operator*() const { return *at_; }
    Cursor &operator++() {
        *seen_ = ++at_;
        return *this;
    }
    Cursor operator++(int) {
        Cursor before = *this;
        ++*this;
        return before;
    }
    bool operator==(const Cursor &other) const { return at_ == other.at_; }
    bool operator!=(const Cursor &other) const { return at_ != other.at_; }

private:
    const char *at_;
    const char **seen_;
};

// Builds the tree from events, without recursion: `open_` holds the arrays and objects that have
// not ended. A parent's vector does not grow while one of its children is open, so the pointers
// stay valid.
class Builder {
public:
    using Json = nlohmann::json;

    Builder(std::string_view text, const std::string &file, const Limits &limits)
        : text_(text), file_(file), limits_(limits), seen_(text.data()) {}

    Value run() {
        Cursor first(text_.data(), &seen_), last(text_.data() + text_.size(), &seen_);
        Json::sax_parse(first, last, this);
        return std::move(root_);
    }

    bool null() {
        add(Type::null);
        return true;
    }
    bool boolean(bool value) {
        add(Type::boolean).boolean = value;
        return true;
    }
    bool number_integer(int64_t value) {
        Value &node = add(Type::integer);
        node.integer = value;
        node.number = double(value);
        return true;
    }
    bool number_unsigned(uint64_t value) {
        if (value <= uint64_t(INT64_MAX))
            return number_integer(int64_t(value));
        add(Type::number).number = double(value);
        return true;
    }
    bool number_float(double value, const std::string &) {
        add(Type::number).number = value;
        return true;
    }
    bool string(std::string &value) {
        add(Type::string).string = std::move(value);
        return true;
    }
    bool binary(Json::binary_t &) { return false; } // JSON text has none
    bool start_object(size_t) { return start(Type::object); }
    bool start_array(size_t) { return start(Type::array); }
    bool key(std::string &name) {
        open_.back()->members.emplace_back(std::move(name), Value());
        return true;
    }
    bool end_object() {
        check_unique(open_.back()->members);
        open_.pop_back();
        return true;
    }
    bool end_array() {
        open_.pop_back();
        return true;
    }
    bool parse_error(size_t, const std::string &, const nlohmann::detail::exception &error) {
        // "[json.exception.parse_error.101] parse error at line 1, column 2: what was wrong"
        const char *reason = std::strstr(error.what(), "] ");
        reason = reason ? reason + 2 : error.what();
        if (const char *colon = std::strstr(reason, ": "))
            reason = colon + 2;
        std::string text(reason); // repeats bytes of the file
        std::replace_if(
            text.begin(), text.end(), [](char c) { return c < ' ' || c > '~'; }, '?');
        throw_error(PONDER_E_FORMAT, "%s: bad JSON at offset %zu: %.160s", file_.c_str(), offset(),
                    text.c_str());
    }

private:
    size_t offset() const { return limits_.offset + size_t(seen_ - text_.data()); }

    Value &add(Type type) {
        if (++values_ > limits_.values)
            throw_error(PONDER_E_FORMAT, "%s: more than %zu JSON values at offset %zu",
                        file_.c_str(), limits_.values, offset());
        Value *node = &root_;
        if (!open_.empty()) {
            Value &parent = *open_.back();
            if (parent.type == Type::object)
                node = &parent.members.back().second;
            else
                node = &parent.items.emplace_back();
        }
        node->type = type;
        node->offset = offset();
        // The end of a number is known one character later.
        if ((type == Type::integer || type == Type::number) && (seen_[-1] < '0' || seen_[-1] > '9'))
            --node->offset;
        return *node;
    }

    bool start(Type type) {
        if (open_.size() >= size_t(limits_.depth))
            throw_error(PONDER_E_FORMAT, "%s: JSON deeper than %d at offset %zu", file_.c_str(),
                        limits_.depth, offset());
        Value &node = add(type);
        --node.offset;
        open_.push_back(&node);
        return true;
    }

    void check_unique(const std::vector<std::pair<std::string, Value>> &members) {
        names_.clear();
        for (const auto &member : members)
            names_.push_back(member.first);
        std::sort(names_.begin(), names_.end());
        auto twice = std::adjacent_find(names_.begin(), names_.end());
        if (twice != names_.end())
            throw_error(PONDER_E_FORMAT,
                        "%s: duplicate key %s in the JSON object that ends at offset %zu",
                        file_.c_str(), shown(*twice).c_str(), offset());
    }

    std::string_view text_;
    const std::string &file_;
    Limits limits_;
    const char *seen_;
    size_t values_ = 0;
    Value root_;
    std::vector<Value *> open_;
    std::vector<std::string_view> names_;
};

} // namespace

const Value *Value::find(std::string_view key) const {
    for (const auto &member : members)
        if (member.first == key)
            return &member.second;
    return nullptr;
}

Value parse(std::string_view text, const std::string &file, const Limits &limits) {
    if (text.size() > limits.bytes)
        throw_error(PONDER_E_FORMAT, "%s: JSON of %zu bytes at offset %zu, at most %zu allowed",
                    file.c_str(), text.size(), limits.offset, limits.bytes);
    // nlohmann skips a byte order mark and takes NUL for the end of the text.
    if (text.starts_with("\xef\xbb\xbf"))
        throw_error(PONDER_E_FORMAT, "%s: byte order mark before the JSON at offset %zu",
                    file.c_str(), limits.offset);
    size_t nul = text.find('\0');
    if (nul != text.npos)
        throw_error(PONDER_E_FORMAT, "%s: NUL byte in the JSON at offset %zu", file.c_str(),
                    limits.offset + nul);
    return Builder(text, file, limits).run();
}

std::string quote(std::string_view text) {
    return nlohmann::json(text).dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

std::string shown(std::string_view name) {
    constexpr size_t limit = 80;
    return quote(name.substr(0, limit)) + (name.size() > limit ? "..." : "");
}

std::string number(double value) {
    if (!std::isfinite(value))
        return "null";
    char digits[40];
    auto end = std::to_chars(digits, digits + sizeof digits, value).ptr;
    return std::string(digits, end);
}

std::string text(const Value &value, int depth) {
    const std::string inner(size_t(depth + 1) * 2, ' '), outer(size_t(depth) * 2, ' ');
    switch (value.type) {
    case Type::null:
        return "null";
    case Type::boolean:
        return value.boolean ? "true" : "false";
    case Type::integer:
        return std::to_string(value.integer);
    case Type::number:
        return number(value.number);
    case Type::string:
        return quote(value.string);
    case Type::array: {
        std::string line = "[";
        for (const Value &item : value.items)
            line += (line.size() > 1 ? ", " : "") + text(item, depth);
        return line + "]";
    }
    case Type::object:
        break;
    }
    if (value.members.empty())
        return "{}";
    std::string lines = "{";
    for (const auto &[name, member] : value.members) {
        lines += lines.size() > 1 ? ",\n" : "\n";
        lines += inner + quote(name) + ": " + text(member, depth + 1);
    }
    return lines + "\n" + outer + "}";
}

} // namespace ponder::json
