// A block of 256 elements in a warp's registers: lane l holds elements 4 l to 4 l + 3 and 128 + 4 l to 128 + 4 l + 3, so
// that each load and store of the warp is one contiguous piece, whatever the elements' size.
#pragma once

#include "floats.cuh"
#include "normalizer.cuh"
#include "optimizer_table.cuh"

constexpr int LANE_ELEMENTS = BLOCK / 32;
// Cells of a magnitude's bits, 128 an octave, from 2^-23 to 1; smaller ones are in the first. See optimizer.rs.
constexpr uint32_t CELL_SHIFT = 16;
constexpr uint32_t FIRST_CELL = 0x34000000u >> CELL_SHIFT;
constexpr uint32_t CELLS = (0x3f800000u >> CELL_SHIFT) - FIRST_CELL + 1;
constexpr int CELL_ROOM = 2960;

// The dynamic maps, [unsigned, signed], and what finds the entry nearest to a value: `below` is the number of thresholds
// below its cell, and one at most lies in that. Cells: of the unsigned map, of the signed one above zero, and below.
struct StateMaps {
    float values[2][256];
    float thresholds[2][256];  // infinity beyond the last
    uint8_t below[3][CELL_ROOM];
};
static_assert(sizeof(StateMaps) % 4 == 0 && CELLS <= CELL_ROOM, "copied by words");

// Whether a block can be read and written 4 elements at a time.
struct Extent {
    int size;    // elements, BLOCK or less
    bool whole;  // all there, and aligned
};

// An element's index in its block.
__device__ __forceinline__ int position(int element) {
    return element / 4 * (BLOCK / 2) + static_cast<int>(threadIdx.x % 32) * 4 + element % 4;
}

// BYTES an element; the words of the second half follow those of the first.
template <int BYTES> __device__ __forceinline__ void load_words(uint32_t* words, uint64_t block, Extent extent) {
    const char* at = reinterpret_cast<const char*>(block);
    if (extent.whole) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const char* from = at + position(4 * half) * BYTES;
            if constexpr (BYTES == 4) {
                const uint4 quad = __ldcs(reinterpret_cast<const uint4*>(from));
                words[4 * half] = quad.x, words[4 * half + 1] = quad.y;
                words[4 * half + 2] = quad.z, words[4 * half + 3] = quad.w;
            } else if constexpr (BYTES == 2) {
                const uint2 quad = __ldcs(reinterpret_cast<const uint2*>(from));
                words[2 * half] = quad.x, words[2 * half + 1] = quad.y;
            } else {
                words[half] = __ldcs(reinterpret_cast<const uint32_t*>(from));
            }
        }
        return;
    }
#pragma unroll
    for (int word = 0; word < 2 * BYTES; word++) words[word] = 0;
#pragma unroll
    for (int element = 0; element < LANE_ELEMENTS; element++) {
        if (position(element) >= extent.size) continue;
        const char* from = at + position(element) * BYTES;
        uint32_t bits;
        if constexpr (BYTES == 4) bits = *reinterpret_cast<const uint32_t*>(from);
        else if constexpr (BYTES == 2) bits = *reinterpret_cast<const uint16_t*>(from);
        else bits = *reinterpret_cast<const uint8_t*>(from);
        words[element * BYTES / 4] |= bits << element * BYTES % 4 * 8;
    }
}

template <int BYTES> __device__ __forceinline__ void store_words(const uint32_t* words, uint64_t block, Extent extent) {
    char* at = reinterpret_cast<char*>(block);
    if (extent.whole) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            char* to = at + position(4 * half) * BYTES;
            if constexpr (BYTES == 4) {
                __stcs(reinterpret_cast<uint4*>(to), make_uint4(words[4 * half], words[4 * half + 1],
                                                                words[4 * half + 2], words[4 * half + 3]));
            } else if constexpr (BYTES == 2) {
                __stcs(reinterpret_cast<uint2*>(to), make_uint2(words[2 * half], words[2 * half + 1]));
            } else {
                __stcs(reinterpret_cast<uint32_t*>(to), words[half]);
            }
        }
        return;
    }
#pragma unroll
    for (int element = 0; element < LANE_ELEMENTS; element++) {
        if (position(element) >= extent.size) continue;
        char* to = at + position(element) * BYTES;
        const uint32_t bits = words[element * BYTES / 4] >> element * BYTES % 4 * 8;
        if constexpr (BYTES == 4) *reinterpret_cast<uint32_t*>(to) = bits;
        else if constexpr (BYTES == 2) *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(bits);
        else *reinterpret_cast<uint8_t*>(to) = static_cast<uint8_t>(bits);
    }
}

