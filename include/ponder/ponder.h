/* ponder/ponder.h - adaptive test-time training of language models. C99.
 *
 * A frozen backbone reads a stream of tokens. A small set of fast weights keeps
 * learning from what was read, and a policy decides when and how much.
 *
 *     ponder_runtime   settings, memory, threads, backends. No globals.
 *     ponder_model     a backbone: immutable after load, shareable between threads
 *     ponder_options   hyperparameters by name, from one table
 *     ponder_session   one stream: fast weights, optimizer, policy, open chunk
 *     ponder_trainer   learns beforehand what a session starts from
 *
 * Conventions, true for every function unless its comment says otherwise:
 *
 * - Errors. The result is a ponder_status, PONDER_OK = 0. The last argument may
 *   point to a ponder_error, owned by the caller, with struct_size set; it receives
 *   code and message. On error, outputs are untouched and the objects are as before.
 *   The library never prints, aborts, exits or throws.
 * - Handles. A NULL, destroyed or wrong-kind handle gives PONDER_E_ARGUMENT (a
 *   destroyed one as far as its memory still tells). Destroy functions accept NULL.
 * - Threads. `const` in a signature means that concurrent calls are allowed. An
 *   object passed without const is used by one thread at a time, any thread.
 *   Distinct sessions of one model run concurrently.
 * - Structs start with struct_size = sizeof(the struct). They only grow at the end.
 *   A smaller struct (older client) gets defaults for its missing tail; a larger one
 *   is accepted if its unknown tail is zero. Zeroed fields mean defaults.
 * - Strings are UTF-8, NUL-terminated; text to tokenise is any bytes with a length.
 * - Pointers that the library returns are owned by the object they came from.
 */
#ifndef PONDER_H
#define PONDER_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define PONDER_VERSION "0.1.0"
#define PONDER_ABI 0

#if defined(_WIN32)
#define PONDER_API
#else
#define PONDER_API __attribute__((visibility("default")))
#endif

/* ---- Status and errors ------------------------------------------------- */

typedef int32_t ponder_status;

enum ponder_status_code {
    PONDER_OK = 0,
    PONDER_E_ARGUMENT = 1,    /* NULL, wrong kind, out of range, unknown option or value */
    PONDER_E_STATE = 2,       /* right call at the wrong time, e.g. score twice without learn */
    PONDER_E_NOT_FOUND = 3,   /* no such file, folder, or backend */
    PONDER_E_IO = 4,          /* reading or writing failed */
    PONDER_E_FORMAT = 5,      /* a file's content is malformed */
    PONDER_E_UNSUPPORTED = 6, /* well-formed, but not something this version does */
    PONDER_E_MISMATCH = 7,    /* a snapshot or adapter of another model, format or options */
    PONDER_E_NO_MEMORY = 8,   /* the allocator or the runtime's limit said no */
    PONDER_E_BACKEND = 9,     /* a backend failed or has no kernel for a call */
    PONDER_E_CANCELLED = 10,  /* by a progress callback or ponder_session_cancel */
    PONDER_E_DEADLINE = 11,   /* the call's time was up */
    PONDER_E_BUFFER = 12,     /* the caller's buffer is too small; the needed size was returned */
    PONDER_E_INTERNAL = 13    /* a defect of the library */
};

typedef struct ponder_error {
    uint32_t struct_size;
    ponder_status code;
    char message[504]; /* one line, NUL-terminated, cut if longer */
} ponder_error;

/* Static name of a status ("PONDER_E_FORMAT"); "unknown" for others. Any thread. */
PONDER_API const char *ponder_status_name(ponder_status status);
/* PONDER_VERSION and PONDER_ABI of the library that runs. Any thread. */
PONDER_API const char *ponder_version(void);
PONDER_API uint32_t ponder_abi_version(void);

/* ---- Runtime ------------------------------------------------------------ */

typedef struct ponder_runtime ponder_runtime;

enum ponder_log_level {
    PONDER_LOG_ERROR = 0,
    PONDER_LOG_WARNING = 1,
    PONDER_LOG_INFO = 2,
    PONDER_LOG_DEBUG = 3
};

