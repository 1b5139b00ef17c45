#include "formats/bpe_train.hpp"

#include "base/json.hpp"

#include <array>
#include <queue>
#include <unordered_set>

namespace ponder {

namespace {

// GPT-2's printable names of bytes have the order: '!' .. '~', U+00A1 .. U+00AC, U+00AE .. U+00FF,
// and from U+0100 on the bytes that are left.
struct ByteNames {
    std::array<int32_t, 256> id{};
    std::array<unsigned char, 256> byte_of{}; // by id - 1
    std::array<uint16_t, 256> point{};        // code point, by byte

    constexpr ByteNames() {
        int next = 0;
        for (const bool named_by_itself : {true, false})
            for (int byte = 0, free = 256; byte < 256; ++byte) {
                const bool printable =
                    (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
                if (printable != named_by_itself)
                    continue;
                byte_of[size_t(next)] = static_cast<unsigned char>(byte);
                id[size_t(byte)] = ++next;
                point[size_t(byte)] = uint16_t(printable ? byte : free++);
            }
    }
};
constexpr ByteNames byte_names;

void append_name(unsigned char byte, std::string &to) {
    const unsigned point = byte_names.point[byte];
    if (point >= 0x80)
        to += {char(0xc0 | point >> 6), char(0x80 | (point & 63))};
    else
        to += char(point);
}

// The bytes of every id; that of <|endoftext|> stays empty, no pair spells it.
std::vector<std::string> spell(const Merges &merges) {
    std::vector<std::string> text(1);
    for (const unsigned char byte : byte_names.byte_of)
        text.push_back(std::string(1, char(byte)));
    for (const auto &[left, right] : merges)
        text.push_back(text[size_t(left)] + text[size_t(right)]);
    return text;
}

uint64_t key_of(int32_t left, int32_t right) {
    return uint64_t(uint32_t(left)) << 32 | uint32_t(right);
}

// All different words as ids, with every pair of neighbours counted and found again.
class PairTable {
public:
    void add_word(std::string_view word, uint64_t count) {
        const auto index = uint32_t(words_.size());
        words_.push_back({ids_.size(), uint32_t(word.size()), int64_t(count)});
        for (const char byte : word)
            ids_.push_back(id_of_byte(static_cast<unsigned char>(byte)));
        const int32_t *ids = ids_.data() + words_.back().begin;
        for (size_t i = 0; i + 1 < word.size(); ++i)
            change(ids[i], ids[i + 1], int64_t(count), index);
    }

    // The most frequent pair, taken out; false when there is none.
    bool pop(int32_t &left, int32_t &right) {
        publish();
        while (!heap_.empty()) {
            const Candidate top = heap_.top();
            heap_.pop();
            const auto pair = pairs_.find(top.key);
            const int64_t now = pair == pairs_.end() ? 0 : pair->second.count;
            if (now == top.count) {
                left = int32_t(top.key >> 32);
                right = int32_t(top.key & UINT32_MAX);
                return true;
            }
            if (now > 0 && now < top.count)
                heap_.push({now, top.key}); // it has lost neighbours since it was put there
        }
        return false;
    }

    void merge(int32_t left, int32_t right, int32_t merged) {
        const auto node = pairs_.extract(key_of(left, right));
        for (const uint32_t word : node.mapped().words)
            merge_in(word, left, right, merged);
        pairs_.erase(key_of(left, right));
    }
    void drop(int32_t left, int32_t right) { pairs_.erase(key_of(left, right)); }

private:
    struct Word {
        size_t begin;
        uint32_t length;
        int64_t count;
    };
    struct Pair {
        int64_t count = 0;
        std::vector<uint32_t> words; // that may hold it
    };
    struct Candidate {
        int64_t count;
        uint64_t key;
        bool operator<(const Candidate &other) const {
            return count != other.count ? count < other.count : key > other.key;
        }
    };

    void change(int32_t left, int32_t right, int64_t by, uint32_t word) {
        const uint64_t key = key_of(left, right);
        Pair &pair = pairs_[key];
        pair.count += by;
        if (by < 0)
            return;
        if (pair.words.empty() || pair.words.back() != word)
            pair.words.push_back(word);
        grown_.push_back(key);
    }

