// What a step does to one element, as rust/core/src/optim.rs says: each operation rounded by itself, none fused.
#pragma once

#include "optimizer_table.cuh"

// x / divisor, rounded once, for x that is 0, at least 2^-100, infinite or NaN, and a divisor in (0, 1] whose rounded
// reciprocal is given: each of the two rounds leaves less than an ulp, from an exact remainder. See optimizer.rs's tests.
__device__ __forceinline__ float divide(float x, float divisor, float reciprocal) {
    float quotient = __fmul_rn(x, reciprocal);
    quotient = __fmaf_rn(__fmaf_rn(-divisor, quotient, x), reciprocal, quotient);
    quotient = __fmaf_rn(__fmaf_rn(-divisor, quotient, x), reciprocal, quotient);
    return x < __uint_as_float(0x7f800000u) ? quotient : x;
}

// `factor` holds a rule's factors in the order of its Rust struct's fields, and behind them the reciprocal of the one that
// DIVISOR names; `s` the element's states.
struct AdamW {
    static constexpr int STATES = 2;
    static constexpr int DIVISOR = 4;
    static constexpr uint32_t SIGNED = 0b001;  // bit i: has state i a sign?

    __device__ __forceinline__ static void update(const float* factor, float& p, float g, float (&s)[STATES]) {
        s[0] = __fadd_rn(s[0], __fmul_rn(__fsub_rn(g, s[0]), factor[1]));
        s[1] = __fadd_rn(__fmul_rn(s[1], factor[2]), __fmul_rn(__fmul_rn(g, g), factor[3]));
        const float denominator = __fadd_rn(divide(__fsqrt_rn(s[1]), factor[4], factor[MOST_FACTORS]), factor[5]);
        p = __fsub_rn(__fmul_rn(p, factor[0]), __fmul_rn(__fdiv_rn(s[0], denominator), factor[6]));
    }
};

struct Lion {
    static constexpr int STATES = 1;
    static constexpr int DIVISOR = 0;
    static constexpr uint32_t SIGNED = 0b001;  // bit i: has state i a sign?

    __device__ __forceinline__ static void update(const float* factor, float& p, float g, float (&s)[STATES]) {
        const float mixed = __fadd_rn(__fmul_rn(s[0], factor[1]), __fmul_rn(g, factor[2]));
        const float direction = mixed > 0.f ? 1.f : mixed < 0.f ? -1.f : mixed;  // NaN stays NaN
        p = __fsub_rn(__fmul_rn(p, factor[0]), __fmul_rn(direction, factor[5]));
        s[0] = __fadd_rn(__fmul_rn(s[0], factor[3]), __fmul_rn(g, factor[4]));
    }
};

struct AdEMAMix {
    static constexpr int STATES = 3;
    static constexpr int DIVISOR = 6;
    static constexpr uint32_t SIGNED = 0b101;

    __device__ __forceinline__ static void update(const float* factor, float& p, float g, float (&s)[STATES]) {
        s[0] = __fadd_rn(s[0], __fmul_rn(__fsub_rn(g, s[0]), factor[1]));
        s[1] = __fadd_rn(__fmul_rn(s[1], factor[2]), __fmul_rn(__fmul_rn(g, g), factor[3]));
        s[2] = __fadd_rn(s[2], __fmul_rn(__fsub_rn(g, s[2]), factor[4]));
        const float denominator = __fadd_rn(divide(__fsqrt_rn(s[1]), factor[6], factor[MOST_FACTORS]), factor[7]);
        const float mixed = __fadd_rn(__fdiv_rn(s[0], factor[5]), __fmul_rn(s[2], factor[8]));
        p = __fsub_rn(__fmul_rn(p, factor[0]), __fmul_rn(__fdiv_rn(mixed, denominator), factor[9]));
    }
};

// Where a run keeps no state, momentum is 0 and what is computed of it is not used.
struct Sgd {
    static constexpr int STATES = 1;
    static constexpr int DIVISOR = 0;
    static constexpr uint32_t SIGNED = 0b001;  // bit i: has state i a sign?

    __device__ __forceinline__ static void update(const float* factor, float& p, float g, float (&s)[STATES]) {
        g = __fadd_rn(g, __fmul_rn(p, factor[0]));
        float direction = g;
        if (factor[1] != 0.f) {
            s[0] = __fadd_rn(__fmul_rn(s[0], factor[1]), __fmul_rn(g, factor[2]));
            direction = factor[3] > 0.f ? __fadd_rn(g, __fmul_rn(s[0], factor[1])) : s[0];
        }
        p = __fsub_rn(p, __fmul_rn(direction, factor[4]));
    }
};
