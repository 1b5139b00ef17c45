#include "base/file.hpp"

#include "base/error.hpp"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#include <utility>

namespace ponder {

namespace {

[[noreturn]] void io_error(const std::string &path, const char *what, int error) {
    ponder_status status = error == ENOENT || error == ENOTDIR ? PONDER_E_NOT_FOUND : PONDER_E_IO;
    throw_error(status, "%s: %s: %s", path.c_str(), what, std::strerror(error));
}

void check_path(const std::string &path) {
    if (path.empty() || path.find('\0') != path.npos)
        throw_error(PONDER_E_NOT_FOUND, "%s: no usable file name", path.c_str());
}

std::string folder_of(const std::string &path) {
    size_t slash = path.rfind('/');
    if (slash == path.npos)
        return ".";
    return slash == 0 ? "/" : path.substr(0, slash);
}

int open_retry(const char *path, int flags, mode_t mode = 0) {
    int fd;
    do
        fd = ::open(path, flags | O_CLOEXEC, mode);
    while (fd < 0 && errno == EINTR);
    return fd;
}

class Descriptor {
public:
    explicit Descriptor(int fd) : fd_(fd) {}
    ~Descriptor() {
        if (fd_ >= 0)
            ::close(fd_);
    }
    Descriptor(const Descriptor &) = delete;
    Descriptor &operator=(const Descriptor &) = delete;
    int get() const { return fd_; }
    // The result of close(): some file systems report a failed write only there.
    int close() { return ::close(std::exchange(fd_, -1)); }

private:
    int fd_;
};

// The temporary file of replace_file: gone at the end of the scope unless it was renamed.
class Temporary {
public:
    Temporary(const std::string &target, unsigned mode)
        : path_(unique_name(target)), fd_(create(mode)) {}
    ~Temporary() {
        if (!kept_)
            ::unlink(path_.c_str());
    }

    void write(const void *data, size_t size) {
        // A buffer, because headers and small tensors come in many small pieces.
        if (buffer_.size() + size > buffer_bytes)
            flush();
        if (size >= buffer_bytes)
            return write_out(static_cast<const char *>(data), size);
        buffer_.append(static_cast<const char *>(data), size);
    }

    // With the access mode of the file whose place it takes.
    void rename_to(const std::string &target) {
        struct stat old, now;
        if (::stat(target.c_str(), &old) == 0 && S_ISREG(old.st_mode) &&
            ::fstat(fd_.get(), &now) == 0 && (old.st_mode & 0777) != (now.st_mode & 0777) &&
            ::fchmod(fd_.get(), old.st_mode & 0777) != 0)
            fail("change mode");
        flush();
        int result;
        do
            result = ::fsync(fd_.get());
        while (result != 0 && errno == EINTR);
        if (result != 0)
            fail("fsync");
        if (fd_.close() != 0 && errno != EINTR)
            fail("close");
        if (::rename(path_.c_str(), target.c_str()) != 0)
            fail("rename");
        kept_ = true;
    }

private:
    static constexpr size_t buffer_bytes = 256u << 10;

    static std::string unique_name(const std::string &target) {
        static std::atomic<unsigned> counter{0};
        return target + "." + std::to_string(::getpid()) + "-" + std::to_string(++counter) + ".tmp";
    }

    int create(unsigned mode) {
        // The name is left by a crashed process of the same number at worst.
        for (int attempt = 0; attempt < 100; ++attempt) {
            int fd = open_retry(path_.c_str(), O_WRONLY | O_CREAT | O_EXCL, mode_t(mode));
            if (fd >= 0)
                return fd;
            if (errno != EEXIST)
                break;
            path_.insert(path_.end() - 4, 'x');
        }
        fail("create");
    }

    void flush() {
        write_out(buffer_.data(), buffer_.size());
        buffer_.clear();
    }

    void write_out(const char *data, size_t size) {
        while (size > 0) {
            ssize_t count = ::write(fd_.get(), data, size);
            if (count < 0 && errno == EINTR)
                continue;
            if (count < 0)
                fail("write");
            data += count;
            size -= size_t(count);
        }
    }

    [[noreturn]] void fail(const char *what) const {
        throw_error(PONDER_E_IO, "%s: %s: %s", path_.c_str(), what, std::strerror(errno));
    }

