// The file seam: every read and write of the library goes through here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

namespace ponder {

// An open regular file. Reads are checked against the size seen at opening.
class File {
public:
    // Throws PONDER_E_NOT_FOUND or PONDER_E_IO naming the path; only regular files open
    // (never blocks on a FIFO).
    explicit File(const std::string &path);
    ~File();
    File(File &&) noexcept;
    File &operator=(File &&) = delete;

    const std::string &path() const { return path_; }
    uint64_t size() const { return size_; }
    // Reads exactly `size` bytes at `offset`; PONDER_E_IO when the file is shorter now.
    void read(uint64_t offset, void *out, size_t size) const;

private:
    std::string path_;
    int fd_ = -1;
    uint64_t size_ = 0;
};

// A whole file of at most `limit` bytes; PONDER_E_FORMAT when larger.
std::string read_file(const std::string &path, size_t limit);
bool file_exists(const std::string &path);
// Makes the folder in an existing one; nothing happens if it is there. PONDER_E_IO.
void make_folder(const std::string &path);
// Joins a folder and a single plain component as named by a file: [A-Za-z0-9._-]{1,255}, not
// "." or "..". Anything else is PONDER_E_FORMAT naming `source`.
std::string join_component(const std::string &folder, std::string_view component,
                           const std::string &source);

// Replaces `path` atomically: temporary file in the same folder, every byte that `write` hands to
// its argument, fsync, rename, fsync of the folder. On any failure the old file is untouched and
// the temporary removed; throws PONDER_E_IO. The file keeps its access mode; `mode` (under the
// umask) is that of a new one.
using Sink = std::function<void(const void *data, size_t size)>;
void replace_file(const std::string &path, const std::function<void(const Sink &)> &write,
                  unsigned mode = 0666);

} // namespace ponder
