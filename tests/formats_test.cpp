// What well-formed files give: JSON, the file seam, hashes, safetensors, GPT-2 folders.
#include "base/file.hpp"
#include "base/hash.hpp"
#include "base/json.hpp"
#include "expect_error.hpp"
#include "formats/gpt2_folder.hpp"
#include "formats/safetensors.hpp"
#include "temp_dir.hpp"

#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

using namespace ponder;

namespace {

std::string bytes_of(const SafeTensorsWriter &writer) {
    std::string bytes;
    writer.write([&](const void *data, size_t size) {
        bytes.append(static_cast<const char *>(data), size);
    });
    EXPECT_EQ(bytes.size(), writer.size());
    return bytes;
}

SafeTensors view(const std::string &bytes) {
    return SafeTensors::view(std::as_bytes(std::span(bytes)), "memory");
}

const std::string tiny_folder = PONDER_TEST_DATA "/gpt2_tiny";

std::vector<float> read_f32(const Gpt2Folder &folder, const std::string &name, int64_t count) {
    std::vector<float> values(size_t(count), std::nanf(""));
    folder.read(name, DType::f32, values.data());
    return values;
}

uint16_t to_half(float x) { // exact inputs only
    uint32_t u = std::bit_cast<uint32_t>(x);
    int exponent = int(u >> 23 & 255) - 112;
    if (exponent <= 0)
        return uint16_t(u >> 16 & 0x8000u);
    return uint16_t((u >> 16 & 0x8000u) | uint32_t(exponent) << 10 | (u >> 13 & 0x3ffu));
}

} // namespace

TEST(Json, Values) {
    json::Value root = json::parse(
        R"({"i": -9223372036854775808, "u": 18446744073709551615, "n": 1.5e3, "s": "a\u00e9\ud83d\ude42",
            "l": [true, false, null, []], "o": {"": {}}})",
        "x.json");
    EXPECT_EQ(root.find("i")->integer, INT64_MIN);
    EXPECT_EQ(root.find("u")->type, json::Type::number);
    EXPECT_EQ(root.find("u")->number, 0x1p64);
    EXPECT_EQ(root.find("n")->number, 1500);
    EXPECT_EQ(root.find("s")->string, "a\xc3\xa9\xf0\x9f\x99\x82");
    ASSERT_EQ(root.find("l")->items.size(), 4u);
    EXPECT_TRUE(root.find("l")->items[0].boolean);
    EXPECT_EQ(root.find("l")->items[2].type, json::Type::null);
    EXPECT_EQ(root.find("o")->members[0].second.type, json::Type::object);
    EXPECT_EQ(root.find("none"), nullptr);
    EXPECT_EQ(root.members[1].first, "u");
}

TEST(Json, OffsetsPointIntoTheFile) {
    json::Limits limits;
    limits.offset = 100;
    json::Value root = json::parse(R"({"a": 12, "b": [3], "c": "x"})", "x.json", limits);
    EXPECT_EQ(root.find("a")->offset, 108u); // after 12
    EXPECT_EQ(root.find("b")->offset, 115u); // at [
    EXPECT_EQ(root.find("b")->items[0].offset, 117u);
    EXPECT_EQ(root.find("c")->offset, 128u);
}

TEST(Json, Writing) {
    EXPECT_EQ(json::quote("a\"\n\xff\xc3\xa9"), "\"a\\\"\\n\xef\xbf\xbd\xc3\xa9\"");
    EXPECT_EQ(json::number(0.1), "0.1");
    EXPECT_EQ(json::number(-3), "-3");
    EXPECT_EQ(json::number(std::numeric_limits<double>::infinity()), "null");
    for (double x : {1e300, 5e-324, 1.0 / 3, 123456789.125})
        EXPECT_EQ(json::parse(json::number(x), "x").number, x);
}

TEST(File, ReplaceIsAllOrNothing) {
    TempDir folder;
    std::string path = folder.write("a", "old");
    std::string large(700000, 'x');
    replace_file(path, [&](const Sink &sink) {
        sink("new", 3);
        sink(large.data(), large.size());
        sink("end", 3);
        EXPECT_EQ(read_file(path, 10), "old");
    });
    EXPECT_EQ(read_file(path, 1 << 20), "new" + large + "end");
    EXPECT_THROW(replace_file(path,
                              [](const Sink &sink) {
                                  sink("half", 4);
                                  throw std::runtime_error("stop");
                              }),
                 std::runtime_error);
    EXPECT_EQ(read_file(path, 1 << 20).size(), large.size() + 6);
    auto entries = std::filesystem::directory_iterator(folder.path());
    EXPECT_EQ(std::distance(begin(entries), end(entries)), 1);
    expect_error(PONDER_E_IO, {folder.path() + "/no"},
                 [&] { replace_file(folder.file("no/x"), [](const Sink &) {}); });
}

