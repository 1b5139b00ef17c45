/* Reads a text with a model that adapts to it, saves the session half-way, and goes on in a
 * second session exactly as the first one does.
 *
 *     cc adapt.c $(pkg-config --cflags --libs ponder) && ./a.out MODEL_FOLDER [TEXT_FILE]
 */
#include <ponder/ponder.h>

#include <stdio.h>
#include <stdlib.h>

#define CHUNK 64
#define TRY(call)                                                                                  \
    do {                                                                                           \
        if ((call) != PONDER_OK) {                                                                 \
            fprintf(stderr, "%s: %s\n", ponder_status_name(error.code), error.message);            \
            return 1;                                                                              \
        }                                                                                          \
    } while (0)

static char text[1 << 16];

int main(int argc, char **argv) {
    ponder_error error = {sizeof error, 0, ""};
    ponder_runtime *runtime;
    ponder_model *model;
    ponder_options *options;
    ponder_session *first, *second;
    FILE *file = argc > 2 ? fopen(argv[2], "rb") : NULL;
    size_t size = file ? fread(text, 1, sizeof text - 1, file) : 0, count;
    if (file) fclose(file);
    while (!file && size < 6000) /* a text of its own: it soon knows what comes next */
        size += (size_t)sprintf(text + size, "def area%d(w, h):\n    return w * h\n\n", (int)size);

    TRY(ponder_runtime_create(&runtime, NULL, &error));
    TRY(ponder_model_load(&model, runtime, argc > 1 ? argv[1] : "", NULL, NULL, &error));
    TRY(ponder_options_create(&options, &error));
    TRY(ponder_options_set(options, "chunk", "64", &error));
    TRY(ponder_options_set(options, "context", "128", &error)); /* 0 would be all it has */
    TRY(ponder_session_create(&first, model, options, &error));
    TRY(ponder_session_create(&second, model, options, &error));

    int32_t *ids = malloc(size * sizeof *ids);
    TRY(ponder_model_tokenize(model, text, size, ids, size, &count, &error));
    size_t chunks = count / CHUNK, half = chunks / 2;
    if (chunks < 2) return fprintf(stderr, "the text is too short\n"), 1;
    TRY(ponder_session_adapt(first, ids, half * CHUNK, NULL, &error));
    TRY(ponder_session_save(first, "adapt.session", &error));
    TRY(ponder_session_load(second, "adapt.session", &error));
    remove("adapt.session");
    TRY(ponder_session_adapt(first, ids + half * CHUNK, (chunks - half) * CHUNK, NULL, &error));
    TRY(ponder_session_adapt(second, ids + half * CHUNK, (chunks - half) * CHUNK, NULL, &error));

    ponder_record start = {.struct_size = sizeof start}, end = start, again = start;
    TRY(ponder_session_records(first, 0, &start, 1, &count, &error));
    TRY(ponder_session_records(first, chunks - 1, &end, 1, &count, &error));
    TRY(ponder_session_records(second, chunks - 1, &again, 1, &count, &error));
    printf("loss of chunk 0: %.3f, of chunk %d: %.3f, restored: %.3f\n", start.loss_before,
           (int)chunks - 1, end.loss_before, again.loss_before);

    ponder_session_destroy(second);
    ponder_session_destroy(first);
    ponder_options_destroy(options);
    ponder_model_release(model);
    ponder_runtime_destroy(runtime);
    free(ids);
    return end.loss_before == again.loss_before ? 0 : 1; /* bit for bit */
}
