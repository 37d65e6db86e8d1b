// arch: compute_80 compute_90
// y = x W^T for 1 to 16 tokens, float16 x and y, W packed in 4 bits; include/linear_4bit.cuh says how. A file a type,
// because each is compiled whole at its first use. compute_90 adds dependent launch.

#include "linear_4bit.cuh"

DEFINE_ALL_LINEAR_4BIT(linear_4bit_f16, __half)
