// The gradient of x of a product of many tokens with a 4-bit weight on Hopper: dx = dy W.
//
// Maths: the weight, transposed, is decoded into registers exactly as dequantize does (one float32 product with the scale,
// one rounding to T) and is the A operand of wgmma; the tokens are B, in shared memory, which the tensor cores read
// themselves; the sum runs over rows of W. While they work on one stage of 64 rows the next stage's weights are decoded.
// How ldmatrix turns two neighbours in a row into neighbours in a column: linear_backward_4bit.cuh.
// Layout: `LinearBackward4bit` in linear_backward_4bit_problem.cuh. A CTA of two warpgroups owns COLUMNS columns by TOKENS
// tokens; a warpgroup has TILES tiles of 64 columns.
// Grid: x over tiles of tokens, y over tiles of columns, z splits the rows; the CTAs of one z-column are one cluster,
// which add their sums through each other's shared memory in the order of their ranks.
// Bytes moved: the packed weight once per token tile, dy once per column tile (from the L2).
// Called by rust/cuda/src/linear_backward_4bit.rs, with what rust/cuda/src/heuristics.rs chose.
#pragma once

#include <stdint.h>

#include "async_copy.cuh"
#include "block_scales.cuh"
#include "cluster.cuh"
#include "dependent_launch.cuh"
#include "linear_backward_4bit_problem.cuh"
#include "load_matrix.cuh"
#include "output_tile.cuh"
#include "pair_table.cuh"
#include "wgmma.cuh"

template <int TOKENS_, int TILES_, int STAGES_> struct BackwardWarpgroupShape {
    static constexpr int TOKENS = TOKENS_, TILES = TILES_, STAGES = STAGES_;
    static constexpr int THREADS = 256, COLUMNS = 128 * TILES, ROWS = COLUMNS;  // of the output, as write_tile calls them
    static constexpr int PIECES = COLUMNS / 32;                                 // 16-byte pieces of a row's codes
    // Tokens of all stages come first: each stage of them starts at a multiple of 1024.
    static constexpr int TOKEN_BYTES = TOKENS * 128, CODE_BYTES = 64 * COLUMNS / 2, SCALE_BYTES = COLUMNS * 4;
    static constexpr int CODES = STAGES * TOKEN_BYTES, SCALES = CODES + STAGES * CODE_BYTES;
    static constexpr int MAP_BYTES = 256 * 4;
    // Sums lie as [token][column]; the pitch keeps the stores of a fragment free of bank conflicts.
    static constexpr int PITCH = COLUMNS + 4;
    static_assert(TILES == 1 || TILES == 2, "a piece of codes is shared by two warps, or has both tiles of one");
};

// Shared memory: the pair table, the dynamic map, then the stages, which the tile of sums takes over at the end.
template <typename T, typename SHAPE> struct BackwardLoader {
    const LinearBackward4bit<T>& p;
    BlockScales scales;
    char* stages;
    int column0, token0;

    // Pieces are permuted so that the 8 rows of a matrix hit all banks.
    static __device__ __forceinline__ int place_of_piece(int piece, int row) {
        return piece ^ (row % 8 / (8 / SHAPE::PIECES));
    }

    // Free of branches, which would end ptxas's pipelining of the products around them.
    __device__ __forceinline__ void issue_codes(int slot, int row64) const {
        const int piece = threadIdx.x % SHAPE::PIECES;
        const uint8_t* from = p.codes + min(column0 / 2 + piece * 16, p.K / 2 - 16);
#pragma unroll
        for (int i = 0; i < 64 * SHAPE::PIECES; i += SHAPE::THREADS) {
            const int row = (i + threadIdx.x) / SHAPE::PIECES;
            copy_16(shared_address(stages) + SHAPE::CODES + slot * SHAPE::CODE_BYTES + row * (SHAPE::COLUMNS / 2) +
                        place_of_piece(piece, row) * 16,
                    at_row(from, min(row64 * 64 + row, p.N - 1), p.K / 2));
        }
    }

    // Rows past the last count as zero.
    __device__ __forceinline__ void issue_tokens(int slot, int row64) const {
        const int piece = threadIdx.x % 8, row = row64 * 64 + piece * 8;
        const uint8_t* from = reinterpret_cast<const uint8_t*>(p.dy + (row < p.N ? row : 0));
#pragma unroll
        for (int i = 0; i < SHAPE::TOKENS * 8; i += SHAPE::THREADS) {
            const int token = (i + threadIdx.x) / 8;
            const uint32_t to = slot * SHAPE::TOKEN_BYTES + token * 128 + (piece ^ token % 8) * 16;
            copy_16_or_zeros(shared_address(stages) + to, at_row(from, min(token0 + token, p.M - 1), p.N * 2),
                             token0 + token < p.M && row < p.N);
        }
    }

    __device__ __forceinline__ RawScale load_scale_of_thread(int row64) const {
        if (threadIdx.x >= SHAPE::COLUMNS) return {0, 0.f};
        const int row = threadIdx.x % 64, column64 = column0 / 64 + threadIdx.x / 64;
        return scales.load(min(row64 * 64 + row, p.N - 1), min(column64, p.K / 64 - 1));
    }

    __device__ __forceinline__ void store_scale(int slot, RawScale raw) const {
        const float scale = scales.decode(raw);
        if (threadIdx.x < SHAPE::COLUMNS)
            reinterpret_cast<float*>(stages + SHAPE::SCALES + slot * SHAPE::SCALE_BYTES)[threadIdx.x] = scale;
    }
};

