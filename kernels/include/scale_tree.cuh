// The float64 sum of scales over a fixed tree: 256 consecutive values in index order, then the partial sums likewise.
#pragma once

#include "constants.cuh"
#include "floats.cuh"

constexpr int RUN = NESTED_BLOCK_SIZE;

// Of RUN values, zeros behind the last; adding a zero changes no sum.
template <typename T> __device__ __forceinline__ double sum_in_order(const T* values) {
    double sum = 0.0;
#pragma unroll 32
    for (int i = 0; i < RUN; i++) sum += static_cast<double>(values[i]);
    return sum;
}

// One warp: the sum and the number of the finite ones of `size` scales in shared memory, which has room for RUN. The
// others count as absent; their places are overwritten with zeros.
__device__ __forceinline__ void sum_run(float* scales, int size, double* sum, int* count) {
    const int lane = threadIdx.x % 32;
    int finite = 0;
    for (int i = lane; i < RUN; i += 32) {
        const bool counts = i < size && is_finite(scales[i]);
        finite += counts;
        if (!counts) scales[i] = 0.f;
    }
    for (int other = 16; other > 0; other >>= 1) finite += __shfl_xor_sync(0xffffffffu, finite, other);
    __syncwarp();
    if (lane == 0) {
        *sum = sum_in_order(scales);
        *count = finite;
    }
}
