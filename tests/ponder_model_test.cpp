// PonderTTT's complete model (GPT-2 and its TTT layer after it) rebuilt as a Hugging Face folder
// and an adapter folder: logits and statistics for SKIP and UPDATE.
#include "support.hpp"

#include "tensor/ops.hpp"

#include <gtest/gtest.h>

namespace ponder::test {
namespace {

const char *config_json = R"({"model_type": "gpt2", "n_layer": 2, "n_embd": 64, "n_head": 4,
  "n_positions": 256, "vocab_size": 320, "activation_function": "gelu_new",
  "layer_norm_epsilon": 1e-05, "tie_word_embeddings": true})";

struct Written {
    std::vector<std::vector<float>> kept;
    SafeTensorsWriter writer;
    void add(const std::string &name, const std::vector<int64_t> &shape,
             std::vector<float> values) {
        kept.push_back(std::move(values));
        writer.add(name, DType::f32, shape, kept.back().data());
    }
    void write(const std::string &path) {
        replace_file(path, [&](const Sink &sink) { writer.write(sink); });
    }
};

// Flax names to GPT-2's: kernel and scale are weight, embedding is weight.
void write_backbone(const SafeTensors &fixture, const TempDir &dir) {
    Written out;
    const std::string prefix = "param.base_model.";
    for (const auto &[name, info] : fixture.tensors()) {
        if (!name.starts_with(prefix))
            continue;
        std::string plain = name.substr(prefix.size());
        for (const char *suffix : {".kernel", ".scale", ".embedding"})
            if (plain.ends_with(suffix))
                plain = plain.substr(0, plain.rfind('.')) + ".weight";
        out.add(plain, info.shape, tensor(fixture, name));
    }
    out.write(dir.file("model.safetensors"));
    dir.write("config.json", config_json);
}

Options ttt_options(const std::string &adapter) {
    return make_options({{"adapter", adapter},
                         {"ttt.form", "ponder"},
                         {"ttt.heads", "4"},
                         {"chunk", "128"},
                         {"context", "128"}});
}

void store(Ttt &ttt, const std::string &name, const std::vector<float> &values) {
    const std::span<float> to = ttt.slow_values(name);
    ASSERT_EQ(values.size(), to.size());
    std::copy(values.begin(), values.end(), to.begin());
}

void write_adapter(const SafeTensors &fixture, const Model &model, const TempDir &dir) {
    const Options options = ttt_options("ttt-linear");
    Ttt ttt(model.backbone().config(), options, false);
    const std::string layer = "param.fast_layer.";
    const auto set = [&](const char *ours, const std::string &theirs) {
        store(ttt, ours, tensor(fixture, theirs));
    };
    set("norm.weight", "param.fast_norm.scale");
    set("norm.bias", "param.fast_norm.bias");
    set("q.weight", layer + "wq.kernel");
    set("v.weight", layer + "wv.kernel");
    set("o.weight", layer + "wo.kernel");
    set("gate.weight", layer + "wg.kernel");
    for (const std::string name : {"conv_q", "conv_k"}) {
        set((name + ".weight").c_str(), layer + name + ".kernel");
        set((name + ".bias").c_str(), layer + name + ".bias");
    }
    set("token_index", layer + "learnable_token_idx");
    set("ttt_norm.weight", layer + "ttt_norm.scale");
    set("ttt_norm.bias", layer + "ttt_norm.bias");
    set("post_norm.weight", layer + "post_norm.scale");
    set("post_norm.bias", layer + "post_norm.bias");
    std::vector<float> weight(64 * 4), bias(4);
    for (size_t head = 0; head < 4; ++head) {
        const std::string gate = layer + "learnable_ttt_lr_layers." + std::to_string(head);
        const std::vector<float> column = tensor(fixture, gate + ".kernel");
        for (size_t i = 0; i < 64; ++i)
            weight[i * 4 + head] = column[i];
        bias[head] = tensor(fixture, gate + ".bias")[0];
    }
    store(ttt, "lr.weight", weight);
    store(ttt, "lr.bias", bias);
    std::vector<float> fast = tensor(fixture, layer + "W1");
    const std::vector<float> b1 = tensor(fixture, layer + "b1");
    fast.insert(fast.end(), b1.begin(), b1.end());
    save_adapter(dir.path(), "ttt-linear", model.backbone().hash(), options, ttt, fast);
}

