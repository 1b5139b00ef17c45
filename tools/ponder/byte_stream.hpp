// The bytes of a file from its front, decompressed if they begin like .xz or .gz data.
#pragma once

#include <cstddef>
#include <memory>
#include <string>

namespace tool {

class ByteStream {
public:
    enum class Compressed { decompress, as_it_is };
    // "-" is standard input. Throws Failure(exit_file).
    explicit ByteStream(const std::string &path, Compressed how = Compressed::decompress);
    ~ByteStream();

    // Fills the room up to the end of the data; fewer bytes, down to none, only there. Throws
    // Failure(exit_file) naming path and offset where reading or decompressing fails.
    size_t read(char *to, size_t room);
    double share() const; // of the file's bytes that were read

private:
    struct Decoder;
    size_t take(char *to, size_t room);
    std::unique_ptr<Decoder> decoder_;
};

} // namespace tool
