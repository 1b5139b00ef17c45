// Texts and lines out of files.
#pragma once

#include "byte_stream.hpp"

#include <cstdint>
#include <string>
#include <string_view>

namespace tool {

// A larger file is not one document any more.
constexpr uint64_t largest_document = uint64_t(64) << 20;

enum class ReadResult { ok, too_large };
// "-" is standard input. Throws Failure(exit_file) if reading fails.
ReadResult read_whole(const std::string &path, std::string &text);

// Git's rule: a NUL byte among the first 8,000.
bool looks_binary(std::string_view text);

// Lines of a file, decompressed if it begins like an .xz or .gz file.
class LineReader {
public:
    explicit LineReader(const std::string &path) : path_(path), bytes_(path) {}
    bool next(std::string &line); // false at the end; throws Failure(exit_file)
    uint64_t line_number() const { return line_; }
    double share() const { return bytes_.share(); } // of the file's bytes that were read
    std::string place() const { return path_ + ":" + std::to_string(line_); }

private:
    bool fill();

    std::string path_;
    ByteStream bytes_;
    std::string buffer_;
    size_t at_ = 0;
    uint64_t line_ = 0;
    bool end_ = false;
};

} // namespace tool
