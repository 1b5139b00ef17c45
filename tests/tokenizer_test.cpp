// Ids against the Hugging Face tokenizers library, bytes back from any ids, time on hard text.
#include "base/file.hpp"
#include "base/json.hpp"
#include "formats/byte_pairs.hpp"
#include "formats/tokenizer.hpp"
#include "formats/word_split.hpp"
#include "temp_dir.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <climits>
#include <map>
#include <random>
#include <thread>

using namespace ponder;

namespace {

std::string decode(const Tokenizer &tokenizer, const std::vector<int32_t> &ids) {
    std::string text;
    for (int32_t id : ids)
        text += tokenizer.bytes(id);
    return text;
}

struct Case {
    std::string text;
    std::vector<int32_t> ids;
};

std::vector<Case> reference_cases() {
    std::string path = PONDER_TEST_DATA "/tokenizer_code10m.json";
    json::Value root = json::parse(read_file(path, 1 << 20), path);
    std::vector<Case> cases;
    for (const json::Value &item : root.find("cases")->items) {
        Case &added = cases.emplace_back(Case{item.find("text")->string, {}});
        for (const json::Value &id : item.find("ids")->items)
            added.ids.push_back(int32_t(id.integer));
    }
    return cases;
}

const Tokenizer &code10m() {
    static const std::unique_ptr<Tokenizer> tokenizer = Tokenizer::load(PONDER_MODEL_CODE10M);
    return *tokenizer;
}

double seconds_to_encode(const std::string &text) {
    auto start = std::chrono::steady_clock::now();
    std::vector<int32_t> ids = code10m().encode(text);
    std::chrono::duration<double> time = std::chrono::steady_clock::now() - start;
    EXPECT_EQ(decode(code10m(), ids), text);
    return time.count();
}

std::string repeat(std::string_view unit, size_t bytes) {
    std::string text;
    while (text.size() < bytes)
        text += unit;
    return text;
}

} // namespace

TEST(Tokenizer, MatchesTheReference) {
    std::vector<Case> cases = reference_cases();
    ASSERT_GE(cases.size(), 20u);
    for (const Case &expected : cases) {
        EXPECT_EQ(code10m().encode(expected.text, Tokenizer::Special::recognise), expected.ids)
            << expected.text;
        bool special = expected.text.find("<|endoftext|>") != std::string::npos;
        EXPECT_EQ(code10m().encode(expected.text) == expected.ids, !special) << expected.text;
        EXPECT_EQ(decode(code10m(), expected.ids), expected.text);
    }
}

TEST(Tokenizer, Properties) {
    EXPECT_EQ(code10m().size(), 8192);
    EXPECT_EQ(code10m().end_of_text(), 0);
    EXPECT_EQ(code10m().bytes(0), "<|endoftext|>");
    EXPECT_EQ(code10m().bytes(-1), "");
    EXPECT_EQ(code10m().bytes(8192), "");
    // Text that looks like a special token stays text.
    std::vector<int32_t> ids = code10m().encode("<|endoftext|>");
    EXPECT_GT(ids.size(), 1u);
    EXPECT_EQ(std::count(ids.begin(), ids.end(), 0), 0);
    ids =
        code10m().encode("a<|endoftext|><|endoftext|>b<|endoftext", Tokenizer::Special::recognise);
    EXPECT_EQ(std::count(ids.begin(), ids.end(), 0), 2);
    EXPECT_EQ(decode(code10m(), ids), "a<|endoftext|><|endoftext|>b<|endoftext");
    TempDir empty;
    EXPECT_EQ(Tokenizer::load(empty.path()), nullptr);
}

TEST(Tokenizer, VocabularyAndMergesFiles) {
    std::string source = PONDER_MODEL_CODE10M "/tokenizer.json";
    json::Value root = json::parse(read_file(source, 1 << 20), source);
    std::string vocabulary = "{", merges = "#version: 0.2\n";
    for (const auto &[name, id] : root.find("model")->find("vocab")->members)
        vocabulary += json::quote(name) + ':' + std::to_string(id.integer) + ',';
    for (const json::Value &merge : root.find("model")->find("merges")->items)
        merges += merge.items[0].string + " " + merge.items[1].string + "\n";
    TempDir folder;
    vocabulary.back() = '}';
    folder.write("vocab.json", vocabulary);
    folder.write("merges.txt", merges);
    std::unique_ptr<Tokenizer> tokenizer = Tokenizer::load(folder.path());
    ASSERT_NE(tokenizer, nullptr);
    EXPECT_EQ(tokenizer->size(), code10m().size());
    EXPECT_EQ(tokenizer->end_of_text(), 0);
    for (const Case &expected : reference_cases())
        EXPECT_EQ(tokenizer->encode(expected.text), code10m().encode(expected.text));
    for (int32_t id = 0; id < tokenizer->size(); ++id)
        ASSERT_EQ(tokenizer->bytes(id), code10m().bytes(id));
}

TEST(Tokenizer, AnyBytesComeBack) {
    std::mt19937 random(7);
    const std::string pieces[] = {"a",
                                  "Z",
                                  "9",
                                  " ",
                                  "\n",
                                  "\t",
                                  "'s",
                                  "'ll",
                                  "=",
                                  "\xc3\xa9",
                                  "\xe6\x97\xa5",
                                  "\xff",
                                  "\x80",
                                  "\xed\xa0\x80",
                                  "\xc0\xaf",
                                  "\xf0\x9f\x99",
                                  "\xf0\x9f\x99\x82",
                                  std::string(1, '\0'),
                                  "\xe3\x80\x80",
                                  "\xe1\xa0\x8e",
                                  "\xc2\x85"};
    for (int round = 0; round < 3000; ++round) {
        std::string text;
        for (size_t i = random() % 60; i > 0; --i)
            if (round % 2)
                text += char(random());
            else
                text += pieces[random() % std::size(pieces)];
        ASSERT_EQ(decode(code10m(), code10m().encode(text)), text);
    }
}

