// A stage of packed weight in shared memory: 16 rows by BLOCKS blocks of 64 columns, which are 32 bytes each.
#pragma once

// Blocks are permuted inside a row of a stage so that 8-byte fragment reads of 8 rows hit all banks.
template <int BLOCKS> __device__ __forceinline__ int swizzled_block(int block, int row) {
    static_assert(BLOCKS == 2 || BLOCKS == 4, "rows of 64 or 128 bytes");
    return BLOCKS == 4 ? block ^ (row & 3) : block ^ (row >> 1 & 1);
}
