/* Prints the path of each backend module that the library found, without being told where, and
 * loaded. */
#include <ponder/ponder.h>

#include <stdio.h>

int main(void) {
    ponder_runtime *runtime = NULL;
    uint32_t i;
    if (ponder_runtime_create(&runtime, NULL, NULL) != PONDER_OK) return 1;
    for (i = 0; i < ponder_backend_count(runtime); ++i) {
        ponder_backend_info info = {0};
        info.struct_size = sizeof info;
        if (ponder_backend_get(runtime, i, &info, NULL) != PONDER_OK) return 1;
        if (info.version[0]) puts(info.path); /* "" if it did not load */
    }
    ponder_runtime_destroy(runtime);
    return 0;
}
