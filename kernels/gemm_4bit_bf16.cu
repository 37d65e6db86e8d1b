// arch: compute_80 compute_90
// y = x W^T for 17 and more tokens, bfloat16 x and y, W packed in 4 bits; include/gemm_4bit.cuh says how. A file a
// type, because each is compiled whole at its first use. compute_90 adds dependent launch and clusters.

#include "gemm_4bit.cuh"

DEFINE_ALL_GEMM_4BIT(gemm_4bit_bf16, __nv_bfloat16)
