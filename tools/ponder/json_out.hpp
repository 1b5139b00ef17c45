// Writes one JSON value, indented; the rows of tables stand on one line each.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace tool {

class JsonWriter {
public:
    // inline_ = true: everything inside stays on one line.
    JsonWriter &object(bool inline_ = false) { return open('{', inline_); }
    JsonWriter &array(bool inline_ = false) { return open('[', inline_); }
    JsonWriter &end();
    JsonWriter &key(std::string_view name);

    JsonWriter &value(double number); // what is not finite becomes null
    JsonWriter &value(uint64_t number);
    JsonWriter &value(int64_t number);
    JsonWriter &value(int number) { return value(int64_t(number)); }
    JsonWriter &value(uint32_t number) { return value(uint64_t(number)); }
    JsonWriter &value(bool flag);
    JsonWriter &value(std::string_view text); // bytes that are no UTF-8 become U+FFFD
    JsonWriter &value(const char *text) { return value(std::string_view(text)); }
    JsonWriter &value(const std::string &text) { return value(std::string_view(text)); }

    template <class T> JsonWriter &member(std::string_view name, const T &v) {
        return key(name).value(v);
    }

    const std::string &text() const { return text_; }
    void print() const; // to stdout, with a newline

private:
    struct Level {
        char close;
        bool inline_;
        bool empty = true;
    };
    JsonWriter &open(char bracket, bool inline_);
    void separate();
    void new_line();
    void quote(std::string_view text);

    std::string text_;
    std::vector<Level> levels_;
    bool after_key_ = false;
};

} // namespace tool
