// The product of few tokens with a 4-bit weight on Hopper: y = x W^T (+ bias) (+ lora_scale * xa B^T).
//
// Maths: codes become pairs of 16-bit table entries in registers and are the A operand of wgmma, 64 rows at a time; the
// tokens are B, in shared memory. A block of 64 columns is summed by four products, its scale is one float32
// multiply-add on that sum, made while the products of the next block run; bias and the low-rank term are added in
// float32, and the result is rounded once.
// Layout: `Linear4bit` in linear_4bit_problem.cuh. A row tile is 16 rows, a chunk is BLOCKS blocks of 64 columns (K is
// a multiple of it), a stage is one row tile by one chunk.
// Grid: x over equal runs of row tiles, z splits K over a cluster of one or two CTAs. A CTA keeps its columns of all
// tokens in shared memory; each of its four warpgroups walks over a quarter of the row tiles, four tiles at a time, a tile
// a warp, whose packed bytes stream through the warp's own ring. No barrier joins the warps; what the two CTAs of a
// cluster sum apart goes from warp to warp, each CTA finishing half of the tokens.
// Bytes moved: the packed weight and its scales once; x once per CTA (from the L2).
// Called by rust/cuda/src/linear_4bit.rs, with what rust/cuda/src/heuristics.rs chose.
#pragma once

#include <stdint.h>

#include "async_copy.cuh"
#include "block_scales.cuh"
#include "cluster.cuh"
#include "dependent_launch.cuh"
#include "floats.cuh"
#include "linear_4bit_problem.cuh"
#include "lora_term.cuh"
#include "mma.cuh"
#include "pair_table.cuh"
#include "weight_stage.cuh"
#include "wgmma.cuh"

template <int TOKENS_, int STAGES_> struct ResidentShape {
    static constexpr int TOKENS = TOKENS_, STAGES = STAGES_, BLOCKS = 2;
    static constexpr int WARPS = 16, THREADS = 32 * WARPS;
    static constexpr int SUMS = TOKENS / 2;              // of a thread: 64 x TOKENS over a warpgroup
    static constexpr int SHARE = SUMS / 2;               // of a thread, that each of two CTAs finishes
    static constexpr int CODE_BYTES = 16 * 32 * BLOCKS;  // of a stage: 16 rows x BLOCKS blocks of 64
    // Scales go through the ring, or from lane to lane by shuffles where the tokens leave no room for them there.
    static constexpr bool SHUFFLES_SCALES = TOKENS > 16;
    static constexpr int STAGE_BYTES = CODE_BYTES + (SHUFFLES_SCALES ? 0 : 16 * 4 * BLOCKS);
    static constexpr int RING_BYTES = STAGES * STAGE_BYTES;
    static constexpr int MAP_BYTES = 256 * 4;
    static constexpr int TOKEN_BLOCK = TOKENS * 128;  // bytes of 64 columns of all tokens
    static constexpr int SENT_BYTES = SHARE * 32 * 4;
    static_assert(SENT_BYTES <= STAGE_BYTES, "what a warp sends waits in a slot of its ring");
    // Dynamic shared memory: pair table, dynamic map, rings, tokens, and for two CTAs what peers send and barriers.
    static constexpr int TOKENS_AT = PAIR_TABLE_BYTES + MAP_BYTES + WARPS * RING_BYTES;
    static_assert(TOKENS_AT % 1024 == 0, "products read tokens from multiples of 1024");
};

