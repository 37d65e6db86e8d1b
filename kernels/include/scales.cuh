// The scale (absmax) of a block of weights: float32, or an 8-bit code of the signed dynamic map, doubly quantized.
#pragma once

#include <stdint.h>

#include "constants.cuh"

// Of one expert. Nested: absmax = map[code] * group_scale[block / 256] + offset, each step rounded to float32.
struct Scales {
    const void* absmax;        // float32 [blocks], or uint8 [blocks] when nested
    const float* group_scale;  // [ceil(blocks / 256)]
    const float* offset;       // [1]
};

// Every thread of the CTA calls this before the first `load_scale<true>`, and a barrier follows.
__device__ __forceinline__ void load_dynamic_map(float* map) {
    for (int i = threadIdx.x; i < 256; i += blockDim.x) map[i] = DYNAMIC_MAP[i];
}

template <bool NESTED>
__device__ __forceinline__ float load_scale(const Scales& scales, const float* map, float offset, int64_t block) {
    if (!NESTED) return __ldg(static_cast<const float*>(scales.absmax) + block);
    const uint8_t code = __ldg(static_cast<const uint8_t*>(scales.absmax) + block);
    const float group = __ldg(scales.group_scale + block / NESTED_BLOCK_SIZE);
    return __fadd_rn(__fmul_rn(map[code], group), offset);
}

// Zero, NaN and Inf are the scales whose blocks are not simply `table[code] * scale`.
__device__ __forceinline__ bool is_special(float scale) {
    return (__float_as_uint(scale) & 0x7fffffffu) - 1u >= 0x7f7fffffu;
}
