//! Optimizer updates, compiled for each instruction set from the one source in `optim`: the compiler makes vectors of it,
//! and never fuses operations, so all give the same bits.

use super::SimdLevel;
use crate::optim::{MOST_STATES, Rule, update as scalar};

/// One step for elements of equal index, as [`scalar`].
///
/// NOTE: `level` above [`SimdLevel::detected`] panics, so this is safe to call with any argument.
pub(crate) fn update(
    level: SimdLevel,
    rule: &Rule,
    scale: f32,
    param: &mut [f32],
    grad: &[f32],
    states: [&mut [f32]; MOST_STATES],
) {
    assert!(level <= SimdLevel::detected(), "the processor has no {}", level.as_str());
    match level {
        // SAFETY: the processor has the features.
        SimdLevel::Avx512 => unsafe { avx512(rule, scale, param, grad, states) },
        // SAFETY: as above.
        SimdLevel::Avx2 => unsafe { avx2(rule, scale, param, grad, states) },
        SimdLevel::Scalar => scalar(rule, scale, param, grad, states),
    }
}

/// # Safety
/// The processor has AVX2.
#[target_feature(enable = "avx2")]
unsafe fn avx2(rule: &Rule, scale: f32, param: &mut [f32], grad: &[f32], states: [&mut [f32]; MOST_STATES]) {
    scalar(rule, scale, param, grad, states);
}

/// # Safety
/// The processor has these features of AVX-512.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn avx512(rule: &Rule, scale: f32, param: &mut [f32], grad: &[f32], states: [&mut [f32]; MOST_STATES]) {
    scalar(rule, scale, param, grad, states);
}