// A warp's ring of stages, filled chunk by chunk, then row tile by row tile.
template <typename SHAPE> struct TileRing {
    const uint8_t* codes;
    BlockScales scales;
    int rows, row_bytes;
    int tile, end_tile;                 // of the next stage; a warp's tiles are 4 apart
    int chunk, first_chunk, end_chunk;  // of the next stage
    uint32_t fill = 0;                  // offset of the next stage
    uint32_t copy_to, scale_to;         // shared addresses in the first stage: of what the lane copies, of its scale
    const uint8_t *upper, *lower;       // what the lane copies next: rows lane / 4 and lane / 4 + 8
    int scale_row;                      // index of the first scale of row lane / 2
    RawScale raw[SHAPE::STAGES - 1] = {};  // a lane's scale of each stage that is on the way, the oldest first

    // `ring` is a shared address.
    template <typename T>
    __device__ __forceinline__ TileRing(const Linear4bit<T>& p, const BlockScales& scales, uint32_t ring,
                                        int first_tile, int end_tile, int first_chunk, int end_chunk)
        : codes(p.codes), scales(scales), rows(p.N), row_bytes(p.K / 2), tile(first_tile),
          end_tile(first_chunk < end_chunk ? end_tile : 0), chunk(first_chunk), first_chunk(first_chunk),
          end_chunk(end_chunk) {
        const int lane = threadIdx.x % 32, block = lane % 4 / 2;
        copy_to = hold(ring + lane / 4 * 64 + swizzled_block<SHAPE::BLOCKS>(block, lane / 4) * 32 + lane % 2 * 16);
        scale_to = hold(ring + SHAPE::CODE_BYTES + lane * 4);
        if (tile < this->end_tile) start_tile();
    }

    // Rows past the last are clamped: they are not stored.
    __device__ __forceinline__ void start_tile() {
        const int lane = threadIdx.x % 32, row0 = tile * 16, last_row = rows - 1;
        const uint8_t* at = codes + chunk * 64 + lane % 4 * 16;
        upper = at_row(at, min(row0 + lane / 4, last_row), row_bytes);
        lower = at_row(at, min(row0 + lane / 4 + 8, last_row), row_bytes);
        scale_row = min(row0 + lane / 2, last_row) * scales.blocks_per_row;
    }

    // Issues the next stage.
    __device__ __forceinline__ void issue() {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < SHAPE::STAGES - 2; i++) raw[i] = raw[i + 1];
        if (tile < end_tile) {
            copy_16(copy_to + fill, upper);
            copy_16(copy_to + fill + 512, lower);
            raw[SHAPE::STAGES - 2] = scales.load_at(scale_row + ((2 * chunk + lane % 2) >> scales.shift));
            upper += 64, lower += 64;
            if (++chunk == end_chunk) {
                chunk = first_chunk;
                tile += 4;
                if (tile < end_tile) start_tile();
            }
        }
        commit_copies();
        fill = after(fill);
    }

    // The lane's scale of the oldest stage: of row lane / 2, block lane % 2. Where it is not to be shuffled, it goes into
    // that stage's slot, the one behind that to fill.
    __device__ __forceinline__ float take_scale() const {
        const float scale = scales.decode(raw[0]);
        if (!SHAPE::SHUFFLES_SCALES) store_shared(scale_to + after(fill), scale);
        return scale;
    }

    static __device__ __forceinline__ uint32_t after(uint32_t at) {
        return at + SHAPE::STAGE_BYTES == SHAPE::RING_BYTES ? 0 : at + SHAPE::STAGE_BYTES;
    }
};

// Copies the CTA's columns of all tokens to shared memory, zeros past the last token. Block b lies at b * TOKEN_BLOCK,
// in rows of 128 bytes as `describe_rows` wants them; inside a block, columns are permuted to the k-slots for which a
// thread of quad q holds neighbours: column 16 q + 4 s + 2 h + e goes to slot 16 s + 8 h + 2 q + e.
template <typename T, typename SHAPE>
__device__ __forceinline__ void load_tokens(const Linear4bit<T>& p, char* tokens, int first_column, int blocks) {
    constexpr int TILES = SHAPE::TOKENS / 8;
    for (int i = threadIdx.x; i < blocks * 16; i += SHAPE::THREADS) {
        const int half = i / 8 % 2, block = i / 16, column = first_column + block * 64 + half * 8;
        uint4 quarters[TILES][4];  // all on the way before the first is looked at
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            const int token = tile * 8 + i % 8;
            const T* from = p.x + static_cast<int64_t>(token) * p.K + column;
#pragma unroll
            for (int q = 0; q < 4; q++)
                quarters[tile][q] =
                    token < p.M ? __ldcg(reinterpret_cast<const uint4*>(from + q * 16)) : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            const int token = tile * 8 + i % 8;
            char* row = tokens + block * SHAPE::TOKEN_BLOCK + token * 128;
            const uint4(&quarter)[4] = quarters[tile];
            auto put = [&](int j, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
                *reinterpret_cast<uint4*>(row + ((half * 4 + j) ^ token % 8) * 16) = make_uint4(a, b, c, d);
            };
            put(0, quarter[0].x, quarter[1].x, quarter[2].x, quarter[3].x);
            put(1, quarter[0].y, quarter[1].y, quarter[2].y, quarter[3].y);
            put(2, quarter[0].z, quarter[1].z, quarter[2].z, quarter[3].z);
            put(3, quarter[0].w, quarter[1].w, quarter[2].w, quarter[3].w);
        }
    }
}