TEST(File, ReplaceKeepsTheMode) {
    TempDir folder;
    const std::string path = folder.write("a", "old"), own = folder.file("own");
    const auto mode = [](const std::string &of) {
        return unsigned(std::filesystem::status(of).permissions());
    };
    std::filesystem::permissions(path, std::filesystem::perms(0640));
    replace_file(path, [](const Sink &sink) { sink("new", 3); });
    EXPECT_EQ(mode(path), 0640u);
    replace_file(
        own, [](const Sink &sink) { sink("own", 3); }, 0600);
    EXPECT_EQ(mode(own), 0600u);
}

TEST(File, ReadsAreChecked) {
    TempDir folder;
    File file(folder.write("a", "0123456789"));
    char buffer[8] = {};
    file.read(8, buffer, 2);
    EXPECT_STREQ(buffer, "89");
    file.read(10, buffer, 0);
    expect_error(PONDER_E_IO, {file.path()}, [&] { file.read(8, buffer, 3); });
    expect_error(PONDER_E_IO, {file.path()}, [&] { file.read(UINT64_MAX, buffer, 2); });
    std::filesystem::resize_file(file.path(), 4);
    expect_error(PONDER_E_IO, {file.path(), "offset 4"}, [&] { file.read(0, buffer, 8); });
    expect_error(PONDER_E_FORMAT, {file.path()}, [&] { read_file(file.path(), 3); });
}

TEST(Hash, DependsOnBytesOnly) {
    std::string text(1000, '\0');
    std::iota(text.begin(), text.end(), '\0');
    Hash whole;
    whole.add(text.data(), text.size());
    EXPECT_EQ(whole.hex().size(), 32u);
    for (size_t step : {1u, 7u, 31u, 32u, 33u, 999u}) {
        Hash parts;
        for (size_t at = 0; at < text.size(); at += step)
            parts.add(text.data() + at, std::min(step, text.size() - at));
        EXPECT_EQ(parts.hex(), whole.hex());
    }
    std::vector<std::string> seen;
    for (size_t size = 0; size < 100; ++size) { // zeros of every length, single bits everywhere
        std::string zeros(size, '\0');
        Hash hash;
        hash.add(zeros.data(), size);
        seen.push_back(hash.hex());
        for (size_t bit = 0; bit < size * 8; bit += 5) {
            std::string one = zeros;
            one[bit / 8] = char(1u << bit % 8);
            Hash other;
            other.add(one.data(), size);
            seen.push_back(other.hex());
        }
    }
    std::sort(seen.begin(), seen.end());
    EXPECT_EQ(std::adjacent_find(seen.begin(), seen.end()), seen.end());
}

TEST(SafeTensors, RoundTrip) {
    std::vector<float> f = {0, -1.5f, 3e38f, 1e-45f};
    std::vector<double> d = {1.0 / 3, -2};
    std::vector<int32_t> i = {INT32_MIN, 7, INT32_MAX};
    std::vector<bf16> b = {to_bf16(1), to_bf16(-2.5f)};
    SafeTensorsWriter writer;
    writer.metadata["format"] = "line\n\"quoted\"";
    writer.add("f", DType::f32, {2, 2}, f.data());
    writer.add("raw \xc3\xa9", DType::none, {3}, "abc"); // leaves what follows unaligned
    writer.add("d", DType::f64, {2}, d.data());
    writer.add("i", DType::i32, {3, 1}, i.data());
    writer.add("b", DType::bf16, {2}, b.data());
    writer.add("empty", DType::f32, {0, 5}, nullptr);
    writer.add("scalar", DType::f32, {}, f.data() + 1);
    expect_error(PONDER_E_INTERNAL, {"f"}, [&] { writer.add("f", DType::f32, {1}, f.data()); });
    std::string bytes = bytes_of(writer);
    TempDir folder;
    std::string path = folder.file("x.safetensors");
    replace_file(path, [&](const Sink &sink) { writer.write(sink); });

    for (const SafeTensors &file : {view(bytes), SafeTensors::open(path)}) {
        EXPECT_EQ(file.tensors().size(), 7u);
        EXPECT_EQ(file.metadata().at("format"), "line\n\"quoted\"");
        EXPECT_EQ(file.find("f")->begin % 64, 0u);
        std::vector<float> f2(4);
        file.read("f", {2, 2}, DType::f32, f2.data());
        EXPECT_EQ(f2, f);
        std::vector<double> d2(4);
        file.read("f", {2, 2}, DType::f64, d2.data());
        EXPECT_EQ(d2[1], -1.5);
        file.read("d", {2}, DType::f64, d2.data());
        EXPECT_EQ(d2[0], d[0]);
        file.read("d", {2}, DType::f32, f2.data());
        EXPECT_EQ(f2[0], float(d[0]));
        std::vector<int32_t> i2(3);
        file.read("i", {3, 1}, DType::i32, i2.data());
        EXPECT_EQ(i2, i);
        file.read("b", {2}, DType::f32, f2.data());
        EXPECT_EQ(f2[1], -2.5f);
        bf16 b2[2];
        file.read("d", {2}, DType::bf16, b2);
        EXPECT_EQ(b2[0].bits, to_bf16(1.0f / 3).bits);
        file.read("empty", {0, 5}, DType::f32, nullptr);
        file.read("scalar", {}, DType::f32, f2.data());
        EXPECT_EQ(f2[0], -1.5f);
        EXPECT_EQ(file.raw("raw \xc3\xa9").size(), 3u);
        EXPECT_EQ(char(file.raw("raw \xc3\xa9")[2]), 'c');
    }
}

