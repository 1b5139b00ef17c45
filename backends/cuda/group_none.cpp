// Where the module was built without NCCL's header.
#include "group.hpp"

#include <cstdio>

namespace ponder::cuda {

namespace {

int32_t none(char *why, size_t size) {
    std::snprintf(why, size, "NCCL was not there when this module was built");
    return 1;
}

} // namespace

int32_t group_key(ponder_device *, void *, char *why, size_t size) { return none(why, size); }
int32_t group_join(ponder_device *, const void *, uint32_t, uint32_t, double, char *why,
                   size_t size) {
    return none(why, size);
}
int32_t group_sum(ponder_device *, float *, size_t, double, char *why, size_t size) {
    return none(why, size);
}
void group_leave(ponder_device *) {}

} // namespace ponder::cuda
