// arch: compute_75
// Optimizer steps over a whole list of parameters in one launch; bits equal to the CPU's (rust/core/src/optim_step.rs).
//
// `optimizer_RULE`: parameters are float32, bfloat16 or float16, states float32 or 8-bit codes with a scale for each 256
//   elements, all mixed in one launch; 16-bit parameters are rounded once. A warp takes a block of 256 elements. A CTA owns
//   a contiguous range of all blocks, its warps side by side in it, and looks up a run (a parameter, or the part of one
//   whose states are in a page) only where one ends. Grid: as many CTAs as are on the device at once.
//   Bytes moved, a float32 parameter of AdamW: 28 with float32 state, 16 with 8 bits.
// `optimizer_squares`, `optimizer_clip`: the gradients' global norm, and the factor that brings it down to the most. The sum
//   of squares is float64 in a fixed order: pieces of 4096 elements of one parameter, in each 128 sums side by side
//   (element i goes into sum i % 128), which are added in halves; then the pieces' sums in the same way. A warp a piece,
//   one CTA for the end. 4 bytes a float32 parameter.
// `optimizer_factors`: counts steps that live on the device and makes the factors of each parameter there, in float64, for
//   steps that are captured into a graph. A thread a parameter.
// `optimizer_store`: writes its own argument to memory. Tables get there by this, in the stream's order and captured with
//   it, without a buffer on the host that would have to live until the copy.
// Called by rust/cuda/src/optimizer.rs.

#include "optimizer_block.cuh"
#include "optimizer_rules.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr int PIECE_BLOCKS = 16;
constexpr int SUMS = 128;
constexpr int STORE_WORDS = 1008;

// The run that a warp is in. In shared memory: its registers are for a block's elements.
struct Current {
    uint64_t param, grad;  // of the run's first element
    int64_t first_block, elements;
    uint64_t values[MOST_STATES], absmax[MOST_STATES];
    uint32_t type, flags;
    float factors[MOST_FACTORS + 1];  // and the reciprocal of one of them
    float scale;
    bool aligned;
};

// A warp; every lane reads the same.
template <typename RULE>
__device__ __forceinline__ void load_run(Current& now, const StepArguments& step, int index) {
    const Run& run = step.runs[index];
    const Tensor& tensor = step.tensors[run.tensor];
    const int64_t bytes_before = run.start * (tensor.type == FLOAT32 ? 4 : 2);
    const uint64_t param = tensor.param + bytes_before, grad = step.grads[run.tensor] + bytes_before;
    const uint32_t page_and_flags = run.page_and_flags, page = page_and_flags >> FLAG_BITS;
    const uint64_t base = page == 0 ? 0 : step.bases[page - step.first_page];
    const float clip = step.clip == nullptr ? 1.f : *step.clip;
    __syncwarp();  // nobody reads the run before any more
    if (threadIdx.x % 32 == 0) {
        uint64_t all = param | grad;
#pragma unroll
        for (int state = 0; state < RULE::STATES; state++) {
            now.values[state] = base + run.values[state];
            now.absmax[state] = base + run.absmax[state];
            if (!(page_and_flags & STATELESS)) all |= now.values[state];
        }
        now.param = param;
        now.grad = grad;
        now.first_block = step.run_blocks[index];
        now.elements = run.elements;
        now.type = tensor.type;
        now.flags = page_and_flags;
        now.aligned = all % 16 == 0;
        const FactorSet& set = step.sets != nullptr ? step.sets[tensor.set] : step.own_sets[tensor.set];
#pragma unroll
        for (int factor = 0; factor < MOST_FACTORS; factor++) now.factors[factor] = set.values[factor];
        now.factors[MOST_FACTORS] = __frcp_rn(set.values[RULE::DIVISOR]);
        now.scale = __fmul_rn(set.scale, clip);
    }
    __syncwarp();
}

