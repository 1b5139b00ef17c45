#include "checkpoints.hpp"

#include "common.hpp"

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <filesystem>

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

namespace tool {

namespace fs = std::filesystem;

namespace {

std::optional<uint64_t> step_of(const std::string &name) {
    constexpr std::string_view front = "step-", back = ".ckpt";
    if (!name.starts_with(front) || !name.ends_with(back) ||
        name.size() <= front.size() + back.size())
        return std::nullopt;
    uint64_t step = 0;
    const char *end = name.data() + name.size() - back.size();
    const auto [stop, problem] = std::from_chars(name.data() + front.size(), end, step);
    return problem == std::errc() && stop == end ? std::optional(step) : std::nullopt;
}

std::vector<uint64_t> steps_in(const std::string &folder) {
    std::vector<uint64_t> steps;
    std::error_code problem;
    for (fs::directory_iterator at(folder, problem), end; !problem && at != end;
         at.increment(problem))
        if (const auto step = step_of(at->path().filename().string()))
            steps.push_back(*step);
    if (problem)
        throw Failure(exit_file, folder + ": " + problem.message());
    std::sort(steps.begin(), steps.end());
    return steps;
}

} // namespace

RunFolder::RunFolder(const std::string &path) : path_(path) {
    std::error_code problem;
    fs::create_directories(path, problem);
    lock_ = ::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (lock_ < 0)
        throw Failure(exit_file,
                      path + ": " + (problem ? problem.message() : std::strerror(errno)));
    if (flock(lock_, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK) {
        ::close(lock_);
        throw Failure(exit_file, path + ": another process trains here");
    }
}

RunFolder::~RunFolder() { ::close(lock_); }

std::string RunFolder::checkpoint(uint64_t step) const {
    return path_ + "/step-" + std::to_string(step) + ".ckpt";
}

std::vector<uint64_t> RunFolder::steps() const { return steps_in(path_); }

std::optional<uint64_t> RunFolder::latest() const { return latest_checkpoint(path_); }

std::optional<uint64_t> latest_checkpoint(const std::string &folder) {
    const std::vector<uint64_t> all = steps_in(folder);
    return all.empty() ? std::nullopt : std::optional(all.back());
}

void RunFolder::keep(uint64_t newest) const {
    const std::vector<uint64_t> all = steps();
    for (size_t i = 0; i + newest < all.size(); ++i)
        unlink(checkpoint(all[i]).c_str());
}

void remove_unfinished(const std::string &folder) {
    // NAME.PROCESS-NUMBER.tmp
    const auto temporary = [](const std::string &name) {
        const size_t end = name.size() - std::min<size_t>(name.size(), 4);
        if (name.substr(end) != ".tmp")
            return false;
        const size_t dot = name.rfind('.', end - 1);
        const std::string middle = dot == name.npos ? "" : name.substr(dot + 1, end - dot - 1);
        return middle.find('-') != middle.npos &&
               middle.find_first_not_of("0123456789-x") == middle.npos;
    };
    std::error_code problem;
    std::vector<fs::path> left;
    for (fs::directory_iterator at(folder, problem), end; !problem && at != end;
         at.increment(problem))
        if (temporary(at->path().filename().string()))
            left.push_back(at->path());
    for (const fs::path &file : left)
        fs::remove(file, problem);
}

} // namespace tool
