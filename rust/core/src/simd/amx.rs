//! Products of small bfloat16 matrices, tiles, by the processor's own unit for them: Intel's AMX.

use std::arch::asm;
use std::arch::x86_64::{__cpuid, __cpuid_count};
use std::ffi::c_long;
use std::sync::OnceLock;

use half::bf16;

use super::SimdLevel;
use crate::matvec::LINE;

/// Rows, and tokens, of a tile.
pub(super) const SIDE: usize = 16;
/// Elements of each row and token that are multiplied at a time: four registers of them.
pub(super) const DEPTH: usize = 128;
/// Rows at a time, and most tokens: two tiles of each.
pub(super) const ROWS: usize = 2 * SIDE;

/// Registers of a row.
const PARTS: usize = 4;
/// Elements of a register.
const PART: usize = DEPTH / PARTS;

/// Weights to multiply: tiles by part of the depth, those of the upper rows before those of the lower.
#[repr(C, align(64))]
pub(super) struct Weights(pub(super) [[[[bf16; PART]; SIDE]; PARTS]; 2]);

/// Sums of rows (of a tile) and tokens (of a tile): upper and lower rows for the first tokens, then for the last.
pub(super) type Sums = [[[f32; SIDE]; SIDE]; 4];

/// What multiplies tiles: adds products in float32, to sums that it holds.
pub(super) trait Multiplier {
    /// Sums of 0.
    ///
    /// # Safety
    /// The processor has what this multiplies by, and no other is in use on this thread.
    unsafe fn new() -> Self;

    /// Add the products of the weights with [`SIDE`] tokens, or twice as many. Tokens lie pair of elements by pair, each
    /// pair of all [`SIDE`].
    ///
    /// # Safety
    /// [`DEPTH`] elements of each of 16 tokens are readable at the pointers.
    unsafe fn multiply(&mut self, weights: &Weights, first: *const bf16, last: Option<*const bf16>);

    /// The sums.
    fn sums(self) -> Sums;
}

/// The processor's unit: its registers are state of the thread, 0 to 3 the sums.
pub(super) struct Amx(());

/// What the unit's registers are like.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl Amx {
    const CONFIG: &Config = &{
        let (mut row_bytes, mut rows) = ([0; 16], [0; 16]);
        let mut register = 0;
        while register < 8 {
            row_bytes[register] = LINE as u16;
            rows[register] = SIDE as u8;
            register += 1;
        }
        Config { palette: 1, start_row: 0, reserved: [0; 14], row_bytes, rows }
    };

    /// Does the processor have it, and lets the system this process use it? The system is asked once: it has to make room
    /// for the registers.
    pub(super) fn available(level: SimdLevel) -> bool {
        static AVAILABLE: OnceLock<bool> = OnceLock::new();
        let wide = level == SimdLevel::Avx512 && is_x86_feature_detected!("avx512bf16");
        wide && *AVAILABLE.get_or_init(|| has_amx() && permitted())
    }
}

fn has_amx() -> bool {
    const BF16_AND_TILES: u32 = 1 << 22 | 1 << 24;
    __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx & BF16_AND_TILES == BF16_AND_TILES
}

unsafe extern "C" {
    fn syscall(number: c_long, ...) -> c_long;
}

/// Linux gives the registers' state to processes that ask.
fn permitted() -> bool {
    const ARCH_PRCTL: c_long = 158;
    const REQUEST_PERMISSION: c_long = 0x1023;
    const TILE_DATA: c_long = 18;
    // SAFETY: this call only lets the process use more registers; a refusal is an answer.
    unsafe { syscall(ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA) == 0 }
}

impl Multiplier for Amx {
    unsafe fn new() -> Self {
        // SAFETY: the caller's promise; the configuration is one of the first palette.
        unsafe {
            asm!(
                "ldtilecfg [{config}]",
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                config = in(reg) &raw const *Self::CONFIG,
                options(nostack, preserves_flags)
            );
        }
        Self(())
    }

