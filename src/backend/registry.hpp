// Backends: found, checked, and opened. The reference backend is always there.
#pragma once

#include "ponder/backend.h"

#include "base/dtype.hpp"
#include "base/memory.hpp"
#include "base/threads.hpp"

#include <algorithm>
#include <array>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace ponder {

using Log = std::function<void(int32_t level, const char *message)>;

// One backend or one candidate that could not be used.
struct Backend {
    const ponder_backend *descriptor = nullptr; // nullptr if the module did not load
    std::string name, path;
    std::string reason; // why not; empty if available
    bool available() const { return descriptor && reason.empty(); }
};

// Loads every module of the first existing folder among: `folder`, PONDER_BACKEND_PATH (not in
// set-user-id programs), beside the library, in the build tree, the configured one. Never the
// working directory. Modules stay loaded for good. Best first.
std::vector<Backend> load_backends(const std::string &folder, const Log &log);

// A backend opened for one model: its kernels see the model's weights.
class Device {
public:
    Device(const Backend &backend, std::shared_ptr<Memory> memory, std::shared_ptr<Threads> threads,
           Log log);
    ~Device();
    Device(const Device &) = delete;

    // A kernel for the call, by this backend or by the reference kernels. Where there is none:
    // PONDER_E_BACKEND if it is required, else one without owner.
    struct Kernel {
        const ponder_backend *owner = nullptr;
        ponder_plan plan{};
        Kernel(const ponder_backend *owner) : owner(owner) { plan.struct_size = sizeof plan; }
        Kernel(Kernel &&other) noexcept
            : owner(std::exchange(other.owner, nullptr)), plan(other.plan) {}
        Kernel &operator=(Kernel &&other) noexcept {
            std::swap(owner, other.owner);
            std::swap(plan, other.plan);
            return *this;
        }
        ~Kernel() {
            if (owner)
                owner->drop(plan.kernel);
        }
    };
    Kernel plan(const ponder_op_call &call, bool required = true) const;

    // The data at this constant has changed; no pass runs on it meanwhile.
    void refresh(const void *constant) const;
    // The same, where it was the device's copy that changed.
    void refresh_packed(const void *constant) const;
    // The constant goes, and no kernel that was planned with it is left. Not where the backend
    // keeps what it has packed.
    void forget(const void *constant) const noexcept;
    bool can_forget() const;

    // Memory that the device's kernels see. On the host that is the host's; elsewhere addresses
    // mean nothing here, work is queued, and only download, synchronize, mailboxes and
    // sums over a group wait for it. Any thread.
    bool on_host() const { return backend_->host_memory != 0; }
    uint32_t workers() const { return on_host() ? threads_->count() : 1; } // with a workspace each
    void *allocate(size_t size) const;                                     // PONDER_E_NO_MEMORY
    void release(void *block, size_t size) const noexcept;
    void upload(void *to, const void *from, size_t size) const;
    void download(void *to, const void *from, size_t size) const;
    void copy(void *to, const void *from, size_t size) const;
    void clear(void *block, size_t size) const;
    void synchronize() const;
    // The device's copy of a constant, made at the first request; on the host the constant itself.
    void *resident(const void *constant, size_t size) const;

    // One device in each of several processes: join with a key that one of them has made, then sum.
    // PONDER_E_BACKEND with the reason.
    using GroupKey = std::array<std::byte, PONDER_GROUP_KEY>;
    bool can_group() const { return backend_->group_join != nullptr; }
    GroupKey group_key() const;
    void group_join(const GroupKey &key, uint32_t rank, uint32_t count, double patience) const;
    void group_sum(float *values, size_t count, double patience) const;

    // Many runs under one lock, for devices that are not the host.
    class Queue {
    public:
        explicit Queue(const Device &device) : device_(device), lock_(device.mutex_) {}
        bool can_record() const { return device_.backend_->record != nullptr; }
        bool record() const { return device_.backend_->record(device_.device_) == 0; }
        void *record_end() const { return device_.backend_->record_end(device_.device_); }
        // What is recorded until end_if() is made where the flag, in the device's memory, is set.
        bool record_if(const int32_t *flag) const {
            return device_.backend_->record_if(device_.device_, flag) == 0;
        }
        bool record_end_if() const { return device_.backend_->record_end_if(device_.device_) == 0; }
        void replay(void *recording) const {
            device_.expect(device_.backend_->replay(device_.device_, recording));
        }
        void drop(void *recording) const {
            device_.backend_->drop_recording(device_.device_, recording);
        }

