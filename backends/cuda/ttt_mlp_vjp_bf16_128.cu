#include "ttt_mlp_reverse.cuh"

template struct ponder::cuda::MlpReverseOf<ponder::cuda::Bf16, 128>;
