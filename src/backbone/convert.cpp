#include "backbone/convert.hpp"

#include "backbone/gpt2.hpp"
#include "base/error.hpp"

#include <algorithm>
#include <deque>

namespace ponder {

namespace {

void copy_if_there(const std::string &name, const std::string &from, const std::string &to) {
    if (!file_exists(from + "/" + name))
        return;
    const std::string content = read_file(from + "/" + name, size_t(256) << 20);
    replace_file(to + "/" + name, [&](const Sink &sink) { sink(content.data(), content.size()); });
}

} // namespace

void convert_to_int8(const std::string &folder, const std::string &out,
                     std::shared_ptr<Memory> memory,
                     const std::function<void(uint64_t, uint64_t)> &progress) {
    const Gpt2Folder source(folder);
    if (source.int8())
        throw_error(PONDER_E_STATE, "%s: its weights are int8 already", folder.c_str());
    for (const char *file : {"model.safetensors", "model.safetensors.index.json"})
        if (file_exists(out + "/" + file))
            throw_error(PONDER_E_STATE, "%s: holds weights already: %s", out.c_str(), file);

    Gpt2 model(source, DType::f32, std::move(memory), progress, Storage::int8);
    SafeTensorsWriter writer;
    writer.metadata["format"] = "pt";
    std::deque<std::vector<bf16>> narrow;
    for (const Gpt2::Weight &w : model.weights()) {
        DType type = w.type;
        const void *data = w.data;
        const std::vector<int64_t> shape(w.shape.dim, w.shape.dim + w.shape.rank);
        const bool scales = w.name.ends_with("_scale");
        if (type == DType::f32 && !scales && source.stored_type(w.name) == DType::bf16) {
            std::vector<bf16> &to = narrow.emplace_back(size_t(w.shape.count()));
            const float *from = reinterpret_cast<const float *>(w.data);
            std::transform(from, from + to.size(), to.begin(), to_bf16);
            type = DType::bf16;
            data = to.data();
        }
        writer.add((w.name.starts_with("lm_head.") ? "" : "transformer.") + w.name, type, shape,
                   data);
    }
    const std::string config = int8_config(folder, {model.hash(), model.content_hash()});

    make_folder(out);
    for (const char *name : {"tokenizer.json", "vocab.json", "merges.txt"})
        copy_if_there(name, folder, out);
    if (file_exists(folder + "/adapter/ponder.json")) {
        make_folder(out + "/adapter");
        copy_if_there("ponder.safetensors", folder + "/adapter", out + "/adapter");
        copy_if_there("ponder.json", folder + "/adapter", out + "/adapter");
    }
    replace_file(out + "/config.json",
                 [&](const Sink &sink) { sink(config.data(), config.size()); });
    replace_file(out + "/model.safetensors", [&](const Sink &sink) { writer.write(sink); });
}

} // namespace ponder
