// The module's descriptor. The runtime library is linked in and opens the driver when it is first
// used, so the module loads on machines without one and says what is missing.
#include "blas.hpp"
#include "condition.hpp"
#include "device_state.hpp"
#include "group.hpp"
#include "mailbox.hpp"
#include "on_gpu.hpp"
#include "ops.hpp"
#include "pools.hpp"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>

ponder_device::ponder_device() : state(new ponder::cuda::DeviceState(this)) {}

ponder_device::~ponder_device() {
    if (stream)
        cudaStreamSynchronize(stream);
    ponder::cuda::group_leave(this);
    for (const auto &[constant, copy] : state->narrow)
        cudaFreeAsync(copy.to, stream);
    for (const cudaStream_t body : state->body_streams)
        cudaStreamDestroy(body);
    delete state;
    if (blas)
        ponder::cuda::blas().Destroy(blas);
    if (tickets)
        cudaFreeAsync(tickets, stream);
    if (staging)
        cudaFreeHost(staging);
    if (stream) {
        cudaStreamSynchronize(stream);
        cudaStreamDestroy(stream);
    }
    if (pool) {
        ponder::cuda::remove_pool(pool);
        cudaMemPoolDestroy(pool);
    }
}

ponder::cuda::Products &ponder_device::products() const { return state->products; }

bool ponder_device::settled(const void *from, size_t bytes) const {
    const std::byte *const begin = static_cast<const std::byte *>(from), *const end = begin + bytes;
    for (const auto &call : state->recent)
        for (const auto &written : call)
            if (written.begin < end && begin < written.end)
                return false;
    return true;
}

bool ponder_device::check(cudaError_t status, const char *what) {
    if (status != cudaSuccess && state->problem.empty())
        state->problem = std::string(what) + ": " + cudaGetErrorString(status);
    return status == cudaSuccess;
}
void ponder_device::fail(const char *what) {
    if (state->problem.empty())
        state->problem = what;
}

