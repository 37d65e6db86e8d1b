// The three float types of weights: how 8 of them are loaded, widened, rounded and stored.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

// Values whose largest magnitude lies below 2^-126 are first lifted by 2^64, which is exact.
constexpr float SUBNORMAL_BELOW = 1.17549435e-38f;
constexpr float LIFT = 18446744073709551616.f;

// Weights are worked on in words: 8 neighbours, which are 4 bytes of nibble codes.
constexpr int WORD = 8;

// What the CPU writes for NaN; the device's own conversions would write 0x7fff....
template <typename T> __device__ __forceinline__ T canonical_nan();
template <> __device__ __forceinline__ float canonical_nan<float>() { return __uint_as_float(0x7fc00000u); }
template <> __device__ __forceinline__ __nv_bfloat16 canonical_nan<__nv_bfloat16>() {
    return __ushort_as_bfloat16(0x7fc0);
}
template <> __device__ __forceinline__ __half canonical_nan<__half>() { return __ushort_as_half(0x7e00); }

template <typename T> __device__ __forceinline__ T narrow(float value);
template <> __device__ __forceinline__ float narrow<float>(float value) { return value; }
template <> __device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float value) {
    return __float2bfloat16_rn(value);
}
template <> __device__ __forceinline__ __half narrow<__half>(float value) { return __float2half_rn(value); }

// Never through the read-only path, for what the kernel before may have written.
__device__ __forceinline__ float load_through_l2(const float* at) { return __ldcg(at); }
__device__ __forceinline__ __nv_bfloat16 load_through_l2(const __nv_bfloat16* at) {
    return __ushort_as_bfloat16(__ldcg(reinterpret_cast<const unsigned short*>(at)));
}
__device__ __forceinline__ __half load_through_l2(const __half* at) {
    return __ushort_as_half(__ldcg(reinterpret_cast<const unsigned short*>(at)));
}

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }

// 8 elements in registers, 16 (or, for float32, 32) bytes of aligned memory. Read and written once: streaming hints.
template <typename T> struct Word {
    uint4 bits;

    __device__ __forceinline__ void load(const T* from) { bits = __ldcs(reinterpret_cast<const uint4*>(from)); }
    __device__ __forceinline__ void store(T* to) const { __stcs(reinterpret_cast<uint4*>(to), bits); }
    // Elements 2 * pair and 2 * pair + 1.
    __device__ __forceinline__ float2 get(int pair) const;
    __device__ __forceinline__ void set(int pair, float even, float odd);

    __device__ __forceinline__ uint32_t half(int pair) const {
        return pair == 0 ? bits.x : pair == 1 ? bits.y : pair == 2 ? bits.z : bits.w;
    }
    __device__ __forceinline__ void set_half(int pair, uint32_t value) {
        (pair == 0 ? bits.x : pair == 1 ? bits.y : pair == 2 ? bits.z : bits.w) = value;
    }
};

template <> __device__ __forceinline__ float2 Word<__nv_bfloat16>::get(int pair) const {
    const uint32_t both = half(pair);
    return make_float2(__uint_as_float(both << 16), __uint_as_float(both & 0xffff0000u));
}
template <> __device__ __forceinline__ void Word<__nv_bfloat16>::set(int pair, float even, float odd) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(even, odd);
    set_half(pair, *reinterpret_cast<const uint32_t*>(&both));
}
template <> __device__ __forceinline__ float2 Word<__half>::get(int pair) const {
    const uint32_t both = half(pair);
    return __half22float2(*reinterpret_cast<const __half2*>(&both));
}
template <> __device__ __forceinline__ void Word<__half>::set(int pair, float even, float odd) {
    const __half2 both = __floats2half2_rn(even, odd);
    set_half(pair, *reinterpret_cast<const uint32_t*>(&both));
}

template <> struct Word<float> {
    float4 low, high;

    __device__ __forceinline__ void load(const float* from) {
        low = __ldcs(reinterpret_cast<const float4*>(from));
        high = __ldcs(reinterpret_cast<const float4*>(from) + 1);
    }
    __device__ __forceinline__ void store(float* to) const {
        __stcs(reinterpret_cast<float4*>(to), low);
        __stcs(reinterpret_cast<float4*>(to) + 1, high);
    }
    __device__ __forceinline__ float2 get(int pair) const {
        return pair == 0   ? make_float2(low.x, low.y)
               : pair == 1 ? make_float2(low.z, low.w)
               : pair == 2 ? make_float2(high.x, high.y)
                           : make_float2(high.z, high.w);
    }
    __device__ __forceinline__ void set(int pair, float even, float odd) {
        float4& quarter = pair < 2 ? low : high;
        (pair & 1 ? quarter.z : quarter.x) = even;
        (pair & 1 ? quarter.w : quarter.y) = odd;
    }
};

__device__ __forceinline__ bool is_finite(float value) { return (__float_as_uint(value) & 0x7fffffffu) < 0x7f800000u; }

// The bits of |value|; they order as magnitudes do, NaN above Inf above all.
__device__ __forceinline__ uint32_t magnitude(float value) { return __float_as_uint(value) & 0x7fffffffu; }
