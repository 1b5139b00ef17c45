// `ponder train`: data -> trainer -> checkpoints, a log, and at the end what was trained.
#include "checkpoints.hpp"
#include "commands.hpp"
#include "digest.hpp"
#include "interrupt.hpp"
#include "json_out.hpp"
#include "new_backbone.hpp"
#include "ranks.hpp"
#include "setup.hpp"
#include "source.hpp"
#include "table.hpp"
#include "terminal.hpp"
#include "text.hpp"
#include "train_log.hpp"
#include "training_data.hpp"
#include "validation.hpp"
#include "write_file.hpp"

#include <algorithm>
#include <chrono>
#include <cinttypes>
#include <cmath>
#include <filesystem>
#include <set>

namespace tool {

namespace fs = std::filesystem;

namespace {

const char *kind_name(TrainKind kind) {
    return kind == TrainKind::adapter ? "adapter" : kind == TrainKind::gate ? "gate" : "backbone";
}

int32_t kind_number(TrainKind kind) {
    return kind == TrainKind::adapter ? PONDER_TRAIN_ADAPTER
           : kind == TrainKind::gate  ? PONDER_TRAIN_GATE
                                      : PONDER_TRAIN_BACKBONE;
}

// The caches, the two sides of the split, and the units that steps are made of.
class Data {
public:
    Data(const ponder_model *model, const std::string &model_path, const ponder_options *options,
         const Settings &settings) {
        const TrainSettings &t = settings.train;
        const std::string folder = cache_folder(t.cache);
        DataSource source(t.data, settings.quiet);
        caches_.emplace_back(source, model, model_path, folder, settings.quiet);
        std::set<uint64_t> measured; // keys of packages
        if (!t.valid.empty()) {
            DataSource held(t.valid, settings.quiet);
            caches_.emplace_back(held, model, model_path, folder, settings.quiet);
            for (const TokenCache::Run &run : caches_.back().runs()) {
                valid_.add(caches_.back(), run);
                measured.insert(run.key);
            }
        }
        std::set<std::string_view> shared;
        for (const TokenCache::Run &run : caches_.front().runs())
            if (measured.contains(run.key))
                shared.insert(run.package);
            else
                (held_out(run.package, t.valid_share) ? valid_ : train_).add(caches_.front(), run);
        if (!shared.empty())
            note(settings.quiet, format("%zu packages are also in --valid, such as %.80s: they are "
                                        "not trained on",
                                        shared.size(), std::string(*shared.begin()).c_str()));
        cut(model, options, settings);
    }
    const Units &units() const { return *units_; }
    const DataSplit &train() const { return train_; }
    const DataSplit &valid() const { return valid_; }
    const std::string &identity() const { return identity_; } // of the units and their order

private:
    void cut(const ponder_model *model, const ponder_options *options, const Settings &settings) {
        const TrainSettings &t = settings.train;
        uint64_t length = number_of(options, "chunk"), most = t.chunks;
        if (t.kind == TrainKind::backbone) {
            most = 0;
            length = number_of(options, "context");
            if (length == 0)
                length = uint64_t(info_of(model).context);
            units_ = make_windows(train_, length);
        } else {
            units_ = make_pieces(train_, length, most);
        }
        if (units_->count() == 0)
            throw Failure(exit_file,
                          t.kind == TrainKind::backbone
                              ? "the training data has fewer tokens than one window of " +
                                    std::to_string(length + 1)
                              : "no package of the training data has two chunks of " +
                                    std::to_string(length) + " tokens");
        Digest digest;
        for (const TokenCache &cache : caches_)
            digest.add_text(cache.key());
        digest.add_text(format("%d %.17g %" PRIu64 " %" PRIu64 " %s", int(t.kind), t.valid_share,
                               length, most, value_of(options, "seed").c_str()));
        identity_ = digest.hex();
    }

    std::vector<TokenCache> caches_ = reserved();
    DataSplit train_, valid_;
    std::unique_ptr<Units> units_;
    std::string identity_;

    // Splits point at the caches: they must not move.
    static std::vector<TokenCache> reserved() {
        std::vector<TokenCache> caches;
        caches.reserve(2);
        return caches;
    }
};

// What a checkpoint says about the data, in its note.
struct Position {
    std::string data;
    uint64_t units = 0; // taken so far

