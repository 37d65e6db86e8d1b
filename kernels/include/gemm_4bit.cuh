// The product of 17 and more tokens with a 4-bit weight: y = x W^T (+ bias) (+ lora_scale * xa B^T), on any device.
//
// Maths: as linear_4bit.cuh (m16n8k16, a float32 scale on the sum of each block of 64 columns), but the tokens lie in
// shared memory, where all warps of the CTA read them.
// Layout: `Linear4bit` in linear_4bit_problem.cuh.
// Grid: x over tiles of TOKENS tokens, y over tiles of ROWS rows, z splits K; the CTAs of one z-column are one cluster
// (z = 1 before sm_90), which add their sums through each other's shared memory in the order of their ranks. Codes are
// decoded once per CTA (twice where two warps share rows).
// Bytes moved: the packed weight once per token tile, x once per row tile (from the L2).
// Called by rust/cuda/src/linear_4bit.rs, with what rust/cuda/src/heuristics.rs chose.
#pragma once

#include <stdint.h>

#include "async_copy.cuh"
#include "block_scales.cuh"
#include "cluster.cuh"
#include "dependent_launch.cuh"
#include "linear_4bit_problem.cuh"
#include "lora_term.cuh"
#include "mma.cuh"
#include "output_tile.cuh"
#include "pair_table.cuh"

// WARP_ROWS x (8 / WARP_ROWS) warps; a warp owns ROW_TILES tiles of 16 rows by TOKEN_TILES tiles of 8 tokens.
template <int WARP_ROWS_, int ROW_TILES_, int TOKEN_TILES_, int STAGES_> struct GemmShape {
    static constexpr int WARP_ROWS = WARP_ROWS_, ROW_TILES = ROW_TILES_, TOKEN_TILES = TOKEN_TILES_, STAGES = STAGES_;
    static constexpr int THREADS = 256;
    static constexpr int ROWS = WARP_ROWS * ROW_TILES * 16, TOKENS = 8 / WARP_ROWS * TOKEN_TILES * 8;
    // A stage is 64 columns: tokens, codes, scales.
    static constexpr int TOKEN_BYTES = TOKENS * 128, CODE_BYTES = ROWS * 32;
    static constexpr int STAGE_BYTES = TOKEN_BYTES + CODE_BYTES + ROWS * 4;
    static constexpr int MAP_BYTES = 256 * 4;
    // Sums lie as [token][row]; the pitch keeps the stores of a fragment free of bank conflicts.
    static constexpr int PITCH = ROWS + 4;
    static_assert(ROWS <= THREADS, "one scale a thread");
};

// What a CTA streams: rows and tokens of its tile, one stage of 64 columns at a time.
template <typename T, typename SHAPE> struct StageLoader {
    const Linear4bit<T>& p;
    BlockScales scales;
    uint32_t stages;  // shared address
    int row0, token0;

    __device__ __forceinline__ void issue_codes(int slot, int column64) const {
        const int row = threadIdx.x / 2, half = threadIdx.x % 2;
        if (row >= SHAPE::ROWS) return;
        const int64_t from = static_cast<int64_t>(min(row0 + row, p.N - 1)) * (p.K / 2) + column64 * 32 + half * 16;
        copy_16(stages + slot * SHAPE::STAGE_BYTES + SHAPE::TOKEN_BYTES + row * 32 + half * 16, p.codes + from);
        if (SHAPE::ROWS > SHAPE::THREADS / 2) {
            const int more = row + SHAPE::THREADS / 2;
            const int64_t more_from =
                static_cast<int64_t>(min(row0 + more, p.N - 1)) * (p.K / 2) + column64 * 32 + half * 16;
            copy_16(stages + slot * SHAPE::STAGE_BYTES + SHAPE::TOKEN_BYTES + more * 32 + half * 16,
                    p.codes + more_from);
        }
    }

    // Tokens past M are left as they are: a token's column of the product touches no other.
    __device__ __forceinline__ void issue_tokens(int slot, int column64) const {
#pragma unroll
        for (int i = 0; i < SHAPE::TOKENS * 8; i += SHAPE::THREADS) {
            const int token = (i + threadIdx.x) / 8, piece = threadIdx.x % 8;
            if (token < SHAPE::TOKENS && token0 + token < p.M)
                copy_16(stages + slot * SHAPE::STAGE_BYTES + token * 128 + (piece ^ (token & 1)) * 16,
                        p.x + static_cast<int64_t>(token0 + token) * p.K + column64 * 64 + piece * 8);
        }
    }

    __device__ __forceinline__ RawScale load_scale_of_thread(int column64) const {
        if (threadIdx.x >= SHAPE::ROWS) return {0, 0.f};
        return scales.load(min(row0 + static_cast<int>(threadIdx.x), p.N - 1), column64);
    }

    __device__ __forceinline__ void store_scale(char* memory, int slot, RawScale raw) const {
        if (threadIdx.x < SHAPE::ROWS)
            reinterpret_cast<float*>(memory + slot * SHAPE::STAGE_BYTES + SHAPE::TOKEN_BYTES +
                                     SHAPE::CODE_BYTES)[threadIdx.x] = scales.decode(raw);
    }
};