typedef struct ponder_runtime_options {
    uint32_t struct_size;
    uint32_t threads;       /* 1..256; 0 = cores this process may use. Caps all compute threads */
    uint64_t memory_limit;  /* bytes for tensors and packed weights together; 0 = none */
    const char *backend_path; /* folder with backend modules, tried first; NULL = default places:
                                 PONDER_BACKEND_PATH (ignored for set-user-id programs), the
                                 folder beside the library, the configured one */
    void *user_data;        /* first argument of the callbacks below */
    /* Memory for tensors; both or neither. Called from any thread. */
    void *(*allocate)(void *user_data, size_t size, size_t alignment);
    void (*release)(void *user_data, void *block);
    /* The host's own thread pool: run task(context, i) for i in 0..count-1, at most
     * `threads` at once, return when all are done. NULL = the runtime's pool. Called
     * from the thread that called the library. */
    void (*parallel_for)(void *user_data, uint32_t count, void (*task)(void *context, uint32_t i),
                         void *context);
    /* Called from the thread that called the library; must not call back. */
    void (*log)(void *user_data, int32_t level, const char *message);
} ponder_runtime_options;

/* options may be NULL. *out is destroyed with ponder_runtime_destroy; models keep what
 * they need of it alive. Loads backend modules, keeps the reason for each that failed. */
PONDER_API ponder_status ponder_runtime_create(ponder_runtime **out,
                                               const ponder_runtime_options *options,
                                               ponder_error *error);
PONDER_API void ponder_runtime_destroy(ponder_runtime *runtime);

typedef struct ponder_backend_info {
    uint32_t struct_size;
    int32_t available;   /* 1 if a model can run on it */
    const char *name;    /* "reference", "cpu", ...; file name if the module did not load */
    const char *version; /* of the module, "" if it did not load */
    const char *isa;     /* instruction set in use, "" if not available */
    const char *path;    /* of the module, "" for built-in */
    const char *reason;  /* why not, "" if available */
    int32_t bf16;        /* 1 if dtype bf16 is supported */
    int32_t priority;
} ponder_backend_info;

/* Backends and failed candidates, best first, 0 <= index < count. Strings live as long as
 * the runtime. */
PONDER_API uint32_t ponder_backend_count(const ponder_runtime *runtime);
PONDER_API ponder_status ponder_backend_get(const ponder_runtime *runtime, uint32_t index,
                                            ponder_backend_info *out, ponder_error *error);

/* ---- Options ------------------------------------------------------------ */

/* Hyperparameters by name, of sessions, trainers and new backbones; unset ones have defaults. */
typedef struct ponder_options ponder_options;

enum ponder_option_type {
    PONDER_OPTION_INTEGER = 0,
    PONDER_OPTION_NUMBER = 1,
    PONDER_OPTION_BOOLEAN = 2, /* 0 or 1 */
    PONDER_OPTION_TEXT = 3
};

typedef struct ponder_option_info {
    uint32_t struct_size;
    int32_t type;            /* enum ponder_option_type */
    const char *name;        /* "lora.rank" */
    const char *default_value;
    const char *unit;        /* "" if none */
    const char *doc;         /* one line */
    double minimum, maximum; /* inclusive; for INTEGER and NUMBER */
    const char *choices;     /* TEXT: accepted forms, separated by '|', "" if free */
} ponder_option_info;

/* The option table: 0 <= index < count, in documentation order. Any thread. */
PONDER_API uint32_t ponder_option_count(void);
PONDER_API ponder_status ponder_option_get(uint32_t index, ponder_option_info *out,
                                           ponder_error *error);

PONDER_API ponder_status ponder_options_create(ponder_options **out, ponder_error *error);
PONDER_API void ponder_options_destroy(ponder_options *options);
/* Value as text ("16", "3e-3", "last:5"). Checked here against type, range and choices. */
PONDER_API ponder_status ponder_options_set(ponder_options *options, const char *name,
                                            const char *value, ponder_error *error);
/* The value as text; valid until the next set on these options. */
PONDER_API ponder_status ponder_options_value(const ponder_options *options, const char *name,
                                              const char **value, ponder_error *error);
/* The options as a session takes them: where `adapter` names a folder, those that are stored there,
 * in place of all lora.* and ttt.* and of others that were not set. The folder is read now. options
 * may be NULL. *out is destroyed with ponder_options_destroy. */
PONDER_API ponder_status ponder_options_resolve(ponder_options **out,
                                                const ponder_options *options,
                                                ponder_error *error);

/* ---- Long calls --------------------------------------------------------- */

/* Passed to calls that can take long; NULL = no limit. */
typedef struct ponder_call {
    uint32_t struct_size;
    uint32_t reserved;      /* 0 */
    uint64_t timeout_ns;    /* from the start of the call; 0 = none */
    void *user_data;
    /* done and total in the unit of the call (bytes loaded, tokens processed). Returns
     * non-zero to cancel. Called from the calling thread; must not use the same object. */
    int32_t (*progress)(void *user_data, uint64_t done, uint64_t total);
} ponder_call;

