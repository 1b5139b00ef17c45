#include "group.hpp"

#include "device.hpp"
#include "library.hpp"

#include <chrono>
#include <cstdio>
#include <cstring>
#include <dlfcn.h>
#include <nccl.h>
#include <thread>

namespace ponder::cuda {

namespace {

#define PONDER_NCCL(DO)                                                                            \
    DO(GetUniqueId)                                                                                \
    DO(CommInitRankConfig) DO(CommGetAsyncError) DO(AllReduce) DO(CommAbort) DO(CommDestroy)       \
        DO(GetErrorString)

struct Nccl {
    const char *problem = nullptr; // why it cannot be used
#define PONDER_DECLARE(name) decltype(&nccl##name) name = nullptr;
    PONDER_NCCL(PONDER_DECLARE)
#undef PONDER_DECLARE
};

Nccl load() {
    Nccl nccl;
    void *library = open_library("libnccl.so.2");
    if (!library) {
        nccl.problem = "libnccl.so.2 is not found: see LD_LIBRARY_PATH";
        return nccl;
    }
#define PONDER_FIND(name)                                                                          \
    nccl.name = reinterpret_cast<decltype(nccl.name)>(dlsym(library, "nccl" #name));               \
    if (!nccl.name)                                                                                \
        nccl.problem = "libnccl.so.2 lacks nccl" #name;
    PONDER_NCCL(PONDER_FIND)
#undef PONDER_FIND
    return nccl;
}

const Nccl &nccl() {
    static const Nccl loaded = load();
    return loaded;
}

int32_t fail(char *why, size_t size, const char *what, const char *reason) {
    std::snprintf(why, size, "%s: %s", what, reason);
    return 1;
}

class Patience {
public:
    explicit Patience(double seconds) : seconds_(seconds) {}
    bool over() const {
        const std::chrono::duration<double> since = std::chrono::steady_clock::now() - start_;
        return since.count() > seconds_;
    }

private:
    double seconds_;
    std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

// Calls on a communicator that does not block return at once; the outcome is asked for.
ncclResult_t settle(ncclComm_t group, const Patience &patience) {
    ncclResult_t state = ncclInProgress;
    while (true) {
        const ncclResult_t asked = nccl().CommGetAsyncError(group, &state);
        if (asked != ncclSuccess)
            return asked;
        if (state != ncclInProgress || patience.over())
            return state;
        std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
}

const char *reason_of(ncclResult_t state) {
    return state == ncclInProgress ? "the others did not come in time"
                                   : nccl().GetErrorString(state);
}

void abandon(ponder_device *device) {
    if (device->group)
        nccl().CommAbort(static_cast<ncclComm_t>(device->group));
    device->group = nullptr;
}

} // namespace

int32_t group_key(ponder_device *, void *key, char *why, size_t size) {
    static_assert(sizeof(ncclUniqueId) == PONDER_GROUP_KEY);
    if (nccl().problem)
        return fail(why, size, "NCCL", nccl().problem);
    ncclUniqueId id;
    if (const ncclResult_t state = nccl().GetUniqueId(&id); state != ncclSuccess)
        return fail(why, size, "ncclGetUniqueId", nccl().GetErrorString(state));
    std::memcpy(key, &id, sizeof id);
    return 0;
}

int32_t group_join(ponder_device *device, const void *key, uint32_t rank, uint32_t count,
                   double patience, char *why, size_t size) {
    if (nccl().problem)
        return fail(why, size, "NCCL", nccl().problem);
    group_leave(device);
    ncclUniqueId id;
    std::memcpy(&id, key, sizeof id);
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;
    ncclComm_t group = nullptr;
    ncclResult_t state = nccl().CommInitRankConfig(&group, int(count), id, int(rank), &config);
    device->group = group;
    if (state == ncclSuccess || state == ncclInProgress)
        state = settle(group, Patience(patience));
    if (state == ncclSuccess)
        return 0;
    abandon(device);
    return fail(why, size, "NCCL's group", reason_of(state));
}

int32_t group_sum(ponder_device *device, float *values, size_t count, double patience, char *why,
                  size_t size) {
    const auto group = static_cast<ncclComm_t>(device->group);
    if (!group)
        return fail(why, size, "NCCL's group", "not joined, or lost");
    const Patience left(patience);
    ncclResult_t state =
        nccl().AllReduce(values, values, count, ncclFloat32, ncclSum, group, device->stream);
    if (state == ncclSuccess || state == ncclInProgress)
        state = settle(group, left);
    // A process that has gone leaves the kernel waiting: then the group is taken apart.
    while (state == ncclSuccess) {
        const cudaError_t done = cudaStreamQuery(device->stream);
        if (done == cudaSuccess)
            return 0;
        if (done != cudaErrorNotReady) {
            device->check(done, "sum over the group");
            abandon(device);
            return fail(why, size, "sum over the group", cudaGetErrorString(done));
        }
        if (const ncclResult_t asked = nccl().CommGetAsyncError(group, &state);
            asked != ncclSuccess)
            state = asked;
        else if (state == ncclSuccess && left.over())
            state = ncclInProgress;
        std::this_thread::yield();
    }
    abandon(device);
    return fail(why, size, "sum over the group", reason_of(state));
}

void group_leave(ponder_device *device) {
    if (!device->group)
        return;
    const auto group = static_cast<ncclComm_t>(device->group);
    if (nccl().CommDestroy(group) == ncclInProgress)
        settle(group, Patience(5));
    device->group = nullptr;
}

} // namespace ponder::cuda
