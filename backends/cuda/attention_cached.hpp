// The kernels of attention_cached for shapes that they are good at; the file of each says which.
#pragma once

#include "kernel.hpp"

namespace ponder::cuda {

struct CachedShape {
    int64_t streams, tokens, heads, places, d;
    int32_t type;
    explicit CachedShape(const Call &call)
        : streams(call.dim(0, 0)), tokens(call.dim(0, 1)), heads(call.dim(2, 1)),
          places(call.dim(2, 2)), d(call.dim(2, 3)), type(call.type(0)) {}
};

// Attends, and adds the new rows to the caches. How the keys are cut follows from the shape alone.
class FewTokens {
public:
    static bool fit(const CachedShape &shape);
    FewTokens(const CachedShape &shape, const ponder_device &device);
    size_t workspace() const;
    void run(const Run &run) const;

private:
    CachedShape shape_;
    int64_t span_, parts_; // rows of a part of a cache, and how many parts there are
};

// Attends over caches that hold the new rows.
bool many_tokens_fit(const CachedShape &shape);
void attend_many_tokens(const Run &run, const CachedShape &shape);

} // namespace ponder::cuda
