// Hopper's warpgroup product (sm_90a only): d[64, N] += A[64, 16] B[16, N], A in registers, B in shared memory.
//
// Lane (group, quad) of warp w of the four holds, as in m16n8k16, A's rows 16 w + group (a0, a2) and + 8 (a1, a3) at
// columns 2 quad, + 1 (a0, a1) and + 8 (a2, a3); d[4 j + i] is row 16 w + group + 8 (i / 2), column 8 j + 2 quad + i %
// 2.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

// A copy of `value` that is made after the wait before it. `zero` is 0 in a way that the compiler cannot know, or it
// would merge the two registers and, finding that a product's input is written while products run, run them one by one.
__device__ __forceinline__ uint32_t take_after_wait(uint32_t value, uint32_t zero) {
    uint32_t copy;
    asm volatile("xor.b32 %0, %1, %2;" : "=r"(copy) : "r"(value), "r"(zero) : "memory");
    return copy;
}
// Waits until at most PENDING stages' products are still running.
template <int PENDING> __device__ __forceinline__ void wait_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// Makes this thread's landed copies and stores to shared memory visible to the products (after a barrier).
__device__ __forceinline__ void fence_for_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// B as rows of 64 16-bit columns (128 bytes), whose 16-byte piece p lies at p ^ (row % 8); `at` is the shared address
// of row 0, a multiple of 1024, plus 32 for each step of 16 columns.
__device__ __forceinline__ uint64_t describe_rows(uint32_t at) {
    constexpr uint64_t SWIZZLE_128 = 1ull << 62, EIGHT_ROWS = 1024 / 16;
    return SWIZZLE_128 | EIGHT_ROWS << 32 | 1ull << 16 | (at & 0x3ffffu) >> 4;
}

// Starts the four products of 64 columns and returns: a[4 step ...] times B's columns 16 step and on. Until they are
// waited for, neither `d` nor `a` may be touched. One statement, so that nothing gets between them: ptxas would run
// them one by one.
template <typename T, int N> struct WarpgroupProduct;

#define WARPGROUP_STEP_64(TYPES, INPUTS)                                                                               \
    "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPES " {"                                                           \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "                            \
    "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"                                                  \
    "}, " INPUTS ", accumulate, 1, 1, 0; "

#define DEFINE_WARPGROUP_PRODUCT_64(T, TYPES)                                                                          \
    template <> struct WarpgroupProduct<T, 64> {                                                                       \
        static __device__ __forceinline__ void start(float (&d)[32], const uint32_t (&a)[16], uint64_t b) {            \
            asm volatile(                                                                                              \
                "{ .reg .pred accumulate; setp.ne.b32 accumulate, 1, 0; wgmma.fence.sync.aligned; " WARPGROUP_STEP_64( \
                    TYPES, "{%32, %33, %34, %35}, %48") WARPGROUP_STEP_64(TYPES, "{%36, %37, %38, %39}, %49")          \
                    WARPGROUP_STEP_64(TYPES, "{%40, %41, %42, %43}, %50")                                              \
                        WARPGROUP_STEP_64(TYPES, "{%44, %45, %46, %47}, %51") "wgmma.commit_group.sync.aligned; }"     \
                : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),      \
                  "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]),             \
                  "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]),           \
                  "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]),           \
                  "+f"(d[29]), "+f"(d[30]), "+f"(d[31])                                                                \
                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(a[4]), "r"(a[5]), "r"(a[6]), "r"(a[7]), "r"(a[8]),   \
                  "r"(a[9]), "r"(a[10]), "r"(a[11]), "r"(a[12]), "r"(a[13]), "r"(a[14]), "r"(a[15]), "l"(b),           \
                  "l"(b + 2), "l"(b + 4), "l"(b + 6)                                                                   \
                : "memory");                                                                                           \
        }                                                                                                              \
    }
DEFINE_WARPGROUP_PRODUCT_64(__nv_bfloat16, "bf16.bf16");
DEFINE_WARPGROUP_PRODUCT_64(__half, "f16.f16");

#define WARPGROUP_STEP_128(TYPES, INPUTS)                                                                              \
    "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPES " {"                                                          \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "                            \
    "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "                            \
    "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, "                            \
    "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"                                                            \
    "}, " INPUTS ", accumulate, 1, 1, 0; "

#define DEFINE_WARPGROUP_PRODUCT_128(T, TYPES)                                                                         \
    template <> struct WarpgroupProduct<T, 128> {                                                                      \
        static __device__ __forceinline__ void start(float (&d)[64], const uint32_t (&a)[16], uint64_t b) {            \
            asm volatile("{ .reg .pred accumulate; setp.ne.b32 accumulate, 1, 0; "                                     \
                         "wgmma.fence.sync.aligned; " WARPGROUP_STEP_128(TYPES, "{%64, %65, %66, %67}, %80")           \
                             WARPGROUP_STEP_128(TYPES, "{%68, %69, %70, %71}, %81")                                    \
                                 WARPGROUP_STEP_128(TYPES, "{%72, %73, %74, %75}, %82") WARPGROUP_STEP_128(            \
                                     TYPES, "{%76, %77, %78, %79}, %83") "wgmma.commit_group.sync.aligned; }"          \
                         : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),         \
                           "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),     \
                           "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]),  \
                           "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),  \
                           "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]),  \
                           "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]),  \
                           "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]),  \
                           "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),  \
                           "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]),  \
                           "+f"(d[63])                                                                                 \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(a[4]), "r"(a[5]), "r"(a[6]), "r"(a[7]),     \
                           "r"(a[8]), "r"(a[9]), "r"(a[10]), "r"(a[11]), "r"(a[12]), "r"(a[13]), "r"(a[14]),           \
                           "r"(a[15]), "l"(b), "l"(b + 2), "l"(b + 4), "l"(b + 6)                                      \
                         : "memory");                                                                                  \
        }                                                                                                              \
    }