    std::string path_;
    Descriptor fd_;
    std::string buffer_;
    bool kept_ = false;
};

} // namespace

File::File(const std::string &path) : path_(path) {
    check_path(path);
    // O_NONBLOCK: opening a FIFO must not wait for a writer. It means nothing to regular files.
    fd_ = open_retry(path.c_str(), O_RDONLY | O_NONBLOCK | O_NOCTTY);
    if (fd_ < 0)
        io_error(path, "open", errno);
    struct stat status;
    const char *problem = nullptr;
    if (::fstat(fd_, &status) != 0)
        problem = std::strerror(errno);
    else if (!S_ISREG(status.st_mode))
        problem = "not a regular file";
    if (problem) {
        ::close(fd_);
        throw_error(PONDER_E_IO, "%s: %s", path.c_str(), problem);
    }
    size_ = uint64_t(status.st_size);
}

File::~File() {
    if (fd_ >= 0)
        ::close(fd_);
}

File::File(File &&other) noexcept
    : path_(std::move(other.path_)), fd_(std::exchange(other.fd_, -1)),
      size_(std::exchange(other.size_, 0)) {}

void File::read(uint64_t offset, void *out, size_t size) const {
    if (offset > size_ || size > size_ - offset)
        throw_error(PONDER_E_IO, "%s: read of %zu bytes at offset %llu, the file has %llu",
                    path_.c_str(), size, static_cast<unsigned long long>(offset),
                    static_cast<unsigned long long>(size_));
    char *to = static_cast<char *>(out);
    while (size > 0) {
        ssize_t count = ::pread(fd_, to, std::min<size_t>(size, 1u << 30), off_t(offset));
        if (count < 0 && errno == EINTR)
            continue;
        if (count < 0)
            throw_error(PONDER_E_IO, "%s: read at offset %llu: %s", path_.c_str(),
                        static_cast<unsigned long long>(offset), std::strerror(errno));
        if (count == 0)
            throw_error(PONDER_E_IO, "%s: ends at offset %llu, was longer when it was opened",
                        path_.c_str(), static_cast<unsigned long long>(offset));
        to += count;
        offset += uint64_t(count);
        size -= size_t(count);
    }
}

std::string read_file(const std::string &path, size_t limit) {
    File file(path);
    if (file.size() > limit)
        throw_error(PONDER_E_FORMAT, "%s: %llu bytes, at most %zu allowed", path.c_str(),
                    static_cast<unsigned long long>(file.size()), limit);
    std::string content(size_t(file.size()), '\0');
    file.read(0, content.data(), content.size());
    return content;
}

bool file_exists(const std::string &path) {
    struct stat status;
    return path.find('\0') == path.npos && ::stat(path.c_str(), &status) == 0;
}

void make_folder(const std::string &path) {
    struct stat status;
    if (::mkdir(path.c_str(), 0777) == 0)
        return;
    if (errno != EEXIST || ::stat(path.c_str(), &status) != 0 || !S_ISDIR(status.st_mode))
        throw_error(PONDER_E_IO, "%s: cannot make the folder: %s", path.c_str(),
                    std::strerror(errno));
}

std::string join_component(const std::string &folder, std::string_view component,
                           const std::string &source) {
    bool plain =
        !component.empty() && component.size() <= 255 && component != "." && component != "..";
    for (char c : component)
        plain = plain && ((c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') ||
                          (c >= '0' && c <= '9') || c == '.' || c == '_' || c == '-');
    if (!plain) {
        std::string shown(component.substr(0, 60));
        for (char &c : shown)
            if (c < ' ' || c > '~')
                c = '?';
        throw_error(PONDER_E_FORMAT, "%s: \"%s\" is no plain file name", source.c_str(),
                    shown.c_str());
    }
    return folder + "/" + std::string(component);
}

void replace_file(const std::string &path, const std::function<void(const Sink &)> &write,
                  unsigned mode) {
    check_path(path);
    std::string folder = folder_of(path);
    Descriptor folder_fd(open_retry(folder.c_str(), O_RDONLY | O_DIRECTORY));
    if (folder_fd.get() < 0)
        throw_error(PONDER_E_IO, "%s: open folder: %s", folder.c_str(), std::strerror(errno));
    Temporary temporary(path, mode);
    write([&](const void *data, size_t size) { temporary.write(data, size); });
    temporary.rename_to(path);
    // Some file systems cannot sync a folder and say EINVAL; there is no more to do there.
    if (::fsync(folder_fd.get()) != 0 && errno != EINVAL && errno != EINTR)
        throw_error(PONDER_E_IO, "%s: replaced, but its folder could not be synced: %s",
                    path.c_str(), std::strerror(errno));
}

} // namespace ponder
