#include "cli_options.hpp"

#include "common.hpp"
#include "text.hpp"

#include <CLI/CLI.hpp>

#include <cstdio>
#include <map>

namespace tool {

namespace {

const char *const about =
    "ponder reads text with a small language model that keeps learning from what it\n"
    "read. A frozen backbone scores each chunk of a stream; what it got wrong then\n"
    "changes a few fast weights, so that the rest of the stream becomes easier.\n"
    "`ponder run` shows by how much.\n";

const char *const exit_codes =
    "Exit status: 0 ok, 1 failure, 2 usage, 3 model or file, 4 backend unavailable,\n"
    "5 out of memory, 130 interrupted (what was done so far is reported first).";

const char *const main_examples =
    "Start here:\n"
    "  ponder run                          read this directory, print what adapting gained\n"
    "  ponder run src --html report.html   the same as a page, every token coloured\n"
    "  ponder run --help                   all flags of a command, and what they do\n"
    "  ponder generate --read src --prompt 'int main('   complete text with what was learned\n"
    "  ponder info                         the model, and the memory a session will need\n"
    "  ponder train --help                 how to train what it adapts with\n";

const char *const run_help =
    "Reads files, directories (in a stable order, without binary files and what\n"
    ".gitignore names) or - for standard input as one stream: first adapting, then once\n"
    "more frozen (SKIP). Each chunk is scored before it is learned from, so every loss\n"
    "is that of a prediction.";

const char *const run_examples =
    "Examples:\n"
    "  ponder run\n"
    "  ponder run src include --policy every:2\n"
    "  ponder run src --adapter run1       what `ponder train adapter --out run1` learned\n"
    "  ponder run src --adapter lora       untrained, in place of the default model's own\n"
    "  git log -p | ponder run - --json\n"
    "  ponder run docs --steps 2 --set lora.rank=32 --html report.html\n";

const char *const generate_help =
    "Continues a text. First it reads and learns from --read, if given, and says what that\n"
    "gained; the text continues on standard output as it comes. What was read is in the\n"
    "weights: the text itself begins with the prompt alone. --seed also draws the tokens.";

const char *const generate_examples =
    "Examples:\n"
    "  ponder generate --prompt 'def main():'\n"
    "  ponder generate --read src --prompt '#include \"' --max-tokens 40\n"
    "  head -50 src/a.c | ponder generate --read src include --prompt - --compare\n"
    "  ponder generate --prompt 'import ' --temperature 0.8 --top-p 0.95 --seed 7\n";

const char *const eval_help =
    "The measuring instrument. Each package of the stream starts fresh and is cut into\n"
    "chunks; fast weights are carried along it. The result is the mean chunk loss with\n"
    "its cost. By default a chunk attends to itself alone (--context = --chunk), and the\n"
    "norm bound and the budget are off.";

const char *const eval_examples =
    "Lines of the stream are objects with \"package\", \"path\" and \"text\"; .jsonl, also "
    "with\n.xz or .gz.\n"
    "\n"
    "Examples:\n"
    "  ponder eval --stream go.test.jsonl.xz --adapter none --json\n"
    "  ponder eval --stream go.test.jsonl.xz --steps 2 --set lora.rank=32 --json\n"
    "  ponder eval --stream go.test.jsonl.xz --adapter run1\n";

const char *const train_help =
    "Trains an adapter (what a session starts from, through its own updates), the gate of\n"
    "an adapter, or a backbone. Data are JSON Lines (.jsonl, also .xz or .gz; objects with\n"
    "\"package\" and \"text\", or \"text\" alone), text files, or folders, in which every\n"
    "folder right below is a package. They are tokenised once, into a cache. Adapters and\n"
    "gates read pieces of packages, backbones windows of --context tokens.\n"
    "\n"
    "The folder --out gets step-N.ckpt files, log.jsonl (an object a step) and, at the end,\n"
    "what was trained. A stopped or killed run goes on with --resume exactly as if it had\n"
    "not been stopped.";

const char *const train_examples =
    "Examples:\n"
    "  ponder train adapter --data py.train.jsonl.xz --valid py.valid.jsonl.xz --out run1 \\\n"
    "      --set lora.layers=last:5 --set train.lr=1e-3\n"
    "  ponder run src --adapter run1\n"
    "  ponder train gate --adapter run1 --data py.train.jsonl.xz --out run2\n"
    "  ponder train backbone --new --vocab 4096 --data ~/src --valid-share 0.05 --out tiny \\\n"
    "      --set model.layers=4 --set model.width=128\n"
    "  ponder report run1/log.jsonl --out run1.html\n";

const char *const adapter_help =
    "Turns a LoRA adapter folder into one of Hugging Face's PEFT (export-peft) and back\n"
    "(import-peft), or adds it to the weights of a copy of its backbone (merge). All of them\n"
    "take the A and B that the adapter starts from; what it learned about its updates stays\n"
    "behind.";

const char *const convert_help =
    "Writes a copy of a model folder whose linears, embedding and head are int8 with a scale\n"
    "for each output channel. Every command takes it as --model; adapters of the original fit,\n"
    "and the one that lies in its folder is copied too.\n";
const char *const convert_examples = "Examples:\n"
                                     "  ponder convert gpt2 gpt2-int8 --weights int8\n"
                                     "  ponder run src --model gpt2-int8 --dtype bf16\n"
                                     "  ponder info --dtype bf16 --weights int8   made at load\n";

const char *const adapter_examples = "Examples:\n"
                                     "  ponder adapter export-peft run1 run1-peft\n"
                                     "  ponder adapter import-peft some-peft run3 --model gpt2\n"
                                     "  ponder adapter merge run1 code-10m-merged\n";

const char *const calibrate_help =
    "Fits the gate in an adapter's folder to a cost, on package streams without labels, and\n"
    "stores thresholds there: --rate steps a chunk, or --shares of chunks with 0, 1, 2 and 4\n"
    "steps. How early steps come and how large they are is chosen by the streams' loss. The\n"
    "cost on other streams (--held) is reported beside it.";

const char *const calibrate_examples =
    "Examples:\n"
    "  ponder calibrate --adapter run2 --rate 0.5 --stream py.valid.jsonl.xz\n"
    "  ponder calibrate --adapter run2 --shares 0.7,0.2,0.1,0 --stream a.jsonl b.jsonl\n";

const char *const report_help =
    "Draws the logs of training runs, one over the other, as one self-contained page.";

constexpr size_t help_column = 28, help_width = 84;

std::string wrapped(const std::string &text) {
    const std::string hung = hanging("", text, 0, help_width - help_column);
    return hung.substr(0, hung.size() - 1);
}

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
    if (!unit.empty() && (unit.back() == 'B' || unit.back() == 'b'))
        unit.pop_back();
    if (!unit.empty() && (unit.back() == 'i'))
        unit.pop_back();
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

std::string document(const ponder_option_info &option) {
    std::string text = option.doc;
    if (option.unit[0])
        text += std::string(" [") + option.unit + "]";
    if (option.choices[0])
        text += std::string(": ") + option.choices;
    // Long lists of choices may be broken between them.
    for (size_t at = 0; (at = text.find('|', at)) != std::string::npos; at += 3)
        text.replace(at, 1, " | ");
    return text;
}

bool has_flag(const ponder_option_info &option) {
    return std::string_view(option.name).find('.') == std::string_view::npos;
}

// `  lora.rank=16      what it is (1..256)`, for the end of the help.
std::string describe(const ponder_option_info &option) {
    const std::string head = std::string("  ") + option.name + "=" + option.default_value;
    return hanging(head, document(option), help_column, help_width);
}

std::string option_help(const std::vector<ponder_option_info> &table) {
    std::string text =
        "Hyperparameters and their defaults, for --set NAME=VALUE (which also takes the\n"
        "names of the flags above, and wins over them):\n";
    for (const ponder_option_info &option : table)
        if (!has_flag(option))
            text += describe(option);
    return text;
}

// Values that CLI11 fills; turned into Settings when the command is known.
struct Raw {
    std::map<std::string, std::string> flags; // entries of the option table
    std::map<std::string, bool> switches;     // its booleans
    std::vector<std::string> sets;
    std::string memory_limit;
    std::string kind; // of train; action of adapter
    std::string train_steps;
    std::string rate; // of calibrate
    bool no_baseline = false, no_load = false, no_search = false;
};

// Without the range in the list of flags; errors still name it.
template <class Check> CLI::Validator unnamed(Check check) {
    CLI::Validator validator = check;
    validator.description("");
    return validator;
}

void add_machine(CLI::App &app, Settings &s, Raw &raw) {
    app.add_option("--threads", s.threads, "compute threads; 0 = the cores it may use")
        ->check(unnamed(CLI::Range(0, 256)))
        ->type_name("N");
    app.add_option("--backend-path", s.backend_path, "folder with backend modules, tried first")
        ->type_name("DIR");
    app.add_option("--memory-limit", raw.memory_limit, "for tensors and weights, such as 512M")
        ->type_name("SIZE");
}

void add_output(CLI::App &app, Settings &s) {
    app.add_flag("--json", s.json, "one JSON object on standard output");
    app.add_flag("-q,--quiet", s.quiet, "no progress, no notes");
}

void add_model(CLI::App &app, Settings &s) {
    app.add_option("--model", s.model, "Hugging Face folder; default: code-10m of this tool")
        ->type_name("DIR");
    app.add_option("--backend", s.backend, "auto, or a name from `ponder backends`")
        ->type_name("NAME");
    app.add_option("--dtype", s.dtype, "of activations and float weights: f32 or bf16")
        ->check(unnamed(CLI::IsMember({"f32", "bf16"})))
        ->type_name("TYPE");
    app.add_option("--weights", s.weights, "int8, float (in the dtype), or auto: as in the folder")
        ->check(unnamed(CLI::IsMember({"auto", "int8", "float"})))
        ->type_name("KIND");
}

// Flags for the table's short names; the dotted ones are reached with --set.
// A command may have a flag of its own of that name.
void add_hyperparameters(CLI::App &app, Raw &raw, const std::vector<ponder_option_info> &table) {
    for (const ponder_option_info &option : table) {
        const std::string name = option.name;
        if (!has_flag(option) || app.get_option_no_throw("--" + name))
            continue;
        const std::string group = "Adapting";
        if (option.type == PONDER_OPTION_BOOLEAN)
            app.add_flag("--" + name, raw.switches[name], wrapped(option.doc))->group(group);
        else
            app.add_option("--" + name, raw.flags[name], wrapped(document(option)))
                ->group(group)
                ->type_name("(" + std::string(option.default_value) + ")");
    }
    app.add_option("--set", raw.sets, "any hyperparameter; may be repeated")
        ->group("Adapting")
        ->type_name("NAME=VALUE")
        ->expected(1)
        ->take_all();
}

void take_hyperparameters(Settings &s, const Raw &raw, const CLI::App &app) {
    if (!raw.rate.empty())
        s.options.emplace_back("policy.target_rate", raw.rate);
    if (!raw.train_steps.empty())
        s.options.emplace_back("train.steps", raw.train_steps);
    for (const auto &[name, value] : raw.flags)
        if (name == "steps" && s.command == Command::train)
            continue; // the outer ones
        else if (app.get_option_no_throw("--" + name) && app.count("--" + name))
            s.options.emplace_back(name, value);
    for (const auto &[name, on] : raw.switches)
        if (on)
            s.options.emplace_back(name, "1");
    for (const std::string &text : raw.sets) {
        const size_t equals = text.find('=');
        if (equals == std::string::npos || equals == 0)
            throw Failure(exit_usage, "--set: '" + text + "' is not NAME=VALUE");
        s.options.emplace_back(text.substr(0, equals), text.substr(equals + 1));
    }
}

void add_train(CLI::App &app, Settings &s, Raw &raw, const std::string &hyper) {
    TrainSettings &t = s.train;
    app.add_option("KIND", raw.kind, "adapter, gate or backbone")
        ->required()
        ->check(unnamed(CLI::IsMember({"adapter", "gate", "backbone"})))
        ->type_name("");
    const auto natural = [](const std::string &least = "1") {
        return unnamed(CLI::Range(std::stod(least), 1e15));
    };
    app.add_option("--data", t.data, "files and folders to train on")
        ->required()
        ->type_name("SRC...");
    app.add_option("--out", t.out, "folder for checkpoints, log and result")
        ->required()
        ->type_name("DIR");
    app.add_option("--valid", t.valid, "files and folders to measure on; never trained on")
        ->type_name("SRC...");
    app.add_option("--valid-share", t.valid_share,
                   "or this share of the packages of --data, by name")
        ->check(unnamed(CLI::Range(0.0, 1.0)))
        ->type_name("X");
    app.add_option("--valid-every", t.valid_every, "steps between measurements (100); 0 = none")
        ->check(natural("0"))
        ->type_name("N");
    app.add_option("--valid-chunks", t.valid_chunks, "measured of a package at most (16)")
        ->check(natural("2"))
        ->type_name("N");
    app.add_option("--steps", raw.train_steps, "outer steps: train.steps")->type_name("N");
    app.add_option("--batch", t.batch, "streams a step (4; backbones: 32)")
        ->check(unnamed(CLI::Range(1, 1000000)))
        ->type_name("N");
    app.add_option("--chunks", t.chunks, "adapters, gates: chunks of a stream at most (16)")
        ->check(natural("2"))
        ->type_name("N");
    app.add_flag("--new", t.create, "backbones: start from a new tokenizer and new weights");
    app.add_option("--vocab", t.vocabulary, "--new: ids of the tokenizer (8192)")
        ->check(unnamed(CLI::Range(257, 1 << 24)))
        ->type_name("N");
    app.add_flag("--resume", t.resume, "go on from the latest checkpoint in --out");
    app.add_option("--checkpoint-every", t.checkpoint_every, "steps between checkpoints (50)")
        ->check(natural())
        ->type_name("N");
    app.add_option("--keep", t.keep, "checkpoints that are kept (3)")
        ->check(natural())
        ->type_name("N");
    app.add_option("--log", t.log, "log file; default: log.jsonl in --out")->type_name("FILE");
    app.add_option("--cache", t.cache, "folder for tokenised data; default: ~/.cache/ponder")
        ->type_name("DIR");
    add_output(app, s);
    app.footer("\n" + std::string(train_examples) + "\n" + hyper + "\n" + exit_codes);
}

void add_calibrate(CLI::App &app, Settings &s, Raw &raw, const std::string &hyper) {
    app.add_option("--stream", s.streams, "package streams to fit to, .jsonl, also .xz or .gz")
        ->required()
        ->type_name("FILE...");
    app.add_option("--held", s.held, "package streams to report on; not fitted to")
        ->type_name("FILE...");
    app.add_option("--rate", raw.rate, "steps a chunk; default: the target stored")->type_name("X");
    app.add_option("--shares", s.shares, "of chunks with 0, 1, 2, 4 steps, instead")
        ->type_name("A,B,C,D");
    app.add_flag("--no-search", raw.no_search, "thresholds alone");
    app.add_option("--min-chunks", s.min_chunks, "packages with fewer are skipped (8)")
        ->type_name("N");
    app.add_option("--max-chunks", s.max_chunks, "read of a package at most (48)")
        ->check(unnamed(CLI::Range(uint64_t(1), uint64_t(1) << 40)))
        ->type_name("N");
    add_output(app, s);
    app.footer("\n" + std::string(calibrate_examples) + "\n" + hyper + "\n" + exit_codes);
}

struct Subcommands {
    CLI::App *run, *generate, *eval, *train, *calibrate, *report, *adapter, *convert, *info,
        *backends, *bench;
};

void add_generate(CLI::App &app, Settings &s, const std::string &hyper) {
    GenerateSettings &g = s.generate;
    app.add_option("--read", g.read, "files, directories or - to learn from first")
        ->type_name("PATH...");
    app.add_option("--prompt", g.prompt, "what the text begins with; - reads it from stdin")
        ->type_name("TEXT");
    app.add_option("--max-tokens", g.max_tokens, "at most so many (128)")
        ->check(unnamed(CLI::Range(uint64_t(1), uint64_t(1) << 40)))
        ->type_name("N");
    app.add_flag("--compare", g.compare, "also without what was read, side by side");
    app.add_option("--stop", g.stop, "end before this text; may be repeated")
        ->type_name("TEXT")
        ->expected(1)
        ->take_all();
    const char *const group = "Sampling";
    const auto number = [&](const char *name, double &value, double most, const char *help) {
        app.add_option(name, value, help)
            ->group(group)
            ->check(unnamed(CLI::Range(0.0, most)))
            ->type_name("X");
    };
    number("--temperature", g.temperature, 100, "0 takes the most probable token each time (0)");
    app.add_option("--top-k", g.top_k, "draw from the K most probable tokens; 0 = off")
        ->group(group)
        ->type_name("K");
    number("--top-p", g.top_p, 1, "from the fewest that reach this probability; 0 = off");
    number("--min-p", g.min_p, 1, "from those with this share of the largest; 0 = off");
    number("--repeat-penalty", g.repetition, 100, "on tokens that are in the text; 0 = off");
    add_output(app, s);
    app.footer("\n" + std::string(generate_examples) + "\n" + hyper + "\n" + exit_codes);
}

Subcommands add_subcommands(CLI::App &app, Settings &s, Raw &raw, const std::string &hyper) {
    CLI::App *run = app.add_subcommand("run", "stream text, adapt to it, show what was gained");
    run->add_option("PATH", s.paths, "files, directories, - for stdin; default: this directory")
        ->type_name("");
    add_output(*run, s);
    run->add_option("--html", s.html, "write a self-contained page to this file")
        ->type_name("FILE");
    run->add_flag("--list", s.list, "print the files that would be read, and stop");
    run->add_flag("--no-baseline", raw.no_baseline, "leave the frozen SKIP pass out");
    run->footer("\n" + std::string(run_examples) + "\n" + hyper + "\n" + exit_codes);

    CLI::App *generate = app.add_subcommand("generate", "continue a text, after reading others");
    add_generate(*generate, s, hyper);

    CLI::App *eval = app.add_subcommand("eval", "measure a method on package streams");
    eval->add_option("--stream", s.stream, "package stream, .jsonl or .jsonl.xz")
        ->required()
        ->type_name("FILE");
    add_output(*eval, s);
    eval->add_option("--min-chunks", s.min_chunks, "packages with fewer are skipped (8)")
        ->type_name("N");
    eval->add_option("--max-chunks", s.max_chunks, "read of a package at most (48)")
        ->check(unnamed(CLI::Range(uint64_t(1), uint64_t(1) << 40)))
        ->type_name("N");
    eval->footer("\n" + std::string(eval_examples) + "\n" + hyper + "\n" + exit_codes);

    CLI::App *train = app.add_subcommand("train", "train an adapter, a gate or a backbone");
    add_train(*train, s, raw, hyper);

    CLI::App *calibrate = app.add_subcommand("calibrate", "fit an adapter's gate to a cost");
    add_calibrate(*calibrate, s, raw, hyper);

    CLI::App *report = app.add_subcommand("report", "draw the logs of training runs");
    report->add_option("LOG", s.logs, "logs of ponder train")->required()->type_name("");
    report->add_option("--out", s.html, "the page to write")->required()->type_name("FILE");
    report->add_flag("-q,--quiet", s.quiet, "no notes");

    CLI::App *adapter = app.add_subcommand("adapter", "to and from PEFT; merged into a model");
    adapter->add_option("ACTION", raw.kind, "export-peft, import-peft or merge")
        ->required()
        ->check(unnamed(CLI::IsMember({"export-peft", "import-peft", "merge"})))
        ->type_name("");
    adapter->add_option("FROM-TO", s.paths, "the folder to read, the folder to write")
        ->required()
        ->expected(2)
        ->type_name("");
    adapter->add_flag("-q,--quiet", s.quiet, "no notes");
    adapter->footer("\n" + std::string(adapter_examples) + "\n" + exit_codes);

    CLI::App *convert = app.add_subcommand("convert", "copy a model with int8 weights");
    convert->add_option("FROM-TO", s.paths, "the model's folder, the folder to write")
        ->required()
        ->expected(2)
        ->type_name("");
    convert->add_option("--weights", s.weights, "of the copy: int8")
        ->required()
        ->check(unnamed(CLI::IsMember({"int8"})))
        ->type_name("KIND");
    add_output(*convert, s);
    convert->footer("\n" + std::string(convert_examples) + "\n" + exit_codes);

    CLI::App *info = app.add_subcommand("info", "model, adapter and memory plan");
    add_output(*info, s);
    info->add_flag("--plan-only", raw.no_load, "load nothing: the plan from the files' headers");
    info->footer("\n" + hyper + "\n" + exit_codes);

    CLI::App *backends = app.add_subcommand("backends", "what can run a model, and why not");
    add_output(*backends, s);

    CLI::App *bench = app.add_subcommand("bench", "speed of SKIP and of one update, by op");
    add_output(*bench, s);
    bench->add_option("--chunks", s.bench_chunks, "chunks in each repeat (4)")
        ->check(unnamed(CLI::Range(1, 100000)))
        ->type_name("N");
    bench->add_option("--repeats", s.bench_repeats, "SKIP and update, by turns; medians (5)")
        ->check(unnamed(CLI::Range(1, 1000)))
        ->type_name("N");
    bench->footer("\n" + hyper + "\n" + exit_codes);
    return {run, generate, eval, train, calibrate, report, adapter, convert, info, backends, bench};
}

// The list of subcommands has one line each; their own help says more.
void print_help(CLI::App &app, const Subcommands &all) {
    const std::vector<CLI::App *> chosen = app.get_subcommands();
    for (const auto &[command, text] :
         {std::pair(all.run, run_help), std::pair(all.generate, generate_help),
          std::pair(all.eval, eval_help), std::pair(all.train, train_help),
          std::pair(all.calibrate, calibrate_help), std::pair(all.report, report_help),
          std::pair(all.adapter, adapter_help), std::pair(all.convert, convert_help)})
        if (!chosen.empty() && chosen.front() == command)
            command->description(std::string(text) + "\n");
    std::fputs(app.help().c_str(), stdout);
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
    app.get_formatter()->column_width(help_column);
    const auto all = add_subcommands(app, s, raw, option_help(table));
    for (CLI::App *sub : {all.run, all.generate, all.eval, all.train, all.calibrate, all.adapter,
                          all.convert, all.info, all.backends, all.bench}) {
        if (sub != all.backends && sub != all.convert)
            add_model(*sub, s);
        add_machine(*sub, s, raw);
        if (sub != all.backends && sub != all.adapter && sub != all.convert)
            add_hyperparameters(*sub, raw, table);
    }

    if (argc > 1 && argv[1][0] != '-' && argv[1][0] != '\0' &&
        app.get_subcommands([&](CLI::App *sub) { return sub->get_name() == argv[1]; }).empty())
        throw Failure(exit_usage,
                      "'" + std::string(argv[1]) + "' is no command; there are " +
                          "run, generate, eval, train, calibrate, report, "
                          "adapter, convert, info, backends, bench (see ponder --help)");
    const std::map<const CLI::App *, Command> commands{{all.run, Command::run},
                                                       {all.generate, Command::generate},
                                                       {all.eval, Command::eval},
                                                       {all.train, Command::train},
                                                       {all.calibrate, Command::calibrate},
                                                       {all.report, Command::report},
                                                       {all.adapter, Command::adapter},
                                                       {all.convert, Command::convert},
                                                       {all.info, Command::info},
                                                       {all.backends, Command::backends},
                                                       {all.bench, Command::bench}};
    try {
        app.parse(argc, argv);
        const CLI::App *chosen = app.get_subcommands().front();
        s.command = commands.at(chosen);
        if (s.command != Command::backends && s.command != Command::report &&
            s.command != Command::adapter && s.command != Command::convert)
            take_hyperparameters(s, raw, *chosen);
    } catch (const CLI::CallForHelp &) {
        print_help(app, all);
        return std::nullopt;
    } catch (const CLI::CallForVersion &version) {
        std::printf("%s\n", version.what());
        return std::nullopt;
    } catch (const CLI::ParseError &error) {
        throw Failure(exit_usage, std::string(error.what()) + " (see ponder --help)");
    }
    s.train.kind = raw.kind == "gate"       ? TrainKind::gate
                   : raw.kind == "backbone" ? TrainKind::backbone
                                            : TrainKind::adapter;
    s.adapter_action = raw.kind == "export-peft"   ? AdapterAction::export_peft
                       : raw.kind == "import-peft" ? AdapterAction::import_peft
                                                   : AdapterAction::merge;
    s.baseline = !raw.no_baseline;
    s.load = !raw.no_load;
    s.search = !raw.no_search;
    if (!raw.memory_limit.empty())
        s.memory_limit = parse_size(raw.memory_limit);
    return s;
}

} // namespace tool
