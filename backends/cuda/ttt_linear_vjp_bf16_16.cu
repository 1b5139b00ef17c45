#include "ttt_linear_reverse.cuh"

template struct ponder::cuda::LinearReverse<ponder::cuda::Bf16, 16>;
