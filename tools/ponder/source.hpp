// Bytes from files: whole texts for `run`, lines of plain or .xz files for `eval`.
#pragma once

#include <cstdio>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace tool {

// A larger file is not one document any more.
constexpr uint64_t largest_document = uint64_t(64) << 20;

enum class ReadResult { ok, too_large };
// "-" is standard input. Throws Failure(exit_file) if reading fails.
ReadResult read_whole(const std::string &path, std::string &text);

// Git's rule: a NUL byte among the first 8,000.
bool looks_binary(std::string_view text);

// Lines of a file, decompressed if it begins like an .xz file.
class LineReader {
public:
    explicit LineReader(const std::string &path);
    ~LineReader();
    bool next(std::string &line); // false at the end; throws Failure(exit_file)
    uint64_t line_number() const { return line_; }
    double share() const; // of the file's bytes that were read

private:
    struct Decoder;
    bool fill();

    std::string path_;
    std::unique_ptr<Decoder> decoder_;
    std::string buffer_;
    size_t at_ = 0;
    uint64_t line_ = 0;
    bool end_ = false;
};

} // namespace tool
