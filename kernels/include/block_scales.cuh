// The scale of a block in two steps, a load and a decode, so that a pipeline can put its latency between them.
#pragma once

#include <stdint.h>

#include "scales.cuh"

// A scale as loaded: float32 bits, or a code of the dynamic map and the scale of its group.
struct RawScale {
    uint32_t bits;
    float group;
};

// The scales of a weight [N, K]: row-major [N, blocks_per_row].
struct BlockScales {
    Scales source;  // nested where group_scale is not null
    float offset;
    const float* map;  // the dynamic map in shared memory, when nested
    int blocks_per_row;
    int shift;  // log2(block size / 64)

    __device__ __forceinline__ bool nested() const { return source.group_scale != nullptr; }

    // Of columns 64 * column64 and on. NOTE: the launcher refuses 2^31 blocks, so that this is one 32-bit operation.
    __device__ __forceinline__ RawScale load(int row, int column64) const {
        return load_at(row * blocks_per_row + (column64 >> shift));
    }

    __device__ __forceinline__ RawScale load_at(int index) const {
        const uint32_t block = static_cast<uint32_t>(index);
        RawScale raw;
        if (nested()) {
            raw.bits = __ldg(static_cast<const uint8_t*>(source.absmax) + block);
            raw.group = __ldg(source.group_scale + block / NESTED_BLOCK_SIZE);
        } else {
            raw.bits = __ldg(static_cast<const uint32_t*>(source.absmax) + block);
            raw.group = 0.f;
        }
        return raw;
    }

    // A block of Inf decodes to NaN, as on the CPU.
    __device__ __forceinline__ float decode(RawScale raw) const {
        const float value =
            nested() ? __fadd_rn(__fmul_rn(map[raw.bits], raw.group), offset) : __uint_as_float(raw.bits);
        return fabsf(value) <= 3.402823466e38f ? value : __uint_as_float(0x7fc00000u);
    }
};
