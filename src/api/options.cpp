// The option table and sets of values.
#include "api/handles.hpp"

#include "adapt/stored.hpp"

using namespace ponder;
using namespace ponder::api;

uint32_t ponder_option_count(void) { return uint32_t(option_table().size()); }

ponder_status ponder_option_get(uint32_t index, ponder_option_info *out, ponder_error *error) {
    return guard(error, [&] {
        check_out(out, "out");
        if (index >= option_table().size())
            throw_error(PONDER_E_ARGUMENT, "index %u of %zu options", index, option_table().size());
        write_struct(out, option_table()[index]);
    });
}

ponder_status ponder_options_create(ponder_options **out, ponder_error *error) {
    return guard(error, [&] { require(out, "out") = new ponder_options; });
}

void ponder_options_destroy(ponder_options *options) {
    if (options && ponder_options::is(options))
        delete options;
}

ponder_status ponder_options_set(ponder_options *options, const char *name, const char *value,
                                 ponder_error *error) {
    return guard(error, [&] {
        check(options, "options").options.set(&require(name, "name"), &require(value, "value"));
    });
}

ponder_status ponder_options_value(const ponder_options *options, const char *name,
                                   const char **value, ponder_error *error) {
    return guard(error, [&] {
        const Options &values = check(options, "options").options;
        require(value, "value") = values.text(&require(name, "name")).c_str();
    });
}

ponder_status ponder_options_resolve(ponder_options **out, const ponder_options *options,
                                     ponder_error *error) {
    return guard(error, [&] {
        require(out, "out");
        auto handle = std::make_unique<ponder_options>();
        handle->options = with_stored_options(options_or_defaults(options));
        *out = handle.release();
    });
}
