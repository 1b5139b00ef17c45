#include "device_state.hpp"

namespace ponder::cuda {

void refresh_narrow(const Run &run, const Narrow &copy) {
    if (copy.from)
        convert(run, copy.from, static_cast<bf16 *>(copy.to), int64_t(copy.count));
}

bool keep_narrow(ponder_device *device, const void *constant, int64_t count) {
    auto &known = device->state->narrow;
    if (known.contains(constant))
        return true;
    void *const to = device->block(size_t(count) * sizeof(bf16));
    if (to)
        known[constant] = {nullptr, to, size_t(count)};
    return to != nullptr;
}

const bf16 *narrow(const Run &run, const void *constant, const float *from) {
    Narrow &copy = run.device->state->narrow.at(constant);
    if (!copy.from) {
        copy.from = from;
        refresh_narrow(run, copy);
    }
    return static_cast<const bf16 *>(copy.to);
}

} // namespace ponder::cuda
