// The product of few tokens (M = 1 to 32) with a 4-bit weight: y = x W^T (+ bias) (+ lora_scale * xa B^T).
//
// Maths: m16n8k16 with the weight as A (16 rows of W, the output features) and the tokens as B; codes become pairs of
// 16-bit table entries, a block of 64 columns is summed by four products, its scale is one float32 multiply-add on that
// sum; bias and the low-rank term are added in float32, and the result is rounded once.
// Layout: `Linear4bit` in linear_4bit_problem.cuh. A row tile is 16 rows, a chunk is BLOCKS blocks of 64 columns, a
// stage is one row tile by one chunk, a token tile is 8 tokens.
// Grid: CTA (i, j) of (G, H) owns the row tiles [tiles * i / G, tiles * (i + 1) / G), at most ROW_TILES of them, over all of
// K, and TOKENS tokens from j * TOKENS on, where kernels do that; others have all tokens at once, H = 1.
// Its warps take chunks in turn: a warp keeps its chunk's tokens in registers, walks over the row tiles, and keeps one
// accumulator a tile; so there is no barrier until the warps' sums are added, in the order of the warps, at the end.
// Packed bytes stream through a ring of STAGES a warp, which is what keeps enough of them on the way to fill the memory
// bus: rows are read in pieces of 64 or 128 bytes, and no repacking is needed. Where a chunk's tokens fill the registers,
// those of the next chunk wait in shared memory.
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
    // Whether CTAs share the tokens: where registers allow to know which.
    static constexpr bool SHARES_TOKENS = BLOCKS == 2 && TOKEN_TILES <= 2;
    static constexpr int CODE_BYTES = 16 * 32 * BLOCKS;  // of a stage: 16 rows x BLOCKS blocks of 64
    static constexpr int STAGE_BYTES = CODE_BYTES + 16 * 4 * BLOCKS;
    static constexpr int MAP_BYTES = 256 * 4;
    static constexpr int SCALES_PER_LANE = 16 * BLOCKS / 32;
    // Whether a slot is refilled as soon as its product is done, so that all others are on the way meanwhile, or the one
    // before it when its product begins, so that the instructions of both overlap. 28672 x 8192 on an H100, microseconds:
    // one token 44.8 and 44.2, 32 tokens 83.5 and 86.3.
    static constexpr bool REFILLS_AFTER = TOKEN_TILES > 2;
    static constexpr int AHEAD = REFILLS_AFTER ? STAGES : STAGES - 1;  // stages issued before the first product
    // Whether the next chunk's tokens pass through shared memory; 16 tokens before sm_90 are too many for it.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    static constexpr bool STAGES_TOKENS = TOKEN_TILES > 1;
#else
    static constexpr bool STAGES_TOKENS = TOKEN_TILES > 2;
#endif
    static constexpr int TOKEN_BYTES = STAGES_TOKENS ? TOKENS * BLOCKS * 128 : 0;  // of a warp
    // Pairs of rows that a warp's worth of threads, or two, or half of one, write in a row at the end.
    static constexpr int PAIRS = ROW_TILES > 4 ? 64 : 8 * ROW_TILES;
    // Partial sums lie as [token][row]; the pitch keeps the stores of a fragment free of bank conflicts.
    static constexpr int PITCH = 16 * ROW_TILES + 4;
    static constexpr int SLICE = TOKENS * PITCH;  // floats
    static_assert(BLOCKS == 2 || BLOCKS == 4, "a scale or two a lane");
};