// The weights of a warp's columns in one stage, as A fragments of its four steps of 16 rows. Of each matrix of 8 rows by
// 32 columns lane (group, quad) gets two bytes of rows 2 quad and 2 quad + 1: columns 4 group ... 4 group + 3.
template <typename T, typename SHAPE> struct ColumnDecoder {
    FloatPairTable table;
    uint32_t codes, scales;  // shared addresses in the first slot: of what the lane reads first
    uint32_t first, second;  // pick the byte of a warp that has only one of the two, of either row

    __device__ __forceinline__ ColumnDecoder(const char* memory, const char* stages) : table(memory) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        const int piece = warp * SHAPE::TILES / 2, block = piece / 2;
        codes = hold(shared_address(stages) + SHAPE::CODES + lane * (SHAPE::COLUMNS / 2) +
                     BackwardLoader<T, SHAPE>::place_of_piece(piece, lane) * 16);
        scales = hold(shared_address(stages) + SHAPE::SCALES + block * 256 + lane % 4 * 8);
        first = 0x4440u + warp % 2;
        second = first + 2;
    }

    __device__ __forceinline__ void decode(int slot, uint32_t (&weights)[SHAPE::TILES][16]) const {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            uint32_t words[4];
            load_matrices_transposed(words, codes + slot * SHAPE::CODE_BYTES + half * 32 * (SHAPE::COLUMNS / 2));
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float scale[2];
                load_shared_floats(scale, scales + slot * SHAPE::SCALE_BYTES + half * 128 + j * 32);
                // Matrix j is half of a step of 16 rows.
                const int to = half * 8 + j * 2;
                if (SHAPE::TILES == 1) {
                    table.pack_columns<T>(table.at(__byte_perm(words[j], 0, first)),
                                          table.at(__byte_perm(words[j], 0, second)), scale[0], scale[1],
                                          weights[0][to], weights[0][to + 1]);
                } else {
                    uint32_t(&last)[16] = weights[SHAPE::TILES - 1];
                    table.column_pairs<T, 0>(words[j], scale[0], scale[1], weights[0][to], weights[0][to + 1]);
                    table.column_pairs<T, 1>(words[j], scale[0], scale[1], last[to], last[to + 1]);
                }
            }
        }
    }
};