template <typename RULE>
__device__ __forceinline__ void step_block(const Current& run, int64_t block, const StateMaps& maps) {
    block -= run.first_block;
    const int64_t first = block * BLOCK;
    Extent extent;
    extent.size = static_cast<int>(min(run.elements - first, static_cast<int64_t>(BLOCK)));
    extent.whole = run.aligned && extent.size == BLOCK;
    const bool eight = run.flags & EIGHT_BIT, stateless = run.flags & STATELESS;
    const int64_t bytes_before = first * (run.type == FLOAT32 ? 4 : 2);
    const uint64_t param_at = run.param + bytes_before, grad_at = run.grad + bytes_before;

    // All loads are on the way before the first is waited for.
    uint32_t param_words[LANE_ELEMENTS], grad_words[LANE_ELEMENTS], state_words[RULE::STATES][LANE_ELEMENTS];
    float scales[RULE::STATES] = {};
    load_floats(param_words, param_at, run.type, extent);
    load_floats(grad_words, grad_at, run.type, extent);
#pragma unroll
    for (int state = 0; state < RULE::STATES; state++) {
        if (stateless) continue;
        if (eight) {
            load_words<1>(state_words[state], run.values[state] + first, extent);
            scales[state] = reinterpret_cast<const float*>(run.absmax[state])[block];
        } else {
            load_words<4>(state_words[state], run.values[state] + first * 4, extent);
        }
    }

    float param[LANE_ELEMENTS], grad[LANE_ELEMENTS], states[RULE::STATES][LANE_ELEMENTS];
    widen_floats(param, param_words, run.type);
    widen_floats(grad, grad_words, run.type);
#pragma unroll
    for (int state = 0; state < RULE::STATES; state++) {
        if (stateless) {
#pragma unroll
            for (int element = 0; element < LANE_ELEMENTS; element++) states[state][element] = 0.f;
        } else if (eight) {
            decode_states(states[state], state_words[state], scales[state], maps.values[RULE::SIGNED >> state & 1]);
        } else {
#pragma unroll
            for (int element = 0; element < LANE_ELEMENTS; element++)
                states[state][element] = __uint_as_float(state_words[state][element]);
        }
    }
#pragma unroll
    for (int element = 0; element < LANE_ELEMENTS; element++) {
        float own[RULE::STATES];
#pragma unroll
        for (int state = 0; state < RULE::STATES; state++) own[state] = states[state][element];
        RULE::update(run.factors, param[element], __fmul_rn(grad[element], run.scale), own);
#pragma unroll
        for (int state = 0; state < RULE::STATES; state++) states[state][element] = own[state];
    }
    if (!extent.whole) {
#pragma unroll
        for (int element = 0; element < LANE_ELEMENTS; element++) {
            if (position(element) < extent.size) continue;
#pragma unroll
            for (int state = 0; state < RULE::STATES; state++) states[state][element] = 0.f;
        }
    }
    store_floats(param, param_at, run.type, extent);
#pragma unroll
    for (int state = 0; state < RULE::STATES; state++) {
        if (stateless) continue;
        if (eight) {
            uint32_t codes[2];
            const float absmax = RULE::SIGNED >> state & 1 ? encode_states<true>(states[state], codes, maps)
                                                     : encode_states<false>(states[state], codes, maps);
            store_words<1>(codes, run.values[state] + first, extent);
            if (threadIdx.x % 32 == 0) reinterpret_cast<float*>(run.absmax[state])[block] = absmax;
        } else {
            uint32_t words[LANE_ELEMENTS];
#pragma unroll
            for (int element = 0; element < LANE_ELEMENTS; element++)
                words[element] = __float_as_uint(states[state][element]);
            store_words<4>(words, run.values[state] + first * 4, extent);
        }
    }
}

