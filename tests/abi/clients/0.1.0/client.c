/* A client of 0.1.0, compiled with the header of 0.1.0 and run with today's library: the
 * whole life of a session, every struct that crosses the boundary. Exit status 0 if
 * everything behaves as it did.
 *
 * This folder is frozen by the release 0.1.0; until then it follows the public header. */
#include <ponder/ponder.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHECK(condition)                                                                \
    do {                                                                                \
        if (!(condition)) {                                                             \
            fprintf(stderr, "line %d: %s\n  %s\n", __LINE__, #condition, error.message); \
            exit(1);                                                                    \
        }                                                                               \
    } while (0)

enum { CHUNK = 32, COUNT = 4 * CHUNK };

static uint64_t blocks;

static void *allocate(void *user_data, size_t size, size_t alignment) {
    void *block = NULL;
    (void)user_data;
    if (posix_memalign(&block, alignment, size)) return NULL;
    __atomic_add_fetch(&blocks, 1, __ATOMIC_RELAXED);
    return block;
}

static void release(void *user_data, void *block) {
    (void)user_data;
    if (block) __atomic_sub_fetch(&blocks, 1, __ATOMIC_RELAXED);
    free(block);
}

static int32_t progress(void *user_data, uint64_t done, uint64_t total) {
    ++*(int *)user_data;
    return done > total;
}

int main(int argc, char **argv) {
    ponder_error error = {0};
    ponder_runtime_options runtime_options = {0};
    ponder_backend_info backend = {0};
    ponder_option_info option = {0};
    ponder_model_options model_options = {0};
    ponder_model_info model_info = {0};
    ponder_memory_plan plan = {0};
    ponder_call call = {0};
    ponder_session_info info = {0};
    ponder_record records[8] = {{0}}, again[8] = {{0}};
    ponder_profile_entry entries[64] = {{0}};
    ponder_runtime *runtime = NULL;
    ponder_model *model = NULL;
    ponder_options *options = NULL;
    ponder_session *session = NULL, *fork = NULL;
    int32_t ids[COUNT], steps = 2;
    float losses[CHUNK];
    uint8_t done = 0;
    const char *value = NULL;
    size_t count = 0, size = 0;
    void *state;
    int calls = 0, i;

    if (argc != 2) return 2;
    error.struct_size = sizeof error;
    runtime_options.struct_size = sizeof runtime_options;
    backend.struct_size = sizeof backend;
    option.struct_size = sizeof option;
    model_options.struct_size = sizeof model_options;
    model_info.struct_size = sizeof model_info;
    plan.struct_size = sizeof plan;
    call.struct_size = sizeof call;
    info.struct_size = sizeof info;
    for (i = 0; i < 8; ++i) records[i].struct_size = again[i].struct_size = sizeof *records;
    for (i = 0; i < 64; ++i) entries[i].struct_size = sizeof *entries;
    for (i = 0; i < COUNT; ++i) ids[i] = i * i % 23;

    CHECK(ponder_abi_version() == PONDER_ABI && strlen(ponder_version()) > 0);
    CHECK(!strcmp(ponder_status_name(PONDER_E_FORMAT), "PONDER_E_FORMAT"));
    runtime_options.threads = 2;
    runtime_options.allocate = allocate;
    runtime_options.release = release;
    CHECK(!ponder_runtime_create(&runtime, &runtime_options, &error));
    CHECK(ponder_backend_count(runtime) >= 1);
    CHECK(!ponder_backend_get(runtime, 0, &backend, &error) && backend.available);
    CHECK(ponder_option_count() > 20);
    CHECK(!ponder_option_get(0, &option, &error) && strlen(option.name) > 0);

    CHECK(!ponder_options_create(&options, &error));
    CHECK(!ponder_options_set(options, "chunk", "32", &error));
    CHECK(!ponder_options_value(options, "chunk", &value, &error) && !strcmp(value, "32"));
    CHECK(ponder_options_set(options, "no.such.option", "1", &error) == PONDER_E_ARGUMENT);
    CHECK(strstr(error.message, "no.such.option"));

    CHECK(!ponder_plan_memory(runtime, argv[1], NULL, options, &plan, &error) && plan.total > 0);
    CHECK(ponder_model_load(&model, runtime, "/nonexistent", NULL, NULL, &error) ==
          PONDER_E_NOT_FOUND);
    model_options.dtype = "f32";
    CHECK(!ponder_model_load(&model, runtime, argv[1], &model_options, NULL, &error));
    CHECK(!ponder_model_get(model, &model_info, &error));
    CHECK(!strcmp(model_info.architecture, "gpt2") && !strcmp(model_info.dtype, "f32"));

    CHECK(!ponder_session_create(&session, model, options, &error));
    CHECK(!ponder_session_feed(session, ids, COUNT, &error));
    CHECK(!ponder_score(&session, 1, &done, NULL, &error) && done == 1);
    CHECK(!ponder_session_losses(session, losses, CHUNK, &count, &error) && count == CHUNK - 1);
    CHECK(!ponder_learn(&session, 1, &steps, NULL, &error));
    CHECK(!ponder_session_fork(&fork, session, &error));
    call.user_data = &calls;
    call.progress = progress;
    CHECK(!ponder_session_adapt(session, NULL, 0, &call, &error) && calls > 0);
    CHECK(!ponder_session_flush(session, NULL, &error));
    CHECK(!ponder_session_get(session, &info, &error));
    CHECK(info.chunks_scored == 4 && info.tokens_fed == COUNT && info.chunk_tokens == CHUNK);
    CHECK(!ponder_session_records(session, 0, records, 8, &count, &error) && count == 4);
    CHECK(records[0].steps == 2 && records[0].tokens == CHUNK && records[3].chunk == 3);
    CHECK(records[0].flags & PONDER_RECORD_UPDATED && records[0].loss_before > 0);
    CHECK(!ponder_session_profile(session, 1, entries, 64, &count, &error) && count > 0);

    /* A fork, through a snapshot in memory, goes the same way. */
    CHECK(ponder_session_save_memory(fork, NULL, 0, &size, &error) == PONDER_E_BUFFER);
    state = malloc(size);
    CHECK(state && !ponder_session_save_memory(fork, state, size, &size, &error));
    CHECK(!ponder_session_reset(fork, &error));
    CHECK(!ponder_session_load_memory(fork, state, size, &error));
    CHECK(!ponder_session_adapt(fork, NULL, 0, NULL, &error));
    CHECK(!ponder_session_records(fork, 0, again, 8, &count, &error) && count == 4);
    CHECK(again[3].loss_before == records[3].loss_before);
    free(state);

    ponder_session_cancel(session);
    ponder_session_destroy(fork);
    ponder_session_destroy(session);
    ponder_options_destroy(options);
    ponder_model_release(model);
    ponder_runtime_destroy(runtime);
    CHECK(blocks == 0);
    return 0;
}
