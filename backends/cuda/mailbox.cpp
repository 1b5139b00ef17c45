#include "mailbox.hpp"
#include "device_state.hpp"

#include <cstring>
#include <memory>

namespace ponder::cuda {

namespace {

struct Mailbox {
    void *pinned = nullptr;
    cudaEvent_t arrived = nullptr;
    ~Mailbox() {
        if (arrived) {
            cudaEventSynchronize(arrived); // a download may be on its way
            cudaEventDestroy(arrived);
        }
        cudaFreeHost(pinned);
    }
};

int32_t result(ponder_device *device) { return device->state->problem.empty() ? 0 : 1; }

} // namespace

void *mailbox(ponder_device *, size_t size) {
    auto box = std::make_unique<Mailbox>();
    if (cudaMallocHost(&box->pinned, size) != cudaSuccess ||
        cudaEventCreateWithFlags(&box->arrived, cudaEventDisableTiming) != cudaSuccess) {
        cudaGetLastError(); // running out is no failure of the device
        return nullptr;
    }
    return box.release();
}

void drop_mailbox(ponder_device *, void *mailbox) { delete static_cast<Mailbox *>(mailbox); }

int32_t send(ponder_device *device, void *mailbox, const void *buffer, size_t size) {
    const Mailbox &box = *static_cast<Mailbox *>(mailbox);
    device->check(cudaMemcpyAsync(box.pinned, buffer, size, cudaMemcpyDeviceToHost, device->stream),
                  "send");
    device->check(cudaEventRecord(box.arrived, device->stream), "send");
    return result(device);
}

int32_t receive(ponder_device *device, void *mailbox, void *host, size_t size) {
    const Mailbox &box = *static_cast<Mailbox *>(mailbox);
    device->check(cudaEventSynchronize(box.arrived), "receive");
    if (device->state->problem.empty())
        std::memcpy(host, box.pinned, size);
    return result(device);
}

} // namespace ponder::cuda
