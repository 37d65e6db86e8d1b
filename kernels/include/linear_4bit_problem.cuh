// The arguments that every product with a 4-bit weight takes: y = x W^T (+ bias) (+ lora_scale * xa B^T).
#pragma once

#include <stdint.h>

#include "lora_term.cuh"
#include "scales.cuh"

template <typename T> struct Linear4bit {
    const uint8_t* codes;  // [N, K / 2], even element in the high nibble
    Scales scales;         // [N, ceil(K / block)]
    const T* x;            // [M, K]
    T* y;                  // [M, N]
    const T* bias;         // [N] or null
    LoraTerm<T> lora;
    int M, N, K;
    int block_shift;  // log2 of the block size, >= 6
};

// An entry point's flat arguments, in the order of rust/cuda/src/linear_4bit.rs, and the problem they state.
#define LINEAR_4BIT_PARAMETERS(T)                                                                                      \
    const uint8_t *codes, const void *absmax, const float *group_scale, const float *offset, const T *x, T *y,         \
        const T *bias, const T *lora_xa, const T *lora_b, float lora_scale, int rank, int M, int64_t N, int64_t K,     \
        int block_shift, const __grid_constant__ Codebook codebook
#define LINEAR_4BIT_PROBLEM(T)                                                                                         \
    Linear4bit<T> {                                                                                                    \
        codes, {absmax, group_scale, offset}, x, y, bias, {lora_xa, lora_b, lora_scale, rank}, M, static_cast<int>(N), \
            static_cast<int>(K), block_shift                                                                           \
    }