__device__ __forceinline__ void load_floats(uint32_t* words, uint64_t block, uint32_t type, Extent extent) {
    if (type == FLOAT32) load_words<4>(words, block, extent);
    else load_words<2>(words, block, extent);
}

__device__ __forceinline__ void widen_floats(float (&values)[LANE_ELEMENTS], const uint32_t* words, uint32_t type) {
#pragma unroll
    for (int element = 0; element < LANE_ELEMENTS; element++) {
        const uint32_t narrow_bits = words[element / 2] >> element % 2 * 16 & 0xffffu;
        if (type == FLOAT32) values[element] = __uint_as_float(words[element]);
        else if (type == BFLOAT16) values[element] = __uint_as_float(narrow_bits << 16);
        else values[element] = __half2float(__ushort_as_half(static_cast<unsigned short>(narrow_bits)));
    }
}

// Rounded to nearest even; in 16 bits NaN has one form.
__device__ __forceinline__ void store_floats(const float (&values)[LANE_ELEMENTS], uint64_t block, uint32_t type,
                                             Extent extent) {
    uint32_t words[LANE_ELEMENTS];
    if (type == FLOAT32) {
#pragma unroll
        for (int element = 0; element < LANE_ELEMENTS; element++) words[element] = __float_as_uint(values[element]);
        store_words<4>(words, block, extent);
        return;
    }
#pragma unroll
    for (int word = 0; word < LANE_ELEMENTS / 2; word++) {
        uint32_t halves[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float value = values[2 * word + half];
            const bool nan = value != value;
            if (type == BFLOAT16) halves[half] = nan ? 0x7fc0u : __bfloat16_as_ushort(__float2bfloat16_rn(value));
            else halves[half] = nan ? 0x7e00u : __half_as_ushort(__float2half_rn(value));
        }
        words[word] = halves[0] | halves[1] << 16;
    }
    store_words<2>(words, block, extent);
}

// `map[code] * absmax`; a block of scale 0 is zeros, one whose scale is not finite NaN.
__device__ __forceinline__ void decode_states(float (&values)[LANE_ELEMENTS], const uint32_t* codes, float absmax,
                                              const float* map) {
    if (is_finite(absmax) && absmax != 0.f) {
#pragma unroll
        for (int element = 0; element < LANE_ELEMENTS; element++)
            values[element] = __fmul_rn(map[codes[element / 4] >> element % 4 * 8 & 0xffu], absmax);
        return;
    }
    const float special = absmax == 0.f ? 0.f : canonical_nan<float>();
#pragma unroll
    for (int element = 0; element < LANE_ELEMENTS; element++) values[element] = special;
}

// The code whose entry is nearest to x, of [-1, 1], a tie to the even one; of the unsigned map, below zero, 0.
template <bool IS_SIGNED> __device__ __forceinline__ uint32_t nearest_code(float x, const StateMaps& maps) {
    const float size = fmaxf(IS_SIGNED ? fabsf(x) : x, __uint_as_float(FIRST_CELL << CELL_SHIFT));
    uint32_t cell = (__float_as_uint(size) >> CELL_SHIFT) - FIRST_CELL + (IS_SIGNED ? CELL_ROOM : 0);
    if (IS_SIGNED) cell += (__float_as_uint(x) >> 31) * CELL_ROOM;
    const uint32_t code = maps.below[0][cell];
    return code + (x > maps.thresholds[IS_SIGNED][code] ? 1 : 0);
}

// Returns the scale; elements beyond the block's end are zero. The values are not good for anything afterwards.
template <bool IS_SIGNED>
__device__ __forceinline__ float encode_states(float (&values)[LANE_ELEMENTS], uint32_t (&codes)[2],
                                               const StateMaps& maps) {
    uint32_t top = 0;
#pragma unroll
    for (int element = 0; element < LANE_ELEMENTS; element++) top = max(top, magnitude(values[element]));
#pragma unroll
    for (int other = 16; other > 0; other >>= 1) top = max(top, __shfl_xor_sync(WHOLE_WARP, top, other));
    const float absmax = __uint_as_float(top);
    if (!is_finite(absmax) || absmax == 0.f) {
        codes[0] = codes[1] = IS_SIGNED ? 0x7f7f7f7fu : 0u;
        return stored(absmax);
    }
    const Normalizer normalize(absmax);
    if (normalize.lift != 1.f) {
#pragma unroll
        for (int element = 0; element < LANE_ELEMENTS; element++)
            values[element] = __fmul_rn(values[element], normalize.lift);
    }
    codes[0] = codes[1] = 0;
#pragma unroll
    for (int element = 0; element < LANE_ELEMENTS; element++)
        codes[element / 4] |= nearest_code<IS_SIGNED>(__fmul_rn(values[element], normalize.inverse), maps)
                              << element % 4 * 8;
    return absmax;
}