    std::string text() const {
        return format("ponder train 1\ndata %s\nunits %" PRIu64 "\n", data.c_str(), units);
    }
    static std::optional<Position> parse(const char *note) {
        char data[64];
        Position position;
        if (std::sscanf(note, "ponder train 1 data %63s units %" SCNu64, data, &position.units) !=
            2)
            return std::nullopt;
        position.data = data;
        return position;
    }
};

struct Outcome {
    bool complete = true;
    uint64_t steps = 0, tokens = 0; // tokens: of this process
    double seconds = 0;
    double loss = NAN; // of the last step
    std::optional<Validation> valid;
};

class Training {
public:
    Training(const Settings &settings, const RunFolder &folder, ponder_runtime *runtime,
             const ponder_model *model, const ponder_options *options, const Data &data)
        : settings_(settings), folder_(folder), data_(data), options_(options),
          trainer_(make_trainer(model)), order_(data.units().count(), number_of(options, "seed")),
          validator_(runtime, model, settings, data.valid(), folder.path() + "/.valid"),
          progress_(settings.quiet), last_(number_of(options, "train.steps")),
          writes_(number_of(options, "train.rank") == 0) {
        position_.data = data.identity();
        resumed_ = settings.train.resume ? folder.latest() : std::nullopt;
        if (resumed_)
            load(*resumed_);
        else if (settings.train.resume)
            note(settings.quiet, folder.path() + ": no checkpoint yet; from the start");
    }

    Outcome run() {
        log_.emplace(settings_.train.log.empty() ? folder_.path() + "/log.jsonl"
                                                 : settings_.train.log,
                     resumed_);
        start_ = std::chrono::steady_clock::now();
        first_step_ = steps();
        if (!resumed_ && measures())
            log_->add_start();
        if (!validate_if_due())
            outcome_.complete = false;
        while (outcome_.complete && steps() < last_) {
            if (interrupted() || !step() || !validate_if_due())
                outcome_.complete = false;
            if (!outcome_.complete || steps() == last_ ||
                steps() % settings_.train.checkpoint_every == 0)
                save();
        }
        outcome_.steps = steps();
        outcome_.seconds = elapsed();
        progress_.clear();
        if (outcome_.complete && writes_)
            call(ponder_trainer_export, trainer_.get(), folder_.path().c_str());
        return outcome_;
    }

private:
    Trainer make_trainer(const ponder_model *model) const {
        ponder_trainer *trainer = nullptr;
        call(ponder_trainer_create, &trainer, model, kind_number(settings_.train.kind), options_);
        return Trainer(trainer);
    }
    uint64_t steps() const { return ponder_trainer_steps(trainer_.get()); }
    double elapsed() const {
        return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
    }

    void load(uint64_t step) {
        const std::string path = folder_.checkpoint(step);
        call(ponder_trainer_load, trainer_.get(), path.c_str());
        const auto position = Position::parse(ponder_trainer_note(trainer_.get()));
        if (!position || steps() != step)
            throw Failure(exit_file, path + ": was not written by this command");
        if (position->data != data_.identity())
            throw Failure(exit_usage, path + ": was made with other data, another cut of it or "
                                             "another seed");
        position_ = *position;
        saved_ = step;
        note(settings_.quiet, "going on from " + path);
    }

    void save() {
        if (saved_ == steps() || steps() == 0 || !writes_)
            return;
        log_->sync();
        call(ponder_trainer_save, trainer_.get(), folder_.checkpoint(steps()).c_str(),
             position_.text().c_str());
        saved_ = steps();
        folder_.keep(settings_.train.keep);
    }

    // False: SIGINT came first, nothing has changed.
    bool step() {
        const uint32_t batch = settings_.train.batch;
        ids_.resize(batch);
        streams_.clear();
        for (uint32_t i = 0; i < batch; ++i) {
            ids_[i].clear();
            data_.units().read(order_.unit(position_.units + i), ids_[i]);
            streams_.push_back({ids_[i].data(), ids_[i].size()});
        }
        auto limits = sized<ponder_call>();
        limits.user_data = this;
        limits.progress = [](void *self, uint64_t done, uint64_t total) -> int32_t {
            static_cast<Training *>(self)->show(total ? double(done) / double(total) : 0);
            return interrupted();
        };
        auto record = sized<ponder_train_record>();
        ponder_error error{};
        error.struct_size = sizeof error;
        const ponder_status status =
            ponder_trainer_step(trainer_.get(), streams_.data(), batch, &limits, &record, &error);
        if (status == PONDER_E_CANCELLED)
            return false;
        check(status, error);
        position_.units += batch;
        outcome_.loss = record.loss;
        outcome_.tokens += record.tokens;
        log_->add(record);
        last_record_ = record;
        if (record.flags & PONDER_TRAIN_NOT_FINITE)
            note(settings_.quiet,
                 format("step %" PRIu64 ": the gradient is not finite; left out", record.step));
        show(0);
        return true;
    }