namespace ponder::cuda {

namespace {

// A kernel, and which of its buffers it writes.
struct Planned {
    std::unique_ptr<Kernel> kernel;
    ponder_device *device;
    struct Output {
        size_t buffer, bytes;
    };
    std::vector<Output> outputs;
};

struct Named {
    const char *name;
    Planner plan;
};

constexpr Named ops[] = {
    {"embedding", plan_embedding},
    {"embedding_at", plan_embedding_at},
    {"layer_norm", plan_layer_norm},
    {"layer_norm_vjp", plan_layer_norm_vjp},
    {"layer_norm_gated", plan_layer_norm_gated},
    {"layer_norm_vjp_copy", plan_layer_norm_vjp},
    {"linear", plan_linear},
    {"linear_gelu", plan_linear_gelu},
    {"linear_group", plan_linear_group},
    {"lora_linear", plan_lora_linear},
    {"lora_linear_vjp", plan_lora_linear_vjp},
    {"lora_linear_gelu", plan_lora_linear_gelu},
    {"lora_linear_vjp_gelu", plan_lora_linear_vjp_gelu},
    {"lora_linear_vjp_narrow", plan_lora_linear_vjp_narrow},
    {"gelu", plan_gelu},
    {"gelu_vjp", plan_gelu_vjp},
    {"sigmoid", plan_sigmoid},
    {"slice_rows", plan_slice_rows},
    {"slice_rows_vjp", plan_slice_rows_vjp},
    {"cross_entropy", plan_cross_entropy},
    {"cross_entropy_vjp", plan_cross_entropy_vjp},
    {"cross_entropy_parts", plan_cross_entropy_parts},
    {"cross_entropy_parts_vjp", plan_cross_entropy_parts_vjp},
    {"attention", plan_attention},
    {"attention_vjp", plan_attention_vjp},
    {"attention_cached", plan_attention_cached},
    {"keep_rows", plan_keep_rows},
    {"conv1d", plan_conv1d},
    {"conv1d_rope", plan_conv1d_rope},
    {"rope", plan_rope},
    {"ttt_linear", plan_ttt_linear},
    {"ttt_mlp", plan_ttt_mlp},
    {"mean", plan_mean},
    {"mean_vjp", plan_mean_vjp},
    {"fill", plan_fill},
    {"matmul_tn", plan_matmul_tn},
    {"matmul_tn_group", plan_matmul_tn_group},
    {"norm", plan_norm},
    {"adam", plan_adam},
    {"sgd", plan_sgd},
    {"adam_vjp", plan_adam_vjp},
    {"sgd_vjp", plan_sgd_vjp},
    {"adamw", plan_adamw},
    {"gate", plan_gate},
    {"commit", plan_commit},
    {"embedding_vjp", plan_embedding_vjp},
    {"layer_norm_vjp_weight", plan_layer_norm_vjp_weight},
    {"matmul_tn_sum", plan_matmul_tn_sum},
    {"cross_entropy_vjp_table", plan_cross_entropy_vjp_table},
    {"dropout", plan_dropout},
    {"conv1d_vjp", plan_conv1d_vjp},
    {"ttt_linear_vjp", plan_ttt_linear_vjp},
    {"ttt_mlp_vjp", plan_ttt_mlp_vjp},
    {"add", plan_add},
    {"sub", plan_sub},
    {"mul", plan_mul},
    {"broadcast", plan_broadcast},
    {"affine", plan_affine},
    {"power", plan_power},
    {"exp", plan_exp},
    {"relu", plan_relu},
    {"step", plan_step},
    {"gelu_derivative", plan_gelu_derivative},
    {"softmax", plan_softmax},
    {"log_sum_exp", plan_log_sum_exp},
    {"sum_last", plan_sum_last},
    {"pick", plan_pick},
    {"pick_vjp", plan_pick_vjp},
    {"sum_to", plan_sum_to},
    {"matmul", plan_matmul},
    {"reshape", plan_reshape},
    {"split_heads", plan_split_heads},
    {"merge_heads", plan_merge_heads},
};

int32_t no(char *why, size_t size, const char *text) {
    if (why && size)
        std::snprintf(why, size, "%s", text);
    return 0;
}

int32_t probe(char *why, size_t size) {
    void *driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!driver)
        return no(why, size, "no device: libcuda.so.1, the driver's library, is not here");
    dlclose(driver);
    int count = 0;
    if (const cudaError_t status = cudaGetDeviceCount(&count);
        status != cudaSuccess || count == 0) {
        cudaGetLastError();
        char text[200];
        std::snprintf(text, sizeof text, "no device: %s",
                      status != cudaSuccess ? cudaGetErrorString(status) : "the driver has none");
        return no(why, size, text);
    }
    int major = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, current_gpu());
    if (major < 8)
        return no(why, size, "no device: compute capability 8.0 or more is needed");
    return 1;
}

const char *isa() {
    static const std::string name = [] {
        cudaDeviceProp properties;
        if (cudaGetDeviceProperties(&properties, current_gpu()) != cudaSuccess)
            return std::string("none");
        char text[320];
        std::snprintf(text, sizeof text, "sm_%d%d (%s)", properties.major, properties.minor,
                      properties.name);
        return std::string(text);
    }();
    return name.c_str();
}

int32_t supports(int32_t dtype) { return dtype == PONDER_DTYPE_F32 || dtype == PONDER_DTYPE_BF16; }

ponder_device *open(const ponder_backend_host *host, char *why, size_t size) {
    auto device = std::make_unique<ponder_device>();
    if (host)
        std::memcpy(&device->host, host, std::min<size_t>(host->struct_size, sizeof *host));
    const int id = current_gpu();
    device->id = id;
    cudaDeviceGetAttribute(&device->processors, cudaDevAttrMultiProcessorCount, id);
    cudaDeviceGetAttribute(&device->major, cudaDevAttrComputeCapabilityMajor, id);
    cudaDeviceGetAttribute(&device->shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, id);
    const char *tf32 = std::getenv("PONDER_CUDA_TF32");
    device->tf32 = tf32 && tf32[0] == '1';
    cudaMemPoolProps properties = {};
    properties.allocType = cudaMemAllocationTypePinned;
    properties.location = {cudaMemLocationTypeDevice, id};
    uint64_t keep = UINT64_MAX; // freed memory stays in the pool
    bool ok =
        device->check(cudaStreamCreateWithFlags(&device->stream, cudaStreamNonBlocking), "stream");
    ok = ok && device->check(cudaMemPoolCreate(&device->pool, &properties), "memory pool");
    if (ok)
        add_pool(device->pool);
    ok = ok && device->check(
                   cudaMemPoolSetAttribute(device->pool, cudaMemPoolAttrReleaseThreshold, &keep),
                   "memory pool");
    ok = ok && device->check(cudaMallocHost(&device->staging, ponder_device::staging_size),
                             "pinned memory");
    constexpr size_t ticket_bytes = ponder_device::most_tickets * sizeof(unsigned);
    void *tickets = nullptr;
    ok = ok && device->check(
                   cudaMallocFromPoolAsync(&tickets, ticket_bytes, device->pool, device->stream),
                   "memory");
    device->tickets = static_cast<unsigned *>(tickets);
    ok = ok && device->check(cudaMemsetAsync(tickets, 0, ticket_bytes, device->stream), "memory");
    if (ok && (blas().problem || blas().Create(&device->blas) != CUBLAS_STATUS_SUCCESS)) {
        device->fail(blas().problem ? blas().problem : "cublasLtCreate failed");
        ok = false;
    }
    if (!ok) {
        no(why, size, device->state->problem.c_str());
        return nullptr;
    }
    return device.release();
}

