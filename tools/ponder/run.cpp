// `ponder run`: files -> one stream; adapt along it, then score it again frozen (SKIP).
#include "commands.hpp"
#include "documents.hpp"
#include "interrupt.hpp"
#include "json_out.hpp"
#include "run_result.hpp"
#include "setup.hpp"
#include "stepper.hpp"
#include "stream_length.hpp"
#include "terminal.hpp"
#include "text.hpp"
#include "tokens.hpp"
#include "write_file.hpp"

#include <algorithm>
#include <cstdio>

namespace tool {

namespace {

// Tokens and losses kept in memory for the baseline and the page: 12 bytes each.
constexpr size_t most_kept = 8'000'000;

class AdaptivePass {
public:
    AdaptivePass(const ponder_model *model, const ponder_options *options, Documents &documents,
                 bool quiet, RunResult &result)
        : result_(result), session_(make_session(model, options)), cancel_(session_.get()),
          stepper_(session_.get()), tokens_(model), documents_(documents), progress_(quiet),
          start_(std::chrono::steady_clock::now()) {
        result_.chunk_tokens = info_of(session_.get()).chunk_tokens;
        declare_length(session_.get(), result_.policy, documents_, tokens_);
    }

    void run() {
        const size_t chunk = result_.chunk_tokens;
        std::vector<int32_t> waiting;
        std::string path, text;
        while (!interrupted() && documents_.next(path, text)) {
            if (result_.all_kept)
                result_.documents.push_back({result_.adapted.tokens + waiting.size(), path});
            const size_t added = tokens_.append(text, waiting);
            size_t used = 0;
            for (; waiting.size() - used >= chunk && !interrupted(); used += chunk) {
                const auto ids = std::span(waiting).subspan(used, chunk);
                if (!keep(stepper_.chunk(ids), ids))
                    break;
                const double left =
                    double(waiting.size() - used) / double(std::max<size_t>(added, 1));
                show(double(documents_.done()) - std::min(left, 1.0) * double(text.size()));
            }
            waiting.erase(waiting.begin(), waiting.begin() + std::ptrdiff_t(used));
        }
        if (!interrupted())
            keep(stepper_.last(waiting), waiting);
        result_.files = documents_.used();
        result_.files_left_out = documents_.left_out();
        result_.bytes = documents_.done();
        result_.interrupted = interrupted();
    }

private:
    bool keep(const std::optional<ponder_record> &record, std::span<const int32_t> ids) {
        if (!record)
            return false;
        result_.chunks.push_back({*record, NAN});
        result_.adapted = stepper_.totals();
        if (result_.tokens.size() + ids.size() > most_kept)
            result_.all_kept = false;
        if (result_.all_kept) {
            result_.tokens.insert(result_.tokens.end(), ids.begin(), ids.end());
            stepper_.append_losses(*record, result_.losses);
        }
        return true;
    }
    void show(double bytes_done) {
        if (!progress_.due())
            return;
        const Totals &t = result_.adapted;
        const double share = bytes_done / double(std::max<uint64_t>(documents_.total(), 1));
        const double elapsed =
            std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
        progress_.show(
            format("adapting %s %3.0f %%  %.0f tok/s  loss %.3f  updates %.0f %%  ETA %s",
                   progress_bar(share, 10).c_str(), 100 * share, t.tokens_per_second(),
                   t.token_loss(), 100 * t.per_chunk(double(t.updates)),
                   duration_text(elapsed * (1 - share) / share).c_str()));
    }

