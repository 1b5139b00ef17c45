// The fibers (x86-64, System V), and the calls of the runtime library that the module makes.
#include "emulated.hpp"
#include "blas.hpp"
#include "ttt_scan.hpp"
extern "C" void ponder_switch_stack(void **from, void *to);
asm(R"(
.text
.globl ponder_switch_stack
ponder_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
namespace emu {
Block *block;
Thread *thread;
dim3 bidx, bdim, gdim;
static void *scheduler;
void yield() { ponder_switch_stack(&thread->sp, scheduler); }
static void entry() {
    (*block->body)();
    thread->done = true;
    yield();
    std::abort();
}
void run_block(Block &b) {
    constexpr size_t size = 64 * 1024;
    static std::vector<std::unique_ptr<unsigned char[]>> stacks;
    while (stacks.size() < b.threads.size())
        stacks.push_back(std::make_unique_for_overwrite<unsigned char[]>(size));
    block = &b;
    for (size_t i = 0; i < b.threads.size(); ++i) {
        Thread &t = b.threads[i];
        t.id = unsigned(i);
        b.warps[i / 32].live++;
        auto top = (reinterpret_cast<uintptr_t>(stacks[i].get()) + size) & ~uintptr_t(15);
        void **sp = reinterpret_cast<void **>(top);
        *--sp = nullptr;
        *--sp = reinterpret_cast<void *>(entry);
        sp -= 6;
        std::fill_n(sp, 6, nullptr);
        t.sp = sp;
    }
    for (size_t left = b.threads.size(); left > 0;)
        for (Thread &t : b.threads) {
            if (t.done)
                continue;
            thread = &t;
            ponder_switch_stack(&scheduler, t.sp);
            left -= t.done;
        }
}
void launch(const Config &c, const std::function<void()> &body) {
    bdim = c.block;
    gdim = c.grid;
    for (unsigned z = 0; z < c.grid.z; ++z)
        for (unsigned y = 0; y < c.grid.y; ++y)
            for (unsigned x = 0; x < c.grid.x; ++x) {
                bidx = dim3(x, y, z);
                Block b;
                const unsigned n = c.block.x * c.block.y * c.block.z;
                b.threads.resize(n);
                b.warps.resize((n + 31) / 32);
                b.shared.assign(c.shared + 256, 0xff);
                b.body = &body;
                run_block(b);
            }
}
} // namespace emu
#define OK                                                                                         \
    { return cudaSuccess; }
extern "C" {
cudaError_t cudaStreamSynchronize(cudaStream_t) OK cudaError_t
    cudaStreamDestroy(cudaStream_t) OK cudaError_t cudaFreeAsync(void *p, cudaStream_t) {
    std::free(p);
    return cudaSuccess;
}
cudaError_t cudaFreeHost(void *p) {
    std::free(p);
    return cudaSuccess;
}
cudaError_t cudaMemPoolDestroy(cudaMemPool_t) OK cudaError_t cudaGetDeviceCount(int *n) {
    *n = 1;
    return cudaSuccess;
}
cudaError_t cudaGetLastError() OK const char *cudaGetErrorString(cudaError_t) { return "emulated"; }
cudaError_t cudaDeviceGetAttribute(int *v, cudaDeviceAttr, int) {
    *v = 8;
    return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int) {
    std::memset(p, 0, sizeof *p);
    std::strcpy(p->name, "emulated");
    return cudaSuccess;
}
cudaError_t cudaGetDevice(int *d) {
    *d = 0;
    return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned) {
    *s = reinterpret_cast<cudaStream_t>(8);
    return cudaSuccess;
}
cudaError_t cudaMemPoolCreate(cudaMemPool_t *p, const cudaMemPoolProps *) {
    *p = nullptr;
    return cudaSuccess;
}
cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void *) OK cudaError_t
    cudaMallocHost(void **p, size_t n) {
    *p = std::malloc(n);
    return cudaSuccess;
}
cudaError_t cudaMallocFromPoolAsync(void **p, size_t n, cudaMemPool_t, cudaStream_t) {
    *p = std::aligned_alloc(256, (n + 255) / 256 * 256);
    std::memset(*p, 0xff, n);
    return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void *a, const void *b, size_t n, cudaMemcpyKind, cudaStream_t) {
    std::memmove(a, b, n);
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void *a, int v, size_t n, cudaStream_t) {
    std::memset(a, v, n);
    return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void *, cudaFuncAttribute, int) OK cudaError_t
    cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) {
    return cudaErrorUnknown;
}
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t *) OK cudaError_t
    cudaGraphInstantiate(cudaGraphExec_t *, cudaGraph_t, unsigned long long) OK cudaError_t
    cudaGraphDestroy(cudaGraph_t) OK cudaError_t
    cudaGraphLaunch(cudaGraphExec_t, cudaStream_t) OK cudaError_t
    cudaGraphExecDestroy(cudaGraphExec_t) OK cudaError_t
    cudaEventCreate(cudaEvent_t *) OK cudaError_t
    cudaEventRecord(cudaEvent_t, cudaStream_t) OK cudaError_t
    cudaEventSynchronize(cudaEvent_t) OK cudaError_t cudaEventDestroy(cudaEvent_t) OK cudaError_t
    cudaEventElapsedTime(float *, cudaEvent_t, cudaEvent_t) OK void *dlopen(const char *, int) {
    static int x;
    return &x;
}
int dlclose(void *) { return 0; }
}
namespace ponder::cuda {
const Blas &blas() {
    static const Blas b = [] {
        Blas b;
        b.Create = [](cublasLtHandle_t *) { return CUBLAS_STATUS_SUCCESS; };
        b.Destroy = [](cublasLtHandle_t) { return CUBLAS_STATUS_SUCCESS; };
        b.MatmulDescCreate = [](cublasLtMatmulDesc_t *, cublasComputeType_t, cudaDataType_t) {
            return CUBLAS_STATUS_NOT_SUPPORTED;
        };
        return b;
    }();
    return b;
}
const char *ttt_linear_misses(const TttLinearShape &) { return "emulated"; }
const char *ttt_linear_vjp_misses(const TttLinearShape &) { return "emulated"; }
const char *ttt_mlp_misses(const TttMlpShape &) { return "emulated"; }
size_t ttt_linear_workspace(const TttLinearShape &) { return 0; }
size_t ttt_linear_vjp_workspace(const TttLinearShape &, bool) { return 0; }
size_t ttt_mlp_workspace(const TttMlpShape &) { return 0; }
cudaError_t ttt_linear(const TttLinearShape &, const TttLinearForward &, void *, unsigned *,
                       cudaStream_t) OK cudaError_t
    ttt_linear_vjp(const TttLinearShape &, const TttLinearBackward &, void *,
                   cudaStream_t) OK cudaError_t
    ttt_mlp(const TttMlpShape &, const TttMlpForward &, void *, unsigned *, cudaStream_t) OK
} // namespace ponder::cuda
#include "cross_entropy.hpp"
namespace ponder::cuda {
bool head_losses_fit(const ponder_device &, int64_t, int64_t, int64_t) { return false; }
size_t head_losses_workspace(int64_t, int64_t) { return 0; }
void head_losses(const Run &, const bf16 *, const bf16 *, const int32_t *, float *, float *, bf16 *,
                 float *, int64_t, int64_t, int64_t) {}
} // namespace ponder::cuda
#include "attention_sm90.hpp"
#include "lora_linear.hpp"
namespace ponder::cuda {
bool attention_fits(const ponder_device &, int64_t, int64_t, int64_t, int64_t) { return false; }
void attention_tiles(const Run &, const bf16 *, bf16 *, float *, int64_t, int64_t, int64_t) {}
bool attention_gradients_fit(const ponder_device &, int64_t, int64_t, int64_t, int64_t) {
    return false;
}
void attention_gradients(const Run &, const bf16 *, const float *, const float *, const bf16 *,
                         bf16 *, int64_t, int64_t, int64_t) {}
template <bool back, class X, class Y>
void prepare_clusters(const Run &, const Prepare<X, Y> &, int64_t) {}
template void prepare_clusters<false>(const Run &, const Prepare<bf16, bf16> &, int64_t);
template void prepare_clusters<false>(const Run &, const Prepare<bf16, float> &, int64_t);
template void prepare_clusters<true>(const Run &, const Prepare<bf16, bf16> &, int64_t);
template void prepare_clusters<true>(const Run &, const Prepare<float, bf16> &, int64_t);
} // namespace ponder::cuda
