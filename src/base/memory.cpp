#include "base/memory.hpp"

#include "base/error.hpp"

#include <cstdlib>
#include <cstring>
#include <sys/mman.h>
#include <utility>

namespace ponder {

namespace {

// Large blocks ask for 2 MiB pages: a pass walks its arena in long strides, and with 4 KiB pages
// address translation costs as much as the data.
constexpr size_t huge_page = size_t(2) << 20;

void *system_allocate(size_t size, size_t alignment) {
    if (size < 2 * huge_page)
        return std::aligned_alloc(alignment, size);
    void *block = std::aligned_alloc(huge_page, (size + huge_page - 1) / huge_page * huge_page);
    if (block)
        madvise(block, size, MADV_HUGEPAGE);
    return block;
}

constexpr size_t alignment = 64;

// Before each block: its size, in a cell that keeps the alignment.
constexpr size_t header = alignment;

} // namespace

Memory::Memory(uint64_t limit, void *user_data, Allocate allocate, Release release)
    : limit_(limit), user_data_(user_data), allocate_(allocate), release_(release) {}

void *Memory::allocate(size_t size) {
    if (size > SIZE_MAX - 2 * alignment)
        throw_error(PONDER_E_NO_MEMORY, "memory: %zu bytes asked for", size);
    const size_t total = (size + alignment - 1) / alignment * alignment + header;
    const uint64_t before = in_use_.fetch_add(total, std::memory_order_relaxed);
    void *block = nullptr;
    if (limit_ == 0 || before + total <= limit_)
        block =
            allocate_ ? allocate_(user_data_, total, alignment) : system_allocate(total, alignment);
    if (!block) {
        refund(total);
        none_left(size, before);
    }
    std::memcpy(block, &total, sizeof total);
    return static_cast<std::byte *>(block) + header;
}

void Memory::charge(size_t size) {
    const uint64_t before = in_use_.fetch_add(size, std::memory_order_relaxed);
    if (limit_ != 0 && (size > limit_ || before + size > limit_)) {
        refund(size);
        none_left(size, before);
    }
}

void Memory::none_left(size_t size, uint64_t in_use) const {
    throw_error(PONDER_E_NO_MEMORY, "memory: %zu bytes wanted with %llu in use, limit %llu", size,
                static_cast<unsigned long long>(in_use), static_cast<unsigned long long>(limit_));
}

void Memory::release(void *pointer) noexcept {
    if (!pointer)
        return;
    void *block = static_cast<std::byte *>(pointer) - header;
    size_t total;
    std::memcpy(&total, block, sizeof total);
    if (release_)
        release_(user_data_, block);
    else
        std::free(block);
    in_use_.fetch_sub(total, std::memory_order_relaxed);
}

Buffer::Buffer(std::shared_ptr<Memory> memory, size_t size)
    : memory_(std::move(memory)), data_(memory_->allocate(size)), size_(size) {
    std::memset(data_, 0, size);
}

Buffer::~Buffer() {
    if (memory_)
        memory_->release(data_);
}

void Buffer::swap(Buffer &other) noexcept {
    std::swap(memory_, other.memory_);
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
}

} // namespace ponder
