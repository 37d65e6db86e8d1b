// What optimizer.cu knows of the parameters that a step updates: tables in device memory, written by
// rust/cuda/src/optimizer.rs, and what changes from step to step, which comes as a kernel's argument.
#pragma once

#include <stdint.h>

// Elements that share a scale of 8-bit state, and that a warp updates at a time.
constexpr int BLOCK = 256;
constexpr int MOST_STATES = 3;
constexpr int MOST_FACTORS = 10;
// As many as fit beside each other into the 4 KB of a kernel's arguments.
constexpr int MOST_SETS = 64;
constexpr int MOST_BASES = 48;
constexpr unsigned WHOLE_WARP = 0xffffffffu;

enum FloatCode : uint32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };
enum RunFlag : uint32_t { EIGHT_BIT = 1, STATELESS = 2 };
constexpr int FLAG_BITS = 2;

// A parameter.
struct Tensor {
    uint64_t param;
    int64_t elements;
    uint32_t type;  // of parameter and gradient
    uint32_t set;   // its factors
};

// Elements of a parameter whose states lie together: all of them, or those in one page. `start` is a multiple of BLOCK.
struct Run {
    uint32_t tensor;
    uint32_t page_and_flags;  // page << FLAG_BITS: addresses below are relative to it; page 0: absolute
    int64_t start;
    int64_t elements;
    uint64_t values[MOST_STATES];
    uint64_t absmax[MOST_STATES];
};

// Factors of one update rule (in the order of rust/core/src/optim.rs), and what gradients are multiplied by first.
struct FactorSet {
    float values[MOST_FACTORS];
    float scale;
};

struct StepArguments {
    const Tensor* tensors;
    const uint64_t* grads;      // by tensor
    const Run* runs;
    const int64_t* run_blocks;  // blocks before each run, and in all
    const struct StateMaps* maps;  // null where no state has 8 bits
    const FactorSet* sets;      // null: those below
    const float* clip;          // null, or what gradients are multiplied by besides
    int64_t first_block;        // of those that this launch does
    int64_t end_block;
    int32_t run_count;
    uint32_t first_page;        // that the first of `bases` is of
    uint64_t bases[MOST_BASES];
    FactorSet own_sets[MOST_SETS];
};
static_assert(sizeof(StepArguments) <= 4096, "kernel arguments");

// One warp: the largest i with before[i] <= value, from `low` on. `before` ascends, and before[count] > value.
__device__ __forceinline__ int find_interval(const int64_t* __restrict__ before, int low, int count, int64_t value) {
    int high = count;
    while (high - low > 1) {
        const int step = (high - low + 31) / 32;
        const int at = low + step * static_cast<int>(threadIdx.x % 32);
        const unsigned below = __ballot_sync(WHOLE_WARP, at < high && before[at] <= value);
        low += step * (__popc(below) - 1);
        high = min(low + step, high);
    }
    return low;
}