    bool measures() const {
        return settings_.train.valid_every > 0 && !data_.valid().parts().empty();
    }
    // False: SIGINT came first; the next process makes up for it.
    bool validate_if_due() {
        const bool due =
            measures() && (steps() % settings_.train.valid_every == 0 || steps() == last_);
        if (!due || log_->validated())
            return true;
        outcome_.valid = validator_.measure(trainer_.get(), progress_);
        if (!outcome_.valid)
            return false;
        log_->add(*outcome_.valid);
        progress_.clear();
        note(settings_.quiet,
             format("step %" PRIu64 ": valid %.4f%s", steps(), outcome_.valid->loss,
                    std::isfinite(outcome_.loss) ? format(", loss %.4f", outcome_.loss).c_str()
                                                 : ""));
        return true;
    }

    void show(double share_of_step) {
        if (!progress_.due())
            return;
        const double done = double(steps()) + share_of_step, share = done / double(last_);
        const double left = double(last_) - done, here = done - double(first_step_);
        progress_.show(format(
            "%s %s/%s  loss %.4f%s  lr %.2g  %.0f tok/s  ETA %s", progress_bar(share, 10).c_str(),
            with_commas(steps()).c_str(), with_commas(last_).c_str(), outcome_.loss,
            outcome_.valid ? format("  valid %.4f", outcome_.valid->loss).c_str() : "",
            last_record_.learning_rate, last_record_.tokens_per_second,
            duration_text(here > 0 ? elapsed() / here * left : NAN).c_str()));
    }

