// arch: compute_80 compute_90
// dx = dy W for few tokens, float16 dy and dx, W packed in 4 bits; include/linear_backward_4bit.cuh says how. A file a
// type, because each is compiled whole at its first use. compute_90 adds dependent launch and clusters.

#include "linear_backward_4bit.cuh"

DEFINE_ALL_LINEAR_BACKWARD_4BIT(linear_backward_4bit_f16, __half)
