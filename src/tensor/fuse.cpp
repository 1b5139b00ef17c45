#include "tensor/fuse.hpp"

#include "tensor/ops.hpp"

#include <algorithm>
#include <string_view>

namespace ponder {

namespace {

class Fuser {
public:
    Fuser(Graph &graph, std::vector<size_t> &ends, const std::function<bool(const Call &)> &has)
        : graph_(graph), ends_(ends), has_(has) {}

    // One pass over memory less. What else reads the linear's result still gets it.
    void linear_and_gelu() {
        for (size_t i = 0; i < calls().size(); ++i) {
            const Call first = calls()[i];
            if (!is(first, "linear") || first.in.size() > 4 || first.in[3] != none ||
                !temporary(first.out[0]))
                continue;
            const Id z = first.out[0];
            const std::vector<size_t> readers = readers_of(z);
            const auto gelu = std::find_if(readers.begin(), readers.end(),
                                           [&](size_t j) { return is(calls()[j], "gelu"); });
            if (gelu == readers.end() || segment(*gelu) != segment(i))
                continue;
            const Call fused{&linear_gelu_rule,
                             {first.in[0], first.in[1], first.in[2]},
                             {calls()[*gelu].out[0], readers.size() > 1 ? z : none},
                             first.attr};
            if (has_(fused))
                join({i, *gelu}, i, fused);
        }
    }

    // Probabilities that only the backward pass reads stay in parts, and are made into the logits'
    // gradient once for both of its products.
    void losses() {
        constexpr int64_t part = 256, round = 64; // words
        for (size_t i = 0; i < calls().size(); ++i) {
            const Call first = calls()[i];
            if (!is(first, "cross_entropy") || first.in.size() > 3 || first.out[2] == none ||
                !temporary(first.out[2]))
                continue;
            const std::vector<size_t> readers = readers_of(first.out[2]);
            const auto reader = [&](const char *name) {
                const auto at = std::find_if(readers.begin(), readers.end(),
                                             [&](size_t j) { return is(calls()[j], name); });
                return at == readers.end() ? size_t(0) : *at;
            };
            const size_t vjp = reader("cross_entropy_vjp"),
                         table = reader("cross_entropy_vjp_table");
            if (!vjp || readers.size() != (table ? 2 : 1) ||
                (table && segment(table) != segment(vjp)))
                continue;
            const Shape rows = graph_.shape(first.in[2]);
            const int64_t words = graph_.shape(first.in[1])[0];
            const Id e = graph_.temporary(graph_.value(first.out[2]).type,
                                          {rows[0], rows[1], (words + round - 1) / round * round});
            const Id share =
                graph_.temporary(graph_.wide, {rows[0], rows[1], (words + part - 1) / part});
            const Call back = calls()[vjp];
            const Call parts{
                &cross_entropy_parts_rule, first.in, {first.out[0], first.out[1], e, share}, {}};
            const Call gradient{
                &cross_entropy_parts_vjp_rule,
                {e, share, back.in[1], back.in[2], back.in[3], table ? first.in[0] : none},
                {back.out[0], table ? calls()[table].out[0] : none},
                {}};
            if (!has_(parts) || !has_(gradient))
                continue;
            join({i}, i, parts);
            if (table)
                join({vjp, table}, std::min(vjp, table), gradient);
            else
                join({vjp}, vjp, gradient);
        }
    }

    // Gradients of low-rank factors: many small products at the end of a pass, as one call. Their
    // operands stay until then, so only where there are few tokens.
    void factors() {
        constexpr int64_t most_rows = 4096, rank = 64;
        for (size_t s = 0; s < ends_.size(); ++s) {
            std::vector<size_t> found;
            Call all{&matmul_tn_group_rule, {}, {}, {}};
            for (size_t i = s ? ends_[s - 1] : 0; i < ends_[s]; ++i) {
                const Call &call = calls()[i];
                if (!is(call, "matmul_tn") || temporary(call.out[0]) ||
                    !readers_of(call.out[0]).empty())
                    continue;
                const Shape &a = graph_.shape(call.in[0]), &c = graph_.shape(call.out[0]);
                const Call alone{&matmul_tn_group_rule, call.in, call.out, {}};
                if (a[0] * a[1] > most_rows || std::min(c[1], c[2]) > rank || !has_(alone))
                    continue;
                found.push_back(i);
                all.in.insert(all.in.end(), call.in.begin(), call.in.end());
                all.out.push_back(call.out[0]);
            }
            if (found.size() > 1 && has_(all))
                join(found, found.back(), all);
        }
    }

private:
    const std::vector<Call> &calls() const { return graph_.calls(); }
    static bool is(const Call &call, const char *name) {
        return std::string_view(call.rule->name) == name;
    }
    bool temporary(Id id) const { return graph_.value(id).kind == Kind::temporary; }
    // Each call once for every time it reads the value.
    std::vector<size_t> readers_of(Id id) const {
        std::vector<size_t> readers;
        for (size_t i = 0; i < calls().size(); ++i)
            readers.insert(readers.end(),
                           size_t(std::count(calls()[i].in.begin(), calls()[i].in.end(), id)), i);
        return readers;
    }
    size_t segment(size_t call) const {
        return size_t(std::upper_bound(ends_.begin(), ends_.end(), call) - ends_.begin());
    }
    void join(const std::vector<size_t> &old, size_t place, const Call &call) {
        for (size_t &end : ends_)
            end -= size_t(std::count_if(old.begin(), old.end(),
                                        [&](size_t i) { return i != place && i < end; }));
        graph_.replace(old, place, call);
    }

    Graph &graph_;
    std::vector<size_t> &ends_;
    const std::function<bool(const Call &)> &has_;
};

} // namespace

void fuse(Graph &graph, std::vector<size_t> &segment_ends,
          const std::function<bool(const Call &)> &has) {
    Fuser fuser(graph, segment_ends, has);
    fuser.linear_and_gelu();
    fuser.losses();
    fuser.factors();
}

} // namespace ponder