/* ---- Model -------------------------------------------------------------- */

typedef struct ponder_model ponder_model;

typedef struct ponder_model_options {
    uint32_t struct_size;
    int32_t reserved;    /* 0 */
    const char *backend; /* "auto" (NULL), "reference", "cpu", "cuda". A name that is not
                            available is PONDER_E_NOT_FOUND, never a fallback */
    const char *dtype;   /* "f32" (NULL) or "bf16": storage of frozen weights and activations.
                            Not supported by the backend: PONDER_E_UNSUPPORTED */
    const char *weights; /* linears, embedding and head: "float" in the dtype; "int8" with an f32
                            scale for each output channel, PONDER_E_UNSUPPORTED if the backend has
                            no kernels for that; "auto" (NULL) as the folder has them, int8 in the
                            dtype where the backend cannot take it */
} ponder_model_options;

/* Loads a Hugging Face folder (config.json; model.safetensors or shards with
 * model.safetensors.index.json; tokenizer.json, or vocab.json with merges.txt) with
 * architecture GPT-2. Needs no network and runs nothing from the folder. The model holds a
 * reference to the runtime. Files may be removed after the load. */
PONDER_API ponder_status ponder_model_load(ponder_model **out, ponder_runtime *runtime,
                                           const char *path, const ponder_model_options *options,
                                           const ponder_call *call, ponder_error *error);
/* One more owner / one less; the last one frees. Any thread. */
PONDER_API ponder_status ponder_model_retain(const ponder_model *model, ponder_error *error);
PONDER_API void ponder_model_release(const ponder_model *model);

typedef struct ponder_model_info {
    uint32_t struct_size;
    int32_t layers, width, heads, vocabulary, context, inner_width;
    uint64_t parameters;      /* tied embeddings counted once */
    const char *architecture; /* "gpt2" */
    const char *dtype;        /* as loaded: "f32", "bf16" */
    const char *backend, *isa;
    const char *hash;         /* hex, of config and weights; snapshots and adapters carry it.
                                 int8 weights have the hash of those they were made from */
    int32_t has_tokenizer;
    int32_t end_of_text;      /* id of <|endoftext|>, -1 if there is none */
    const char *weights;      /* as loaded: "float" (in the dtype), "int8" */
} ponder_model_info;

/* Strings live as long as the model. */
PONDER_API ponder_status ponder_model_get(const ponder_model *model, ponder_model_info *out,
                                          ponder_error *error);

/* Writes a copy of a model folder with other storage, with the tokenizer and the adapter in it.
 * weights: "int8", a quarter or half of the size; any adapter of the source fits. `out` is made if
 * its parent exists; PONDER_E_STATE if it holds weights or the source is int8 already. Files are
 * replaced atomically, the weights last. */
PONDER_API ponder_status ponder_model_convert(ponder_runtime *runtime, const char *path,
                                              const char *out, const char *weights,
                                              const ponder_call *call, ponder_error *error);

/* Token ids of any bytes. `count` receives how many there are; with capacity below that,
 * nothing is written and the result is PONDER_E_BUFFER (ids may be NULL with capacity 0).
 * No special tokens are recognised in or added to the text. Time is linear in `size`. */
PONDER_API ponder_status ponder_model_tokenize(const ponder_model *model, const char *text,
                                               size_t size, int32_t *ids, size_t capacity,
                                               size_t *count, ponder_error *error);
/* The bytes of one token, not NUL-terminated; they live as long as the model. */
PONDER_API ponder_status ponder_model_token_bytes(const ponder_model *model, int32_t id,
                                                  const char **bytes, size_t *size,
                                                  ponder_error *error);

/* What a session will need, in bytes. */
typedef struct ponder_memory_plan {
    uint32_t struct_size;
    uint32_t reserved;
    uint64_t weights;        /* frozen weights as stored */
    uint64_t packed_weights; /* the backend's packed copies, for this session's passes */
    uint64_t fast_weights;   /* fast weights and their shadow */
    uint64_t optimizer;      /* gradients and moments, with their shadow */
    uint64_t activations;    /* arena of the largest pass */
    uint64_t workspace;      /* of all workers */
    uint64_t total;
    uint64_t fast_parameters;    /* count */
    uint64_t flops_score;        /* of one full chunk; 2 per multiply-add */
    uint64_t flops_step;         /* what one inner step adds */
    uint64_t generation;         /* when the session generates, besides `total`: keys and values of
                                    a full context, the rest of its buffers, its passes */
} ponder_memory_plan;

