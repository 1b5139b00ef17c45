#include "source.hpp"

#include "common.hpp"
#include "interrupt.hpp"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include <lzma.h>
#include <sys/stat.h>

namespace tool {

namespace {

struct Close {
    void operator()(std::FILE *file) const {
        if (file != stdin)
            std::fclose(file);
    }
};
using File = std::unique_ptr<std::FILE, Close>;

[[noreturn]] void fail(const std::string &path, const std::string &what) {
    if (interrupted())
        throw Failure(exit_interrupted, "interrupted while reading");
    throw Failure(exit_file, (path == "-" ? "standard input" : path) + ": " + what);
}

File open_file(const std::string &path) {
    File file(path == "-" ? stdin : std::fopen(path.c_str(), "rb"));
    if (!file)
        fail(path, std::strerror(errno));
    struct stat facts {};
    if (fstat(fileno(file.get()), &facts) == 0 && S_ISDIR(facts.st_mode))
        fail(path, "is a directory");
    return file;
}

constexpr size_t block = 1 << 16;
constexpr uint64_t longest_line = uint64_t(1) << 28;
constexpr uint64_t decoder_memory = uint64_t(1) << 30; // .xz -9 needs 65 MiB

} // namespace

ReadResult read_whole(const std::string &path, std::string &text) {
    const File file = open_file(path);
    text.clear();
    for (;;) {
        const size_t before = text.size();
        text.resize(before + block);
        const size_t got = std::fread(text.data() + before, 1, block, file.get());
        text.resize(before + got);
        if (text.size() > largest_document)
            return ReadResult::too_large;
        if (got < block)
            break;
    }
    if (std::ferror(file.get()))
        fail(path, std::strerror(errno));
    return ReadResult::ok;
}

bool looks_binary(std::string_view text) {
    return text.substr(0, 8000).find('\0') != std::string_view::npos;
}

struct LineReader::Decoder {
    File file;
    lzma_stream xz = LZMA_STREAM_INIT;
    bool compressed = false, finished = false;
    uint64_t size = 0, done = 0;
    uint8_t input[block];
    size_t waiting = 0; // plain bytes in `input` that were read to look at the magic

    ~Decoder() { lzma_end(&xz); }
};

LineReader::LineReader(const std::string &path) : path_(path), decoder_(new Decoder) {
    Decoder &d = *decoder_;
    d.file = open_file(path);
    struct stat facts {};
    if (fstat(fileno(d.file.get()), &facts) == 0)
        d.size = uint64_t(facts.st_size);
    d.waiting = std::fread(d.input, 1, block, d.file.get());
    d.done = d.waiting;
    const uint8_t magic[] = {0xfd, '7', 'z', 'X', 'Z', 0};
    d.compressed = d.waiting >= sizeof magic && std::memcmp(d.input, magic, sizeof magic) == 0;
    if (!d.compressed)
        return;
    if (lzma_stream_decoder(&d.xz, decoder_memory, LZMA_CONCATENATED) != LZMA_OK)
        throw Failure(exit_memory, "no memory to decompress " + path);
    d.xz.next_in = d.input;
    d.xz.avail_in = d.waiting;
}

LineReader::~LineReader() = default;

double LineReader::share() const {
    return decoder_->size ? double(decoder_->done) / double(decoder_->size) : 0;
}

// Appends what comes next to the buffer; false at the end.
bool LineReader::fill() {
    Decoder &d = *decoder_;
    buffer_.erase(0, at_);
    at_ = 0;
    const size_t before = buffer_.size();
    if (before > longest_line)
        fail(path_, "line " + std::to_string(line_ + 1) + " is too long");
    if (!d.compressed) {
        if (d.waiting == 0) {
            d.waiting = std::fread(d.input, 1, block, d.file.get());
            d.done += d.waiting;
            if (std::ferror(d.file.get()))
                fail(path_, std::strerror(errno));
        }
        buffer_.append(reinterpret_cast<const char *>(d.input), d.waiting);
        return std::exchange(d.waiting, 0) > 0;
    }
    if (d.finished)
        return false;
    buffer_.resize(before + block);
    d.xz.next_out = reinterpret_cast<uint8_t *>(buffer_.data()) + before;
    d.xz.avail_out = block;
    while (d.xz.avail_out > 0 && !d.finished) {
        if (d.xz.avail_in == 0) {
            d.xz.next_in = d.input;
            d.xz.avail_in = std::fread(d.input, 1, block, d.file.get());
            d.done += d.xz.avail_in;
            if (std::ferror(d.file.get()))
                fail(path_, std::strerror(errno));
        }
        const lzma_ret result = lzma_code(&d.xz, d.xz.avail_in == 0 ? LZMA_FINISH : LZMA_RUN);
        d.finished = result == LZMA_STREAM_END;
        if (result == LZMA_MEM_ERROR || result == LZMA_MEMLIMIT_ERROR)
            throw Failure(exit_memory, path_ + ": decompressing needs too much memory");
        if (result != LZMA_OK && !d.finished)
            fail(path_, result == LZMA_BUF_ERROR ? "the .xz data ends too early"
                                                 : "the .xz data is damaged");
    }
    buffer_.resize(before + block - d.xz.avail_out);
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
