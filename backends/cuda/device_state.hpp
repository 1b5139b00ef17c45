// What a device remembers from call to call.
#pragma once

#include "product.hpp"

#include <array>
#include <map>
#include <string>
#include <vector>

namespace ponder::cuda {

// bf16 copies of small f32 constants (biases), made again when the constant has changed.
struct Narrow {
    const float *from; // in device memory; null until a run has asked for it
    void *to;
    size_t count;
};
void refresh_narrow(const Run &run, const Narrow &copy);

struct DeviceState {
    explicit DeviceState(ponder_device *device) : products(device) {}

    Products products;
    std::map<const void *, Narrow> narrow; // by the constant they are copies of
    std::string problem;
    struct Range {
        const std::byte *begin, *end;
    };
    // What the last few calls wrote: a ring; see run() in module.cpp.
    std::array<std::vector<Range>, 4> recent;
    size_t next_recent = 0;

    // Conditions of the recording under way that are open, and streams for what is in them, by
    // depth; see condition.cu.
    struct Condition {
        cudaStream_t around;
        cudaGraphNode_t node;
    };
    std::vector<Condition> conditions;
    std::vector<cudaStream_t> body_streams;
};

} // namespace ponder::cuda
