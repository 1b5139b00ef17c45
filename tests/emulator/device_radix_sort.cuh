// CUB's sort, for the emulator.
#pragma once
#include <numeric>
namespace cub {
struct DeviceRadixSort {
    template <class K, class V>
    static cudaError_t SortPairs(void *temp, size_t &bytes, const K *k, K *ko, const V *v, V *vo,
                                 int n, int, int, cudaStream_t = nullptr) {
        bytes = 256;
        if (!temp)
            return cudaSuccess;
        std::vector<int> o(n);
        std::iota(o.begin(), o.end(), 0);
        std::stable_sort(o.begin(), o.end(), [&](int a, int b) { return k[a] < k[b]; });
        for (int i = 0; i < n; ++i) {
            ko[i] = k[o[i]];
            vo[i] = v[o[i]];
        }
        return cudaSuccess;
    }
};
} // namespace cub
