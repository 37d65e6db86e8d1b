// Copies of 16 bytes from global to shared memory that pass no register (cp.async, sm_80 and later).
#pragma once

#include <stdint.h>

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void store_shared(uint32_t at, float value) {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(at), "f"(value) : "memory");
}

__device__ __forceinline__ float load_shared(uint32_t at) {
    float value;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(at) : "memory");
    return value;
}

__device__ __forceinline__ uint2 load_shared_8(uint32_t at) {
    uint2 value;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(value.x), "=r"(value.y) : "r"(at) : "memory");
    return value;
}

__device__ __forceinline__ uint4 load_shared_16(uint32_t at) {
    uint4 value;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "r"(at)
                 : "memory");
    return value;
}

__device__ __forceinline__ void load_shared_floats(float (&to)[4], uint32_t at) {
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(to[0]), "=f"(to[1]), "=f"(to[2]), "=f"(to[3])
                 : "r"(at)
                 : "memory");
}
__device__ __forceinline__ void load_shared_floats(float (&to)[2], uint32_t at) {
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(to[0]), "=f"(to[1]) : "r"(at) : "memory");
}

// The same value, kept in a register: the compiler would compute it again at every use.
__device__ __forceinline__ uint32_t hold(uint32_t value) {
    asm volatile("" : "+r"(value));
    return value;
}

// base + row * pitch bytes in one instruction, which the compiler does not find: it multiplies 64 bits by 64.
__device__ __forceinline__ const uint8_t* at_row(const uint8_t* base, uint32_t row, uint32_t pitch) {
    const uint8_t* at;
    asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(at) : "r"(row), "r"(pitch), "l"(base));
    return at;
}

// Both addresses are multiples of 16. The line's other half is brought into the L2: neighbours ask for it next.
__device__ __forceinline__ void copy_16(uint32_t shared, const void* global) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}

// The same, or 16 zeros where `wanted` is false, without a branch. `global` is a valid address either way.
__device__ __forceinline__ void copy_16_or_zeros(uint32_t shared, const void* global, bool wanted) {
    const int bytes = wanted ? 16 : 0;
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most PENDING of this thread's latest groups are still on the way.
template <int PENDING> __device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
