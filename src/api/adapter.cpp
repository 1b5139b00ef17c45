// Adapter folders: other formats, and copies of backbones that contain them.
#include "api/handles.hpp"

#include "adapt/peft.hpp"

using namespace ponder;
using namespace ponder::api;

ponder_status ponder_adapter_to_peft(const char *adapter, const char *out, ponder_error *error) {
    return guard(error,
                 [&] { adapter_to_peft(&require(adapter, "adapter"), &require(out, "out")); });
}

ponder_status ponder_adapter_from_peft(const ponder_model *model, const char *peft, const char *out,
                                       ponder_error *error) {
    return guard(error, [&] {
        const Gpt2 &backbone = check(model, "model").model->backbone();
        adapter_from_peft(backbone.config(), backbone.hash(), &require(peft, "peft"),
                          &require(out, "out"));
    });
}

ponder_status ponder_adapter_merge(const char *model, const char *adapter, const char *out,
                                   ponder_error *error) {
    return guard(error, [&] {
        merge_adapter(&require(model, "model"), &require(adapter, "adapter"), &require(out, "out"));
    });
}
