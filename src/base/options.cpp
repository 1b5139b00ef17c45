#include "base/options.hpp"

#include "base/error.hpp"
#include "base/hash.hpp"

#include <array>
#include <charconv>
#include <cmath>
#include <limits>

namespace ponder {

namespace {

constexpr double unbounded = std::numeric_limits<double>::infinity();

// A row of the table.
struct Option {
    ponder_option_info info;
    bool hashed = true; // its value changes what is computed
    // For those that say who computes, and how they meet.
    constexpr Option not_hashed() const { return {info, false}; }
};

constexpr Option option(int32_t type, const char *name, const char *value, const char *unit,
                        const char *doc, double minimum, double maximum, const char *choices = "") {
    return {{sizeof(ponder_option_info), type, name, value, unit, doc, minimum, maximum, choices}};
}
constexpr Option integer(const char *name, const char *value, double minimum, double maximum,
                         const char *unit, const char *doc) {
    return option(PONDER_OPTION_INTEGER, name, value, unit, doc, minimum, maximum);
}
constexpr Option number(const char *name, const char *value, double minimum, double maximum,
                        const char *unit, const char *doc) {
    return option(PONDER_OPTION_NUMBER, name, value, unit, doc, minimum, maximum);
}
constexpr Option boolean(const char *name, const char *value, const char *doc) {
    return option(PONDER_OPTION_BOOLEAN, name, value, "", doc, 0, 1);
}
constexpr Option text(const char *name, const char *value, const char *choices, const char *doc) {
    return option(PONDER_OPTION_TEXT, name, value, "", doc, 0, 0, choices);
}

constexpr Option options[] = {
    text("adapter", "lora", "none|lora|ttt-linear|ttt-mlp|DIR",
         "what adapts: LoRA on the backbone's linears, a TTT layer after it, or an adapter folder"),
    text("policy", "always",
         "skip|always|every:N|first:P|random:P|threshold:SIGNAL:X|ema:SIGNAL:RATE|adapter|oracle:RATE",
         "when to learn; signals: loss, entropy, reconstruction, gradient_norm, update_norm; "
         "adapter: its gate; oracle: reads what comes next, for analysis"),
    number("policy.target_rate", "0", 0, 64, "steps/chunk",
           "policy adapter: what the gate spends; 0 = as calibrated"),
    integer("steps", "1", 0, 64, "steps", "inner steps on a chunk that the policy chose"),
    integer("seed", "0", 0, 9007199254740992.0, "", "of initial fast weights and random policies"),
    integer("chunk", "512", 2, 1048576, "tokens",
            "the unit that is scored, decided on and learned"),
    integer("context", "0", 0, 1048576, "tokens",
            "attended at most, this chunk included; earlier chunks run again before it, as many as "
            "fit; 0 = the backbone's full context"),

    integer("lora.rank", "16", 1, 256, "", "rank of every pair A, B"),
    text("lora.layers", "half", "all|half|last:N|LIST",
         "adapted layers: all, the last half, the last N, or numbers such as 5,6,9"),
    text("lora.modules", "all", "all|LIST",
         "adapted linears of a layer: attn.c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj"),

    text("ttt.form", "official", "official|ponder",
         "semantics of the TTT layer: Sun et al. 2024, or PonderTTT's variant (linear only)"),
    integer("ttt.heads", "0", 0, 1024, "", "heads of the TTT layer; 0 = the backbone's"),
    integer("ttt.mini_batch", "16", 1, 1024, "tokens", "unit of one TTT update"),
    number("ttt.base_lr", "0", 0, 1000, "", "base step size; 0 = the source's (1, MLP 0.1)"),
    number("ttt.decay", "0", 0, 10, "",
           "PonderTTT: exponential decay of step sizes in a mini-batch"),
    number("ttt.max_gradient_norm", "0", 0, unbounded, "",
           "PonderTTT: bound of each mini-batch's gradient; 0 = off"),
    integer("ttt.causal_k", "0", -16, 0, "",
            "PonderTTT: diagonal of the in-batch mask; 0 reads the token itself"),
    boolean("ttt.gate", "1", "a GELU gate on the layer's output"),
    boolean("ttt.share_qk", "1", "queries and keys share a projection and differ by a convolution"),
    boolean("ttt.learns", "1", "0: step sizes of zero, the static baseline"),
    boolean("ttt.carry", "1", "fast weights go on from chunk to chunk; 0 = from W1 in every chunk"),

    text("inner.optimizer", "adam", "adam|sgd", "update rule of LoRA's fast weights"),
    number("inner.lr", "3e-3", 0, 100, "", "step size"),
    number("inner.beta1", "0.9", 0, 0.999999, "", "Adam: decay of the first moment"),
    number("inner.beta2", "0.999", 0, 0.99999999, "", "Adam: decay of the second moment"),
    number("inner.epsilon", "1e-8", 1e-30, 1, "", "Adam: added to the root"),
    number("inner.clip", "1", 0, unbounded, "",
           "bound of the norm of all gradients together; 0 = off"),

    number("guard.norm", "16", 0, unbounded, "",
           "an update whose norm |new - old| is above is rolled back; inf = off"),
    number("budget.rate", "4", 0, unbounded, "steps/chunk",
           "steps that the token bucket gains with each chunk; inf = off"),
    number("budget.burst", "64", 0, 1e9, "steps", "what the bucket holds at most, and at first"),

    integer("train.steps", "1000", 1, 1e12, "steps",
            "length of the learning-rate schedule; later steps stay at its end"),
    integer("train.warmup", "100", 0, 1e12, "steps",
            "linear warm-up of the learning rate; too short a one lets gradients explode"),
    number("train.lr", "1e-3", 0, 100, "", "outer learning rate at its top"),
    number("train.end", "0.1", 0, 1, "", "share of train.lr at the end of the cosine"),
    number("train.rate_lr", "30", 0, 1e6, "",
           "adapters: learning rate of log step sizes and decay, as a multiple of train.lr"),
    number("train.beta1", "0.9", 0, 0.999999, "", "outer AdamW: decay of the first moment"),
    number("train.beta2", "0.95", 0, 0.99999999, "", "outer AdamW: decay of the second moment"),
    number("train.epsilon", "1e-8", 1e-30, 1, "", "outer AdamW: added to the root"),
    number("train.decay", "0.1", 0, 10, "", "outer AdamW: decoupled weight decay of matrices"),
    number("train.clip", "1", 0, unbounded, "", "bound of the outer gradient's norm; 0 = off"),
    integer("train.window", "8", 1, 4096, "chunks",
            "adapters: gradients flow through this many chunks, then the fast weights go on as "
            "constants"),
    boolean("train.inner", "1", "adapters: take inner steps; 0 trains the static adapter"),
    boolean("train.higher", "0",
            "adapters: exact gradients through the inner updates, second order included (f32); 0 "
            "takes inner gradients as constants"),
    number("train.permute", "0", 0, 1, "",
           "adapters: up to this share of the token ids change places, differently in each stream: "
           "text that has to be learned anew (Rajendran et al. 2020)"),
    boolean("train.keep", "0",
            "adapters: keep the activations of all chunks of a window; 0 computes them again"),
    number("train.reconstruction", "0.1", 0, 1000, "",
           "TTT layers: weight of the reconstruction loss in the outer loss"),
    number("train.dropout", "0", 0, 0.9, "", "backbones: on embeddings and residual branches"),
    number("train.attention_dropout", "0", 0, 0.9, "",
           "backbones: on attention's weights, which are then written out: slow, and T x T each"),
    number("train.average", "0", 0, 0.999999, "",
           "adapters and backbones: what is exported is the mean of about the last 1 / (1 - this) "
           "steps; 0 = the last step"),
    boolean("train.recompute", "0",
            "backbones: blocks compute their activations again in the backward pass: less memory, "
            "about a quarter more work"),
    integer("train.world", "1", 1, 65536, "processes",
            "that take each step together: data parallel training")
        .not_hashed(),
    integer("train.rank", "0", 0, 65535, "", "which of them this one is").not_hashed(),
    text("train.address", "", "HOST:PORT", "where process 0 waits for the others").not_hashed(),
    number("train.patience", "600", 0.1, 1e6, "s",
           "without a byte from the others, after which a step fails")
        .not_hashed(),
    integer("train.micro", "8", 1, 4096, "streams",
            "backbones: streams in one pass; gradients of more are added up"),

    text("gate.features", "planned", "planned|ponder",
         "gates: what they read: our 64 numbers, or PonderTTT's 32"),
    text("gate.form", "steps", "steps|binary|soft",
         "gates: K in {0, 1, 2, 4}; skip or update; a scale in 0..1 on the update"),
    integer("gate.hidden", "64", 2, 4096, "", "gates: width of the two hidden layers"),
    text("gate.loss", "advantage", "advantage|ponder",
         "gates: learn the measured gain of each K, or PonderTTT's CE + beta TTT + gamma cost"),
    integer("gate.horizon", "8", 1, 4096, "chunks",
            "gates: a step's gain is measured on this many chunks after it"),
    integer("gate.samples", "6", 1, 4096, "chunks", "gates: measured in each stream of a batch"),
    integer("gate.replay", "50", 1, 1e6, "",
            "gates: updates of the network for each outer step, on all that was measured so far"),
    integer("gate.prior", "4000", 0, 1e9, "samples",
            "gates: what the rule that a gate starts from (more where the loss jumps) counts for; a "
            "measured gain alone is mostly noise"),
    number("gate.beta", "0.1", 0, 1000, "", "gate.loss=ponder: weight of the inner loss"),
    number("gate.gamma", "1", 0, 1000, "",
           "gate.loss=ponder: weight of the squared distance to the target rate"),
    number("gate.target", "0.5", 0, 1, "updates/chunk", "gate.loss=ponder: update rate aimed at"),
    number("gate.temperature", "1", 0.001, 100, "", "gate.loss=ponder: Gumbel-Softmax, at first"),
    number("gate.temperature_end", "0.1", 0.001, 100, "",
           "gate.loss=ponder: Gumbel-Softmax after train.steps"),

    integer("model.layers", "4", 1, 1000, "", "new backbones: blocks"),
    integer("model.width", "128", 2, 65536, "", "new backbones: width of the residual stream"),
    integer("model.heads", "4", 1, 1024, "", "new backbones: attention heads"),
    integer("model.context", "512", 2, 1048576, "tokens", "new backbones: positions"),

    integer("record.ring", "1024", 1, 1048576, "records", "newest records that are kept"),
    boolean("record.loss_after", "0", "pay a forward pass after each update to record its loss"),
    boolean("analysis", "0",
            "TTT layers: the policy may read the chunk it changes (not causal, marked so)"),
};

constexpr size_t table_size = std::size(options);

constexpr auto table = [] {
    std::array<ponder_option_info, table_size> infos{};
    for (size_t i = 0; i < table_size; ++i)
        infos[i] = options[i].info;
    return infos;
}();

size_t index_of(std::string_view name) {
    for (size_t i = 0; i < table_size; ++i)
        if (name == table[i].name)
            return i;
    throw_error(PONDER_E_ARGUMENT, "option '%.*s' does not exist",
                int(std::min<size_t>(name.size(), 80)), name.data());
}

double parse_number(const ponder_option_info &info, const std::string &value) {
    double result = 0;
    const char *end = value.data() + value.size();
    const auto [stop, problem] = std::from_chars(value.data(), end, result);
    if (problem != std::errc() || stop != end || std::isnan(result))
        throw_error(PONDER_E_ARGUMENT, "option '%s': '%.40s' is no number", info.name,
                    value.c_str());
    const bool whole = info.type == PONDER_OPTION_NUMBER || result == std::floor(result);
    if (result < info.minimum || result > info.maximum || !whole)
        throw_error(PONDER_E_ARGUMENT, "option '%s': %.40s is not %s%g..%g", info.name,
                    value.c_str(), info.type == PONDER_OPTION_NUMBER ? "in " : "a whole number in ",
                    info.minimum, info.maximum);
    return result;
}

// Plain choices are compared; forms with capitals (N, LIST, DIR) are the owner's to parse.
void check_choice(const ponder_option_info &info, const std::string &value) {
    const std::string_view choices = info.choices;
    for (char c : choices)
        if (c >= 'A' && c <= 'Z')
            return;
    for (size_t at = 0; at <= choices.size();) {
        const size_t bar = std::min(choices.find('|', at), choices.size());
        if (choices.substr(at, bar - at) == value)
            return;
        at = bar + 1;
    }
    throw_error(PONDER_E_ARGUMENT, "option '%s': '%.40s' is none of %s", info.name, value.c_str(),
                info.choices);
}

} // namespace

std::span<const ponder_option_info> option_table() { return table; }

Options::Options() {
    for (const ponder_option_info &info : table)
        values_.emplace_back(info.default_value);
    given_.resize(values_.size());
}

void Options::set(std::string_view name, std::string_view value) {
    set_default(name, value);
    given_[index_of(name)] = true;
}

bool Options::given(std::string_view name) const { return given_[index_of(name)]; }

void Options::set_default(std::string_view name, std::string_view value) {
    const size_t i = index_of(name);
    const ponder_option_info &info = table[i];
    std::string copy(value);
    if (copy.size() > 4096 || copy.find('\0') != std::string::npos)
        throw_error(PONDER_E_ARGUMENT, "option '%s': value too long", info.name);
    if (info.type == PONDER_OPTION_TEXT)
        check_choice(info, copy);
    else
        parse_number(info, copy);
    values_[i] = std::move(copy);
}

const std::string &Options::text(std::string_view name) const { return values_[index_of(name)]; }

double Options::number(std::string_view name) const {
    const size_t i = index_of(name);
    return parse_number(table[i], values_[i]);
}

int64_t Options::integer(std::string_view name) const { return int64_t(number(name)); }

std::vector<std::pair<std::string, std::string>> Options::computed_by() const {
    std::vector<std::pair<std::string, std::string>> found;
    for (size_t i = 0; i < table_size; ++i) {
        if (!options[i].hashed)
            continue;
        std::string value = values_[i];
        if (table[i].type != PONDER_OPTION_TEXT) {
            char digits[32];
            value.assign(
                digits, std::to_chars(digits, std::end(digits), parse_number(table[i], value)).ptr);
        }
        found.emplace_back(table[i].name, std::move(value));
    }
    return found;
}

std::string Options::hash() const {
    Hash hash;
    for (const auto &[name, value] : computed_by()) {
        hash.add(name);
        hash.add(value);
    }
    return hash.hex();
}

} // namespace ponder
