#include "json_out.hpp"

#include "text.hpp"

#include <charconv>
#include <cmath>
#include <cstdio>

namespace tool {

JsonWriter &JsonWriter::open(char bracket, bool inline_) {
    separate();
    const bool inside_line = !levels_.empty() && levels_.back().inline_;
    levels_.push_back({bracket == '{' ? '}' : ']', inline_ || inside_line});
    text_ += bracket;
    return *this;
}

JsonWriter &JsonWriter::end() {
    const Level level = levels_.back();
    levels_.pop_back();
    if (!level.empty && !level.inline_)
        new_line();
    text_ += level.close;
    return *this;
}

void JsonWriter::new_line() {
    text_ += '\n';
    text_.append(2 * levels_.size(), ' ');
}

void JsonWriter::separate() {
    if (after_key_) {
        after_key_ = false;
        return;
    }
    if (levels_.empty())
        return;
    Level &level = levels_.back();
    if (!level.empty)
        text_ += level.inline_ ? ", " : ",";
    if (!level.inline_)
        new_line();
    level.empty = false;
}

JsonWriter &JsonWriter::key(std::string_view name) {
    separate();
    quote(name);
    text_ += ": ";
    after_key_ = true;
    return *this;
}

JsonWriter &JsonWriter::value(double number) {
    separate();
    if (!std::isfinite(number)) {
        text_ += "null";
        return *this;
    }
    char digits[32];
    const auto result = std::to_chars(digits, digits + sizeof digits, number);
    text_.append(digits, result.ptr);
    return *this;
}

JsonWriter &JsonWriter::value(uint64_t number) {
    separate();
    text_ += std::to_string(number);
    return *this;
}

JsonWriter &JsonWriter::value(int64_t number) {
    separate();
    text_ += std::to_string(number);
    return *this;
}

JsonWriter &JsonWriter::value(bool flag) {
    separate();
    text_ += flag ? "true" : "false";
    return *this;
}

JsonWriter &JsonWriter::value(std::string_view text) {
    separate();
    quote(text);
    return *this;
}

void JsonWriter::quote(std::string_view text) {
    text_ += '"';
    for (const char c : valid_utf8(text)) {
        if (c == '"' || c == '\\')
            text_ += {'\\', c};
        else if (c == '\n')
            text_ += "\\n";
        else if (c == '\t')
            text_ += "\\t";
        else if (static_cast<unsigned char>(c) < 0x20)
            text_ += format("\\u%04x", unsigned(c));
        else
            text_ += c;
    }
    text_ += '"';
}

void JsonWriter::print() const {
    std::fwrite(text_.data(), 1, text_.size(), stdout);
    std::fputc('\n', stdout);
}

} // namespace tool
