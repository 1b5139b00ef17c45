// Malformed, contradictory and malicious model files: a status and a message that names the file
// and the field, never a crash, a hang or an allocation of a size that only the file claims.
#include "backbone/convert.hpp"
#include "backbone/gpt2.hpp"
#include "base/file.hpp"
#include "base/json.hpp"
#include "expect_error.hpp"
#include "formats/gpt2_folder.hpp"
#include "formats/safetensors.hpp"
#include "formats/tokenizer.hpp"
#include "temp_dir.hpp"

#include <cmath>
#include <cstring>
#include <limits>
#include <sys/stat.h>

using namespace ponder;

namespace {

struct Hostile {
    std::string content;
    std::string named; // must be in the message, besides the file
    ponder_status status = PONDER_E_FORMAT;
};

std::string with_length(uint64_t length, const std::string &rest) {
    return std::string(reinterpret_cast<char *>(&length), 8) + rest;
}

std::string file_of(const std::string &header, size_t data_bytes = 0) {
    return with_length(header.size(), header + std::string(data_bytes, '\0'));
}

std::string tensor(const std::string &name, const std::string &dtype, const std::string &shape,
                   const std::string &offsets) {
    return "\"" + name + R"(":{"dtype":")" + dtype + R"(","shape":)" + shape +
           R"(,"data_offsets":)" + offsets + "}";
}

std::string replaced(std::string text, const std::string &from, const std::string &to) {
    size_t at = text.find(from);
    EXPECT_NE(at, text.npos) << from;
    return text.replace(at, from.size(), to);
}

const std::string tiny = PONDER_TEST_DATA "/gpt2_tiny/";

} // namespace

TEST(HostileJson, Refused) {
    const Hostile cases[] = {
        {"", "offset 0"},
        {"{", "offset 1"},
        {"{} x", "offset 4"},
        {"\xef\xbb\xbf{}", "byte order mark"},
        {std::string("{}\0", 3), "NUL byte"},
        {std::string("{}\0{}", 5), "offset 2"},
        {R"({"a":1,"a":2})", "duplicate key \"a\""},
        {R"({"a":1,"\u0061":2})", "duplicate key \"a\""},
        {R"([{"x":{"k":1,"l":0,"k":1}}])", "duplicate key \"k\""},
        {"[1e999]", "offset"},
        {"[" + std::string(400, '9') + "]", "offset"},
        {"[01]", "offset"},
        {"[NaN]", "offset 2"},
        {"[1,]", "offset"},
        {"// note\n1", "offset"},
        {"\"\\ud800\"", "offset"},
        {"\"\xc0\xaf\"", "offset"},
        {"\"\xff\"", "offset 2"},
        {"\"a\nb\"", "offset"},
        {std::string(1000000, '['), "deeper than 32"},
        {std::string(33, '[') + std::string(33, ']'), "deeper than 32"},
    };
    for (const Hostile &item : cases)
        expect_error(item.status, {"some.json", item.named},
                     [&] { json::parse(item.content, "some.json"); });
    json::Limits few;
    few.values = 10;
    expect_error(PONDER_E_FORMAT, {"some.json", "more than 10"},
                 [&] { json::parse("[1,1,1,1,1,1,1,1,1,1]", "some.json", few); });
    few.bytes = 4;
    expect_error(PONDER_E_FORMAT, {"some.json", "at most 4"},
                 [&] { json::parse("[1,1]", "some.json", few); });
}

TEST(HostileFile, OnlyRegularFilesOpen) {
    TempDir folder;
    expect_error(PONDER_E_NOT_FOUND, {folder.file("no")}, [&] { File file(folder.file("no")); });
    expect_error(PONDER_E_IO, {folder.path(), "regular"}, [&] { File file(folder.path()); });
    expect_error(PONDER_E_IO, {"/dev/null", "regular"}, [&] { File file("/dev/null"); });
    ASSERT_EQ(mkfifo(folder.file("fifo").c_str(), 0600), 0);
    expect_error(PONDER_E_IO, {"fifo", "regular"}, [&] { File file(folder.file("fifo")); });
    expect_error(PONDER_E_NOT_FOUND, {}, [&] { File file(std::string("/dev/null\0x", 11)); });
    expect_error(PONDER_E_NOT_FOUND, {}, [&] { File file(""); });
}

TEST(HostileFile, OnlyPlainComponents) {
    EXPECT_EQ(join_component("d", "model-00001-of-00002.safetensors", "x"),
              "d/model-00001-of-00002.safetensors");
    EXPECT_EQ(join_component("d", std::string(255, 'a'), "x").size(), 257u);
    for (std::string name :
         {std::string(), std::string("."), std::string(".."), std::string("../x"),
          std::string("/x"), std::string("a/b"), std::string("a\\b"), std::string("C:x"),
          std::string("a\0b", 3), std::string("%2e%2e"), std::string("a\nb"),
          std::string("\xef\xbc\x8f"), std::string(256, 'a'), std::string(" a"),
          std::string("a//b"), std::string("~")})
        expect_error(PONDER_E_FORMAT, {"index.json"},
                     [&] { join_component("d", name, "index.json"); });
}