// A warp's rows of one stage: of each row tile, lane (group, quad) holds columns 16 quad ... 16 quad + 15 of rows group
// (upper) and group + 8 (lower), and their scales.
template <typename SHAPE> struct RowFragments {
    uint32_t upper[SHAPE::ROW_TILES][8], lower[SHAPE::ROW_TILES][8];
    float upper_scale[SHAPE::ROW_TILES], lower_scale[SHAPE::ROW_TILES];

    __device__ __forceinline__ void decode(const char* stage, const PairTable& table, int warp_row) {
        const char* codes = stage + SHAPE::TOKEN_BYTES + threadIdx.x % 4 * 8;
        const float* scales = reinterpret_cast<const float*>(stage + SHAPE::TOKEN_BYTES + SHAPE::CODE_BYTES);
#pragma unroll
        for (int r = 0; r < SHAPE::ROW_TILES; r++) {
            const int row = warp_row + r * 16 + threadIdx.x % 32 / 4;
            const uint2 upper_codes = *reinterpret_cast<const uint2*>(codes + row * 32);
            const uint2 lower_codes = *reinterpret_cast<const uint2*>(codes + (row + 8) * 32);
            upper_scale[r] = scales[row];
            lower_scale[r] = scales[row + 8];
            table.decode(upper_codes, upper[r]);
            table.decode(lower_codes, lower[r]);
        }
    }

    // Sixty-four ranks of the low-rank term's B instead, whose scale is the term's.
    template <typename T>
    __device__ __forceinline__ void load_ranks(const LoraTerm<T>& lora, int row0, int rows, int k) {
        const int group = threadIdx.x % 32 / 4, quad = threadIdx.x % 4;
#pragma unroll
        for (int r = 0; r < SHAPE::ROW_TILES; r++) {
            upper_scale[r] = lower_scale[r] = lora.scale;
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const int row = row0 + r * 16 + group, column = k + quad * 16 + i * 2;
                upper[r][i] = load_rank_pair(lora.b, row, rows, column, lora.rank);
                lower[r][i] = load_rank_pair(lora.b, row + 8, rows, column, lora.rank);
            }
        }
    }
};

// A warp's rows of one stage times its tokens. Columns 16 quad ... 16 quad + 15 of a token are pieces 2 quad and
// 2 quad + 1, exchanged for odd tokens.
template <typename T, typename SHAPE>
__device__ __forceinline__ void multiply_stage(const char* stage, const RowFragments<SHAPE>& rows, int warp_token,
                                               int token_tiles,
                                               float (&sums)[SHAPE::ROW_TILES][SHAPE::TOKEN_TILES][4]) {
    const int group = threadIdx.x % 32 / 4, quad = threadIdx.x % 4;
    const char* tokens = stage + (warp_token + group) * 128 + quad * 32;
    const int low_at = (group & 1) * 16, high_at = low_at ^ 16;
#pragma unroll
    for (int n = 0; n < SHAPE::TOKEN_TILES; n += 2) {
        if (n >= token_tiles) continue;
#pragma unroll
        for (int m = n; m < n + 2 && m < SHAPE::TOKEN_TILES; m++) {
            const uint4 low = *reinterpret_cast<const uint4*>(tokens + m * 1024 + low_at);
            const uint4 high = *reinterpret_cast<const uint4*>(tokens + m * 1024 + high_at);
#pragma unroll
            for (int r = 0; r < SHAPE::ROW_TILES; r++) {
                const uint32_t* a = rows.upper[r];
                const uint32_t* b = rows.lower[r];
                float part[4] = {0.f, 0.f, 0.f, 0.f};
                mma_16x8x16<T>(part, a[0], b[0], a[1], b[1], low.x, low.y);
                mma_16x8x16<T>(part, a[2], b[2], a[3], b[3], low.z, low.w);
                mma_16x8x16<T>(part, a[4], b[4], a[5], b[5], high.x, high.y);
                mma_16x8x16<T>(part, a[6], b[6], a[7], b[7], high.z, high.w);
                sums[r][m][0] += part[0] * rows.upper_scale[r];
                sums[r][m][1] += part[1] * rows.upper_scale[r];
                sums[r][m][2] += part[2] * rows.lower_scale[r];
                sums[r][m][3] += part[3] * rows.lower_scale[r];
            }
        }
    }
}

