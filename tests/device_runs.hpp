// What tests of devices share: a small model on the reference backend or on another, and what
// sessions and trainers do there.
#pragma once

#include "backend/reference/reference.hpp"
#include "support.hpp"
#include "train/trainer.hpp"

namespace ponder::test {

inline std::shared_ptr<const Model>
load_beside_reference(const Backend &other, const std::string &folder, const char *backend,
                      const char *dtype, uint64_t limit = 0, const char *weights = "auto") {
    auto runtime = std::make_shared<Runtime>();
    runtime->memory = std::make_shared<Memory>(limit, nullptr, nullptr, nullptr);
    runtime->threads = std::make_shared<Threads>(3);
    runtime->backends = {{reference_backend(), "reference", "", ""}, other};
    return std::make_shared<Model>(
        runtime, folder, backend, dtype, [](uint64_t, uint64_t) {}, weights);
}

// Three chunks of a stream, from its beginning or from a snapshot: what a snapshot holds then, and
// the losses of the last.
inline std::pair<std::vector<std::byte>, std::vector<float>>
three_chunks(const std::shared_ptr<const Model> &model, const Options &options,
             std::span<const int32_t> tokens, std::span<const std::byte> from) {
    Session session(model, options);
    if (from.empty())
        session.feed(tokens);
    else
        session.load(from, "snapshot");
    for (int i = 0; i < 3; ++i) {
        session.score(no_limits(session));
        session.learn(-1, no_limits(session));
    }
    return {session.save(), {session.losses().begin(), session.losses().end()}};
}

// Steps on three streams each.
inline std::vector<ponder_train_record> take_steps(Trainer &trainer, uint64_t steps,
                                                   size_t tokens) {
    std::atomic<bool> cancel{false};
    std::vector<ponder_train_record> records;
    for (uint64_t i = 0; i < steps; ++i) {
        std::vector<std::vector<int32_t>> streams;
        std::vector<ponder_stream> given;
        for (uint64_t s = 0; s < 3; ++s)
            streams.push_back(random_tokens(tokens, i * 16 + s));
        for (const auto &s : streams)
            given.push_back({s.data(), s.size()});
        records.push_back(trainer.step(given, CallGuard(cancel, nullptr)));
    }
    return records;
}

} // namespace ponder::test