    RunResult &result_;
    Session session_;
    CancelOnInterrupt cancel_;
    Stepper stepper_;
    DocumentTokens tokens_;
    Documents &documents_;
    Progress progress_;
    std::chrono::steady_clock::time_point start_;
};

// The same tokens, context and chunks with nothing that learns.
void run_baseline(const ponder_model *model, const Settings &settings, RunResult &result) {
    const Options options = make_options(settings);
    call(ponder_options_set, options.get(), "adapter", "none");
    call(ponder_options_set, options.get(), "policy", "skip");
    const Session session = make_session(model, options.get());
    const CancelOnInterrupt cancel(session.get());
    Stepper stepper(session.get());
    Progress progress(settings.quiet);
    const size_t chunk = result.chunk_tokens;
    const std::span<const int32_t> tokens(result.tokens);
    for (size_t at = 0, i = 0; at < tokens.size() && !interrupted(); at += chunk, ++i) {
        const auto ids = tokens.subspan(at, std::min(chunk, tokens.size() - at));
        const auto record = ids.size() == chunk ? stepper.chunk(ids) : stepper.last(ids);
        if (!record)
            break;
        result.chunks[i].skip_loss = record->loss_before;
        stepper.append_losses(*record, result.skip_losses);
        const Totals &t = stepper.totals();
        if (!progress.due())
            continue;
        const double share = double(t.tokens) / double(tokens.size());
        progress.show(format("SKIP     %s %3.0f %%  %.0f tok/s  loss %.3f  ETA %s",
                             progress_bar(share, 10).c_str(), 100 * share, t.tokens_per_second(),
                             t.token_loss(),
                             duration_text(t.seconds() * (1 - share) / share).c_str()));
    }
    result.skip = stepper.totals();
    result.interrupted = interrupted();
}

} // namespace

static std::vector<std::string> paths_of(const Settings &settings) {
    return settings.paths.empty() ? std::vector<std::string>{"."} : settings.paths;
}

// No model is needed to say what would be read.
static int list_command(const Settings &settings) {
    Documents documents(paths_of(settings), settings.quiet);
    JsonWriter json;
    json.object().member("schema_version", 1).member("command", "run --list");
    json.key("files").array();
    std::string path, text;
    while (!interrupted() && documents.next(path, text)) {
        json.object(true).member("path", path).member("bytes", uint64_t(text.size())).end();
        if (!settings.json)
            std::printf("%s\n", path.c_str());
    }
    json.end().member("files_left_out", documents.left_out()).end();
    if (settings.json)
        json.print();
    return interrupted() ? exit_interrupted : exit_ok;
}

int run_command(const Settings &settings) {
    if (settings.list)
        return list_command(settings);
    const Runtime runtime = open_runtime(settings);
    const Options options = options_in_force(settings);
    require_causal(options.get());
    Documents documents(paths_of(settings),
                        settings.quiet); // a wrong path shows before a large model is loaded
    const Model model = load_model(runtime.get(), model_folder(settings), settings);
    RunResult result{};
    result.model = info_of(model.get());
    result.method = method_text(options.get());
    result.policy = value_of(options.get(), "policy");
    result.context_tokens = number_of(options.get(), "context");
    if (result.context_tokens == 0)
        result.context_tokens = uint64_t(result.model.context);

    AdaptivePass(model.get(), options.get(), documents, settings.quiet, result).run();
    if (settings.baseline && !interrupted()) {
        if (!result.all_kept)
            note(settings.quiet, "a long stream: SKIP and the page cover its first " +
                                     with_commas(result.tokens.size()) + " tokens");
        run_baseline(model.get(), settings, result);
    }
    if (result.interrupted)
        note(settings.quiet, "interrupted; this is what was done so far");
    if (!result.interrupted && result.chunks.empty())
        throw Failure(exit_file, result.files_left_out
                                     ? "nothing to read: only binary, too large or unreadable files"
                                     : "nothing to read: no text with two tokens");
    if (!settings.html.empty()) {
        write_file(settings.html, html_report(result, model.get()));
        note(settings.quiet, "wrote " + settings.html);
    }
    if (settings.json)
        print_run_json(result, options.get());
    else
        print_run_table(result);
    return result.interrupted ? exit_interrupted : exit_ok;
}

} // namespace tool
