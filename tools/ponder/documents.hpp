// The texts of files and folders, one at a time.
#pragma once

#include "common.hpp"
#include "source.hpp"
#include "terminal.hpp"
#include "text.hpp"
#include "walk.hpp"

namespace tool {

class Documents {
public:
    Documents(const std::vector<std::string> &paths, bool quiet) : quiet_(quiet) {
        files_ = list_files(paths, [&](const std::string &message) { note(quiet_, message); });
        for (const FileItem &file : files_)
            total_ += file.size;
    }
    bool next(std::string &path, std::string &text) {
        while (at_ < files_.size()) {
            FileItem &file = files_[at_++];
            path = file.path;
            const bool usable = read(file, text);
            if (path == "-")
                path = "standard input";
            // What was expected to be read and what was there may differ.
            total_ = total_ - file.size + text.size();
            file.size = text.size();
            done_ += text.size();
            if (usable)
                return ++used_, true;
            ++left_out_;
        }
        return false;
    }
    // To read everything a second time; standard input only gives its text once.
    void keep_standard_input() { keep_stdin_ = true; }
    void rewind() {
        at_ = 0;
        done_ = used_ = left_out_ = 0;
    }
    uint64_t used() const { return used_; }
    uint64_t left_out() const { return left_out_; }
    uint64_t done() const { return done_; } // bytes, the current text included
    uint64_t total() const { return total_; }

private:
    bool read(const FileItem &file, std::string &text) {
        if (file.path == "-" && have_stdin_)
            text = stdin_;
        else if (!read_file(file, text))
            return false;
        if (file.path == "-" && keep_stdin_) {
            stdin_ = text;
            have_stdin_ = true;
        }
        return !looks_binary(text);
    }
    bool read_file(const FileItem &file, std::string &text) {
        try {
            if (read_whole(file.path, text) == ReadResult::ok)
                return true;
            note(quiet_,
                 file.path + ": larger than " + bytes_text(largest_document) + "; left out");
        } catch (const Failure &failure) {
            if (file.named || failure.code != exit_file)
                throw;
            note(quiet_, std::string(failure.what()) + "; left out");
        }
        text.clear();
        return false;
    }

    bool quiet_;
    std::vector<FileItem> files_;
    size_t at_ = 0;
    uint64_t total_ = 0, done_ = 0, used_ = 0, left_out_ = 0;
    std::string stdin_;
    bool keep_stdin_ = false, have_stdin_ = false;
};

} // namespace tool
