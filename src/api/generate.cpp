// Generating: requests checked and copied, callbacks in the ABI's form.
#include "api/sessions.hpp"

#include "session/generate.hpp"

#include <cmath>

using namespace ponder;
using namespace ponder::api;

namespace {

constexpr size_t most_listed = 1 << 20; // ids, strings

template <class T> std::span<const T> list(const T *items, size_t count, const char *name) {
    if (count > most_listed)
        throw_error(PONDER_E_ARGUMENT, "%s: %zu are too many", name, count);
    return count > 0 ? std::span(&require(items, name), count) : std::span<const T>();
}

void check_ids(std::span<const int32_t> ids, int64_t vocabulary, const char *name) {
    for (size_t i = 0; i < ids.size(); ++i)
        if (ids[i] < 0 || ids[i] >= vocabulary)
            throw_error(PONDER_E_ARGUMENT, "%s[%zu] = %d is not in 0..%d", name, i, ids[i],
                        int(vocabulary - 1));
}

double within(double value, double minimum, double maximum, const char *name) {
    if (!(value >= minimum && value <= maximum))
        throw_error(PONDER_E_ARGUMENT, "%s = %g is not in %g..%g", name, value, minimum, maximum);
    return value;
}

Generation copy_of(const ponder_generation *given, const Model &model, uint32_t stream) {
    const ponder_generation g = read_struct(&require(given, "generation"), "generation");
    const int64_t vocabulary = model.backbone().config().vocabulary;
    constexpr uint32_t known =
        PONDER_GENERATE_LOGPROBS | PONDER_GENERATE_KEEP_CACHE | PONDER_GENERATE_IGNORE_END;
    if ((g.flags & ~known) != 0)
        throw_error(PONDER_E_UNSUPPORTED, "generation.flags: this version does not know %#x",
                    g.flags & ~known);
    Generation wish;
    const auto prompt = list(g.prompt, g.prompt_count, "prompt");
    if (prompt.empty())
        throw_error(PONDER_E_ARGUMENT, "prompt has no token to begin with");
    check_ids(prompt, vocabulary, "prompt");
    wish.prompt.assign(prompt.begin(), prompt.end());
    wish.max_tokens = g.max_tokens == 0 ? 256 : g.max_tokens;
    Sampling &s = wish.sampling;
    s.temperature = within(g.temperature, 0, 100, "temperature");
    s.top_k = g.top_k;
    s.top_p = g.top_p == 0 ? 1 : within(g.top_p, 0, 1, "top_p");
    s.min_p = within(g.min_p, 0, 1, "min_p");
    s.repetition = g.repetition == 0 ? 1 : within(g.repetition, 0.01, 100, "repetition");
    s.seed = g.seed;
    const auto bias_ids = list(g.bias_ids, g.bias_count, "bias_ids");
    const auto bias = list(g.bias, g.bias_count, "bias");
    check_ids(bias_ids, vocabulary, "bias_ids");
    for (size_t i = 0; i < bias.size(); ++i)
        s.bias.emplace_back(bias_ids[i], float(within(bias[i], -10000, 10000, "bias")));
    const auto stop_tokens = list(g.stop_tokens, g.stop_token_count, "stop_tokens");
    check_ids(stop_tokens, vocabulary, "stop_tokens");
    wish.stop_tokens.assign(stop_tokens.begin(), stop_tokens.end());
    const Tokenizer *tokenizer = model.tokenizer();
    if (tokenizer && tokenizer->end_of_text() >= 0 && !(g.flags & PONDER_GENERATE_IGNORE_END))
        wish.stop_tokens.push_back(tokenizer->end_of_text());
    for (const char *text : list(g.stop_strings, g.stop_string_count, "stop_strings")) {
        if (require(text, "stop_strings[i]") == 0)
            throw_error(PONDER_E_ARGUMENT, "stop_strings: one is empty");
        if (!tokenizer)
            throw_error(PONDER_E_UNSUPPORTED, "stop_strings: the model has no tokenizer");
        wish.stop_strings.emplace_back(text);
    }
    wish.log_probabilities = (g.flags & PONDER_GENERATE_LOGPROBS) != 0;
    wish.keep_cache = (g.flags & PONDER_GENERATE_KEEP_CACHE) != 0;
    if (g.token)
        wish.token = [=, call = g.token, user_data = g.user_data](
                         uint64_t index, int32_t id, double log_p, std::string_view text) {
            ponder_generated event{};
            event.struct_size = sizeof event;
            event.stream = stream;
            event.index = index;
            event.id = id;
            event.logprob = log_p;
            event.text = text.empty() ? "" : text.data();
            event.text_size = text.size();
            return call(user_data, &event) != 0;
        };
    return wish;
}

void generate(ponder_session *const *handles, uint32_t count,
              const ponder_generation *const *generations, ponder_generation_result *const *results,
              const ponder_call *call) {
    const ponder_call limits = read_struct(call, "call");
    const std::vector<Session *> sessions = session_list(handles, count);
    if (sessions.empty())
        return;
    require(generations, "generations");
    std::vector<Generation> wishes;
    std::vector<ponder_generation_result> found(count);
    for (uint32_t i = 0; i < count; ++i) {
        wishes.push_back(copy_of(generations[i], sessions[0]->model(), i));
        if (results && results[i])
            check_out(results[i], "result");
        found[i].stopped_by = -1;
    }
    std::vector<CallGuard> guards;
    for (Session *session : sessions)
        guards.emplace_back(session->cancel_flag(), &limits);
    Session::generate(sessions, wishes, found, guards);
    for (uint32_t i = 0; i < count; ++i)
        if (results && results[i])
            write_struct(results[i], found[i]);
}

} // namespace

ponder_status ponder_session_generate(ponder_session *session, const ponder_generation *generation,
                                      ponder_generation_result *result, const ponder_call *call,
                                      ponder_error *error) {
    return guard(error, [&] { generate(&session, 1, &generation, &result, call); });
}

ponder_status ponder_generate(ponder_session *const *sessions, uint32_t count,
                              const ponder_generation *const *generations,
                              ponder_generation_result *const *results, const ponder_call *call,
                              ponder_error *error) {
    return guard(error, [&] { generate(sessions, count, generations, results, call); });
}

ponder_status ponder_session_accept(ponder_session *session, uint64_t first, uint64_t count,
                                    ponder_error *error) {
    return guard(error, [&] { check(session, "session").session->accept_text(first, count); });
}
