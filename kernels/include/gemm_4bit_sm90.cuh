// The product of 33 and more tokens with a 4-bit weight on Hopper: y = x W^T (+ bias) (+ lora_scale * xa B^T).
//
// Maths: the weight is decoded into registers exactly as dequantize does (one float32 product with the scale, one
// rounding to T) and is the A operand of wgmma; the tokens are B, in shared memory, which the tensor cores read
// themselves. While they work on one stage of 64 columns the next stage's weights are decoded.
// Layout: `Linear4bit` in linear_4bit_problem.cuh. A CTA of two warpgroups owns 128 rows by TOKENS tokens.
// Grid: x over tiles of tokens, y over tiles of rows, z splits K; the CTAs of one z-column are one cluster, which add
// their sums through each other's shared memory in the order of their ranks.
// Bytes moved: the packed weight once per token tile, x once per row tile (from the L2).
// Called by rust/cuda/src/linear_4bit.rs, with what rust/cuda/src/heuristics.rs chose.
#pragma once

#include <stdint.h>

#include "async_copy.cuh"
#include "block_scales.cuh"
#include "cluster.cuh"
#include "dependent_launch.cuh"
#include "linear_4bit_problem.cuh"
#include "output_tile.cuh"
#include "pair_table.cuh"
#include "wgmma.cuh"

template <int TOKENS_, int STAGES_> struct WarpgroupShape {
    static constexpr int TOKENS = TOKENS_, STAGES = STAGES_;
    static constexpr int THREADS = 256, ROWS = 128;
    // Tokens of all stages come first: each stage of them starts at a multiple of 1024.
    static constexpr int TOKEN_BYTES = TOKENS * 128, CODE_BYTES = ROWS * 32, SCALE_BYTES = ROWS * 4;
    static constexpr int CODES = STAGES * TOKEN_BYTES, SCALES = CODES + STAGES * CODE_BYTES;
    static constexpr int MAP_BYTES = 256 * 4;
    // Sums lie as [token][row]; the pitch keeps the stores of a fragment free of bank conflicts.
    static constexpr int PITCH = ROWS + 4;
};

// Shared memory: the pair table, the dynamic map, then the stages, which the tile of sums takes over at the end.
template <typename T, typename SHAPE> struct WarpgroupLoader {
    const Linear4bit<T>& p;
    BlockScales scales;
    char* stages;
    int row0, token0;

    // Free of branches, which would end ptxas's pipelining of the products around them.
    __device__ __forceinline__ void issue_codes(int slot, int column64) const {
        const int row = threadIdx.x / 2, half = threadIdx.x % 2;
        copy_16(shared_address(stages) + SHAPE::CODES + slot * SHAPE::CODE_BYTES + row * 32 + half * 16,
                at_row(p.codes + column64 * 32 + half * 16, min(row0 + row, p.N - 1), p.K / 2));
    }

    __device__ __forceinline__ void issue_tokens(int slot, int column64) const {
        const int piece = threadIdx.x % 8;
#pragma unroll
        for (int i = 0; i < SHAPE::TOKENS * 8; i += SHAPE::THREADS) {
            const int token = (i + threadIdx.x) / 8;
            const uint32_t to = slot * SHAPE::TOKEN_BYTES + token * 128 + (piece ^ token % 8) * 16;
            copy_16_or_zeros(shared_address(stages) + to,
                             at_row(reinterpret_cast<const uint8_t*>(p.x + column64 * 64 + piece * 8),
                                    min(token0 + token, p.M - 1), p.K * 2),
                             token0 + token < p.M);
        }
    }

    __device__ __forceinline__ RawScale load_scale_of_thread(int column64) const {
        if (threadIdx.x >= SHAPE::ROWS) return {0, 0.f};
        return scales.load(min(row0 + static_cast<int>(threadIdx.x), p.N - 1), column64);
    }

    __device__ __forceinline__ void store_scale(int slot, RawScale raw) const {
        const float scale = scales.decode(raw);
        if (threadIdx.x < SHAPE::ROWS)
            reinterpret_cast<float*>(stages + SHAPE::SCALES + slot * SHAPE::SCALE_BYTES)[threadIdx.x] = scale;
    }
};

