// The product of few tokens (M = 1 to 32) with a 4-bit weight: y = x W^T (+ bias) (+ lora_scale * xa B^T).
//
// Maths: m16n8k16 with the weight as A (16 rows of W, the output features) and the tokens as B; codes become pairs of
// 16-bit table entries, a block of 64 columns is summed by four products, its scale is one float32 multiply-add on that
// sum; bias and the low-rank term are added in float32, and the result is rounded once.
// Layout: `Linear4bit` in linear_4bit_problem.cuh. A row tile is 16 rows, a chunk is BLOCKS blocks of 64 columns, a
// stage is one row tile by one chunk, a token tile is 8 tokens.
// Grid: CTA i of G owns the row tiles [tiles * i / G, tiles * (i + 1) / G), at most ROW_TILES of them, over all of K.
// Its warps take chunks in turn: a warp keeps its chunk's tokens in registers, walks over the row tiles, and keeps one
// accumulator a tile; so there is no barrier until the warps' sums are added, in the order of the warps, at the end.
// Packed bytes stream through a ring of STAGES a warp, which is what keeps enough of them on the way to fill the memory
// bus: rows are read in pieces of 64 or 128 bytes, and no repacking is needed.
// Bytes moved: the packed weight and its scales once; x once per CTA (from the L2).
// Called by rust/cuda/src/linear_4bit.rs, with what rust/cuda/src/heuristics.rs chose.
#pragma once

#include <stdint.h>

#include "async_copy.cuh"
#include "block_scales.cuh"
#include "dependent_launch.cuh"
#include "floats.cuh"
#include "linear_4bit_problem.cuh"
#include "lora_term.cuh"
#include "mma.cuh"
#include "pair_table.cuh"
#include "weight_stage.cuh"

template <int ROW_TILES_, int TOKEN_TILES_, int WARPS_, int BLOCKS_> struct SmallShape {
    static constexpr int ROW_TILES = ROW_TILES_, TOKEN_TILES = TOKEN_TILES_, WARPS = WARPS_, BLOCKS = BLOCKS_;
    static constexpr int THREADS = 32 * WARPS;
    static constexpr int STAGES = 3;
    static constexpr int TOKENS = 8 * TOKEN_TILES;
    static constexpr int CODE_BYTES = 16 * 32 * BLOCKS;  // of a stage: 16 rows x BLOCKS blocks of 64
    static constexpr int STAGE_BYTES = CODE_BYTES + 16 * 4 * BLOCKS;
    static constexpr int MAP_BYTES = 256 * 4;
    static constexpr int SCALES_PER_LANE = 16 * BLOCKS / 32;
    // How many stages ahead of its use a scale is loaded: two where a stage's products are too many for registers to
    // matter, one where instructions are what is short.
    static constexpr int SCALES_AHEAD = TOKEN_TILES > 1 ? STAGES - 1 : 1;
    // Pairs of rows that a warp's worth of threads, or two, or half of one, write in a row at the end.
    static constexpr int PAIRS = ROW_TILES > 4 ? 64 : 8 * ROW_TILES;
    // Partial sums lie as [token][row]; the pitch keeps the stores of a fragment free of bank conflicts.
    static constexpr int PITCH = 16 * ROW_TILES + 4;
    static constexpr int SLICE = TOKENS * PITCH;  // floats
    static_assert(BLOCKS == 2 || BLOCKS == 4, "a scale or two a lane");
};

// Dynamic shared memory of a launch: the pair table, the dynamic map, the larger of the rings and the warps' sums, and
// one more slice of sums where there is a low-rank term. rust/cuda/src/heuristics.rs holds the same formula.
template <typename SHAPE> struct SmallMemory {
    static constexpr int RINGS = SHAPE::WARPS * SHAPE::STAGES * SHAPE::STAGE_BYTES;
    static constexpr int SUMS = SHAPE::WARPS * SHAPE::SLICE * 4;
    static constexpr int LORA = PAIR_TABLE_BYTES + SHAPE::MAP_BYTES + (RINGS > SUMS ? RINGS : SUMS);
};