// A block of a stage as the A fragments of its four products; `at` is the shared address of the thread's 8 bytes of its
// upper row.
__device__ __forceinline__ void decode_block(uint32_t at, const PairTable& table, uint32_t (&weights)[16]) {
    const uint2 upper_codes = load_shared_8(at), lower_codes = load_shared_8(at + 8 * 64);
    uint32_t upper[8], lower[8];
    table.decode(upper_codes, upper);
    table.decode(lower_codes, lower);
#pragma unroll
    for (int step = 0; step < 4; step++) {
        weights[4 * step + 0] = upper[2 * step];
        weights[4 * step + 1] = lower[2 * step];
        weights[4 * step + 2] = upper[2 * step + 1];
        weights[4 * step + 3] = lower[2 * step + 1];
    }
}

// sums += part * the scales of its block: of the thread's upper and lower row.
template <int N>
__device__ __forceinline__ void add_scaled(float (&sums)[N], const float (&part)[N], float upper, float lower) {
#pragma unroll
    for (int i = 0; i < N; i++) sums[i] += part[i] * (i % 4 < 2 ? upper : lower);
}

// How the warps of one place in both CTAs of a cluster bring their sums together: rank r finishes the sums from
// r * SHARE on. What goes to the peer is copied by the copy engine, which tells the peer's barrier when it has come:
// stores would need a fence for the whole device, at which all that the warp has on the way is waited for.
template <typename SHAPE> struct Exchange {
    uint32_t received;  // shared address of what the peer sends to this warp: [SHARE][32] floats
    uint32_t barriers;  // of two: what the peer sent has come; it has read what was sent
    int rank;
    uint32_t round = 0;

    // `slot` is a shared address of SENT_BYTES that nobody writes to until this returns.
    __device__ __forceinline__ void operator()(const float (&sums)[SHAPE::SUMS], uint32_t slot,
                                               float (&finished)[SHAPE::SHARE]) {
        const uint32_t lane = threadIdx.x % 32;
        auto share_of = [&](int owner, int i) { return owner == 0 ? sums[i] : sums[SHAPE::SHARE + i]; };
        __syncwarp();  // the slot is read
#pragma unroll
        for (int i = 0; i < SHAPE::SHARE; i++) store_shared(slot + i * 128 + lane * 4, share_of(rank ^ 1, i));
        fence_for_products();
        __syncwarp();
        if (lane == 0) {
            if (round > 0) wait_for_phase(barriers + 8, (round - 1) & 1);
            expect_bytes(barriers, SHAPE::SENT_BYTES);
            copy_to_rank(received, rank ^ 1, slot, SHAPE::SENT_BYTES, barriers);
        }
        wait_for_phase(barriers, round & 1);
#pragma unroll
        for (int i = 0; i < SHAPE::SHARE; i++)
            finished[i] = share_of(rank, i) + load_shared(received + i * 128 + lane * 4);
        __syncwarp();
        if (lane == 0) {
            arrive_at_rank(barriers + 8, rank ^ 1);
            wait_copies_to_ranks();
        }
        __syncwarp();
        round++;
    }
};

