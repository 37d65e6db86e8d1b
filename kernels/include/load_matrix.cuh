// Matrices of 16-bit elements from shared memory, transposed between the lanes (ldmatrix).
#pragma once

#include <stdint.h>

// Four matrices of 8 rows by 8 elements of 16 bits: lane 8 j + i gives the shared address of row i of matrix j, a multiple
// of 16. Lane (group, quad) gets of matrix j element `group` of rows 2 quad (low half) and 2 quad + 1 (high half).
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&to)[4], uint32_t at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(at)
                 : "memory");
}