// The weights of a warp's 16 rows in one stage, as A fragments of its four steps of 16 columns. Lane (group, quad)
// needs byte `quad` of each of the 8 words of rows group and group + 8.
template <typename T, typename SHAPE>
__device__ __forceinline__ void decode_stage(const char* stages, int slot, int row, const FloatPairTable& table,
                                             uint32_t (&weights)[16]) {
    const uint4* codes = reinterpret_cast<const uint4*>(stages + SHAPE::CODES + slot * SHAPE::CODE_BYTES + row * 32);
    const float* scales = reinterpret_cast<const float*>(stages + SHAPE::SCALES + slot * SHAPE::SCALE_BYTES) + row;
    const float upper_scale = scales[0], lower_scale = scales[8];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const uint4 upper = codes[half], lower = codes[half + 16];
        uint32_t* to = weights + half * 8;
        to[0] = table.scaled_pair<T>(upper.x, upper_scale);
        to[1] = table.scaled_pair<T>(lower.x, lower_scale);
        to[2] = table.scaled_pair<T>(upper.y, upper_scale);
        to[3] = table.scaled_pair<T>(lower.y, lower_scale);
        to[4] = table.scaled_pair<T>(upper.z, upper_scale);
        to[5] = table.scaled_pair<T>(lower.z, lower_scale);
        to[6] = table.scaled_pair<T>(upper.w, upper_scale);
        to[7] = table.scaled_pair<T>(lower.w, lower_scale);
    }
}

