// The tensors of a fused scan by their place among those of the op.
#pragma once

#include "ttt_scan.hpp"

namespace ponder::cuda {

// f(tensor ...) in the order of src/tensor/ops.hpp.
template <class F> void in_order(TttLinearForward &x, F f) {
    f(x.q, x.k, x.v, x.lr, x.index, x.g, x.b, x.w1, x.b1, x.y, x.w1_out, x.b1_out, x.loss);
}
template <class F> void in_order(TttMlpForward &x, F f) {
    f(x.q, x.k, x.v, x.lr, x.index, x.g, x.b, x.w1, x.b1, x.w2, x.b2, x.y, x.w1_out, x.b1_out,
      x.w2_out, x.b2_out, x.loss);
}
template <class F> void in_order(TttLinearBackward &x, F f) {
    f(x.q, x.k, x.v, x.lr, x.index, x.g, x.b, x.w1, x.b1, x.dy, x.dw1_out, x.db1_out, x.dloss, x.dq,
      x.dk, x.dv, x.dlr, x.dindex, x.dg, x.db, x.dw1, x.db1);
}
template <class F> void in_order(TttMlpBackward &x, F f) {
    f(x.q, x.k, x.v, x.lr, x.index, x.g, x.b, x.w1, x.b1, x.w2, x.b2, x.dy, x.dw1_out, x.db1_out,
      x.dw2_out, x.db2_out, x.dloss, x.dq, x.dk, x.dv, x.dlr, x.dindex, x.dg, x.db, x.dw1, x.db1,
      x.dw2, x.db2);
}

// One of these four, of the op's tensors; no trace.
template <class Tensors> Tensors tensors_at(void *const *address) {
    Tensors tensors{};
    in_order(tensors, [&]<class... T>(T *&...x) { ((x = static_cast<T *>(*address++)), ...); });
    return tensors;
}

} // namespace ponder::cuda
