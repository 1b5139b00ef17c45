// `ponder adapter`: adapter folders to and from PEFT, and merged into a copy of their backbone.
#include "commands.hpp"
#include "setup.hpp"
#include "terminal.hpp"

namespace tool {

int adapter_command(const Settings &settings) {
    const std::string &from = settings.paths[0], &out = settings.paths[1];
    switch (settings.adapter_action) {
    case AdapterAction::export_peft:
        call(ponder_adapter_to_peft, from.c_str(), out.c_str());
        break;
    case AdapterAction::import_peft: {
        const Runtime runtime = open_runtime(settings);
        const Model model = load_model(runtime.get(), model_folder(settings), settings);
        call(ponder_adapter_from_peft, model.get(), from.c_str(), out.c_str());
        break;
    }
    case AdapterAction::merge:
        call(ponder_adapter_merge, model_folder(settings).c_str(), from.c_str(), out.c_str());
        break;
    }
    note(settings.quiet, "wrote " + out);
    return exit_ok;
}

} // namespace tool
