#include "adapt/stored_gate.hpp"

#include "base/error.hpp"

#include <algorithm>
#include <cmath>
#include <deque>

namespace ponder {

namespace {

using json::Type;
using json::Value;

constexpr size_t most_points = 256;
constexpr double most_score = 1e12;

Value value_of(double number) {
    Value v;
    v.type = Type::number;
    v.number = number;
    return v;
}

Value value_of(const char *string) {
    Value v;
    v.type = Type::string;
    v.string = string;
    return v;
}

Value value_of(int64_t integer) {
    Value v;
    v.type = Type::integer;
    v.integer = integer;
    v.number = double(integer);
    return v;
}

Value value_of(std::span<const double> numbers) {
    Value v;
    v.type = Type::array;
    for (double number : numbers)
        v.items.push_back(value_of(number));
    return v;
}

// Reads an object's fields, naming what is wrong.
class Fields {
public:
    Fields(const Value &object, const char *name, const std::string &file)
        : object_(object), name_(name), file_(file) {
        if (object.type != Type::object)
            throw_error(PONDER_E_FORMAT, "%s: '%s' is no object", file.c_str(), name);
        if (number("version", 0, 1e9) != 1)
            throw_error(PONDER_E_UNSUPPORTED, "%s: '%s': 'version' is not 1", file.c_str(), name);
    }
    double number(const char *key, double least, double most) const {
        return checked(field(key), key, least, most);
    }
    size_t whole(const char *key, double least, double most) const {
        const double value = number(key, least, most);
        if (value != std::floor(value))
            bad(key, "no whole number");
        return size_t(value);
    }
    std::vector<double> list(const char *key, double least, double most, size_t longest) const {
        const Value &array = field(key);
        if (array.type != Type::array || array.items.size() > longest)
            bad(key, "no list of the right length");
        std::vector<double> values;
        for (const Value &item : array.items)
            values.push_back(checked(item, key, least, most));
        return values;
    }
    size_t choice(const char *key, std::initializer_list<const char *> names) const {
        const Value &value = field(key);
        const auto at = std::find(names.begin(), names.end(), value.string);
        if (value.type != Type::string || at == names.end())
            bad(key, "none of the known values");
        return size_t(at - names.begin());
    }
    [[noreturn]] void bad(const char *key, const char *problem) const {
        throw_error(PONDER_E_FORMAT, "%s: '%s': '%s' is missing or %s", file_.c_str(), name_, key,
                    problem);
    }

private:
    const Value &field(const char *key) const {
        const Value *value = object_.find(key);
        if (!value)
            bad(key, "not there");
        return *value;
    }
    double checked(const Value &value, const char *key, double least, double most) const {
        if ((value.type != Type::number && value.type != Type::integer) ||
            !(value.number >= least && value.number <= most))
            bad(key, "out of range");
        return value.number;
    }

