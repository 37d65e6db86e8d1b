// The gradient of x of a product of few tokens with a 4-bit weight, on any device: dx = dy W.
//
// Maths: m16n8k16 with the weight, transposed, as A (16 columns of W, the input features), the tokens as B, and the sum
// over rows of W. A weight is decoded exactly as dequantize does it (one float32 product with its scale, one rounding to
// T); sums are float32, and the result is rounded once.
// Layout: `LinearBackward4bit` in linear_backward_4bit_problem.cuh. Neighbours in a row share a byte, but A wants
// neighbours in a column: ldmatrix hands a lane the same two bytes of two rows, and the even columns of both make one
// register, the odd ones another.
// Grid: x over tiles of TOKENS tokens, y over tiles of COLUMNS columns, z splits the rows; the CTAs of one z-column are
// one cluster (z = 1 before sm_90). A CTA's rows are split once more over TEAMS teams of TEAM_WARPS warps: a team streams
// stages of 64 rows through a ring of its own, each of its warps takes 16 * COLUMN_TILES columns, and only its warps wait
// for each other. The teams' sums are added in their order, then those of the cluster in the order of the ranks.
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
#include "mma.cuh"
#include "output_tile.cuh"
#include "pair_table.cuh"

template <int COLUMN_TILES_, int TEAM_WARPS_, int TOKEN_TILES_, int STAGES_, int THREADS_> struct BackwardShape {
    static constexpr int COLUMN_TILES = COLUMN_TILES_, TEAM_WARPS = TEAM_WARPS_, TOKEN_TILES = TOKEN_TILES_;
    static constexpr int STAGES = STAGES_, THREADS = THREADS_;
    static constexpr int TEAMS = THREADS / 32 / TEAM_WARPS, TEAM_THREADS = 32 * TEAM_WARPS;
    static constexpr int TOKENS = 8 * TOKEN_TILES, COLUMNS = 16 * COLUMN_TILES * TEAM_WARPS;
    static constexpr int PIECES = COLUMNS / 32;  // 16-byte pieces of a row's codes
    // A stage is 64 rows of W: dy of all tokens, codes, scales.
    static constexpr int TOKEN_BYTES = TOKENS * 128, CODE_BYTES = 64 * COLUMNS / 2;
    // The scales of 16 rows lie 80 bytes apart, which keeps their reads free of bank conflicts.
    static constexpr int SCALE_BYTES = 4 * 80, SCALES_PER_THREAD = COLUMNS / TEAM_THREADS;
    static constexpr int STAGE_BYTES = TOKEN_BYTES + CODE_BYTES + COLUMNS / 64 * SCALE_BYTES;
    static constexpr int RING_BYTES = STAGES * STAGE_BYTES;
    static constexpr int MAP_BYTES = 256 * 4;
    // Sums lie as [token][column]; the pitch keeps the stores of a fragment free of bank conflicts.
    static constexpr int ROWS = COLUMNS;  // of the output, as write_tile calls them
    static constexpr int PITCH = COLUMNS + 4, SLICE = TOKENS * PITCH;  // floats
    static_assert(COLUMN_TILES % 2 == 0 && COLUMNS % 64 == 0, "whole pieces and blocks");
};

// Rows of a stage lie in the order in which ldmatrix takes them: row 16 q + 4 s + 2 h + e of the stage is row 2 q + e of
// matrix 2 s + h, because a lane of quad q finds 16 neighbours of a token at columns 16 q and on, of which 4 s + 2 h and
// its neighbour are the h-th pair of the s-th product.
__host__ __device__ __forceinline__ constexpr int place_of_row(int row) {
    return row / 2 % 8 * 8 + row / 16 * 2 + row % 2;
}

// Pieces are permuted so that the 8 rows of a matrix hit all banks.
template <int PIECES> __host__ __device__ __forceinline__ constexpr int place_of_piece(int piece, int place) {
    static_assert(PIECES == 2 || PIECES == 4 || PIECES == 8, "rows of 32, 64 or 128 bytes");
    return piece ^ (place % 8 / (8 / PIECES));
}

