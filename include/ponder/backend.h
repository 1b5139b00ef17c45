/* ponder/backend.h - what a backend module implements. C99.
 *
 * This is the extension tier: its layout is promised only within one minor
 * version. Applications never need it; they use ponder/ponder.h.
 *
 * A module is a shared library that exports one function,
 *
 *     const ponder_backend *ponder_backend_query_v1(void);
 *
 * which returns a constant descriptor and does nothing else: no CPU feature
 * beyond the baseline may be used before `probe` has said yes. Everything after
 * that goes through the descriptor. The core never unloads a module.
 *
 * A model opens one device. Each op call of a recorded pass is offered to the
 * device by name, version, dtypes and shapes; the device answers with a planned
 * kernel or with PONDER_PLAN_NONE. A CPU device may leave calls to the reference
 * kernels in the core; a device with its own memory may not.
 *
 * Growth: ops are found by name and version, so adding an op changes no struct.
 * Structs grow at the end only and start with their size; a module with memory of its own has to be
 * built with this header, others may be older.
 */
#ifndef PONDER_BACKEND_H
#define PONDER_BACKEND_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define PONDER_BACKEND_ABI 1
#define PONDER_MAX_RANK 4
#define PONDER_GROUP_KEY 128

/* Storage types. */
enum ponder_dtype_code {
    PONDER_DTYPE_NONE = 0, /* an optional tensor that is absent */
    PONDER_DTYPE_F32 = 1,
    PONDER_DTYPE_BF16 = 2,
    PONDER_DTYPE_F64 = 3, /* reference kernels only: finite differences */
    PONDER_DTYPE_I32 = 4,
    PONDER_DTYPE_I8 = 5 /* frozen weights that come with their scales */
};

/* A tensor's description, without data: dense, row-major, last dim fastest. */
typedef struct ponder_tensor {
    int32_t dtype;
    int32_t rank;
    int64_t dim[PONDER_MAX_RANK];
} ponder_tensor;

/* One op with everything known but the addresses of what changes between runs.
 * The op list, with shapes and attributes, stands in src/tensor/ops.hpp. */
typedef struct ponder_op_call {
    uint32_t struct_size;
    uint32_t version; /* of the op's definition, 1 at first */
    const char *op;
    uint32_t n_in, n_out, n_attr;
    const ponder_tensor *tensor;  /* [n_in + n_out], inputs first */
    const void *const *constant;  /* [n_in]: data of weights in the host's memory, NULL for the
                                     rest. Outlives the device, or goes at `forget`, and
                                     changes only before `refresh`: packed copies may be keyed
                                     by it */
    const double *attr;           /* [n_attr] */
} ponder_op_call;

/* How a kernel's work is cut. Cuts depend on shapes only, never on the number of
 * threads, and so do results. */
enum ponder_tiling {
    PONDER_TILE_WHOLE = 0, /* one task, or a device that queues its own */
    PONDER_TILE_ANY = 1,   /* independent tasks in any order */
    PONDER_TILE_ROWS = 2   /* task i reads and writes rows [i*64, i*64+64) of its row tensors
                              only, rows = product of all dims but the last. Neighbouring calls
                              of this kind with equal task counts run as one chain per task,
                              while the rows are in cache. */
};
#define PONDER_ROW_TILE 64

/* What a planned call needs. */
typedef struct ponder_plan {
    uint32_t struct_size;
    uint32_t tasks;   /* >= 1 */
    int32_t tiling;   /* enum ponder_tiling */
    uint32_t reserved;
    size_t workspace; /* bytes for each worker, 64-byte aligned */
    void *kernel;     /* passed back to run and drop; immutable, shared between threads */
} ponder_plan;

enum ponder_plan_result {
    PONDER_PLAN_OK = 0,
    PONDER_PLAN_NONE = 1,  /* no kernel for this op, dtype or shape here */
    PONDER_PLAN_FAILED = 2,   /* `why` says what went wrong */
    PONDER_PLAN_NO_MEMORY = 3 /* `why` says for what */
};

