#include "packs.hpp"

#include <cstdlib>
#include <new>

namespace ponder::cpu {

Packs::~Packs() {
    for (const auto &entry : packs_)
        release(entry.second);
}

void *Packs::allocate(size_t size) const {
    size = (size + 63) / 64 * 64;
    return host_.allocate ? host_.allocate(host_.user_data, size, 64)
                          : std::aligned_alloc(64, size);
}

void Packs::release(void *block) const {
    if (host_.allocate)
        host_.release(host_.user_data, block);
    else
        std::free(block);
}

const void *Packs::get(const void *weight, uint64_t layout, size_t size,
                       void (*pack)(void *to, const void *context), const void *context) {
    try {
        const std::lock_guard lock(mutex_);
        void *&slot = packs_[{weight, layout}];
        if (slot)
            return slot;
        void *block = allocate(size);
        if (!block) {
            packs_.erase({weight, layout});
            return nullptr;
        }
        pack(block, context);
        slot = block;
        bytes_ += size;
        return slot;
    } catch (const std::bad_alloc &) {
        return nullptr;
    }
}

size_t Packs::bytes() const {
    const std::lock_guard lock(mutex_);
    return bytes_;
}

} // namespace ponder::cpu