// What a team streams: 64 rows of the CTA's columns at a time.
template <typename T, typename SHAPE> struct RowLoader {
    const LinearBackward4bit<T>& p;
    BlockScales scales;
    uint32_t ring;  // shared address
    int column0, token0, thread;

    __device__ __forceinline__ void issue_codes(uint32_t slot, int row64) const {
#pragma unroll
        for (int i = 0; i < 64 * SHAPE::PIECES; i += SHAPE::TEAM_THREADS) {
            const int row = (i + thread) / SHAPE::PIECES, piece = (i + thread) % SHAPE::PIECES;
            const int place = place_of_row(row), at = min(column0 / 2 + piece * 16, p.K / 2 - 16);
            copy_16(ring + slot + SHAPE::TOKEN_BYTES + place * (SHAPE::COLUMNS / 2) +
                        place_of_piece<SHAPE::PIECES>(piece, place) * 16,
                    at_row(p.codes + at, min(row64 * 64 + row, p.N - 1), p.K / 2));
        }
    }

    // Rows past the last count as zero. Tokens past M are left as they are: a token's column of the product touches no
    // other.
    __device__ __forceinline__ void issue_tokens(uint32_t slot, int row64) const {
        const int piece = thread % 8, row = row64 * 64 + piece * 8;
        if (p.N % 8 != 0) return store_tokens(slot, row64);
        const T* from = p.dy + (row < p.N ? row : 0);
#pragma unroll
        for (int i = 0; i < SHAPE::TOKENS * 8; i += SHAPE::TEAM_THREADS) {
            const int token = (i + thread) / 8;
            if (token < SHAPE::TOKENS && token0 + token < p.M)
                copy_16_or_zeros(ring + slot + token * 128 + (piece ^ (token & 1)) * 16,
                                 from + static_cast<int64_t>(token0 + token) * p.N, row < p.N);
        }
    }

    // The same where tokens begin at no multiples of 16 bytes.
    __device__ __forceinline__ void store_tokens(uint32_t slot, int row64) const {
        const int last = min(SHAPE::TOKENS, p.M - token0) * 32;
#pragma unroll 1
        for (int i = thread; i < last; i += SHAPE::TEAM_THREADS) {
            const int token = i / 32, pair = i % 32, row = row64 * 64 + pair * 2;
            const unsigned short* from = reinterpret_cast<const unsigned short*>(p.dy) +
                                         static_cast<int64_t>(token0 + token) * p.N + row;
            uint32_t both = row < p.N ? __ldcg(from) : 0;
            if (row + 1 < p.N) both |= static_cast<uint32_t>(__ldcg(from + 1)) << 16;
            store_shared(ring + slot + token * 128 + (pair / 4 ^ (token & 1)) * 16 + pair % 4 * 4,
                         __uint_as_float(both));
        }
    }

    __device__ __forceinline__ void load_scales(int row64, RawScale (&raw)[SHAPE::SCALES_PER_THREAD]) const {
        const int last = (p.K / 64) - 1;
#pragma unroll
        for (int i = 0; i < SHAPE::SCALES_PER_THREAD; i++) {
            const int at = i * SHAPE::TEAM_THREADS + thread;
            raw[i] = scales.load(min(row64 * 64 + at % 64, p.N - 1), min(column0 / 64 + at / 64, last));
        }
    }

    __device__ __forceinline__ void store_scales(uint32_t slot, const RawScale (&raw)[SHAPE::SCALES_PER_THREAD]) const {
#pragma unroll
        for (int i = 0; i < SHAPE::SCALES_PER_THREAD; i++) {
            const int at = i * SHAPE::TEAM_THREADS + thread;
            store_shared(ring + slot + SHAPE::TOKEN_BYTES + SHAPE::CODE_BYTES + at / 64 * SHAPE::SCALE_BYTES +
                             at % 64 / 16 * 80 + at % 16 * 4,
                         scales.decode(raw[i]));
        }
    }
};

