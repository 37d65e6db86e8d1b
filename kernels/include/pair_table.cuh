// A byte of two 4-bit codes -> two 16-bit codebook entries by one lookup in shared memory.
//
// The table of 256 pairs lies there 32 times, copy j in bank j: lane j reads its own copy, so lookups never collide.
#pragma once

#include <stdint.h>

#include "mma.cuh"

struct Codebook {
    float values[16];
};

constexpr int PAIR_TABLE_BYTES = 256 * 32 * 4;

// Every thread of the CTA calls this before the first lookup, and a barrier follows. Entries are rounded to T: 2^-9 of
// a weight for bfloat16, 2^-12 for float16.
template <typename T, int THREADS>
__device__ __forceinline__ void write_pair_table(char* table, const Codebook& codebook) {
    constexpr int SHARERS = THREADS / 256;  // threads that write one entry's eight 16-byte pieces
    static_assert(SHARERS == 1 || SHARERS == 2, "one or two threads an entry");
    const int byte = threadIdx.x % 256;
    const uint32_t pair = pack_pair<T>(codebook.values[byte >> 4], codebook.values[byte & 15]);
    uint4* entry = reinterpret_cast<uint4*>(table + byte * 128);
#pragma unroll
    for (int i = 0; i < 8 / SHARERS; i++) {
        // Lanes start at different pieces, because entries are 128 bytes apart.
        const int piece = (i + threadIdx.x / 256 * 4 + byte) & 7;
        entry[piece] = make_uint4(pair, pair, pair, pair);
    }
}

// Where the entry of byte `INDEX` (0..3) of a word of codes lies: 128 bytes for each.
template <int INDEX> __device__ __forceinline__ uint32_t entry_offset(uint32_t codes) {
    constexpr int SHIFT = 8 * INDEX - 7;
    return (SHIFT < 0 ? codes << 7 : codes >> (SHIFT < 0 ? 0 : SHIFT)) & 0x7f80u;
}

struct PairTable {
    const char* entries;  // of bank 0
    uint32_t lane;        // 4 * lane: this lane's copy

    __device__ __forceinline__ explicit PairTable(const char* table) : entries(table), lane(threadIdx.x % 32 * 4) {
        asm("" : "+r"(lane));  // hides that it is a masked value, which would cost each lookup a second logic operation
    }

    // The pair of byte `INDEX` (0..3) of a word of codes; its first element is the byte's high nibble.
    template <int INDEX> __device__ __forceinline__ uint32_t lookup(uint32_t codes) const {
        return *reinterpret_cast<const uint32_t*>(entries + (entry_offset<INDEX>(codes) | lane));
    }

    // The pairs of 8 bytes, in their order.
    __device__ __forceinline__ void decode(uint2 codes, uint32_t (&pairs)[8]) const {
        pairs[0] = lookup<0>(codes.x);
        pairs[1] = lookup<1>(codes.x);
        pairs[2] = lookup<2>(codes.x);
        pairs[3] = lookup<3>(codes.x);
        pairs[4] = lookup<0>(codes.y);
        pairs[5] = lookup<1>(codes.y);
        pairs[6] = lookup<2>(codes.y);
        pairs[7] = lookup<3>(codes.y);
    }
};

// The same for float32 pairs, 16 copies: lanes j and j + 16 read copy j, in two passes.
template <int THREADS> __device__ __forceinline__ void write_float_pair_table(char* table, const Codebook& codebook) {
    constexpr int SHARERS = THREADS / 256;
    static_assert(SHARERS == 1 || SHARERS == 2, "one or two threads an entry");
    const uint32_t byte = SHARERS == 1 ? threadIdx.x : threadIdx.x % 256;
    const uint32_t first = SHARERS == 1 ? byte : threadIdx.x / 256 * 4 + byte;
    const float even = codebook.values[byte >> 4], odd = codebook.values[byte & 15];
    float4* entry = reinterpret_cast<float4*>(table + byte * 128);
#pragma unroll
    for (int i = 0; i < 8 / SHARERS; i++) entry[(i + first) & 7] = make_float4(even, odd, even, odd);
}

struct FloatPairTable {
    const char* entries;
    uint32_t lane;      // 8 * (lane % 16): this lane's copy
    uint32_t selector;  // picks byte lane % 4 of a word

    __device__ __forceinline__ explicit FloatPairTable(const char* table)
        : entries(table), lane(threadIdx.x % 16 * 8), selector(0x4440u + threadIdx.x % 4) {
        asm("" : "+r"(lane));  // as above
    }

    __device__ __forceinline__ float2 at(uint32_t byte) const {
        return *reinterpret_cast<const float2*>(entries + (byte * 128 + lane));
    }
    // As `PairTable::lookup`.
    template <int INDEX> __device__ __forceinline__ float2 lookup(uint32_t codes) const {
        return *reinterpret_cast<const float2*>(entries + (entry_offset<INDEX>(codes) | lane));
    }

    // The weights of two rows in the columns of one byte, `BYTE` of the first row's half of a word and of the second's,
    // rounded to T once: those of the even column, and of the odd one.
    template <typename T, int BYTE>
    __device__ __forceinline__ void column_pairs(uint32_t codes, float first_scale, float second_scale, uint32_t& even,
                                                 uint32_t& odd) const {
        pack_columns<T>(lookup<BYTE>(codes), lookup<BYTE + 2>(codes), first_scale, second_scale, even, odd);
    }
    template <typename T>
    static __device__ __forceinline__ void pack_columns(float2 first, float2 second, float first_scale,
                                                        float second_scale, uint32_t& even, uint32_t& odd) {
        even = pack_pair<T>(__fmul_rn(first.x, first_scale), __fmul_rn(second.x, second_scale));
        odd = pack_pair<T>(__fmul_rn(first.y, first_scale), __fmul_rn(second.y, second_scale));
    }

    // The two weights of byte lane % 4 of a word of codes, rounded to T once, as dequantize does.
    template <typename T> __device__ __forceinline__ uint32_t scaled_pair(uint32_t codes, float scale) const {
        const float2 pair = at(__byte_perm(codes, 0, selector));
        return pack_pair<T>(__fmul_rn(pair.x, scale), __fmul_rn(pair.y, scale));
    }
};
