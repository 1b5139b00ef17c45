// The op list: names, shapes, attributes. One op is declared once here, has its
// vjp rule beside it in ops_*.cpp, a plain kernel in src/backend/reference and, where a
// backend does better, one file of the same name in backends/<name>.
//
// Notation. S streams, T tokens, C width, H heads, D = C / H, V vocabulary, R rank,
// M mini-batch. Rows are [S, T] flattened. act: the pass's activation type (f32, bf16;
// f64 in tests). wide: f32, or f64 when act is f64. `?` may be absent. const: frozen.
// Activations in `wide`: the residual stream, losses, statistics, every gradient of a
// fast weight. Inputs are in order, outputs after the arrow, attributes in brackets.
// A const marked 8 may be int8: then one more input stands at the end, its scales f32[1,N] or
// f32[M,1], and the weight is the int8 matrix times the scales, broadcast.
//
// rows ops (PONDER_TILE_ROWS where a backend can):
//   embedding         ids i32[S,T], table const8[V,C], position const[P,C] -> y wide[S,T,C]
//                     [first position]
//   embedding_at      ids i32[S,T], at i32[S,T], table const8[V,C], position const[P,C] ->
//                     y wide[S,T,C]       y = table[id] + position[at]
//   layer_norm        x[S,T,C], g[C], b[C] -> y[S,T,C], stats wide[S,T,2] (mean, 1/std) [eps]
//   layer_norm_vjp    dy[S,T,C], x, g, stats, carry? wide[S,T,C] -> dx wide[S,T,C]
//                     dx = carry + d layer_norm / dx ^T dy
//   layer_norm_gated  x, g, b, gate act[S,T,C] -> y act, stats  [eps]   y = gate layer_norm(x); as
//   next layer_norm_vjp_copy  the same -> dx, copy act[S,T,C]    where programs put it linear
//   x[S,T,K], w const8[K,N] or const8[N,K], b?[N], add? wide[S,T,N] -> y[S,T,N]
//                     [transposed: 1 = w is [N,K] and y = x w^T]      y = add + x w + b
//   linear_gelu       x[S,T,K], w const[K,N], b?[N] -> y act[S,T,N], z? act[S,T,N]  [transposed]
//                     z = x w + b, y = gelu(z). Never recorded: programs put it in the place of
//                     linear and gelu on devices that have it
//   linear_group      x[S,T,K], w1[K,N1], b1?, w2, b2?, ... -> y1[S,T,N1], y2, ...  [f1, f2, ...]
//                     y_i = x w_i + b_i, where f_i is 1 its gelu, 2 its sigmoid; also only where
//                     programs put it
//   lora_linear       x[S,T,K], w const8[K,N], b?[N], a wide[S,K,R], bb wide[S,R,N],
//                     add? wide[S,T,N] -> y[S,T,N], u act[S,T,R]
//                     [scale]             u = x a,  y = add + x w + b + scale u bb
//   lora_linear_vjp   dy[S,T,N], w const8[K,N], a, bb -> dx[S,T,K], du act[S,T,R]
//                     [scale]             du = scale dy bb^T,  dx = dy w^T + du a^T
//   lora_linear_gelu  x, w const, b?, a, bb, none -> y act[S,T,N], u, z? act[S,T,N]  [scale]
//                     z is the y of lora_linear, y = gelu(z)
//   lora_linear_vjp_narrow  dy, bb -> du  [scale, K]    where nobody wants dx
//   lora_linear_vjp_gelu  dy, w const, a, bb, z[S,T,K] -> dz[S,T,K], du  [scale]
//                     dz = gelu_vjp(dx, z); both only where programs put them, as linear_gelu
//   gelu              x -> y              tanh form, Hendrycks & Gimpel 2016
//   gelu_vjp          dy, x -> dx
//   sigmoid           x -> y
//   slice_rows        x[...,T,C] -> y[...,n,C] [first]
//   slice_rows_vjp    dy[...,n,C] -> dx[...,T,C] [first]      zeros elsewhere
//   cross_entropy     h[S,T,C], table const8[V,C], target i32[S,T] -> nll wide[S,T],
//                     entropy wide[S,T], p? act[S,T,V]
//                     logits = h table^T in tiles; a target of -1 gives nll 0 (entropy is
//                     still that of the row)
//   cross_entropy_vjp p[S,T,V], table const8[V,C], target, dnll wide[S,T] -> dh[S,T,C]
//                     dh = ((p - onehot) * dnll) table; rows with target -1 give 0
//   cross_entropy_parts  h, table const, target -> nll, entropy, e act[S,T,W], share wide[S,T]
//                     where programs put it in the place of cross_entropy: p - onehot = e share
//                     (p where the target is -1), or what else a device's vjp takes; W is V
//                     rounded up to 64, and e is 0 behind the vocabulary
//   cross_entropy_parts_vjp  e, share, table const, target, dnll, h? -> dh, dtable? wide[V,C]
//                     both gradients; e may be overwritten
// head ops (PONDER_TILE_ANY):
//   attention         qkv[S,T,3C] -> o[S,T,C], lse wide[S,H,T]  [heads]
//                     causal softmax(q k^T / sqrt(D)) v; lse = log sum exp of scaled scores
//   attention_vjp     qkv, o, lse, do[S,T,C] -> dqkv[S,T,3C]    [heads]
//   attention_cached  qkv[S,T,3C], first i32[S], k[S,H,N,D], v[S,H,N,D] -> o[S,T,C], k', v'
//                     row first_s + t of k', v' is the key, the value of token t (none from N on),
//                     the others are those of k, v; token t sees rows j <= first_s + t. k', v' may
//                     be k, v
//   keep_rows         x wide[S,T,C], first i32[S], rows wide[S,N,C] -> rows'
//                     row first_s + t of rows' is row t of x (none from N on), the others are those
//                     of rows. rows' may be rows
//   conv1d            x[S,T,C], w[4,C], b[C], before?[S,3+shift,C] -> y  [shift]  depthwise,
//                     causal: y_t = b + sum_j w_j x_{t-3-shift+j}; before the start come the rows
//                     of `before`, zeros where it is absent
//   conv1d_rope       x[S,T,C], before?[S,3+shift,C], w[4,C], b[C], w2?, b2? -> y act[S,T,C], y2?
//                     [shift, heads, period, theta]  y = rope(conv1d(x, w, b, before)), y2 that of
//                     w2 and b2; where programs put it in the place of these
//   rope              x[S,T,C] -> y  [heads, period, theta, inverse]  interleaved pairs, at t mod
//                     period; inverse: turned back, which is the vjp
//   ttt_linear        q,k,v [S,T,C], lr [S,T,H] (after the sigmoid), index [M], g[H,D], b[H,D],
//                     w1 wide[S,H,D,D], b1 wide[S,H,D] ->
//                     y[S,T,C], w1' wide, b1' wide, loss wide[S,3]
//                     [form, scale, decay, eps, max_grad_norm (0 = off), causal_k <= 0]
//                     token_i = max(0, 1/(i+1) + index_i) exp(decay (i - (M-1)))
//                     eta[i,j] = scale lr_j token_i (form 0, official) or token_j (form 1, ponder);
//                     scale = base_lr / D (ponder: x 768 / C x gating). The state steps by the last
//                     row, of a short last mini-batch too. Query i sees keys j <= i + causal_k.
//                     loss = mean over mini-batches (their last token), heads and D of the squared
//                     error under (initial weights, before, after the mini-batch's step)
//   ttt_mlp           as ttt_linear (form 0) with w1[S,H,D,4D], b1[S,H,4D], w2[S,H,4D,D], b2[S,H,D]
//                     after each other in inputs and outputs  [scale, eps]
// reductions and state:
//   mean              x wide[...] -> y wide[1]  [count]           y = sum(x) / count
//   mean_vjp          dy wide[1] -> dx wide[...] [count]
//   fill              -> y wide[...] [value]
//   matmul_tn         a[S,T,M], b[S,T,N] -> c wide[S,M,N]         c = a^T b, per stream
//   matmul_tn_group   a, b, a, b, ... -> c, c, ...            many matmul_tn; by programs alone
//   norm              a wide[n], b? wide[n] -> y wide[1]          |a - b|
//   adam              w,g,m,v wide[n], h wide[8], gnorm wide[1], rate? wide[n], keep? wide[n],
//                     start? wide[n] -> w',m',v'
//                     h = lr, beta1, beta2, eps, 1-beta1^t, 1-beta2^t, clip (0 = off), decay
//                     g is scaled by min(1, clip / (gnorm + 1e-6)); outputs may alias inputs.
//                     w' = start + keep (w - start) - rate update; keep absent: 1, rate: lr
//   sgd               w,g wide[n], h wide[8], gnorm wide[1], rate?, keep?, start? -> w'
//   adam_vjp          w,g,m,v, h, gnorm, rate?, keep?, start?, dw',dm',dv' wide[n] ->
//                     dw, dg, dm, dv, drate?, dkeep?, dstart? wide[n]
//   sgd_vjp           w,g, h, gnorm, rate?, keep?, start?, dw' wide[n] ->
//                     dw, dg, drate?, dkeep?, dstart? wide[n]
//                     both through the clip factor; where v' = 0 no gradient passes its root
//   adamw             w,g,m,v wide[n], h wide[8], gnorm wide[1] -> w',m',v'    as adam, with
//                     w' = w - lr (update + h[7] w): decoupled decay, Loshchilov & Hutter 2019
// decisions on chunks, where they are made on the device (ponder_gate in backend.h, as i32 words):
//   gate              nll? wide[S,T], entropy? wide[S,T], reconstruction? wide[1,3], state i32[N]
//   ->
//                     state', flags? i32[K+1], h? wide[K,8]
//                     [predictions, told (-1: by the state's rule; 0: nothing is decided), lr,
//                     beta1, beta2, eps, clip]
//                     the signals become those of the losses that are given, as means; of
//                     `reconstruction`, element 1, where the last decision granted a step. Then the
//                     decision: flags_k = k < granted for k < K, flags_K = nothing was granted,
//                     h_k as in adam, for the next K steps. state' may be state
//   commit            gradient_norm? wide[1], distance wide[1], fresh? wide[n], state i32[N] ->
//                     state', w? wide[n]  [beta1, beta2]
//                     where both numbers are finite and the distance within the guard, w becomes
//                     fresh, and the granted steps count as the optimizer's; else w stays
// gradients of trainable weights, summed over streams and tokens:
//   embedding_vjp     dy wide[S,T,C], ids i32[S,T] -> dtable wide[V,C], dposition wide[P,C]
//                     [first position]     rows that no token names are 0
//   layer_norm_vjp_weight  dy[S,T,C], x[S,T,C], stats wide[S,T,2] -> dg wide[C], db wide[C]
//   matmul_tn_sum     a[S,T,M], b[S,T,N] -> c wide[M,N]       c = sum over streams of a^T b
//   cross_entropy_vjp_table  p[S,T,V], h[S,T,C], target, dnll wide[S,T] -> dtable wide[V,C]
//                     dtable = ((p - onehot) * dnll)^T h; rows with target -1 give 0
//   dropout           x[...], seed i32[2] -> y  [probability, salt]   y_i = x_i / (1 - probability)
//                     or 0, by a hash of seed, salt and i: the same call is its own vjp
// gradients of the TTT layer:
//   conv1d_vjp        dy[S,T,C], x, w[4,C] -> dx[S,T,C], dw wide[4,C], db wide[C]  [shift]
//   ttt_linear_vjp    q,k,v,lr,index,g,b,w1,b1 as in ttt_linear, dy[S,T,C], dw1' wide[S,H,D,D],
//                     db1' wide[S,H,D], dloss wide[S,3] -> dq,dk,dv [S,T,C], dlr[S,T,H],
//                     dindex wide[M], dg wide[H,D], db wide[H,D], dw1 wide, db1 wide
//                     [as ttt_linear]
//   ttt_mlp_vjp       q,k,v,lr,index,g,b,w1,b1,w2,b2 as in ttt_mlp, dy[S,T,C], dw1', db1', dw2',
//                     db2' wide, dloss wide[S,3] -> dq,dk,dv [S,T,C], dlr[S,T,H], dindex wide[M],
//                     dg wide[H,D], db wide[H,D], dw1, db1, dw2, db2 wide       [as ttt_mlp]
// primitives, closed under vjp: what fused ops are composed of where gradients of gradients are
// wanted. Any float type. Shapes broadcast: aligned at the right, a dim is equal or 1 or missing.
// rows ops:
//   add, sub, mul     a, b -> y[...]                 a and b broadcast to y
//   broadcast         x -> y[...]
//   affine            x -> y  [factor, offset]       y = factor x + offset
//   power             x -> y  [exponent]             0 to a negative power is 0
//   exp, relu         x -> y
//   step              x -> y                         1 where x > 0, else 0
//   gelu_derivative   x -> y  [order]                d^order gelu / dx^order, order 1 to 3
//   softmax           x[...,M,N] -> y  [causal]      over N; causal: row i sees columns j <= i
//   log_sum_exp       x[...,N] -> y[...,1]
//   sum_last          x[...,N] -> y[...,1]
//   pick              x[S,T,V], target i32[S,T] -> y[S,T,1]     0 where target is -1
//   pick_vjp          dy[S,T,1], target i32[S,T] -> dx[S,T,V]
// other ops:
//   sum_to            x -> y                         sums over what broadcast would repeat
//   matmul            a[...,M,K], b[...,K,N] -> c[...,M,N]  [ta, tb]  equal leading dims;
//                     ta: a is [...,K,M], tb: b is [...,N,K]
//   reshape           x[...] -> y[...]
//   split_heads       x[S,T,C] -> y[S,H,T,D]  [heads, part, parts]   D = C / (parts H); of part
//                     `part` of the parts that x holds side by side
//   merge_heads       x[S,H,T,D] -> y[S,T,C]  [heads, part, parts]   zeros in the other parts

