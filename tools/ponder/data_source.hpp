// Training data as texts: JSON Lines, text files and folders, one after the other.
#pragma once

#include "json_in.hpp"
#include "source.hpp"

#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace tool {

// A document, or the next part of one that is too long to be held whole.
struct DataText {
    std::string package;
    std::string text;
    bool begins = true;    // false: goes on where the text before it ended
    bool declared = false; // the data name the package; else it is named after its file or folder
    size_t path = 0;       // which of the source's paths it is from
};

// *.jsonl and *.ndjson, also with .xz or .gz, are JSON Lines: "package" and "text", or "text"
// alone, which makes each line a package of its own. Any other file is one text, its name the
// package. Of a folder (walked like `ponder run` does) every folder right below it is a package,
// and the files beside them are another; all its files are texts.
class DataSource {
public:
    // Throws Failure for a path that cannot be read twice or does not exist.
    DataSource(const std::vector<std::string> &paths, bool quiet);

    std::string digest() const; // of contents and packages; reads every byte
    bool next(DataText &to);    // false at the end; throws Failure naming file and line
    void rewind();
    double share() const; // of the bytes that were read
    const std::string &name() const { return name_; }

private:
    struct Input {
        std::string path, package;
        size_t place; // among the source's paths
        uint64_t size;
        bool lines, from_folder;
    };
    void add(const std::string &path, size_t place);
    bool next_line(DataText &to);
    bool next_part(DataText &to);

    bool quiet_;
    std::string name_;
    std::vector<Input> inputs_;
    uint64_t total_ = 0, before_ = 0; // bytes
    size_t at_ = 0;
    std::unique_ptr<LineReader> lines_;
    std::unique_ptr<ByteStream> bytes_;
    std::string rest_; // of the text that is read in parts
    bool begun_ = false, ended_ = false;
};

} // namespace tool
