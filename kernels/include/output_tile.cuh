// How a tile of sums becomes output: the low-rank term before, the sum over a cluster, bias and rounding after.
#pragma once

#include <stdint.h>

#include "async_copy.cuh"
#include "cluster.cuh"
#include "floats.cuh"
#include "linear_4bit_problem.cuh"
#include "lora_term.cuh"
#include "mma.cuh"

// The low-rank term of a warp's tile, sixteen ranks at a time; the CTAs of a cluster take turns. The sums start at zero.
template <typename T, int ROW_TILES, int TOKEN_TILES>
__device__ __forceinline__ void add_lora(const Linear4bit<T>& p, int row0, int token0, int rank, int ranks,
                                         float (&sums)[ROW_TILES][TOKEN_TILES][4]) {
    for (int k = rank * 16; k < p.lora.rank; k += ranks * 16) {
        uint32_t a[ROW_TILES][4];
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++) load_rank_rows(p.lora.b, row0 + r * 16, p.N, k, p.lora.rank, a[r]);
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; n++) {
            uint32_t b[2];
            load_rank_tokens(p.lora.xa, token0 + n * 8, p.M, k, p.lora.rank, b);
#pragma unroll
            for (int r = 0; r < ROW_TILES; r++)
                mma_16x8x16<T>(sums[r][n], a[r][0], a[r][1], a[r][2], a[r][3], b[0], b[1]);
        }
    }
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) sums[r][n][i] *= p.lora.scale;
}

// Adds what the CTAs of the cluster summed, in the order of their ranks, and writes this CTA's share of the tile.
template <typename T, typename SHAPE>
__device__ __forceinline__ void write_tile(const Linear4bit<T>& p, const float* tile, int row0, int token0, int rank,
                                           int ranks) {
    constexpr int RUN = 8;  // rows a thread writes at once
    constexpr int RUNS = SHAPE::ROWS / RUN;
    const int tokens = min(SHAPE::TOKENS, p.M - token0), all = tokens * RUNS;
    for (int i = all * rank / ranks + threadIdx.x; i < all * (rank + 1) / ranks; i += SHAPE::THREADS) {
        const int token = i / RUNS, run = i % RUNS * RUN, row = row0 + run;
        if (row >= p.N) continue;
        const uint32_t at = shared_address(tile + token * SHAPE::PITCH + run);
        float sum[RUN] = {};
        for (int r = 0; r < ranks; r++) {
            const float4 first = load_from_rank(at, r), second = load_from_rank(at + 16, r);
            sum[0] += first.x, sum[1] += first.y, sum[2] += first.z, sum[3] += first.w;
            sum[4] += second.x, sum[5] += second.y, sum[6] += second.z, sum[7] += second.w;
        }
        if (p.bias != nullptr)
#pragma unroll
            for (int j = 0; j < RUN; j++)
                if (row + j < p.N) sum[j] += widen(__ldg(p.bias + row + j));
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
