// `ponder generate`: read and learn, say what that gained, continue a text.
#include "commands.hpp"
#include "documents.hpp"
#include "interrupt.hpp"
#include "json_out.hpp"
#include "setup.hpp"
#include "side_by_side.hpp"
#include "stepper.hpp"
#include "stream_length.hpp"
#include "tokens.hpp"

#include <algorithm>
#include <cstdio>
#include <unistd.h>

namespace tool {

namespace {

// What reading gained: every chunk is scored before it is learned from, and by the frozen model.
struct Read {
    uint64_t files = 0, left_out = 0, bytes = 0;
    Totals adapted, frozen;
};

Read read_and_learn(ponder_session *session, ponder_session *frozen, const ponder_model *model,
                    const std::string &policy, const Settings &settings) {
    Read read;
    Documents documents(settings.generate.read, settings.quiet);
    const DocumentTokens tokens(model);
    declare_length(session, policy, documents, tokens);
    Stepper learns(session), skips(frozen);
    Progress progress(settings.quiet);
    const size_t chunk = info_of(session).chunk_tokens;
    std::vector<int32_t> waiting;
    std::string path, text;
    const auto both = [&](std::span<const int32_t> ids) {
        const auto step = [&](ponder_session *one, Stepper &stepper) {
            const CancelOnInterrupt cancel(one);
            return ids.size() == chunk ? stepper.chunk(ids) : stepper.last(ids);
        };
        return step(session, learns) && step(frozen, skips);
    };
    while (!interrupted() && documents.next(path, text)) {
        tokens.append(text, waiting);
        size_t used = 0;
        for (; waiting.size() - used >= chunk && !interrupted(); used += chunk) {
            if (!both(std::span(waiting).subspan(used, chunk)))
                break;
            if (progress.due())
                progress.show(
                    format("reading %s %3.0f %%  loss %.3f, without learning %.3f",
                           progress_bar(double(documents.done()) /
                                            double(std::max<uint64_t>(documents.total(), 1)),
                                        10)
                               .c_str(),
                           100 * double(documents.done()) /
                               double(std::max<uint64_t>(documents.total(), 1)),
                           learns.totals().token_loss(), skips.totals().token_loss()));
        }
        waiting.erase(waiting.begin(), waiting.begin() + std::ptrdiff_t(used));
    }
    if (!interrupted() && waiting.size() >= 2)
        both(waiting);
    progress.clear();
    read.files = documents.used();
    read.left_out = documents.left_out();
    read.bytes = documents.done();
    read.adapted = learns.totals();
    read.frozen = skips.totals();
    return read;
}

struct Written {
    std::string text;
    ponder_generation_result result = sized<ponder_generation_result>();
    bool interrupted = false;
    double tokens_per_second() const {
        return result.decode_ns ? double(result.tokens) * 1e9 / double(result.decode_ns) : 0;
    }
};

struct Listener {
    std::string *text;
    bool stream;
};

int32_t take(void *user_data, const ponder_generated *generated) {
    const Listener &listener = *static_cast<const Listener *>(user_data);
    const std::string_view piece(generated->text, generated->text_size);
    listener.text->append(piece);
    if (listener.stream && !piece.empty()) {
        const std::string shown = valid_utf8(piece);
        std::fwrite(shown.data(), 1, shown.size(), stdout);
        std::fflush(stdout);
    }
    return interrupted();
}

Written write(ponder_session *session, const std::vector<int32_t> &prompt, const Settings &settings,
              uint64_t seed, bool stream) {
    const GenerateSettings &g = settings.generate;
    Written written;
    Listener listener{&written.text, stream};
    std::vector<const char *> stop;
    for (const std::string &text : g.stop)
        stop.push_back(text.c_str());
    auto wish = sized<ponder_generation>();
    wish.prompt = prompt.data();
    wish.prompt_count = prompt.size();
    wish.max_tokens = g.max_tokens;
    wish.temperature = g.temperature;
    wish.top_k = g.top_k;
    wish.top_p = g.top_p;
    wish.min_p = g.min_p;
    wish.repetition = g.repetition;
    wish.seed = seed;
    wish.stop_strings = stop.data();
    wish.stop_string_count = stop.size();
    wish.user_data = &listener;
    wish.token = take;
    const CancelOnInterrupt cancel(session);
    auto error = sized<ponder_error>();
    const ponder_status status =
        ponder_session_generate(session, &wish, &written.result, nullptr, &error);
    written.interrupted = interrupted();
    if (status != PONDER_E_CANCELLED || !written.interrupted)
        check(status, error);
    return written;
}

const char *reason_name(int32_t reason) {
    static constexpr const char *names[] = {"length", "token", "string", "callback"};
    return names[std::clamp(reason, 0, 3)];
}

void print_json(const Read *read, const std::string &prompt, const Written &adapted,
                const Written *frozen, const ponder_options *options) {
    JsonWriter json;
    json.object().member("schema_version", 1).member("command", "generate");
    json.member("method", method_text(options));
    if (read) {
        json.key("read").object();
        json.member("files", read->files).member("bytes", read->bytes);
        json.member("tokens", read->adapted.tokens);
        json.member("loss", read->adapted.token_loss());
        json.member("skip_loss", read->frozen.token_loss());
        json.member("seconds", read->adapted.seconds() + read->frozen.seconds()).end();
    }
    json.member("prompt", prompt);
    const auto add = [&](const char *name, const Written &w) {
        json.key(name).object();
        json.member("text", w.text).member("tokens", w.result.tokens);
        json.member("prompt_tokens", w.result.prompt_tokens);
        json.member("ended_by", reason_name(w.result.reason));
        json.member("prefill_seconds", double(w.result.prefill_ns) * 1e-9);
        json.member("tokens_per_second", w.tokens_per_second()).end();
    };
    add("completion", adapted);
    if (frozen)
        add("completion_without_reading", *frozen);
    json.end().print();
}

} // namespace

int generate_command(const Settings &settings) {
    const GenerateSettings &g = settings.generate;
    if (g.compare && g.read.empty())
        throw Failure(exit_usage, "--compare shows what --read changes: name something to read");
    if (g.prompt == "-" && std::find(g.read.begin(), g.read.end(), "-") != g.read.end())
        throw Failure(exit_usage, "--read and --prompt cannot both be standard input");
    const Runtime runtime = open_runtime(settings);
    const Options options = options_in_force(settings);
    require_causal(options.get());
    std::string prompt = g.prompt;
    if (prompt == "-" && read_whole("-", prompt) == ReadResult::too_large)
        throw Failure(exit_file, "the prompt is larger than " + bytes_text(largest_document));
    const Model model = load_model(runtime.get(), model_folder(settings), settings);
    const uint64_t seed = number_of(options.get(), "seed");
    std::vector<int32_t> ids;
    DocumentTokens(model.get()).append(prompt, ids);
    if (ids.empty())
        throw Failure(exit_usage, "the model needs a prompt: it has no token that begins a text");

    const Session session = make_session(model.get(), options.get());
    const Options skip = make_options(settings);
    call(ponder_options_set, skip.get(), "adapter", "none");
    call(ponder_options_set, skip.get(), "policy", "skip");
    const Session frozen = make_session(model.get(), skip.get());
    Read read;
    if (!g.read.empty()) {
        read = read_and_learn(session.get(), frozen.get(), model.get(),
                              value_of(options.get(), "policy"), settings);
        note(settings.quiet,
             format("read %s files, %s tokens in %s: %.3f nats a token, %.3f without learning "
                    "(%+.3f)",
                    with_commas(read.files).c_str(), with_commas(read.adapted.tokens).c_str(),
                    duration_text(read.adapted.seconds()).c_str(), read.adapted.token_loss(),
                    read.frozen.token_loss(),
                    read.adapted.token_loss() - read.frozen.token_loss()));
        if (interrupted())
            return exit_interrupted;
    }
    const bool stream = !g.compare && !settings.json;
    if (stream && isatty(STDOUT_FILENO)) {
        const std::string shown = valid_utf8(prompt);
        std::printf(stdout_has_colour() ? "\033[2m%s\033[0m" : "%s", shown.c_str());
    }
    const Written written = write(session.get(), ids, settings, seed, stream);
    Written without;
    if (g.compare && !written.interrupted)
        without = write(frozen.get(), ids, settings, seed, false);
    if (settings.json) {
        print_json(g.read.empty() ? nullptr : &read, prompt, written,
                   g.compare ? &without : nullptr, options.get());
    } else if (g.compare) {
        std::fputs(side_by_side({"without reading", without.text}, {"after reading", written.text},
                                terminal_width())
                       .c_str(),
                   stdout);
    } else {
        std::fputc('\n', stdout);
    }
    std::fflush(stdout);
    note(settings.quiet, format("%s tokens, %.0f tok/s; prompt of %s, %s",
                                with_commas(written.result.tokens).c_str(),
                                written.tokens_per_second(), with_commas(ids.size()).c_str(),
                                duration_text(double(written.result.prefill_ns) * 1e-9).c_str()));
    return written.interrupted || interrupted() ? exit_interrupted : exit_ok;
}

} // namespace tool
