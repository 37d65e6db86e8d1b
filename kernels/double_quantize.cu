// arch: compute_75 compute_80 compute_90
// Double quantization of the scales: offset = their mean, codes of (absmax - offset) in blocks of 256; bytes equal to the
// CPU's (rust/core/src/double_quant.rs).
//
// The mean is a float64 sum over a fixed tree (scale_tree.cuh). A scale that is not finite counts as absent from the mean
// and makes its group's scale NaN. Two small launches, each over all experts (grid y): `sums`, a warp a run of 256 scales
// (left out where quantize.cu did it), and `codes`, in which every CTA finishes the tree for itself, which is quicker
// than a launch or a grid's barrier between, and then its warps stride over groups. On sm_90 `codes` starts while the
// kernel before it ends.
// Scratch: float64 sums and int32 numbers of absent scales (scale_tree.cuh), [experts, runs].
// Bytes moved: 8 a scale in all, an eighth a weight. Called by rust/cuda/src/double_quantize.rs.

#include <stdint.h>

#include "dependent_launch.cuh"
#include "scale_tree.cuh"

constexpr int WARPS = 8;
constexpr uint8_t ZERO_CODE = 127;

// The largest float32 that still belongs to each entry of the map but the last, as a search tree: the children of node i,
// from 1 on, are 2 i and 2 i + 1. Level by level they lie side by side, so that lanes seldom meet in a bank.
struct ThresholdTree {
    float nodes[256];
};

// The scales of a group, a lane every 32nd; zeros beyond the last.
__device__ __forceinline__ void load_group(const float* __restrict__ absmax, int64_t blocks, int64_t group,
                                           float (&values)[RUN / 32]) {
#pragma unroll
    for (int i = 0; i < RUN / 32; i++) {
        const int64_t at = group * RUN + i * 32 + threadIdx.x % 32;
        values[i] = at < blocks ? __ldcg(absmax + at) : 0.f;
    }
}

// The whole CTA: the mean of the scales whose runs these are; levels above the first alternate between two halves of
// `upper`, which has room for them all (`upper_size` of the launcher).
__device__ __forceinline__ float finish_mean(const double* __restrict__ sums, const int* __restrict__ absent,
                                             int64_t blocks, int64_t runs, double* upper, int64_t upper_size) {
    __shared__ double staged[WARPS][RUN];
    __shared__ unsigned long long missing;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (threadIdx.x == 0) missing = 0;
    __syncthreads();
    double* level = upper + upper_size;  // what is below the next level, once that is not the runs
    double* next = upper;
    int64_t left = runs;
    do {
        const int64_t above = (left + RUN - 1) / RUN;
        for (int64_t run = warp; run < above; run += WARPS) {
            double values[RUN / 32];
#pragma unroll
            for (int i = 0; i < RUN / 32; i++) {
                const int64_t at = run * RUN + i * 32 + lane;
                values[i] = at >= left ? 0.0 : left == runs ? __ldcg(sums + at) : level[at];
                if (signbit(values[i])) {  // only runs
                    atomicAdd(&missing, static_cast<unsigned long long>(__ldcg(absent + at)));
                    values[i] = -values[i];
                }
                staged[warp][i * 32 + lane] = values[i];
            }
            __syncwarp();
            const double sum = sum_of_run(values, staged[warp]);
            if (lane == 0) next[run] = sum;
            __syncwarp();
        }
        __syncthreads();
        level = next;
        next = next == upper ? upper + upper_size : upper;
        left = above;
    } while (left > 1);
    const int64_t finite = blocks - static_cast<int64_t>(missing);
    return finite > 0 ? static_cast<float>(level[0] / static_cast<double>(finite)) : 0.f;
}

