// The float64 sum of scales over a fixed tree: 256 consecutive values in index order, then the partial sums likewise.
#pragma once

#include "constants.cuh"
#include "floats.cuh"

constexpr int RUN = NESTED_BLOCK_SIZE;
constexpr int RUN_BITS = 8;
constexpr unsigned WHOLE_WARP = 0xffffffffu;

// The rule itself. One addition waits for the other: some ten thousand clocks.
template <typename T> __device__ __noinline__ double sum_in_order(const T* values) {
    double sum = 0.0;
    for (int i = 0; i < RUN; i++) sum += static_cast<double>(values[i]);
    return sum;
}

__device__ __forceinline__ int warp_min(int value) {
#if __CUDA_ARCH__ >= 800
    return __reduce_min_sync(WHOLE_WARP, value);
#else
    for (int other = 16; other > 0; other >>= 1) value = min(value, __shfl_xor_sync(WHOLE_WARP, value, other));
    return value;
#endif
}
__device__ __forceinline__ int warp_max(int value) { return -warp_min(-value); }

__device__ __forceinline__ int warp_sum(int value) {
#if __CUDA_ARCH__ >= 800
    return __reduce_add_sync(WHOLE_WARP, value);
#else
    for (int other = 16; other > 0; other >>= 1) value += __shfl_xor_sync(WHOLE_WARP, value, other);
    return value;
#endif
}

// One warp: the sum of RUN values that are not negative, zeros behind the last, of which a lane holds every 32nd; every lane
// gets it. `staged` holds the same values in shared memory.
// Where all values are multiples of 2^low and their sum stays below 2^(low + 53), each partial sum of any order is exact,
// so that all orders agree and the quick one is taken. Scales that lie within a factor of 2^21 of each other do so.
template <typename T> __device__ __forceinline__ double sum_of_run(const T (&values)[RUN / 32], const T* staged) {
    double sum = 0.0;
    int low = 4096, high = -4096;  // exponents of the lowest and of the highest bit that is set in any value
#pragma unroll
    for (int i = 0; i < RUN / 32; i++) {
        const double value = static_cast<double>(values[i]);
        const long long bits = __double_as_longlong(value);
        const int exponent = static_cast<int>(bits >> 52);
        const long long mantissa = bits & 0xfffffffffffffLL;
        if (bits != 0) {
            high = max(high, exponent);
            low = min(low, mantissa == 0 ? exponent : exponent - 53 + __ffsll(mantissa));
        }
        sum += value;
    }
    for (int other = 16; other > 0; other >>= 1) sum += __shfl_xor_sync(WHOLE_WARP, sum, other);
    return warp_max(high) + 1 + RUN_BITS - warp_min(low) <= 53 ? sum : sum_in_order(staged);
}

// One warp: the same sum of finite values by whole numbers, which is quicker still, where all are multiples of a unit that
// is 2^-21 of the largest one's power of two; else a negative number. 16-bit floats within a factor of 2^11 of each other
// are so.
__device__ __forceinline__ double sum_of_multiples(const float (&values)[RUN / 32]) {
    constexpr int UNIT_BITS = 21;
    constexpr float ROUND = 12582912.f;  // 1.5 * 2^23: added to it, a number below 2^22 is rounded to a whole one
    int top = 0;
#pragma unroll
    for (int i = 0; i < RUN / 32; i++) top = max(top, __float_as_int(values[i]));
    const int exponent = warp_max(top) >> 23;
    const float unit = __int_as_float(max(exponent - UNIT_BITS, 1) << 23);
    const float inverse = __int_as_float((254 - exponent + UNIT_BITS) << 23);
    bool exact = exponent > UNIT_BITS;  // unit and inverse are normal
    int sum = 0;
#pragma unroll
    for (int i = 0; i < RUN / 32; i++) {
        const float rounded = __fmaf_rn(values[i], inverse, ROUND);
        exact &= __fmul_rn(__fsub_rn(rounded, ROUND), unit) == values[i];
        sum += __float_as_int(rounded) - __float_as_int(ROUND);
    }
    if (!__all_sync(WHOLE_WARP, exact)) return -1.0;
    return static_cast<double>(warp_sum(sum)) * static_cast<double>(unit);
}

// One warp: the sum of the finite ones of RUN scales in shared memory, whose other places are overwritten with zeros.
// Where there are any, `absent` gets their number and the sum a minus sign (zero too), or else nobody needs to clear
// `absent`, or to read it.
__device__ __forceinline__ void sum_run(float* scales, double* sum, int* absent) {
    float values[RUN / 32];
    int missing = 0;
#pragma unroll
    for (int i = 0; i < RUN / 32; i++) {
        const int at = i * 32 + threadIdx.x % 32;
        values[i] = scales[at];
        if (!is_finite(values[i])) {
            missing++;
            values[i] = scales[at] = 0.f;
        }
    }
    __syncwarp();
    double total = sum_of_multiples(values);
    if (total < 0.0) total = sum_of_run(values, scales);
    if (__any_sync(WHOLE_WARP, missing > 0)) {
        for (int other = 16; other > 0; other >>= 1) missing += __shfl_xor_sync(WHOLE_WARP, missing, other);
        total = -total;
    }
    if (threadIdx.x % 32 == 0) {
        *sum = total;
        if (missing > 0) *absent = missing;
    }
}
