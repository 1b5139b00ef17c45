#include "packs.hpp"

#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

namespace ponder::cpu {

namespace {

// Small models pay for what they pack; larger ones take blocks that can lie on 2 MiB pages, since
// a pass walks through all packed weights and address translation would cost as much as the data.
constexpr size_t slab_size = size_t(4) << 20;

} // namespace

Packs::~Packs() {
    for (void *slab : slabs_)
        if (host_.allocate)
            host_.release(host_.user_data, slab);
        else
            std::free(slab);
}

// Slabs live as long as the device. Weights that go are followed by others of the same shapes (an
// adapter that was trained on), so a block is used again for its own size alone.
void *Packs::allocate(size_t size) {
    for (Unused **at = &unused_; *at; at = &(*at)->next)
        if ((*at)->size == size)
            return std::exchange(*at, (*at)->next);
    size = (size + 63) / 64 * 64;
    if (size > left_) {
        const size_t wanted = bytes_ < slab_size || size > slab_size ? size : slab_size;
        slabs_.reserve(slabs_.size() + 1);
        void *slab = host_.allocate ? host_.allocate(host_.user_data, wanted, 64)
                                    : std::aligned_alloc(64, wanted);
        if (!slab)
            return nullptr;
        slabs_.push_back(slab);
        free_ = static_cast<char *>(slab);
        left_ = wanted;
    }
    void *block = free_;
    free_ += size;
    left_ -= size;
    return block;
}

const void *Packs::get(const void *weight, uint64_t layout, size_t size,
                       void (*pack)(void *to, const void *context), const void *context,
                       size_t context_size) {
    if (context_size > max_pack_context)
        return nullptr;
    try {
        const std::lock_guard lock(mutex_);
        Pack &slot = packs_[{weight, layout}];
        if (slot.block)
            return slot.block;
        void *block = allocate(size);
        if (!block) {
            packs_.erase({weight, layout});
            return nullptr;
        }
        pack(block, context);
        slot.block = block;
        slot.size = size;
        slot.pack = pack;
        std::memcpy(slot.context.data(), context, context_size);
        bytes_ += size;
        return block;
    } catch (const std::bad_alloc &) {
        return nullptr;
    }
}

// Packing is outside the lock, so that threads can refresh several weights at once.
void Packs::refresh(const void *weight) const {
    for (uint64_t layout = 0;;) {
        const Pack *found = nullptr;
        {
            const std::lock_guard lock(mutex_);
            const auto at = packs_.lower_bound({weight, layout});
            if (at == packs_.end() || at->first.first != weight)
                return;
            layout = at->first.second + 1;
            found = &at->second; // stays where it is until the weight goes
        }
        if (found->block)
            found->pack(found->block, found->context.data());
    }
}

void Packs::forget(const void *weight) {
    const std::lock_guard lock(mutex_);
    auto at = packs_.lower_bound({weight, 0});
    while (at != packs_.end() && at->first.first == weight) {
        if (at->second.block) { // else there was no memory for it
            unused_ = new (at->second.block) Unused{unused_, at->second.size};
            bytes_ -= at->second.size;
        }
        at = packs_.erase(at);
    }
}

size_t Packs::bytes() const {
    const std::lock_guard lock(mutex_);
    return bytes_;
}

} // namespace ponder::cpu