// Waits for the warps of the own team; what they wrote to shared memory before is then visible.
template <typename SHAPE> __device__ __forceinline__ void team_barrier(int team) {
    if (SHAPE::TEAM_WARPS == 1)
        __syncwarp();
    else
        asm volatile("bar.sync %0, %1;" ::"r"(team + 1), "n"(SHAPE::TEAM_THREADS) : "memory");
}

// One stage: 64 rows of a warp's columns times all tokens. Sums [r][n]: column 4 group + 2 (r % 2) + i / 2 of piece r / 2,
// token 8 n + 2 quad + i % 2.
template <typename T, typename SHAPE>
__device__ __forceinline__ void multiply_rows(uint32_t stage, int warp_piece, const FloatPairTable& table, int token_tiles,
                                              float (&sums)[SHAPE::COLUMN_TILES][SHAPE::TOKEN_TILES][4]) {
    const int lane = threadIdx.x % 32, group = lane / 4, quad = lane % 4;
    const uint32_t codes = stage + SHAPE::TOKEN_BYTES, tokens = stage + group * 128 + quad * 32;
    const uint32_t scales = codes + SHAPE::CODE_BYTES + warp_piece / 2 * SHAPE::SCALE_BYTES + quad * 80;
#pragma unroll 1  // half the code, the same speed
    for (int half = 0; half < 2; half++) {
        uint32_t weights[2][SHAPE::COLUMN_TILES][4];
        float scale[2][4];
        load_shared_floats(scale[0], scales + half * 32);
        load_shared_floats(scale[1], scales + half * 32 + 16);
#pragma unroll
        for (int c = 0; c < SHAPE::COLUMN_TILES / 2; c++) {
            uint32_t words[4];
            load_matrices_transposed(words, codes + (half * 32 + lane) * (SHAPE::COLUMNS / 2) +
                                                place_of_piece<SHAPE::PIECES>(warp_piece + c, lane) * 16);
#pragma unroll
            for (int s = 0; s < 2; s++)
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    uint32_t(&first_tile)[4] = weights[s][c * 2];
                    uint32_t(&second_tile)[4] = weights[s][c * 2 + 1];
                    const float first = scale[s][h * 2], second = scale[s][h * 2 + 1];
                    const uint32_t word = words[s * 2 + h];
                    table.column_pairs<T, 0>(word, first, second, first_tile[h * 2], first_tile[h * 2 + 1]);
                    table.column_pairs<T, 1>(word, first, second, second_tile[h * 2], second_tile[h * 2 + 1]);
                }
        }
#pragma unroll
        for (int n = 0; n < SHAPE::TOKEN_TILES; n++) {
            if (SHAPE::TOKEN_TILES > 4 && n >= token_tiles) break;
            const uint4 dy = load_shared_16(tokens + n * 1024 + (half ^ (group & 1)) * 16);
#pragma unroll
            for (int r = 0; r < SHAPE::COLUMN_TILES; r++) {
                const uint32_t* first = weights[0][r];
                const uint32_t* second = weights[1][r];
                mma_16x8x16<T>(sums[r][n], first[0], first[1], first[2], first[3], dy.x, dy.y);
                mma_16x8x16<T>(sums[r][n], second[0], second[1], second[2], second[3], dy.z, dy.w);
            }
        }
    }
}

// The teams' sums, in their order, into the first slice.
template <typename SHAPE> __device__ __forceinline__ void add_teams(float* tile) {
    if (SHAPE::TEAMS == 1) return;
    __syncthreads();
    constexpr int RUNS = SHAPE::COLUMNS / 4;
    for (int i = threadIdx.x; i < SHAPE::TOKENS * RUNS; i += SHAPE::THREADS) {
        float4* at = reinterpret_cast<float4*>(tile + i / RUNS * SHAPE::PITCH + i % RUNS * 4);
        float4 sum = at[0];
#pragma unroll
        for (int team = 1; team < SHAPE::TEAMS; team++) {
            const float4 more = at[team * (SHAPE::SLICE / 4)];
            sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
        }
        at[0] = sum;
    }
}