DEFINE_WARPGROUP_PRODUCT_128(__nv_bfloat16, "bf16.bf16");
DEFINE_WARPGROUP_PRODUCT_128(__half, "f16.f16");

#define WARPGROUP_STEP_256(TYPES, INPUTS)                                                                              \
    "wgmma.mma_async.sync.aligned.m64n256k16.f32." TYPES " {"                                                          \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "                            \
    "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "                            \
    "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, "                            \
    "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, "                            \
    "%70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, "                            \
    "%87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, "                        \
    "%104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, "                             \
    "%118, %119, %120, %121, %122, %123, %124, %125, %126, %127"                                                       \
    "}, " INPUTS ", accumulate, 1, 1, 0; "

#define DEFINE_WARPGROUP_PRODUCT_256(T, TYPES)                                                                         \
    template <> struct WarpgroupProduct<T, 256> {                                                                      \
        static __device__ __forceinline__ void start(float (&d)[128], const uint32_t (&a)[16], uint64_t b) {           \
            asm volatile("{ .reg .pred accumulate; setp.ne.b32 accumulate, 1, 0; "                                     \
                         "wgmma.fence.sync.aligned; " WARPGROUP_STEP_256(TYPES, "{%128, %129, %130, %131}, %144")      \
                             WARPGROUP_STEP_256(TYPES, "{%132, %133, %134, %135}, %145")                               \
                                 WARPGROUP_STEP_256(TYPES, "{%136, %137, %138, %139}, %146") WARPGROUP_STEP_256(       \
                                     TYPES, "{%140, %141, %142, %143}, %147") "wgmma.commit_group.sync.aligned; }"     \
                         : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),         \
                           "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),     \
                           "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]),  \
                           "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),  \
                           "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]),  \
                           "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]),  \
                           "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]),  \
                           "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),  \
                           "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]),  \
                           "+f"(d[63]), "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]),  \
                           "+f"(d[70]), "+f"(d[71]), "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]),  \
                           "+f"(d[77]), "+f"(d[78]), "+f"(d[79]), "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]),  \
                           "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]), "+f"(d[88]), "+f"(d[89]), "+f"(d[90]),  \
                           "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95]), "+f"(d[96]), "+f"(d[97]),  \
                           "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103]),           \
                           "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), "+f"(d[109]),         \
                           "+f"(d[110]), "+f"(d[111]), "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115]),         \
                           "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119]), "+f"(d[120]), "+f"(d[121]),         \
                           "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])          \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(a[4]), "r"(a[5]), "r"(a[6]), "r"(a[7]),     \
                           "r"(a[8]), "r"(a[9]), "r"(a[10]), "r"(a[11]), "r"(a[12]), "r"(a[13]), "r"(a[14]),           \
                           "r"(a[15]), "l"(b), "l"(b + 2), "l"(b + 4), "l"(b + 6)                                      \
                         : "memory");                                                                                  \
        }                                                                                                              \
    }
DEFINE_WARPGROUP_PRODUCT_256(__nv_bfloat16, "bf16.bf16");
DEFINE_WARPGROUP_PRODUCT_256(__half, "f16.f16");

