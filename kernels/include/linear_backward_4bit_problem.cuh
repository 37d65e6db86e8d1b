// The arguments of the gradient of x of a product with a 4-bit weight: dx = dy W.
#pragma once

#include <stdint.h>

#include "scales.cuh"

template <typename T> struct LinearBackward4bit {
    const uint8_t* codes;  // [N, K / 2], even element in the high nibble
    Scales scales;         // [N, ceil(K / block)]
    const T* dy;           // [M, N]
    T* dx;                 // [M, K]
    int M, N, K;
    int block_shift;  // log2 of the block size, >= 6
};

// An entry point's flat arguments, in the order of rust/cuda/src/linear_backward_4bit.rs, and the problem they state.
#define LINEAR_BACKWARD_4BIT_PARAMETERS(T)                                                                             \
    const uint8_t *codes, const void *absmax, const float *group_scale, const float *offset, const T *dy, T *dx,       \
        int M, int64_t N, int64_t K, int block_shift, const __grid_constant__ Codebook codebook
#define LINEAR_BACKWARD_4BIT_PROBLEM(T)                                                                                \
    LinearBackward4bit<T> {                                                                                            \
        codes, {absmax, group_scale, offset}, dy, dx, M, static_cast<int>(N), static_cast<int>(K), block_shift         \
    }
