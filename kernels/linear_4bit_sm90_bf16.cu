// arch: compute_90a
// y = x W^T for 9 to 32 tokens and very many rows on Hopper, bfloat16 x and y, W packed in 4 bits;
// include/linear_4bit_sm90.cuh says how.

#include "linear_4bit_sm90.cuh"

DEFINE_LINEAR_4BIT_SM90(linear_4bit_sm90_bf16, __nv_bfloat16, 16, 3)
DEFINE_LINEAR_4BIT_SM90(linear_4bit_sm90_bf16, __nv_bfloat16, 32, 3)
