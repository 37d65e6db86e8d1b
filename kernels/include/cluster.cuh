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

// Barriers in shared memory on which the CTAs of a cluster wait for each other (mbarrier); addresses are this CTA's own.
// `arrivals` complete a phase. After `fence_barriers` and a cluster barrier, peers may arrive.
__device__ __forceinline__ void start_barrier(uint32_t at, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void fence_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// One arrival at the barrier of the CTA of rank `rank`: what this thread read before may be written over. It publishes
// nothing that this thread wrote: that would take a fence for the whole device.
__device__ __forceinline__ void arrive_at_rank(uint32_t at, int rank) {
    asm volatile("{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1; "
                 "mbarrier.arrive.shared::cluster.b64 _, [there]; }" ::"r"(at),
                 "r"(rank)
                 : "memory");
}

// One arrival at this CTA's own barrier; its phase takes `bytes` more that `copy_to_rank` brings.
__device__ __forceinline__ void expect_bytes(uint32_t at, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
}

// Waits until the phase of this parity is complete.
__device__ __forceinline__ void wait_for_phase(uint32_t at, uint32_t parity) {
    asm volatile("{ .reg .pred complete; again: "
                 "mbarrier.try_wait.parity.shared::cta.b64 complete, [%0], %1; "
                 "@!complete bra again; }" ::"r"(at),
                 "r"(parity)
                 : "memory");
}

// Starts to copy `bytes` (16 or a multiple) from this CTA's shared memory to that of the CTA of rank `rank`, and tells its
// barrier of them; `to` and `barrier` are addresses as this CTA would use them. Who wrote `from` calls
// `fence_for_products`, and a barrier follows, before.
__device__ __forceinline__ void copy_to_rank(uint32_t to, int rank, uint32_t from, uint32_t bytes, uint32_t barrier) {
    asm volatile("{ .reg .b32 there, told; mapa.shared::cluster.u32 there, %0, %1; mapa.shared::cluster.u32 told, %4, %1; "
                 "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [there], [%2], %3, [told]; "
                 "cp.async.bulk.commit_group; }" ::"r"(to),
                 "r"(rank), "r"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}
// Waits until what this thread's copies read may be written over.
__device__ __forceinline__ void wait_copies_to_ranks() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
