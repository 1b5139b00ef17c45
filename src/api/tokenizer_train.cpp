// What a backbone is trained from: a new vocabulary, and new random weights for it.
#include "api/handles.hpp"

#include "formats/bpe_train.hpp"
#include "formats/gpt2_create.hpp"
#include "formats/tokenizer.hpp"

using namespace ponder;
using namespace ponder::api;

ponder_status ponder_backbone_create(const char *folder, const ponder_options *options,
                                     ponder_error *error) {
    return guard(error, [&] {
        require(folder, "folder");
        const Options o = options_or_defaults(options);
        const auto tokenizer = Tokenizer::load(folder);
        if (!tokenizer)
            throw_error(PONDER_E_NOT_FOUND, "%s: has no tokenizer", folder);
        Gpt2Config config;
        config.layers = o.integer("model.layers");
        config.width = o.integer("model.width");
        config.heads = o.integer("model.heads");
        config.context = o.integer("model.context");
        config.inner = 4 * config.width;
        config.vocabulary = tokenizer->size();
        if (config.width % config.heads != 0)
            throw_error(PONDER_E_ARGUMENT, "model.width %lld is no multiple of model.heads %lld",
                        static_cast<long long>(config.width), static_cast<long long>(config.heads));
        create_gpt2(folder, config, uint64_t(o.integer("seed")), tokenizer->end_of_text());
    });
}

ponder_status ponder_tokenizer_train(const char *folder, uint32_t size,
                                     int32_t (*next)(void *user_data, const char **text,
                                                     size_t *length),
                                     void *user_data, ponder_error *error) {
    return guard(error, [&] {
        require(folder, "folder");
        if (!next)
            throw_error(PONDER_E_ARGUMENT, "next is NULL");
        if (size < uint32_t(first_merged_id) || size > 1u << 24)
            throw_error(PONDER_E_ARGUMENT, "size = %u is not in %d..%u", size, first_merged_id,
                        1u << 24);
        BpeTrainer trainer;
        for (;;) {
            const char *text = nullptr;
            size_t length = 0;
            const int32_t more = next(user_data, &text, &length);
            if (more < 0)
                throw_error(PONDER_E_CANCELLED, "cancelled by the source of texts");
            if (more == 0)
                break;
            if (length > 0)
                trainer.add({&require(text, "text"), length});
        }
        const std::string json = tokenizer_json(trainer.merges(size - uint32_t(first_merged_id)));
        replace_file(std::string(folder) + "/tokenizer.json",
                     [&](const Sink &sink) { sink(json.data(), json.size()); });
    });
}