void close(ponder_device *device) { delete device; }

void *allocate(ponder_device *device, size_t size) {
    const size_t slack = ponder_device::slack(size);
    void *const block = device->block(std::max<size_t>(size + slack, 1)); // null is "none left"
    if (block)
        device->check(
            cudaMemsetAsync(static_cast<std::byte *>(block) + size, 0, slack, device->stream),
            "clear");
    return block;
}

void release(ponder_device *device, void *buffer) {
    device->check(cudaFreeAsync(buffer, device->stream), "release");
}

int32_t result(ponder_device *device) { return device->state->problem.empty() ? 0 : 1; }

int32_t upload(ponder_device *device, void *buffer, const void *host, size_t size) {
    device->check(cudaMemcpyAsync(buffer, host, size, cudaMemcpyHostToDevice, device->stream),
                  "upload");
    return result(device);
}

// Small ones through pinned memory, which the driver reads without a detour.
int32_t download(ponder_device *device, void *host, const void *buffer, size_t size) {
    const bool small = size <= ponder_device::staging_size;
    device->check(cudaMemcpyAsync(small ? device->staging : host, buffer, size,
                                  cudaMemcpyDeviceToHost, device->stream),
                  "download");
    device->check(cudaStreamSynchronize(device->stream), "download");
    if (small && device->state->problem.empty())
        std::memcpy(host, device->staging, size);
    return result(device);
}

int32_t copy(ponder_device *device, void *to, const void *from, size_t size) {
    device->check(cudaMemcpyAsync(to, from, size, cudaMemcpyDeviceToDevice, device->stream),
                  "copy");
    return result(device);
}

int32_t clear(ponder_device *device, void *buffer, size_t size) {
    device->check(cudaMemsetAsync(buffer, 0, size, device->stream), "clear");
    return result(device);
}

int32_t synchronize(ponder_device *device) {
    device->check(cudaStreamSynchronize(device->stream), "synchronize");
    return result(device);
}

const char *problem(ponder_device *device) {
    return device->state->problem.empty() ? nullptr : device->state->problem.c_str();
}

int32_t record(ponder_device *device) {
    const char *wanted = std::getenv("PONDER_CUDA_GRAPHS"); // 0: for profilers
    if (wanted && wanted[0] == '0')
        return 1;
    const cudaError_t e = cudaStreamBeginCapture(device->stream, cudaStreamCaptureModeThreadLocal);
    cudaGetLastError(); // no failure of the device
    return e == cudaSuccess ? 0 : 1;
}

void *record_end(ponder_device *device) {
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t recording = nullptr;
    abandon_conditions(device);
    if (cudaStreamEndCapture(device->stream, &graph) == cudaSuccess && graph)
        if (cudaGraphInstantiate(&recording, graph, 0) != cudaSuccess)
            recording = nullptr;
    if (graph)
        cudaGraphDestroy(graph);
    cudaGetLastError();
    return recording;
}

int32_t replay(ponder_device *device, void *recording) {
    device->check(cudaGraphLaunch(static_cast<cudaGraphExec_t>(recording), device->stream),
                  "replay");
    return result(device);
}

void drop_recording(ponder_device *, void *recording) {
    cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(recording));
}

