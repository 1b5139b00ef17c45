#include "walk.hpp"

#include "common.hpp"
#include "ignore.hpp"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <sstream>

namespace tool {

namespace fs = std::filesystem;

namespace {

// A .gitignore file and where paths relative to its folder begin in a path below the walk's top.
struct Level {
    IgnoreFile rules;
    std::string folder_prefix; // of the walked path, put before it: for folders above the top
    size_t skip = 0;           // of the walked path, taken off: for folders below the top
};

class Walk {
public:
    Walk(std::vector<FileItem> &files, const std::function<void(const std::string &)> &note)
        : files_(files), note_(note) {}

    void from(const fs::path &top) {
        levels_.clear();
        add_levels_above(top);
        enter(top, "");
    }

private:
    void add_levels_above(const fs::path &top) {
        std::error_code problem;
        fs::path folder = fs::canonical(top, problem);
        if (problem)
            return;
        // Nothing above the root of a repository counts, and without one nothing above at all.
        std::vector<fs::path> above;
        for (; !fs::exists(folder / ".git", problem); folder = folder.parent_path()) {
            if (folder == folder.parent_path())
                return;
            above.push_back(folder.parent_path());
        }
        const fs::path real_top = fs::canonical(top, problem);
        for (auto outer = above.rbegin(); outer != above.rend(); ++outer)
            add_level(*outer, real_top.lexically_relative(*outer).string() + "/", 0);
    }

    bool add_level(const fs::path &folder, const std::string &prefix, size_t skip) {
        const fs::path file = folder / ".gitignore";
        std::error_code problem;
        if (!fs::is_regular_file(file, problem))
            return false;
        std::ifstream in(file, std::ios::binary);
        std::ostringstream text;
        text << in.rdbuf();
        levels_.push_back({IgnoreFile(text.str()), prefix, skip});
        return true;
    }

    bool ignored(const std::string &path, bool folder) const {
        for (auto level = levels_.rbegin(); level != levels_.rend(); ++level) {
            const IgnoreFile::Verdict verdict =
                level->rules.verdict(level->folder_prefix + path.substr(level->skip), folder);
            if (verdict != IgnoreFile::Verdict::none)
                return verdict == IgnoreFile::Verdict::ignore;
        }
        return false;
    }

    // `below`: the folder's path from the top, with a slash at its end; empty for the top.
    void enter(const fs::path &folder, const std::string &below) {
        std::error_code problem;
        fs::directory_iterator entries(folder, problem);
        std::vector<fs::directory_entry> sorted;
        for (; !problem && entries != fs::directory_iterator(); entries.increment(problem))
            sorted.push_back(*entries);
        if (problem)
            note_(folder.string() + ": " + problem.message() + "; left out");
        std::sort(sorted.begin(), sorted.end(), [](const auto &a, const auto &b) {
            return a.path().filename().native() < b.path().filename().native();
        });
        const bool level = add_level(folder, "", below.size());
        for (const fs::directory_entry &entry : sorted) {
            const std::string name = entry.path().filename().string();
            if (name == ".git")
                continue;
            std::error_code unknown;
            const fs::file_status status = entry.symlink_status(unknown);
            if (fs::is_directory(status)) {
                if (!ignored(below + name, true))
                    enter(entry.path(), below + name + "/");
            } else if (fs::is_regular_file(status) && !ignored(below + name, false)) {
                const uintmax_t size = entry.file_size(unknown);
                files_.push_back(
                    {entry.path().lexically_normal().string(), unknown ? 0 : uint64_t(size)});
            }
        }
        if (level)
            levels_.pop_back();
    }

    std::vector<FileItem> &files_;
    const std::function<void(const std::string &)> &note_;
    std::vector<Level> levels_;
};

} // namespace

std::vector<FileItem> list_files(const std::vector<std::string> &paths,
                                 const std::function<void(const std::string &)> &note) {
    std::vector<FileItem> files;
    Walk walk(files, note);
    for (const std::string &path : paths) {
        std::error_code problem;
        if (path == "-") {
            files.push_back({path, 0, true});
        } else if (const fs::file_status status = fs::status(path, problem); !fs::exists(status)) {
            throw Failure(exit_file,
                          path + ": " +
                              (problem ? problem.message() : "no such file or directory"));
        } else if (fs::is_directory(status)) {
            walk.from(path);
        } else {
            const uint64_t size = fs::is_regular_file(status) ? fs::file_size(path, problem) : 0;
            files.push_back({path, problem ? 0 : size, true});
        }
    }
    return files;
}

} // namespace tool
