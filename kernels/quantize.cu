// arch: compute_75 compute_80 compute_90
// Quantize: absmax of each block, code = index of the table entry nearest to v * (1 / absmax); bytes equal to the CPU's.
//
// Layout: as dequantize.cu. A block never crosses a row. The reciprocal and the product are rounded as IEEE says, and
// blocks whose absmax is subnormal are first multiplied by 2^64, which is exact.
// `quantize_words_*`: columns a multiple of a block of 32 to 256. A lane holds WORDS_IN_FLIGHT words of 8 weights, 4 to
//   32 neighbouring lanes own a block: absmax by shuffles. The code by a table of 32 cells over [-1, 1]: a cell knows the
//   code below the one threshold that lies in it, and one exact comparison is left; 16 copies of the table keep lookups
//   apart. For blocks of 64 a CTA's scales are one run of double quantization's tree, whose sum it may leave behind. On
//   sm_90 it starts while the kernel before it ends. Bytes moved: 2.56 a bfloat16 weight.
// `quantize_rows_*`: everything else (any columns, blocks to 4096, byte codes, tables whose thresholds share cells): a
//   warp owns a block, reads it twice, and searches the thresholds.
// Grid: a CTA takes WORDS_IN_FLIGHT words a thread, or strides over blocks. `nonfinite`, when not null, is set to 1 where a
// block holds NaN or Inf; such a block has that absmax and the code of zero. `run_sums` is null where they are not
// wanted. Called by rust/cuda/src/quantize.rs.

#include "dependent_launch.cuh"
#include "floats.cuh"
#include "normalizer.cuh"
#include "scale_tree.cuh"

constexpr int THREADS = 512;
constexpr int WORDS_IN_FLIGHT = 4;
constexpr int CELLS = 32;
constexpr int CELL_COPIES = 16;
// Added to 15 x it leaves floor(15 x + 16.5), the cell, at bit 7 and up: the byte offset of the cell's 16 copies.
constexpr float CELLS_PER_UNIT = 15.f;
constexpr float CELL_MAGIC = 98304.f + 16.5f;
constexpr uint32_t CELL_MASK = 0xf80;

struct Cell {
    float threshold;  // infinity where the cell has none
    uint32_t below;   // the code below it; above it is the next
};
struct CellTable {
    Cell cells[CELLS];
};
static_assert(sizeof(Cell) * CELL_COPIES == 128, "a cell's copies are what bit 7 counts");
// What blocks that take no table look-up need: thresholds are ascending, `code_of_rank` permutes (FP4 is not sorted).
struct Search {
    float thresholds[256];  // padded with infinity to the next power of two less one
    uint64_t code_of_rank;  // nibble r is the code of rank r; not used for byte codes
    int steps;              // halvings of the padded thresholds: 4 or 8
    uint32_t zero_code;
    int nibbles;
};

// Magnitudes order as integers do, NaN above Inf above all: the bits of the largest.
__device__ __forceinline__ uint32_t largest(const Word<float>& word) {
    uint32_t top = 0;
#pragma unroll
    for (int pair = 0; pair < WORD / 2; pair++) {
        const float2 both = word.get(pair);
        top = max(top, max(magnitude(both.x), magnitude(both.y)));
    }
    return top;
}
// 16-bit floats: two at a time. The result is the bits of the same type, in the low half.
template <typename T> __device__ __forceinline__ uint32_t largest(const Word<T>& word) {
    uint32_t top = 0;
#pragma unroll
    for (int pair = 0; pair < WORD / 2; pair++) top = __vmaxu2(top, word.half(pair) & 0x7fff7fffu);
    return max(top >> 16, top & 0xffffu);
}

template <typename T> __device__ __forceinline__ float absmax_of(uint32_t bits);
template <> __device__ __forceinline__ float absmax_of<float>(uint32_t bits) { return __uint_as_float(bits); }
template <> __device__ __forceinline__ float absmax_of<__nv_bfloat16>(uint32_t bits) {
    return __uint_as_float(bits << 16);
}
template <> __device__ __forceinline__ float absmax_of<__half>(uint32_t bits) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