// Dynamic shared memory of a launch: the pair table, the dynamic map, the larger of the rings (with the tokens behind
// them) and the warps' sums, and one more slice of sums where there is a low-rank term. rust/cuda/src/heuristics.rs holds
// the same formula.
template <typename SHAPE> struct SmallMemory {
    static constexpr int CODES = SHAPE::WARPS * SHAPE::STAGES * SHAPE::STAGE_BYTES;
    static constexpr int RINGS = CODES + SHAPE::WARPS * SHAPE::TOKEN_BYTES;
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
// Stages are issued tiles inner and chunks outer.
template <typename SHAPE> struct WeightRing {
    static constexpr int PIECES = 2 * SHAPE::BLOCKS;  // 16-byte pieces of a row
    static constexpr int ROWS = 32 / PIECES;          // rows that the lanes copy at once
    static constexpr int PER_LANE = SHAPE::SCALES_PER_LANE;
    const uint8_t* codes;
    BlockScales scales;
    int first_tile, tiles, rows, row_bytes, blocks64, chunks;
    int chunk, tile = 0;         // of the next stage
    uint32_t fill = 0;           // offset of the next stage's slot
    uint32_t copy_to, scale_to;  // shared addresses in the first slot: of what the lane copies, of its scales
    const uint8_t* from;         // what the lane copies next in its first row
    int rows_below;              // rows of the weight below that one; negative beyond the last
    int scale_index[PER_LANE], scale_step, last_scale;

    // `ring` is a shared address, a multiple of 128; `chunk` is the warp's first.
    template <typename T>
    __device__ __forceinline__ WeightRing(const Linear4bit<T>& p, const BlockScales& scales, uint32_t ring,
                                          int first_tile, int tiles, int chunk)
        : codes(p.codes), scales(scales), first_tile(first_tile), tiles(tiles), rows(p.N), row_bytes(p.K / 2),
          blocks64(p.K / 64), chunk(chunk) {
        const int lane = threadIdx.x % 32, row = lane / PIECES;
        chunks = tiles > 0 ? (blocks64 + SHAPE::BLOCKS - 1) / SHAPE::BLOCKS : 0;
        // The permutation is the same for all of a lane's rows.
        copy_to = hold(ring + row * (32 * SHAPE::BLOCKS) +
                       swizzled_block<SHAPE::BLOCKS>(lane % PIECES / 2, row) * 32 + lane % 2 * 16);
        scale_to = hold(ring + SHAPE::CODE_BYTES + lane * (4 * PER_LANE));
        scale_step = hold(16 * scales.blocks_per_row);
        last_scale = rows * scales.blocks_per_row - 1;
        start_chunk();
    }

    // Columns past the last are clamped: they meet x = 0.
    __device__ __forceinline__ void start_chunk() {
        const int lane = threadIdx.x % 32, row = first_tile * 16 + lane / PIECES;
        const int column = min(chunk * (32 * SHAPE::BLOCKS) + lane % PIECES * 16, row_bytes - 16);
        from = codes + static_cast<int64_t>(row) * row_bytes + column;
        rows_below = rows - 1 - row;
        const int block = chunk * SHAPE::BLOCKS + lane % 2 * PER_LANE;
#pragma unroll
        for (int i = 0; i < PER_LANE; i++)
            scale_index[i] = (first_tile * 16 + lane / 2) * scales.blocks_per_row +
                             (min(block + i, blocks64 - 1) >> scales.shift);
    }

    // Issues the next stage; `raw` gets the lane's scales of it. Rows past the last are clamped: they are not stored.
    __device__ __forceinline__ void issue(RawScale (&raw)[PER_LANE]) {
        if (chunk < chunks) {
#pragma unroll
            for (int i = 0; i < SHAPE::BLOCKS; i++)
                copy_16(copy_to + fill + i * 512, below(from, min(i * ROWS, rows_below), row_bytes));
#pragma unroll
            for (int i = 0; i < PER_LANE; i++) raw[i] = scales.load_at(min(scale_index[i], last_scale));
            if (++tile < tiles) {
                from += 16 * row_bytes;
                rows_below -= 16;
#pragma unroll
                for (int i = 0; i < PER_LANE; i++) scale_index[i] += scale_step;
            } else {
                tile = 0;
                chunk += SHAPE::WARPS;
                start_chunk();
            }
        }
        commit_copies();
        fill = fill == LAST_SLOT ? 0 : fill + SHAPE::STAGE_BYTES;
    }

    // Decodes the scales of the stage whose slot is at `slot`.
    __device__ __forceinline__ void store_scales(uint32_t slot, const RawScale (&raw)[PER_LANE]) const {
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) store_shared(scale_to + slot + i * 4, scales.decode(raw[i]));
    }
    // The same for the stage issued last.
    __device__ __forceinline__ void store_last_scales(const RawScale (&raw)[PER_LANE]) const {
        store_scales(fill == 0 ? LAST_SLOT : fill - SHAPE::STAGE_BYTES, raw);
    }

  private:
    static constexpr uint32_t LAST_SLOT = (SHAPE::STAGES - 1) * SHAPE::STAGE_BYTES;

    static __device__ __forceinline__ const uint8_t* below(const uint8_t* base, int rows, int pitch) {
        const uint8_t* at;
        asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(at) : "r"(rows), "r"(pitch), "l"(base));
        return at;
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

    // Waits for what `load` began. Otherwise every product would: it would wait for a counter of loads that these share
    // with the scales', which have just been asked for. `zero` is 0 in a way that the compiler cannot know.
    __device__ __forceinline__ void settle(uint32_t zero) {
#pragma unroll
        for (int b = 0; b < SHAPE::BLOCKS; b++)
#pragma unroll
            for (int n = 0; n < SHAPE::TOKEN_TILES; n++)
#pragma unroll
                for (uint4* four : {&low[b][n], &high[b][n]})
                    four->x ^= zero, four->y ^= zero, four->z ^= zero, four->w ^= zero;
    }
};

