//! Prints `kernels/include/constants.cuh`: what kernels have to know of this crate, with float32 to the bit.
//!
//! `cargo run -q -p qlora-core --example cuda_constants`

use std::fmt::Write;

use qlora_core::{NESTED_BLOCK_SIZE, dynamic_map_signed};

/// A C++17 literal; `value` is zero or normal.
fn hex_literal(value: f32) -> String {
    let bits = value.to_bits();
    let sign = if value.is_sign_negative() { "-" } else { "" };
    if value == 0.0 {
        return format!("{sign}0x0p0f");
    }
    assert!(value.is_normal(), "the map's values are normal floats");
    // 23 bits of mantissa, moved up to make six digits.
    let (mantissa, exponent) = ((bits & 0x007f_ffff) << 1, ((bits >> 23) & 0xff).cast_signed() - 127);
    format!("{sign}0x1.{mantissa:06x}p{exponent}f")
}

fn main() {
    let rows = dynamic_map_signed().chunks(6).fold(String::new(), |mut rows, row| {
        let literals: Vec<String> = row.iter().map(|&value| hex_literal(value)).collect();
        writeln!(rows, "    {},", literals.join(", ")).expect("writing to a string");
        rows
    });
    print!(
        "\
// Written by `cargo run -p qlora-core --example cuda_constants`: change rust/core, then `make generate`.
#pragma once

// Consecutive blocks of one expert whose scales share a scale, when doubly quantized.
constexpr int NESTED_BLOCK_SIZE = {NESTED_BLOCK_SIZE};

// The signed dynamic map, ascending. NOTE: not `__constant__`, whose reads are one address at a time: lanes look up 32
// codes at once. Copy it to shared memory where that pays. Every PTX module holds its own 1 KB.
__device__ const float DYNAMIC_MAP[256] = {{
{rows}}};
"
    );
}
