// Packed copies of frozen weights, one per weight and layout, until the weight or the device goes.
#pragma once

#include "device.hpp"

#include <array>
#include <cstddef>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

namespace ponder::cpu {

class Packs {
public:
    explicit Packs(const ponder_backend_host &host) : host_(host) {}
    ~Packs();
    Packs(const Packs &) = delete;

    // See packed_weight. Concurrent requests wait for each other, so that nothing is packed twice.
    const void *get(const void *weight, uint64_t layout, size_t size,
                    void (*pack)(void *to, const void *context), const void *context,
                    size_t context_size);
    // Packs again what came from this weight, in place: kernels keep the addresses.
    void refresh(const void *weight) const;
    // What came from this weight, which no kernel reads any more, makes room for others.
    void forget(const void *weight);
    size_t bytes() const;

private:
    struct Pack {
        void *block = nullptr;
        size_t size = 0;
        void (*pack)(void *to, const void *context) = nullptr;
        alignas(16) std::array<std::byte, max_pack_context> context{};
    };

    // A block that nothing is in, in a list.
    struct Unused {
        Unused *next;
        size_t size;
    };

    void *allocate(size_t size);

    ponder_backend_host host_;
    mutable std::mutex mutex_;
    std::map<std::pair<const void *, uint64_t>, Pack> packs_;
    size_t bytes_ = 0;
    std::vector<void *> slabs_;
    char *free_ = nullptr; // of the last slab
    size_t left_ = 0;
    Unused *unused_ = nullptr;
};

} // namespace ponder::cpu