/* Plans from the files' headers alone: no weight is read, nothing large is allocated.
 * options may be NULL. */
PONDER_API ponder_status ponder_plan_memory(ponder_runtime *runtime, const char *path,
                                            const ponder_model_options *model_options,
                                            const ponder_options *options,
                                            ponder_memory_plan *out, ponder_error *error);

/* ---- Session ------------------------------------------------------------ */

typedef struct ponder_session ponder_session;

enum ponder_record_flag {
    PONDER_RECORD_UPDATED = 1,      /* fast weights changed */
    PONDER_RECORD_ROLLED_BACK = 2,  /* a step was not finite or broke the norm bound */
    PONDER_RECORD_OVER_BUDGET = 4,  /* the policy wanted more steps than the budget had */
    PONDER_RECORD_CALIBRATING = 8,  /* decided by the policy's warm-up */
    PONDER_RECORD_SCORED_ONLY = 16, /* learn has not been called for it yet */
    PONDER_RECORD_NOT_CAUSAL = 32   /* analysis: the decision read the chunk it changed */
};

/* What happened with one chunk. NaN where a value was not computed. */
typedef struct ponder_record {
    uint32_t struct_size;
    uint32_t flags;          /* enum ponder_record_flag */
    uint64_t chunk;          /* 0, 1, ... in the stream */
    uint64_t first_token;    /* position of the chunk's first token in the stream */
    uint32_t tokens;         /* in the chunk */
    uint32_t predictions;    /* tokens - 1: losses inside the chunk */
    int32_t steps_wanted;    /* by the policy */
    int32_t steps;           /* inner steps taken, K */
    double loss_before;      /* mean next-token loss in nats, with the weights of the time */
    double loss_after;       /* after the update, if known */
    double entropy;          /* mean of the predicted distributions, nats */
    double reconstruction;   /* TTT layers: reconstruction loss before each step, mean */
    double gradient_norm;    /* of all fast weights before clipping, first step */
    double update_norm;      /* |new - old| of all fast weights */
    double gate_score;       /* the signal that the policy compared */
    double gate_threshold;
    double update_rate;      /* chunks updated so far over chunks scored */
    uint64_t flops;          /* executed matrix products, 2 per multiply-add */
    /* Where ponder_session_adapt queues chunks ahead, score_ns is the time from the results of the
     * chunk before to this one's, and the others are 0. */
    uint64_t score_ns, decide_ns, learn_ns;
    uint64_t bytes;          /* activations and workspace in use */
} ponder_record;

/* options may be NULL (defaults); they are copied. The session holds a reference to the
 * model. Allocates everything it will need for full chunks. */
PONDER_API ponder_status ponder_session_create(ponder_session **out, const ponder_model *model,
                                               const ponder_options *options,
                                               ponder_error *error);
PONDER_API void ponder_session_destroy(ponder_session *session);
/* Back to the state after create: same initial fast weights, same random numbers. Buffers
 * are kept. */
PONDER_API ponder_status ponder_session_reset(ponder_session *session, ponder_error *error);
/* An independent session in the same state; continues bit for bit like the original. */
PONDER_API ponder_status ponder_session_fork(ponder_session **out, const ponder_session *session,
                                             ponder_error *error);

/* Declares how many chunks this stream will have, at most 2^53: first:P needs it
 * (PONDER_E_STATE), gates and oracles spend by it. 0 = unknown. Reset clears it. */
PONDER_API ponder_status ponder_session_expect(ponder_session *session, uint64_t chunks,
                                               ponder_error *error);
/* Appends tokens; computes nothing. Ids outside the vocabulary refuse the whole call. At
 * most 2^24 tokens wait at a time (PONDER_E_BUFFER). */
PONDER_API ponder_status ponder_session_feed(ponder_session *session, const int32_t *ids,
                                             size_t count, ponder_error *error);

typedef struct ponder_session_info {
    uint32_t struct_size;
    uint32_t chunk_tokens;     /* the chunk option */
    uint64_t tokens_fed, chunks_scored, chunks_updated, steps;
    uint64_t tokens_waiting;   /* fed, not yet scored */
    int32_t scored_open;       /* 1: a scored chunk waits for learn */
    int32_t has_fast_weights;
    uint64_t records;          /* in the ring */
    double budget_left;        /* steps; infinity when off */
} ponder_session_info;
PONDER_API ponder_status ponder_session_get(const ponder_session *session,
                                            ponder_session_info *out, ponder_error *error);