// A chunk of tokens on its way through shared memory: [token][BLOCKS * 64], zeros past the last, whose 16-byte piece p
// lies at p ^ (token & 1), which keeps the reads of a fragment free of bank conflicts.
template <typename T, typename SHAPE> struct TokenStage {
    static constexpr int ROW_BYTES = SHAPE::BLOCKS * 128, PIECES = ROW_BYTES / 16;

    static __device__ __forceinline__ void issue(uint32_t to, const Linear4bit<T>& p, int chunk) {
        const int lane = threadIdx.x % 32, column = chunk * (SHAPE::BLOCKS * 64) + lane % PIECES * 8;
        const T* from = p.x + (column < p.K ? column : 0);
#pragma unroll
        for (int i = 0; i < SHAPE::TOKENS * PIECES / 32; i++) {
            const int token = i * (32 / PIECES) + lane / PIECES;
            copy_16_or_zeros(to + token * ROW_BYTES + (lane % PIECES ^ (token & 1)) * 16,
                             from + static_cast<int64_t>(min(token, p.M - 1)) * p.K, token < p.M && column < p.K);
        }
    }

    static __device__ __forceinline__ void take(const char* stage, TokenChunk<T, SHAPE>& tokens) {
        const int group = threadIdx.x % 32 / 4, quad = threadIdx.x % 4;
#pragma unroll
        for (int b = 0; b < SHAPE::BLOCKS; b++)
#pragma unroll
            for (int n = 0; n < SHAPE::TOKEN_TILES; n++) {
                const uint4* row = reinterpret_cast<const uint4*>(stage + (n * 8 + group) * ROW_BYTES);
                tokens.low[b][n] = row[(b * 8 + quad * 2) ^ (group & 1)];
                tokens.high[b][n] = row[(b * 8 + quad * 2 + 1) ^ (group & 1)];
            }
    }
};