TEST(SafeTensors, HalfPrecisionIsExact) {
    // All 63488 finite values, against the definition: (-1)^s 2^(e-15) 1.f, subnormals 2^-14 0.f.
    std::vector<uint16_t> halves;
    for (uint32_t h = 0; h < 0x10000; ++h)
        if ((h & 0x7c00u) != 0x7c00u)
            halves.push_back(uint16_t(h));
    std::string header = R"({"h":{"dtype":"F16","shape":[)" + std::to_string(halves.size()) +
                         R"(],"data_offsets":[0,)" + std::to_string(2 * halves.size()) + "]}}";
    uint64_t length = header.size();
    std::string bytes(reinterpret_cast<char *>(&length), 8);
    bytes += header;
    bytes.append(reinterpret_cast<char *>(halves.data()), 2 * halves.size());
    std::vector<float> out(halves.size());
    view(bytes).read("h", {int64_t(halves.size())}, DType::f32, out.data());
    for (size_t i = 0; i < halves.size(); ++i) {
        int exponent = halves[i] >> 10 & 31, fraction = halves[i] & 1023;
        double value =
            exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
        ASSERT_EQ(out[i], float(halves[i] & 0x8000u ? -value : value)) << halves[i];
    }
}

TEST(SafeTensors, LongIntegersNarrow) {
    int64_t values[2] = {-5, 2147483647};
    std::string header = R"({"n":{"dtype":"I64","shape":[2],"data_offsets":[0,16]}})";
    uint64_t length = header.size();
    std::string bytes(reinterpret_cast<char *>(&length), 8);
    bytes += header;
    bytes.append(reinterpret_cast<char *>(values), 16);
    int32_t out[2];
    view(bytes).read("n", {2}, DType::i32, out);
    EXPECT_EQ(out[0], -5);
    EXPECT_EQ(out[1], 2147483647);
    values[1]++;
    bytes.replace(bytes.size() - 16, 16, reinterpret_cast<char *>(values), 16);
    SafeTensors file = view(bytes);
    expect_error(PONDER_E_FORMAT, {"memory", "\"n\"", "element 1"},
                 [&] { file.read("n", {2}, DType::i32, out); });
}

TEST(Gpt2Folder, Tiny) {
    Gpt2Folder folder(tiny_folder);
    const Gpt2Config &config = folder.config();
    EXPECT_EQ(config.layers, 2);
    EXPECT_EQ(config.width, 64);
    EXPECT_EQ(config.heads, 4);
    EXPECT_EQ(config.inner, 256);
    EXPECT_EQ(config.context, 128);
    EXPECT_EQ(config.vocabulary, 320);
    EXPECT_EQ(config.norm_epsilon, 1e-5);
    EXPECT_TRUE(config.tied);
    ASSERT_EQ(folder.tensors().size(), 28u);
    EXPECT_EQ(folder.tensors()[0].first, "wte.weight");
    EXPECT_EQ(folder.tensors()[0].second, (std::vector<int64_t>{320, 64}));
    EXPECT_EQ(folder.tensors()[2].first, "h.0.ln_1.weight");
    EXPECT_EQ(folder.tensors().back().first, "ln_f.bias");
    uint64_t elements = 0;
    for (const auto &[name, shape] : folder.tensors()) {
        int64_t count = 1;
        for (int64_t size : shape)
            count *= size;
        elements += uint64_t(count);
        for (float x : read_f32(folder, name, count))
            ASSERT_TRUE(std::isfinite(x));
    }
    EXPECT_EQ(folder.stored_bytes(), 4 * elements);
    expect_error(PONDER_E_INTERNAL, {"h.9"}, [&] { folder.read("h.9", DType::f32, nullptr); });
}

