#include <cmath>
#include <cstdio>
#include <cstring>
#include <ponder/ponder.h>
#include <string>
#include <unistd.h>
struct ponder_trainer {
    uint64_t steps = 0;
    double state = 1;
    std::string note;
};
extern "C" {
ponder_status ponder_trainer_create(ponder_trainer **out, const ponder_model *, int32_t,
                                    const ponder_options *, ponder_error *) {
    *out = new ponder_trainer;
    return 0;
}
void ponder_trainer_destroy(ponder_trainer *t) { delete t; }
ponder_status ponder_trainer_step(ponder_trainer *t, const ponder_stream *s, uint32_t n,
                                  const ponder_call *call, ponder_train_record *r, ponder_error *) {
    usleep(2000);
    if (call && call->progress && call->progress(call->user_data, 0, 1))
        return PONDER_E_CANCELLED;
    for (uint32_t i = 0; i < n; ++i)
        for (size_t j = 0; j < s[i].count; ++j)
            t->state = std::fmod(t->state * 1.37 + s[i].ids[j] * 0.01, 7.0);
    ++t->steps;
    r->step = t->steps;
    r->tokens = n * s[0].count;
    r->loss = 3 + std::exp(-0.01 * double(t->steps)) + 0.1 * t->state;
    r->loss_first = NAN;
    r->reconstruction = NAN;
    r->gradient_norm = 0.1 + t->state;
    r->learning_rate = 1e-3;
    r->inner_rate = 3e-3 * (1 + 0.001 * double(t->steps));
    r->cost = 1;
    r->temperature = NAN;
    r->tokens_per_second = 1000 + 100 * t->state;
    r->ns = 2000000;
    return 0;
}
ponder_status ponder_trainer_save(const ponder_trainer *t, const char *path, const char *note,
                                  ponder_error *e) {
    std::string tmp = std::string(path) + ".1.tmp";
    FILE *f = fopen(tmp.c_str(), "w");
    if (!f) {
        e->code = PONDER_E_IO;
        snprintf(e->message, 400, "%s: create", path);
        return e->code;
    }
    fprintf(f, "%llu %a\n%s", (unsigned long long)t->steps, t->state, note ? note : "");
    fclose(f);
    rename(tmp.c_str(), path);
    return 0;
}
ponder_status ponder_trainer_load(ponder_trainer *t, const char *path, ponder_error *) {
    FILE *f = fopen(path, "r");
    unsigned long long s = 0;
    fscanf(f, "%llu %la\n", &s, &t->state);
    t->steps = s;
    char b[4096];
    size_t n = fread(b, 1, 4096, f);
    t->note.assign(b, n);
    fclose(f);
    return 0;
}
const char *ponder_trainer_note(const ponder_trainer *t) { return t->note.c_str(); }
uint64_t ponder_trainer_steps(const ponder_trainer *t) { return t->steps; }
ponder_status ponder_trainer_export(const ponder_trainer *t, const char *folder, ponder_error *) {
    FILE *f = fopen((std::string(folder) + "/ponder.json").c_str(), "w");
    if (f) {
        fprintf(f, "%a\n", t->state);
        fclose(f);
    }
    return 0;
}
}
