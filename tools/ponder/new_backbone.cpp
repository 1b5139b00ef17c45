#include "new_backbone.hpp"

#include "common.hpp"
#include "data_source.hpp"
#include "interrupt.hpp"
#include "package_key.hpp"
#include "terminal.hpp"
#include "text.hpp"
#include "training_data.hpp"

#include <exception>
#include <filesystem>
#include <optional>
#include <set>
#include <vector>

namespace tool {

namespace fs = std::filesystem;

namespace {

// Texts for the library's call. Failures wait until it has returned.
struct Texts {
    DataSource source;
    double valid_share;
    std::set<uint64_t> measured; // keys of packages in --valid
    std::vector<uint64_t> keys;  // of the source's runs, where some are measured
    Progress progress;
    DataText text;
    std::optional<PackageKey> run;
    size_t runs = 0;
    std::exception_ptr failure;

    Texts(const Settings &settings)
        : source(settings.train.data, settings.quiet), valid_share(settings.train.valid_share),
          progress(settings.quiet) {
        if (settings.train.valid.empty())
            return;
        DataSource valid(settings.train.valid, settings.quiet);
        for (const uint64_t key : package_keys(valid))
            measured.insert(key);
        keys = package_keys(source);
    }

    // Texts that something is measured on are not learned from, not even their words.
    bool is_held_out() {
        if (!run || !run->covers(text)) {
            run.emplace(text);
            if (++runs > keys.size() && !measured.empty())
                throw Failure(exit_file, source.name() + ": changed while it was read");
        }
        return held_out(text.package, valid_share) ||
               (!measured.empty() && measured.contains(keys[runs - 1]));
    }
    static int32_t next(void *self, const char **text, size_t *length) {
        return static_cast<Texts *>(self)->next(text, length);
    }
    int32_t next(const char **bytes, size_t *length) {
        try {
            do
                if (!source.next(text))
                    return 0;
            while (is_held_out());
            if (progress.due())
                progress.show(format("counting words %s %3.0f %%",
                                     progress_bar(source.share(), 20).c_str(),
                                     100 * source.share()));
            *bytes = text.text.data();
            *length = text.text.size();
            return 1;
        } catch (...) {
            failure = std::current_exception();
            return -1;
        }
    }
};

void train_tokenizer(const std::string &folder, const Settings &settings) {
    Texts texts(settings);
    ponder_error error{};
    error.struct_size = sizeof error;
    const ponder_status status = ponder_tokenizer_train(folder.c_str(), settings.train.vocabulary,
                                                        Texts::next, &texts, &error);
    if (texts.failure)
        std::rethrow_exception(texts.failure);
    check(status, error);
}

} // namespace

void create_backbone(const std::string &folder, const ponder_options *options,
                     const Settings &settings) {
    std::error_code problem;
    fs::create_directories(folder, problem);
    if (fs::exists(folder + "/model.safetensors", problem)) {
        if (settings.train.resume)
            return;
        throw Failure(exit_usage, folder + ": holds a new backbone already; --resume trains it, or "
                                           "choose another --out");
    }
    if (!settings.train.resume || !fs::exists(folder + "/tokenizer.json", problem)) {
        train_tokenizer(folder, settings);
        note(settings.quiet, "wrote " + folder + "/tokenizer.json");
    }
    call(ponder_backbone_create, folder.c_str(), options);
}

} // namespace tool
