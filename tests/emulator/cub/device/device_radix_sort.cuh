// CUB's sort, for the emulator.
#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

namespace cub {

struct DeviceRadixSort {
    template <class K, class V>
    static cudaError_t SortPairs(void *temporary, size_t &bytes, const K *keys, K *sorted_keys,
                                 const V *values, V *sorted_values, int n, int, int,
                                 cudaStream_t = nullptr) {
        bytes = 256;
        if (!temporary)
            return cudaSuccess;
        std::vector<int> order(n);
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(order.begin(), order.end(),
                         [&](int a, int b) { return keys[a] < keys[b]; });
        for (int i = 0; i < n; ++i) {
            sorted_keys[i] = keys[order[i]];
            sorted_values[i] = values[order[i]];
        }
        return cudaSuccess;
    }
};

} // namespace cub