// The same four products, but d is what they sum alone: it need not be zero before. For few tokens.
template <typename T, int N> struct FreshProduct;

#define FRESH_STEP_16(TYPES, INPUTS, ACCUMULATE)                                                                       \
    "wgmma.mma_async.sync.aligned.m64n16k16.f32." TYPES " {%0, %1, %2, %3, %4, %5, %6, %7}, " INPUTS ", " ACCUMULATE   \
    ", 1, 1, 0; "

#define DEFINE_FRESH_PRODUCT_16(T, TYPES)                                                                              \
    template <> struct FreshProduct<T, 16> {                                                                           \
        static __device__ __forceinline__ void start(float (&d)[8], const uint32_t (&a)[16], uint64_t b) {             \
            asm volatile("{ .reg .pred first, later; setp.ne.b32 first, 0, 0; setp.ne.b32 later, 1, 0; "               \
                         "wgmma.fence.sync.aligned; " FRESH_STEP_16(TYPES, "{%8, %9, %10, %11}, %24", "first")         \
                             FRESH_STEP_16(TYPES, "{%12, %13, %14, %15}, %25", "later")                                \
                                 FRESH_STEP_16(TYPES, "{%16, %17, %18, %19}, %26", "later") FRESH_STEP_16(             \
                                     TYPES, "{%20, %21, %22, %23}, %27", "later") "wgmma.commit_group.sync.aligned; }" \
                         : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3]), "=f"(d[4]), "=f"(d[5]), "=f"(d[6]),         \
                           "=f"(d[7])                                                                                  \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(a[4]), "r"(a[5]), "r"(a[6]), "r"(a[7]),     \
                           "r"(a[8]), "r"(a[9]), "r"(a[10]), "r"(a[11]), "r"(a[12]), "r"(a[13]), "r"(a[14]),           \
                           "r"(a[15]), "l"(b), "l"(b + 2), "l"(b + 4), "l"(b + 6)                                      \
                         : "memory");                                                                                  \
        }                                                                                                              \
    }
DEFINE_FRESH_PRODUCT_16(__nv_bfloat16, "bf16.bf16");
DEFINE_FRESH_PRODUCT_16(__half, "f16.f16");

#define FRESH_STEP_32(TYPES, INPUTS, ACCUMULATE)                                                                       \
    "wgmma.mma_async.sync.aligned.m64n32k16.f32." TYPES                                                                \
    " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, " INPUTS ", " ACCUMULATE ", 1, 1, 0; "

#define DEFINE_FRESH_PRODUCT_32(T, TYPES)                                                                              \
    template <> struct FreshProduct<T, 32> {                                                                           \
        static __device__ __forceinline__ void start(float (&d)[16], const uint32_t (&a)[16], uint64_t b) {            \
            asm volatile("{ .reg .pred first, later; setp.ne.b32 first, 0, 0; setp.ne.b32 later, 1, 0; "               \
                         "wgmma.fence.sync.aligned; " FRESH_STEP_32(TYPES, "{%16, %17, %18, %19}, %32", "first")       \
                             FRESH_STEP_32(TYPES, "{%20, %21, %22, %23}, %33", "later")                                \
                                 FRESH_STEP_32(TYPES, "{%24, %25, %26, %27}, %34", "later") FRESH_STEP_32(             \
                                     TYPES, "{%28, %29, %30, %31}, %35", "later") "wgmma.commit_group.sync.aligned; }" \
                         : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3]), "=f"(d[4]), "=f"(d[5]), "=f"(d[6]),         \
                           "=f"(d[7]), "=f"(d[8]), "=f"(d[9]), "=f"(d[10]), "=f"(d[11]), "=f"(d[12]), "=f"(d[13]),     \
                           "=f"(d[14]), "=f"(d[15])                                                                    \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(a[4]), "r"(a[5]), "r"(a[6]), "r"(a[7]),     \
                           "r"(a[8]), "r"(a[9]), "r"(a[10]), "r"(a[11]), "r"(a[12]), "r"(a[13]), "r"(a[14]),           \
                           "r"(a[15]), "l"(b), "l"(b + 2), "l"(b + 4), "l"(b + 6)                                      \
                         : "memory");                                                                                  \
        }                                                                                                              \
    }
DEFINE_FRESH_PRODUCT_32(__nv_bfloat16, "bf16.bf16");
DEFINE_FRESH_PRODUCT_32(__half, "f16.f16");
