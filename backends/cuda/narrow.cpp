#include "device_state.hpp"

namespace ponder::cuda {

void refresh_narrow(const Run &run, const Narrow &copy) {
    convert(run, copy.from, static_cast<bf16 *>(copy.to), int64_t(copy.count));
}

const bf16 *narrow(const Run &run, const void *constant, const float *from, int64_t count) {
    Narrow &copy = run.device->state->narrow[constant];
    if (!copy.to) {
        if (!run.device->check(cudaMallocFromPoolAsync(&copy.to, size_t(count) * sizeof(bf16),
                                                       run.device->pool, run.stream),
                               "memory of a bias"))
            return nullptr;
        copy.from = from;
        copy.count = size_t(count);
        refresh_narrow(run, copy);
    }
    return static_cast<const bf16 *>(copy.to);
}

} // namespace ponder::cuda
