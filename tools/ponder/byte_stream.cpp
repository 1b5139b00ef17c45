#include "byte_stream.hpp"

#include "common.hpp"
#include "interrupt.hpp"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>

#include <lzma.h>
#include <sys/stat.h>
#include <zlib.h>

namespace tool {

namespace {

constexpr size_t block = 1 << 16;
constexpr uint64_t decoder_memory = uint64_t(1) << 30; // .xz -9 needs 65 MiB

struct Close {
    void operator()(std::FILE *file) const {
        if (file != stdin)
            std::fclose(file);
    }
};

enum class Format { plain, xz, gz };

} // namespace

struct ByteStream::Decoder {
    std::string path;
    std::unique_ptr<std::FILE, Close> file;
    Format format = Format::plain;
    lzma_stream xz = LZMA_STREAM_INIT;
    z_stream gz{};
    bool finished = false;
    uint64_t size = 0, done = 0; // bytes of the file
    uint8_t input[block];
    size_t at = 0, end = 0; // of the input that is waiting

    ~Decoder() {
        lzma_end(&xz);
        if (format == Format::gz)
            inflateEnd(&gz);
    }
    size_t waiting() const { return end - at; }

    [[noreturn]] void fail(const std::string &what) const {
        if (interrupted())
            throw Failure(exit_interrupted, "interrupted while reading");
        throw Failure(exit_file, (path == "-" ? "standard input" : path) + ": " + what);
    }
    [[noreturn]] void fail_here(const std::string &what) const {
        fail(what + " at byte " + std::to_string(done - waiting()));
    }

    // False at the end of the file.
    bool fill() {
        at = 0;
        end = std::fread(input, 1, block, file.get());
        done += end;
        if (std::ferror(file.get()))
            fail(std::strerror(errno));
        return end > 0;
    }

    void open() {
        file.reset(path == "-" ? stdin : std::fopen(path.c_str(), "rb"));
        if (!file)
            fail(std::strerror(errno));
        struct stat facts {};
        if (fstat(fileno(file.get()), &facts) == 0) {
            if (S_ISDIR(facts.st_mode))
                fail("is a directory");
            size = uint64_t(facts.st_size);
        }
        fill();
    }

    void look_at_magic() {
        const uint8_t xz_magic[] = {0xfd, '7', 'z', 'X', 'Z', 0}, gz_magic[] = {0x1f, 0x8b, 8};
        const auto begins = [&](const auto &magic) {
            return end >= sizeof magic && std::memcmp(input, magic, sizeof magic) == 0;
        };
        if (begins(xz_magic)) {
            format = Format::xz;
            if (lzma_stream_decoder(&xz, decoder_memory, LZMA_CONCATENATED) != LZMA_OK)
                throw Failure(exit_memory, "no memory to decompress " + path);
        } else if (begins(gz_magic)) {
            if (inflateInit2(&gz, 15 + 16) != Z_OK) // 16: with a gzip header
                throw Failure(exit_memory, "no memory to decompress " + path);
            format = Format::gz;
        }
    }

    size_t plain_bytes(char *to, size_t room) {
        if (waiting() == 0 && !fill())
            return 0;
        const size_t count = std::min(room, waiting());
        std::memcpy(to, input + at, count);
        at += count;
        return count;
    }

    size_t xz_bytes(char *to, size_t room) {
        xz.next_out = reinterpret_cast<uint8_t *>(to);
        xz.avail_out = room;
        while (xz.avail_out == room && !finished) {
            const bool more = waiting() > 0 || fill();
            xz.next_in = input + at;
            xz.avail_in = waiting();
            const lzma_ret result = lzma_code(&xz, more ? LZMA_RUN : LZMA_FINISH);
            at = end - xz.avail_in;
            finished = result == LZMA_STREAM_END;
            if (result == LZMA_MEM_ERROR || result == LZMA_MEMLIMIT_ERROR)
                throw Failure(exit_memory, path + ": decompressing needs too much memory");
            if (result != LZMA_OK && !finished)
                fail_here(result == LZMA_BUF_ERROR ? "the .xz data ends too early"
                                                   : "the .xz data is damaged");
        }
        return room - xz.avail_out;
    }

    size_t gz_bytes(char *to, size_t room) {
        gz.next_out = reinterpret_cast<Bytef *>(to);
        gz.avail_out = uInt(room);
        while (gz.avail_out == room && !finished) {
            if (waiting() == 0 && !fill())
                fail_here("the .gz data ends too early");
            gz.next_in = input + at;
            gz.avail_in = uInt(waiting());
            const int result = inflate(&gz, Z_NO_FLUSH);
            at = end - gz.avail_in;
            if (result == Z_MEM_ERROR)
                throw Failure(exit_memory, "no memory to decompress " + path);
            if (result != Z_OK && result != Z_STREAM_END)
                fail_here("the .gz data is damaged");
            if (result != Z_STREAM_END)
                continue;
            // Another member may follow.
            finished = waiting() == 0 && !fill();
            if (!finished)
                inflateReset(&gz);
        }
        return room - gz.avail_out;
    }
};

ByteStream::ByteStream(const std::string &path, Compressed how) : decoder_(new Decoder) {
    decoder_->path = path;
    decoder_->open();
    if (how == Compressed::decompress)
        decoder_->look_at_magic();
}

ByteStream::~ByteStream() = default;

size_t ByteStream::take(char *to, size_t room) {
    switch (decoder_->format) {
    case Format::plain:
        return decoder_->plain_bytes(to, room);
    case Format::xz:
        return decoder_->xz_bytes(to, room);
    case Format::gz:
        return decoder_->gz_bytes(to, room);
    }
    return 0;
}

size_t ByteStream::read(char *to, size_t room) {
    constexpr size_t most = size_t(1) << 30; // zlib counts in 32 bits
    size_t got = 0;
    while (got < room) {
        const size_t count = take(to + got, std::min(room - got, most));
        if (count == 0)
            break;
        got += count;
    }
    return got;
}

double ByteStream::share() const {
    return decoder_->size ? double(decoder_->done) / double(decoder_->size) : 0;
}

} // namespace tool
