#include "data_source.hpp"

#include "common.hpp"
#include "digest.hpp"
#include "interrupt.hpp"
#include "terminal.hpp"
#include "text.hpp"
#include "walk.hpp"

#include <filesystem>

namespace tool {

namespace fs = std::filesystem;

namespace {

constexpr size_t part_size = size_t(1) << 20;
constexpr size_t longest_part = size_t(64) << 20;

bool is_json_lines(const fs::path &path) {
    fs::path name = path.filename();
    if (name.extension() == ".xz" || name.extension() == ".gz")
        name = name.stem();
    return name.extension() == ".jsonl" || name.extension() == ".ndjson";
}

// Where a text may be cut without changing its words: before a line break that follows a visible
// ASCII character. GPT-2's pattern never looks back, and its only look ahead is inside white space.
size_t last_cut(const std::string &text) {
    for (size_t at = text.size(); at-- > 1;)
        if (text[at] == '\n' && text[at - 1] > ' ' && text[at - 1] < 0x7f)
            return at;
    return 0;
}

} // namespace

DataSource::DataSource(const std::vector<std::string> &paths, bool quiet) : quiet_(quiet) {
    for (size_t i = 0; i < paths.size(); ++i) {
        name_ += (i == 0 ? "" : ", ") + paths[i];
        add(paths[i], i);
    }
    for (const Input &input : inputs_)
        total_ += input.size;
}

void DataSource::add(const std::string &path, size_t place) {
    if (path == "-")
        throw Failure(exit_usage, "training data is read more than once: standard input cannot be");
    const auto files =
        list_files({path}, [&](const std::string &message) { note(quiet_, message); });
    std::error_code problem;
    if (!fs::is_directory(path, problem)) {
        if (!fs::is_regular_file(path, problem))
            throw Failure(exit_file, path + ": is no regular file");
        const std::string name = fs::path(path).filename().string();
        inputs_.push_back({path, name, place, files.front().size, is_json_lines(path), false});
        return;
    }
    const std::string top = fs::canonical(path, problem).filename().string();
    for (const FileItem &file : files) {
        const fs::path below =
            fs::path(file.path).lexically_relative(fs::path(path).lexically_normal());
        const bool beside = below.begin() == below.end() || std::next(below.begin()) == below.end();
        inputs_.push_back({file.path, beside ? top : top + "/" + below.begin()->string(), place,
                           file.size, false, true});
    }
    // Files beside the folders stand between them in the walk; packages are to be in one piece.
    std::stable_sort(inputs_.end() - std::ptrdiff_t(files.size()), inputs_.end(),
                     [](const Input &a, const Input &b) { return a.package < b.package; });
}

std::string DataSource::digest() const {
    Digest digest;
    std::vector<char> block(size_t(1) << 20);
    for (const Input &input : inputs_) {
        digest.add_text(input.package);
        digest.add_number(input.lines * 2u + input.from_folder);
        ByteStream bytes(input.path, ByteStream::Compressed::as_it_is);
        uint64_t size = 0;
        while (const size_t got = bytes.read(block.data(), block.size())) {
            digest.add(block.data(), got);
            size += got;
            if (interrupted())
                throw Failure(exit_interrupted, "interrupted while reading");
        }
        digest.add_number(size);
    }
    return digest.hex();
}

void DataSource::rewind() {
    at_ = 0;
    before_ = 0;
    lines_.reset();
    bytes_.reset();
}

double DataSource::share() const {
    if (total_ == 0)
        return 1;
    const double inside = lines_ ? lines_->share() : bytes_ ? bytes_->share() : 0;
    const double open = at_ < inputs_.size() ? double(inputs_[at_].size) : 0;
    return (double(before_) + inside * open) / double(total_);
}

bool DataSource::next(DataText &to) {
    while (at_ < inputs_.size()) {
        if (interrupted())
            throw Failure(exit_interrupted, "interrupted while reading");
        if (inputs_[at_].lines ? next_line(to) : next_part(to))
            return true;
        before_ += inputs_[at_++].size;
        lines_.reset();
        bytes_.reset();
    }
    return false;
}

bool DataSource::next_line(DataText &to) {
    if (!lines_)
        lines_ = std::make_unique<LineReader>(inputs_[at_].path);
    std::string line;
    while (lines_->next(line)) {
        if (line.find_first_not_of(" \t") == std::string::npos)
            continue;
        try {
            Document document = parse_document(line, Package::optional);
            to.package = document.package.value_or(inputs_[at_].package + ":" +
                                                   std::to_string(lines_->line_number()));
            to.declared = document.package.has_value();
            to.path = inputs_[at_].place;
            to.text = std::move(document.text);
            to.begins = true;
        } catch (const std::exception &error) {
            throw Failure(exit_file, lines_->place() + ": " + error.what());
        }
        return true;
    }
    return false;
}

bool DataSource::next_part(DataText &to) {
    const Input &input = inputs_[at_];
    if (!bytes_) {
        if (input.from_folder && input.size > largest_document) {
            note(quiet_,
                 input.path + ": larger than " + bytes_text(largest_document) + "; left out");
            return false;
        }
        bytes_ = std::make_unique<ByteStream>(input.path, input.from_folder
                                                              ? ByteStream::Compressed::as_it_is
                                                              : ByteStream::Compressed::decompress);
        rest_.clear();
        begun_ = ended_ = false;
    }
    if (ended_)
        return false;
    size_t cut = 0;
    while (cut == 0 && !ended_ && rest_.size() < longest_part) {
        const size_t before = rest_.size();
        rest_.resize(before + part_size);
        const size_t got = bytes_->read(rest_.data() + before, part_size);
        rest_.resize(before + got);
        ended_ = got < part_size;
        cut = ended_ ? rest_.size() : last_cut(rest_);
    }
    if (!begun_ && looks_binary(rest_)) {
        if (!input.from_folder)
            throw Failure(exit_file, input.path + ": is no text (a NUL byte near its front)");
        return false;
    }
    if (cut == 0)
        cut = rest_.size(); // one endless line
    to.package = input.package;
    to.text = rest_.substr(0, cut);
    to.begins = !begun_;
    to.declared = false;
    to.path = input.place;
    rest_.erase(0, cut);
    const bool any = !begun_ || !to.text.empty();
    begun_ = true;
    return any;
}

} // namespace tool