    private:
        const Device &device_;
        std::lock_guard<std::mutex> lock_;
    };

    // A place for a download that is waited for later, and alone.
    class Mailbox {
    public:
        Mailbox(std::shared_ptr<const Device> device, size_t size); // PONDER_E_NO_MEMORY
        Mailbox(Mailbox &&other) noexcept
            : device_(std::move(other.device_)), box_(std::exchange(other.box_, nullptr)) {}
        Mailbox &operator=(Mailbox &&) = delete;
        ~Mailbox();
        void send(const void *from, size_t size) const;
        void receive(void *to, size_t size) const;

    private:
        std::shared_ptr<const Device> device_;
        void *box_;
    };
    bool has_mailboxes() const { return backend_->mailbox != nullptr; }
    bool can_record_if() const { return backend_->record_if != nullptr; }

    const ponder_backend &backend() const { return *backend_; }
    size_t packed_bytes() const { return backend_->packed_bytes(device_); }
    const std::shared_ptr<Memory> &memory() const { return memory_; }
    Threads &threads() const { return *threads_; }

private:
    std::shared_ptr<Memory> memory_;
    std::shared_ptr<Threads> threads_;
    Log log_;
    ponder_backend_host host_{};
    const ponder_backend *backend_;
    ponder_device *device_ = nullptr;
    ponder_device *fallback_ = nullptr; // the reference backend's, for host-memory backends

    struct Resident {
        void *block;
        size_t size;
    };
    using Move = int32_t (*ponder_backend::*)(ponder_device *, void *, const void *, size_t);
    void move(Move call, void *to, const void *from, size_t size) const;
    void expect(int32_t result) const;                    // PONDER_E_BACKEND unless 0
    template <class Call> void in_group(Call call) const; // call(why, size)
    void *allocate_locked(size_t size) const;
    void count_packed() const;
    mutable size_t packed_ = 0; // bytes of a device with its own memory that are charged
    mutable std::mutex mutex_;  // one call at a time where memory is not the host's
    mutable std::map<const void *, Resident> resident_;
};

// An owned block of zeroed device memory.
class DeviceBuffer {
public:
    DeviceBuffer() = default;
    DeviceBuffer(std::shared_ptr<const Device> device, size_t size);
    DeviceBuffer(DeviceBuffer &&other) noexcept { swap(other); }
    DeviceBuffer &operator=(DeviceBuffer &&other) noexcept {
        swap(other);
        return *this;
    }
    ~DeviceBuffer() {
        if (device_)
            device_->release(data_, size_);
    }
    // An address for kernels; the host may use it where device.on_host() only.
    template <class T = std::byte> T *data() const { return static_cast<T *>(data_); }
    size_t size() const { return size_; }
    void swap(DeviceBuffer &other) noexcept {
        std::swap(device_, other.device_);
        std::swap(data_, other.data_);
        std::swap(size_, other.size_);
    }

private:
    std::shared_ptr<const Device> device_;
    void *data_ = nullptr;
    size_t size_ = 0;
};

// A vector of numbers in device memory.
template <class T> class DeviceVector {
public:
    DeviceVector() = default;
    DeviceVector(std::shared_ptr<const Device> device, size_t count)
        : device_(device), buffer_(std::move(device), std::max<size_t>(count, 1) * sizeof(T)),
          count_(count) {}
    T *data() const { return buffer_.template data<T>(); }
    size_t size() const { return count_; }
    void write(const T *from, size_t count, size_t first = 0) const {
        if (count > 0) // else there may be no device
            device_->upload(data() + first, from, count * sizeof(T));
    }
    void read(T *to, size_t count, size_t first = 0) const {
        if (count > 0)
            device_->download(to, data() + first, count * sizeof(T));
    }
    std::vector<T> values() const {
        std::vector<T> result(count_);
        read(result.data(), count_);
        return result;
    }
    void copy(const T *from, size_t count, size_t first = 0) const {
        if (count > 0)
            device_->copy(data() + first, from, count * sizeof(T));
    }
    void clear() const {
        if (count_ > 0)
            device_->clear(data(), count_ * sizeof(T));
    }
    void swap(DeviceVector &other) noexcept {
        std::swap(device_, other.device_);
        buffer_.swap(other.buffer_);
        std::swap(count_, other.count_);
    }

private:
    std::shared_ptr<const Device> device_;
    DeviceBuffer buffer_;
    size_t count_ = 0;
};

} // namespace ponder