// The low-rank term of one row tile, into the last slice of the partial sums.
template <typename T, typename SHAPE>
__device__ __forceinline__ void lora_tile(const Linear4bit<T>& p, int tile0, int tile, float* slice) {
    const int group = threadIdx.x % 32 / 4, quad = threadIdx.x % 4;
    float sum[SHAPE::TOKEN_TILES][4] = {};
    for (int k = 0; k < p.lora.rank; k += 16) {
        uint32_t a[4];
        load_rank_rows(p.lora.b, (tile0 + tile) * 16, p.N, k, p.lora.rank, a);
#pragma unroll
        for (int n = 0; n < SHAPE::TOKEN_TILES; n++) {
            uint32_t b[2];
            load_rank_tokens(p.lora.xa, n * 8, p.M, k, p.lora.rank, b);
            mma_16x8x16<T>(sum[n], a[0], a[1], a[2], a[3], b[0], b[1]);
        }
    }
#pragma unroll
    for (int n = 0; n < SHAPE::TOKEN_TILES; n++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            slice[(n * 8 + quad * 2 + i % 2) * SHAPE::PITCH + tile * 16 + group + i / 2 * 8] = sum[n][i] * p.lora.scale;
}

// A warp's ring of stages: the codes of 16 rows x BLOCKS blocks by asynchronous copies, their scales through registers.
template <typename SHAPE> struct WeightRing {
    const uint8_t* codes;
    BlockScales scales;
    char* ring;
    int first_tile, tiles, rows, row_bytes, blocks64, chunks;
    int chunk, tile, slot;                                      // of the next stage
    RawScale raw[SHAPE::SCALES_AHEAD][SHAPE::SCALES_PER_LANE];  // of the stages issued last, the oldest first

    // Issues the next stage, tiles inner and chunks outer. Addresses past the last row or column are clamped: such rows
    // are not stored, such columns meet x = 0.
    __device__ __forceinline__ void issue() {
#pragma unroll
        for (int s = 0; s < SHAPE::SCALES_AHEAD - 1; s++)
#pragma unroll
            for (int i = 0; i < SHAPE::SCALES_PER_LANE; i++) raw[s][i] = raw[s + 1][i];
        if (chunk < chunks) {
            const int lane = threadIdx.x % 32;
            constexpr int PIECES = 2 * SHAPE::BLOCKS;  // 16-byte pieces of a row; 32 / PIECES rows at once
            const int row0 = (first_tile + tile) * 16, last_row = rows - 1 - row0, lane_row = lane / PIECES;
            const int column = min(chunk * (32 * SHAPE::BLOCKS) + lane % PIECES * 16, row_bytes - 16);
            const uint8_t* from = at_row(codes + column, row0, row_bytes);
            // The permutation is the same for all of a lane's rows.
            const uint32_t to = shared_address(ring) + slot * SHAPE::STAGE_BYTES + lane_row * (32 * SHAPE::BLOCKS) +
                                swizzled_block<SHAPE::BLOCKS>(lane % PIECES / 2, lane_row) * 32 + lane % 2 * 16;
#pragma unroll
            for (int i = 0; i < SHAPE::BLOCKS; i++)
                copy_16(to + i * 512, at_row(from, min(i * (32 / PIECES) + lane_row, last_row), row_bytes));
            const int row = min(row0 + lane / 2, rows - 1);
            const int block = chunk * SHAPE::BLOCKS + lane % 2 * SHAPE::SCALES_PER_LANE;
#pragma unroll
            for (int i = 0; i < SHAPE::SCALES_PER_LANE; i++)
                raw[SHAPE::SCALES_AHEAD - 1][i] = scales.load(row, min(block + i, blocks64 - 1));
            if (++tile == tiles) {
                tile = 0;
                chunk += SHAPE::WARPS;
            }
        }
        slot = slot + 1 == SHAPE::STAGES ? 0 : slot + 1;
        commit_copies();
    }

    // Decodes the oldest scales into their stage: SCALES_AHEAD before the one to fill next.
    __device__ __forceinline__ void store_scales() { store_scales(slot - SHAPE::SCALES_AHEAD, raw[0]); }

    __device__ __forceinline__ void store_scales(int stage, const RawScale (&from)[SHAPE::SCALES_PER_LANE]) {
        const int lane = threadIdx.x % 32;
        if (stage < 0) stage += SHAPE::STAGES;
        float* to = reinterpret_cast<float*>(ring + stage * SHAPE::STAGE_BYTES + SHAPE::CODE_BYTES);
#pragma unroll
        for (int i = 0; i < SHAPE::SCALES_PER_LANE; i++) to[lane * SHAPE::SCALES_PER_LANE + i] = scales.decode(from[i]);
    }
};

// The tokens' side of a chunk in registers: lane (group, quad) holds columns 16 quad ... 16 quad + 15 of each block for
// token `group` of each token tile, which are the k-slots its bytes of the weight stand for.
template <typename T, typename SHAPE> struct TokenChunk {
    uint4 low[SHAPE::BLOCKS][SHAPE::TOKEN_TILES], high[SHAPE::BLOCKS][SHAPE::TOKEN_TILES];

    __device__ __forceinline__ void load(const Linear4bit<T>& p, int chunk) {
        const int group = threadIdx.x % 32 / 4, quad = threadIdx.x % 4;
#pragma unroll
        for (int b = 0; b < SHAPE::BLOCKS; b++)
#pragma unroll
            for (int n = 0; n < SHAPE::TOKEN_TILES; n++) {
                const int token = n * 8 + group, column = (chunk * SHAPE::BLOCKS + b) * 64 + quad * 16;
                low[b][n] = high[b][n] = make_uint4(0, 0, 0, 0);
                if (token < p.M && column < p.K) {
                    const T* x = p.x + static_cast<int64_t>(token) * p.K + column;
                    const uint4* from = reinterpret_cast<const uint4*>(x);
                    low[b][n] = __ldcg(from);
                    high[b][n] = __ldcg(from + 1);
                }
            }
    }
};

template <typename T, int N> __device__ __forceinline__ void load_floats(float (&to)[N], const T* from) {
    if (N == 4) {
        const float4 four = *reinterpret_cast<const float4*>(from);
        to[0] = four.x, to[1] = four.y, to[N - 2] = four.z, to[N - 1] = four.w;
    } else {
        const float2 two = *reinterpret_cast<const float2*>(from);
        to[0] = two.x, to[1] = two.y;
    }
}

// One stage: 16 rows x BLOCKS blocks times all tokens, added to the row tile's accumulators.
template <typename T, typename SHAPE>
__device__ __forceinline__ void multiply_stage(const char* stage, const PairTable& table,
                                               const TokenChunk<T, SHAPE>& tokens,
                                               float (&sums)[SHAPE::TOKEN_TILES][4]) {
    const int group = threadIdx.x % 32 / 4, quad = threadIdx.x % 4;
    const float* scales = reinterpret_cast<const float*>(stage + SHAPE::CODE_BYTES);
    float upper_scale[SHAPE::BLOCKS], lower_scale[SHAPE::BLOCKS];
    load_floats(upper_scale, scales + group * SHAPE::BLOCKS);
    load_floats(lower_scale, scales + (group + 8) * SHAPE::BLOCKS);
#pragma unroll
    for (int b = 0; b < SHAPE::BLOCKS; b++) {
        // Rows group and group + 8 share the permutation.
        const char* at = stage + group * (32 * SHAPE::BLOCKS) + swizzled_block<SHAPE::BLOCKS>(b, group) * 32 + quad * 8;
        const uint2 upper_codes = *reinterpret_cast<const uint2*>(at);
        const uint2 lower_codes = *reinterpret_cast<const uint2*>(at + 8 * 32 * SHAPE::BLOCKS);
        uint32_t upper[8], lower[8];
        table.decode(upper_codes, upper);
        table.decode(lower_codes, lower);
#pragma unroll
        for (int n = 0; n < SHAPE::TOKEN_TILES; n++) {
            const uint4 low = tokens.low[b][n], high = tokens.high[b][n];
            float part[4] = {0.f, 0.f, 0.f, 0.f};
            mma_16x8x16<T>(part, upper[0], lower[0], upper[1], lower[1], low.x, low.y);
            mma_16x8x16<T>(part, upper[2], lower[2], upper[3], lower[3], low.z, low.w);
            mma_16x8x16<T>(part, upper[4], lower[4], upper[5], lower[5], high.x, high.y);
            mma_16x8x16<T>(part, upper[6], lower[6], upper[7], lower[7], high.z, high.w);
            sums[n][0] += part[0] * upper_scale[b];
            sums[n][1] += part[1] * upper_scale[b];
            sums[n][2] += part[2] * lower_scale[b];
            sums[n][3] += part[3] * lower_scale[b];
        }
    }
}

template <typename T, typename SHAPE>
__device__ __forceinline__ void linear_4bit(const Linear4bit<T>& p, const Codebook& codebook) {
    launch_dependents();
    extern __shared__ __align__(128) char shared[];
    char* table_memory = shared;
    float* map = reinterpret_cast<float*>(shared + PAIR_TABLE_BYTES);
    char* rings = shared + PAIR_TABLE_BYTES + SHAPE::MAP_BYTES;
    float* partial = reinterpret_cast<float*>(rings);  // [WARPS (+ 1: LoRA)][TOKENS][PITCH], once the rings are done
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / 4, quad = lane % 4;

    const int all_tiles = (p.N + 15) / 16;
    const int first_tile = static_cast<int64_t>(all_tiles) * blockIdx.x / gridDim.x;
    const int tiles = static_cast<int>(static_cast<int64_t>(all_tiles) * (blockIdx.x + 1) / gridDim.x) - first_tile;
    const int blocks64 = p.K / 64, chunks = (blocks64 + SHAPE::BLOCKS - 1) / SHAPE::BLOCKS;

    const bool nested = p.scales.group_scale != nullptr;
    const int blocks_per_row = (p.K + (1 << p.block_shift) - 1) >> p.block_shift;
    const float offset = nested ? __ldg(p.scales.offset) : 0.f;
    const BlockScales scales = {p.scales, offset, map, blocks_per_row, p.block_shift - 6};
    char* own_ring = rings + warp * (SHAPE::STAGES * SHAPE::STAGE_BYTES);
    const int own_chunks = tiles > 0 ? chunks : 0;
    WeightRing<SHAPE> ring = {p.codes,  scales,     own_ring, first_tile, tiles, p.N, p.K / 2,
                              blocks64, own_chunks, warp,     0,          0,     {}};
    static_assert(SHAPE::STAGES == 3, "two stages are issued here");
    ring.issue();
    RawScale first[SHAPE::SCALES_PER_LANE];
#pragma unroll
    for (int i = 0; i < SHAPE::SCALES_PER_LANE; i++) first[i] = ring.raw[SHAPE::SCALES_AHEAD - 1][i];
    ring.issue();
    write_pair_table<T, SHAPE::THREADS>(table_memory, codebook);
    if (nested) load_dynamic_map(map);
    __syncthreads();
    if (SHAPE::SCALES_AHEAD == 1) ring.store_scales(0, first);
    const PairTable table(table_memory);

    wait_for_previous_kernels();
    TokenChunk<T, SHAPE> tokens;
    if (warp < chunks) tokens.load(p, warp);
    // The term of rank r waits in its own slice, beyond the rings.
    float* lora_slice = reinterpret_cast<float*>(shared + SmallMemory<SHAPE>::LORA);
    if (p.lora.xa != nullptr)
        for (int tile = warp; tile < tiles; tile += SHAPE::WARPS) lora_tile<T, SHAPE>(p, first_tile, tile, lora_slice);

    float sums[SHAPE::ROW_TILES][SHAPE::TOKEN_TILES][4] = {};
    // Where registers allow, the next chunk's tokens are on the way while this one's are multiplied.
    constexpr bool AHEAD = SHAPE::BLOCKS * SHAPE::TOKEN_TILES <= 2;
    for (int chunk = warp; chunk < chunks; chunk += SHAPE::WARPS) {
        TokenChunk<T, SHAPE> next;
        if (AHEAD && chunk + SHAPE::WARPS < chunks) next.load(p, chunk + SHAPE::WARPS);
        if (!AHEAD && chunk != warp) tokens.load(p, chunk);
#pragma unroll
        for (int tile = 0; tile < SHAPE::ROW_TILES; tile++)
            if (tile < tiles) {
                ring.store_scales();
                wait_copies<SHAPE::STAGES - 2>();
                __syncwarp();  // everyone's copies and scales have landed, and the slot to refill is read
                ring.issue();
                // STAGES - 1 are on the way, so the slot to fill next is the one that has landed.
                multiply_stage<T, SHAPE>(ring.ring + ring.slot * SHAPE::STAGE_BYTES, table, tokens, sums[tile]);
            }
        if (AHEAD) tokens = next;
    }
    wait_copies<0>();
    __syncthreads();

#pragma unroll
    for (int tile = 0; tile < SHAPE::ROW_TILES; tile++)
#pragma unroll
        for (int n = 0; n < SHAPE::TOKEN_TILES; n++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                partial[warp * SHAPE::SLICE + (n * 8 + quad * 2 + i % 2) * SHAPE::PITCH + tile * 16 + group +
                        i / 2 * 8] = sums[tile][n][i];
    __syncthreads();
    const int rows = min(tiles * 16, p.N - first_tile * 16), row = threadIdx.x % SHAPE::PAIRS * 2;
    if (row >= rows) return;
    const int64_t column = static_cast<int64_t>(first_tile) * 16 + row;
    const bool both = row + 1 < rows;
    float bias[2] = {0.f, 0.f};
    if (p.bias != nullptr) {
        bias[0] = widen(load_through_l2(p.bias + column));
        if (both) bias[1] = widen(load_through_l2(p.bias + column + 1));
    }
    for (int token = threadIdx.x / SHAPE::PAIRS; token < p.M; token += SHAPE::THREADS / SHAPE::PAIRS) {
        const int at = token * SHAPE::PITCH + row;
        float2 sum = make_float2(0.f, 0.f);
        auto add = [&](const float* slice) {
            const float2 part = *reinterpret_cast<const float2*>(slice + at);
            sum.x += part.x, sum.y += part.y;
        };
#pragma unroll
        for (int w = 0; w < SHAPE::WARPS; w++) add(partial + w * SHAPE::SLICE);
        if (p.lora.xa != nullptr) add(lora_slice);
        T* to = p.y + static_cast<int64_t>(token) * p.N + column;
        if (p.N % 2 == 0) {
            *reinterpret_cast<uint32_t*>(to) = pack_pair<T>(sum.x + bias[0], sum.y + bias[1]);
        } else {
            to[0] = narrow<T>(sum.x + bias[0]);
            if (both) to[1] = narrow<T>(sum.y + bias[1]);
        }
    }
}

#define DEFINE_LINEAR_4BIT(NAME, T, ROW_TILES, TOKEN_TILES, WARPS, BLOCKS, CTAS)                                       \
    extern "C" __global__ void __launch_bounds__(32 * WARPS, CTAS)                                                     \
        NAME##_t##ROW_TILES##_n##TOKEN_TILES##_w##WARPS##_c##BLOCKS(LINEAR_4BIT_PARAMETERS(T)) {                       \
        linear_4bit<T, SmallShape<ROW_TILES, TOKEN_TILES, WARPS, BLOCKS>>(LINEAR_4BIT_PROBLEM(T), codebook);           \
    }

// The shapes that heuristics.rs chooses from; two CTAs share an SM where eight warps allow it, so that under dependent
// launch the next product's weights are on the way while this one ends.
#define DEFINE_ALL_LINEAR_4BIT(NAME, T)                                                                                \
    DEFINE_LINEAR_4BIT(NAME, T, 7, 1, 8, 4, 2)                                                                         \
    DEFINE_LINEAR_4BIT(NAME, T, 4, 1, 8, 4, 2)                                                                         \
    DEFINE_LINEAR_4BIT(NAME, T, 2, 1, 16, 2, 1)                                                                        \
    DEFINE_LINEAR_4BIT(NAME, T, 4, 2, 8, 2, 2)                                                                         \
    DEFINE_LINEAR_4BIT(NAME, T, 7, 2, 8, 4, 1)
