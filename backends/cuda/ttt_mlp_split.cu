#include "ttt_mlp_split.cuh"

template struct ponder::cuda::MlpSplitOf<64>;
