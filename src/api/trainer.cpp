// Trainers.
#include "api/handles.hpp"

#include "base/file.hpp"

using namespace ponder;
using namespace ponder::api;

ponder_status ponder_trainer_create(ponder_trainer **out, const ponder_model *model, int32_t kind,
                                    const ponder_options *options, ponder_error *error) {
    return guard(error, [&] {
        require(out, "out");
        const auto &m = check(model, "model").model;
        const Options o = options_or_defaults(options);
        auto handle = std::make_unique<ponder_trainer>();
        handle->trainer = make_trainer(m, kind, o);
        *out = handle.release();
    });
}

void ponder_trainer_destroy(ponder_trainer *trainer) {
    if (trainer && ponder_trainer::is(trainer))
        delete trainer;
}

ponder_status ponder_trainer_step(ponder_trainer *trainer, const ponder_stream *streams,
                                  uint32_t count, const ponder_call *call,
                                  ponder_train_record *out, ponder_error *error) {
    return guard(error, [&] {
        Trainer &t = *check(trainer, "trainer").trainer;
        require(streams, "streams");
        if (out)
            check_out(out, "out");
        const ponder_call limits = read_struct(call, "call");
        std::atomic<bool> cancel{false};
        const CallGuard bounds(cancel, &limits);
        const ponder_train_record record = t.step({streams, count}, bounds);
        if (out)
            write_struct(out, record);
    });
}

ponder_status ponder_trainer_save(const ponder_trainer *trainer, const char *path,
                                  const char *note, ponder_error *error) {
    return guard(error, [&] {
        check(trainer, "trainer").trainer->save(&require(path, "path"), note ? note : "");
    });
}

ponder_status ponder_trainer_load(ponder_trainer *trainer, const char *path,
                                  ponder_error *error) {
    return guard(error,
                 [&] { check(trainer, "trainer").trainer->load(&require(path, "path")); });
}

const char *ponder_trainer_note(const ponder_trainer *trainer) {
    return trainer && ponder_trainer::is(trainer) ? trainer->trainer->note().c_str() : "";
}

uint64_t ponder_trainer_steps(const ponder_trainer *trainer) {
    return trainer && ponder_trainer::is(trainer) ? trainer->trainer->steps() : 0;
}

ponder_status ponder_trainer_export(const ponder_trainer *trainer, const char *folder,
                                    ponder_error *error) {
    return guard(error, [&] {
        const Trainer &t = *check(trainer, "trainer").trainer;
        make_folder(&require(folder, "folder"));
        t.export_to(folder);
    });
}