TEST(HostileSafeTensors, Headers) {
    const std::string good = tensor("a", "F32", "[2]", "[0,8]");
    const Hostile cases[] = {
        // H1: lengths
        {"", "offset 0"},
        {"1234567", "offset 0"},
        {with_length(0, "{}"), "header length 0"},
        {with_length(3, "{}"), "header length 3"},
        {with_length(1000, "{}"), "header length 1000"},
        {with_length(100000001, "{}"), "100000001"},
        {with_length(uint64_t(1) << 63, "{}"), "9223372036854775808"},
        {with_length(UINT64_MAX, "{}"), "18446744073709551615"},
        {with_length((64u << 20) + 1, std::string((64u << 20) + 1, ' ')), "67108865"},
        // H7, H5: JSON
        {file_of(" {}"), "begin with {"},
        {file_of("[]"), "begin with {"},
        {file_of("{}x"), "offset 11"},
        {file_of("{" + good), "bad JSON"},
        {file_of(R"({"a":{"b":{"c":{"d":{}}}}})"), "deeper than 4"},
        {file_of("{" + good + "," + good + "}", 8), "duplicate key \"a\""},
        {file_of("{" + good + "," + tensor("\\u0061", "F32", "[2]", "[8,16]") + "}", 16),
         "duplicate key \"a\""},
        {file_of(R"({"__metadata__":{"k":"1","k":"2"}})"), "duplicate key \"k\""},
        {file_of(R"({"__metadata__":{"k":1}})"), "\"k\""},
        {file_of(R"({"__metadata__":{"k":null}})"), "__metadata__"},
        {file_of(R"({"__metadata__":"x"})"), "__metadata__"},
        {file_of(replaced("{" + good + "}", "[0,8]", "[0,8],\"shape\":[2]"), 8), "shape"},
        // H6: names
        {file_of("{" + tensor("", "F32", "[]", "[0,4]") + "}", 4), "name at offset"},
        {file_of("{" + tensor("a\\u0000b", "F32", "[]", "[0,4]") + "}", 4), "name at offset"},
        {file_of("{" + tensor("a\\nb", "F32", "[]", "[0,4]") + "}", 4), "name at offset"},
        {file_of("{" + tensor(std::string(1 << 20, 'n'), "F32", "[]", "[0,4]") + "}", 4),
         "name at offset"},
        {file_of("{" + tensor("\xc0\xaf", "F32", "[]", "[0,4]") + "}", 4), "bad JSON"},
        {file_of("{" + tensor("\\ud800", "F32", "[]", "[0,4]") + "}", 4), "bad JSON"},
        // fields
        {file_of(R"({"a":3})"), "\"a\""},
        {file_of(R"({"a":{}})"), "dtype"},
        {file_of(R"({"a":{"dtype":"F32","shape":[0]}})"), "data_offsets"},
        {file_of(R"({"a":{"dtype":"F32","data_offsets":[0,0]}})"), "shape"},
        {file_of(R"({"a":{"dtype":3,"shape":[0],"data_offsets":[0,0]}})"), "dtype"},
        {file_of(replaced("{" + good + "}", "[0,8]", "[0,8],\"extra\":1"), 8), "extra"},
        // H4: dtypes
        {file_of("{" + tensor("a", "F4", "[2]", "[0,1]") + "}", 1), "dtype"},
        {file_of("{" + tensor("a", "f32", "[2]", "[0,8]") + "}", 8), "dtype"},
        {file_of("{" + tensor("a", "", "[2]", "[0,8]") + "}", 8), "dtype"},
        {file_of("{" + tensor("a", "F16", "[2]", "[0,8]") + "}", 8), "span 8 bytes"},
        // H3: shapes
        {file_of("{" + tensor("a", "F32", "[-2]", "[0,8]") + "}", 8), "shape"},
        {file_of("{" + tensor("a", "F32", "[2.0]", "[0,8]") + "}", 8), "shape"},
        {file_of("{" + tensor("a", "F32", "[2e0]", "[0,8]") + "}", 8), "shape"},
        {file_of("{" + tensor("a", "F32", "[\"2\"]", "[0,8]") + "}", 8), "shape"},
        {file_of("{" + tensor("a", "F32", "[9223372036854775808]", "[0,8]") + "}", 8), "shape"},
        {file_of("{" + tensor("a", "F32", "[4294967296,4294967296]", "[0,8]") + "}", 8), "shape"},
        {file_of("{" + tensor("a", "F64", "[4611686018427387904]", "[0,8]") + "}", 8), "shape"},
        {file_of("{" + tensor("a", "U8", "[0,9223372036854775807,2]", "[0,0]") + "}"), "shape"},
        {file_of("{" + tensor("a", "U8", "[9223372036854775807,2,0]", "[0,0]") + "}"), "shape"},
        {file_of("{" + tensor("a", "U8", "[1,1,1,1,1,1,1,1,1]", "[0,1]") + "}", 1), "shape"},
        {file_of("{" + tensor("a", "F32", "{}", "[0,8]") + "}", 8), "shape"},
        // H2: offsets
        {file_of("{" + tensor("a", "F32", "[2]", "[8,0]") + "}", 8), "data_offsets"},
        {file_of("{" + tensor("a", "F32", "[2]", "[0]") + "}", 8), "data_offsets"},
        {file_of("{" + tensor("a", "F32", "[2]", "[0,8,8]") + "}", 8), "data_offsets"},
        {file_of("{" + tensor("a", "F32", "[2]", "[-8,0]") + "}", 8), "data_offsets"},
        {file_of("{" + tensor("a", "F32", "[2]", "[0,8]") + "}", 7), "ends after the file"},
        {file_of("{" + tensor("a", "F32", "[2]", "[0,8]") + "}", 9), "belongs to no tensor"},
        {file_of("{}", 1), "belongs to no tensor"},
        {file_of("{" + tensor("a", "F32", "[2]", "[4,12]") + "}", 12), "hole"},
        {file_of("{" + good + "," + tensor("b", "F32", "[2]", "[4,12]") + "}", 12), "overlaps"},
        {file_of("{" + good + "," + tensor("b", "F32", "[2]", "[0,8]") + "}", 8), "\"b\" overlaps"},
        {file_of("{" + good + "," + tensor("b", "F32", "[2]", "[12,20]") + "}", 20),
         "\"b\" follows"},
        {file_of("{" + tensor("a", "U8", "[9223372036854775807]", "[0,9223372036854775807]") + "}"),
         "\"a\" ends after the file"},
    };
    TempDir folder;
    int number = 0;
    for (const Hostile &item : cases) {
        SCOPED_TRACE(item.content.substr(0, 120));
        std::string name = "case" + std::to_string(number++) + ".safetensors";
        std::string path = folder.write(name, item.content);
        expect_error(item.status, {path, item.named}, [&] { SafeTensors::open(path); });
        expect_error(item.status, {name, item.named},
                     [&] { SafeTensors::view(std::as_bytes(std::span(item.content)), name); });
    }
}

