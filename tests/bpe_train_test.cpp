// Training of a byte-level BPE vocabulary against a trainer that counts everything anew each time.
#include "base/file.hpp"
#include "expect_error.hpp"
#include "formats/bpe_train.hpp"
#include "formats/gpt2_create.hpp"
#include "formats/tokenizer.hpp"
#include "temp_dir.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <random>
#include <set>

using namespace ponder;

namespace {

Merges train(const std::vector<std::string> &texts, size_t count) {
    BpeTrainer trainer;
    for (const std::string &text : texts)
        trainer.add(text);
    return trainer.merges(count);
}

Merges train_naively(const std::vector<std::string> &texts, size_t count) {
    std::map<std::vector<int32_t>, int64_t> words;
    WordSplitter splitter;
    for (const std::string &text : texts) {
        Words split(splitter, text);
        for (std::string_view word; split.next(word);) {
            std::vector<int32_t> ids;
            for (char byte : word)
                ids.push_back(id_of_byte(uint8_t(byte)));
            ++words[ids];
        }
    }
    std::map<int32_t, std::string> text;
    std::set<std::string> known;
    for (int byte = 0; byte < 256; ++byte)
        known.insert(text[id_of_byte(uint8_t(byte))] = std::string(1, char(byte)));
    Merges merges;
    std::set<std::pair<int32_t, int32_t>> refused;
    while (merges.size() < count) {
        std::map<std::pair<int32_t, int32_t>, int64_t> pairs;
        for (const auto &[ids, times] : words)
            for (size_t i = 0; i + 1 < ids.size(); ++i)
                pairs[{ids[i], ids[i + 1]}] += times;
        const std::pair<int32_t, int32_t> *best = nullptr;
        int64_t most = 0;
        for (const auto &[pair, times] : pairs)
            if (times > most && !refused.contains(pair))
                best = &pair, most = times;
        if (!best)
            break;
        const auto [left, right] = *best;
        const std::string spelled = text[left] + text[right];
        if (!known.insert(spelled).second) {
            refused.insert(*best);
            continue;
        }
        const int32_t merged = first_merged_id + int32_t(merges.size());
        text[merged] = spelled;
        merges.push_back(*best);
        std::map<std::vector<int32_t>, int64_t> after;
        for (const auto &[ids, times] : words) {
            std::vector<int32_t> next;
            for (size_t i = 0; i < ids.size(); ++i) {
                const bool hit = i + 1 < ids.size() && ids[i] == left && ids[i + 1] == right;
                next.push_back(hit ? merged : ids[i]);
                i += hit;
            }
            after[next] += times;
        }
        words = std::move(after);
    }
    return merges;
}

std::string random_text(std::mt19937 &random, size_t words, int letters) {
    std::string text;
    for (size_t i = 0; i < words; ++i) {
        text += " \n"[random() % 2];
        for (size_t length = 1 + random() % 8; length > 0; --length)
            text += char('a' + int(random() % size_t(letters)));
    }
    return text;
}

std::unique_ptr<Tokenizer> tokenizer_of(const TempDir &folder, const Merges &merges) {
    folder.write("tokenizer.json", tokenizer_json(merges));
    return Tokenizer::load(folder.path());
}

} // namespace

TEST(BpeTrain, MergesEqualThoseOfANaiveTrainer) {
    std::mt19937 random(5);
    for (int round = 0; round < 30; ++round) {
        std::vector<std::string> texts;
        for (size_t i = 0; i < 3; ++i)
            texts.push_back(random_text(random, 60, 1 + round % 5));
        ASSERT_EQ(train(texts, 120), train_naively(texts, 120)) << round;
    }
}

TEST(BpeTrain, TiesBreakByTheSmallerPair) {
    // Every pair is there once; "ab" has the smallest ids.
    const Merges merges = train({"zy", " dc", " ab"}, 1);
    ASSERT_EQ(merges.size(), 1u);
    EXPECT_EQ(merges[0], std::pair(id_of_byte('a'), id_of_byte('b')));
}

TEST(BpeTrain, TheOrderOfTextsDoesNotMatter) {
    std::mt19937 random(9);
    std::vector<std::string> texts;
    for (int i = 0; i < 20; ++i)
        texts.push_back(random_text(random, 50, 6));
    const Merges merges = train(texts, 300);
    std::shuffle(texts.begin(), texts.end(), random);
    EXPECT_EQ(train(texts, 300), merges);
}

