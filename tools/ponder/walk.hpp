// Which files a run reads, and in which order.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace tool {

struct FileItem {
    std::string path; // "-" is standard input
    uint64_t size = 0;
    bool named = false; // by the user; the others were found below a folder
};

// Files named in `paths` are taken as they are. Of folders: every regular file below, names in
// byte order, without .git, what .gitignore files name (those of the folders above count, up to
// the repository's root), and symbolic links. Throws Failure for a path that does not exist.
std::vector<FileItem> list_files(const std::vector<std::string> &paths,
                                 const std::function<void(const std::string &)> &note);

} // namespace tool
