// Programmatic dependent launch (sm_90 and later): a kernel's start overlaps the end of the one before it in the
// stream.
#pragma once

// The next kernel may start as soon as SMs have room; it waits itself for what it reads of us.
__device__ __forceinline__ void launch_dependents() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Returns once the kernels before are complete and what they wrote is visible. Before it, touch only what no kernel
// writes: packed weights, scales, tables. NOTE: load the rest with __ldcg, never through the read-only path, which the
// compiler may move above this.
__device__ __forceinline__ void wait_for_previous_kernels() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