// Multiplied by 1 a value stays what it is: only words of subnormal blocks need the first product.
template <bool LIFTED, typename T>
__device__ __forceinline__ uint32_t encode_word(const Word<T>& word, const Normalizer& normalize, const char* cells,
                                                uint32_t lane_copy) {
    uint32_t packed = 0;
#pragma unroll
    for (int pair = 0; pair < WORD / 2; pair++) {
        const float2 both = word.get(pair);
#pragma unroll
        for (int odd = 0; odd < 2; odd++) {
            const float value = odd ? both.y : both.x;
            const float x = LIFTED ? normalize(value) : __fmul_rn(value, normalize.inverse);
            const uint32_t at = (__float_as_uint(__fmaf_rn(x, CELLS_PER_UNIT, CELL_MAGIC)) & CELL_MASK) | lane_copy;
            const Cell cell = *reinterpret_cast<const Cell*>(cells + at);
            const int shift = 8 * pair + (odd ? 0 : 4);
            packed += cell.below << shift;
            if (x > cell.threshold) packed += 1u << shift;
        }
    }
    return packed;
}

template <typename T>
__device__ __forceinline__ void quantize_words(const T* __restrict__ weight, uint32_t* __restrict__ codes,
                                               float* __restrict__ absmax, int* __restrict__ nonfinite,
                                               double* __restrict__ run_sums, int* __restrict__ absent, int64_t words,
                                               int block_shift, uint32_t zero_word, const CellTable& table) {
    __shared__ Cell copies[CELLS * CELL_COPIES];
    __shared__ float scales[RUN];
    for (int i = threadIdx.x; i < CELLS * CELL_COPIES; i += THREADS) copies[i] = table.cells[i / CELL_COPIES];
    wait_for_previous_kernels();
    const int64_t start = static_cast<int64_t>(blockIdx.x) * (THREADS * WORDS_IN_FLIGHT) + threadIdx.x;
    Word<T> word[WORDS_IN_FLIGHT];
#pragma unroll
    for (int i = 0; i < WORDS_IN_FLIGHT; i++) {
        if (start + i * THREADS < words) word[i].load(weight + (start + i * THREADS) * WORD);
        else word[i] = Word<T>{};
    }
    __syncthreads();
    const char* cells = reinterpret_cast<const char*>(copies);
    const uint32_t lane_copy = threadIdx.x % CELL_COPIES * sizeof(Cell);

    const int lanes = 1 << (block_shift - 3);  // of one block; they are in one warp
#pragma unroll
    for (int i = 0; i < WORDS_IN_FLIGHT; i++) {
        const int64_t at = start + i * THREADS;
        uint32_t top = largest(word[i]);
        for (int lane = 1; lane < lanes; lane <<= 1) top = max(top, __shfl_xor_sync(WHOLE_WARP, top, lane));
        const float scale = absmax_of<T>(top);
        const bool usable = is_finite(scale) && scale > 0.f;
        const Normalizer normalize(usable ? scale : 1.f);
        uint32_t packed = normalize.lift == 1.f ? encode_word<false>(word[i], normalize, cells, lane_copy)
                                                : encode_word<true>(word[i], normalize, cells, lane_copy);
        if (!usable) packed = zero_word;
        if (at < words) __stcs(codes + at, packed);
        if ((threadIdx.x & (lanes - 1)) == 0) {
            if (run_sums != nullptr)
                scales[(i * THREADS + threadIdx.x) >> (block_shift - 3)] = at < words ? scale : 0.f;
            if (at < words) {
                absmax[at >> (block_shift - 3)] = stored(scale);
                if (!is_finite(scale) && nonfinite != nullptr) *nonfinite = 1;
            }
        }
    }
    // No earlier: the next kernel's CTAs would crowd on the few processors that run out of ours first.
    launch_dependents();
    if (run_sums == nullptr) return;
    __syncthreads();
    if (threadIdx.x < 32) sum_run(scales, run_sums + blockIdx.x, absent + blockIdx.x);
}

