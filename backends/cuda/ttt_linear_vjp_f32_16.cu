#include "ttt_linear_reverse.cuh"

template struct ponder::cuda::LinearReverse<float, 16>;
