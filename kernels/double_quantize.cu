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

// Which scale of its group a lane holds as its i-th: every 32nd, or RUN / 32 in a row, where a whole group is read and written
// in wide words.
template <bool WIDE> __device__ __forceinline__ int place(int i) {
    const int lane = threadIdx.x % 32;
    return WIDE ? lane * (RUN / 32) + i : i * 32 + lane;
}

// The `size` scales of a group; zeros beyond the last.
template <bool WIDE>
__device__ __forceinline__ void load_group(const float* __restrict__ group, int size, float (&values)[RUN / 32]) {
    if (WIDE) {
        const float4* words = reinterpret_cast<const float4*>(group + place<true>(0));
        const float4 low = __ldcg(words), high = __ldcg(words + 1);
        values[0] = low.x, values[1] = low.y, values[2] = low.z, values[3] = low.w;
        values[4] = high.x, values[5] = high.y, values[6] = high.z, values[7] = high.w;
    } else {
#pragma unroll
        for (int i = 0; i < RUN / 32; i++) values[i] = place<false>(i) < size ? __ldcg(group + place<false>(i)) : 0.f;
    }
}

// The whole CTA: the mean of the scales whose runs these are; levels above the first alternate between two halves of
// `upper`, which has room for them all (`upper_size` of the launcher).
__device__ __forceinline__ float finish_mean(const double* __restrict__ sums, const int* __restrict__ absent,
                                             int64_t blocks, int runs, double* upper, int upper_size) {
    __shared__ double staged[WARPS][RUN];
    __shared__ unsigned long long missing;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (threadIdx.x == 0) missing = 0;
    __syncthreads();
    const double* level = upper + upper_size;  // what is below the next level, once that is not the runs
    double* next = upper;
    int left = runs;
    do {
        const int above = (left + RUN - 1) / RUN;
        for (int run = warp; run < above; run += WARPS) {
            double values[RUN / 32];
            // All on the way before the first is looked at.
#pragma unroll
            for (int i = 0; i < RUN / 32; i++) {
                const int at = run * RUN + i * 32 + lane;
                values[i] = 0.0;
                if (at < left) values[i] = left == runs ? __ldcg(sums + at) : level[at];
            }
            bool lacking = false;  // only runs
#pragma unroll
            for (int i = 0; i < RUN / 32; i++) lacking |= signbit(values[i]);
            if (__any_sync(WHOLE_WARP, lacking)) {
                for (int i = 0; i < RUN / 32; i++) {
                    if (!signbit(values[i])) continue;
                    atomicAdd(&missing, static_cast<unsigned long long>(__ldcg(absent + run * RUN + i * 32 + lane)));
                    values[i] = -values[i];
                }
            }
#pragma unroll
            for (int i = 0; i < RUN / 32; i++) staged[warp][i * 32 + lane] = values[i];
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
template <bool WIDE>
__device__ __forceinline__ void encode_group(const float (&values)[RUN / 32], uint8_t* __restrict__ codes,
                                             float* __restrict__ group_scale, int size, float centre,
                                             const float* bounds) {
    float centred[RUN / 32];
    uint32_t top = 0;
    bool finite = true;
#pragma unroll
    for (int i = 0; i < RUN / 32; i++) {
        finite &= is_finite(values[i]);
        centred[i] = WIDE || place<WIDE>(i) < size ? __fsub_rn(values[i], centre) : 0.f;
        top = max(top, magnitude(centred[i]));
    }
    top = warp_max(static_cast<int>(top));  // a magnitude has no sign bit
    finite = __all_sync(WHOLE_WARP, finite);
    const float scale = __uint_as_float(top);
    const float lift = scale < SUBNORMAL_BELOW ? LIFT : 1.f;
    const float inverse = __frcp_rn(__fmul_rn(scale, lift));
    int node[RUN / 32];
#pragma unroll
    for (int i = 0; i < RUN / 32; i++) {
        centred[i] = __fmul_rn(__fmul_rn(centred[i], lift), inverse);
        node[i] = 1;
    }
    // Level by level, so that the look-ups of all values are on the way together.
#pragma unroll
    for (int level = 0; level < 8; level++)
#pragma unroll
        for (int i = 0; i < RUN / 32; i++) node[i] = 2 * node[i] + (centred[i] > bounds[node[i]]);
    const bool coded = finite && top != 0;
#pragma unroll
    for (int i = 0; i < RUN / 32; i++) node[i] = coded ? node[i] - 256 : ZERO_CODE;
    if (WIDE) {
        const uint2 word = make_uint2(node[0] | node[1] << 8 | node[2] << 16 | node[3] << 24,
                                      node[4] | node[5] << 8 | node[6] << 16 | node[7] << 24);
        *reinterpret_cast<uint2*>(codes + place<true>(0)) = word;
    } else {
#pragma unroll
        for (int i = 0; i < RUN / 32; i++)
            if (place<false>(i) < size) codes[place<false>(i)] = static_cast<uint8_t>(node[i]);
    }
    if (threadIdx.x % 32 == 0) *group_scale = finite ? scale : canonical_nan<float>();
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
    load_group<false>(absmax + blockIdx.y * blocks + run * RUN,
                      static_cast<int>(min(blocks - run * RUN, static_cast<int64_t>(RUN))), scales);
#pragma unroll
    for (int i = 0; i < RUN / 32; i++) staged[warp][i * 32 + lane] = scales[i];
    __syncwarp();
    const int64_t at = blockIdx.y * runs + run;
    sum_run(staged[warp], sums + at, absent + at);
}

extern "C" __global__ void __launch_bounds__(WARPS * 32)
    double_quantize_codes(const float* __restrict__ absmax, const double* __restrict__ sums,
                          const int* __restrict__ absent, uint8_t* __restrict__ codes, float* __restrict__ group_scale,
                          float* __restrict__ offset, int64_t blocks, int upper_size,
                          const __grid_constant__ ThresholdTree thresholds) {
    extern __shared__ double upper[];
    __shared__ float bounds[256];
    launch_dependents();
    for (int i = threadIdx.x; i < 256; i += blockDim.x) bounds[i] = thresholds.nodes[i];
    const int runs = static_cast<int>((blocks + RUN - 1) / RUN);
    absmax += blockIdx.y * blocks;
    codes += blockIdx.y * blocks;
    group_scale += static_cast<int64_t>(blockIdx.y) * runs;
    sums += static_cast<int64_t>(blockIdx.y) * runs;
    absent += static_cast<int64_t>(blockIdx.y) * runs;
    const bool wide = reinterpret_cast<uintptr_t>(absmax) % 16 == 0 && reinterpret_cast<uintptr_t>(codes) % 8 == 0;
    const int whole = wide ? static_cast<int>(blocks / RUN) : 0;
    const int first = blockIdx.x * WARPS + threadIdx.x / 32;
    const int step = gridDim.x * WARPS;
    const auto size_of = [&](int group) {
        return static_cast<int>(min(blocks - static_cast<int64_t>(group) * RUN, static_cast<int64_t>(RUN)));
    };
    wait_for_previous_kernels();
    // The first group is on the way while the mean is made.
    float values[RUN / 32];
    if (first < whole) load_group<true>(absmax + static_cast<int64_t>(first) * RUN, RUN, values);
    const float centre = finish_mean(sums, absent, blocks, runs, upper, upper_size);
    if (blockIdx.x == 0 && threadIdx.x == 0) offset[blockIdx.y] = centre;
    int group = first;
    for (; group < whole; group += step) {
        const int64_t at = static_cast<int64_t>(group) * RUN;
        if (group != first) load_group<true>(absmax + at, RUN, values);
        encode_group<true>(values, codes + at, group_scale + group, RUN, centre, bounds);
    }
    for (; group < runs; group += step) {
        const int64_t at = static_cast<int64_t>(group) * RUN;
        load_group<false>(absmax + at, size_of(group), values);
        encode_group<false>(values, codes + at, group_scale + group, size_of(group), centre, bounds);
    }
}