/* What the core offers to a module. All pointers live as long as the device. */
typedef struct ponder_backend_host {
    uint32_t struct_size;
    uint32_t workers; /* how many tasks can run at once; the size of the pool */
    void *user_data;
    /* Memory through the runtime's allocator and limit; NULL when there is none. */
    void *(*allocate)(void *user_data, size_t size, size_t alignment);
    void (*release)(void *user_data, void *block);
    /* level: 0 error, 1 warning, 2 info, 3 debug */
    void (*log)(void *user_data, int32_t level, const char *message);
} ponder_backend_host;

/* What decides on a stream's chunks, by the rule of gate_rule.h. Where that happens on the device it is
 * the state of the ops `gate` and `commit` (src/tensor/ops.hpp), in the device's memory. Doubles and
 * 64-bit integers, so that it has no gaps. */
enum ponder_gate_rule {
    PONDER_GATE_THRESHOLD = 1, /* update where the signal is above the threshold, or unknown */
    PONDER_GATE_CONTROLLED = 2 /* the threshold follows the rate of updates */
};
enum ponder_gate_signal {
    PONDER_GATE_LOSS = 0,
    PONDER_GATE_ENTROPY = 1,
    PONDER_GATE_RECONSTRUCTION = 2,
    PONDER_GATE_UPDATE_NORM = 3,
    PONDER_GATE_SIGNALS = 4
};
#define PONDER_GATE_FIRST 8 /* chunks from which a controlled threshold starts */
typedef struct ponder_gate {
    /* settings */
    int64_t rule, signal;
    int64_t steps;                     /* wanted where it updates */
    double target, gain;               /* of the control */
    double budget_rate, budget_burst;  /* a token bucket; rate infinite: none */
    double guard_norm;                 /* an update further away is not taken */
    /* carried from chunk to chunk */
    double signals[PONDER_GATE_SIGNALS]; /* of the last chunk that had one; NaN: none had */
    double threshold, rate, budget_left;
    int64_t seen, count;               /* of the first chunks: all, those with a signal */
    double first[PONDER_GATE_FIRST];   /* their signals */
    int64_t optimizer_steps;
    double power1, power2;             /* Adam's beta1, beta2 to the power of optimizer_steps */
    /* of the last chunk */
    double score, compared;            /* the signal, and with what; NaN: with nothing */
    int64_t calibrating, wanted, granted, accepted;
    double gradient_norm, update_norm;
} ponder_gate;

typedef struct ponder_device ponder_device;

