// What the tiled products share: the low-rank term's tokens; the sum over a cluster, bias, rounding and output.
#pragma once

#include <stdint.h>

#include "async_copy.cuh"
#include "cluster.cuh"
#include "floats.cuh"
#include "linear_4bit_problem.cuh"
#include "lora_term.cuh"
#include "mma.cuh"

// Ranks k ... k + 63 of x A^T for a tile of tokens, zero past the ends, as a stage of tokens in shared memory: rows of
// 128 bytes, whose 16-byte piece p lies at p ^ (token & MASK). Every thread of the CTA calls this, and a barrier
// follows.
template <typename T, int TOKENS, int MASK>
__device__ __forceinline__ void fill_rank_stage(char* stage, const Linear4bit<T>& p, int token0, int k) {
    for (int i = threadIdx.x; i < TOKENS * 32; i += blockDim.x) {
        const int token = i / 32, pair = i % 32;
        *reinterpret_cast<uint32_t*>(stage + token * 128 + (pair / 4 ^ (token & MASK)) * 16 + pair % 4 * 4) =
            load_rank_pair(p.lora.xa, token0 + token, p.M, k + pair * 2, p.lora.rank);
    }
}

// Where a tile of sums goes.
template <typename T> struct Output {
    T* y;           // [M, N]
    const T* bias;  // [N] or null
    int M, N;
};

// Adds what the CTAs of the cluster summed, in the order of their ranks, and writes this CTA's share of the tile.
template <typename T, typename SHAPE>
__device__ __forceinline__ void write_tile(const Output<T>& p, const float* tile, int row0, int token0, int rank,
                                           int ranks) {
    constexpr int RUN = 8;  // rows a thread writes at once
    constexpr int RUNS = SHAPE::ROWS / RUN;
    const int tokens = min(SHAPE::TOKENS, p.M - token0), all = tokens * RUNS;
    for (int i = all * rank / ranks + threadIdx.x; i < all * (rank + 1) / ranks; i += SHAPE::THREADS) {
        const int token = i / RUNS, run = i % RUNS * RUN, row = row0 + run;
        if (row >= p.N) continue;
        const uint32_t at = shared_address(tile + token * SHAPE::PITCH + run);
        float sum[RUN] = {};
#pragma unroll 1
        for (int r = 0; r < ranks; r++) {
            const float4 first = load_from_rank(at, r), second = load_from_rank(at + 16, r);
            sum[0] += first.x, sum[1] += first.y, sum[2] += first.z, sum[3] += first.w;
            sum[4] += second.x, sum[5] += second.y, sum[6] += second.z, sum[7] += second.w;
        }
        if (p.bias != nullptr)
#pragma unroll
            for (int j = 0; j < RUN; j++)
                if (row + j < p.N) sum[j] += widen(load_through_l2(p.bias + row + j));
        T* to = p.y + static_cast<int64_t>(token0 + token) * p.N + row;
        if (p.N % RUN == 0) {
            *reinterpret_cast<uint4*>(to) = make_uint4(pack_pair<T>(sum[0], sum[1]), pack_pair<T>(sum[2], sum[3]),
                                                       pack_pair<T>(sum[4], sum[5]), pack_pair<T>(sum[6], sum[7]));
        } else {
#pragma unroll
            for (int j = 0; j < RUN; j++)
                if (row + j < p.N) to[j] = narrow<T>(sum[j]);
        }
    }
}