// A bad byte splits words as U+0001 does, and leaves the words around it as they were.
TEST(Tokenizer, BadBytesAreCharactersOfTheirOwn) {
    std::vector<int32_t> expected = code10m().encode("return");
    std::vector<int32_t> between = code10m().encode("return\xffreturn");
    ASSERT_GE(between.size(), 2 * expected.size() + 1);
    EXPECT_TRUE(std::equal(expected.begin(), expected.end(), between.begin()));
    EXPECT_TRUE(std::equal(expected.rbegin(), expected.rend(), between.rbegin()));
}

// The words are those of the pattern's definition. U+180E is no white space since Unicode 6.3,
// though PCRE2's \s has it; U+0085 is.
TEST(WordSplitter, FollowsThePattern) {
    const std::pair<std::string, std::vector<std::string>> cases[] = {
        {"", {}},
        {"it's we'll'S", {"it", "'s", " we", "'ll", "'", "S"}},
        {"  a   b\n\n c  ", {" ", " a", "  ", " b", "\n\n", " c", "  "}},
        {"x1_2 +=\t3", {"x", "1", "_", "2", " +=", "\t", "3"}},
        {" \xe1\xa0\x8e"
         "a",
         {" \xe1\xa0\x8e", "a"}},
        {" \xc2\x85"
         "a",
         {" ", "\xc2\x85", "a"}},
        {" \xe2\x80\x89"
         "a",
         {" ", "\xe2\x80\x89", "a"}},
        {"\xc3\xa9\xe6\x97\xa5 \xd9\xa3", {"\xc3\xa9\xe6\x97\xa5", " \xd9\xa3"}},
        {"a\xff"
         "b",
         {"a", "\xff", "b"}},
        {" \xc3\xc3", {" \xc3\xc3"}},
        {"\xed\xa0\x80.", {"\xed\xa0\x80."}},
        {std::string("a\0b", 3), {"a", std::string(1, '\0'), "b"}},
    };
    WordSplitter splitter;
    for (const auto &[text, expected] : cases) {
        Words words(splitter, text);
        std::vector<std::string> found;
        for (std::string_view word; words.next(word);)
            found.emplace_back(word);
        EXPECT_EQ(found, expected) << text;
    }
}

// Both algorithms against the definition, with merges in an order that no training would give.
TEST(BytePairs, MergesByRankThenPosition) {
    std::mt19937 random(3);
    for (int round = 0; round < 60; ++round) {
        BytePairs pairs;
        for (int byte = 0; byte < 256; ++byte)
            pairs.set_byte(uint8_t(byte), byte);
        std::map<std::pair<int32_t, int32_t>, std::pair<int, int32_t>> rank;
        std::vector<int32_t> known = {'a', 'b', 'c'};
        for (int merge = 0; merge < 40; ++merge) {
            int32_t left = known[random() % known.size()], right = known[random() % known.size()];
            bool is_new =
                rank.emplace(std::pair(left, right), std::pair(merge, 256 + merge)).second;
            EXPECT_EQ(pairs.add_merge(left, right, 256 + merge), is_new);
            if (!is_new)
                continue;
            known.push_back(256 + merge);
        }
        for (size_t length : {1u, 2u, 5u, 47u, 48u, 49u, 300u}) {
            std::string word;
            while (word.size() < length)
                word += char('a' + random() % 3);
            std::vector<int32_t> expected(word.begin(), word.end());
            for (;;) {
                size_t best = expected.size();
                int best_rank = INT_MAX;
                for (size_t i = 0; i + 1 < expected.size(); ++i) {
                    auto found = rank.find({expected[i], expected[i + 1]});
                    if (found == rank.end() || found->second.first >= best_rank)
                        continue;
                    best = i;
                    best_rank = found->second.first;
                }
                if (best == expected.size())
                    break;
                expected[best] = rank[{expected[best], expected[best + 1]}].second;
                expected.erase(expected.begin() + ptrdiff_t(best) + 1);
            }
            std::vector<int32_t> tokens;
            pairs.encode(word, tokens);
            ASSERT_EQ(tokens, expected) << word;
        }
    }
}

TEST(Tokenizer, HardTextIsNotQuadratic) {
    for (const char *unit : {"a", "ab", " ", "\n", "!", "7", "\xff", "\xe3\x80\x80", "\xc3\xa9",
                             " \n", "a ", "'", "e\xcc\x81"}) {
        double small = seconds_to_encode(repeat(unit, 1 << 16) + "x");
        double large = seconds_to_encode(repeat(unit, 1 << 20) + "x");
        // 16 times the text; quadratic would be 256 times.
        EXPECT_LT(large, 64 * small + 0.5) << unit;
    }
    EXPECT_LT(seconds_to_encode(repeat("a", 4 << 20)), 60);
}

TEST(Tokenizer, ManyThreadsShareOne) {
    std::vector<Case> cases = reference_cases();
    std::vector<std::thread> threads;
    std::atomic<int> wrong{0};
    for (int t = 0; t < 4; ++t)
        threads.emplace_back([&] {
            for (int round = 0; round < 20; ++round)
                for (const Case &expected : cases)
                    if (code10m().encode(expected.text, Tokenizer::Special::recognise) !=
                        expected.ids)
                        ++wrong;
        });
    for (std::thread &thread : threads)
        thread.join();
    EXPECT_EQ(wrong, 0);
}
