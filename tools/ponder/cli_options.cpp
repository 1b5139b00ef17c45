#include "cli_options.hpp"

#include "common.hpp"
#include "text.hpp"

#include <CLI/CLI.hpp>

#include <cstdio>
#include <map>

namespace tool {

namespace {

const char *const about =
    "ponder reads text with a small language model that keeps learning from what it read.\n"
    "\n"
    "A frozen backbone scores each chunk of a stream. What it got wrong then changes a few fast\n"
    "weights, so that the rest of the stream becomes easier. `ponder run` shows by how much.";

const char *const exit_codes =
    "Exit status: 0 ok, 1 failure, 2 usage, 3 model or file, 4 backend unavailable,\n"
    "5 out of memory, 130 interrupted (what was done so far is reported first).";

const char *const main_examples =
    "Start here:\n"
    "  ponder run                          read this directory, print what adapting gained\n"
    "  ponder run src --html report.html   the same as a page, every token coloured\n"
    "  ponder run --help                   all flags of a command, and what they do\n"
    "  ponder info                         the model, and the memory a session will need\n";

const char *const run_help =
    "Reads files, directories (in a stable order, without binary files and what .gitignore\n"
    "names) or - for standard input as one stream: first adapting, then once more frozen\n"
    "(SKIP). Each chunk is scored before it is learned from, so every loss is a prediction.";

const char *const run_examples =
    "Examples:\n"
    "  ponder run\n"
    "  ponder run src include --policy every:2\n"
    "  git log -p | ponder run - --json\n"
    "  ponder run docs --steps 2 --set lora.rank=32 --html report.html\n";

const char *const eval_help =
    "The measuring instrument. Each package of the stream starts fresh, is cut into chunks, and\n"
    "is carried along; the result is the mean chunk loss with its cost. By default a chunk\n"
    "attends to itself alone (--context = --chunk), the norm bound and the budget are off.";

const char *const eval_examples =
    "Lines of the stream are objects with \"package\", \"path\" and \"text\", .jsonl or .jsonl.xz.\n"
    "\n"
    "Examples:\n"
    "  ponder eval --stream go.test.jsonl.xz --adapter none --json\n"
    "  ponder eval --stream go.test.jsonl.xz --steps 2 --set lora.layers=last:5 --json\n";

const char *const option_order =
    "--set reaches every hyperparameter below and wins over the flags. Names, defaults and\n"
    "documentation come from the library's option table.\n";

// Sizes such as 512M; the library counts bytes.
uint64_t parse_size(const std::string &text) {
    static const std::map<char, int> shifts{{'k', 10}, {'m', 20}, {'g', 30}, {'t', 40}};
    size_t used = 0;
    double value = 0;
    try {
        value = std::stod(text, &used);
    } catch (const std::exception &) {
        throw Failure(exit_usage, "--memory-limit: '" + text + "' is no size");
    }
    std::string unit = text.substr(used);
    if (!unit.empty() && (unit.back() == 'B' || unit.back() == 'b')) unit.pop_back();
    if (!unit.empty() && (unit.back() == 'i')) unit.pop_back();
    if (unit.size() == 1 && shifts.count(char(std::tolower(unit[0]))))
        value *= double(uint64_t(1) << shifts.at(char(std::tolower(unit[0]))));
    else if (!unit.empty())
        throw Failure(exit_usage, "--memory-limit: '" + text + "' is no size");
    if (!(value >= 0) || value > 1e18)
        throw Failure(exit_usage, "--memory-limit: '" + text + "' is out of range");
    return uint64_t(value);
}

std::vector<ponder_option_info> option_table() {
    std::vector<ponder_option_info> table;
    for (uint32_t i = 0; i < ponder_option_count(); ++i) {
        table.push_back(sized<ponder_option_info>());
        call(ponder_option_get, i, &table.back());
    }
    return table;
}

// `  lora.rank=16      what it is (1..256)`, for the end of the help.
std::string describe(const ponder_option_info &option) {
    std::string doc = option.doc;
    if (option.choices[0]) doc += std::string("; ") + option.choices;
    if (option.unit[0]) doc += std::string(" [") + option.unit + "]";
    const std::string head = std::string("  ") + option.name + "=" + option.default_value;
    return hanging(head, doc, 30, 90);
}

std::string option_help(const std::vector<ponder_option_info> &table) {
    std::string text = std::string("Hyperparameters:\n") + option_order;
    for (const ponder_option_info &option : table)
        text += describe(option);
    return text;
}

// Values that CLI11 fills; turned into Settings when the command is known.
struct Raw {
    std::map<std::string, std::string> flags; // entries of the option table
    std::map<std::string, bool> switches;     // its booleans
    std::vector<std::string> sets;
    std::string memory_limit;
    bool no_baseline = false, no_load = false;
};

void add_machine(CLI::App &app, Settings &s, Raw &raw) {
    app.add_option("--threads", s.threads, "compute threads; 0 = the cores it may use")
        ->check(CLI::Range(0, 256));
    app.add_option("--backend-path", s.backend_path, "folder with backend modules, tried first");
    app.add_option("--memory-limit", raw.memory_limit, "for tensors and weights, such as 512M");
}

void add_output(CLI::App &app, Settings &s) {
    app.add_flag("--json", s.json, "one JSON object on standard output");
    app.add_flag("-q,--quiet", s.quiet, "no progress, no notes");
}

void add_model(CLI::App &app, Settings &s) {
    app.add_option("--model", s.model, "Hugging Face folder; default: code-10m of this tool");
    app.add_option("--backend", s.backend, "auto, or a name from `ponder backends`");
    app.add_option("--dtype", s.dtype, "of frozen weights: f32 or bf16")
        ->check(CLI::IsMember({"f32", "bf16"}));
}

// Flags for the table's short names; the dotted ones are reached with --set.
void add_hyperparameters(CLI::App &app, Raw &raw, const std::vector<ponder_option_info> &table) {
    for (const ponder_option_info &option : table) {
        const std::string name = option.name;
        if (name.find('.') != std::string::npos) continue;
        if (option.type == PONDER_OPTION_BOOLEAN)
            app.add_flag("--" + name, raw.switches[name], option.doc)->group("Adapting");
        else
            app.add_option("--" + name, raw.flags[name],
                           std::string(option.doc) + " (" + option.default_value + ")")
                ->group("Adapting");
    }
    app.add_option("--set", raw.sets, "NAME=VALUE: any hyperparameter; may be repeated")
        ->group("Adapting")
        ->expected(1)
        ->take_all();
}

void take_hyperparameters(Settings &s, const Raw &raw, const CLI::App &app) {
    for (const auto &[name, value] : raw.flags)
        if (app.get_option_no_throw("--" + name) && app.count("--" + name))
            s.options.emplace_back(name, value);
    for (const auto &[name, on] : raw.switches)
        if (on) s.options.emplace_back(name, "1");
    for (const std::string &text : raw.sets) {
        const size_t equals = text.find('=');
        if (equals == std::string::npos || equals == 0)
            throw Failure(exit_usage, "--set: '" + text + "' is not NAME=VALUE");
        s.options.emplace_back(text.substr(0, equals), text.substr(equals + 1));
    }
}

} // namespace

std::optional<Settings> parse_command_line(int argc, char **argv) {
    const std::vector<ponder_option_info> table = option_table();
    Settings s;
    Raw raw;
    CLI::App app(about, "ponder");
    app.set_version_flag("--version", std::string("ponder ") + ponder_version());
    app.require_subcommand(1);
    app.footer(std::string("\n") + main_examples + "\n" + exit_codes);
    app.get_formatter()->column_width(28);
    const std::string hyper = option_help(table);

    CLI::App *run = app.add_subcommand("run", "stream text, adapt to it, show what was gained");
    run->add_option("PATH", s.paths, "files, directories, - for stdin; default: this directory");
    add_output(*run, s);
    run->add_option("--html", s.html, "write a self-contained page to this file");
    run->add_flag("--no-baseline", raw.no_baseline, "leave the frozen SKIP pass out");
    run->footer("\n" + std::string(run_examples) + "\n" + hyper + "\n" + exit_codes);

    CLI::App *eval = app.add_subcommand("eval", "measure a method on package streams");
    eval->add_option("--stream", s.stream, "FILE.jsonl or FILE.jsonl.xz")->required();
    add_output(*eval, s);
    eval->add_option("--min-chunks", s.min_chunks, "packages with fewer are skipped (8)");
    eval->add_option("--max-chunks", s.max_chunks, "read of a package at most (48)")
        ->check(CLI::Range(uint64_t(1), uint64_t(1) << 40));
    eval->footer("\n" + std::string(eval_examples) + "\n" + hyper + "\n" + exit_codes);

    CLI::App *info = app.add_subcommand("info", "model, adapter and memory plan");
    add_output(*info, s);
    info->add_flag("--plan-only", raw.no_load, "load nothing: the plan from the files' headers");
    info->footer("\n" + hyper + "\n" + exit_codes);

    CLI::App *backends = app.add_subcommand("backends", "what can run a model, and why not");
    add_output(*backends, s);

    CLI::App *bench = app.add_subcommand("bench", "speed of SKIP and of one update, by op");
    add_output(*bench, s);
    bench->add_option("--chunks", s.bench_chunks, "chunks in each repeat (4)")
        ->check(CLI::Range(1, 100000));
    bench->add_option("--repeats", s.bench_repeats, "SKIP and update, by turns; medians (5)")
        ->check(CLI::Range(1, 1000));
    bench->footer("\n" + hyper + "\n" + exit_codes);

    for (CLI::App *sub : {run, eval, info, backends, bench}) {
        if (sub != backends) add_model(*sub, s);
        add_machine(*sub, s, raw);
        if (sub != backends) add_hyperparameters(*sub, raw, table);
    }

    const std::map<const CLI::App *, Command> commands{{run, Command::run},
                                                       {eval, Command::eval},
                                                       {info, Command::info},
                                                       {backends, Command::backends},
                                                       {bench, Command::bench}};
    try {
        app.parse(argc, argv);
        const CLI::App *chosen = app.get_subcommands().front();
        s.command = commands.at(chosen);
        if (s.command != Command::backends) take_hyperparameters(s, raw, *chosen);
    } catch (const CLI::CallForHelp &) {
        // The list of subcommands has one line each; their own help says more.
        run->description(run_help);
        eval->description(eval_help);
        std::fputs(app.help().c_str(), stdout);
        return std::nullopt;
    } catch (const CLI::CallForVersion &version) {
        std::printf("%s\n", version.what());
        return std::nullopt;
    } catch (const CLI::ParseError &error) {
        throw Failure(exit_usage, std::string(error.what()) + " (see ponder --help)");
    }
    s.baseline = !raw.no_baseline;
    s.load = !raw.no_load;
    if (!raw.memory_limit.empty()) s.memory_limit = parse_size(raw.memory_limit);
    return s;
}

} // namespace tool
