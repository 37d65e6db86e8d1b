// arch: compute_80 compute_90
// y = x W^T for 17 to 32 tokens, float16 x and y, W packed in 4 bits; include/linear_4bit.cuh says how. A file of its
// own, because its one kernel takes as long to compile at its first use as two others.

#include "linear_4bit.cuh"

DEFINE_LINEAR_4BIT(linear_4bit_wide_f16, __half, 7, 4, 8, 2, 1)
