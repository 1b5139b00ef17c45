#include "write_file.hpp"

#include "common.hpp"

#include <cerrno>
#include <cstdio>
#include <cstring>

#include <sys/stat.h>
#include <unistd.h>

namespace tool {

void write_file(const std::string &path, std::string_view text) {
    // A temporary file and a rename, so that a full disk leaves no half page behind; things
    // that are not plain files, such as /dev/stdout, are written to directly.
    struct stat facts {};
    const bool direct = stat(path.c_str(), &facts) == 0 && !S_ISREG(facts.st_mode);
    const std::string target = direct ? path : path + ".part";
    std::FILE *file = std::fopen(target.c_str(), "wb");
    if (!file)
        throw Failure(exit_file, path + ": " + std::strerror(errno));
    bool good = std::fwrite(text.data(), 1, text.size(), file) == text.size();
    good = std::fflush(file) == 0 && good;
    if (!direct)
        good = fsync(fileno(file)) == 0 && good;
    good = std::fclose(file) == 0 && good;
    if (good && !direct)
        good = std::rename(target.c_str(), path.c_str()) == 0;
    if (good)
        return;
    const std::string why = std::strerror(errno);
    if (!direct)
        unlink(target.c_str());
    throw Failure(exit_file, path + ": " + why);
}

} // namespace tool
