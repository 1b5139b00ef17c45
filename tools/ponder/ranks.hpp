// Which process of a parallel training this one is, as launchers say it in the environment, and
// what the processes that keep nothing work on.
#pragma once

#include "settings.hpp"

#include <string>

namespace tool {

// Options train.world, train.rank and train.address from torchrun's variables (WORLD_SIZE, RANK,
// MASTER_ADDR, MASTER_PORT), Open MPI's or PMI's, unless the user has set them; without an address,
// port 29500 of this machine. One GPU for each process of a machine (LOCAL_RANK): the one of that
// number among those that are visible. Throws Failure.
void join_by_environment(Settings &settings);

// A folder with links to what going on needs of a run's folder, removed at the end: for the processes
// other than the first, which alone writes there, and may be writing already. Linked is what it
// leaves alone until all have joined.
class FollowerFolder {
public:
    FollowerFolder(const std::string &run, bool resume);
    ~FollowerFolder();
    FollowerFolder(const FollowerFolder &) = delete;

    const std::string &path() const { return path_; }

private:
    std::string path_;
};

} // namespace tool