template <typename T, typename SHAPE>
__device__ __forceinline__ void gemm_4bit_sm90(const Linear4bit<T>& p, const Codebook& codebook) {
    launch_dependents();
    extern __shared__ __align__(1024) char shared[];
    float* map = reinterpret_cast<float*>(shared + PAIR_TABLE_BYTES);
    char* stages = shared + PAIR_TABLE_BYTES + SHAPE::MAP_BYTES;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / 4, quad = lane % 4;
    const int token0 = blockIdx.x * SHAPE::TOKENS, row0 = blockIdx.y * SHAPE::ROWS;
    const int rank = blockIdx.z, ranks = gridDim.z;

    const int blocks64 = p.K / 64;
    const int begin = blocks64 * rank / ranks, count = blocks64 * (rank + 1) / ranks - begin;
    const bool nested = p.scales.group_scale != nullptr;
    const int blocks_per_row = (p.K + (1 << p.block_shift) - 1) >> p.block_shift;
    const float offset = nested ? __ldg(p.scales.offset) : 0.f;
    const BlockScales scales = {p.scales, offset, map, blocks_per_row, p.block_shift - 6};
    const WarpgroupLoader<T, SHAPE> loader = {p, scales, stages, row0, token0};

    // Two stages are being multiplied or decoded, the others are on the way.
    constexpr int AHEAD = SHAPE::STAGES - 2;
    // The columns of stage s; past the end the last stage is fetched again, which keeps branches out and costs little.
    auto column64 = [&](int s) { return begin + max(min(s, count - 1), 0); };
    RawScale raw[AHEAD];  // scales on the way: of the stages after the one being decoded
#pragma unroll
    for (int s = 0; s < AHEAD; s++) {
        loader.issue_codes(s, column64(s));
        raw[s] = loader.load_scale_of_thread(column64(s));
    }
    auto next_scale = [&](int slot, int s) {
        loader.store_scale(slot, raw[0]);
#pragma unroll
        for (int i = 0; i < AHEAD - 1; i++) raw[i] = raw[i + 1];
        raw[AHEAD - 1] = loader.load_scale_of_thread(column64(s + AHEAD));
    };
    write_float_pair_table<SHAPE::THREADS>(shared, codebook);
    if (nested) load_dynamic_map(map);
    __syncthreads();
    next_scale(0, 0);
    const FloatPairTable table(shared);

    wait_for_previous_kernels();
#pragma unroll
    for (int s = 0; s < AHEAD; s++) {
        loader.issue_tokens(s, column64(s));
        commit_copies();
    }
    float sums[SHAPE::TOKENS / 2] = {};
    uint32_t weights[16], next_weights[16];
    if (p.lora.xa != nullptr && rank == 0) {
        char* stage = stages + AHEAD * SHAPE::TOKEN_BYTES;  // not yet in use
        for (int k = 0; k < p.lora.rank; k += 64) {
            fill_rank_stage<T, SHAPE::TOKENS, 7>(stage, p, token0, k);
#pragma unroll
            for (int i = 0; i < 16; i++)
                weights[i] = load_rank_pair(p.lora.b, row0 + warp * 16 + group + i % 2 * 8, p.N,
                                            k + i / 4 * 16 + i % 4 / 2 * 8 + quad * 2, p.lora.rank);
            fence_for_products();
            __syncthreads();
            WarpgroupProduct<T, SHAPE::TOKENS>::start(sums, weights, describe_rows(shared_address(stage)));
            wait_products<0>();
            __syncthreads();
        }
#pragma unroll
        for (int i = 0; i < SHAPE::TOKENS / 2; i++) sums[i] *= p.lora.scale;
    }

    const uint32_t zero = p.M < 0;
    // Stage 0 has no products to hide behind.
    wait_copies<AHEAD - 1>();
    fence_for_products();
    __syncthreads();
    decode_stage<T, SHAPE>(stages, 0, warp * 16 + group, table, weights);
    int slot = 0, next_slot = 1 % SHAPE::STAGES, free_slot = AHEAD;
    for (int s = 0; s < count; s++) {
        WarpgroupProduct<T, SHAPE::TOKENS>::start(
            sums, weights, describe_rows(shared_address(stages) + slot * SHAPE::TOKEN_BYTES));

        // Meanwhile the slot of the stage before last is filled again, and the next stage is decoded.
        next_scale(next_slot, s + 1);
        loader.issue_codes(free_slot, column64(s + AHEAD));
        loader.issue_tokens(free_slot, column64(s + AHEAD));
        commit_copies();
        wait_copies<AHEAD - 1>();
        fence_for_products();
        __syncthreads();  // the next stage has landed, and the products of the stage before are done in all warps
        decode_stage<T, SHAPE>(stages, next_slot, warp * 16 + group, table, next_weights);
        wait_products<0>();
#pragma unroll
        for (int i = 0; i < 16; i++) weights[i] = take_after_wait(next_weights[i], zero);
        slot = next_slot;
        next_slot = next_slot + 1 == SHAPE::STAGES ? 0 : next_slot + 1;
        free_slot = free_slot + 1 == SHAPE::STAGES ? 0 : free_slot + 1;
    }
    wait_copies<0>();
    __syncthreads();

    float* tile = reinterpret_cast<float*>(stages);
#pragma unroll
    for (int n = 0; n < SHAPE::TOKENS / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            tile[(n * 8 + quad * 2 + i % 2) * SHAPE::PITCH + warp * 16 + group + i / 2 * 8] = sums[n * 4 + i];
    cluster_barrier();
    write_tile<T, SHAPE>({p.y, p.bias, p.M, p.N}, tile, row0, token0, rank, ranks);
    if (ranks > 1) cluster_barrier();  // a CTA's shared memory must outlive its readers
}

#define DEFINE_GEMM_4BIT_SM90(NAME, T, TOKENS, STAGES, CTAS)                                                           \
    extern "C" __global__ void __launch_bounds__(256, CTAS) NAME##_n##TOKENS##_s##STAGES(LINEAR_4BIT_PARAMETERS(T)) {  \
        gemm_4bit_sm90<T, WarpgroupShape<TOKENS, STAGES>>(LINEAR_4BIT_PROBLEM(T), codebook);                           \
    }

#define DEFINE_ALL_GEMM_4BIT_SM90(NAME, T)                                                                             \
    DEFINE_GEMM_4BIT_SM90(NAME, T, 64, 4, 2)                                                                           \
    DEFINE_GEMM_4BIT_SM90(NAME, T, 128, 6, 1)                                                                          \
    DEFINE_GEMM_4BIT_SM90(NAME, T, 256, 4, 1)