/* Scores the next chunk of each session with its weights of now. `done[i]` (may be NULL)
 * becomes 1 if session i had a full chunk waiting, else 0. A scored chunk must be learned
 * (or skipped) before the next one: PONDER_E_STATE otherwise. All sessions belong to one
 * model and differ. If one session fails, those before it have their results. */
PONDER_API ponder_status ponder_score(ponder_session *const *sessions, uint32_t count,
                                      uint8_t *done, const ponder_call *call,
                                      ponder_error *error);
/* Decides K for the chunk just scored and takes K steps on it. steps = NULL: the policy
 * decides; else steps[i] >= 0 replaces its wish (the budget still holds). TTT layers
 * decided before scoring and commit here. Sessions without a scored chunk are left alone. If
 * one session fails, those before it have learned. */
PONDER_API ponder_status ponder_learn(ponder_session *const *sessions, uint32_t count,
                                      const int32_t *steps, const ponder_call *call,
                                      ponder_error *error);
/* Adaptive forward: feed, then score and learn every full chunk. Once the ids are taken they
 * stay: on cancel, deadline or another failure of the work the chunks finished so far count and
 * the rest waits in the session, so go on with count 0. On a device with its own memory
 * a few chunks are queued ahead and the device decides on them, if the policy is none of
 * `adapter`, `oracle` and those that read gradient_norm, and neither record.loss_after nor
 * analysis is set; results are those of ponder_score and ponder_learn. ids may be NULL with
 * count 0. */
PONDER_API ponder_status ponder_session_adapt(ponder_session *session, const int32_t *ids,
                                              size_t count, const ponder_call *call,
                                              ponder_error *error);
/* Scores and learns the open, shorter chunk, if it has at least 2 tokens; the stream may go
 * on afterwards. */
PONDER_API ponder_status ponder_session_flush(ponder_session *session, const ponder_call *call,
                                              ponder_error *error);

/* Losses in nats of the chunk scored last: nll[t] is that of its token t + 1 given what
 * came before. `count` receives predictions; PONDER_E_BUFFER if capacity is below. */
PONDER_API ponder_status ponder_session_losses(const ponder_session *session, float *nll,
                                               size_t capacity, size_t *count,
                                               ponder_error *error);
/* The newest records, oldest first; the ring keeps `record.ring` of them. `chunk` is the
 * first chunk wanted; `count` receives how many were written. */
PONDER_API ponder_status ponder_session_records(const ponder_session *session, uint64_t chunk,
                                                ponder_record *records, size_t capacity,
                                                size_t *count, ponder_error *error);
/* Makes the long call now running on the session end with PONDER_E_CANCELLED. Safe from any
 * thread and from signal handlers while the session exists. */
PONDER_API void ponder_session_cancel(const ponder_session *session);

/* Snapshots: everything needed to go on bit for bit, waiting tokens and open chunk
 * included. They contain traces of what was read: a new file is its owner's alone (mode 0600).
 * Refused (PONDER_E_MISMATCH) by a session of another model, dtype, option set or content of
 * the adapter's folder. The file is replaced atomically. */
PONDER_API ponder_status ponder_session_save(const ponder_session *session, const char *path,
                                             ponder_error *error);
PONDER_API ponder_status ponder_session_load(ponder_session *session, const char *path,
                                             ponder_error *error);
/* The same in memory: `size` receives the bytes needed; PONDER_E_BUFFER below that. */
PONDER_API ponder_status ponder_session_save_memory(const ponder_session *session, void *data,
                                                    size_t capacity, size_t *size,
                                                    ponder_error *error);
PONDER_API ponder_status ponder_session_load_memory(ponder_session *session, const void *data,
                                                    size_t size, ponder_error *error);

/* ---- Generating --------------------------------------------------------- */

enum ponder_generation_flag {
    PONDER_GENERATE_LOGPROBS = 1,   /* hand over log-probabilities */
    PONDER_GENERATE_KEEP_CACHE = 2, /* after an update, keys and values that fast weights entered
                                       stay as they were computed; else they are computed again */
    PONDER_GENERATE_IGNORE_END = 4  /* <|endoftext|> does not end the text */
};

enum ponder_stop_reason {
    PONDER_STOP_LENGTH = 0,   /* max_tokens */
    PONDER_STOP_TOKEN = 1,    /* a stop token, which is not part of the text */
    PONDER_STOP_STRING = 2,   /* a stop string; the text ends before it */
    PONDER_STOP_CALLBACK = 3
};

