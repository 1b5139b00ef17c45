// .gitignore files, by the rules of gitignore(5).
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace tool {

// The patterns of one .gitignore file.
class IgnoreFile {
public:
    explicit IgnoreFile(std::string_view text);

    enum class Verdict { none, ignore, keep };
    // `path` is relative to the folder of the file, '/' between names. The last pattern that
    // matches decides.
    Verdict verdict(std::string_view path, bool folder) const;

private:
    struct Pattern {
        std::vector<std::string> parts; // between slashes; "**" spans folders
        bool negated = false, folders_only = false;
        bool anchored = false; // has a slash before its end: relative to the file's folder
    };
    std::vector<Pattern> patterns_;
};

// Shell pattern against one name: * ? [a-z] [!a] [[:alpha:]] and backslash.
bool glob_match(std::string_view pattern, std::string_view name);

} // namespace tool