TEST(BpeTrain, EndsWhenNoPairIsLeft) {
    EXPECT_EQ(train({"ab"}, 100).size(), 1u);
    EXPECT_EQ(train({}, 100).size(), 0u);
    EXPECT_EQ(train({"a b"}, 100).size(), 1u); // " b"
    EXPECT_EQ(train({std::string(BpeTrainer::longest_word + 1, 'a')}, 100).size(), 0u);
}

TEST(BpeTrain, TextComesBack) {
    std::mt19937 random(2);
    const std::string text = read_file(PONDER_MODEL_CODE10M "/README.md", 1 << 20);
    TempDir folder;
    const auto tokenizer = tokenizer_of(folder, train({text}, 300));
    ASSERT_NE(tokenizer, nullptr);
    EXPECT_EQ(tokenizer->size(), first_merged_id + 300);
    EXPECT_EQ(tokenizer->end_of_text(), 0);
    EXPECT_LT(tokenizer->encode(text).size(), text.size() / 2);
    std::string bytes;
    for (int i = 0; i < 4096; ++i)
        bytes += char(random());
    for (const std::string &any : {text, bytes, std::string("<|endoftext|>")}) {
        std::string back;
        for (const int32_t id : tokenizer->encode(any))
            back += tokenizer->bytes(id);
        EXPECT_EQ(back, any);
    }
}

// The vocabulary in the file is the one that the merges make: encoding a word of the text again
// gives the tokens that training left it in.
TEST(BpeTrain, FrequentWordsAreOneToken) {
    std::string text;
    for (int i = 0; i < 50; ++i)
        text += " return value";
    TempDir folder;
    const auto tokenizer = tokenizer_of(folder, train({text}, 100));
    EXPECT_EQ(tokenizer->encode(" return").size(), 1u);
    EXPECT_EQ(tokenizer->encode(" value").size(), 1u);
}

TEST(Gpt2Create, IsALoadableModel) {
    Gpt2Config config;
    config.layers = 8, config.width = 64, config.heads = 4, config.inner = 256;
    config.context = 32, config.vocabulary = 300;
    TempDir folder, again, other;
    create_gpt2(folder.path(), config, 3);
    create_gpt2(again.path(), config, 3);
    create_gpt2(other.path(), config, 4);
    const Gpt2Folder model(folder.path());
    EXPECT_EQ(model.config().layers, 8);
    EXPECT_EQ(model.config().inner, 256);
    EXPECT_EQ(model.config().vocabulary, 300);
    EXPECT_TRUE(model.config().tied);
    const auto deviation = [&](const std::string &name, size_t count) {
        std::vector<float> values(count);
        model.read(name, DType::f32, values.data());
        double sum = 0, squares = 0;
        for (const float v : values)
            sum += v, squares += double(v) * v;
        EXPECT_NEAR(sum / double(count), 0, 1e-3) << name;
        return std::sqrt(squares / double(count));
    };
    EXPECT_NEAR(deviation("wte.weight", 300 * 64), 0.02, 0.001);
    EXPECT_NEAR(deviation("h.0.attn.c_attn.weight", 64 * 192), 0.02, 0.001);
    EXPECT_NEAR(deviation("h.0.mlp.c_proj.weight", 256 * 64), 0.005, 0.0003);
    EXPECT_NEAR(deviation("h.7.attn.c_proj.weight", 64 * 64), 0.005, 0.0003);
    std::vector<float> ones(64), zeros(192);
    model.read("h.3.ln_2.weight", DType::f32, ones.data());
    model.read("h.3.attn.c_attn.bias", DType::f32, zeros.data());
    EXPECT_EQ(ones, std::vector<float>(64, 1.0f));
    EXPECT_EQ(zeros, std::vector<float>(192, 0.0f));
    const auto bytes = [](const TempDir &from) {
        return read_file(from.file("model.safetensors"), 1 << 24);
    };
    EXPECT_EQ(bytes(folder), bytes(again));
    EXPECT_NE(bytes(folder), bytes(other));
    expect_error(PONDER_E_STATE, {"holds weights"}, [&] { create_gpt2(folder.path(), config, 5); });
    EXPECT_EQ(bytes(folder), bytes(again));
}
