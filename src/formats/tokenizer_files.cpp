#include "formats/tokenizer_files.hpp"

#include "base/error.hpp"
#include "base/file.hpp"
#include "base/json.hpp"

#include <algorithm>
#include <array>
#include <initializer_list>
#include <unordered_map>

namespace ponder {

namespace {

constexpr size_t file_limit = 64u << 20;
constexpr int64_t id_limit = 1 << 24;
constexpr size_t gap_allowance = 4096;
constexpr size_t special_limit = 4096;
constexpr std::string_view end_of_text = "<|endoftext|>";

// GPT-2 writes tokens as text: printable bytes stand for themselves, the others for the code
// points from U+0100 on, in order. The inverse, by code point; -1 stands for no byte.
std::array<int16_t, 512> make_byte_alphabet() {
    std::array<int16_t, 512> alphabet;
    alphabet.fill(-1);
    int next = 256;
    for (int byte = 0; byte < 256; ++byte) {
        bool printable = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
        alphabet[size_t(printable ? byte : next++)] = int16_t(byte);
    }
    return alphabet;
}

// Appends the bytes that `token` spells; false if a character is outside the alphabet.
bool append_bytes(std::string_view token, std::string &bytes) {
    static const std::array<int16_t, 512> alphabet = make_byte_alphabet();
    for (size_t i = 0; i < token.size(); ++i) {
        unsigned point = uint8_t(token[i]);
        if (point >= 0xc2 && point <= 0xdf && i + 1 < token.size())
            point = (point & 31u) << 6 | (uint8_t(token[++i]) & 63u);
        else if (point >= 0x80)
            return false;
        if (point >= alphabet.size() || alphabet[point] < 0)
            return false;
        bytes += char(alphabet[point]);
    }
    return true;
}

// Collects ids and merges with all their checks. Token names are views into the parsed file.
class TableBuilder {
public:
    explicit TableBuilder(const std::string &file) : file_(file) {}

    // What messages name from now on.
    void set_file(const std::string &file) { file_ = file; }

    // Added tokens come first: their content is plain text, also where the vocabulary has them.
    void add_special(std::string_view content, int64_t id, size_t offset) {
        if (special_.size() == special_limit)
            fail("added_tokens", content, "is one too many", offset);
        if (!special_.emplace(content, check_id("added_tokens", content, id, offset)).second)
            fail("added_tokens", content, "is there twice", offset);
    }

    void add_vocabulary(const json::Value &vocabulary) {
        if (vocabulary.type != json::Type::object)
            throw_error(PONDER_E_FORMAT, "%s: vocab (at offset %zu) is no object", file_.c_str(),
                        vocabulary.offset);
        ids_.reserve(vocabulary.members.size());
        for (const auto &[name, id] : vocabulary.members) {
            if (id.type != json::Type::integer)
                fail("vocab", name, "has no integer id", id.offset);
            int32_t token = check_id("vocab", name, id.integer, id.offset);
            auto special = special_.find(name);
            if (special != special_.end() && special->second != token)
                fail("vocab", name, "has another id in added_tokens", id.offset);
            ids_.emplace(name, token);
            place("vocab", name, token, special != special_.end(), id.offset);
        }
        for (const auto &[content, token] : special_)
            if (!ids_.contains(content))
                place("added_tokens", content, token, true, 0);
        check_gaps(vocabulary.offset);
        for (const auto &[content, token] : special_)
            tables_.special.push_back(token);
        std::sort(tables_.special.begin(), tables_.special.end(), [&](int32_t a, int32_t b) {
            uint32_t length_a = tables_.tokens[size_t(a)].second;
            uint32_t length_b = tables_.tokens[size_t(b)].second;
            return length_a != length_b ? length_a > length_b : a < b;
        });
        set_bytes(vocabulary.offset);
        if (auto found = ids_.find(end_of_text); found != ids_.end())
            tables_.end_of_text = found->second;
        else if (auto added = special_.find(end_of_text); added != special_.end())
            tables_.end_of_text = added->second;
    }

