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

    // Products of the same rows.
    void products() {
        for (size_t i = 0; i < calls().size(); ++i) {
            const Call first = calls()[i];
            if (!is(first, "linear") && !is(first, "linear_gelu"))
                continue;
            Call all{&linear_group_rule, {first.in[0]}, {}, {}};
            std::vector<size_t> old;
            size_t members = 0;
            for (const size_t j : readers_of(first.in[0])) {
                const Call call = calls()[j];
                const bool plain = is(call, "linear") && call.in.size() == 4 && call.in[3] == none,
                           gelu = is(call, "linear_gelu") && call.out[1] == none;
                if ((!plain && !gelu) || call.in[0] != first.in[0] || call.attr[0] != 0 ||
                    segment(j) != segment(i) || temporary(call.in[1]) ||
                    (call.in[2] != none && temporary(call.in[2])))
                    continue;
                const size_t sigmoid = plain ? only_reader(call.out[0], "sigmoid") : 0,
                             after = plain ? only_reader(call.out[0], "gelu") : 0,
                             behind = std::max(sigmoid, after);
                all.in.insert(all.in.end(), {call.in[1], call.in[2]});
                all.out.push_back(behind ? calls()[behind].out[0] : call.out[0]);
                all.attr.push_back(gelu || after ? 1 : sigmoid ? 2 : 0);
                old.push_back(j);
                if (behind)
                    old.push_back(behind);
                ++members;
            }
            std::sort(old.begin(), old.end());
            if (members > 1 && old[0] == i && has_(all))
                join(old, i, all);
        }
    }

    // A low-rank product and gelu, and on the way back.
    void lora_and_gelu() {
        for (size_t i = 0; i < calls().size(); ++i) {
            const Call first = calls()[i];
            if (is(first, "lora_linear") && first.in.size() == 6 && first.in[5] == none &&
                temporary(first.out[0])) {
                const Id z = first.out[0];
                const std::vector<size_t> readers = readers_of(z);
                const auto gelu = std::find_if(readers.begin(), readers.end(),
                                               [&](size_t j) { return is(calls()[j], "gelu"); });
                if (gelu == readers.end() || segment(*gelu) != segment(i))
                    continue;
                const Call fused{
                    &lora_linear_gelu_rule,
                    first.in,
                    {calls()[*gelu].out[0], first.out[1], readers.size() > 1 ? z : none},
                    first.attr};
                if (has_(fused))
                    join({i, *gelu}, i, fused);
            } else if (is(first, "lora_linear_vjp") && first.in.size() == 4) {
                const size_t gelu = only_reader(first.out[0], "gelu_vjp");
                if (!gelu || calls()[gelu].in[0] != first.out[0] || segment(gelu) != segment(i))
                    continue;
                std::vector<Id> in = first.in;
                in.push_back(calls()[gelu].in[1]);
                const Call fused{&lora_linear_vjp_gelu_rule,
                                 in,
                                 {calls()[gelu].out[0], first.out[1]},
                                 first.attr};
                if (has_(fused))
                    join({i, gelu}, i, fused);
            }
        }
    }

    // Below the lowest adapted product nobody wants the gradient of its rows.
    void unread() {
        for (size_t i = 0; i < calls().size(); ++i) {
            const Call &call = calls()[i];
            if (!is(call, "lora_linear_vjp") || !temporary(call.out[0]) ||
                !readers_of(call.out[0]).empty())
                continue;
            const Call narrow{&lora_linear_vjp_narrow_rule,
                              {call.in[0], call.in[3]},
                              {call.out[1]},
                              {call.attr[0], double(graph_.shape(call.out[0])[2])}};
            if (has_(narrow))
                join({i}, i, narrow);
        }
    }

    // Normalized rows that are nothing but multiplied with a gate.
    void gates() {
        for (size_t i = 0; i < calls().size(); ++i) {
            const Call norm = calls()[i];
            const size_t mul = is(norm, "layer_norm") ? only_reader(norm.out[0], "mul") : 0;
            if (!mul || calls()[mul].in[1] != norm.out[0] || segment(mul) != segment(i) ||
                !(graph_.shape(calls()[mul].in[0]) == graph_.shape(norm.out[0])))
                continue;
            const Call fused{&layer_norm_gated_rule,
                             {norm.in[0], norm.in[1], norm.in[2], calls()[mul].in[0]},
                             {calls()[mul].out[0], norm.out[1]},
                             norm.attr};
            if (has_(fused))
                join({i, mul}, mul, fused);
        }
    }

    // Low-rank products and the gradients of their factors take gradients of the residual stream
    // narrowed: once, where they are made.
    void copies() {
        for (size_t i = 0; i < calls().size(); ++i) {
            Call made = calls()[i];
            if (!is(made, "layer_norm_vjp") || graph_.value(made.out[0]).type == graph_.act)
                continue;
            std::vector<size_t> readers = readers_of(made.out[0]);
            const auto narrows = [&](size_t j) {
                return is(calls()[j], "lora_linear_vjp") || is(calls()[j], "lora_linear_vjp_gelu");
            };
            std::erase_if(readers, [&](size_t j) {
                return !(narrows(j) || is(calls()[j], "matmul_tn")) || segment(j) != segment(i);
            });
            if (std::none_of(readers.begin(), readers.end(), narrows))
                continue;
            made.rule = &layer_norm_vjp_copy_rule;
            made.out.push_back(graph_.temporary(graph_.act, graph_.shape(made.out[0])));
            if (!has_(made))
                continue;
            join({i}, i, made);
            for (size_t j : readers) {
                Call call = calls()[j];
                std::replace(call.in.begin(), call.in.end(), made.out[0], made.out[1]);
                join({j}, j, call);
            }
        }
    }

    // Two filters of the same rows, turned and narrowed: one call for six.
    void filters() {
        struct Branch {
            std::vector<size_t> calls;
            Id w, b, y;
        };
        for (size_t i = 0; i < calls().size(); ++i) {
            const Call first = calls()[i];
            if (!is(first, "conv1d"))
                continue;
            std::vector<Branch> branches;
            Call all{&conv1d_rope_rule, {}, {}, {}};
            for (const size_t j : readers_of(first.in[0])) {
                const Call conv = calls()[j];
                if (!is(conv, "conv1d") || conv.in[0] != first.in[0] || conv.attr != first.attr ||
                    before(conv) != before(first) || segment(j) != segment(i) ||
                    temporary(conv.in[1]) || temporary(conv.in[2]))
                    continue;
                Branch branch{{j}, conv.in[1], conv.in[2], conv.out[0]};
                const size_t rope = only_reader(branch.y, "rope");
                if (!rope || calls()[rope].attr[3] != 0)
                    continue;
                branch.calls.push_back(rope);
                branch.y = calls()[rope].out[0];
                if (const size_t narrow = only_reader(branch.y, "affine");
                    narrow && calls()[narrow].attr == std::vector<double>{1, 0}) {
                    branch.calls.push_back(narrow);
                    branch.y = calls()[narrow].out[0];
                }
                std::vector<double> attr = {conv.attr[0]};
                attr.insert(attr.end(), calls()[rope].attr.begin(), calls()[rope].attr.begin() + 3);
                if (branches.empty())
                    all.attr = attr;
                if (branches.size() < 2 && attr == all.attr)
                    branches.push_back(branch);
            }
            if (branches.empty() || branches[0].calls[0] != i)
                continue;
            all.in = {first.in[0], before(first)};
            std::vector<size_t> old;
            for (const Branch &branch : branches) {
                all.in.insert(all.in.end(), {branch.w, branch.b});
                all.out.push_back(branch.y);
                old.insert(old.end(), branch.calls.begin(), branch.calls.end());
            }
            std::sort(old.begin(), old.end());
            if (has_(all))
                join(old, i, all);
        }
    }

    // Probabilities that only the backward pass reads are kept as what its products want of them.
    void losses() {
        constexpr int64_t round = 64; // words
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
            const Id share = graph_.temporary(graph_.wide, rows);
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
    // The one call that reads a value, if it is of that name; else 0.
    size_t only_reader(Id id, const char *name) const {
        const std::vector<size_t> readers = readers_of(id);
        return temporary(id) && readers.size() == 1 && is(calls()[readers[0]], name) ? readers[0]
                                                                                     : 0;
    }
    // Rows before the first of a conv1d.
    static Id before(const Call &conv) { return conv.in.size() > 3 ? conv.in[3] : none; }
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
    fuser.products();
    fuser.filters();
    fuser.lora_and_gelu();
    fuser.copies();
    fuser.gates();
    fuser.unread();
    fuser.losses();
    fuser.factors();
}

} // namespace ponder