template <typename RULE> __device__ __forceinline__ void run_step(const StepArguments& step) {
    __shared__ StateMaps maps;
    if (step.maps != nullptr) {
        const uint32_t* from = reinterpret_cast<const uint32_t*>(step.maps);
        uint32_t* to = reinterpret_cast<uint32_t*>(&maps);
        for (int word = threadIdx.x; word < static_cast<int>(sizeof(StateMaps) / 4); word += THREADS)
            to[word] = from[word];
        __syncthreads();
    }
    const int64_t rounds = (step.end_block - step.first_block + WARPS - 1) / WARPS;
    const int64_t begin = rounds * blockIdx.x / gridDim.x, end = rounds * (blockIdx.x + 1) / gridDim.x;
    __shared__ Current runs[WARPS];
    Current& run = runs[threadIdx.x / 32];
    int64_t run_end = -1;
    int index = 0;
    for (int64_t round = begin; round < end; round++) {
        const int64_t block = step.first_block + round * WARPS + threadIdx.x / 32;
        if (block >= step.end_block) return;
        if (block >= run_end) {
            index = find_interval(step.run_blocks, index, step.run_count, block);
            run_end = step.run_blocks[index + 1];
            load_run<RULE>(run, step, index);
        }
        step_block<RULE>(run, block, maps);
    }
}

#define OPTIMIZER(RULE, NAME, CTAS)                                                                                    \
    extern "C" __global__ void __launch_bounds__(THREADS, CTAS)                                                        \
        optimizer_##NAME(const __grid_constant__ StepArguments step) {                                                 \
        run_step<RULE>(step);                                                                                          \
    }

OPTIMIZER(AdamW, adamw, 3)
OPTIMIZER(Lion, lion, 3)
OPTIMIZER(AdEMAMix, ademamix, 2)
OPTIMIZER(Sgd, sgd, 3)

extern "C" __global__ void __launch_bounds__(THREADS)
    optimizer_squares(const Tensor* __restrict__ tensors, const uint64_t* __restrict__ grads,
                      const int64_t* __restrict__ pieces, double* __restrict__ sums, int tensor_count,
                      int64_t piece_count) {
    const int64_t step = static_cast<int64_t>(gridDim.x) * WARPS;
    int index = 0;
    for (int64_t piece = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / 32; piece < piece_count;
         piece += step) {
        index = find_interval(pieces, index, tensor_count, piece);
        const Tensor tensor = tensors[index];
        const int64_t first = (piece - pieces[index]) * (PIECE_BLOCKS * BLOCK);
        const uint64_t at = grads[index] + first * (tensor.type == FLOAT32 ? 4 : 2);
        const int64_t size = min(tensor.elements - first, static_cast<int64_t>(PIECE_BLOCKS * BLOCK));
        double sum[4] = {};
#pragma unroll 4
        for (int block = 0; block < PIECE_BLOCKS; block++) {
            const int64_t left = size - block * BLOCK;
            if (left <= 0) break;
            const Extent extent{static_cast<int>(min(left, static_cast<int64_t>(BLOCK))),
                                left >= BLOCK && at % 16 == 0};
            uint32_t words[LANE_ELEMENTS];
            load_floats(words, at + static_cast<int64_t>(block) * BLOCK * (tensor.type == FLOAT32 ? 4 : 2),
                        tensor.type, extent);
            float values[LANE_ELEMENTS];
            widen_floats(values, words, tensor.type);
#pragma unroll
            for (int element = 0; element < LANE_ELEMENTS; element++) {
                const double value = values[element];
                sum[element % 4] = __dadd_rn(sum[element % 4], __dmul_rn(value, value));
            }
        }
#pragma unroll
        for (int other = 16; other > 0; other >>= 1)
#pragma unroll
            for (int i = 0; i < 4; i++)
                sum[i] = __dadd_rn(sum[i], __shfl_xor_sync(WHOLE_WARP, sum[i], other));
        if (threadIdx.x % 32 == 0)
            sums[piece] = __dadd_rn(__dadd_rn(sum[0], sum[2]), __dadd_rn(sum[1], sum[3]));
    }
}

struct Clip {
    double squares;  // the sum of all
    double norm;
    float factor;
    float unused;
};

