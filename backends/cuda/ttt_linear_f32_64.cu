#include "ttt_linear_scan.cuh"

template struct ponder::cuda::LinearScan<float, 64>;