/* One token, as it is handed over. */
typedef struct ponder_generated {
    uint32_t struct_size;
    uint32_t stream;     /* place of its session in the call */
    uint64_t index;      /* 0, 1, ... */
    int32_t id;          /* -1: no token, but the end of the text that was held back until now */
    uint32_t reserved;
    double logprob;      /* ln of the probability that the model gives it, before bias, penalty and
                            temperature; NaN unless asked for */
    const char *text;    /* what is certain of the text now: whole UTF-8 characters (where the text
                            is UTF-8), nothing that may begin a stop string. Valid in the call */
    size_t text_size;    /* may be 0; always 0 without a tokenizer */
} ponder_generated;

/* What to generate. Zero means the default, which is named first. */
typedef struct ponder_generation {
    uint32_t struct_size;
    uint32_t flags;          /* enum ponder_generation_flag */
    const int32_t *prompt;   /* what the text begins with: at least one token */
    size_t prompt_count;
    uint64_t max_tokens;     /* at most so many; 0 = 256 */
    double temperature;      /* 0: the most probable token (of equals the smaller id); to 100 */
    uint32_t top_k;          /* 0: off; only the k most probable tokens */
    uint32_t reserved;
    double top_p;            /* 0: off; the fewest tokens whose probabilities reach p, 0 < p <= 1 */
    double min_p;            /* 0: off; tokens with min_p times the largest probability, to 1 */
    double repetition;       /* 0: off (1); logits of tokens that are in the text are divided by
                                this where positive, else multiplied; to 100 */
    uint64_t seed;           /* of the draws. Token i depends on seed, i and the distribution */
    const int32_t *bias_ids; /* added to these tokens' logits, -10000..10000 */
    const float *bias;
    size_t bias_count;
    const int32_t *stop_tokens;
    size_t stop_token_count;
    const char *const *stop_strings; /* NUL-terminated, not empty; may lie across tokens */
    size_t stop_string_count;
    void *user_data;
    /* After each token; returns non-zero to stop. NULL = none. Must not use the session. */
    int32_t (*token)(void *user_data, const ponder_generated *generated);
} ponder_generation;

typedef struct ponder_generation_result {
    uint32_t struct_size;
    int32_t reason;          /* enum ponder_stop_reason */
    uint64_t prompt_tokens;
    uint64_t cached_tokens;  /* of the prompt: not computed again */
    uint64_t tokens;         /* generated */
    int32_t stopped_by;      /* id of the stop token, number of the stop string, else -1 */
    uint32_t reserved;
    uint64_t prefill_ns, decode_ns;
} ponder_generation_result;

/* Continues a text with the session's fast weights as they are. The text is the prompt alone: what
 * the session has read is in its weights. The stream is not touched: scores, learning and snapshots
 * go on as if nothing had been generated. Bias and the repetition penalty apply first, then
 * temperature, top_k, top_p and min_p, each to what the one before has left.
 *
 * The text may be longer than the context (option `context`): when it is full, its last half is read
 * again from position 0 on. TTT layers learn from the text while it is generated, in a copy of their
 * weights, and take no part where the policy is skip. Keys and values stay in the session: a
 * prompt that begins like the last text costs only what is new in it. Reset and load forget them.
 * They take 2 * layers * width * context numbers of the model's dtype, from the first call on;
 * when sessions that generated together part, up to twice that until the others generate again.
 *
 * On error, cancel and deadline, `result` is untouched, and tokens handed over by then stay valid.
 * result and call may be NULL. */
PONDER_API ponder_status ponder_session_generate(ponder_session *session,
                                                 const ponder_generation *generation,
                                                 ponder_generation_result *result,
                                                 const ponder_call *call, ponder_error *error);
/* Several sessions at once, a token of each in one pass over the weights. They belong to one model,
 * have equal options of adapter, chunk and context, and differ. results (or its elements) may be
 * NULL. */
PONDER_API ponder_status ponder_generate(ponder_session *const *sessions, uint32_t count,
                                         const ponder_generation *const *generations,
                                         ponder_generation_result *const *results,
                                         const ponder_call *call, ponder_error *error);
/* Appends tokens first .. first + count of the last text (prompt and what was generated) to the
 * session's stream, as feed does: then they are scored and learned from like anything read. */
PONDER_API ponder_status ponder_session_accept(ponder_session *session, uint64_t first,
                                               uint64_t count, ponder_error *error);

/* ---- Training ----------------------------------------------------------- */

/* Outer loop: learns what a session starts from. One trainer changes one thing; the model it
 * was made with stays as it is. */