template <typename T, typename SHAPE>
__device__ __forceinline__ void linear_backward_4bit(const LinearBackward4bit<T>& p, const Codebook& codebook) {
    launch_dependents();
    extern __shared__ __align__(128) char shared[];
    float* map = reinterpret_cast<float*>(shared + PAIR_TABLE_BYTES);
    char* rings = shared + PAIR_TABLE_BYTES + SHAPE::MAP_BYTES;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / 4, quad = lane % 4;
    const int team = warp / SHAPE::TEAM_WARPS, warp_piece = warp % SHAPE::TEAM_WARPS * (SHAPE::COLUMN_TILES / 2);
    const int token0 = blockIdx.x * SHAPE::TOKENS, column0 = blockIdx.y * SHAPE::COLUMNS;
    const int rank = blockIdx.z, ranks = gridDim.z;

    // The team's share of the rows, 64 at a time.
    const int blocks64 = (p.N + 63) / 64, share = rank * SHAPE::TEAMS + team, shares = ranks * SHAPE::TEAMS;
    const int begin = static_cast<int>(static_cast<int64_t>(blocks64) * share / shares);
    const int count = static_cast<int>(static_cast<int64_t>(blocks64) * (share + 1) / shares) - begin;
    const int rounds = (blocks64 + shares - 1) / shares;  // of every team: the largest count
    const bool nested = p.scales.group_scale != nullptr;
    const int blocks_per_row = (p.K + (1 << p.block_shift) - 1) >> p.block_shift;
    const float offset = nested ? __ldg(p.scales.offset) : 0.f;
    const BlockScales scales = {p.scales, offset, map, blocks_per_row, p.block_shift - 6};
    const uint32_t ring = shared_address(rings) + team * SHAPE::RING_BYTES;
    const RowLoader<T, SHAPE> loader = {p, scales, ring, column0, token0, static_cast<int>(threadIdx.x) % SHAPE::TEAM_THREADS};

    constexpr int AHEAD = SHAPE::STAGES - 1;         // stages on the way
    RawScale raw[AHEAD][SHAPE::SCALES_PER_THREAD];  // their scales
#pragma unroll
    for (int s = 0; s < AHEAD; s++) {
        if (s < count) loader.issue_codes(s * SHAPE::STAGE_BYTES, begin + s);
        loader.load_scales(begin + max(min(s, count - 1), 0), raw[s]);
    }
    write_float_pair_table<SHAPE::THREADS>(shared, codebook);
    if (nested) load_dynamic_map(map);
    __syncthreads();
    const FloatPairTable table(shared);

    wait_for_previous_kernels();
#pragma unroll
    for (int s = 0; s < AHEAD; s++) {
        if (s < count) loader.issue_tokens(s * SHAPE::STAGE_BYTES, begin + s);
        commit_copies();
    }
    float sums[SHAPE::COLUMN_TILES][SHAPE::TOKEN_TILES][4] = {};
    const int token_tiles = (p.M - token0 + 7) / 8;
    uint32_t slot = 0, next_slot = AHEAD * SHAPE::STAGE_BYTES;
    // Teams go through equally many barriers, also those without a last stage: racecheck reports hazards across the barrier
    // behind the loop where they do not.
    for (int s = 0; s < rounds; s++) {
        loader.store_scales(slot, raw[0]);
        wait_copies<AHEAD - 1>();
        team_barrier<SHAPE>(team);  // the stage has landed, and the slot to refill is read
        if (s + AHEAD < count) {
            loader.issue_codes(next_slot, begin + s + AHEAD);
            loader.issue_tokens(next_slot, begin + s + AHEAD);
        }
        commit_copies();
#pragma unroll
        for (int i = 0; i < AHEAD - 1; i++)
#pragma unroll
            for (int j = 0; j < SHAPE::SCALES_PER_THREAD; j++) raw[i][j] = raw[i + 1][j];
        loader.load_scales(begin + max(min(s + AHEAD, count - 1), 0), raw[AHEAD - 1]);
        if (s < count) multiply_rows<T, SHAPE>(ring + slot, warp_piece, table, token_tiles, sums);
        slot = slot + SHAPE::STAGE_BYTES == SHAPE::RING_BYTES ? 0 : slot + SHAPE::STAGE_BYTES;
        next_slot = next_slot + SHAPE::STAGE_BYTES == SHAPE::RING_BYTES ? 0 : next_slot + SHAPE::STAGE_BYTES;
    }
    wait_copies<0>();
    __syncthreads();

    float* tile = reinterpret_cast<float*>(rings);
#pragma unroll
    for (int c = 0; c < SHAPE::COLUMN_TILES / 2; c++)
#pragma unroll
        for (int n = 0; n < SHAPE::TOKEN_TILES; n++)
#pragma unroll
            for (int i = 0; i < 2; i++)
                *reinterpret_cast<float4*>(tile + team * SHAPE::SLICE + (n * 8 + quad * 2 + i) * SHAPE::PITCH +
                                           (warp_piece + c) * 32 + group * 4) =
                    make_float4(sums[c * 2][n][i], sums[c * 2][n][i + 2], sums[c * 2 + 1][n][i],
                                sums[c * 2 + 1][n][i + 2]);
    add_teams<SHAPE>(tile);
    cluster_barrier();
    write_tile<T, SHAPE>({p.dx, nullptr, p.M, p.K}, tile, column0, token0, rank, ranks);
    if (ranks > 1) cluster_barrier();  // a CTA's shared memory must outlive its readers
}

