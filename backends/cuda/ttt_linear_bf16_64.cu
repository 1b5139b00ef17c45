#include "ttt_linear_scan.cuh"

template struct ponder::cuda::LinearScan<ponder::cuda::Bf16, 64>;