template <typename T, typename SHAPE>
__device__ __forceinline__ void gemm_4bit(const Linear4bit<T>& p, const Codebook& codebook) {
    launch_dependents();
    extern __shared__ __align__(128) char shared[];
    float* map = reinterpret_cast<float*>(shared + PAIR_TABLE_BYTES);
    char* stages = shared + PAIR_TABLE_BYTES + SHAPE::MAP_BYTES;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / 4, quad = lane % 4;
    const int token0 = blockIdx.x * SHAPE::TOKENS, row0 = blockIdx.y * SHAPE::ROWS;
    const int rank = blockIdx.z, ranks = gridDim.z;
    const int warp_row = warp % SHAPE::WARP_ROWS * SHAPE::ROW_TILES * 16;
    const int warp_token = warp / SHAPE::WARP_ROWS * SHAPE::TOKEN_TILES * 8;

    const int blocks64 = p.K / 64;
    const int begin = blocks64 * rank / ranks, count = blocks64 * (rank + 1) / ranks - begin;
    const bool nested = p.scales.group_scale != nullptr;
    const int blocks_per_row = (p.K + (1 << p.block_shift) - 1) >> p.block_shift;
    const float offset = nested ? __ldg(p.scales.offset) : 0.f;
    const BlockScales scales = {p.scales, offset, map, blocks_per_row, p.block_shift - 6};
    const StageLoader<T, SHAPE> loader = {p, scales, shared_address(stages), row0, token0};

    constexpr int AHEAD = SHAPE::STAGES - 1;  // stages on the way
    RawScale raw[AHEAD];                      // their scales
#pragma unroll
    for (int s = 0; s < AHEAD; s++) {
        if (s < count) loader.issue_codes(s, begin + s);
        raw[s] = loader.load_scale_of_thread(begin + max(min(s, count - 1), 0));
    }
    write_pair_table<T, SHAPE::THREADS>(shared, codebook);
    if (nested) load_dynamic_map(map);
    __syncthreads();
    const PairTable table(shared);

    wait_for_previous_kernels();
#pragma unroll
    for (int s = 0; s < AHEAD; s++) {
        if (s < count) loader.issue_tokens(s, begin + s);
        commit_copies();
    }
    float sums[SHAPE::ROW_TILES][SHAPE::TOKEN_TILES][4] = {};
    RowFragments<SHAPE> rows;
    const int token_tiles = (p.M - token0 - warp_token + 7) / 8;
    if (p.lora.xa != nullptr && rank == 0) {
        char* stage = stages + AHEAD * SHAPE::STAGE_BYTES;  // not yet in use
        for (int k = 0; k < p.lora.rank; k += 64) {
            rows.load_ranks(p.lora, row0 + warp_row, p.N, k);
            fill_rank_stage<T, SHAPE::TOKENS, 1>(stage, p, token0, k);
            __syncthreads();
            multiply_stage<T, SHAPE>(stage, rows, warp_token, token_tiles, sums);
            __syncthreads();
        }
    }

    int slot = 0, next_slot = AHEAD;
    for (int s = 0; s < count; s++) {
        loader.store_scale(stages, slot, raw[0]);
        wait_copies<AHEAD - 1>();
        __syncthreads();  // the stage has landed, and the slot to refill is read
        if (s + AHEAD < count) {
            loader.issue_codes(next_slot, begin + s + AHEAD);
            loader.issue_tokens(next_slot, begin + s + AHEAD);
        }
        commit_copies();
#pragma unroll
        for (int i = 0; i < AHEAD - 1; i++) raw[i] = raw[i + 1];
        raw[AHEAD - 1] = loader.load_scale_of_thread(begin + min(s + AHEAD, count - 1));
        const char* stage = stages + slot * SHAPE::STAGE_BYTES;
        rows.decode(stage, table, warp_row);
        multiply_stage<T, SHAPE>(stage, rows, warp_token, token_tiles, sums);
        slot = slot + 1 == SHAPE::STAGES ? 0 : slot + 1;
        next_slot = next_slot + 1 == SHAPE::STAGES ? 0 : next_slot + 1;
    }
    wait_copies<0>();
    __syncthreads();

    float* tile = reinterpret_cast<float*>(stages);
#pragma unroll
    for (int r = 0; r < SHAPE::ROW_TILES; r++)
#pragma unroll
        for (int n = 0; n < SHAPE::TOKEN_TILES; n++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                tile[(warp_token + n * 8 + quad * 2 + i % 2) * SHAPE::PITCH + warp_row + r * 16 + group + i / 2 * 8] =
                    sums[r][n][i];
    cluster_barrier();
    write_tile<T, SHAPE>({p.y, p.bias, p.M, p.N}, tile, row0, token0, rank, ranks);
    if (ranks > 1) cluster_barrier();  // a CTA's shared memory must outlive its readers
}

#define DEFINE_GEMM_4BIT(NAME, T, WARP_ROWS, ROW_TILES, TOKEN_TILES, STAGES, CTAS)                                     \
    extern "C" __global__ void __launch_bounds__(256, CTAS)                                                            \
        NAME##_w##WARP_ROWS##_r##ROW_TILES##_n##TOKEN_TILES##_s##STAGES(LINEAR_4BIT_PARAMETERS(T)) {                   \
        gemm_4bit<T, GemmShape<WARP_ROWS, ROW_TILES, TOKEN_TILES, STAGES>>(LINEAR_4BIT_PROBLEM(T), codebook);          \
    }

// 128 rows by 64 and 128 tokens. Three stages of the second fit the 99 KB of sm_86, sm_89 and sm_120.
#define DEFINE_ALL_GEMM_4BIT(NAME, T)                                                                                  \
    DEFINE_GEMM_4BIT(NAME, T, 8, 1, 8, 4, 2)                                                                           \
    DEFINE_GEMM_4BIT(NAME, T, 4, 2, 8, 3, 1)
