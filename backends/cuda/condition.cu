#include "condition.hpp"
#include "device_state.hpp"
#include "launch.cuh"

namespace ponder::cuda {

namespace {

__global__ void set_condition(cudaGraphConditionalHandle condition, const int32_t *flag) {
    wait_for_earlier();
    cudaGraphSetConditional(condition, *flag != 0);
}

// The graph that a stream is captured into, and what its next node comes after.
struct Capture {
    cudaGraph_t graph = nullptr;
    const cudaGraphNode_t *after = nullptr;
    const cudaGraphEdgeData *edges = nullptr;
    size_t count = 0;
    cudaError_t of(cudaStream_t stream) {
        cudaStreamCaptureStatus status;
        unsigned long long id;
        const cudaError_t e =
            cudaStreamGetCaptureInfo(stream, &status, &id, &graph, &after, &edges, &count);
        return e != cudaSuccess                          ? e
               : status == cudaStreamCaptureStatusActive ? cudaSuccess
                                                         : cudaErrorStreamCaptureInvalidated;
    }
};

// The stream that captures bodies of this depth.
cudaError_t body_stream(DeviceState &state, size_t depth, cudaStream_t &stream) {
    if (depth == state.body_streams.size()) {
        if (const cudaError_t e = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
            e != cudaSuccess)
            return e;
        state.body_streams.push_back(stream);
    }
    stream = state.body_streams[depth];
    return cudaSuccess;
}

cudaError_t open_body(ponder_device *device, const int32_t *flag) {
    DeviceState &state = *device->state;
    Capture capture;
    cudaGraphConditionalHandle condition;
    if (const cudaError_t e = capture.of(device->stream); e != cudaSuccess)
        return e;
    if (const cudaError_t e = cudaGraphConditionalHandleCreate(&condition, capture.graph, 0,
                                                               cudaGraphCondAssignDefault);
        e != cudaSuccess)
        return e;
    const Launch to({nullptr, nullptr, device->stream, device}, 1, 1, 0);
    if (const cudaError_t e = cudaLaunchKernelEx(&to.config, set_condition, condition, flag);
        e != cudaSuccess)
        return e;
    if (const cudaError_t e = capture.of(device->stream); e != cudaSuccess)
        return e;
    cudaGraphNodeParams node = {};
    node.type = cudaGraphNodeTypeConditional;
    node.conditional.handle = condition;
    node.conditional.type = cudaGraphCondTypeIf;
    node.conditional.size = 1;
    DeviceState::Condition open{device->stream, nullptr};
    if (const cudaError_t e = cudaGraphAddNode(&open.node, capture.graph, capture.after,
                                               capture.edges, capture.count, &node);
        e != cudaSuccess)
        return e;
    cudaStream_t body;
    if (const cudaError_t e = body_stream(state, state.conditions.size(), body); e != cudaSuccess)
        return e;
    if (const cudaError_t e =
            cudaStreamBeginCaptureToGraph(body, node.conditional.phGraph_out[0], nullptr, nullptr,
                                          0, cudaStreamCaptureModeThreadLocal);
        e != cudaSuccess)
        return e;
    state.conditions.push_back(open);
    device->stream = body;
    return cudaSuccess;
}

cudaError_t close_body(ponder_device *device) {
    DeviceState &state = *device->state;
    cudaGraph_t body;
    const cudaError_t ended = cudaStreamEndCapture(device->stream, &body);
    const DeviceState::Condition open = state.conditions.back();
    state.conditions.pop_back();
    device->stream = open.around;
    if (ended != cudaSuccess)
        return ended;
    cudaGraphNode_t node = open.node;
    return cudaStreamUpdateCaptureDependencies(device->stream, &node, nullptr, 1,
                                               cudaStreamSetCaptureDependencies);
}

} // namespace

// Where conditions are not to be had, that is no failure of the device.
int32_t record_if(ponder_device *device, const int32_t *flag) {
    const cudaError_t e = open_body(device, flag);
    cudaGetLastError();
    return e == cudaSuccess ? 0 : 1;
}
int32_t record_end_if(ponder_device *device) {
    const cudaError_t e = close_body(device);
    cudaGetLastError();
    return e == cudaSuccess ? 0 : 1;
}
void abandon_conditions(ponder_device *device) {
    while (!device->state->conditions.empty())
        record_end_if(device);
}

} // namespace ponder::cuda