TEST(HostileSafeTensors, OddButValid) {
    for (const std::string &content :
         {file_of("{}"), file_of("{}    "), file_of(R"({"__metadata__":{}})"),
          file_of("{" + tensor("b", "F32", "[2]", "[1,9]") + "," +
                      tensor("a", "U8", "[1]", "[0,1]") + "}",
                  9),
          file_of("{" + tensor("a", "F32", "[0]", "[0,0]") + "," +
                      tensor("b", "U8", "[1]", "[0,1]") + "," +
                      tensor("c", "F32", "[3,0]", "[1,1]") + "}",
                  1)})
        EXPECT_NO_THROW(SafeTensors::view(std::as_bytes(std::span(content)), "memory"));
}

TEST(HostileSafeTensors, CutAtEveryByte) {
    std::string header = R"({"__metadata__":{"k":"v"},)" + tensor("a", "F32", "[2,3]", "[0,24]") +
                         "," + tensor("b", "BF16", "[4]", "[24,32]") + "}";
    std::string whole = file_of(header, 32);
    auto open = [](const std::string &bytes) {
        SafeTensors::view(std::as_bytes(std::span(bytes)), "cut.safetensors");
    };
    EXPECT_NO_THROW(open(whole));
    for (size_t size = 0; size < whole.size(); ++size)
        expect_error(PONDER_E_FORMAT, {"cut.safetensors"}, [&] { open(whole.substr(0, size)); });
    // Any changed byte parses or is refused.
    for (size_t at = 0; at < whole.size(); ++at)
        for (int bit = 0; bit < 8; ++bit) {
            std::string changed = whole;
            changed[at] = char(uint8_t(changed[at]) ^ 1u << bit);
            try {
                open(changed);
            } catch (const Error &error) {
                EXPECT_EQ(error.status(), PONDER_E_FORMAT);
            }
        }
}

TEST(HostileSafeTensors, Values) {
    const float inf = std::numeric_limits<float>::infinity();
    const float nan = std::numeric_limits<float>::quiet_NaN();
    std::vector<float> values(100000, 1);
    for (float bad : {inf, -inf, nan, 3.4e38f}) {
        values[70001] = bad;
        SafeTensorsWriter writer;
        writer.add("w", DType::f32, {100000}, values.data());
        std::string bytes;
        writer.write([&](const void *data, size_t size) {
            bytes.append(static_cast<const char *>(data), size);
        });
        SafeTensors file = SafeTensors::view(std::as_bytes(std::span(bytes)), "bad.safetensors");
        std::vector<double> out(values.size());
        for (DType type : {DType::f32, DType::bf16, DType::f64}) {
            // 3.4e38 is a float and a double, but rounds to infinity in bfloat16.
            if (std::abs(bad) < inf && type != DType::bf16) {
                EXPECT_NO_THROW(file.read("w", {100000}, type, out.data()));
                continue;
            }
            expect_error(PONDER_E_FORMAT, {"bad.safetensors", "\"w\"", "element 70001"},
                         [&] { file.read("w", {100000}, type, out.data()); });
        }
        expect_error(PONDER_E_FORMAT, {"bad.safetensors", "\"w\"", "[100000]", "[100, 1000]"}, [&] {
            file.read("w", {100, 1000}, DType::f32, out.data());
        });
        expect_error(PONDER_E_FORMAT, {"bad.safetensors", "\"v\"", "missing"},
                     [&] { file.read("v", {1}, DType::f32, out.data()); });
        expect_error(PONDER_E_FORMAT, {"bad.safetensors", "\"w\"", "F32", "I32"},
                     [&] { file.read("w", {100000}, DType::i32, out.data()); });
        expect_error(PONDER_E_FORMAT, {"bad.safetensors", "\"v\""}, [&] { file.raw("v"); });
    }
}

