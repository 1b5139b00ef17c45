#include "json_in.hpp"

#include <nlohmann/json.hpp>

#include <limits>
#include <stdexcept>

namespace tool {

namespace {

using Json = nlohmann::json;

// Keeps three strings of the outer object and drops everything else as it passes, so that a
// hostile line costs no more memory than its length.
struct DocumentReader : nlohmann::json_sax<Json> {
    std::string package, path, text;
    int depth = 0;
    std::string name;
    bool seen[3] = {};

    std::string *wanted(int &which) {
        const char *const names[] = {"package", "path", "text"};
        std::string *const places[] = {&package, &path, &text};
        for (which = 0; which < 3; ++which)
            if (depth == 1 && name == names[which])
                return places[which];
        return nullptr;
    }
    bool other() {
        int which;
        if (depth == 0)
            throw std::runtime_error("the line is no object");
        if (wanted(which))
            throw std::runtime_error("\"" + name + "\" is no string");
        return true;
    }
    bool null() override { return other(); }
    bool boolean(bool) override { return other(); }
    bool number_integer(number_integer_t) override { return other(); }
    bool number_unsigned(number_unsigned_t) override { return other(); }
    bool number_float(number_float_t, const string_t &) override { return other(); }
    bool binary(binary_t &) override { return other(); }
    bool string(string_t &value) override {
        int which;
        if (depth == 0)
            throw std::runtime_error("the line is no object");
        if (std::string *place = wanted(which)) {
            if (seen[which])
                throw std::runtime_error("\"" + name + "\" stands there twice");
            seen[which] = true;
            *place = std::move(value);
        }
        return true;
    }
    bool start_object(std::size_t) override {
        if (depth > 0)
            other();
        ++depth;
        return true;
    }
    bool end_object() override { return --depth, true; }
    bool start_array(std::size_t) override {
        other();
        ++depth;
        return true;
    }
    bool end_array() override { return --depth, true; }
    bool key(string_t &value) override {
        if (depth == 1)
            name = std::move(value);
        return true;
    }
    bool parse_error(std::size_t position, const std::string &,
                     const nlohmann::detail::exception &) override {
        throw std::runtime_error("no valid JSON at byte " + std::to_string(position));
    }
};

} // namespace

Document parse_document(std::string_view line, Package package) {
    DocumentReader reader;
    Json::sax_parse(line.begin(), line.end(), &reader);
    if (!reader.seen[0] && package == Package::required)
        throw std::runtime_error("\"package\" is missing");
    if (!reader.seen[2])
        throw std::runtime_error("\"text\" is missing");
    Document document;
    if (reader.seen[0])
        document.package = std::move(reader.package);
    document.path = std::move(reader.path);
    document.text = std::move(reader.text);
    return document;
}

std::map<std::string, double> parse_numbers(std::string_view line) {
    const Json object = Json::parse(line.begin(), line.end(), nullptr, false);
    if (!object.is_object())
        throw std::runtime_error("the line is no JSON object");
    std::map<std::string, double> numbers;
    for (const auto &[name, value] : object.items())
        if (value.is_number())
            numbers[name] = value.get<double>();
        else if (value.is_null())
            numbers[name] = std::numeric_limits<double>::quiet_NaN();
    return numbers;
}

} // namespace tool
