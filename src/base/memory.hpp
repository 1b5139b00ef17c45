// Memory for tensors: through the host's allocator, counted, under a limit.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>

namespace ponder {

class Memory {
public:
    using Allocate = void *(*)(void *user_data, size_t size, size_t alignment);
    using Release = void (*)(void *user_data, void *block);

    Memory(uint64_t limit, void *user_data, Allocate allocate, Release release);
    // 64-byte aligned; PONDER_E_NO_MEMORY above the limit or when the allocator gives none.
    void *allocate(size_t size);
    void release(void *block) noexcept;
    // Counts memory that comes from elsewhere, a device's; the same limit holds for it.
    void charge(size_t size);
    void refund(size_t size) noexcept { in_use_.fetch_sub(size, std::memory_order_relaxed); }
    uint64_t in_use() const { return in_use_.load(std::memory_order_relaxed); }

private:
    [[noreturn]] void none_left(size_t size, uint64_t in_use) const;

    const uint64_t limit_;
    void *const user_data_;
    const Allocate allocate_;
    const Release release_;
    std::atomic<uint64_t> in_use_{0};
};

// An owned block of zeroed memory.
class Buffer {
public:
    Buffer() = default;
    Buffer(std::shared_ptr<Memory> memory, size_t size);
    Buffer(Buffer &&other) noexcept { swap(other); }
    Buffer &operator=(Buffer &&other) noexcept {
        swap(other);
        return *this;
    }
    ~Buffer();

    template <class T = std::byte> T *data() const { return static_cast<T *>(data_); }
    size_t size() const { return size_; }
    void swap(Buffer &other) noexcept;

private:
    std::shared_ptr<Memory> memory_;
    void *data_ = nullptr;
    size_t size_ = 0;
};

} // namespace ponder