    #[inline]
    unsafe fn multiply(&mut self, weights: &Weights, first: *const bf16, last: Option<*const bf16>) {
        macro_rules! parts {
            ($($last:literal),*; $($operand:tt)*) => {
                asm!(
                    parts!(@ "0" $($last)*), parts!(@ "1024" $($last)*), parts!(@ "2048" $($last)*),
                    parts!(@ "3072" $($last)*),
                    upper = in(reg) weights.0[0].as_ptr(), lower = in(reg) weights.0[1].as_ptr(),
                    first = in(reg) first, line = in(reg) LINE, $($operand)*
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack, preserves_flags)
                )
            };
            (@ $at:literal) => {
                concat!(
                    "tileloadd tmm4, [{upper} + {line}*1 + ", $at, "]\n",
                    "tileloadd tmm6, [{first} + {line}*1 + ", $at, "]\n",
                    "tileloadd tmm5, [{lower} + {line}*1 + ", $at, "]\n",
                    "tdpbf16ps tmm0, tmm4, tmm6\n",
                    "tdpbf16ps tmm1, tmm5, tmm6\n",
                )
            };
            (@ $at:literal $last:literal) => {
                concat!(
                    "tileloadd tmm4, [{upper} + {line}*1 + ", $at, "]\n",
                    "tileloadd tmm6, [{first} + {line}*1 + ", $at, "]\n",
                    "tileloadd tmm5, [{lower} + {line}*1 + ", $at, "]\n",
                    "tileloadd tmm7, [{last} + {line}*1 + ", $at, "]\n",
                    "tdpbf16ps tmm0, tmm4, tmm6\n",
                    "tdpbf16ps tmm1, tmm5, tmm6\n",
                    "tdpbf16ps tmm2, tmm4, tmm7\n",
                    "tdpbf16ps tmm3, tmm5, tmm7\n",
                )
            };
        }
        // SAFETY: the caller's promise; the registers are as `new` made them, and nothing but this type uses them.
        unsafe {
            match last {
                None => parts!(;),
                Some(last) => parts!("last"; last = in(reg) last,),
            }
        }
    }

    fn sums(self) -> Sums {
        let mut sums: Sums = [[[0.0; SIDE]; SIDE]; 4];
        // SAFETY: a register's 16 rows of 64 bytes go to each matrix.
        unsafe {
            asm!(
                "tilestored [{sums} + {line}*1], tmm0",
                "tilestored [{sums} + {line}*1 + 1024], tmm1",
                "tilestored [{sums} + {line}*1 + 2048], tmm2",
                "tilestored [{sums} + {line}*1 + 3072], tmm3",
                sums = in(reg) &raw mut sums,
                line = in(reg) LINE,
                options(nostack, preserves_flags)
            );
        }
        sums
    }
}

impl Drop for Amx {
    /// A thread whose registers are as new is cheaper to interrupt.
    fn drop(&mut self) {
        // SAFETY: the registers hold nothing that is wanted.
        unsafe { asm!("tilerelease", options(nomem, nostack, preserves_flags)) };
    }
}

/// The same without the unit, for processors that lack it.
#[cfg(test)]
pub(super) struct Plain(Sums);

#[cfg(test)]
impl Multiplier for Plain {
    unsafe fn new() -> Self {
        Self([[[0.0; SIDE]; SIDE]; 4])
    }

    unsafe fn multiply(&mut self, weights: &Weights, first: *const bf16, last: Option<*const bf16>) {
        for (half, tokens) in [Some(first), last].into_iter().enumerate() {
            let Some(tokens) = tokens else { continue };
            // SAFETY: the caller's promise.
            let tokens = unsafe { std::slice::from_raw_parts(tokens, DEPTH * SIDE) };
            for (weights, sums) in weights.0.iter().zip(&mut self.0[2 * half..]) {
                for (row, sums) in sums.iter_mut().enumerate() {
                    for (token, sum) in sums.iter_mut().enumerate() {
                        for k in 0..DEPTH {
                            let weight = weights[k / PART][row][k % PART];
                            *sum += weight.to_f32() * tokens[(k / 2 * SIDE + token) * 2 + k % 2].to_f32();
                        }
                    }
                }
            }
        }
    }

    fn sums(self) -> Sums {
        self.0
    }
}
