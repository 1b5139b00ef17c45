// What a training step reads: the units of a split, and the order in which they come.
#pragma once

#include "token_cache.hpp"

#include <memory>
#include <vector>

namespace tool {

// Runs of one or several caches.
class DataSplit {
public:
    void add(const TokenCache &cache, const TokenCache::Run &run) {
        parts_.push_back({&cache, run.package, run.first, run.count});
        tokens_ += run.count;
    }
    struct Part {
        const TokenCache *cache;
        std::string_view package;
        uint64_t first, count;
        void read(uint64_t at, uint64_t n, std::vector<int32_t> &to) const {
            cache->read(first + at, n, to);
        }
    };
    const std::vector<Part> &parts() const { return parts_; }
    uint64_t tokens() const { return tokens_; }

private:
    std::vector<Part> parts_;
    uint64_t tokens_ = 0;
};

// True for about `share` of all package names; a package is always on the same side.
bool held_out(std::string_view package, double share);

class Units {
public:
    virtual ~Units() = default;
    virtual uint64_t count() const = 0;
    virtual void read(uint64_t unit, std::vector<int32_t> &to) const = 0; // appends
};

// Adapters and gates: packages cut into pieces of about the same length, 2 .. most whole chunks.
std::unique_ptr<Units> make_pieces(const DataSplit &split, uint64_t chunk, uint64_t most);
// Backbones: the split as one row of ids, cut into windows of context + 1 that share one id with
// the window before, so that every id but the first is predicted once.
std::unique_ptr<Units> make_windows(const DataSplit &split, uint64_t context);

// An endless row of units: a new permutation for every round through them. Depends on count and
// seed alone, so that a position is all that has to be kept.
class Order {
public:
    Order(uint64_t count, uint64_t seed);
    uint64_t unit(uint64_t position);

private:
    uint64_t seed_;
    uint64_t round_ = UINT64_MAX;
    std::vector<uint32_t> permutation_;
};

} // namespace tool
