#include "token_cache.hpp"

#include "digest.hpp"
#include "interrupt.hpp"
#include "package_key.hpp"
#include "terminal.hpp"
#include "text.hpp"
#include "tokens.hpp"

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <optional>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

namespace tool {

namespace fs = std::filesystem;

namespace {

struct Header {
    char magic[8];
    uint32_t width, runs_width;
    uint64_t tokens, runs, index_bytes;
    char key[32];
    uint64_t body_digest; // of ids and index
    uint64_t digest;      // of the fields above
};
static_assert(sizeof(Header) == 88);
constexpr char magic[8] = {'p', 'o', 'n', 'd', 'e', 'r', 'T', '3'};

uint64_t digest_of(const Header &header) {
    Digest digest;
    digest.add(&header, offsetof(Header, digest));
    return digest.number();
}

[[noreturn]] void fail(const std::string &path, const char *what) {
    throw Failure(exit_file, path + ": " + what + std::strerror(errno));
}

// The files that the library takes the tokenizer from.
std::string tokenizer_digest(const std::string &folder) {
    Digest digest;
    std::error_code ignored;
    const bool combined = fs::exists(fs::path(folder) / "tokenizer.json", ignored);
    for (const char *name : {"tokenizer.json", "vocab.json", "merges.txt"}) {
        const std::string path = (fs::path(folder) / name).string();
        if (combined != (name == std::string("tokenizer.json")) || !fs::exists(path, ignored))
            continue;
        std::string text;
        read_whole(path, text);
        digest.add_text(text);
    }
    return digest.hex();
}

// A file that appears under its name when it is complete, and not at all otherwise.
class NewFile {
public:
    explicit NewFile(const std::string &path)
        : path_(path), part_(path + "." + std::to_string(getpid()) + ".part"),
          file_(std::fopen(part_.c_str(), "wb")) {
        if (!file_)
            fail(part_, "");
    }
    ~NewFile() {
        if (file_)
            std::fclose(file_);
        unlink(part_.c_str());
    }
    NewFile(const NewFile &) = delete;

    void write(const void *data, size_t size) {
        if (std::fwrite(data, 1, size, file_) != size)
            fail(part_, "");
    }
    void finish(const void *header, size_t size) {
        if (std::fflush(file_) != 0 || pwrite(fileno(file_), header, size, 0) != ssize_t(size) ||
            fsync(fileno(file_)) != 0)
            fail(part_, "");
        if (std::fclose(std::exchange(file_, nullptr)) != 0 ||
            std::rename(part_.c_str(), path_.c_str()) != 0)
            fail(part_, "");
    }

private:
    std::string path_, part_;
    std::FILE *file_;
};

class Builder {
public:
    Builder(const std::string &path, const std::string &key, const ponder_model *model)
        : file_(path), tokens_(model) {
        std::memcpy(header_.magic, magic, sizeof magic);
        std::memcpy(header_.key, key.data(), sizeof header_.key);
        header_.width = info_of(model).vocabulary <= 65536 ? 2 : 4;
        const Header empty{};
        file_.write(&empty, sizeof empty);
    }

    void add(const DataText &text) {
        if (!run_ || !run_->covers(text)) {
            end_run();
            run_.emplace(text);
            first_ = header_.tokens;
        }
        run_->add(text);
        ids_.clear();
        if (text.begins)
            tokens_.append(text.text, ids_);
        else
            tokens_.append_part(text.text, ids_);
        if (header_.width == 2) {
            narrow_.assign(ids_.begin(), ids_.end());
            write(narrow_.data(), narrow_.size() * 2);
        } else {
            write(ids_.data(), ids_.size() * 4);
        }
        header_.tokens += ids_.size();
    }

    void finish() {
        end_run();
        header_.index_bytes = index_.size();
        write(index_.data(), index_.size());
        header_.body_digest = body_.number();
        header_.digest = digest_of(header_);
        file_.finish(&header_, sizeof header_);
    }
    uint64_t tokens() const { return header_.tokens; }

private:
    void end_run() {
        if (!run_)
            return;
        ++header_.runs;
        put(first_);
        put(run_->number());
        put(run_->package().size());
        index_ += run_->package();
    }
    void put(uint64_t number) {
        index_.append(reinterpret_cast<const char *>(&number), sizeof number);
    }
    void write(const void *data, size_t size) {
        file_.write(data, size);
        body_.add(data, size);
    }

