// `ponder calibrate`: fits the gate in an adapter's folder to a cost, on unlabeled streams.
#include "commands.hpp"
#include "common.hpp"
#include "json_out.hpp"
#include "packages.hpp"
#include "setup.hpp"
#include "table.hpp"
#include "terminal.hpp"
#include "text.hpp"

#include <cstdio>

namespace tool {

namespace {

struct Streams {
    std::vector<std::vector<int32_t>> ids;
    std::vector<ponder_stream> list() const {
        std::vector<ponder_stream> views;
        for (const auto &one : ids)
            views.push_back({one.data(), one.size()});
        return views;
    }
};

Streams read_streams(const std::vector<std::string> &files, const ponder_model *model,
                     const Settings &settings, uint64_t chunk) {
    Streams streams;
    for (const std::string &file : files) {
        Packages packages(file, model, settings.max_chunks * chunk);
        std::string name;
        std::vector<int32_t> ids;
        while (!interrupted() && packages.next(name, ids)) {
            const uint64_t chunks = std::min<uint64_t>(ids.size() / chunk, settings.max_chunks);
            if (chunks < std::max<uint64_t>(settings.min_chunks, 1))
                continue;
            ids.resize(chunks * chunk);
            streams.ids.push_back(ids);
        }
    }
    return streams;
}

// "0.6,0.3,0.1,0"
std::vector<double> parse_shares(const std::string &text) {
    std::vector<double> shares;
    for (size_t at = 0; at <= text.size();) {
        const size_t comma = std::min(text.find(',', at), text.size());
        try {
            shares.push_back(std::stod(text.substr(at, comma - at)));
        } catch (const std::exception &) {
            shares.clear();
            break;
        }
        at = comma + 1;
    }
    if (shares.size() != 4)
        throw Failure(exit_usage, "--shares: '" + text +
                                      "' is not four numbers such as "
                                      "0.6,0.3,0.1,0");
    return shares;
}

std::string shares_text(const double *share) {
    return format("%.0f, %.0f, %.0f, %.0f %%", 100 * share[0], 100 * share[1], 100 * share[2],
                  100 * share[3]);
}

void print_json(const ponder_calibration &r, const std::string &adapter) {
    JsonWriter json;
    json.object().member("schema_version", 1).member("command", "calibrate");
    json.member("adapter", adapter).member("target", r.target).member("rounds", r.rounds);
    json.member("loss", r.loss).member("rate", r.rate).member("rate_farthest", r.rate_farthest);
    json.key("shares").array(true);
    for (double share : r.share)
        json.value(share);
    json.end().member("held_loss", r.held_loss).member("held_rate", r.held_rate);
    json.member("held_rate_farthest", r.held_farthest).member("front", r.front);
    json.member("front_slope", r.front_slope)
        .member("scale", r.scale)
        .member("scale_last", r.scale_last);
    json.member("reference", r.reference).end().print();
}

void print_table(const ponder_calibration &r) {
    Table table("lrr");
    table.row({"", "fitted on", "held out"});
    const bool held = r.held_rate == r.held_rate;
    const auto number = [&](double x) { return x == x ? format("%.4f", x) : std::string("-"); };
    table.row({"loss (nats/token)", number(r.loss), number(r.held_loss)});
    table.row({"cost (steps a chunk)", number(r.rate), number(r.held_rate)});
    table.row({"of the stream farthest off", number(r.rate_farthest), number(r.held_farthest)});
    table.row({"chunks with 0, 1, 2, 4 steps", shares_text(r.share),
               held ? shares_text(r.held_share) : "-"});
    std::printf("target %.3f steps a chunk\n\n%s\n", r.target, table.text().c_str());
    std::printf("declared streams: %.2f + %.2f x (mean loss - %.2f) of their steps come first,\n"
                "updates times %.2f at first, %.2f at last\n",
                r.front, r.front_slope, r.reference, r.scale, r.scale_last);
}

} // namespace

int calibrate_command(const Settings &settings) {
    const Runtime runtime = open_runtime(settings);
    const Options options = make_options(settings);
    const std::string adapter = value_of(options.get(), "adapter");
    const Model model = load_model(runtime.get(), model_folder(settings), settings);
    const uint64_t chunk = number_of(options.get(), "chunk");
    const Streams fitted = read_streams(settings.streams, model.get(), settings, chunk);
    const Streams held = read_streams(settings.held, model.get(), settings, chunk);
    if (interrupted())
        return exit_interrupted;
    if (fitted.ids.empty())
        throw Failure(exit_file, "no package of the streams has " +
                                     std::to_string(settings.min_chunks) + " chunks");
    std::vector<double> shares;
    if (!settings.shares.empty())
        shares = parse_shares(settings.shares);
    const auto list = fitted.list(), other = held.list();
    Progress progress(settings.quiet);
    auto limits = sized<ponder_call>();
    limits.user_data = &progress;
    limits.progress = [](void *data, uint64_t done, uint64_t total) -> int32_t {
        Progress &shown = *static_cast<Progress *>(data);
        if (shown.due())
            shown.show(format("%s %llu of %llu streams",
                              progress_bar(double(done) / double(total), 16).c_str(),
                              (unsigned long long)done, (unsigned long long)total));
        return interrupted();
    };
    auto report = sized<ponder_calibration>();
    call(ponder_calibrate, static_cast<const ponder_model *>(model.get()),
         static_cast<const ponder_options *>(options.get()), list.data(), uint32_t(list.size()),
         other.data(), uint32_t(other.size()),
         static_cast<const double *>(shares.empty() ? nullptr : shares.data()),
         int32_t(settings.search), &report, static_cast<const ponder_call *>(&limits));
    if (settings.json)
        print_json(report, adapter);
    else
        print_table(report);
    return exit_ok;
}

} // namespace tool
