// arch: compute_75 compute_80
// Dequantize: out = T(table[code] * absmax), one float32 product, one rounding; bytes equal to the CPU's.
//
// Layout: codes (experts, rows, ceil(columns / 2)) u8, even element in the high nibble, or (experts, rows, columns) u8;
// scales (experts, rows, ceil(columns / block)), doubly quantized ones decoded in the same launch; out (experts, rows,
// columns) in float32, bfloat16 or float16.
// `dequantize_words_*`: columns a multiple of the block, so that an expert is one run of words of 8 weights. A lane has
//   4 or 8 words on the way; the table lies 32 times in shared memory, once for each bank, so that lookups never
//   collide. Grid: x strides over the words of an expert, y is the expert.
// `dequantize_rows_*`: any columns and byte codes; a thread takes one byte of codes.
// Bytes moved: a byte of codes and 4 of bfloat16 for two weights, and the scales: 2.56 a weight. Called by
// rust/cuda/src/dequantize.rs. compute_80 has an instruction that rounds to bfloat16. Codes outside a short table decode to NaN (the launcher pads the table so).

#include "floats.cuh"
#include "scales.cuh"

constexpr int BANKS = 32;
// Words that a lane has on the way. Measured best on an H100; nested scales need the registers.
template <bool NESTED> constexpr int WORDS_IN_FLIGHT = NESTED ? 4 : 8;

struct Table16 {
    float values[16];
};
struct Table256 {
    float values[256];
};

template <typename T> __device__ __forceinline__ T decode(float entry, float scale) {
    if (!is_special(scale)) return narrow<T>(__fmul_rn(entry, scale));
    return scale == 0.f ? narrow<T>(0.f) : canonical_nan<T>();
}

// A zero block is +0 (a product could be -0), a block of NaN or Inf all NaN.
template <typename T> __device__ __noinline__ Word<T> special_word(float scale) {
    alignas(16) T elements[WORD];
    for (int i = 0; i < WORD; i++) elements[i] = decode<T>(1.f, scale);
    return *reinterpret_cast<Word<T>*>(elements);
}

template <typename T, bool NESTED>
__device__ __forceinline__ void dequantize_words(const uint32_t* __restrict__ codes, Scales scales, T* __restrict__ out,
                                                 int64_t words, int block_shift, const Table16& table) {
    __shared__ float banked[16 * BANKS];
    __shared__ float map[NESTED ? 256 : 1];
    for (int i = threadIdx.x; i < 16 * BANKS; i += blockDim.x) banked[i] = table.values[i / BANKS];
    if (NESTED) load_dynamic_map(map);
    __syncthreads();

    const int64_t expert = blockIdx.y;
    const int64_t blocks = words >> (block_shift - 3);
    codes += expert * words;
    out += expert * words * WORD;
    const int64_t first_block = expert * blocks;
    scales.absmax = NESTED ? static_cast<const void*>(static_cast<const uint8_t*>(scales.absmax) + first_block)
                           : static_cast<const void*>(static_cast<const float*>(scales.absmax) + first_block);
    const float offset = NESTED ? scales.offset[expert] : 0.f;
    if (NESTED) scales.group_scale += expert * ((blocks + NESTED_BLOCK_SIZE - 1) / NESTED_BLOCK_SIZE);

    const char* lane_table = reinterpret_cast<const char*>(banked) + (threadIdx.x % BANKS) * sizeof(float);
    // Entry q of this lane's copy lies 128 q bytes on.
    auto entry = [&](uint32_t nibble_at_bit_7) {
        return *reinterpret_cast<const float*>(lane_table + (nibble_at_bit_7 & 0x780u));
    };
    constexpr int FLIGHT = WORDS_IN_FLIGHT<NESTED>;
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x * FLIGHT;
    for (int64_t base = static_cast<int64_t>(blockIdx.x) * blockDim.x * FLIGHT + threadIdx.x; base < words;
         base += step) {
        uint32_t word[FLIGHT];
        float scale[FLIGHT];
#pragma unroll
        for (int i = 0; i < FLIGHT; i++) {
            const int64_t at = base + static_cast<int64_t>(i) * blockDim.x;
            if (at < words) word[i] = __ldcs(codes + at);
        }
#pragma unroll
        for (int i = 0; i < FLIGHT; i++) {
            const int64_t at = base + static_cast<int64_t>(i) * blockDim.x;
            if (at < words) scale[i] = load_scale<NESTED>(scales, map, offset, at >> (block_shift - 3));
        }
#pragma unroll
        for (int i = 0; i < FLIGHT; i++) {
            const int64_t at = base + static_cast<int64_t>(i) * blockDim.x;
            if (at >= words) break;
            Word<T> values;
            const uint32_t w = word[i];
            // Byte k holds elements 2k (high nibble) and 2k + 1.
            values.set(0, __fmul_rn(entry(w << 3), scale[i]), __fmul_rn(entry(w << 7), scale[i]));
            values.set(1, __fmul_rn(entry(w >> 5), scale[i]), __fmul_rn(entry(w >> 1), scale[i]));
            values.set(2, __fmul_rn(entry(w >> 13), scale[i]), __fmul_rn(entry(w >> 9), scale[i]));
            values.set(3, __fmul_rn(entry(w >> 21), scale[i]), __fmul_rn(entry(w >> 17), scale[i]));
            if (is_special(scale[i])) values = special_word<T>(scale[i]);
            values.store(out + at * WORD);
        }
    }
}

