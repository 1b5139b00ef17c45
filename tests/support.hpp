// What tests of whole passes share: a runtime with the build tree's backends, models, adapters.
#pragma once

#include "adapt/lora.hpp"
#include "adapt/stored.hpp"
#include "adapt/ttt.hpp"
#include "base/error.hpp"
#include "base/options.hpp"
#include "session/session.hpp"
#include "temp_dir.hpp"

#include <cmath>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace ponder::test {

inline const std::string tiny = PONDER_TEST_DATA "/gpt2_tiny"; // 2 layers, width 64, vocabulary 320

// A stream for it: runs of few values, so that there is something to learn.
inline std::vector<int32_t> random_tokens(size_t count, uint64_t seed) {
    Random random(seed);
    std::vector<int32_t> tokens(count);
    for (int32_t &t : tokens)
        t = int32_t(random.next() % 12 + (random.next() % 8 == 0 ? 200 : 0));
    return tokens;
}

inline std::shared_ptr<const Runtime> make_runtime(uint32_t threads = 2) {
    auto runtime = std::make_shared<Runtime>();
    runtime->memory = std::make_shared<Memory>(0, nullptr, nullptr, nullptr);
    runtime->threads = std::make_shared<Threads>(threads);
    runtime->backends = load_backends(PONDER_TEST_BACKENDS, {});
    return runtime;
}

inline std::shared_ptr<const Model> load_model(const std::string &folder,
                                               const std::string &backend = "auto",
                                               const std::string &dtype = "f32",
                                               uint32_t threads = 2) {
    return std::make_shared<Model>(make_runtime(threads), folder, backend, dtype,
                                   [](uint64_t, uint64_t) {});
}

inline std::vector<int32_t> uniform_tokens(size_t count, int64_t vocabulary, uint64_t seed) {
    Random random(seed);
    std::vector<int32_t> tokens(count);
    for (int32_t &t : tokens)
        t = int32_t(random.next() % uint64_t(vocabulary));
    return tokens;
}

// A model that a suite's tests share.
inline const std::shared_ptr<const Model> &
tiny_model(const std::string &backend, const std::string &dtype = "f32", uint32_t threads = 2) {
    static std::map<std::string, std::shared_ptr<const Model>> models;
    auto &entry = models[backend + dtype + std::to_string(threads)];
    if (!entry)
        entry = load_model(tiny, backend, dtype, threads);
    return entry;
}

using Values = std::vector<std::pair<const char *, std::string>>;

inline Options with(Options options, const Values &values) {
    for (const auto &[name, value] : values)
        options.set(name, value);
    return options;
}

inline Options make_options(const Values &values) {
    return with(
        with(Options(), {{"context", "512"}, {"guard.norm", "inf"}, {"budget.rate", "inf"}}),
        values);
}

inline CallGuard no_limits(Session &session) { return {session.cancel_flag(), nullptr}; }

inline std::vector<float> tensor(const SafeTensors &file, const std::string &name) {
    std::vector<float> values(file.find(name)->count());
    file.read(name, file.find(name)->shape, DType::f32, values.data());
    return values;
}

inline std::vector<int32_t> ids(const SafeTensors &file, const std::string &name) {
    std::vector<int32_t> values(file.find(name)->count());
    file.read(name, file.find(name)->shape, DType::i32, values.data());
    return values;
}

// ||a - b|| / ||b||
template <class A, class B> double relative_error(const A &a, const B &b) {
    double difference = 0, norm = 0;
    for (size_t i = 0; i < b.size(); ++i) {
        difference += (double(a[i]) - double(b[i])) * (double(a[i]) - double(b[i]));
        norm += double(b[i]) * double(b[i]);
    }
    return std::sqrt(difference / norm);
}

} // namespace ponder::test