    NewFile file_;
    DocumentTokens tokens_;
    Header header_{};
    Digest body_;
    std::optional<PackageKey> run_; // the open one, and its first id
    uint64_t first_ = 0;
    std::string index_;
    std::vector<int32_t> ids_;
    std::vector<uint16_t> narrow_;
};

void build(DataSource &source, const std::string &path, const std::string &key,
           const ponder_model *model, bool quiet) {
    Builder builder(path, key, model);
    Progress progress(quiet);
    DataText text;
    source.rewind();
    while (source.next(text)) {
        builder.add(text);
        if (progress.due())
            progress.show(format("tokenising %s %3.0f %%  %s tokens",
                                 progress_bar(source.share(), 20).c_str(), 100 * source.share(),
                                 with_commas(builder.tokens()).c_str()));
    }
    builder.finish();
    progress.clear();
    note(quiet, format("%s: %s tokens, kept in %s", source.name().c_str(),
                       with_commas(builder.tokens()).c_str(), path.c_str()));
}

} // namespace

TokenCache::TokenCache(DataSource &source, const ponder_model *model,
                       const std::string &model_folder, const std::string &folder, bool quiet) {
    Digest digest;
    digest.add_text(source.digest());
    digest.add_text(tokenizer_digest(model_folder));
    digest.add(magic, sizeof magic); // a cache of another form is another file
    key_ = digest.hex();
    const std::string path = folder + "/" + key_ + ".tokens";
    if (open(path, quiet))
        return;
    build(source, path, key_, model, quiet);
    if (!open(path, quiet))
        throw Failure(exit_file, path + ": cannot be read back");
}

bool TokenCache::open(const std::string &path, bool quiet) {
    const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (fd < 0 && errno == ENOENT)
        return false;
    struct stat facts {};
    if (fd < 0 || fstat(fd, &facts) != 0)
        fail(path, "");
    const auto size = size_t(facts.st_size);
    void *const front = size ? mmap(nullptr, size, PROT_READ, MAP_SHARED, fd, 0) : nullptr;
    const int error = errno;
    ::close(fd);
    errno = error;
    if (front == MAP_FAILED)
        fail(path, "mmap: ");
    map_ = {static_cast<const std::byte *>(front), [front, size](const void *) {
                if (size)
                    munmap(front, size);
            }};
    const auto damaged = [&](const char *what) {
        note(quiet, path + ": damaged (" + what + "); made again");
        return false;
    };

    Header header{};
    if (size < sizeof header)
        return damaged("too short");
    std::memcpy(&header, map_.get(), sizeof header);
    if (std::memcmp(header.magic, magic, sizeof magic) != 0 || digest_of(header) != header.digest ||
        std::memcmp(header.key, key_.data(), sizeof header.key) != 0)
        return damaged("its header");
    const uint64_t body = size - sizeof header;
    if (header.width != 2 && header.width != 4)
        return damaged("its header");
    if (header.tokens > body / header.width ||
        header.tokens * header.width + header.index_bytes != body)
        return damaged("its length");
    madvise(front, size, MADV_SEQUENTIAL);
    Digest digest;
    digest.add(map_.get() + sizeof header, size_t(body));
    if (digest.number() != header.body_digest)
        return damaged("its content");
    madvise(front, size, MADV_NORMAL);

    ids_ = map_.get() + sizeof header;
    width_ = header.width;
    tokens_ = header.tokens;
    const std::byte *at = ids_ + tokens_ * width_;
    uint64_t left = header.index_bytes;
    runs_.clear();
    for (uint64_t i = 0; i < header.runs; ++i) {
        struct {
            uint64_t first, key, name;
        } entry;
        const uint64_t least = runs_.empty() ? 0 : runs_.back().first;
        if (left < sizeof entry)
            return damaged("its index");
        std::memcpy(&entry, at, sizeof entry);
        at += sizeof entry;
        left -= sizeof entry;
        if (entry.name > left || entry.first < least || entry.first > tokens_)
            return damaged("its index");
        if (i > 0)
            runs_.back().count = entry.first - runs_.back().first;
        runs_.push_back({{reinterpret_cast<const char *>(at), size_t(entry.name)},
                         entry.key,
                         entry.first,
                         tokens_ - entry.first});
        at += entry.name;
        left -= entry.name;
    }
    return true;
}

void TokenCache::read(uint64_t first, uint64_t count, std::vector<int32_t> &to) const {
    const size_t before = to.size();
    to.resize(before + count);
    if (width_ == 4) {
        std::memcpy(to.data() + before, ids_ + first * 4, count * 4);
        return;
    }
    const std::byte *from = ids_ + first * 2;
    for (uint64_t i = 0; i < count; ++i) {
        uint16_t id;
        std::memcpy(&id, from + 2 * i, sizeof id);
        to[before + i] = id;
    }
}

std::string cache_folder(const std::string &given) {
    std::string folder = given;
    if (folder.empty()) {
        const char *xdg = std::getenv("XDG_CACHE_HOME"), *home = std::getenv("HOME");
        if (xdg && xdg[0] == '/')
            folder = std::string(xdg) + "/ponder";
        else if (home && home[0])
            folder = std::string(home) + "/.cache/ponder";
        else
            throw Failure(exit_usage, "there is no home for tokenised data: name one with --cache");
    }
    std::error_code problem;
    fs::create_directories(folder, problem);
    if (!fs::is_directory(folder))
        throw Failure(exit_file, folder + ": " + problem.message());
    return folder;
}

} // namespace tool