    void expect_merges(size_t count) {
        tables_.pairs = BytePairs(count);
        for (int byte = 0; byte < 256; ++byte)
            tables_.pairs.set_byte(uint8_t(byte), byte_tokens_[size_t(byte)]);
    }

    void add_merge(std::string_view left, std::string_view right, size_t offset) {
        int32_t left_id = merge_part(left, offset), right_id = merge_part(right, offset);
        joined_.assign(left).append(right);
        if (!tables_.pairs.add_merge(left_id, right_id, merge_part(joined_, offset)))
            fail("merges", joined_, "is a pair that is there twice", offset);
    }

    void add_merge(std::string_view line, size_t offset) {
        size_t space = line.find(' ');
        if (space == line.npos || line.find(' ', space + 1) != line.npos)
            fail("merges", line, "is not two tokens with a space between", offset);
        add_merge(line.substr(0, space), line.substr(space + 1), offset);
    }

    TokenTables finish() { return std::move(tables_); }

private:
    [[noreturn]] void fail(const char *field, std::string_view name, const char *problem,
                           size_t offset) const {
        throw_error(PONDER_E_FORMAT, "%s: %s: %s %s (at offset %zu)", file_.c_str(), field,
                    json::shown(name).c_str(), problem, offset);
    }

    int32_t check_id(const char *field, std::string_view name, int64_t id, size_t offset) const {
        if (name.empty())
            fail(field, name, "is empty", offset);
        if (id < 0 || id >= id_limit)
            fail(field, name, "has an id outside 0 .. 2^24-1", offset);
        return int32_t(id);
    }

    void place(const char *field, std::string_view name, int32_t token, bool literal,
               size_t offset) {
        if (!placed_.emplace(token, name).second)
            fail(field, name, "has the id of another token", offset);
        size_t begin = tables_.text.size();
        if (literal)
            tables_.text += name;
        else if (!append_bytes(name, tables_.text))
            fail(field, name, "has a character outside the byte alphabet", offset);
        // Tokens wait in `placed_order_` until the largest id is known to be plausible.
        placed_order_.push_back(
            {token, uint32_t(begin), uint32_t(tables_.text.size() - begin), literal});
        largest_ = std::max(largest_, token);
    }

    // A single huge id in a small file must not become a huge table.
    void check_gaps(size_t offset) {
        if (placed_order_.empty() ||
            size_t(largest_) + 1 > 2 * placed_order_.size() + gap_allowance)
            throw_error(PONDER_E_FORMAT, "%s: vocab: %zu tokens, but ids up to %d (at offset %zu)",
                        file_.c_str(), placed_order_.size(), largest_, offset);
        tables_.tokens.assign(size_t(largest_) + 1, {0, 0});
        for (const Placed &placed : placed_order_)
            tables_.tokens[size_t(placed.token)] = {placed.begin, placed.length};
    }

    void set_bytes(size_t offset) {
        byte_tokens_.fill(-1);
        for (const Placed &placed : placed_order_)
            if (placed.length == 1 && !placed.literal)
                byte_tokens_[uint8_t(tables_.text[placed.begin])] = placed.token;
        for (int byte = 0; byte < 256; ++byte)
            if (byte_tokens_[size_t(byte)] < 0)
                throw_error(PONDER_E_FORMAT,
                            "%s: vocab: no token for byte 0x%02x (in the object at offset %zu)",
                            file_.c_str(), unsigned(byte), offset);
    }

    int32_t merge_part(std::string_view name, size_t offset) const {
        auto found = ids_.find(name);
        if (found == ids_.end())
            fail("merges", name, "is not in the vocabulary", offset);
        return found->second;
    }

    struct Placed {
        int32_t token;
        uint32_t begin, length;
        bool literal;
    };

    std::string file_;
    std::unordered_map<std::string_view, int32_t> ids_, special_;
    std::unordered_map<int32_t, std::string_view> placed_;
    std::vector<Placed> placed_order_;
    int32_t largest_ = -1;
    std::array<int32_t, 256> byte_tokens_;
    std::string joined_;
    TokenTables tables_;
};

// What tokenizer.json says beyond vocabulary and merges must leave ids as byte-level BPE with the
// GPT-2 pattern makes them. A pattern from the file is never compiled.
class ComponentCheck {
public:
    explicit ComponentCheck(const std::string &file) : file_(file) {}

