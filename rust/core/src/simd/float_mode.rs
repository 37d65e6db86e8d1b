//! The processor's float mode, which a caller may have changed (`torch.set_flush_denormal`) and which threads inherit.

use std::arch::asm;

/// Round to nearest even, keep subnormals, all exceptions masked: what Rust and IEEE 754 assume.
const IEEE_DEFAULT: u32 = 0x1f80;
/// The exception flags, which are no mode.
const FLAGS: u32 = 0x3f;

struct Restore(u32);

impl Drop for Restore {
    fn drop(&mut self) {
        set_mode(self.0);
    }
}

/// Run `work` with the float mode at IEEE defaults and put the caller's mode back, also after a panic.
pub fn with_ieee_floats<R>(work: impl FnOnce() -> R) -> R {
    let before = mode();
    if before & !FLAGS == IEEE_DEFAULT {
        return work();
    }
    let _restore = Restore(before);
    set_mode(IEEE_DEFAULT);
    apart(work)
}

/// Not inlined, so that no float operation of `work` is moved across the change of mode.
#[inline(never)]
fn apart<R>(work: impl FnOnce() -> R) -> R {
    work()
}

fn mode() -> u32 {
    let mut value = 0u32;
    // SAFETY: stores the MXCSR register, which every x86-64 processor has, into `value`.
    unsafe { asm!("stmxcsr [{}]", in(reg) &raw mut value, options(nostack, preserves_flags)) };
    value
}

fn set_mode(value: u32) {
    // SAFETY: loads MXCSR from `value`: the IEEE default or what `mode` read before, so no reserved bit is set.
    unsafe { asm!("ldmxcsr [{}]", in(reg) &raw const value, options(nostack, preserves_flags)) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Control, Floats, FloatsMut, Layout, Nonfinite, Parallel, QuantSpec, QuantType, Scales, dequantize,
        double_quantize, quantize,
    };
    use half::bf16;

    /// Flush subnormals to zero, and read them as zero, while `work` runs: what `torch.set_flush_denormal` does.
    fn with_flushed_subnormals<R>(work: impl FnOnce() -> R) -> R {
        let before = mode();
        set_mode(before | 0x8040);
        let result = apart(work);
        set_mode(before);
        result
    }

    #[test]
    fn mode_is_ieee_inside_and_the_callers_outside() {
        let tiny = std::hint::black_box(f32::from_bits(1));
        let doubled = |value: f32| std::hint::black_box(std::hint::black_box(value) * 2.0).to_bits();
        with_flushed_subnormals(|| {
            assert_eq!(doubled(tiny), 0);
            assert_eq!(with_ieee_floats(|| doubled(tiny)), 2);
            assert!(std::panic::catch_unwind(|| with_ieee_floats(|| panic!("on purpose"))).is_err());
            assert_eq!(doubled(tiny), 0);
        });
        assert_eq!(doubled(tiny), 2);
    }

    /// Threads are made inside too: they inherit the mode.
    #[test]
    fn results_do_not_depend_on_the_callers_mode() {
        let everything = || {
            let codebook = [-1.0, -1.0e-39, 1.0e-39, 1.0];
            let mut results = Vec::new();
            for codebook in [None, Some(codebook.as_slice())] {
                let quant_type = if codebook.is_some() { QuantType::Codebook } else { QuantType::Nf4 };
                let spec = QuantSpec::new(quant_type, 32, true, codebook).expect("valid");
                let layout = Layout::new(1, 1024, 65, &spec).expect("small");
                let weights: Vec<f32> =
                    (0..layout.elements() as u32).map(|i| f32::from_bits(i * 77 % 0x8f_ffff)).collect();
                let (mut codes, mut absmax) = (vec![0; layout.code_bytes()], vec![0.0; layout.blocks()]);
                let (parallel, control) = (Parallel::new(5), Control::default());
                let floats = Floats::F32(&weights);
                quantize(floats, &layout, &spec, Nonfinite::Raise, &mut codes, &mut absmax, &parallel, &control)
                    .expect("finite");
                let (mut nested, mut scale) = (vec![0; layout.blocks()], vec![0.0; layout.groups()]);
                let mut offset = [0.0];
                double_quantize(&absmax, layout.blocks(), &mut nested, &mut scale, &mut offset, &parallel, &control)
                    .expect("fits");
                let scales = Scales::Nested { codes: &nested, scale: &scale, offset: &offset };
                let (mut single, mut half) = (vec![0.0f32; weights.len()], vec![bf16::ZERO; weights.len()]);
                dequantize(&codes, scales, &layout, &spec, FloatsMut::F32(&mut single), &parallel, &control)
                    .expect("own");
                let out = FloatsMut::Bf16(&mut half);
                dequantize(&codes, Scales::Plain(&absmax), &layout, &spec, out, &parallel, &control).expect("own");
                results.push((
                    codes,
                    nested,
                    half,
                    [absmax, scale, offset.to_vec(), single].map(|v| v.iter().map(|x| x.to_bits()).collect::<Vec<_>>()),
                ));
            }
            results
        };
        let flushed = with_flushed_subnormals(everything);
        assert!(flushed == everything());
    }
}