template <typename T>
__device__ __forceinline__ void quantize_rows(const T* __restrict__ weight, uint8_t* __restrict__ codes,
                                              float* __restrict__ absmax, int* __restrict__ nonfinite, int64_t rows,
                                              int64_t columns, int block_shift, const Search& search) {
    __shared__ float thresholds[256];
    for (int i = threadIdx.x; i < 256; i += blockDim.x) thresholds[i] = search.thresholds[i];
    __syncthreads();

    const int lane = threadIdx.x % 32;
    const int64_t blocks_per_row = (columns + (int64_t(1) << block_shift) - 1) >> block_shift;
    const int64_t bytes_per_row = search.nibbles ? (columns + 1) / 2 : columns;
    const int64_t warps = static_cast<int64_t>(gridDim.x) * (blockDim.x / 32);
    auto encode = [&](float x) {
        int rank = 0;
        for (int half = 1 << (search.steps - 1); half > 0; half >>= 1)
            if (x > thresholds[rank + half - 1]) rank += half;
        return search.nibbles ? static_cast<uint32_t>(search.code_of_rank >> (4 * rank)) & 15u
                              : static_cast<uint32_t>(rank);
    };
    for (int64_t block = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
         block < rows * blocks_per_row; block += warps) {
        const int64_t row = block / blocks_per_row;
        const int64_t first = (block - row * blocks_per_row) << block_shift;
        const int size = static_cast<int>(min(columns - first, int64_t(1) << block_shift));
        const T* values = weight + row * columns + first;
        uint32_t top = 0;
        for (int i = lane; i < size; i += 32) top = max(top, magnitude(widen(values[i])));
        for (int other = 16; other > 0; other >>= 1) top = max(top, __shfl_xor_sync(WHOLE_WARP, top, other));
        const float scale = __uint_as_float(top);
        const bool usable = is_finite(scale) && scale > 0.f;
        const Normalizer normalize(usable ? scale : 1.f);
        auto code_at = [&](int i) {
            if (!usable || i >= size) return search.zero_code;  // beyond an odd row: padding
            return encode(normalize(widen(values[i])));
        };
        uint8_t* out = codes + row * bytes_per_row + (search.nibbles ? first / 2 : first);
        const int bytes = search.nibbles ? (size + 1) / 2 : size;
        for (int i = lane; i < bytes; i += 32)
            out[i] = static_cast<uint8_t>(search.nibbles ? code_at(2 * i) << 4 | code_at(2 * i + 1) : code_at(i));
        if (lane == 0) {
            absmax[block] = stored(scale);
            if (!is_finite(scale) && nonfinite != nullptr) *nonfinite = 1;
        }
    }
}

#define QUANTIZE(T, NAME)                                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS, sizeof(T) == 2 ? 4 : 2)                                      \
        quantize_words_##NAME(const T* weight, uint32_t* codes, float* absmax, int* nonfinite, double* run_sums,       \
                              int* absent, int64_t words, int block_shift, uint32_t zero_word, CellTable table) {      \
        quantize_words<T>(weight, codes, absmax, nonfinite, run_sums, absent, words, block_shift, zero_word, table);   \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
        quantize_rows_##NAME(const T* weight, uint8_t* codes, float* absmax, int* nonfinite, int64_t rows,             \
                             int64_t columns, int block_shift, Search search) {                                        \
        quantize_rows<T>(weight, codes, absmax, nonfinite, rows, columns, block_shift, search);                        \
    }

QUANTIZE(float, f32)
QUANTIZE(__nv_bfloat16, bf16)
QUANTIZE(__half, f16)