extern "C" __global__ void __launch_bounds__(SUMS)
    optimizer_clip(const double* __restrict__ sums, int64_t count, double most, Clip* __restrict__ out) {
    __shared__ double halves[SUMS];
    double sum = 0.0;
#pragma unroll 8
    for (int64_t at = threadIdx.x; at < count; at += SUMS) sum = __dadd_rn(sum, sums[at]);
    halves[threadIdx.x] = sum;
    __syncthreads();
    for (int half = SUMS / 2; half > 0; half >>= 1) {
        if (threadIdx.x < half) halves[threadIdx.x] = __dadd_rn(halves[threadIdx.x], halves[threadIdx.x + half]);
        __syncthreads();
    }
    if (threadIdx.x != 0) return;
    out->squares = halves[0];
    out->norm = __dsqrt_rn(halves[0]);
    const double factor = __ddiv_rn(most, __dadd_rn(out->norm, 1e-6));
    out->factor = static_cast<float>(factor > 1.0 ? 1.0 : factor);  // NaN stays NaN, as in torch
}

// Options of a parameter group, in the order of `optim/rules.py`.
struct GroupOptions {
    double weight_decay, beta1, beta2, beta3, eps, alpha, t_alpha, t_beta3, momentum, dampening, nesterov, sign, lr;
    uint64_t lr_address;  // 0, or where the learning rate is
    uint32_t lr_is_double;
    uint32_t unused;
};
// Where a parameter's steps are counted, and its group.
struct Counter {
    uint64_t steps;
    uint32_t group;
    uint32_t unused;
};
enum RuleCode : int { ADAMW = 0, LION = 1, ADEMAMIX = 2, SGD = 3 };

extern "C" __global__ void __launch_bounds__(SUMS)
    optimizer_factors(const Counter* __restrict__ counters, const GroupOptions* __restrict__ groups,
                      FactorSet* __restrict__ sets, int count, int rule) {
    const int index = blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= count) return;
    const GroupOptions& group = groups[counters[index].group];
    float* counter = reinterpret_cast<float*>(counters[index].steps);
    const double step = *counter = *counter + 1.f;
    double lr = group.lr;
    if (group.lr_address != 0)
        lr = group.lr_is_double ? *reinterpret_cast<const double*>(group.lr_address)
                                : *reinterpret_cast<const float*>(group.lr_address);
    const double decay = 1 - lr * group.weight_decay;
    const double correction1 = 1 - pow(group.beta1, step), correction2 = sqrt(1 - pow(group.beta2, step));
    const double rest1 = 1 - group.beta1, rest2 = 1 - group.beta2;
    double values[MOST_FACTORS] = {};
    if (rule == ADAMW) {
        const double own[] = {decay, rest1, group.beta2, rest2, correction2, group.eps, lr / correction1};
        for (int i = 0; i < 7; i++) values[i] = own[i];
    } else if (rule == LION) {
        const double own[] = {decay, group.beta1, rest1, group.beta2, rest2, lr};
        for (int i = 0; i < 6; i++) values[i] = own[i];
    } else if (rule == ADEMAMIX) {
        const double alpha = group.t_alpha > 0 ? group.alpha * fmin(1.0, step / group.t_alpha) : group.alpha;
        double beta3 = group.beta3;
        if (step < group.t_beta3 && group.beta1 > 0 && group.beta1 < beta3) {
            const double share = step / group.t_beta3, first = log(group.beta1), last = log(beta3);
            beta3 = fmin(exp(first * last / ((1 - share) * last + share * first)), beta3);
        }
        const double own[] = {decay,       rest1,       group.beta2, rest2, 1 - beta3,
                              correction1, correction2, group.eps,   alpha, lr};
        for (int i = 0; i < 10; i++) values[i] = own[i];
    } else {
        const double rest = step == 1 ? 1.0 : 1 - group.dampening;
        const double own[] = {group.weight_decay, group.momentum, rest, group.nesterov, lr};
        for (int i = 0; i < 5; i++) values[i] = own[i];
    }
    for (int i = 0; i < MOST_FACTORS; i++) sets[index].values[i] = static_cast<float>(values[i]);
    sets[index].scale = static_cast<float>(group.sign);
}

struct Words {
    uint32_t words[STORE_WORDS];
};

extern "C" __global__ void __launch_bounds__(THREADS)
    optimizer_store(uint32_t* to, int count, const __grid_constant__ Words from) {
    for (int word = threadIdx.x; word < count; word += THREADS) to[word] = from.words[word];
}