typedef struct ponder_backend {
    uint32_t struct_size;
    uint32_t abi;            /* PONDER_BACKEND_ABI */
    const char *name;        /* "cpu", "cuda" */
    const char *version;     /* of the module */
    int32_t priority;        /* the highest available one is `auto` */
    int32_t host_memory;     /* 1: buffers are host pointers and allocate.. are NULL. 0: addresses
                                are the device's own, and calls run in the order they are made in
                                one queue; only download, synchronize, receive and
                                group_sum wait for it. */

    /* 1 if it can run here; otherwise 0 and the reason in why[size]. */
    int32_t (*probe)(char *why, size_t size);
    /* Instruction set or device in words, valid after probe. Static storage. */
    const char *(*isa)(void);
    /* 1 if activations and weights of this dtype are supported here; of I8: weights only. */
    int32_t (*supports)(int32_t dtype);

    /* NULL and a reason in why[size] on failure. Calls on one device may be
     * concurrent, except close. */
    ponder_device *(*open)(const ponder_backend_host *host, char *why, size_t size);
    void (*close)(ponder_device *device);

    /* Device memory, as it comes; NULL for host_memory devices. allocate: NULL when there is no
     * more. The others give 0, or not 0 when the device has failed: see `problem`. The host's
     * memory may be used again when upload returns. */
    void *(*allocate)(ponder_device *device, size_t size);
    void (*release)(ponder_device *device, void *buffer);
    int32_t (*upload)(ponder_device *device, void *buffer, const void *host, size_t size);
    int32_t (*download)(ponder_device *device, void *host, const void *buffer, size_t size);

    /* enum ponder_plan_result. Packs the constants it wants, once per device. */
    int32_t (*plan)(ponder_device *device, const ponder_op_call *call, ponder_plan *out,
                    char *why, size_t size);
    /* Runs task `task` of a planned call. buffers[n_in + n_out] are the addresses,
     * NULL for absent tensors; those of constants too, in the device's memory. No allocation, no
     * failure, no floating-point exceptions. A device that fails here says so at the next call
     * that waits for it. */
    void (*run)(void *kernel, void *const *buffers, void *workspace, uint32_t task);
    void (*drop)(void *kernel);
    /* Bytes that the device holds in packed weights now. */
    size_t (*packed_bytes)(ponder_device *device);
    /* The data at this constant has changed (a training step): what was packed from it is
     * made again. No pass runs on it meanwhile. NULL: the device keeps no copies. */
    void (*refresh)(ponder_device *device, const void *constant);

    /* Devices with their own memory. The core makes one call at a time on such a device, of these,
     * of all that follow, and of allocate, release, upload, download, plan and run. */
    int32_t (*copy)(ponder_device *device, void *to, const void *from, size_t size);
    int32_t (*clear)(ponder_device *device, void *buffer, size_t size); /* to zeros */
    int32_t (*synchronize)(ponder_device *device); /* waits until the queue is empty */
    const char *(*problem)(ponder_device *device); /* the first failure in words, NULL before */
    /* Between record and record_end, runs are noted down and not made; what record_end returns
     * makes them all when replayed, with the same addresses. record_end: NULL if that is not
     * possible. Where record is NULL there is no such thing. */
    int32_t (*record)(ponder_device *device);
    void *(*record_end)(ponder_device *device);
    int32_t (*replay)(ponder_device *device, void *recording);
    void (*drop_recording)(ponder_device *device, void *recording);

    /* A group: one device in each of several processes, for sums over them; NULL where there is no
     * such thing. Each gives 0, or not 0 and the reason in why[size]. group_key: makes the key of a
     * new group, in one process, for all. group_join: returns when all `count` have joined, each
     * with a rank of its own. group_sum: values[count], f32 in device memory, become their sum over
     * the group, the same bits everywhere, and the queue is empty. Join and sum give up after
     * `patience` seconds; the group is then gone, the device is not. */
    int32_t (*group_key)(ponder_device *device, void *key /* PONDER_GROUP_KEY bytes */, char *why,
                         size_t size);
    int32_t (*group_join)(ponder_device *device, const void *key, uint32_t rank, uint32_t count,
                          double patience, char *why, size_t size);
    int32_t (*group_sum)(ponder_device *device, float *values, size_t count, double patience,
                         char *why, size_t size);

    /* What is noted down between the two is made only where *flag, an i32 in device memory, is not 0
     * when the replay comes to it; they nest. record_if: not 0 if that is not possible, and then the
     * recording has to be given up. NULL where there is no such thing. */
    int32_t (*record_if)(ponder_device *device, const int32_t *flag);
    int32_t (*record_end_if)(ponder_device *device);
    /* A mailbox is a place for one download that nobody waits for yet: send queues it, receive waits
     * for it alone. mailbox: NULL when there is no memory for it. Where it is NULL there is no such
     * thing. */
    void *(*mailbox)(ponder_device *device, size_t size);
    void (*drop_mailbox)(ponder_device *device, void *mailbox);
    int32_t (*send)(ponder_device *device, void *mailbox, const void *buffer, size_t size);
    int32_t (*receive)(ponder_device *device, void *mailbox, void *host, size_t size);

    /* This constant goes before the device does: no kernel that was planned with it is left, and
     * another may come to lie at its address. Copies made from it go. NULL, or a descriptor that ends
     * before: the device keeps them, and the core its constants. */
    void (*forget)(ponder_device *device, const void *constant);
} ponder_backend;

typedef const ponder_backend *(*ponder_backend_query_fn)(void);

#ifdef __cplusplus
}
#endif
#endif
