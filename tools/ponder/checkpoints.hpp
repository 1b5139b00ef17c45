// A training run's folder: `step-N.ckpt` files, whose names alone say which is the latest.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace tool {

class RunFolder {
public:
    // Makes the folder and takes it for this process until the end. Throws Failure, also when
    // another process trains there.
    explicit RunFolder(const std::string &path);
    ~RunFolder();
    RunFolder(const RunFolder &) = delete;

    const std::string &path() const { return path_; }
    std::string checkpoint(uint64_t step) const;
    std::vector<uint64_t> steps() const; // of the checkpoints, ascending
    std::optional<uint64_t> latest() const;
    void keep(uint64_t newest) const; // removes older checkpoints

private:
    std::string path_;
    int lock_ = -1;
};

// Of a folder that another process may be working in.
std::optional<uint64_t> latest_checkpoint(const std::string &folder);

// Of a process that was killed: what the library was writing into the folder.
void remove_unfinished(const std::string &folder);

} // namespace tool
