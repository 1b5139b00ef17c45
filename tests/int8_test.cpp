// int8 weights: rounding, folders, sessions that read and learn with them.
#include "adapt/peft.hpp"
#include "backbone/convert.hpp"
#include "backend/reference/reference.hpp"
#include "expect_error.hpp"
#include "formats/int8_weights.hpp"
#include "session/generate.hpp"
#include "support.hpp"
#include "train/trainer.hpp"

#include <gtest/gtest.h>

#include <cstring>

namespace ponder::test {
namespace {

const std::string tiny = PONDER_TEST_DATA "/gpt2_tiny"; // 2 layers, width 64, vocabulary 320
const auto no_progress = [](uint64_t, uint64_t) {};

std::shared_ptr<Memory> memory() { return std::make_shared<Memory>(0, nullptr, nullptr, nullptr); }

void convert(const std::string &from, const std::string &to) {
    convert_to_int8(from, to, memory(), no_progress);
}

std::shared_ptr<const Model> load(const std::string &folder, const std::string &weights,
                                  const std::string &dtype = "f32",
                                  const std::string &backend = "cpu", uint32_t threads = 2) {
    return std::make_shared<Model>(make_runtime(threads), folder, backend, dtype, no_progress,
                                   weights);
}

// Text of this repository, so that code-10m has something to say about it.
std::vector<int32_t> source_tokens(const Model &model, size_t count) {
    std::string text;
    for (const char *name : {"int8_test.cpp", "session_test.cpp", "api_test.cpp"})
        text += read_file(std::string(PONDER_TEST_DATA) + "/../" + name, 1 << 20);
    std::vector<int32_t> tokens = model.tokenizer()->encode(text);
    EXPECT_GE(tokens.size(), count);
    tokens.resize(count);
    return tokens;
}

struct Read {
    std::vector<float> losses;
    std::vector<float> fast;
    double mean() const {
        double sum = 0;
        for (float x : losses)
            sum += x;
        return sum / double(losses.size());
    }
};

// Reads, and learns by the policy.
Read read(const std::shared_ptr<const Model> &model, const Options &options,
          std::span<const int32_t> tokens) {
    Session session(model, options);
    session.feed(tokens);
    Read result;
    while (session.score(no_limits(session))) {
        session.learn(-1, no_limits(session));
        result.losses.insert(result.losses.end(), session.losses().begin(), session.losses().end());
    }
    const std::vector<std::byte> bytes = session.save();
    result.fast = tensor(SafeTensors::view(bytes, "snapshot"), "fast");
    return result;
}

// ---- Rounding

struct Rounded {
    std::vector<int8_t> q;
    std::vector<float> scales;
};

Rounded round_matrix(const std::vector<float> &w, int64_t m, int64_t n, bool rows) {
    Rounded r{std::vector<int8_t>(w.size()), std::vector<float>(size_t(rows ? m : n))};
    to_int8(
        m, n, rows,
        [&](int64_t first, int64_t count, float *to) {
            std::copy_n(w.begin() + first * n, count * n, to);
        },
        r.q.data(), r.scales.data());
    return r;
}

TEST(Rounding, ToTheNearestOfEachChannel) {
    // Column 0 has scale 1, column 1 is zero, column 2 has scale 0.5, column 3 is all but zero.
    const std::vector<float> w = {127,  0, 63.5f, 1e-35f, -1.4f, 0, -0.2f,  -1e-35f,
                                  2.5f, 0, 0.26f, 0,      -127,  0, -63.5f, 0};
    const Rounded columns = round_matrix(w, 4, 4, false);
    EXPECT_EQ(columns.scales, (std::vector<float>{1, 1, 0.5f, 1}));
    EXPECT_EQ(columns.q,
              (std::vector<int8_t>{127, 0, 127, 0, -1, 0, 0, 0, 2, 0, 1, 0, -127, 0, -127, 0}));
    std::vector<float> turned(16);
    for (size_t i = 0; i < 16; ++i)
        turned[i % 4 * 4 + i / 4] = w[i];
    const Rounded rows = round_matrix(turned, 4, 4, true);
    EXPECT_EQ(rows.scales, columns.scales);
    for (size_t i = 0; i < 16; ++i)
        EXPECT_EQ(rows.q[i % 4 * 4 + i / 4], columns.q[i]);
}

TEST(Rounding, IsWithinHalfAStepInMatricesOfManyBlocks) {
    const int64_t m = 700, n = 1000;
    Random random(3);
    std::vector<float> w(size_t(m * n));
    for (float &x : w)
        x = float(random.normal() * 0.02);
    for (const bool of_rows : {false, true}) {
        const Rounded r = round_matrix(w, m, n, of_rows);
        std::vector<int> largest(r.scales.size(), 0);
        for (size_t i = 0; i < w.size(); ++i) {
            const size_t channel = of_rows ? i / size_t(n) : i % size_t(n);
            const float scale = r.scales[channel];
            ASSERT_LE(std::abs(w[i] - r.q[i] * scale), scale * 0.5001f);
            largest[channel] = std::max(largest[channel], std::abs(int(r.q[i])));
        }
        for (int x : largest)
            EXPECT_EQ(x, 127);
    }
}

// ---- Folders

TEST(Int8Folder, IsTheModelRoundedAtLoad) {
    for (const std::string &source : {tiny, std::string(PONDER_MODEL_CODE10M)})
        for (const DType type : {DType::f32, DType::bf16}) {
            TempDir folder;
            const std::string out = folder.file("int8");
            convert(source, out);
            Gpt2 plain(Gpt2Folder(source), type, memory(), no_progress);
            Gpt2 rounded(Gpt2Folder(source), type, memory(), no_progress, Storage::int8);
            Gpt2 stored(Gpt2Folder(out), type, memory(), no_progress, Storage::int8);
            Gpt2 widened(Gpt2Folder(out), type, memory(), no_progress, Storage::plain);
            for (const Gpt2 *model : {&rounded, &stored, &widened})
                EXPECT_EQ(model->hash(), plain.hash());
            EXPECT_EQ(rounded.content_hash(), stored.content_hash());
            ASSERT_EQ(rounded.bytes(), stored.bytes());
            const auto a = rounded.weights(), b = stored.weights();
            for (size_t i = 0; i < a.size(); ++i) {
                EXPECT_EQ(a[i].name, b[i].name);
                EXPECT_EQ(0, std::memcmp(a[i].data, b[i].data,
                                         size_t(a[i].shape.count()) * size_of(a[i].type)))
                    << a[i].name;
            }
            EXPECT_EQ(stored.parameters(), plain.parameters());
            EXPECT_EQ(widened.bytes(), plain.bytes());
            EXPECT_LE(double(stored.packed_estimate(true, 0)) * double(size_of(type)),
                      double(plain.packed_estimate(true, 0)));
        }
}

// The weights of linears, embedding and head are a byte; positions, vectors and scales are few.
TEST(Int8Folder, IsHalfOfBf16) {
    TempDir folder;
    const std::string out = folder.file("int8");
    convert(PONDER_MODEL_CODE10M, out);
    const double plain = double(Gpt2Folder(PONDER_MODEL_CODE10M).stored_bytes());
    EXPECT_LE(double(std::filesystem::file_size(out + "/model.safetensors")), 0.53 * plain);
    EXPECT_TRUE(file_exists(out + "/tokenizer.json"));
    EXPECT_TRUE(file_exists(out + "/adapter/ponder.json"));
    const auto a = load(PONDER_MODEL_CODE10M, "auto"), b = load(out, "auto");
    EXPECT_EQ(a->tokenizer()->encode("int main() {}"), b->tokenizer()->encode("int main() {}"));
    EXPECT_EQ(a->backbone().storage(), Storage::plain);
    EXPECT_EQ(b->backbone().storage(), Storage::int8);
}

TEST(Int8Folder, RefusesWhatItCannotDo) {
    TempDir folder;
    const std::string out = folder.file("int8");
    convert(tiny, out);
    expect_error(PONDER_E_STATE, {out, "holds weights"}, [&] { convert(tiny, out); });
    expect_error(PONDER_E_STATE, {out, "int8 already"}, [&] { convert(out, folder.file("b")); });
    EXPECT_FALSE(file_exists(folder.file("b/config.json")));
    expect_error(PONDER_E_NOT_FOUND, {}, [&] { convert(folder.file("none"), folder.file("b")); });
    expect_error(PONDER_E_ARGUMENT, {"int4"}, [&] { load(tiny, "int4"); });
    expect_error(PONDER_E_UNSUPPORTED, {"float"},
                 [&] { make_trainer(load(tiny, "int8"), PONDER_TRAIN_BACKBONE, Options()); });
    EXPECT_NO_THROW(make_trainer(load(out, "float"), PONDER_TRAIN_BACKBONE, Options()));
    TempDir copy; // a second conversion is the first one, byte for byte
    convert(tiny, copy.file("int8"));
    for (const char *name : {"/config.json", "/model.safetensors"})
        EXPECT_EQ(read_file(out + name, 1 << 20), read_file(copy.file("int8") + name, 1 << 20));
}

TEST(Int8Folder, AdapterMergesIntoThePlainModelOnly) {
    TempDir folder;
    convert(PONDER_MODEL_CODE10M, folder.file("int8"));
    expect_error(PONDER_E_UNSUPPORTED, {"int8"}, [&] {
        merge_adapter(folder.file("int8"), PONDER_MODEL_CODE10M "/adapter", folder.file("m"));
    });
}

// A device without kernels for int8 gets floats, unless int8 was asked for.
TEST(Int8Folder, IsFloatsWhereTheBackendHasNoInt8) {
    static const ponder_backend floats = [] {
        ponder_backend b = *reference_backend();
        b.supports = [](int32_t dtype) -> int32_t { return dtype != PONDER_DTYPE_I8; };
        return b;
    }();
    TempDir folder;
    const std::string out = folder.file("int8");
    convert(tiny, out);
    const auto runtime = std::make_shared<Runtime>();
    runtime->memory = memory();
    runtime->threads = std::make_shared<Threads>(1);
    runtime->backends = {{&floats, "floats", "", ""}};
    const auto load = [&](const std::string &from, const char *weights) {
        return Model(runtime, from, "floats", "bf16", no_progress, weights).backbone().storage();
    };
    EXPECT_EQ(load(out, "auto"), Storage::plain);
    EXPECT_EQ(load(tiny, "auto"), Storage::plain);
    for (const std::string &from : {out, tiny})
        expect_error(PONDER_E_UNSUPPORTED, {"floats", "int8"}, [&] { load(from, "int8"); });
}

// ---- Sessions

// Scores and learning with int8 in f32 are those of a plain model of the same numbers: forward,
// backward and updates go through q scale, and nothing else.
TEST(Int8Session, IsThatOfTheSameNumbers) {
    TempDir folder;
    const std::string out = folder.file("int8");
    convert(tiny, out);
    const auto tokens = uniform_tokens(16 * 6 + 5, 320, 5);
    for (const char *adapter : {"none", "lora", "ttt-linear"})
        for (const char *backend : {"cpu", "reference"}) {
            SCOPED_TRACE(std::string(adapter) + " on " + backend);
            Options options = make_options(
                {{"adapter", adapter}, {"chunk", "16"}, {"context", "32"}, {"lora.rank", "4"}});
            const Read a = read(load(out, "int8", "f32", backend), options, tokens);
            const Read b = read(load(out, "float", "f32", "reference"), options, tokens);
            ASSERT_EQ(a.losses.size(), b.losses.size());
            EXPECT_LE(relative_error(a.losses, b.losses), 1e-5);
            if (!a.fast.empty()) {
                EXPECT_LE(relative_error(a.fast, b.fast), 1e-4);
            }
        }
}

// Token by token as in one pass, for one stream and for many together.
TEST(Int8Session, DecodesAsItScores) {
    const auto model = load(tiny, "int8");
    const std::vector<int32_t> text = uniform_tokens(64, 320, 5);
    for (const char *adapter : {"none", "lora"}) {
        const Options options = make_options(
            {{"adapter", adapter}, {"chunk", "32"}, {"context", "64"}, {"lora.rank", "4"}});
        Session session(model, options);
        session.feed(std::span(text).first(32));
        session.adapt(no_limits(session));
        std::vector<std::unique_ptr<Session>> sessions;
        for (int i = 0; i < 20; ++i)
            sessions.push_back(session.fork());
        session.feed(std::span(text).subspan(32));
        ASSERT_TRUE(session.score(no_limits(session)));
        const auto losses = session.losses();
        // Stream i writes token 33 + i of the text, whatever it would have written.
        std::vector<Session *> list;
        std::vector<Generation> wishes(sessions.size());
        std::vector<ponder_generation_result> results(sessions.size());
        std::vector<CallGuard> guards;
        std::vector<double> found(sessions.size());
        for (size_t i = 0; i < sessions.size(); ++i) {
            list.push_back(sessions[i].get());
            guards.push_back(no_limits(*list[i]));
            wishes[i].prompt.assign(text.begin(), text.begin() + 33 + std::ptrdiff_t(i));
            wishes[i].max_tokens = 1;
            wishes[i].log_probabilities = true;
            wishes[i].sampling.bias = {{text[33 + i], 10000.0f}};
            wishes[i].token = [&found, i](uint64_t, int32_t, double log_p, std::string_view) {
                found[i] = log_p;
                return true;
            };
        }
        const size_t half = sessions.size() / 2;
        Session::generate(std::span(list).first(half), std::span(wishes).first(half),
                          std::span(results).first(half), std::span(guards).first(half));
        for (size_t i = half; i < sessions.size(); ++i)
            Session::generate(std::span(list).subspan(i, 1), std::span(wishes).subspan(i, 1),
                              std::span(results).subspan(i, 1), std::span(guards).subspan(i, 1));
        for (size_t i = 0; i < sessions.size(); ++i)
            EXPECT_NEAR(found[i], -double(losses[i]), 1e-4) << adapter << " " << i;
    }
}

TEST(Int8Session, DoesNotDependOnThreads) {
    const auto one = load(PONDER_MODEL_CODE10M, "int8", "bf16", "cpu", 1);
    const auto tokens = source_tokens(*one, 64 * 5 + 7);
    const Options options = make_options({{"chunk", "64"}, {"context", "128"}});
    const Read a = read(one, options, tokens);
    for (uint32_t threads : {2, 3}) {
        const Read b =
            read(load(PONDER_MODEL_CODE10M, "int8", "bf16", "cpu", threads), options, tokens);
        EXPECT_EQ(a.losses, b.losses);
        EXPECT_EQ(a.fast, b.fast);
    }
}

// The trained adapter of the plain model, frozen and learning, in both activation types.
TEST(Int8Session, LosesLittle) {
    const auto tokens = source_tokens(*load(PONDER_MODEL_CODE10M, "auto"), 512 * 3);
    for (const char *dtype : {"f32", "bf16"}) {
        const auto plain = load(PONDER_MODEL_CODE10M, "float", dtype);
        const auto int8 = load(PONDER_MODEL_CODE10M, "int8", dtype);
        Options skip = make_options({{"adapter", "none"}});
        Options adapt = make_options({});
        adapt.set("adapter", PONDER_MODEL_CODE10M "/adapter");
        adapt.set("policy", "always");
        double gain[2];
        int i = 0;
        for (const auto &model : {plain, int8}) {
            const double frozen = read(model, skip, tokens).mean();
            gain[i++] = frozen - read(model, adapt, tokens).mean();
        }
        EXPECT_NEAR(read(int8, skip, tokens).mean(), read(plain, skip, tokens).mean(), 0.01);
        EXPECT_NEAR(gain[0], gain[1], 0.01);
        EXPECT_GT(gain[1], 0.02);
    }
}

TEST(Int8Session, SnapshotsStayWithTheirStorage) {
    const auto int8 = load(tiny, "int8"), plain = load(tiny, "float");
    const Options options = make_options({{"chunk", "16"}, {"context", "32"}, {"lora.rank", "4"}});
    Session session(int8, options);
    session.feed(uniform_tokens(40, 320, 5));
    ASSERT_TRUE(session.score(no_limits(session)));
    const std::vector<std::byte> bytes = session.save();
    Session same(int8, options), other(plain, options);
    EXPECT_NO_THROW(same.load(bytes, "snapshot"));
    EXPECT_EQ(same.save(), bytes);
    expect_error(PONDER_E_MISMATCH, {"dtype"}, [&] { other.load(bytes, "snapshot"); });
}

} // namespace
} // namespace ponder::test
