// arch: compute_90a
// y = x W^T for 33 and more tokens on Hopper, bfloat16 x and y, W packed in 4 bits; include/gemm_4bit_sm90.cuh says
// how.

#include "gemm_4bit_sm90.cuh"

DEFINE_ALL_GEMM_4BIT_SM90(gemm_4bit_sm90_bf16, __nv_bfloat16)