TEST(HostileSafeTensors, FileShrinksWhileOpen) {
    TempDir folder;
    std::string path =
        folder.write("x.safetensors", file_of("{" + tensor("a", "F32", "[2]", "[0,8]") + "}", 8));
    SafeTensors file = SafeTensors::open(path);
    std::filesystem::resize_file(path, 20);
    float out[2];
    expect_error(PONDER_E_IO, {path}, [&] { file.read("a", {2}, DType::f32, out); });
}

TEST(HostileConfig, Refused) {
    auto config = [](const std::string &fields) {
        return R"({"model_type":"gpt2",)" + fields + "}";
    };
    const ponder_status unsupported = PONDER_E_UNSUPPORTED;
    const Hostile cases[] = {
        {"", "bad JSON"},
        {"[]", "no JSON object"},
        {"{}", "model_type"},
        {R"({"model_type":"llama"})", "model_type", unsupported},
        {R"({"model_type":7})", "model_type"},
        {R"({"architectures":["BertModel"]})", "architectures", unsupported},
        {config(R"("architectures":"GPT2LMHeadModel")"), "architectures", unsupported},
        {config(R"("activation_function":"relu")"), "activation_function", unsupported},
        {config(R"("scale_attn_by_inverse_layer_idx":true)"), "inverse_layer", unsupported},
        {config(R"("reorder_and_upcast_attn":true)"), "reorder_and_upcast", unsupported},
        {config(R"("add_cross_attention":true)"), "add_cross_attention", unsupported},
        {config(R"("scale_attn_weights":false)"), "scale_attn_weights", unsupported},
        {config(R"("quantization_config":{})"), "quantization_config", unsupported},
        {config(R"("add_cross_attention":1)"), "add_cross_attention"},
        {config(R"("tie_word_embeddings":"yes")"), "tie_word_embeddings"},
        {config(R"("n_layer":0)"), "n_layer"},
        {config(R"("n_layer":-1)"), "n_layer"},
        {config(R"("n_layer":1025)"), "n_layer"},
        {config(R"("n_layer":1000000000)"), "n_layer"},
        {config(R"("n_layer":2.0)"), "n_layer"},
        {config(R"("n_layer":"2")"), "n_layer"},
        {config(R"("n_layer":2,"num_hidden_layers":3)"), "num_hidden_layers"},
        {config(R"("n_embd":2147483648)"), "n_embd"},
        {config(R"("n_embd":9007199254740993)"), "n_embd"},
        {config(R"("n_embd":18446744073709551616)"), "n_embd"},
        {config(R"("n_embd":100,"n_head":3)"), "n_head"},
        {config(R"("n_head":0)"), "n_head"},
        {config(R"("n_inner":0)"), "n_inner"},
        {config(R"("n_inner":2147483648)"), "n_inner"},
        {config(R"("n_positions":0)"), "n_positions"},
        {config(R"("n_positions":1048577)"), "n_positions"},
        {config(R"("n_positions":8,"n_ctx":16)"), "n_ctx"},
        {config(R"("vocab_size":16777217)"), "vocab_size"},
        {config(R"("vocab_size":-1)"), "vocab_size"},
        {config(R"("layer_norm_epsilon":0)"), "layer_norm_epsilon"},
        {config(R"("layer_norm_epsilon":-1e-5)"), "layer_norm_epsilon"},
        {config(R"("layer_norm_epsilon":2)"), "layer_norm_epsilon"},
        {config(R"("layer_norm_epsilon":1e999)"), "bad JSON"},
        {config(R"("layer_norm_epsilon":NaN)"), "bad JSON"},
        {config(R"("layer_norm_epsilon":"1e-5")"), "layer_norm_epsilon"},
        {config(R"("n_layer":1,"n_layer":2)"), "duplicate key \"n_layer\""},
    };
    TempDir folder;
    for (const Hostile &item : cases) {
        SCOPED_TRACE(item.content);
        std::string path = folder.write("config.json", item.content);
        expect_error(item.status, {path, item.named}, [&] { read_gpt2_config(folder.path()); });
    }
    std::filesystem::remove(folder.file("config.json"));
    expect_error(PONDER_E_NOT_FOUND, {"config.json"}, [&] { read_gpt2_config(folder.path()); });
}

