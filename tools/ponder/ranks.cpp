#include "ranks.hpp"

#include "checkpoints.hpp"
#include "common.hpp"
#include "setup.hpp"

#include <cstdlib>
#include <filesystem>

namespace tool {

namespace fs = std::filesystem;

namespace {

std::string variable(std::initializer_list<const char *> names) {
    for (const char *name : names)
        if (const char *value = std::getenv(name); value && *value)
            return value;
    return {};
}

// Whole numbers that a launcher wrote; what is none of these is somebody else's variable.
bool is_number(const std::string &text) {
    return !text.empty() && text.size() < 6 &&
           text.find_first_not_of("0123456789") == std::string::npos;
}

// HOST:PORT for all processes. torchrun says MASTER_PORT, and most of its versions keep that port
// themselves: the one beside it is then taken.
std::string address() {
    const std::string host = variable({"MASTER_ADDR"}), text = variable({"MASTER_PORT"});
    unsigned port = 29500;
    if (!text.empty()) {
        if (!is_number(text) || std::stoul(text) == 0 || std::stoul(text) > 65535)
            throw Failure(exit_usage, "MASTER_PORT: '" + text.substr(0, 100) + "' is no port");
        port = unsigned(std::stoul(text));
    }
    if (variable({"TORCHELASTIC_USE_AGENT_STORE"}) == "True")
        port = port < 65535 ? port + 1 : port - 1;
    return (host.empty() ? "127.0.0.1" : host) + ":" + std::to_string(port);
}

// The entry of that number in a list such as "2,3"; the number itself where there is no list.
std::string visible_device(size_t number) {
    std::string list = variable({"CUDA_VISIBLE_DEVICES"});
    if (list.empty())
        return std::to_string(number);
    for (; number > 0; --number) {
        const size_t comma = list.find(',');
        if (comma == list.npos)
            throw Failure(exit_usage,
                          "CUDA_VISIBLE_DEVICES has fewer devices than this machine has "
                          "processes");
        list.erase(0, comma + 1);
    }
    return list.substr(0, list.find(','));
}

} // namespace

void join_by_environment(Settings &settings) {
    if (given(settings, "train.world") || given(settings, "train.rank"))
        return;
    const std::string world = variable({"WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"});
    const std::string rank = variable({"RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"});
    if (!is_number(world) || !is_number(rank) || std::stoul(world) < 2)
        return;
    settings.options.emplace_back("train.world", world);
    settings.options.emplace_back("train.rank", rank);
    if (!given(settings, "train.address"))
        settings.options.emplace_back("train.address", address());
    const std::string local =
        variable({"LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID"});
    if (is_number(local))
        setenv("CUDA_VISIBLE_DEVICES", visible_device(std::stoul(local)).c_str(), 1);
}

FollowerFolder::FollowerFolder(const std::string &run, bool resume) {
    std::error_code problem;
    std::string name = (fs::temp_directory_path(problem) / "ponder-XXXXXX").string();
    if (problem || !mkdtemp(name.data()))
        throw Failure(exit_file, "no temporary folder can be made");
    path_ = name;
    if (!resume || !fs::exists(run, problem))
        return;
    const fs::path whole = fs::absolute(run, problem);
    const auto link = [&](const std::string &what) {
        fs::create_symlink(whole / what, path_ + "/" + what, problem);
        if (problem) {
            const std::string why = problem.message();
            fs::remove_all(path_, problem);
            throw Failure(exit_file, path_ + "/" + what + ": " + why);
        }
    };
    // Its weights are written last: without them each process makes the same for itself.
    if (fs::exists(whole / "initial/model.safetensors", problem))
        link("initial");
    if (const auto latest = latest_checkpoint(run))
        link("step-" + std::to_string(*latest) + ".ckpt");
}

FollowerFolder::~FollowerFolder() {
    std::error_code ignored;
    fs::remove_all(path_, ignored);
}

} // namespace tool
