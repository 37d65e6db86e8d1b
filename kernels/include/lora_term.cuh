// The low-rank term lora_scale * (x A^T) B^T: operands of 16-bit pairs, loaded straight from global memory.
#pragma once

#include <stdint.h>

#include "mma.cuh"

// Entries k and k + 1 of row `row` of a row-major [rows, rank] matrix (k even), zero past either end. Not through the
// read-only path: B and x A^T may come from the kernel before.
template <typename T>
__device__ __forceinline__ uint32_t load_rank_pair(const T* matrix, int row, int rows, int k, int rank) {
    const uint16_t* at = reinterpret_cast<const uint16_t*>(matrix) + static_cast<int64_t>(row) * rank + k;
    uint32_t pair = 0;
    if (rank % 2 == 0) {
        if (row < rows && k < rank) pair = __ldcg(reinterpret_cast<const uint32_t*>(at));
    } else {
        if (row < rows && k < rank) pair = __ldcg(at);
        if (row < rows && k + 1 < rank) pair |= static_cast<uint32_t>(__ldcg(at + 1)) << 16;
    }
    return pair;
}

// What every kernel with this term is given; absent where xa is null.
template <typename T> struct LoraTerm {
    const T* xa;  // [M, rank]: x A^T
    const T* b;   // [N, rank]
    float scale;
    int rank;
};

// Sixteen columns of B, rows `row` + group and + 8: the A operand of one product.
template <typename T>
__device__ __forceinline__ void load_rank_rows(const T* b, int row, int rows, int k, int rank, uint32_t (&a)[4]) {
    const int group = threadIdx.x % 32 / 4, quad = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 4; i++)
        a[i] = load_rank_pair(b, row + group + i % 2 * 8, rows, k + quad * 2 + i / 2 * 8, rank);
}

// Sixteen columns of x A^T, tokens `token` + group: the B operand.
template <typename T>
__device__ __forceinline__ void load_rank_tokens(const T* xa, int token, int tokens, int k, int rank,
                                                 uint32_t (&b)[2]) {
    const int group = threadIdx.x % 32 / 4, quad = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 2; i++) b[i] = load_rank_pair(xa, token + group, tokens, k + quad * 2 + i * 8, rank);
}