    void keys(const json::Value &object, const char *where,
              std::initializer_list<std::string_view> known) const {
        for (const auto &[key, value] : object.members)
            if (std::find(known.begin(), known.end(), key) == known.end())
                unsupported(where, key, value);
    }

    void object(const json::Value &value, const char *where) const {
        if (value.type != json::Type::object)
            throw_error(PONDER_E_FORMAT, "%s: %s (at offset %zu) is no object", file_.c_str(),
                        where, value.offset);
    }

    void absent(const json::Value &object, const char *where, const char *key) const {
        const json::Value *value = object.find(key);
        if (value && value->type != json::Type::null)
            unsupported(where, key, *value);
    }

    void absent_or_false(const json::Value &object, const char *where, const char *key) const {
        const json::Value *value = object.find(key);
        if (!value || value->type == json::Type::null)
            return;
        if (value->type != json::Type::boolean || value->boolean)
            unsupported(where, key, *value);
    }

    void absent_or_empty(const json::Value &object, const char *where, const char *key) const {
        const json::Value *value = object.find(key);
        if (!value || value->type == json::Type::null)
            return;
        if (value->type != json::Type::string || !value->string.empty())
            unsupported(where, key, *value);
    }

    void type(const json::Value &object, const char *where, std::string_view wanted) const {
        const json::Value *value = object.find("type");
        if (!value || value->type != json::Type::string || value->string != wanted)
            unsupported(where, "type", value ? *value : object);
    }