typedef struct ponder_trainer ponder_trainer;

enum ponder_trainer_kind {
    PONDER_TRAIN_ADAPTER = 0, /* the adapter of the options: initial fast weights, step sizes,
                                 decay, a TTT layer's parameters; through its inner steps */
    PONDER_TRAIN_GATE = 1,    /* the gate of the adapter folder in option `adapter` */
    PONDER_TRAIN_BACKBONE = 2 /* every weight of the model, on next-token loss */
};

/* Tokens of one stream, owned by the caller. */
typedef struct ponder_stream {
    const int32_t *ids;
    size_t count;
} ponder_stream;

enum ponder_train_flag {
    PONDER_TRAIN_NOT_FINITE = 1 /* a gradient was not finite: this step changed nothing */
};

/* What one outer step did. NaN where a value does not exist for the kind. */
typedef struct ponder_train_record {
    uint32_t struct_size;
    uint32_t flags;           /* enum ponder_train_flag */
    uint64_t step;            /* 1, 2, ...: steps taken, this one included */
    uint64_t tokens;          /* predictions that the loss is the mean of */
    double loss;              /* outer loss, nats per token, before the step */
    double loss_first;        /* of the first chunks, before any inner step */
    double reconstruction;    /* TTT layers: reconstruction loss before each step, mean */
    double gradient_norm;     /* of all trained values together, before clipping */
    double learning_rate;     /* of this step */
    double inner_rate;        /* geometric mean of the learned step sizes */
    double cost;              /* inner steps a chunk */
    double temperature;       /* gates */
    double tokens_per_second; /* of this call */
    uint64_t flops, ns;       /* of this call; 2 per multiply-add */
} ponder_train_record;

/* options may be NULL; they are copied: adapter structure, inner.*, train.*, gate.*. The
 * trainer holds a reference to the model. Adapters and gates train on a model of any dtype and
 * storage, backbones on one with weights "float"; second order (train.higher) needs f32:
 * PONDER_E_UNSUPPORTED otherwise. */
PONDER_API ponder_status ponder_trainer_create(ponder_trainer **out, const ponder_model *model,
                                               int32_t kind, const ponder_options *options,
                                               ponder_error *error);
PONDER_API void ponder_trainer_destroy(ponder_trainer *trainer);
/* One outer step on a batch: the gradient of the batch's mean loss, clipped, then AdamW.
 * Adapters and gates: each stream is read from its start in whole chunks, at least two; what
 * is left over is ignored. Backbones: each stream is one window of 2 .. context + 1 tokens, all
 * of one length. On error, cancel and deadline nothing has changed. The result depends on the
 * batch and the trainer's state alone, not on the number of threads. */
PONDER_API ponder_status ponder_trainer_step(ponder_trainer *trainer,
                                             const ponder_stream *streams, uint32_t count,
                                             const ponder_call *call, ponder_train_record *out,
                                             ponder_error *error);
/* The whole state in one file, replaced atomically; a trainer of the same model, kind and
 * options goes on from it bit for bit. PONDER_E_MISMATCH for any other. `note` is the caller's
 * own (a data position), any UTF-8 of at most 64 KiB, NULL for none; load hands it back as
 * ponder_trainer_note. */
PONDER_API ponder_status ponder_trainer_save(const ponder_trainer *trainer, const char *path,
                                             const char *note, ponder_error *error);
PONDER_API ponder_status ponder_trainer_load(ponder_trainer *trainer, const char *path,
                                             ponder_error *error);
/* The note of the checkpoint loaded last, "" if none; valid until the next load. */
PONDER_API const char *ponder_trainer_note(const ponder_trainer *trainer);
/* Steps taken so far. */
PONDER_API uint64_t ponder_trainer_steps(const ponder_trainer *trainer);
/* Writes what was trained: an adapter folder, the gate into its adapter's folder (a copy of
 * that adapter where `folder` is another), or a Hugging Face folder with the weights in the
 * model's dtype. The folder is made if its parent exists; files are replaced atomically. */
PONDER_API ponder_status ponder_trainer_export(const ponder_trainer *trainer, const char *folder,
                                               ponder_error *error);