template <typename T, typename SHAPE>
__device__ __forceinline__ void linear_4bit_sm90(const Linear4bit<T>& p, const Codebook& codebook) {
    launch_dependents();
    extern __shared__ __align__(1024) char shared[];
    float* map = reinterpret_cast<float*>(shared + PAIR_TABLE_BYTES);
    char* tokens = shared + SHAPE::TOKENS_AT;
    const int lane = threadIdx.x % 32, group = lane / 4, quad = lane % 4;
    // So that the compiler sees what all lanes of a warp have in common.
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
    const int rank = blockIdx.z, ranks = gridDim.z;

    const int all_tiles = (p.N + 15) / 16;
    const int least_tiles = all_tiles / gridDim.x, longer = all_tiles - least_tiles * gridDim.x;  // CTAs with one more
    const int first_tile = least_tiles * blockIdx.x + min(static_cast<int>(blockIdx.x), longer);
    const int tiles = least_tiles + (static_cast<int>(blockIdx.x) < longer);
    const int begin_tile = first_tile + tiles * (warp / 4) / 4, end_tile = first_tile + tiles * (warp / 4 + 1) / 4;
    const int chunks = p.K / (64 * SHAPE::BLOCKS);
    const int first_chunk = chunks * rank / ranks, end_chunk = chunks * (rank + 1) / ranks;

    const bool nested = p.scales.group_scale != nullptr;
    const int blocks_per_row = (p.K + (1 << p.block_shift) - 1) >> p.block_shift;
    const float offset = nested ? __ldg(p.scales.offset) : 0.f;
    const BlockScales scales = {p.scales, offset, map, blocks_per_row, p.block_shift - 6};
    const uint32_t own_ring = shared_address(shared) + PAIR_TABLE_BYTES + SHAPE::MAP_BYTES + warp * SHAPE::RING_BYTES;
    TileRing<SHAPE> ring(p, scales, own_ring, begin_tile + warp % 4, end_tile, first_chunk, end_chunk);
    const uint32_t codes_at = hold(own_ring + group * 64 + swizzled_block<SHAPE::BLOCKS>(0, group) * 32 + quad * 8);
    const uint32_t scales_at = SHAPE::SHUFFLES_SCALES ? 0 : hold(own_ring + SHAPE::CODE_BYTES + group * 8);
#pragma unroll
    for (int s = 0; s < SHAPE::STAGES - 1; s++) ring.issue();
    const int most_chunks = (chunks + ranks - 1) / ranks;
    const uint32_t received = shared_address(tokens) + most_chunks * (SHAPE::BLOCKS * SHAPE::TOKEN_BLOCK);
    const uint32_t barriers = received + SHAPE::WARPS * SHAPE::SENT_BYTES + warp * 16;
    Exchange<SHAPE> exchange = {received + warp * SHAPE::SENT_BYTES, barriers, rank};
    if (ranks > 1 && lane == 0) {
        start_barrier(barriers, 1);
        start_barrier(barriers + 8, 1);
        fence_barriers();
    }
    write_pair_table<T, SHAPE::THREADS>(shared, codebook);
    if (nested) load_dynamic_map(map);
    __syncthreads();
    const PairTable table(shared);
    const uint32_t tokens_at = shared_address(shared) + SHAPE::TOKENS_AT;

    wait_for_previous_kernels();
    load_tokens<T, SHAPE>(p, tokens, first_chunk * SHAPE::BLOCKS * 64, (end_chunk - first_chunk) * SHAPE::BLOCKS);
    fence_for_products();
    if (ranks > 1) cluster_barrier();  // peers' barriers stand
    else __syncthreads();

    // As many rounds for every warp, which lets the compiler see that they go through them together.
    const int rounds = (tiles + 15) / 16;
    for (int tile_round = 0; tile_round < rounds; tile_round++) {
        const int tile = begin_tile + tile_round * 4 + warp % 4;
        float sums[SHAPE::SUMS] = {};
        if (p.lora.xa != nullptr && rank == 0) {
            for (int k = 0; k < p.lora.rank; k += 16) {
                uint32_t a[4], b[2];
                load_rank_rows(p.lora.b, tile * 16, p.N, k, p.lora.rank, a);
#pragma unroll
                for (int n = 0; n < SHAPE::TOKENS / 8; n++) {
                    load_rank_tokens(p.lora.xa, n * 8, p.M, k, p.lora.rank, b);
                    mma_16x8x16<T>(*reinterpret_cast<float (*)[4]>(&sums[n * 4]), a[0], a[1], a[2], a[3], b[0], b[1]);
                }
            }
#pragma unroll
            for (int i = 0; i < SHAPE::SUMS; i++) sums[i] *= p.lora.scale;
        }
#pragma unroll 1
        for (int chunk = first_chunk; chunk < end_chunk; chunk++) {
            const float scale = ring.take_scale();
            wait_copies<SHAPE::STAGES - 2>();
            __syncwarp();  // everyone's copies and scales have landed, and the slot to refill is read
            ring.issue();
            // STAGES - 1 are on the way, so the slot to fill next is the one that has landed.
            float upper[2], lower[2];
            if (!SHAPE::SHUFFLES_SCALES) {
                load_shared_floats(upper, scales_at + ring.fill);
                load_shared_floats(lower, scales_at + ring.fill + 64);
            }
            const uint32_t even_at = codes_at + ring.fill;
            // From a lane, so that the compiler sees that it is the same for all: descriptors live in uniform registers.
            const uint32_t at =
                __shfl_sync(~0u, tokens_at + (chunk - first_chunk) * (2 * SHAPE::TOKEN_BLOCK), 0);
            float even[SHAPE::SUMS], odd[SHAPE::SUMS];
            uint32_t weights[16], odd_weights[16];
            decode_block(even_at, table, weights);
            FreshProduct<T, SHAPE::TOKENS>::start(even, weights, describe_rows(at));
            decode_block(even_at ^ 32, table, odd_weights);
            FreshProduct<T, SHAPE::TOKENS>::start(odd, odd_weights, describe_rows(at + SHAPE::TOKEN_BLOCK));
            if (SHAPE::SHUFFLES_SCALES) {
#pragma unroll
                for (int block = 0; block < 2; block++) {
                    upper[block] = __shfl_sync(~0u, scale, group * 2 + block);
                    lower[block] = __shfl_sync(~0u, scale, group * 2 + block + 16);
                }
            }
            wait_products<1>();
            add_scaled(sums, even, upper[0], lower[0]);
            wait_products<0>();
            add_scaled(sums, odd, upper[1], lower[1]);
        }
        if (tile >= end_tile) continue;
        const int row = tile * 16 + group;
        auto store = [&](const auto& finished, int first_token) {
            float bias[2] = {0.f, 0.f};
            if (p.bias != nullptr) {
                if (row < p.N) bias[0] = widen(load_through_l2(p.bias + row));
                if (row + 8 < p.N) bias[1] = widen(load_through_l2(p.bias + row + 8));
            }
#pragma unroll
            for (int i = 0; i < static_cast<int>(sizeof(finished) / sizeof(float)); i++) {
                const int token = first_token + i / 4 * 8 + quad * 2 + i % 2, lower_row = i % 4 / 2;
                if (token < p.M && row + lower_row * 8 < p.N)
                    p.y[static_cast<int64_t>(token) * p.N + row + lower_row * 8] =
                        narrow<T>(finished[i] + bias[lower_row]);
            }
        };
        if (ranks > 1) {
            float finished[SHAPE::SHARE];
            exchange(sums, own_ring + ring.fill, finished);  // the slot to fill next is free
            store(finished, rank * (SHAPE::TOKENS / 2));
        } else {
            store(sums, 0);
        }
    }
    wait_copies<0>();
    if (ranks > 1) cluster_barrier();  // a CTA's shared memory must outlive its peers
}

#define DEFINE_LINEAR_4BIT_SM90(NAME, T, TOKENS, STAGES)                                                               \
    extern "C" __global__ void __launch_bounds__(512, 1) NAME##_n##TOKENS##_s##STAGES(LINEAR_4BIT_PARAMETERS(T)) {     \
        linear_4bit_sm90<T, ResidentShape<TOKENS, STAGES>>(LINEAR_4BIT_PROBLEM(T), codebook);                          \
    }