template <typename T, bool NESTED>
__device__ __forceinline__ void dequantize_rows(const uint8_t* __restrict__ codes, Scales scales, T* __restrict__ out,
                                                int64_t rows, int64_t columns, int block_shift, bool nibbles,
                                                const Table256& table) {
    __shared__ float values[256];
    __shared__ float map[NESTED ? 256 : 1];
    for (int i = threadIdx.x; i < 256; i += blockDim.x) values[i] = table.values[i];
    if (NESTED) load_dynamic_map(map);
    __syncthreads();

    const int64_t expert = blockIdx.y;
    const int64_t bytes_per_row = nibbles ? (columns + 1) / 2 : columns;
    const int64_t blocks_per_row = (columns + (int64_t(1) << block_shift) - 1) >> block_shift;
    const int64_t blocks = rows * blocks_per_row;
    const int64_t bytes = rows * bytes_per_row;
    codes += expert * bytes;
    out += expert * rows * columns;
    scales.absmax = NESTED ? static_cast<const void*>(static_cast<const uint8_t*>(scales.absmax) + expert * blocks)
                           : static_cast<const void*>(static_cast<const float*>(scales.absmax) + expert * blocks);
    const float offset = NESTED ? scales.offset[expert] : 0.f;
    if (NESTED) scales.group_scale += expert * ((blocks + NESTED_BLOCK_SIZE - 1) / NESTED_BLOCK_SIZE);

    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; at < bytes; at += step) {
        const int64_t row = at / bytes_per_row;
        const int64_t column = (at - row * bytes_per_row) * (nibbles ? 2 : 1);
        const float scale =
            load_scale<NESTED>(scales, map, offset, row * blocks_per_row + (column >> block_shift));
        const uint32_t byte = codes[at];
        T* element = out + row * columns + column;
        element[0] = decode<T>(values[nibbles ? byte >> 4 : byte], scale);
        if (nibbles && column + 1 < columns) element[1] = decode<T>(values[byte & 15], scale);
    }
}

#define DEQUANTIZE(T, NAME, NESTED, SCALES)                                                                            \
    extern "C" __global__ void __launch_bounds__(512) dequantize_words_##NAME##_##SCALES(                              \
        const uint32_t* codes, Scales scales, T* out, int64_t words, int block_shift, Table16 table) {                 \
        dequantize_words<T, NESTED>(codes, scales, out, words, block_shift, table);                                    \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(512)                                                                  \
        dequantize_rows_##NAME##_##SCALES(const uint8_t* codes, Scales scales, T* out, int64_t rows, int64_t columns,  \
                                          int block_shift, int nibbles, Table256 table) {                              \
        dequantize_rows<T, NESTED>(codes, scales, out, rows, columns, block_shift, nibbles != 0, table);               \
    }

#define DEQUANTIZE_BOTH(T, NAME) DEQUANTIZE(T, NAME, false, plain) DEQUANTIZE(T, NAME, true, nested)

DEQUANTIZE_BOTH(float, f32)
DEQUANTIZE_BOTH(__nv_bfloat16, bf16)
DEQUANTIZE_BOTH(__half, f16)
