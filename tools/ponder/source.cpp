#include "source.hpp"

#include "common.hpp"

#include <algorithm>

namespace tool {

namespace {

constexpr size_t block = 1 << 16;
constexpr uint64_t longest_line = uint64_t(1) << 28;

} // namespace

ReadResult read_whole(const std::string &path, std::string &text) {
    ByteStream bytes(path, ByteStream::Compressed::as_it_is);
    text.clear();
    for (;;) {
        const size_t before = text.size();
        text.resize(before + block);
        const size_t got = bytes.read(text.data() + before, block);
        text.resize(before + got);
        if (text.size() > largest_document)
            return ReadResult::too_large;
        if (got < block)
            return ReadResult::ok;
    }
}

bool looks_binary(std::string_view text) {
    return text.substr(0, 8000).find('\0') != std::string_view::npos;
}

// Appends what comes next to the buffer; false at the end.
bool LineReader::fill() {
    buffer_.erase(0, at_);
    at_ = 0;
    const size_t before = buffer_.size();
    if (before > longest_line)
        throw Failure(exit_file,
                      path_ + ":" + std::to_string(line_ + 1) + ": the line is too long");
    buffer_.resize(before + block);
    buffer_.resize(before + bytes_.read(buffer_.data() + before, block));
    return buffer_.size() > before;
}

bool LineReader::next(std::string &line) {
    size_t searched = at_;
    size_t newline;
    while ((newline = buffer_.find('\n', searched)) == std::string::npos && !end_) {
        const size_t open = buffer_.size() - at_; // fill() moves the open line to the front
        end_ = !fill();
        searched = open;
    }
    if (newline == std::string::npos) {
        if (at_ == buffer_.size())
            return false;
        newline = buffer_.size();
    }
    line.assign(buffer_, at_, newline - at_);
    if (!line.empty() && line.back() == '\r')
        line.pop_back();
    at_ = std::min(newline + 1, buffer_.size());
    ++line_;
    return true;
}

} // namespace tool