#define DEFINE_LINEAR_BACKWARD_4BIT(NAME, T, COLUMN_TILES, TEAM_WARPS, TOKEN_TILES, STAGES, THREADS, CTAS)             \
    extern "C" __global__ void __launch_bounds__(THREADS, CTAS)                                                        \
        NAME##_c##COLUMN_TILES##_w##TEAM_WARPS##_n##TOKEN_TILES##_s##STAGES##_t##THREADS(                              \
            LINEAR_BACKWARD_4BIT_PARAMETERS(T)) {                                                                      \
        linear_backward_4bit<T, BackwardShape<COLUMN_TILES, TEAM_WARPS, TOKEN_TILES, STAGES, THREADS>>(                \
            LINEAR_BACKWARD_4BIT_PROBLEM(T), codebook);                                                                \
    }

// Tiles of 64 columns by 8, 16 and 32 tokens, and of 128 by 32. Those of 256 threads, of which a multiprocessor has two
// where it has the memory, fit the 99 KB of sm_86, sm_89 and sm_120.
#define DEFINE_ALL_LINEAR_BACKWARD_4BIT(NAME, T)                                                                       \
    DEFINE_LINEAR_BACKWARD_4BIT(NAME, T, 2, 2, 1, 4, 512, 1)                                                           \
    DEFINE_LINEAR_BACKWARD_4BIT(NAME, T, 2, 2, 2, 4, 512, 1)                                                           \
    DEFINE_LINEAR_BACKWARD_4BIT(NAME, T, 2, 2, 4, 3, 512, 1)                                                           \
    DEFINE_LINEAR_BACKWARD_4BIT(NAME, T, 2, 4, 4, 4, 512, 1)                                                           \
    DEFINE_LINEAR_BACKWARD_4BIT(NAME, T, 2, 2, 1, 4, 256, 2)                                                           \
    DEFINE_LINEAR_BACKWARD_4BIT(NAME, T, 2, 2, 2, 3, 256, 2)