#pragma once

#include "tensor/graph.hpp"

namespace ponder {

// What the list says of one op, for the graph, the tape and the executor.
struct OpRule {
    const char *name;
    bool rows;                                      // a rows op
    uint64_t (*flops)(const Graph &, const Call &); // 2 per multiply-add of matrix products
    void (*vjp)(class Tape &, const Call &);        // nullptr: constant for gradients
};

// Of calls that are made outside of the functions below: by fuse.hpp, by a benchmark.
extern const OpRule attention_vjp_rule, conv1d_rope_rule, layer_norm_gated_rule,
    layer_norm_vjp_copy_rule, linear_gelu_rule, linear_group_rule, lora_linear_gelu_rule,
    lora_linear_vjp_gelu_rule, lora_linear_vjp_narrow_rule, cross_entropy_parts_rule,
    cross_entropy_parts_vjp_rule, matmul_tn_group_rule;

// The inputs of a call that takes the weight w, with the scales of an int8 w at their end.
std::vector<Id> with_scales(const Graph &, Id w, std::vector<Id> in);

// What a vjp rule sees while the tape is read backwards.
class Tape {
public:
    Tape(Graph &graph) : graph(graph) {}
    Graph &graph;
    // Gradient of a value so far; none where nothing arrived.
    Id gradient(Id value) const;
    bool wants(Id value) const { return value != none && graph.value(value).needs_gradient; }
    // Adds to the gradient of `value`.
    void add(Id value, Id gradient);
    // Takes the gradient so far out, for a rule that adds to it by itself and puts back the sum.
    Id take(Id value);

private:
    std::vector<Id> gradient_;
};

Id embedding(Graph &, Id ids, Id table, Id position, int64_t first);
Id embedding_at(Graph &, Id ids, Id at, Id table, Id position);
Id layer_norm(Graph &, Id x, Id g, Id b, double eps, DType out);
Id linear(Graph &, Id x, Id w, Id b, Id add, bool transposed, DType out);
Id lora_linear(Graph &, Id x, Id w, Id b, Id a, Id bb, Id add, double scale, DType out);
Id gelu(Graph &, Id x);
Id dropout(Graph &, Id x, double probability, int64_t salt); // 0: x itself
struct CrossEntropy {
    Id nll, entropy; // entropy: none in a composition
};
// keep: the probabilities stay for a backward pass.
CrossEntropy cross_entropy(Graph &, Id h, Id table, Id target, bool keep);
Id attention(Graph &, Id qkv, int64_t heads, int64_t salt); // of Mode::attention_dropout
struct CachedAttention {
    Id o, k, v; // k, v: the caches afterwards
};
CachedAttention attention_cached(Graph &, Id qkv, Id first, Id k, Id v);
Id keep_rows(Graph &, Id x, Id first, Id rows); // the rows afterwards
Id conv1d(Graph &, Id x, Id w, Id b, int64_t shift, Id before = none);
Id rope(Graph &, Id x, int64_t heads, int64_t period, double theta);
struct TttScan {
    bool mlp = false;
    bool ponder = false; // PonderTTT's form instead of the official one
    double scale = 1, decay = 0, eps = 1e-6, max_grad_norm = 0;
    int64_t causal_k = 0;
};
struct TttResult {
    Id y, loss;
    std::vector<Id> state; // w1, b1 (, w2, b2) after the chunk
};
TttResult ttt_scan(Graph &, Id q, Id k, Id v, Id lr, Id index, Id g, Id b,
                   const std::vector<Id> &state, const TttScan &form);
Id mean(Graph &, Id x, int64_t count);
Id fill(Graph &, Shape shape, double value);
Id matmul_tn(Graph &, Id a, Id b);
Id matmul_tn_sum(Graph &, Id a, Id b);
Id norm(Graph &, Id a, Id b);

// One step of an update rule; m and v are none for SGD, rate, keep and start may be. State tensors
// are externals that the caller bound, so nothing is returned.
struct Step {
    Id w, g, m, v, h, norm, rate = none, keep = none, start = none;
};
struct StepGradient {
    Id w, g, m, v, rate = none, keep = none, start = none;
};
void adam(Graph &, const Step &step, Id w2, Id m2, Id v2);
void sgd(Graph &, const Step &step, Id w2);
void adam_vjp(Graph &, const Step &step, Id dw2, Id dm2, Id dv2, const StepGradient &to);
void sgd_vjp(Graph &, const Step &step, Id dw2, const StepGradient &to);
void adamw(Graph &, const Step &step, Id w2, Id m2, Id v2);

// Decisions on the device. State and outputs are externals that the caller bound; those that a call
// has no use for are none.
struct GateCall {
    Id nll = none, entropy = none, reconstruction = none;
    Id state, state2, flags = none, h = none;
    int64_t predictions = 0, told = 0;
    double lr = 0, beta1 = 0, beta2 = 0, epsilon = 0, clip = 0;
};
void gate(Graph &, const GateCall &call);
struct CommitCall {
    Id gradient_norms = none, distance, fresh = none, state, state2,
       w = none;                 // norms: of each step
    double beta1 = 1, beta2 = 1; // of the optimizer whose steps were taken
};
void commit(Graph &, const CommitCall &call);

// Primitives. What stays of the same shape is returned as it is.
Id add(Graph &, Id a, Id b, DType out);
Id sub(Graph &, Id a, Id b);
Id mul(Graph &, Id a, Id b);
Id broadcast(Graph &, Id x, Shape shape);
Id sum_last(Graph &, Id x);
Id sum_to(Graph &, Id x, Shape shape);
Id reshape(Graph &, Id x, Shape shape);
Id affine(Graph &, Id x, double factor, double offset);
void convert(Graph &, Id x, Id y); // into a value of another type
Id converted(Graph &, Id x, DType type);
Id power(Graph &, Id x, double exponent);
Id exp(Graph &, Id x);
Id relu(Graph &, Id x);
Id sigmoid(Graph &, Id x);
Id gelu_derivative(Graph &, Id x, int order);
Id softmax(Graph &, Id x, bool causal);
Id log_sum_exp(Graph &, Id x);
Id pick(Graph &, Id x, Id target);
Id matmul(Graph &, Id a, Id b, bool ta, bool tb, DType out = DType::none);
Id split_heads(Graph &, Id x, int64_t heads, int64_t part, int64_t parts);
Id merge_heads(Graph &, Id x, int64_t part, int64_t parts);
Id slice_rows(Graph &, Id x, int64_t first, int64_t count);
Id pad_rows(Graph &, Id x, int64_t first, int64_t count); // x as rows first.. of `count`

} // namespace ponder
