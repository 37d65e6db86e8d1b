// Values of a block divided by its largest magnitude, by the same two or three rounded products as on the CPU.
#pragma once

#include "floats.cuh"

// x = (v * lift) * inverse lies in [-1, 1].
struct Normalizer {
    float lift, inverse;

    __device__ __forceinline__ explicit Normalizer(float absmax) {
        lift = absmax < SUBNORMAL_BELOW ? LIFT : 1.f;
        inverse = __frcp_rn(__fmul_rn(absmax, lift));
    }
    __device__ __forceinline__ float operator()(float value) const {
        return __fmul_rn(__fmul_rn(value, lift), inverse);
    }
};

// NaN has one form in what is stored.
__device__ __forceinline__ float stored(float absmax) { return absmax != absmax ? canonical_nan<float>() : absmax; }
