// arch: compute_90a
// dx = dy W for 33 and more tokens on Hopper, bfloat16 dy and dx, W packed in 4 bits;
// include/linear_backward_4bit_sm90.cuh says how.

#include "linear_backward_4bit_sm90.cuh"

DEFINE_ALL_LINEAR_BACKWARD_4BIT_SM90(linear_backward_4bit_sm90_bf16, __nv_bfloat16)