// Logits of one stream, and the layer's statistics.
std::vector<float> logits(const Model &model, const Adapter &adapter, bool update,
                          std::span<const int32_t> tokens, float *statistics) {
    Graph g(DType::f32);
    adapter.bind(g);
    const Id ids = g.external("tokens", DType::i32, {1, int64_t(tokens.size())});
    Id hidden = model.backbone().hidden(g, ids, int64_t(tokens.size()), adapter, g.wide);
    std::vector<Id> state;
    Id loss = none;
    if (update) {
        const InsideResult result = adapter.after_backbone(g, hidden);
        hidden = result.hidden;
        state = result.state;
        loss = result.loss;
    }
    const Id out = linear(g, hidden, model.backbone().head(g), none, none, true, g.wide);
    g.expose(out, "logits");
    for (Id id : state)
        g.expose(id, "state");
    if (update)
        g.expose(loss, "statistics");
    const size_t end = g.calls().size();
    const Program program(std::move(g), {end}, model.device());

    std::vector<float> fast(adapter.fast_count()), fresh(adapter.fast_count());
    Random random(0);
    adapter.initial(fast, random);
    std::vector<float> result(tokens.size() * 320);
    Program::Bindings at(program.graph().values().size());
    for (size_t i = 0; i < adapter.fast_tensors().size(); ++i) {
        at[i] = fast.data() + adapter.fast_tensors()[i].offset;
        if (update)
            at[size_t(state[i])] = fresh.data() + adapter.fast_tensors()[i].offset;
    }
    at[size_t(ids)] = const_cast<int32_t *>(tokens.data());
    at[size_t(out)] = result.data();
    if (update)
        at[size_t(loss)] = statistics;
    std::vector<std::byte> arena(program.arena_bytes()),
        workspace(program.workspace_bytes() * 2 + 64);
    auto *aligned = reinterpret_cast<std::byte *>(
        (reinterpret_cast<uintptr_t>(workspace.data()) + 63) / 64 * 64);
    program.run(0, at, arena.data(), aligned, nullptr);
    return result;
}

TEST(PonderModel, LogitsAndStatistics) {
    const auto fixture = SafeTensors::open(PONDER_TEST_DATA "/ponder_model.safetensors");
    const TempDir folder, adapter_folder;
    write_backbone(fixture, folder);
    const std::vector<int32_t> tokens = ids(fixture, "input_ids");
    for (const char *backend : {"reference", "cpu"}) {
        const auto model = load_model(folder.path(), backend);
        write_adapter(fixture, *model, adapter_folder);
        const auto adapted = model->adapted(ttt_options(adapter_folder.path()));
        for (const bool update : {false, true}) {
            std::vector<float> all, means(3);
            for (size_t stream = 0; stream < 2; ++stream) {
                float statistics[3] = {};
                const auto one = logits(*model, adapted->adapter(), update,
                                        std::span(tokens).subspan(stream * 128, 128), statistics);
                all.insert(all.end(), one.begin(), one.end());
                for (size_t i = 0; i < 3; ++i)
                    means[i] += statistics[i] / 2;
            }
            const char *name = update ? "logits_update" : "logits_skip";
            EXPECT_LE(relative_error(all, tensor(fixture, name)), 1e-5) << backend << " " << name;
            if (!update)
                continue;
            const char *names[3] = {"stat.ttt_loss_init", "stat.ttt_loss_step_0",
                                    "stat.ttt_loss_step_1"};
            for (size_t i = 0; i < 3; ++i) {
                double mean = 0;
                for (float x : tensor(fixture, names[i]))
                    mean += double(x) / 8;
                EXPECT_NEAR(means[i], mean, 1e-4 * mean) << backend << " " << names[i];
            }
        }
    }
}