template <typename T, typename SHAPE>
__device__ __forceinline__ void linear_backward_4bit_sm90(const LinearBackward4bit<T>& p, const Codebook& codebook) {
    launch_dependents();
    extern __shared__ __align__(1024) char shared[];
    float* map = reinterpret_cast<float*>(shared + PAIR_TABLE_BYTES);
    char* stages = shared + PAIR_TABLE_BYTES + SHAPE::MAP_BYTES;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / 4, quad = lane % 4;
    const int token0 = blockIdx.x * SHAPE::TOKENS, column0 = blockIdx.y * SHAPE::COLUMNS;
    const int rank = blockIdx.z, ranks = gridDim.z;

    const int blocks64 = (p.N + 63) / 64;
    const int begin = blocks64 * rank / ranks, count = blocks64 * (rank + 1) / ranks - begin;
    const bool nested = p.scales.group_scale != nullptr;
    const int blocks_per_row = (p.K + (1 << p.block_shift) - 1) >> p.block_shift;
    const float offset = nested ? __ldg(p.scales.offset) : 0.f;
    const BlockScales scales = {p.scales, offset, map, blocks_per_row, p.block_shift - 6};
    const BackwardLoader<T, SHAPE> loader = {p, scales, stages, column0, token0};

    // Two stages are being multiplied or decoded, the others are on the way.
    constexpr int AHEAD = SHAPE::STAGES - 2;
    // The rows of stage s; past the end the last stage is fetched again, which keeps branches out and costs little.
    auto row64 = [&](int s) { return begin + max(min(s, count - 1), 0); };
    // Scales on the way, of the stages after the one being decoded. Where registers allow, the loop is unrolled over them,
    // so that each stays where it was loaded: a copy would wait for it.
    constexpr int RUN = SHAPE::TILES == 1 ? AHEAD : 1;
    RawScale raw[AHEAD];
#pragma unroll
    for (int s = 0; s < AHEAD; s++) {
        loader.issue_codes(s, row64(s));
        raw[s] = loader.load_scale_of_thread(row64(s));
    }
    auto next_scale = [&](int slot, int s, int oldest) {
        loader.store_scale(slot, raw[oldest]);
        if (RUN == 1) {
#pragma unroll
            for (int i = 0; i < AHEAD - 1; i++) raw[i] = raw[i + 1];
            oldest = AHEAD - 1;
        }
        raw[oldest] = loader.load_scale_of_thread(row64(s + AHEAD));
    };
    write_float_pair_table<SHAPE::THREADS>(shared, codebook);
    if (nested) load_dynamic_map(map);
    __syncthreads();
    next_scale(0, 0, 0);
    const ColumnDecoder<T, SHAPE> decoder(shared, stages);

    wait_for_previous_kernels();
#pragma unroll
    for (int s = 0; s < AHEAD; s++) {
        loader.issue_tokens(s, row64(s));
        commit_copies();
    }
    float sums[SHAPE::TILES][SHAPE::TOKENS / 2] = {};
    uint32_t weights[SHAPE::TILES][16], next_weights[SHAPE::TILES][16];
    const uint32_t zero = p.M < 0;
    // Stage 0 has no products to hide behind.
    wait_copies<AHEAD - 1>();
    fence_for_products();
    __syncthreads();
    decoder.decode(0, weights);
    int slot = 0, next_slot = 1 % SHAPE::STAGES, free_slot = AHEAD;
    for (int run = 0; run < count; run += RUN) {
#pragma unroll
        for (int i = 0; i < RUN; i++) {
            const int s = run + i;
            if (s >= count) break;
            const uint64_t tokens = describe_rows(shared_address(stages) + slot * SHAPE::TOKEN_BYTES);
#pragma unroll
            for (int t = 0; t < SHAPE::TILES; t++)
                WarpgroupProduct<T, SHAPE::TOKENS>::start(sums[t], weights[t], tokens);

            // Meanwhile the slot of the stage before last is filled again, and the next stage is decoded.
            next_scale(next_slot, s + 1, (i + 1) % RUN);
            loader.issue_codes(free_slot, row64(s + AHEAD));
            loader.issue_tokens(free_slot, row64(s + AHEAD));
            commit_copies();
            wait_copies<AHEAD - 1>();
            fence_for_products();
            __syncthreads();  // the next stage has landed, and the products of the stage before are done in all warps
            decoder.decode(next_slot, next_weights);
            wait_products<0>();
#pragma unroll
            for (int t = 0; t < SHAPE::TILES; t++)
#pragma unroll
                for (int j = 0; j < 16; j++) weights[t][j] = take_after_wait(next_weights[t][j], zero);
            slot = next_slot;
            next_slot = next_slot + 1 == SHAPE::STAGES ? 0 : next_slot + 1;
            free_slot = free_slot + 1 == SHAPE::STAGES ? 0 : free_slot + 1;
        }
    }
    wait_copies<0>();
    __syncthreads();

    // Row `group` of a warp's 16 is an even column, row group + 8 the odd one beside it.
    float* tile = reinterpret_cast<float*>(stages);
    const int column = warp * SHAPE::TILES / 2 * 32 + (SHAPE::TILES == 1 ? warp % 2 * 2 : 0) + group * 4;
#pragma unroll
    for (int t = 0; t < SHAPE::TILES; t++)
#pragma unroll
        for (int n = 0; n < SHAPE::TOKENS / 8; n++)
#pragma unroll
            for (int i = 0; i < 2; i++)
                *reinterpret_cast<float2*>(tile + (n * 8 + quad * 2 + i) * SHAPE::PITCH + column + t * 2) =
                    make_float2(sums[t][n * 4 + i], sums[t][n * 4 + i + 2]);
    cluster_barrier();
    write_tile<T, SHAPE>({p.dx, nullptr, p.M, p.K}, tile, column0, token0, rank, ranks);
    if (ranks > 1) cluster_barrier();  // a CTA's shared memory must outlive its readers
}

#define DEFINE_LINEAR_BACKWARD_4BIT_SM90(NAME, T, TOKENS, TILES, STAGES, CTAS)                                         \
    extern "C" __global__ void __launch_bounds__(256, CTAS)                                                            \
        NAME##_n##TOKENS##_t##TILES##_s##STAGES(LINEAR_BACKWARD_4BIT_PARAMETERS(T)) {                                  \
        linear_backward_4bit_sm90<T, BackwardWarpgroupShape<TOKENS, TILES, STAGES>>(LINEAR_BACKWARD_4BIT_PROBLEM(T),   \
                                                                                    codebook);                         \
    }

#define DEFINE_ALL_LINEAR_BACKWARD_4BIT_SM90(NAME, T)                                                                  \
    DEFINE_LINEAR_BACKWARD_4BIT_SM90(NAME, T, 64, 2, 6, 1)                                                             \
    DEFINE_LINEAR_BACKWARD_4BIT_SM90(NAME, T, 128, 1, 6, 1)                                                            \
    DEFINE_LINEAR_BACKWARD_4BIT_SM90(NAME, T, 256, 1, 4, 1)