/* What a calibration found. NaN where nothing was measured. */
typedef struct ponder_calibration {
    uint32_t struct_size;
    uint32_t rounds;       /* of measuring and fitting */
    double target;         /* steps a chunk */
    double loss;           /* of the streams, nats a token */
    double rate;           /* steps a chunk, realised */
    double rate_farthest;  /* of the stream that is farthest from the target */
    double share[4];       /* of chunks with 0, 1, 2, 4 steps */
    double held_loss;      /* the same on the other streams */
    double held_rate;
    double held_farthest;
    double held_share[4];
    double front;          /* share of a declared stream's steps that is spent at once */
    double scale;          /* factor on a declared stream's updates, from this one .. */
    double scale_last;     /* .. to this one as its steps are spent */
    double front_slope;    /* front grows by this times (mean loss - reference) */
    double reference;      /* loss, nats a token */
} ponder_calibration;

/* Fits the gate stored in the folder of option `adapter` to a number of steps a chunk (option
 * policy.target_rate; 0 = the target stored) or to `share`, four shares of chunks with 0, 1, 2 and 4
 * steps that sum to 1 (NULL = none), on unlabeled streams, each read as one stream of declared
 * length. Thresholds for a range of rates, and where `search` is 1 also how early and how large
 * steps are, by the streams' loss. Stores the result in the folder (atomically) and reports how it
 * holds on `held` (may be NULL with held_count 0). On error nothing has changed. */
PONDER_API ponder_status ponder_calibrate(const ponder_model *model, const ponder_options *options,
                                          const ponder_stream *streams, uint32_t count,
                                          const ponder_stream *held, uint32_t held_count,
                                          const double *share, int32_t search,
                                          ponder_calibration *report, const ponder_call *call,
                                          ponder_error *error);

/* Writes a GPT-2 folder with random weights (options model.*, seed) for the tokenizer that
 * already lies in it. PONDER_E_STATE if it holds weights. */
PONDER_API ponder_status ponder_backbone_create(const char *folder, const ponder_options *options,
                                                ponder_error *error);
/* Trains a byte-level BPE vocabulary (Sennrich et al. 2016 on GPT-2's word split) of `size`
 * ids, <|endoftext|> as id 0, and writes folder/tokenizer.json. `next` hands over one text
 * after the other (0 = no more, 1 = text and length set, negative = stop with
 * PONDER_E_CANCELLED); texts are read once, and the memory used grows with the number of
 * different words. Ties break by the smaller pair of ids: the result depends on texts and size
 * alone. */
PONDER_API ponder_status ponder_tokenizer_train(
    const char *folder, uint32_t size,
    int32_t (*next)(void *user_data, const char **text, size_t *length), void *user_data,
    ponder_error *error);

/* ---- Adapter folders ---------------------------------------------------- */

/* Writes the A and B that an adapter starts from as a folder of Hugging Face's PEFT. What it
 * learned about its updates has no place there. PONDER_E_UNSUPPORTED if it is not LoRA. `out` is
 * made if its parent exists. */
PONDER_API ponder_status ponder_adapter_to_peft(const char *adapter, const char *out,
                                                ponder_error *error);
/* The other way: a LoRA folder of PEFT for this model as an adapter folder, with the options'
 * defaults for its updates. PONDER_E_UNSUPPORTED for what goes beyond one scaled product on GPT-2's
 * linears. */
PONDER_API ponder_status ponder_adapter_from_peft(const ponder_model *model, const char *peft,
                                                  const char *out, ponder_error *error);
/* A copy of a Hugging Face folder whose weights contain a LoRA adapter as it starts: W + A B,
 * added in f32 and stored in the dtype of W. PONDER_E_MISMATCH if the adapter was made for another
 * model, PONDER_E_STATE if `out` holds a model. */
PONDER_API ponder_status ponder_adapter_merge(const char *model, const char *adapter,
                                              const char *out, ponder_error *error);

/* ---- Measuring ---------------------------------------------------------- */

/* Time spent in one op of one kind of pass. */
typedef struct ponder_profile_entry {
    uint32_t struct_size;
    uint32_t calls;
    const char *op;     /* "linear", ... */
    const char *where;  /* "score" or "learn" */
    const char *backend;/* that ran it */
    uint64_t flops;     /* of those calls, once each */
    uint64_t ns;        /* wall-clock of those calls, once each, mean over repeats */
} ponder_profile_entry;

/* Runs the passes of the chunk scored last `repeat` times, each op call timed apart (no chains
 * across ops), fast weights untouched; ponder_session_cancel ends it. `count` receives the number of entries;
 * PONDER_E_BUFFER if capacity is below, PONDER_E_STATE before the first chunk. */
PONDER_API ponder_status ponder_session_profile(ponder_session *session, uint32_t repeat,
                                                ponder_profile_entry *entries, size_t capacity,
                                                size_t *count, ponder_error *error);

#ifdef __cplusplus
}
#endif
#endif