    // Pairs whose count has grown get a place in the heap, once a merge.
    void publish() {
        std::unordered_set<uint64_t> seen;
        for (const uint64_t key : grown_)
            if (const auto pair = pairs_.find(key);
                pair != pairs_.end() && pair->second.count > 0 && seen.insert(key).second)
                heap_.push({pair->second.count, key});
        grown_.clear();
    }

    void merge_in(uint32_t index, int32_t left, int32_t right, int32_t merged) {
        Word &word = words_[index];
        int32_t *ids = ids_.data() + word.begin;
        uint32_t to = 0;
        for (uint32_t from = 0; from < word.length; ++to) {
            if (from + 1 >= word.length || ids[from] != left || ids[from + 1] != right) {
                ids[to] = ids[from++];
                continue;
            }
            if (to > 0) {
                change(ids[to - 1], left, -word.count, index);
                change(ids[to - 1], merged, word.count, index);
            }
            if (from + 2 < word.length) {
                change(right, ids[from + 2], -word.count, index);
                change(merged, ids[from + 2], word.count, index);
            }
            ids[to] = merged;
            from += 2;
        }
        word.length = to;
    }

    std::vector<int32_t> ids_;
    std::vector<Word> words_;
    std::unordered_map<uint64_t, Pair> pairs_;
    std::vector<uint64_t> grown_;
    std::priority_queue<Candidate> heap_;
};

} // namespace

int32_t id_of_byte(unsigned char byte) { return byte_names.id[byte]; }

void BpeTrainer::add(std::string_view text) {
    Words words(splitter_, text);
    for (std::string_view word; words.next(word);) {
        if (word.size() < 2 || word.size() > longest_word)
            continue;
        const auto known = words_.find(word);
        if (known != words_.end())
            ++known->second;
        else
            words_.emplace(word, 1);
    }
}

Merges BpeTrainer::merges(size_t count) const {
    PairTable table;
    for (const auto &[word, times] : words_)
        table.add_word(word, times);
    Merges done;
    std::vector<std::string> text = spell(done);
    std::unordered_set<std::string> known(text.begin(), text.end());
    int32_t left, right;
    while (done.size() < count && table.pop(left, right)) {
        std::string spelled = text[size_t(left)] + text[size_t(right)];
        if (!known.insert(spelled).second) {
            table.drop(left, right);
            continue;
        }
        table.merge(left, right, int32_t(text.size()));
        text.push_back(std::move(spelled));
        done.emplace_back(left, right);
    }
    return done;
}

std::string tokenizer_json(const Merges &merges) {
    const std::vector<std::string> text = spell(merges);
    const auto name = [&](size_t id) {
        std::string named;
        for (const char byte : text[id])
            append_name(static_cast<unsigned char>(byte), named);
        return named;
    };
    std::string out = R"({
  "version": "1.0",
  "truncation": null,
  "padding": null,
  "added_tokens": [
    {"id": 0, "content": "<|endoftext|>", "single_word": false, "lstrip": false, "rstrip": false,
     "normalized": false, "special": true}
  ],
  "normalizer": null,
  "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
                    "use_regex": true},
  "post_processor": null,
  "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true,
              "use_regex": true},
  "model": {
    "type": "BPE",
    "dropout": null,
    "unk_token": null,
    "continuing_subword_prefix": null,
    "end_of_word_suffix": null,
    "fuse_unk": false,
    "byte_fallback": false,
    "ignore_merges": false,
    "vocab": {
      "<|endoftext|>": 0)";
    for (size_t id = 1; id < text.size(); ++id)
        out += ",\n      " + json::quote(name(id)) + ": " + std::to_string(id);
    out += "\n    },\n    \"merges\": [";
    for (size_t i = 0; i < merges.size(); ++i)
        out += (i ? ",\n      " : "\n      ") +
               json::quote(name(size_t(merges[i].first)) + " " + name(size_t(merges[i].second)));
    return out + "\n    ]\n  }\n}\n";
}

} // namespace ponder