// One stage: 16 rows x BLOCKS blocks times all tokens, added to the row tile's accumulators. Shared addresses: `codes`,
// of the lane's 8 bytes of block 0 in its upper row; `scales`, of that row's.
template <typename T, typename SHAPE>
__device__ __forceinline__ void multiply_stage(uint32_t codes, uint32_t scales, const PairTable& table,
                                               const TokenChunk<T, SHAPE>& tokens,
                                               float (&sums)[SHAPE::TOKEN_TILES][4]) {
    float upper_scale[SHAPE::BLOCKS], lower_scale[SHAPE::BLOCKS];
    load_shared_floats(upper_scale, scales);
    load_shared_floats(lower_scale, scales + 8 * 4 * SHAPE::BLOCKS);
#pragma unroll
    for (int b = 0; b < SHAPE::BLOCKS; b++) {
        // Rows group and group + 8 share the permutation.
        const uint32_t at = codes ^ b * 32;
        const uint2 upper_codes = load_shared_8(at), lower_codes = load_shared_8(at + 8 * 32 * SHAPE::BLOCKS);
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

// The part of a problem that this CTA's tokens are.
template <typename T, typename SHAPE>
__device__ __forceinline__ Linear4bit<T> of_these_tokens(const Linear4bit<T>& all) {
    Linear4bit<T> p = all;
    if (SHAPE::SHARES_TOKENS) {
        const int first = blockIdx.y * SHAPE::TOKENS;
        p.x += static_cast<int64_t>(first) * p.K;
        p.y += static_cast<int64_t>(first) * p.N;
        if (p.lora.xa != nullptr) p.lora.xa += static_cast<int64_t>(first) * p.lora.rank;
        p.M = min(p.M - first, SHAPE::TOKENS);
    }
    return p;
}

template <typename T, typename SHAPE>
__device__ __forceinline__ void linear_4bit(const Linear4bit<T>& all, const Codebook& codebook) {
    const Linear4bit<T> p = of_these_tokens<T, SHAPE>(all);
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
    const uint32_t own_ring = shared_address(rings) + warp * (SHAPE::STAGES * SHAPE::STAGE_BYTES);
    const uint32_t codes_at = hold(own_ring + group * (32 * SHAPE::BLOCKS) +
                                   swizzled_block<SHAPE::BLOCKS>(0, group) * 32 + quad * 8);
    const uint32_t scales_at = hold(own_ring + SHAPE::CODE_BYTES + group * (4 * SHAPE::BLOCKS));
    WeightRing<SHAPE> ring(p, scales, own_ring, first_tile, tiles, warp);
    // Each stage its own, or their loads would wait for each other; defined also where there are fewer stages.
    RawScale raw[SHAPE::AHEAD][SHAPE::SCALES_PER_LANE] = {};
#pragma unroll
    for (int s = 0; s < SHAPE::AHEAD; s++) ring.issue(raw[s]);
    RawScale(&last)[SHAPE::SCALES_PER_LANE] = raw[SHAPE::AHEAD - 1];
    write_pair_table<T, SHAPE::THREADS>(table_memory, codebook);
    if (nested) load_dynamic_map(map);
    __syncthreads();
#pragma unroll
    for (int s = 0; s < SHAPE::AHEAD - 1; s++) ring.store_scales(s * SHAPE::STAGE_BYTES, raw[s]);
    const PairTable table(table_memory);

    wait_for_previous_kernels();
    // Where registers allow, the next chunk's tokens are on the way while this one's are multiplied.
    constexpr bool PREFETCHES = SHAPE::BLOCKS * SHAPE::TOKEN_TILES <= 2;
    TokenChunk<T, SHAPE> tokens, next;
    const uint32_t zero = static_cast<uint32_t>(p.M) >> 31;
    auto load_tokens = [&](int chunk) {
        tokens.load(p, chunk);
        if (PREFETCHES) next.load(p, chunk + SHAPE::WARPS);
        wait_copies<SHAPE::AHEAD - 1>();  // of the chunk's first stage: all are waited for at once
        tokens.settle(zero);
    };
    load_tokens(warp);
    char* token_stage = rings + SmallMemory<SHAPE>::CODES + warp * SHAPE::TOKEN_BYTES;
    // The term of rank r waits in its own slice, beyond the rings.
    float* lora_slice = reinterpret_cast<float*>(shared + SmallMemory<SHAPE>::LORA);
    if (p.lora.xa != nullptr)
        for (int tile = warp; tile < tiles; tile += SHAPE::WARPS) lora_tile<T, SHAPE>(p, first_tile, tile, lora_slice);

    float sums[SHAPE::ROW_TILES][SHAPE::TOKEN_TILES][4] = {};
    for (int chunk = warp; chunk < chunks; chunk += SHAPE::WARPS) {
        if (SHAPE::STAGES_TOKENS) {
            if (chunk != warp) {
                // They were issued with the first stage of the chunk before.
                if (tiles >= SHAPE::AHEAD) wait_copies<SHAPE::AHEAD - 1>();
                else wait_copies<0>();
                __syncwarp();
                TokenStage<T, SHAPE>::take(token_stage, tokens);
                __syncwarp();
            }
            if (chunk + SHAPE::WARPS < chunks)
                TokenStage<T, SHAPE>::issue(shared_address(token_stage), p, chunk + SHAPE::WARPS);
        } else if (!PREFETCHES && chunk != warp) {
            load_tokens(chunk);
        }
#pragma unroll
        for (int tile = 0; tile < SHAPE::ROW_TILES; tile++)
            if (tile < tiles) {
                if (!SHAPE::REFILLS_AFTER) ring.store_last_scales(last);
                wait_copies<SHAPE::AHEAD - 1>();
                __syncwarp();  // everyone's copies and scales have landed, and the slot before is read
                if (!SHAPE::REFILLS_AFTER) ring.issue(last);
                // The slot to fill next is the oldest.
                multiply_stage<T, SHAPE>(codes_at + ring.fill, scales_at + ring.fill, table, tokens, sums[tile]);
                if (SHAPE::REFILLS_AFTER) {
                    __syncwarp();  // the slot is read
                    ring.store_last_scales(last);
                    ring.issue(last);
                }
            }
        if (PREFETCHES) {
            tokens = next;
            next.load(p, chunk + 2 * SHAPE::WARPS);
        }
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
