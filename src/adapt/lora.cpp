#include "adapt/lora.hpp"

#include "base/error.hpp"
#include "base/options.hpp"
#include "tensor/ops.hpp"

#include <charconv>
#include <cmath>
#include <set>

namespace ponder {

namespace {

std::vector<std::string> split(const std::string &text, char separator) {
    std::vector<std::string> parts(1);
    for (char c : text)
        if (c == separator)
            parts.emplace_back();
        else
            parts.back() += c;
    return parts;
}

int64_t parse_layer(const std::string &option, const std::string &text, int64_t minimum,
                    int64_t maximum) {
    int64_t n = -1;
    const char *end = text.data() + text.size();
    const auto [stop, problem] = std::from_chars(text.data(), end, n);
    if (problem != std::errc() || stop != end || n < minimum || n > maximum)
        throw_error(PONDER_E_ARGUMENT, "option 'lora.layers': '%.40s': '%.20s' is not in %d..%d",
                    option.c_str(), text.c_str(), int(minimum), int(maximum));
    return n;
}

std::set<int64_t> parse_layers(const std::string &option, int64_t layers) {
    const auto last = [&](int64_t n) {
        std::set<int64_t> chosen;
        for (int64_t i = layers - n; i < layers; ++i)
            chosen.insert(i);
        return chosen;
    };
    if (option == "all")
        return last(layers);
    if (option == "half")
        return last((layers + 1) / 2);
    if (option.starts_with("last:"))
        return last(parse_layer(option, option.substr(5), 1, layers));
    std::set<int64_t> chosen;
    for (const std::string &part : split(option, ','))
        chosen.insert(parse_layer(option, part, 0, layers - 1));
    return chosen;
}

std::set<Module> parse_modules(const std::string &option) {
    std::set<Module> chosen;
    for (const std::string &part : split(option, ',')) {
        bool known = false;
        for (int m = 0; m < modules_per_layer; ++m)
            if (option == "all" || part == module_name(Module(m))) {
                chosen.insert(Module(m));
                known = true;
            }
        if (!known)
            throw_error(PONDER_E_ARGUMENT,
                        "option 'lora.modules': '%.40s' is none of attn.c_attn, attn.c_proj, "
                        "mlp.c_fc, mlp.c_proj",
                        part.c_str());
    }
    return chosen;
}

} // namespace

Lora::Lora(const Gpt2Config &config, const Options &options) {
    const int64_t rank = options.integer("lora.rank");
    const std::set<int64_t> layers = parse_layers(options.text("lora.layers"), config.layers);
    const std::set<Module> modules = parse_modules(options.text("lora.modules"));
    lowest_ = *layers.begin();
    size_t group = 0;
    for (int64_t layer : layers) {
        for (Module module : modules) {
            const LinearPlace place = linear_place(config, layer, module);
            const std::string name = "h." + std::to_string(layer) + "." + module_name(module);
            first_[{layer, module}] = add_fast(name + ".lora_a", {1, place.in, rank}, group);
            add_fast(name + ".lora_b", {1, rank, place.out}, group);
        }
        ++group;
    }
}

void Lora::draw_initial(std::span<float> fast, Random &random) const {
    std::fill(fast.begin(), fast.end(), 0.0f);
    for (const auto &[place, index] : first_) {
        const FastTensor &a = fast_tensors()[index];
        const double deviation = 1 / std::sqrt(double(a.shape[1]));
        for (size_t i = 0; i < a.count(); ++i)
            fast[a.offset + i] = float(deviation * random.normal());
    }
}

Id Lora::linear(Graph &graph, const LinearArguments &p) const {
    const auto at = first_.find({p.place.layer, p.place.module});
    if (at == first_.end())
        return Adapter::linear(graph, p);
    return lora_linear(graph, p.x, p.w, p.b, fast_id(at->second), fast_id(at->second + 1),
                       p.residual, 1.0, p.out);
}

} // namespace ponder