    [[noreturn]] void unsupported(const char *where, std::string_view key,
                                  const json::Value &value) const {
        throw_error(PONDER_E_UNSUPPORTED,
                    "%s: %s: %s (at offset %zu) is not byte-level BPE with the GPT-2 pattern",
                    file_.c_str(), where, json::shown(key).c_str(), value.offset);
    }

private:
    const std::string &file_;
};

void check_components(const json::Value &root, const ComponentCheck &check) {
    check.keys(root, "top level",
               {"version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer",
                "post_processor", "decoder", "model"});
    for (const char *key : {"truncation", "padding", "normalizer"})
        check.absent(root, "top level", key);

    const json::Value *split = root.find("pre_tokenizer");
    if (!split)
        check.unsupported("top level", "pre_tokenizer", root);
    check.type(*split, "pre_tokenizer", "ByteLevel");
    check.keys(*split, "pre_tokenizer", {"type", "add_prefix_space", "trim_offsets", "use_regex"});
    const json::Value *prefix = split->find("add_prefix_space");
    if (!prefix || prefix->type != json::Type::boolean || prefix->boolean)
        check.unsupported("pre_tokenizer", "add_prefix_space", prefix ? *prefix : *split);
    const json::Value *regex = split->find("use_regex"); // true when absent
    if (regex && (regex->type != json::Type::boolean || !regex->boolean))
        check.unsupported("pre_tokenizer", "use_regex", *regex);

    // As post-processor, ByteLevel moves offsets only.
    for (const char *key : {"post_processor", "decoder"}) {
        const json::Value *value = root.find(key);
        if (value && value->type != json::Type::null)
            check.type(*value, key, "ByteLevel");
    }
}

const json::Value &checked_model(const json::Value &root, const std::string &file,
                                 const ComponentCheck &check) {
    const json::Value *model = root.find("model");
    if (!model)
        throw_error(PONDER_E_FORMAT, "%s: model is missing", file.c_str());
    check.object(*model, "model");
    check.keys(*model, "model",
               {"type", "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix",
                "fuse_unk", "byte_fallback", "ignore_merges", "vocab", "merges"});
    if (model->find("type"))
        check.type(*model, "model", "BPE");
    const json::Value *dropout = model->find("dropout");
    if (dropout && dropout->type != json::Type::null &&
        ((dropout->type != json::Type::integer && dropout->type != json::Type::number) ||
         dropout->number != 0))
        check.unsupported("model", "dropout", *dropout);
    for (const char *key : {"continuing_subword_prefix", "end_of_word_suffix"})
        check.absent_or_empty(*model, "model", key);
    for (const char *key : {"fuse_unk", "byte_fallback", "ignore_merges"})
        check.absent_or_false(*model, "model", key);
    return *model;
}

void add_special_tokens(const json::Value &root, const std::string &file,
                        const ComponentCheck &check, TableBuilder &builder) {
    const json::Value *added = root.find("added_tokens");
    if (!added || added->type == json::Type::null)
        return;
    if (added->type != json::Type::array)
        throw_error(PONDER_E_FORMAT, "%s: added_tokens (at offset %zu) is no array", file.c_str(),
                    added->offset);
    for (const json::Value &token : added->items) {
        const json::Value *content = token.find("content"), *id = token.find("id");
        const json::Value *special = token.find("special");
        if (!content || content->type != json::Type::string || !id ||
            id->type != json::Type::integer)
            throw_error(PONDER_E_FORMAT,
                        "%s: added_tokens: entry at offset %zu lacks content or id", file.c_str(),
                        token.offset);
        // The reference looks for these in ordinary text.
        if (!special || special->type != json::Type::boolean || !special->boolean)
            check.unsupported("added_tokens", "special", special ? *special : token);
        for (const char *key : {"lstrip", "rstrip", "single_word"})
            check.absent_or_false(token, "added_tokens", key);
        builder.add_special(content->string, id->integer, token.offset);
    }
}

TokenTables read_tokenizer_json(const std::string &file) {
    json::Value root = json::parse(read_file(file, file_limit), file);
    ComponentCheck check(file);
    check.object(root, "top level");
    check_components(root, check);
    const json::Value &model = checked_model(root, file, check);
    TableBuilder builder(file);
    add_special_tokens(root, file, check, builder);
    const json::Value *vocabulary = model.find("vocab"), *merges = model.find("merges");
    if (!vocabulary || !merges || merges->type != json::Type::array)
        throw_error(PONDER_E_FORMAT, "%s: model (at offset %zu) lacks vocab or a list of merges",
                    file.c_str(), model.offset);
    builder.add_vocabulary(*vocabulary);
    builder.expect_merges(merges->items.size());
    for (const json::Value &merge : merges->items) {
        if (merge.type == json::Type::string) {
            builder.add_merge(merge.string, merge.offset);
        } else if (merge.type == json::Type::array && merge.items.size() == 2 &&
                   merge.items[0].type == json::Type::string &&
                   merge.items[1].type == json::Type::string) {
            builder.add_merge(merge.items[0].string, merge.items[1].string, merge.offset);
        } else {
            throw_error(PONDER_E_FORMAT, "%s: merges: entry at offset %zu is no pair of strings",
                        file.c_str(), merge.offset);
        }
    }
    return builder.finish();
}

TokenTables read_vocabulary_and_merges(const std::string &vocabulary_file,
                                       const std::string &merges_file) {
    json::Value vocabulary = json::parse(read_file(vocabulary_file, file_limit), vocabulary_file);
    TableBuilder builder(vocabulary_file);
    builder.add_vocabulary(vocabulary);
    std::string text = read_file(merges_file, file_limit);
    builder.expect_merges(size_t(std::count(text.begin(), text.end(), '\n')) + 1);
    builder.set_file(merges_file);
    for (size_t begin = 0; begin < text.size();) {
        size_t end = std::min(text.find('\n', begin), text.size());
        std::string_view line(text.data() + begin, end - begin);
        if (line.ends_with('\r'))
            line.remove_suffix(1);
        bool version = begin == 0 && line.starts_with("#version");
        if (!version && !line.empty())
            builder.add_merge(line, begin);
        begin = end + 1;
    }
    return builder.finish();
}

} // namespace

std::optional<TokenTables> read_token_tables(const std::string &folder) {
    std::string combined = folder + "/tokenizer.json";
    if (file_exists(combined))
        return read_tokenizer_json(combined);
    std::string vocabulary = folder + "/vocab.json", merges = folder + "/merges.txt";
    if (!file_exists(vocabulary) && !file_exists(merges))
        return std::nullopt;
    return read_vocabulary_and_merges(vocabulary, merges);
}

} // namespace ponder