    const Settings &settings_;
    const RunFolder &folder_;
    const Data &data_;
    const ponder_options *options_;
    Trainer trainer_;
    Order order_;
    Validator validator_;
    Progress progress_;
    uint64_t last_;
    bool writes_; // checkpoints and what is trained: of processes that train together, the first
    Position position_;
    std::optional<uint64_t> resumed_, saved_;
    std::optional<TrainLog> log_;
    std::vector<std::vector<int32_t>> ids_;
    std::vector<ponder_stream> streams_;
    ponder_train_record last_record_{};
    Outcome outcome_;
    uint64_t first_step_ = 0;
    std::chrono::steady_clock::time_point start_;
};

// A backbone's export has its weights; the tokenizer comes from where the training began.
void copy_tokenizer(const std::string &from, const std::string &to) {
    std::error_code problem;
    if (fs::equivalent(from, to, problem))
        return;
    for (const char *name : {"tokenizer.json", "vocab.json", "merges.txt"}) {
        const std::string source = (fs::path(from) / name).string();
        if (!fs::exists(source, problem))
            continue;
        std::string text;
        read_whole(source, text);
        write_file((fs::path(to) / name).string(), text);
    }
}

void check_request(const Settings &settings, const ponder_options *options) {
    const TrainSettings &t = settings.train;
    if (t.kind == TrainKind::backbone && settings.model.empty() == !t.create)
        throw Failure(exit_usage, "train backbone: either --new, or --model DIR to go on from");
    if (t.create && t.kind != TrainKind::backbone)
        throw Failure(exit_usage, "--new is for backbones");
    const std::string adapter = value_of(options, "adapter");
    if (t.kind == TrainKind::gate && !fs::is_directory(adapter))
        throw Failure(exit_usage, "train gate: --adapter DIR names the adapter it is for");
    if (t.kind == TrainKind::adapter && adapter == "none")
        throw Failure(exit_usage, "train adapter: '--adapter none' has nothing to train");
    if (!t.valid.empty() && t.valid_share > 0)
        throw Failure(exit_usage, "either --valid or --valid-share");
}

void print_outcome(const Outcome &o, const Settings &settings, const Data &data,
                   const RunFolder &folder) {
    const double speed = o.seconds > 0 ? double(o.tokens) / o.seconds : 0;
    if (settings.json) {
        JsonWriter json;
        json.object().member("schema_version", 1).member("command", "train");
        json.member("kind", kind_name(settings.train.kind)).member("complete", o.complete);
        json.member("out", folder.path()).member("steps", o.steps).member("loss", o.loss);
        json.member("valid_loss", o.valid ? o.valid->loss : NAN);
        json.member("tokens", o.tokens).member("seconds", o.seconds);
        json.member("tokens_per_second", speed).member("peak_rss_bytes", peak_rss_bytes());
        json.key("data").object().member("train_tokens", data.train().tokens());
        json.member("valid_tokens", data.valid().tokens());
        json.member("units", data.units().count()).member("identity", data.identity());
        json.end().end().print();
        return;
    }
    Table table("lr");
    table.row({"trained", kind_name(settings.train.kind)});
    table.row({"steps", with_commas(o.steps)});
    if (std::isfinite(o.loss))
        table.row({"loss", format("%.4f nats/token", o.loss)});
    if (o.valid)
        table.row({"valid", format("%.4f nats/token", o.valid->loss)});
    table.row({"time", format("%s, %.0f tokens/s", duration_text(o.seconds).c_str(), speed)});
    table.row({"data", format("%s tokens in %s %s", with_commas(data.train().tokens()).c_str(),
                              with_commas(data.units().count()).c_str(),
                              settings.train.kind == TrainKind::backbone ? "windows" : "streams")});
    table.row({"peak memory", bytes_text(peak_rss_bytes())});
    table.row({o.complete ? "written to" : "kept in", folder.path()});
    std::fputs(table.text().c_str(), stdout);
}

Outcome run_training(const Settings &settings, const RunFolder &folder, ponder_runtime *runtime,
                     const ponder_model *model, const ponder_options *options, const Data &data) {
    Training training(settings, folder, runtime, model, options, data);
    try {
        return training.run();
    } catch (const Failure &failure) {
        const auto latest = folder.latest();
        const bool here = number_of(options, "train.rank") == 0; // others have links alone
        if (!latest || !here || failure.code == exit_usage)
            throw;
        throw Failure(failure.code, std::string(failure.what()) + " (the last checkpoint is " +
                                        folder.checkpoint(*latest) + "; --resume goes on from it)");
    }
}

} // namespace

int train_command(const Settings &given_settings) {
    Settings settings = given_settings;
    TrainSettings &t = settings.train;
    if (t.batch == 0)
        t.batch = t.kind == TrainKind::backbone ? 32 : 4;
    join_by_environment(settings);
    const Options options = make_options(settings);
    check_request(settings, options.get());
    std::optional<FollowerFolder> follower;
    if (number_of(options.get(), "train.rank") > 0) {
        follower.emplace(t.out, t.resume);
        t.out = follower->path();
        t.checkpoint_every = UINT64_MAX;
        t.valid_every = 0;
        t.log.clear();
        settings.quiet = true;
    }
    const Runtime runtime = open_runtime(settings);
    const RunFolder folder(t.out);
    if (const auto latest = folder.latest(); latest && !t.resume)
        throw Failure(exit_usage,
                      folder.checkpoint(*latest) +
                          " is there: --resume goes on from it, or choose another --out");
    std::string source = folder.path() + "/initial";
    // What a killed run had no time for.
    folder.keep(t.keep);
    remove_unfinished(folder.path());
    remove_unfinished(source);
    if (t.create)
        create_backbone(source, options.get(), settings);
    else
        source = model_folder(settings);
    const Model model = load_model(runtime.get(), source, settings);
    const Data data(model.get(), source, options.get(), settings);
    if (t.kind == TrainKind::backbone && !follower)
        copy_tokenizer(source, folder.path());
    const Outcome outcome =
        run_training(settings, folder, runtime.get(), model.get(), options.get(), data);
    if (!outcome.complete)
        note(settings.quiet, outcome.steps ? "interrupted; --resume goes on from " +
                                                 folder.checkpoint(outcome.steps)
                                           : "interrupted before the first step");
    if (!follower)
        print_outcome(outcome, settings, data, folder);
    return outcome.complete ? exit_ok : exit_interrupted;
}

} // namespace tool
