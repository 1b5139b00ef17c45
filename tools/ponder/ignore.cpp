#include "ignore.hpp"

#include <cctype>
#include <optional>
#include <span>

namespace tool {

namespace {

std::vector<std::string> split(std::string_view text) {
    std::vector<std::string> parts(1);
    for (const char c : text) {
        if (c == '/')
            parts.emplace_back();
        else
            parts.back() += c;
    }
    return parts;
}

bool in_class(std::string_view name, unsigned char c) {
    if (name == "alnum")
        return std::isalnum(c);
    if (name == "alpha")
        return std::isalpha(c);
    if (name == "blank")
        return c == ' ' || c == '\t';
    if (name == "cntrl")
        return std::iscntrl(c);
    if (name == "digit")
        return std::isdigit(c);
    if (name == "graph")
        return std::isgraph(c);
    if (name == "lower")
        return std::islower(c);
    if (name == "print")
        return std::isprint(c);
    if (name == "punct")
        return std::ispunct(c);
    if (name == "space")
        return std::isspace(c);
    if (name == "upper")
        return std::isupper(c);
    if (name == "xdigit")
        return std::isxdigit(c);
    return false;
}

// [set] at the front of `pattern`: takes it off and says whether c is in it; nothing if the
// bracket is never closed.
std::optional<bool> match_set(std::string_view &pattern, unsigned char c) {
    size_t i = 1;
    const bool negated = i < pattern.size() && (pattern[i] == '!' || pattern[i] == '^');
    i += negated;
    bool found = false, first = true;
    for (;; first = false) {
        if (i >= pattern.size())
            return std::nullopt;
        if (pattern[i] == ']' && !first)
            break;
        if (pattern.substr(i, 2) == "[:") {
            const size_t end = pattern.find(":]", i + 2);
            if (end != std::string_view::npos) {
                found |= in_class(pattern.substr(i + 2, end - i - 2), c);
                i = end + 2;
                continue;
            }
        }
        const auto member = [&]() -> unsigned char {
            if (pattern[i] == '\\' && i + 1 < pattern.size())
                ++i;
            return static_cast<unsigned char>(pattern[i++]);
        };
        const unsigned char low = member();
        unsigned char high = low;
        if (i + 1 < pattern.size() && pattern[i] == '-' && pattern[i + 1] != ']') {
            ++i;
            high = member();
        }
        found |= low <= c && c <= high;
    }
    pattern.remove_prefix(i + 1);
    return found != negated;
}

// One pattern element against one character; takes the element off when it fits.
bool match_one(std::string_view &pattern, char c) {
    if (pattern[0] == '?') {
        pattern.remove_prefix(1);
        return true;
    }
    if (pattern[0] == '[')
        return match_set(pattern, static_cast<unsigned char>(c)) == true;
    if (pattern[0] == '\\') {
        if (pattern.size() < 2 || pattern[1] != c)
            return false;
        pattern.remove_prefix(2);
        return true;
    }
    if (pattern[0] != c)
        return false;
    pattern.remove_prefix(1);
    return true;
}

// As glob_match, one level up: parts against names, "**" in the place of "*". Going back to
// the last star only is enough, so the time is at most quadratic.
bool match_parts(std::span<const std::string> pattern, std::span<const std::string> names) {
    size_t p = 0, n = 0;
    size_t star = pattern.size(), after_star = 0;
    while (n < names.size()) {
        if (p < pattern.size() && pattern[p] == "**") {
            star = p++;
            after_star = n;
            if (p == pattern.size())
                return true; // "a/**": everything inside a
        } else if (p < pattern.size() && glob_match(pattern[p], names[n])) {
            ++p, ++n;
        } else if (star < pattern.size()) {
            p = star + 1;
            n = ++after_star;
        } else {
            return false;
        }
    }
    return p == pattern.size();
}

// Spaces at the end do not count, unless a backslash protects them.
std::string_view without_trailing_spaces(std::string_view line) {
    size_t end = 0;
    for (size_t i = 0; i < line.size(); ++i) {
        if (line[i] == '\\' && i + 1 < line.size())
            end = ++i + 1;
        else if (line[i] != ' ')
            end = i + 1;
    }
    return line.substr(0, end);
}

} // namespace

bool glob_match(std::string_view pattern, std::string_view name) {
    std::string_view star_pattern, star_name;
    bool star = false;
    while (!name.empty()) {
        std::string_view rest = pattern;
        if (!pattern.empty() && pattern[0] == '*') {
            pattern.remove_prefix(1);
            star = true;
            star_pattern = pattern;
            star_name = name;
        } else if (!pattern.empty() && match_one(rest, name[0])) {
            pattern = rest;
            name.remove_prefix(1);
        } else if (star) {
            star_name.remove_prefix(1);
            pattern = star_pattern;
            name = star_name;
        } else {
            return false;
        }
    }
    return pattern.find_first_not_of('*') == std::string_view::npos;
}

IgnoreFile::IgnoreFile(std::string_view text) {
    if (text.substr(0, 3) == "\xef\xbb\xbf")
        text.remove_prefix(3);
    while (!text.empty()) {
        const size_t end = std::min(text.find('\n'), text.size());
        std::string_view line = text.substr(0, end);
        text.remove_prefix(std::min(end + 1, text.size()));
        if (!line.empty() && line.back() == '\r')
            line.remove_suffix(1);
        line = without_trailing_spaces(line);
        if (line.empty() || line[0] == '#')
            continue;
        Pattern pattern;
        if (line[0] == '!') {
            pattern.negated = true;
            line.remove_prefix(1);
        }
        if (!line.empty() && line.back() == '/') {
            pattern.folders_only = true;
            line.remove_suffix(1);
        }
        pattern.anchored = line.find('/') != std::string_view::npos;
        if (!line.empty() && line[0] == '/')
            line.remove_prefix(1);
        if (line.empty())
            continue;
        pattern.parts = split(line);
        patterns_.push_back(std::move(pattern));
    }
}

IgnoreFile::Verdict IgnoreFile::verdict(std::string_view path, bool folder) const {
    const std::vector<std::string> names = split(path);
    for (auto pattern = patterns_.rbegin(); pattern != patterns_.rend(); ++pattern) {
        if (pattern->folders_only && !folder)
            continue;
        const std::span<const std::string> all = names;
        if (pattern->anchored ? match_parts(pattern->parts, all)
                              : glob_match(pattern->parts[0], names.back()))
            return pattern->negated ? Verdict::keep : Verdict::ignore;
    }
    return Verdict::none;
}

} // namespace tool
