// Session snapshots: one safetensors file with everything that a session needs to go on bit for
// bit. Buffers and the open chunk's activations are left out; they follow from the rest.
#include "base/error.hpp"
#include "session/session.hpp"

#include <cmath>
#include <cstring>

namespace ponder {

namespace {

constexpr const char *format = "ponder-session", *version = "3";

const TensorInfo &tensor(const SafeTensors &file, const std::string &name, const char *dtype) {
    const TensorInfo *info = file.find(name);
    if (!info || info->dtype != dtype || info->shape.size() != 1)
        throw_error(PONDER_E_FORMAT, "%s: tensor '%s' is missing or no vector of %s",
                    file.name().c_str(), name.c_str(), dtype);
    return *info;
}

template <class T>
std::vector<T> read_vector(const SafeTensors &file, const std::string &name, const char *dtype,
                           size_t least, size_t most) {
    const TensorInfo &info = tensor(file, name, dtype);
    const std::vector<std::byte> bytes = file.raw(name);
    const size_t count = bytes.size() / sizeof(T);
    if (bytes.size() % sizeof(T) != 0 || count < least || count > most)
        throw_error(PONDER_E_FORMAT, "%s: tensor '%s' has %lld elements", file.name().c_str(),
                    name.c_str(), static_cast<long long>(info.shape[0]));
    std::vector<T> values(count);
    if (count > 0)
        std::memcpy(values.data(), bytes.data(), bytes.size());
    return values;
}

void expect_metadata(const SafeTensors &file, const char *key, const std::string &wanted) {
    const auto at = file.metadata().find(key);
    if (at == file.metadata().end() || at->second != wanted)
        throw_error(PONDER_E_MISMATCH, "%s: '%s' is '%.60s', this session has '%s'",
                    file.name().c_str(), key,
                    at == file.metadata().end() ? "missing" : at->second.c_str(), wanted.c_str());
}

// Steps that the host gave hold for any policy; else a gate chooses them.
std::string options_text(const Options &options) {
    return options.hash() + (options.given("steps") ? " with steps" : "");
}

std::string dtype_text(const Gpt2 &model) {
    const std::string type = model.type() == DType::bf16 ? "bf16" : "f32";
    return model.storage() == Storage::int8 ? type + ", int8 weights" : type;
}

// Counts and signals, in this order.
enum Field {
    expected,
    chunks,
    fed,
    scored_tokens,
    updated,
    steps_taken,
    optimizer_steps,
    budget_left,
    open,
    ran_inside,
    open_tokens,
    scale,
    signal_loss,
    signal_entropy,
    signal_reconstruction,
    signal_gradient_norm,
    signal_update_norm,
    field_count
};

uint64_t count(double value, const SafeTensors &file, Field field) {
    if (!(value >= 0 && value <= 0x1p53 && value == std::floor(value)))
        throw_error(PONDER_E_FORMAT, "%s: tensor 'state': element %d is no count",
                    file.name().c_str(), int(field));
    return uint64_t(value);
}

} // namespace

std::vector<std::byte> Session::save() const {
    std::vector<double> state(field_count);
    state[expected] = double(expected_);
    state[chunks] = double(chunks_);
    state[fed] = double(fed_);
    state[scored_tokens] = double(scored_tokens_);
    state[updated] = double(updated_);
    state[steps_taken] = double(steps_taken_);
    state[optimizer_steps] = double(optimizer_steps_);
    state[budget_left] = budget_.off() ? 0 : budget_.left();
    state[open] = open_;
    state[ran_inside] = ran_inside_;
    state[open_tokens] = double(open_tokens_);
    state[scale] = scale_;
    state[signal_loss] = signals_.loss;
    state[signal_entropy] = signals_.entropy;
    state[signal_reconstruction] = signals_.reconstruction;
    state[signal_gradient_norm] = signals_.gradient_norm;
    state[signal_update_norm] = signals_.update_norm;
    const std::vector<double> policy = policy_->state();
    const std::vector<float> fast = current_.all().values();
    const std::vector<int32_t> waiting(waiting_.begin(), waiting_.end());
    const std::vector<ponder_record> records(records_.begin(), records_.end());

    SafeTensorsWriter writer;
    writer.metadata = {{"format", format},
                       {"version", version},
                       {"model", model_->backbone().hash()},
                       {"dtype", dtype_text(model_->backbone())},
                       {"options", options_text(options_)},
                       {"adapter", adapted_->stamp()},
                       {"gate", gate_ ? gate_->hash : ""}};
    const auto add = [&](const char *name, DType type, const auto &values) {
        const size_t bytes = values.size() * sizeof(values[0]);
        const size_t element = type == DType::none ? 1 : size_of(type);
        writer.add(name, type, {int64_t(bytes / element)}, values.data());
    };
    add("fast", DType::f32, fast);
    add("state", DType::f64, state);
    add("policy", DType::f64, policy);
    add("random", DType::none, random_.state);
    add("history", DType::i32, history_);
    add("waiting", DType::i32, waiting);
    add("open", DType::i32, open_ids_);
    add("losses", DType::f32, nll_);
    add("entropies", DType::f32, entropy_);
    add("records", DType::none, records);
    std::vector<std::byte> bytes;
    bytes.reserve(writer.size());
    writer.write([&](const void *data, size_t size) {
        const std::byte *from = static_cast<const std::byte *>(data);
        bytes.insert(bytes.end(), from, from + size);
    });
    return bytes;
}

void Session::load(const SafeTensors &file) {
    const std::string &name = file.name();
    expect_metadata(file, "format", format);
    expect_metadata(file, "version", version);
    expect_metadata(file, "model", model_->backbone().hash());
    expect_metadata(file, "dtype", dtype_text(model_->backbone()));
    expect_metadata(file, "options", options_text(options_));
    expect_metadata(file, "gate", gate_ ? gate_->hash : "");
    expect_metadata(file, "adapter", adapted_->stamp());

    // Everything is read and checked before anything changes.
    const size_t fast_size = current_.all().size();
    const auto fast = read_vector<float>(file, "fast", "F32", fast_size, fast_size);
    const auto state = read_vector<double>(file, "state", "F64", field_count, field_count);
    const auto policy = read_vector<double>(file, "policy", "F64", 0, 1 << 20);
    const auto random = read_vector<uint64_t>(file, "random", "U8", 4, 4);
    auto history = read_vector<int32_t>(file, "history", "I32", 0, size_t(2 * context_ + chunk_));
    const auto waiting = read_vector<int32_t>(file, "waiting", "I32", 0, most_waiting);
    auto open_ids = read_vector<int32_t>(file, "open", "I32", 0, size_t(context_));
    auto losses = read_vector<float>(file, "losses", "F32", nll_.size(), nll_.size());
    auto entropies = read_vector<float>(file, "entropies", "F32", entropy_.size(), entropy_.size());
    const auto records = read_vector<ponder_record>(file, "records", "U8", 0, ring_);
    const int64_t vocabulary = model_->backbone().config().vocabulary;
    for (const std::vector<int32_t> *ids :
         std::initializer_list<const std::vector<int32_t> *>{&history, &waiting, &open_ids})
        for (int32_t id : *ids)
            if (id < 0 || id >= vocabulary)
                throw_error(PONDER_E_FORMAT, "%s: token id %d is not in 0..%d", name.c_str(), id,
                            int(vocabulary - 1));
    for (const float value : fast)
        if (!std::isfinite(value))
            throw_error(PONDER_E_FORMAT, "%s: tensor 'fast' is not finite", name.c_str());
    for (const ponder_record &record : records)
        if (record.struct_size != sizeof record)
            throw_error(PONDER_E_FORMAT, "%s: tensor 'records' has another layout", name.c_str());
    const auto counted = [&](Field field) { return count(state[field], file, field); };
    const uint64_t tokens = counted(open_tokens);
    const bool opened = state[open] != 0;
    if (tokens > uint64_t(chunk_) || tokens > open_ids.size() || (tokens == 1) ||
        (opened && (tokens < 2 || records.empty())) || (state[chunks] > 0 && tokens < 2) ||
        (state[ran_inside] != 0 && !inside_) || !(state[scale] >= 0 && state[scale] <= 1e6))
        throw_error(PONDER_E_FORMAT, "%s: tensor 'state': the open chunk does not fit",
                    name.c_str());
    const uint64_t numbers[] = {counted(expected),       counted(chunks),  counted(fed),
                                counted(scored_tokens),  counted(updated), counted(steps_taken),
                                counted(optimizer_steps)};
    auto restored = new_policy();
    if (!restored->set_state(policy))
        throw_error(PONDER_E_FORMAT, "%s: tensor 'policy': %zu values that are no state of '%s'",
                    name.c_str(), policy.size(), options_.text("policy").c_str());

    std::deque<int32_t> waiting_now(waiting.begin(), waiting.end());
    std::deque<ponder_record> records_now(records.begin(), records.end());
    current_.all().write(fast.data(), fast.size());

    policy_.swap(restored);
    std::copy(random.begin(), random.end(), random_.state.begin());
    history_.swap(history);
    waiting_.swap(waiting_now);
    open_ids_.swap(open_ids);
    nll_.swap(losses);
    entropy_.swap(entropies);
    records_.swap(records_now);
    expected_ = numbers[0];
    chunks_ = numbers[1];
    fed_ = numbers[2];
    scored_tokens_ = numbers[3];
    updated_ = numbers[4];
    steps_taken_ = numbers[5];
    optimizer_steps_ = numbers[6];
    budget_.set_left(state[budget_left]);
    open_ = opened;
    ran_inside_ = state[ran_inside] != 0;
    open_tokens_ = int64_t(tokens);
    scale_ = state[scale];
    signals_ = {state[signal_loss], state[signal_entropy], state[signal_reconstruction],
                state[signal_gradient_norm], state[signal_update_norm]};
    open_pass_.reset();
    tape_ = gradient_ready_ = false;
    forget_text();
}

} // namespace ponder