TEST(HostileGpt2Folder, WeightsAgainstConfig) {
    std::string config = read_file(tiny + "config.json", 10000);
    std::string weights = read_file(tiny + "model.safetensors", 1 << 20);
    TempDir folder;
    auto load = [&] { Gpt2Folder loaded(folder.path()); };
    folder.write("config.json", config);
    expect_error(PONDER_E_NOT_FOUND, {folder.path(), "model.safetensors"}, load);
    folder.write("model.safetensors", weights);
    EXPECT_NO_THROW(load());
    const std::pair<std::string, std::string> changes[] = {
        {"\"n_layer\": 2", "\"n_layer\": 3"},      {"\"n_layer\": 2", "\"n_layer\": 1"},
        {"\"n_embd\": 64", "\"n_embd\": 128"},     {"\"vocab_size\": 320", "\"vocab_size\": 321"},
        {"\"n_inner\": null", "\"n_inner\": 255"}, {"\"n_positions\": 128", "\"n_positions\": 64"},
    };
    const std::string named[] = {"h.2.ln_1.weight", "h.1.", "wte.weight",
                                 "wte.weight",      "mlp.", "wpe.weight"};
    for (size_t i = 0; i < std::size(changes); ++i) {
        folder.write("config.json", replaced(config, changes[i].first, changes[i].second));
        expect_error(PONDER_E_FORMAT, {folder.path(), named[i], "config.json"}, load);
    }
    folder.write("config.json", replaced(config, "\"tie_word_embeddings\": true",
                                         "\"tie_word_embeddings\": false"));
    expect_error(PONDER_E_FORMAT, {folder.path(), "lm_head.weight"}, load);
    folder.write("config.json", config);
    // The same length, another name or type.
    folder.write("model.safetensors",
                 replaced(weights, "transformer.ln_f.bias", "transformer.ln_f.bios"));
    expect_error(PONDER_E_FORMAT, {folder.path(), "ln_f.bias"}, load);
    folder.write("model.safetensors", replaced(weights, "\"F32\"", "\"I32\""));
    expect_error(PONDER_E_UNSUPPORTED, {folder.path(), "I32"}, load);
}

