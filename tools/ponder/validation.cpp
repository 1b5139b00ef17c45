#include "validation.hpp"

#include "interrupt.hpp"
#include "stepper.hpp"
#include "terminal.hpp"
#include "text.hpp"

#include <algorithm>
#include <filesystem>

namespace tool {

Validator::Validator(ponder_runtime *runtime, const ponder_model *model, const Settings &settings,
                     const DataSplit &split, std::string folder)
    : runtime_(runtime), model_(model), settings_(settings), split_(split),
      folder_(std::move(folder)) {}

Validator::~Validator() {
    std::error_code ignored;
    std::filesystem::remove_all(folder_, ignored);
}

std::optional<Validation> Validator::measure(const ponder_trainer *trainer,
                                             Progress &progress) const {
    call(ponder_trainer_export, trainer, folder_.c_str());
    const Options options = make_options(settings_);
    const auto set = [&](const char *name, const std::string &value) {
        call(ponder_options_set, options.get(), name, value.c_str());
    };
    Model trained;
    const ponder_model *model = model_;
    if (settings_.train.kind == TrainKind::backbone) {
        trained = load_model(runtime_, folder_, settings_);
        model = trained.get();
        set("adapter", "none");
        set("policy", "skip");
        const auto context = uint64_t(info_of(model).context);
        set("chunk", std::to_string(std::min(context, number_of(options.get(), "chunk"))));
        set("context", value_of(options.get(), "chunk"));
    } else {
        set("adapter", folder_);
        if (settings_.train.kind == TrainKind::gate)
            set("policy", "adapter");
        else if (value_of(options.get(), "train.inner") == "0")
            set("policy", "skip");
    }
    const Session session = make_session(model, options.get());
    const CancelOnInterrupt cancel(session.get());
    const uint64_t chunk = info_of(session.get()).chunk_tokens;
    Stepper stepper(session.get());
    std::vector<int32_t> ids;
    size_t done = 0;
    for (const DataSplit::Part &part : split_.parts()) {
        const uint64_t chunks = std::min(part.count / chunk, settings_.train.valid_chunks);
        ++done;
        if (chunks < 2)
            continue;
        ids.clear();
        part.read(0, chunks * chunk, ids);
        stepper.restart(chunks);
        for (uint64_t i = 0; i < chunks; ++i)
            if (interrupted() || !stepper.chunk(std::span(ids).subspan(i * chunk, chunk)))
                return std::nullopt;
        if (progress.due())
            progress.show(
                format("validating %s  loss %.4f",
                       progress_bar(double(done) / double(split_.parts().size()), 20).c_str(),
                       stepper.totals().chunk_loss()));
    }
    const Totals &t = stepper.totals();
    return Validation{t.chunk_loss(), t.per_chunk(double(t.steps)), t.chunks};
}

} // namespace tool
