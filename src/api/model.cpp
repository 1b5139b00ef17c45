// Models: loading, facts, tokens, memory plans.
#include "api/handles.hpp"

#include "backbone/convert.hpp"
#include "session/plan.hpp"

using namespace ponder;
using namespace ponder::api;

namespace {

struct ModelChoice {
    std::string backend, dtype, weights;
};

ModelChoice choice_of(const ponder_model_options *options) {
    const ponder_model_options o = read_struct(options, "options");
    return {o.backend ? o.backend : "auto", o.dtype ? o.dtype : "f32",
            o.weights ? o.weights : "auto"};
}

const Tokenizer &tokenizer_of(const ponder_model &model) {
    if (!model.model->tokenizer())
        throw_error(PONDER_E_STATE, "the model's folder has no tokenizer");
    return *model.model->tokenizer();
}

} // namespace

ponder_status ponder_model_load(ponder_model **out, ponder_runtime *runtime, const char *path,
                                const ponder_model_options *options, const ponder_call *call,
                                ponder_error *error) {
    return guard(error, [&] {
        require(out, "out");
        const auto &rt = check(runtime, "runtime").runtime;
        require(path, "path");
        const ModelChoice choice = choice_of(options);
        const ponder_call limits = read_struct(call, "call");
        std::atomic<bool> cancel{false};
        const CallGuard bounds(cancel, &limits);
        auto handle = std::make_unique<ponder_model>();
        const auto progress = [&](uint64_t done, uint64_t total) {
            bounds.check();
            bounds.progress(done, total);
        };
        handle->model = std::make_shared<Model>(rt, path, choice.backend, choice.dtype, progress,
                                                choice.weights);
        *out = handle.release();
    });
}

ponder_status ponder_model_retain(const ponder_model *model, ponder_error *error) {
    return guard(error, [&] { check(model, "model").owners.fetch_add(1); });
}

void ponder_model_release(const ponder_model *model) {
    if (model && ponder_model::is(model) && model->owners.fetch_sub(1) == 1)
        delete model;
}

ponder_status ponder_model_get(const ponder_model *model, ponder_model_info *out,
                               ponder_error *error) {
    return guard(error, [&] {
        const Model &m = *check(model, "model").model;
        check_out(out, "out");
        const Gpt2Config &c = m.backbone().config();
        ponder_model_info info{};
        info.layers = int32_t(c.layers);
        info.width = int32_t(c.width);
        info.heads = int32_t(c.heads);
        info.vocabulary = int32_t(c.vocabulary);
        info.context = int32_t(c.context);
        info.inner_width = int32_t(c.inner);
        info.parameters = m.backbone().parameters();
        info.architecture = "gpt2";
        info.dtype = m.backbone().type() == DType::bf16 ? "bf16" : "f32";
        info.backend = m.device()->backend().name;
        info.isa = m.device()->backend().isa();
        info.hash = m.backbone().hash().c_str();
        info.has_tokenizer = m.tokenizer() != nullptr;
        info.weights = m.backbone().storage() == Storage::int8 ? "int8" : "float";
        info.end_of_text = m.tokenizer() ? m.tokenizer()->end_of_text() : -1;
        write_struct(out, info);
    });
}

ponder_status ponder_model_tokenize(const ponder_model *model, const char *text, size_t size,
                                    int32_t *ids, size_t capacity, size_t *count,
                                    ponder_error *error) {
    return guard(error, [&] {
        const Tokenizer &tokenizer = tokenizer_of(check(model, "model"));
        require(count, "count");
        if (size > 0)
            require(text, "text");
        const std::vector<int32_t> encoded = tokenizer.encode({size ? text : "", size});
        const int64_t vocabulary = model->model->backbone().config().vocabulary;
        for (int32_t id : encoded)
            if (id >= vocabulary)
                throw_error(PONDER_E_FORMAT, "the tokenizer gives id %d, the model has %d", id,
                            int(vocabulary));
        *count = encoded.size();
        if (encoded.size() > capacity)
            throw_error(PONDER_E_BUFFER, "%zu ids, capacity %zu", encoded.size(), capacity);
        if (!encoded.empty())
            std::copy(encoded.begin(), encoded.end(), &require(ids, "ids"));
    });
}

ponder_status ponder_model_token_bytes(const ponder_model *model, int32_t id, const char **bytes,
                                       size_t *size, ponder_error *error) {
    return guard(error, [&] {
        const Tokenizer &tokenizer = tokenizer_of(check(model, "model"));
        require(bytes, "bytes");
        require(size, "size");
        if (id < 0 || id >= tokenizer.size())
            throw_error(PONDER_E_ARGUMENT, "id %d is not in 0..%d", id, tokenizer.size() - 1);
        const std::string_view text = tokenizer.bytes(id);
        *bytes = text.data();
        *size = text.size();
    });
}

ponder_status ponder_plan_memory(ponder_runtime *runtime, const char *path,
                                 const ponder_model_options *model_options,
                                 const ponder_options *options, ponder_memory_plan *out,
                                 ponder_error *error) {
    return guard(error, [&] {
        const Runtime &rt = *check(runtime, "runtime").runtime;
        require(path, "path");
        check_out(out, "out");
        const ModelChoice choice = choice_of(model_options);
        const Options o = options_or_defaults(options);
        write_struct(out, plan_memory(rt, path, choice.backend, choice.dtype, choice.weights, o));
    });
}

ponder_status ponder_model_convert(ponder_runtime *runtime, const char *path, const char *out,
                                   const char *weights, const ponder_call *call,
                                   ponder_error *error) {
    return guard(error, [&] {
        const Runtime &rt = *check(runtime, "runtime").runtime;
        const std::string from = &require(path, "path"), to = &require(out, "out");
        const std::string kind = &require(weights, "weights");
        if (kind != "int8")
            throw_error(PONDER_E_ARGUMENT, "weights '%.40s' is not int8", kind.c_str());
        const ponder_call limits = read_struct(call, "call");
        std::atomic<bool> cancel{false};
        const CallGuard bounds(cancel, &limits);
        convert_to_int8(from, to, rt.memory, [&](uint64_t done, uint64_t total) {
            bounds.check();
            bounds.progress(done, total);
        });
    });
}
