// Reading the shared memory of the other CTAs of a cluster (sm_90 and later; elsewhere a cluster is one CTA).
#pragma once

#include <stdint.h>

// Every thread of every CTA of the cluster arrives; what they wrote to shared memory before is then visible to all.
__device__ __forceinline__ void cluster_barrier() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
    __syncthreads();
#endif
}

// Four floats at this CTA's shared address `at`, in the CTA of rank `rank`.
__device__ __forceinline__ float4 load_from_rank(uint32_t at, int rank) {
    float4 value;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    uint32_t there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(at), "r"(rank));
    asm volatile("ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [%4];"
                 : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
                 : "r"(there)
                 : "memory");
#else
    asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];"
                 : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
                 : "r"(at)
                 : "memory");
#endif
    return value;
}