    const Value &object_;
    const char *name_;
    const std::string &file_;
};

constexpr const char *forms[] = {"binary", "soft", "steps"};
constexpr const char *feature_sets[] = {"ponder", "planned"};

Calibration read_calibration(const Value &object, const std::string &file) {
    const Fields fields(object, "calibration", file);
    Calibration c;
    c.target = fields.number("target", 0.001, 64);
    c.front = fields.number("front", 0, 1);
    c.front_slope = fields.number("front_slope", -100, 100);
    c.scale = fields.number("scale", 0.01, 100);
    c.scale_last = fields.number("scale_last", 0.01, 100);
    c.reference = fields.number("reference", -1e6, 1e6);
    const std::vector<double> offset =
        fields.list("offset", -most_score, most_score, gate_step_count);
    const std::vector<double> rates = fields.list("rates", 0, 64, most_points);
    const std::vector<double> thresholds =
        fields.list("thresholds", -most_score, most_score, most_points);
    if (offset.size() != gate_step_count)
        fields.bad("offset", "no list of the right length");
    if (rates.empty() || thresholds.size() != rates.size())
        fields.bad("thresholds", "not as long as 'rates'");
    std::copy(offset.begin(), offset.end(), c.offset);
    for (size_t i = 0; i < rates.size(); ++i) {
        if (i > 0 && (rates[i] <= rates[i - 1] || thresholds[i] > thresholds[i - 1]))
            fields.bad("thresholds", "not falling as 'rates' rise");
        c.points.push_back({rates[i], thresholds[i]});
    }
    return c;
}

Value describe(const Calibration &c) {
    std::vector<double> rates, thresholds;
    for (const Calibration::Point &p : c.points) {
        rates.push_back(p.rate);
        thresholds.push_back(p.threshold);
    }
    Value v;
    v.type = Type::object;
    v.members = {{"version", value_of(int64_t(1))},    {"target", value_of(c.target)},
                 {"front", value_of(c.front)},         {"front_slope", value_of(c.front_slope)},
                 {"scale", value_of(c.scale)},         {"scale_last", value_of(c.scale_last)},
                 {"reference", value_of(c.reference)}, {"offset", value_of(c.offset)},
                 {"rates", value_of(rates)},           {"thresholds", value_of(thresholds)}};
    return v;
}

Value describe(const Gate &gate) {
    Value v;
    v.type = Type::object;
    v.members = {{"version", value_of(int64_t(1))},
                 {"form", value_of(forms[size_t(gate.form)])},
                 {"features", value_of(feature_sets[size_t(gate.features)])},
                 {"hidden", value_of(int64_t(gate.net.hidden()))},
                 {"value_unit", value_of(gate.value_unit)},
                 {"rule", value_of(gate.rule)}};
    return v;
}

void put(Value &object, const char *key, Value value) {
    for (auto &[name, member] : object.members)
        if (name == key) {
            member = std::move(value);
            return;
        }
    object.members.emplace_back(key, std::move(value));
}

void write_description(const std::string &folder, const Value &root) {
    const std::string text = json::text(root) + "\n";
    replace_file(folder + "/ponder.json",
                 [&](const Sink &sink) { sink(text.data(), text.size()); });
}

Value description(const std::string &folder) {
    const std::string file = folder + "/ponder.json";
    Value root = json::parse(read_file(file, 1 << 20), file);
    if (root.type != Type::object)
        throw_error(PONDER_E_FORMAT, "%s: no ponder adapter", file.c_str());
    return root;
}

DType stored_type(const std::string &name) {
    return name == "F32"    ? DType::f32
           : name == "F64"  ? DType::f64
           : name == "BF16" ? DType::bf16
           : name == "I32"  ? DType::i32
                            : DType::none;
}

} // namespace

std::shared_ptr<const Gate> read_gate(const Value &root, const std::string &file,
                                      const SafeTensors &tensors) {
    const Value *object = root.find("gate");
    if (!object)
        return nullptr;
    const Fields fields(*object, "gate", file);
    auto gate = std::make_shared<Gate>();
    gate->form = GateForm(fields.choice("form", {forms[0], forms[1], forms[2]}));
    gate->features = FeatureSet(fields.choice("features", {feature_sets[0], feature_sets[1]}));
    gate->value_unit = fields.number("value_unit", 1e-12, 1e12);
    gate->rule = fields.number("rule", -1e6, 1e6);
    const size_t inputs = feature_count(gate->features);
    gate->net = GateNet(inputs, fields.whole("hidden", 1, 4096), gate_outputs(gate->form));
    const auto read = [&](const std::string &name, std::vector<size_t> shape, double *to) {
        const std::vector<int64_t> dims(shape.begin(), shape.end());
        size_t count = 1;
        for (size_t dim : shape)
            count *= dim;
        std::vector<float> values(count);
        tensors.read("gate." + name, dims, DType::f32, values.data());
        std::copy(values.begin(), values.end(), to);
    };
    for (const GateNet::Part &part : gate->net.parts())
        read(part.name, part.shape, gate->net.parameters().data() + part.offset);
    gate->mean.resize(inputs);
    gate->deviation.resize(inputs);
    read("mean", {inputs}, gate->mean.data());
    read("deviation", {inputs}, gate->deviation.data());
    for (double p : gate->net.parameters())
        if (!(std::abs(p) <= 1e6))
            throw_error(PONDER_E_FORMAT, "%s: gate.*: %g is no weight", tensors.name().c_str(), p);
    for (double d : gate->deviation)
        if (!(d >= 1e-12))
            throw_error(PONDER_E_FORMAT, "%s: gate.deviation: %g is no deviation",
                        tensors.name().c_str(), d);
    const Value *calibration = root.find("calibration");
    if (!calibration)
        throw_error(PONDER_E_FORMAT, "%s: a gate without 'calibration'", file.c_str());
    gate->calibration = read_calibration(*calibration, file);
    gate->seal();
    return gate;
}

void save_gate(const std::string &from, const std::string &folder, const Gate &gate) {
    Value root = description(from);
    put(root, "gate", describe(gate));
    put(root, "calibration", describe(gate.calibration));
    Value options;
    options.type = Type::object;
    if (const Value *stored = root.find("options"))
        options = *stored;
    put(options, "policy", value_of("adapter"));
    put(root, "options", std::move(options));

    const SafeTensors tensors = SafeTensors::open(from + "/ponder.safetensors");
    SafeTensorsWriter writer;
    writer.metadata = tensors.metadata();
    std::deque<std::vector<std::byte>> kept;
    for (const auto &[name, info] : tensors.tensors()) {
        if (name.starts_with("gate."))
            continue;
        const DType type = stored_type(info.dtype);
        if (type == DType::none)
            throw_error(PONDER_E_UNSUPPORTED, "%s: tensor '%s' is %s", tensors.name().c_str(),
                        name.c_str(), info.dtype.c_str());
        writer.add(name, type, info.shape, kept.emplace_back(tensors.raw(name)).data());
    }
    std::deque<std::vector<float>> own;
    const auto add = [&](const std::string &name, const std::vector<size_t> &shape,
                         std::span<const double> values) {
        const auto &stored = own.emplace_back(values.begin(), values.end());
        writer.add("gate." + name, DType::f32, {shape.begin(), shape.end()}, stored.data());
    };
    for (const GateNet::Part &part : gate.net.parts())
        add(part.name, part.shape, gate.net.parameters().subspan(part.offset, part.count()));
    add("mean", {gate.mean.size()}, gate.mean);
    add("deviation", {gate.deviation.size()}, gate.deviation);
    replace_file(folder + "/ponder.safetensors", [&](const Sink &sink) { writer.write(sink); });
    write_description(folder, root);
}

void save_calibration(const std::string &folder, const Calibration &calibration) {
    Value root = description(folder);
    put(root, "calibration", describe(calibration));
    write_description(folder, root);
}

} // namespace ponder