int32_t plan(ponder_device *device, const ponder_op_call *op, ponder_plan *out, char *why,
             size_t size) {
    if (op->version != 1)
        return PONDER_PLAN_NONE;
    for (uint32_t i = 0; i < op->n_in + op->n_out; ++i)
        if (op->tensor[i].dtype == PONDER_DTYPE_F64)
            return PONDER_PLAN_NONE;
    for (const Named &named : ops)
        if (std::strcmp(named.name, op->op) == 0)
            return named.plan({op, device, out, why, size});
    return PONDER_PLAN_NONE;
}

void run(void *kernel, void *const *buffers, void *workspace, uint32_t) {
    const Planned &planned = *static_cast<const Planned *>(kernel);
    ponder_device *const device = planned.device;
    const OnGpu here(device);
    planned.kernel->run({buffers, static_cast<std::byte *>(workspace), device->stream, device});
    device->check(cudaGetLastError(), "kernel");
    DeviceState &state = *device->state;
    auto &written = state.recent[state.next_recent++ % state.recent.size()];
    written.clear();
    for (const Planned::Output &output : planned.outputs) {
        const std::byte *const begin = static_cast<const std::byte *>(buffers[output.buffer]);
        written.push_back({begin, begin + output.bytes});
    }
}

void drop(void *kernel) { delete static_cast<Planned *>(kernel); }

size_t packed_bytes(ponder_device *device) {
    size_t bytes = 0;
    for (const auto &[constant, copy] : device->state->narrow)
        bytes += copy.count * sizeof(bf16);
    return bytes;
}

void refresh(ponder_device *device, const void *constant) {
    if (const auto at = device->state->narrow.find(constant); at != device->state->narrow.end())
        refresh_narrow({nullptr, nullptr, device->stream, device}, at->second);
}

void forget(ponder_device *device, const void *constant) {
    const auto at = device->state->narrow.find(constant);
    if (at == device->state->narrow.end())
        return;
    device->check(cudaFreeAsync(at->second.to, device->stream), "memory of a bias");
    device->state->narrow.erase(at);
}

constexpr ponder_backend descriptor = {
    .struct_size = sizeof(ponder_backend),
    .abi = PONDER_BACKEND_ABI,
    .name = "cuda",
    .version = PONDER_CUDA_VERSION,
    .priority = 20,
    .host_memory = 0,
    .probe = probe,
    .isa = isa,
    .supports = supports,
    .open = open,
    .close = on_gpu<close>,
    .allocate = on_gpu<allocate>,
    .release = on_gpu<release>,
    .upload = on_gpu<upload>,
    .download = on_gpu<download>,
    .plan = on_gpu<plan>,
    .run = run,
    .drop = drop,
    .packed_bytes = packed_bytes,
    .refresh = on_gpu<refresh>,
    .copy = on_gpu<copy>,
    .clear = on_gpu<clear>,
    .synchronize = on_gpu<synchronize>,
    .problem = problem,
    .record = on_gpu<record>,
    .record_end = on_gpu<record_end>,
    .replay = on_gpu<replay>,
    .drop_recording = on_gpu<drop_recording>,
    .group_key = on_gpu<group_key>,
    .group_join = on_gpu<group_join>,
    .group_sum = on_gpu<group_sum>,
    .record_if = on_gpu<record_if>,
    .record_end_if = on_gpu<record_end_if>,
    .mailbox = on_gpu<mailbox>,
    .drop_mailbox = on_gpu<drop_mailbox>,
    .send = on_gpu<send>,
    .receive = on_gpu<receive>,
    .forget = on_gpu<forget>,
};

} // namespace

int32_t Call::no_memory(const char *purpose) const {
    no(why, why_size, purpose);
    return PONDER_PLAN_NO_MEMORY;
}

int32_t Call::planned(size_t workspace, Kernel *kernel) const {
    auto planned = std::make_unique<Planned>(std::unique_ptr<Kernel>(kernel), device);
    for (size_t i = out(0); i < op->n_in + op->n_out; ++i)
        if (has(i))
            planned->outputs.push_back({i, size_t(count(i)) * size_of(type(i))});
    plan->tasks = 1;
    plan->tiling = PONDER_TILE_WHOLE;
    plan->workspace = (workspace + 255) / 256 * 256;
    plan->kernel = planned.release();
    return PONDER_PLAN_OK;
}

} // namespace ponder::cuda

extern "C" __attribute__((visibility("default"))) const ponder_backend *ponder_backend_query_v1() {
    return &ponder::cuda::descriptor;
}
