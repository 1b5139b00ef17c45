// A device stays on the GPU that it was opened on, whatever thread calls and has chosen.
#pragma once

#include "device.hpp"

namespace ponder::cuda {

// Of the calling thread.
inline int current_gpu() {
    int id = 0;
    cudaGetDevice(&id);
    return id;
}

class OnGpu {
public:
    explicit OnGpu(const ponder_device *device) : before_(current_gpu()), id_(device->id) {
        if (before_ != id_)
            cudaSetDevice(id_);
    }
    ~OnGpu() {
        if (before_ != id_)
            cudaSetDevice(before_);
    }
    OnGpu(const OnGpu &) = delete;

private:
    const int before_, id_;
};

// A function of the module's descriptor, called on the device's GPU.
template <auto F> struct Entry;
template <class R, class... A, R (*F)(ponder_device *, A...)> struct Entry<F> {
    static R call(ponder_device *device, A... a) {
        const OnGpu here(device);
        return F(device, a...);
    }
};
template <auto F> constexpr auto on_gpu = &Entry<F>::call;

} // namespace ponder::cuda
