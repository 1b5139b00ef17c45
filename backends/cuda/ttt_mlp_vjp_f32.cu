#include "ttt_mlp_reverse.cuh"

template struct ponder::cuda::MlpReverseOf<float, 64>;