// The same weights without the prefix, in half precision, with the buffers of old checkpoints and
// a head that the tied model does not use.
TEST(Gpt2Folder, OldCheckpointLayout) {
    Gpt2Folder original(tiny_folder);
    TempDir folder;
    std::string header = "{", data;
    auto store = [&](const std::string &name, const std::vector<int64_t> &shape,
                     const std::vector<float> &values) {
        header += (header.size() > 1 ? ",\"" : "\"") + name + R"(":{"dtype":"F16","shape":)" +
                  shape_text(shape) + ",\"data_offsets\":[" + std::to_string(data.size());
        for (float x : values) {
            uint16_t half = to_half(x);
            data.append(reinterpret_cast<char *>(&half), 2);
        }
        header += "," + std::to_string(data.size()) + "]}";
    };
    std::map<std::string, std::vector<float>> kept;
    for (const auto &[name, shape] : original.tensors()) {
        int64_t count = 1;
        for (int64_t size : shape)
            count *= size;
        std::vector<float> values = read_f32(original, name, count);
        for (float &x : values)
            x = std::round(x * 256) / 256;
        store(name, shape, values);
        kept[name] = values;
    }
    store("h.0.attn.bias", {1, 1, 4, 4}, std::vector<float>(16, 1));
    store("h.1.attn.masked_bias", {}, {-10000});
    store("lm_head.weight", {1, 1}, {1});
    uint64_t length = header.size() + 1;
    std::string bytes(reinterpret_cast<char *>(&length), 8);
    folder.write("model.safetensors", bytes + header + "}" + data);
    folder.write("config.json", read_file(tiny_folder + "/config.json", 10000));
    Gpt2Folder loaded(folder.path());
    EXPECT_EQ(loaded.tensors(), original.tensors());
    EXPECT_EQ(loaded.stored_bytes() * 2, original.stored_bytes());
    for (const auto &[name, values] : kept)
        EXPECT_EQ(read_f32(loaded, name, int64_t(values.size())), values) << name;
}

TEST(Gpt2Folder, Shards) {
    Gpt2Folder folder(PONDER_MODEL_CODE10M);
    EXPECT_EQ(folder.config().layers, 10);
    EXPECT_EQ(folder.tensors().size(), 10u * 12 + 4);
    uint64_t elements = 0;
    for (const auto &[name, shape] : folder.tensors()) {
        int64_t count = 1;
        for (int64_t size : shape)
            count *= size;
        elements += uint64_t(count);
        std::vector<bf16> stored(count, bf16{0});
        folder.read(name, DType::bf16, stored.data());
        std::vector<float> widened = read_f32(folder, name, count);
        for (size_t i = 0; i < stored.size(); ++i)
            ASSERT_EQ(widened[i], to_float(stored[i]));
    }
    EXPECT_EQ(folder.stored_bytes(), 2 * elements);
}

TEST(Gpt2Config, DefaultsAndSpellings) {
    TempDir folder;
    folder.write("config.json", R"({"model_type": "gpt2"})");
    Gpt2Config config = read_gpt2_config(folder.path());
    EXPECT_EQ(config.layers, 12);
    EXPECT_EQ(config.width, 768);
    EXPECT_EQ(config.heads, 12);
    EXPECT_EQ(config.inner, 3072);
    EXPECT_EQ(config.context, 1024);
    EXPECT_EQ(config.vocabulary, 50257);
    folder.write("config.json", R"({"architectures": ["GPT2LMHeadModel"], "hidden_size": 64,
        "n_embd": 64, "num_attention_heads": 2, "n_inner": 100, "n_positions": 32, "n_ctx": 32,
        "activation_function": "gelu_pytorch_tanh", "tie_word_embeddings": false,
        "layer_norm_epsilon": 1})");
    config = read_gpt2_config(folder.path());
    EXPECT_EQ(config.width, 64);
    EXPECT_EQ(config.heads, 2);
    EXPECT_EQ(config.inner, 100);
    EXPECT_EQ(config.norm_epsilon, 1);
    EXPECT_FALSE(config.tied);
}