TEST(PonderModel, ASessionRunsTheStoredLayer) {
    const auto fixture = SafeTensors::open(PONDER_TEST_DATA "/ponder_model.safetensors");
    const TempDir folder, adapter_folder;
    write_backbone(fixture, folder);
    const auto model = load_model(folder.path(), "cpu");
    write_adapter(fixture, *model, adapter_folder);
    Session session(model, ttt_options(adapter_folder.path()));
    const std::vector<int32_t> tokens = ids(fixture, "input_ids");
    session.feed(tokens);
    session.adapt(no_limits(session));
    ASSERT_EQ(session.records().size(), 2u);
    for (const ponder_record &record : session.records()) {
        EXPECT_TRUE(record.flags & PONDER_RECORD_UPDATED);
        EXPECT_GT(record.reconstruction, 0);
    }
    // The losses are those of the fixture's logits.
    const std::vector<float> expected = tensor(fixture, "logits_update");
    Session fresh(model, ttt_options(adapter_folder.path()));
    fresh.feed(std::span(tokens).first(128));
    fresh.adapt(no_limits(fresh));
    for (size_t t = 0; t < 127; ++t) {
        const float *row = expected.data() + t * 320;
        double sum = 0;
        for (size_t v = 0; v < 320; ++v)
            sum += std::exp(double(row[v]));
        EXPECT_NEAR(fresh.losses()[t], std::log(sum) - double(row[tokens[t + 1]]), 1e-4);
    }
}

TEST(AdapterFolder, RefusesWhatDoesNotFit) {
    const auto fixture = SafeTensors::open(PONDER_TEST_DATA "/ponder_model.safetensors");
    const TempDir folder, adapter_folder;
    write_backbone(fixture, folder);
    const auto model = load_model(folder.path(), "reference");
    write_adapter(fixture, *model, adapter_folder);
    const auto refuses = [&](const std::string &json, ponder_status status, const char *text) {
        adapter_folder.write("ponder.json", json);
        try {
            load_adapter(adapter_folder.path(), model->backbone().config(), Options(),
                         model->backbone().hash());
            ADD_FAILURE() << "accepted " << json;
        } catch (const Error &e) {
            EXPECT_EQ(e.status(), status) << e.what();
            EXPECT_NE(std::string(e.what()).find(text), std::string::npos) << e.what();
            EXPECT_NE(std::string(e.what()).find("ponder."), std::string::npos) << e.what();
        }
    };
    const std::string head = R"({"format": "ponder-adapter", "version": 1, "model": ")" +
                             model->backbone().hash() + "\", ";
    refuses("[]", PONDER_E_FORMAT, "no ponder adapter");
    refuses(R"({"format": "ponder-adapter"})", PONDER_E_UNSUPPORTED, "version");
    refuses(R"({"format": "ponder-adapter", "version": 2})", PONDER_E_UNSUPPORTED, "version");
    refuses(R"({"format": "ponder-adapter", "version": 1})", PONDER_E_FORMAT, "model");
    refuses(R"({"format": "ponder-adapter", "version": 1, "model": "00"})", PONDER_E_MISMATCH,
            "model");
    refuses(head + R"("kind": "other"})", PONDER_E_UNSUPPORTED, "kind");
    refuses(head + R"("kind": "lora"})", PONDER_E_FORMAT, "lora_a"); // tensors of another kind
    refuses(head + R"("kind": "lora", "options": {"lora.rank": 4}})", PONDER_E_FORMAT, "lora.rank");
}

} // namespace
} // namespace ponder::test
