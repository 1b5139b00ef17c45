// The descriptor of the reference backend: ops by name, calls checked against their signatures.
#include "backend/reference/reference.hpp"

#include "backend/reference/kernel.hpp"
#include "ponder/ponder.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string_view>
#include <utility>

namespace ponder {
namespace reference {
namespace {

const Op *const ops[] = {
    &embedding_op,
    &embedding_at_op,
    &layer_norm_op,
    &layer_norm_vjp_op,
    &linear_op,
    &lora_linear_op,
    &lora_linear_vjp_op,
    &gelu_op,
    &gelu_vjp_op,
    &sigmoid_op,
    &slice_rows_op,
    &slice_rows_vjp_op,
    &cross_entropy_op,
    &cross_entropy_vjp_op,
    &attention_op,
    &attention_vjp_op,
    &attention_cached_op,
    &keep_rows_op,
    &conv1d_op,
    &rope_op,
    &ttt_linear_op,
    &ttt_mlp_op,
    &mean_op,
    &mean_vjp_op,
    &fill_op,
    &matmul_tn_op,
    &norm_op,
    &adam_op,
    &sgd_op,
    &adam_vjp_op,
    &sgd_vjp_op,
    &adamw_op,
    &gate_op,
    &commit_op,
    &embedding_vjp_op,
    &layer_norm_vjp_weight_op,
    &matmul_tn_sum_op,
    &cross_entropy_vjp_table_op,
    &dropout_op,
    &conv1d_vjp_op,
    &ttt_linear_vjp_op,
    &ttt_mlp_vjp_op,
    &add_op,
    &sub_op,
    &mul_op,
    &broadcast_op,
    &affine_op,
    &power_op,
    &exp_op,
    &relu_op,
    &step_op,
    &gelu_derivative_op,
    &softmax_op,
    &log_sum_exp_op,
    &sum_last_op,
    &pick_op,
    &pick_vjp_op,
    &sum_to_op,
    &matmul_op,
    &reshape_op,
    &split_heads_op,
    &merge_heads_op,
};

const Op *find(std::string_view name) {
    for (const Op *op : ops)
        if (name == op->name)
            return op;
    return nullptr;
}

// Takes the text before `end`, and `end`, from the front of `text`.
std::string_view take(std::string_view &text, char end) {
    const size_t n = std::min(text.find(end), text.size());
    const std::string_view front = text.substr(0, n);
    text.remove_prefix(std::min(n + 1, text.size()));
    return front;
}

// One tensor of a signature.
struct Expected {
    std::string_view name, shape;
    bool optional = false, omissible = false;
    char kind = 0; // i, w, q, s or 0
};

Expected parse(std::string_view token) {
    Expected e;
    std::string_view head = take(token, '[');
    e.shape = token.substr(0, token.size() - 1);
    e.name = take(head, ':');
    if (!head.empty())
        e.kind = head[0];
    e.omissible = e.name.ends_with("??");
    while (e.name.ends_with('?')) {
        e.optional = true;
        e.name.remove_suffix(1);
    }
    return e;
}

bool dtype_fits(char kind, DType type) {
    switch (type) {
    case DType::i32:
        return kind == 'i';
    case DType::f32:
    case DType::f64:
        return kind != 'i';
    case DType::bf16:
        return kind == 0 || kind == 'q';
    case DType::i8:
        return kind == 'q';
    default:
        return false;
    }
}

// Binds the letters of one shape, or finds them bound to something else.
bool shape_fits(std::string_view shape, const ponder_tensor &t, Sizes &sizes) {
    if (t.rank < 0 || t.rank > PONDER_MAX_RANK)
        return false;
    for (int32_t i = 0; i < t.rank; ++i)
        if (t.dim[i] < 1)
            return false;
    const auto bind = [&](char letter, int64_t n) {
        if (sizes[letter] == 0)
            sizes[letter] = n;
        return sizes[letter] == n;
    };
    if (shape == "*")
        return true;
    if (shape == "...")
        return bind('.', count_of(t));
    int32_t axis = 0;
    while (!shape.empty()) {
        std::string_view term = take(shape, ',');
        int64_t factor = 1;
        if (term[0] >= '0' && term[0] <= '9') {
            factor = term[0] - '0';
            term.remove_prefix(1);
        }
        if (axis >= t.rank || t.dim[axis] % factor != 0)
            return false;
        if (!bind(term.empty() ? '1' : term[0], t.dim[axis] / factor))
            return false;
        ++axis;
    }
    return axis == t.rank;
}

// One scale for each column, or each row, of an int8 matrix.
bool scales_fit(const ponder_tensor &scales, const ponder_tensor &w) {
    return w.rank == 2 && scales.rank == 2 &&
           ((scales.dim[0] == 1 && scales.dim[1] == w.dim[1]) ||
            (scales.dim[1] == 1 && scales.dim[0] == w.dim[0]));
}

// nullptr with a message in why[size] when the call is not one of `op`.
bool check(const Op &op, const ponder_op_call &call, Sizes &sizes, char *why, size_t size) {
    std::string_view outputs = op.signature;
    std::string_view inputs = outputs.substr(0, outputs.find("->"));
    outputs.remove_prefix(inputs.size() + 3);
    sizes['1'] = 1; // a number alone in a shape

    const ponder_tensor *stored = nullptr, *scales = nullptr;
    uint32_t index = 0;
    for (auto [side, n] : {std::pair(inputs, call.n_in), std::pair(outputs, call.n_out)}) {
        const uint32_t first = index;
        while (!side.empty()) {
            const Expected e = parse(take(side, ' '));
            if (index - first >= n) {
                if (e.omissible)
                    continue;
                std::snprintf(why, size, "%s: %u tensors are too few for %s", op.name,
                              call.n_in + call.n_out, op.signature);
                return false;
            }
            const ponder_tensor &t = call.tensor[index];
            const bool absent = DType(t.dtype) == DType::none;
            if (absent ? !e.optional
                       : !dtype_fits(e.kind, DType(t.dtype)) || !shape_fits(e.shape, t, sizes)) {
                std::snprintf(why, size, "%s: tensor %u (%.*s) has the wrong type or shape for %s",
                              op.name, index, int(e.name.size()), e.name.data(), op.signature);
                return false;
            }
            if (DType(t.dtype) == DType::i8)
                stored = &t;
            if (e.kind == 's' && !absent)
                scales = &t;
            ++index;
        }
        if (index - first != n) {
            std::snprintf(why, size, "%s: %u tensors are too many for %s", op.name,
                          call.n_in + call.n_out, op.signature);
            return false;
        }
    }
    if (call.n_attr > op.n_attr || call.n_attr + op.n_attr_optional < op.n_attr) {
        std::snprintf(why, size, "%s: %u attributes instead of %u", op.name, call.n_attr,
                      op.n_attr);
        return false;
    }
    if (bool(stored) != bool(scales) || (stored && !scales_fit(*scales, *stored))) {
        std::snprintf(why, size, "%s: int8 weights and their scales do not go together for %s",
                      op.name, op.signature);
        return false;
    }
    double attr[max_attrs] = {};
    std::copy_n(call.attr, call.n_attr, attr);
    const char *rule = op.check ? op.check(sizes, attr) : nullptr;
    if (!rule && op.check_shapes)
        rule = op.check_shapes(call.tensor, attr);
    if (rule)
        std::snprintf(why, size, "%s: %s", op.name, rule);
    return !rule;
}

int32_t plan(ponder_device *, const ponder_op_call *call, ponder_plan *out, char *why,
             size_t size) {
    const Op *op = call->version == 1 ? find(call->op) : nullptr;
    if (!op)
        return PONDER_PLAN_NONE;
    Sizes sizes;
    if (!check(*op, *call, sizes, why, size))
        return PONDER_PLAN_FAILED;

    Planned *planned = new (std::nothrow) Planned{};
    if (!planned) {
        std::snprintf(why, size, "%s: out of memory", op->name);
        return PONDER_PLAN_FAILED;
    }
    planned->op = op;
    planned->n_in = call->n_in;
    planned->n_out = call->n_out;
    planned->sizes = sizes;
    std::copy_n(call->tensor, call->n_in + call->n_out, planned->tensor);
    std::copy_n(call->attr, call->n_attr, planned->attr);
    planned->f64 = std::any_of(planned->tensor, planned->tensor + call->n_in + call->n_out,
                               [](const ponder_tensor &t) { return DType(t.dtype) == DType::f64; });

    out->tasks = 1;
    out->tiling = PONDER_TILE_WHOLE;
    out->workspace = 0;
    out->kernel = planned;
    return PONDER_PLAN_OK;
}

template <class T>
void run_as(void (*kernel)(Args<T> &), const Planned &planned, void *const *buffers) {
    Args<T> args(planned, buffers);
    kernel(args);
    args.store();
}

void run(void *kernel, void *const *buffers, void *, uint32_t) {
    const Planned &planned = *static_cast<const Planned *>(kernel);
    if (planned.f64)
        run_as(planned.op->f64, planned, buffers);
    else
        run_as(planned.op->f32, planned, buffers);
}

int32_t supports(int32_t dtype) {
    return dtype == PONDER_DTYPE_F32 || dtype == PONDER_DTYPE_BF16 || dtype == PONDER_DTYPE_F64 ||
           dtype == PONDER_DTYPE_I8;
}

// The device has no state; it only needs an address.
char the_device;

ponder_device *open(const ponder_backend_host *, char *, size_t) {
    return reinterpret_cast<ponder_device *>(&the_device);
}

// With the host's memory: what devices with their own need is left out.
constexpr ponder_backend descriptor = [] {
    ponder_backend backend{};
    backend.struct_size = sizeof(ponder_backend);
    backend.abi = PONDER_BACKEND_ABI;
    backend.name = "reference";
    backend.version = PONDER_VERSION;
    backend.host_memory = 1;
    backend.probe = [](char *, size_t) -> int32_t { return 1; };
    backend.isa = [] { return "generic"; };
    backend.supports = supports;
    backend.open = open;
    backend.close = [](ponder_device *) {};
    backend.plan = plan;
    backend.run = run;
    backend.drop = [](void *kernel) { delete static_cast<Planned *>(kernel); };
    backend.packed_bytes = [](ponder_device *) -> size_t { return 0; };
    return backend;
}();

} // namespace
} // namespace reference

const ponder_backend *reference_backend() { return &reference::descriptor; }

} // namespace ponder