// A warp: codes and scale of a group.
__device__ __forceinline__ void encode_group(const float (&values)[RUN / 32], uint8_t* __restrict__ codes,
                                             float* __restrict__ group_scale, int size, float centre,
                                             const float* bounds) {
    const int lane = threadIdx.x % 32;
    float centred[RUN / 32];
    uint32_t top = 0;
    bool finite = true;
#pragma unroll
    for (int i = 0; i < RUN / 32; i++) {
        finite &= is_finite(values[i]);
        centred[i] = i * 32 + lane < size ? __fsub_rn(values[i], centre) : 0.f;
        top = max(top, magnitude(centred[i]));
    }
    top = warp_max(static_cast<int>(top));  // a magnitude has no sign bit
    finite = __all_sync(WHOLE_WARP, finite);
    const float scale = __uint_as_float(top);
    const float lift = scale < SUBNORMAL_BELOW ? LIFT : 1.f;
    const float inverse = __frcp_rn(__fmul_rn(scale, lift));
    int node[RUN / 32];
#pragma unroll
    for (int i = 0; i < RUN / 32; i++) node[i] = 1;
    // Level by level, so that the look-ups of all values are on the way together.
#pragma unroll
    for (int level = 0; level < 8; level++)
#pragma unroll
        for (int i = 0; i < RUN / 32; i++)
            node[i] = 2 * node[i] + (__fmul_rn(__fmul_rn(centred[i], lift), inverse) > bounds[node[i]]);
#pragma unroll
    for (int i = 0; i < RUN / 32; i++) {
        const int at = i * 32 + lane;
        if (at < size) codes[at] = finite && top != 0 ? static_cast<uint8_t>(node[i] - 256) : ZERO_CODE;
    }
    if (lane == 0) *group_scale = finite ? scale : canonical_nan<float>();
}

extern "C" __global__ void __launch_bounds__(WARPS * 32)
    double_quantize_sums(const float* __restrict__ absmax, double* __restrict__ sums, int* __restrict__ absent,
                         int64_t blocks) {
    __shared__ float staged[WARPS][RUN];
    launch_dependents();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int64_t runs = (blocks + RUN - 1) / RUN;
    const int64_t run = static_cast<int64_t>(blockIdx.x) * WARPS + warp;
    if (run >= runs) return;
    float scales[RUN / 32];
    load_group(absmax + blockIdx.y * blocks, blocks, run, scales);
#pragma unroll
    for (int i = 0; i < RUN / 32; i++) staged[warp][i * 32 + lane] = scales[i];
    __syncwarp();
    const int64_t at = blockIdx.y * runs + run;
    sum_run(staged[warp], sums + at, absent + at);
}

extern "C" __global__ void __launch_bounds__(WARPS * 32)
    double_quantize_codes(const float* __restrict__ absmax, const double* __restrict__ sums,
                          const int* __restrict__ absent, uint8_t* __restrict__ codes, float* __restrict__ group_scale,
                          float* __restrict__ offset, int64_t blocks, int64_t upper_size, ThresholdTree thresholds) {
    extern __shared__ double upper[];
    __shared__ float bounds[256];
    for (int i = threadIdx.x; i < 256; i += blockDim.x) bounds[i] = thresholds.nodes[i];
    const int64_t runs = (blocks + RUN - 1) / RUN;
    absmax += blockIdx.y * blocks;
    codes += blockIdx.y * blocks;
    group_scale += blockIdx.y * runs;
    const int64_t first = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / 32;
    const int64_t step = static_cast<int64_t>(gridDim.x) * WARPS;
    wait_for_previous_kernels();
    // The first group is on the way while the mean is made.
    float values[RUN / 32];
    load_group(absmax, blocks, first, values);
    const float centre =
        finish_mean(sums + blockIdx.y * runs, absent + blockIdx.y * runs, blocks, runs, upper, upper_size);
    if (blockIdx.x == 0 && threadIdx.x == 0) offset[blockIdx.y] = centre;
    for (int64_t group = first; group < runs; group += step) {
        if (group != first) load_group(absmax, blocks, group, values);
        encode_group(values, codes + group * RUN, group_scale + group,
                     static_cast<int>(min(blocks - group * RUN, static_cast<int64_t>(RUN))), centre, bounds);
    }
}