// A folder with int8 weights is converted, then one thing in it changed.
TEST(HostileGpt2Folder, Int8Weights) {
    const auto memory = std::make_shared<Memory>(0, nullptr, nullptr, nullptr);
    const auto no_progress = [](uint64_t, uint64_t) {};
    TempDir folder, plain;
    convert_to_int8(tiny, folder.path(), memory, no_progress);
    const std::string config = read_file(folder.file("config.json"), 10000);
    const std::string weights = read_file(folder.file("model.safetensors"), 1 << 20);
    const auto load = [&] {
        Gpt2(Gpt2Folder(folder.path()), DType::f32, memory, no_progress, Storage::int8);
    };
    const auto load_plain = [&] {
        Gpt2(Gpt2Folder(folder.path()), DType::bf16, memory, no_progress, Storage::plain);
    };
    EXPECT_NO_THROW(load());
    EXPECT_NO_THROW(load_plain());
    const size_t source = config.find("\"source\": \"") + 11;
    const Hostile configs[] = {
        {replaced(config, "ponder-int8", "gptq"), "quantization_config", PONDER_E_UNSUPPORTED},
        {replaced(config, "\"quant_method\"", "\"method\""), "quantization_config",
         PONDER_E_UNSUPPORTED},
        {replaced(config, "\"quant_method\": \"ponder-int8\"", "\"quant_method\": 8"),
         "quantization_config", PONDER_E_UNSUPPORTED},
        {replaced(config, "\"source\"", "\"origin\""), "source"},
        {replaced(config, "\"content\": \"", "\"content\": \"0"), "content"},
        {std::string(config).replace(source, 1, "G"), "source"},
        {replaced(config, "\"quantization_config\"", "\"rope_scaling\""), "rope_scaling",
         PONDER_E_UNSUPPORTED},
        // Without that member the weights are of no float type.
        {replaced(config, "\"quantization_config\"", "\"something\""), "I8", PONDER_E_UNSUPPORTED},
        {replaced(config, "\"quantization_config\": {", "\"quantization_config\": [], \"x\": {"),
         "quantization_config", PONDER_E_UNSUPPORTED},
    };
    for (const Hostile &item : configs) {
        SCOPED_TRACE(item.named);
        folder.write("config.json", item.content);
        expect_error(item.status, {folder.path(), item.named}, load);
        expect_error(item.status, {folder.path(), item.named}, load_plain);
    }
    folder.write("config.json", config);

    // The header's text, of the same length.
    const std::string scale = R"("transformer.h.1.mlp.c_fc.weight_scale":{"dtype":"F32","shape":)";
    const Hostile headers[] = {
        {replaced(weights, "h.1.mlp.c_fc.weight_scale", "h.1.mlp.c_fc.weight_skale"),
         "h.1.mlp.c_fc.weight_scale"},
        {replaced(weights, scale + "[1, 256]", scale + "[256, 1]"), "h.1.mlp.c_fc.weight_scale"},
        {replaced(weights, scale + "[1, 256]", scale + "[2, 128]"), "h.1.mlp.c_fc.weight_scale"},
        {replaced(weights, scale, replaced(scale, "F32", "I32")), "I32", PONDER_E_UNSUPPORTED},
        {replaced(weights, R"(c_fc.weight":{"dtype":"I8",)", R"(c_fc.weight":{"dtype":"U8",)"),
         "U8", PONDER_E_UNSUPPORTED},
        {weights.substr(0, weights.size() - 1), "model.safetensors"},
    };
    for (const Hostile &item : headers) {
        SCOPED_TRACE(item.named);
        folder.write("model.safetensors", item.content);
        expect_error(item.status, {folder.path(), item.named}, load);
        expect_error(item.status, {folder.path(), item.named}, load_plain);
    }

    // The data: scales that are no scales, and weights that are not those of config.json.
    folder.write("model.safetensors", weights);
    const SafeTensors file = SafeTensors::open(folder.file("model.safetensors"));
    const auto with = [&](const std::string &name, const void *value, size_t size) {
        std::string changed = weights;
        changed.replace(size_t(file.find("transformer." + name)->begin), size,
                        static_cast<const char *>(value), size);
        folder.write("model.safetensors", changed);
    };
    for (const float value : {0.0f, -1.0f, 1e-38f, -0.0f, NAN, INFINITY, -INFINITY}) {
        SCOPED_TRACE(value);
        with("wte.weight_scale", &value, sizeof value);
        expect_error(PONDER_E_FORMAT, {"wte.weight_scale", "element 0"}, load);
        expect_error(PONDER_E_FORMAT, {"wte.weight_scale", "element 0"}, load_plain);
    }
    const float one = 1;
    for (const char *name : {"wte.weight_scale", "h.1.attn.c_proj.weight", "ln_f.bias"}) {
        SCOPED_TRACE(name);
        with(name, &one, std::string(name).ends_with("weight") ? 1 : 4);
        expect_error(PONDER_E_FORMAT, {folder.path(), "config.json"}, load);
        expect_error(PONDER_E_FORMAT, {folder.path(), "config.json"}, load_plain);
    }
    // A plain folder that says it is int8, and one with scales that nobody asked for.
    plain.write("config.json", config);
    plain.write("model.safetensors", read_file(tiny + "model.safetensors", 1 << 20));
    expect_error(PONDER_E_UNSUPPORTED, {"wte.weight", "I8"},
                 [&] { Gpt2Folder loaded(plain.path()); });
}

TEST(HostileGpt2Folder, NamesTwice) {
    TempDir folder;
    folder.write("config.json", read_file(tiny + "config.json", 10000));
    std::string path =
        folder.write("model.safetensors",
                     file_of("{" + tensor("wte.weight", "F32", "[1]", "[0,4]") + "," +
                                 tensor("transformer.wte.weight", "F32", "[1]", "[4,8]") + "}",
                             8));
    expect_error(PONDER_E_FORMAT, {path, "wte.weight", "twice"},
                 [&] { Gpt2Folder loaded(folder.path()); });
}

TEST(HostileGpt2Folder, Index) {
    std::string many = R"({"weight_map":{)";
    for (int i = 0; i < 5000; ++i) {
        std::string number = std::to_string(i);
        many += (i ? ",\"t" : "\"t") + number + "\":\"s" + number + "\"";
    }
    auto map = [](const std::string &entries) { return R"({"weight_map":{)" + entries + "}}"; };
    const Hostile cases[] = {
        {"", "bad JSON"},
        {"[]", "weight_map"},
        {"{}", "weight_map"},
        {R"({"weight_map":[]})", "weight_map"},
        {map(""), "weight_map"},
        {map(R"("a":1)"), "\"a\""},
        {map(R"("a":"one","a":"one")"), "duplicate key \"a\""},
        {map(R"("a":"../one")"), "../one"},
        {map(R"("a":"/etc/passwd")"), "/etc/passwd"},
        {map(R"("a":"")"), "plain file name"},
        {map(R"("a":"..")"), "plain file name"},
        {map(R"("a":"one\u0000")"), "plain file name"},
        {map(R"("a":"b\\one")"), "plain file name"},
        {map(R"("a":"gone")"), "gone", PONDER_E_NOT_FOUND},
        {map(R"("a":"one","c":"one")"), "\"c\""},
        {map(R"("a":"one","b":"two","c":"two")"), "\"c\""},
        {map(R"("a":"one","b":"one")"), "\"b\""},
        {map(R"("b":"two")"), "two"}, // and d, which the index does not name
        {many + "}}", "4096"},
    };
    TempDir folder;
    folder.write("config.json", read_file(tiny + "config.json", 10000));
    folder.write("one", file_of("{" + tensor("a", "F32", "[]", "[0,4]") + "}", 4));
    folder.write("two", file_of("{" + tensor("b", "F32", "[]", "[0,4]") + "," +
                                    tensor("d", "F32", "[]", "[4,8]") + "}",
                                8));
    for (const Hostile &item : cases) {
        SCOPED_TRACE(item.content.substr(0, 100));
        std::string path = folder.write("model.safetensors.index.json", item.content);
        expect_error(item.status, {path, item.named}, [&] { Gpt2Folder loaded(folder.path()); });
    }
    // The index itself as a shard.
    folder.write("model.safetensors.index.json", map(R"("a":"model.safetensors.index.json")"));
    expect_error(PONDER_E_FORMAT, {"header length"}, [&] { Gpt2Folder loaded(folder.path()); });
}

namespace {

// A tokenizer.json with the 256 byte tokens, "ab" = 256 and a special token 257.
std::string small_tokenizer() {
    std::string vocabulary;
    int next = 256;
    for (int byte = 0; byte < 256; ++byte) {
        bool printable = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
        int point = printable ? byte : next++;
        std::string text;
        if (point < 128)
            text = char(point);
        else
            text = {char(0xc0 | point >> 6), char(0x80 | (point & 63))};
        vocabulary += json::quote(text) + ":" + std::to_string(byte) + ",";
    }
    return R"({"version":"1.0","truncation":null,"padding":null,"added_tokens":[{"id":257,)"
           R"("content":"<|end of text|>","special":true,"lstrip":false}],"normalizer":null,)"
           R"("pre_tokenizer":{"type":"ByteLevel","add_prefix_space":false,"use_regex":true},)"
           R"("post_processor":null,"decoder":{"type":"ByteLevel"},"model":{"type":"BPE",)"
           R"("dropout":null,"unk_token":null,"continuing_subword_prefix":"",)"
           R"("end_of_word_suffix":"","fuse_unk":false,"byte_fallback":false,"vocab":{)" +
           vocabulary + R"("ab":256},"merges":["a b"]}})";
}

} // namespace

TEST(HostileTokenizer, Refused) {
    const std::string good = small_tokenizer();
    const ponder_status unsupported = PONDER_E_UNSUPPORTED;
    auto with = [&](const std::string &from, const std::string &to) {
        return replaced(good, from, to);
    };
    const std::string split = R"({"type":"ByteLevel","add_prefix_space":false,"use_regex":true})";
    const Hostile cases[] = {
        {"", "bad JSON"},
        {"[]", "top level"},
        {"{}", "pre_tokenizer", unsupported},
        {with(R"("truncation":null)", R"("truncation":{})"), "truncation", unsupported},
        {with(R"("padding":null)", R"("padding":{})"), "padding", unsupported},
        {with(R"("normalizer":null)", R"("normalizer":{"type":"NFC"})"), "normalizer", unsupported},
        {with(R"("version":"1.0")", R"("surprise":1)"), "surprise", unsupported},
        {with(split, "null"), "pre_tokenizer", unsupported},
        {with(split, R"({"type":"Split","pattern":{"Regex":"(a+)+$"}})"), "pre_tokenizer",
         unsupported},
        {with(split, R"({"type":"Sequence","pretokenizers":[]})"), "pre_tokenizer", unsupported},
        {with(R"("add_prefix_space":false)", R"("add_prefix_space":true)"), "add_prefix_space",
         unsupported},
        {with(R"("add_prefix_space":false,)", ""), "add_prefix_space", unsupported},
        {with(R"("use_regex":true)", R"("use_regex":false)"), "use_regex", unsupported},
        {with(R"("use_regex":true)", R"("pattern":"x")"), "pattern", unsupported},
        {with(R"("post_processor":null)", R"("post_processor":{"type":"TemplateProcessing"})"),
         "post_processor", unsupported},
        {with(R"("decoder":{"type":"ByteLevel"})", R"("decoder":{"type":"WordPiece"})"), "decoder",
         unsupported},
        {with(R"("type":"BPE")", R"("type":"Unigram")"), "model", unsupported},
        {with(R"("dropout":null)", R"("dropout":0.1)"), "dropout", unsupported},
        {with(R"("continuing_subword_prefix":"")", R"("continuing_subword_prefix":"##")"),
         "continuing_subword_prefix", unsupported},
        {with(R"("end_of_word_suffix":"")", R"("end_of_word_suffix":"</w>")"), "end_of_word_suffix",
         unsupported},
        {with(R"("fuse_unk":false)", R"("fuse_unk":true)"), "fuse_unk", unsupported},
        {with(R"("byte_fallback":false)", R"("byte_fallback":true)"), "byte_fallback", unsupported},
        {with(R"("byte_fallback":false)", R"("ignore_merges":true)"), "ignore_merges", unsupported},
        {with(R"("special":true)", R"("special":false)"), "special", unsupported},
        {with(R"("lstrip":false)", R"("lstrip":true)"), "lstrip", unsupported},
        {with(R"("model":{)", R"("model":3,"x":{)"), "x", unsupported},
        {with(R"("ab":256)", R"("ab":255)"), "\"ab\""},
        {with(R"("ab":256)", R"("ab":257)"), "<|end of text|>"},
        {with(R"("ab":256)", R"("ab":-1)"), "\"ab\""},
        {with(R"("ab":256)", R"("ab":16777216)"), "\"ab\""},
        {with(R"("ab":256)", R"("ab":16777215)"), "ids up to 16777215"},
        {with(R"("ab":256)", R"("ab":2147483648)"), "\"ab\""},
        {with(R"("ab":256)", R"("ab":18446744073709551616)"), "\"ab\""},
        {with(R"("ab":256)", R"("ab":2.5)"), "\"ab\""},
        {with(R"("ab":256)", R"("ab":"256")"), "\"ab\""},
        {with(R"("ab":256)", R"("ab":256,"ab":258)"), "duplicate key \"ab\""},
        {with(R"("ab":256)", R"("ab":256,"":258)"), "is empty"},
        {with(R"("ab":256)", R"("ab":256,"a b":258)"), "byte alphabet"},
        {with(R"("ab":256)", "\"ab\":256,\"\xe6\x97\xa5\":258"), "byte alphabet"},
        {with(R"("ab":256)", R"("ab":256,"<|end of text|>":258)"), "added_tokens"},
        {with(R"("!":33,)", ""), "byte 0x21"},
        {with("\"\xc4\x80\":0,", ""), "byte 0x00"},
        {with(R"(["a b"])", R"(["a c"])"), "\"ac\""},
        {with(R"(["a b"])", R"(["a b","a b"])"), "twice"},
        {with(R"(["a b"])", R"(["a b",["a","b"]])"), "twice"},
        {with(R"(["a b"])", R"(["ab"])"), "two tokens"},
        {with(R"(["a b"])", R"(["a b c"])"), "two tokens"},
        {with(R"(["a b"])", R"([" ab"])"), "merges"},
        {with(R"(["a b"])", R"([["a","b","c"]])"), "merges"},
        {with(R"(["a b"])", R"([["a",1]])"), "merges"},
        {with(R"(["a b"])", R"([["xx","b"]])"), "\"xx\""},
        {with(R"(["a b"])", R"([7])"), "merges"},
        {with(R"(["a b"])", R"({"a":"b"})"), "merges"},
        {with(R"("id":257)", R"("id":-5)"), "added_tokens"},
        {with(R"("id":257,)", ""), "added_tokens"},
        {with(R"("content":"<|end of text|>")", R"("content":"")"), "added_tokens"},
        {with(R"("content":"<|end of text|>")", R"("content":7)"), "added_tokens"},
    };
    TempDir folder;
    std::string path = folder.write("tokenizer.json", good);
    std::unique_ptr<Tokenizer> tokenizer = Tokenizer::load(folder.path());
    EXPECT_EQ(tokenizer->encode("abc"), (std::vector<int32_t>{256, 'c'}));
    EXPECT_EQ(tokenizer->bytes(257), "<|end of text|>");
    EXPECT_EQ(tokenizer->size(), 258);
    EXPECT_EQ(tokenizer->end_of_text(), -1);
    for (const Hostile &item : cases) {
        SCOPED_TRACE(item.named);
        folder.write("tokenizer.json", item.content);
        expect_error(item.status, {path, item.named}, [&] { Tokenizer::load(folder.path()); });
    }
    for (size_t size = 0; size < good.size(); size += 3) {
        folder.write("tokenizer.json", std::string_view(good).substr(0, size));
        expect_error(PONDER_E_FORMAT, {path}, [&] { Tokenizer::load(folder.path()); });
    }
}

TEST(HostileTokenizer, MergesFile) {
    json::Value root = json::parse(small_tokenizer(), "x");
    std::string vocabulary = "{";
    for (const auto &[name, id] : root.find("model")->find("vocab")->members)
        vocabulary += (vocabulary.size() > 1 ? "," : "") + json::quote(name) + ":" +
                      std::to_string(id.integer);
    TempDir folder;
    folder.write("vocab.json", vocabulary + "}");
    expect_error(PONDER_E_NOT_FOUND, {"merges.txt"}, [&] { Tokenizer::load(folder.path()); });
    for (const char *merges : {"a b", "#version: 0.2\na b\n", "#version: 0.2\r\na b\r\n\r\n"}) {
        folder.write("merges.txt", merges);
        EXPECT_EQ(Tokenizer::load(folder.path())->encode("ab"), std::vector<int32_t>{256});
    }
    for (std::string merges :
         {std::string("a b\n#version: 0.2\n"), std::string("ab\n"), std::string("a  b\n"),
          std::string("a b\na b\n"), std::string("a\0b\n", 4), std::string("\xff b\n"),
          std::string("a b c\n"), std::string("a c\n")}) {
        folder.write("merges.txt", merges);
        expect_error(PONDER_E_FORMAT, {"merges.txt"}, [&] { Tokenizer::load(folder.path()); });
    }
    std::filesystem::remove(folder.file("vocab.json"));
    expect_error(PONDER_E_NOT_FOUND, {"vocab.json"}, [&] { Tokenizer::load(folder.path()); });
}
