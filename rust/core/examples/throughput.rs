//! Gigabytes a second (input and output together) of NF4 quantize and dequantize, for each SIMD level and thread count.
//!
//! `cargo run --release -p qlora-core --example throughput [rows] [columns]`

use std::time::Instant;

use half::{bf16, f16};
use qlora_core::dequantize::dequantize_at;
use qlora_core::quantize::quantize_at;
use qlora_core::{
    Control, CoreError, Floats, FloatsMut, Layout, Nonfinite, Parallel, QuantSpec, QuantType, Scales, SimdLevel,
    double_quantize,
};

/// Best of some repetitions, in seconds.
fn best(mut work: impl FnMut() -> Result<(), CoreError>) -> Result<f64, CoreError> {
    let mut best = f64::INFINITY;
    for _ in 0..12 {
        let start = Instant::now();
        work()?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok(best)
}

fn main() -> Result<(), CoreError> {
    let mut sizes = std::env::args().skip(1).filter_map(|size| size.parse::<usize>().ok());
    let (rows, cols) = (sizes.next().unwrap_or(4096), sizes.next().unwrap_or(4096));
    let spec = QuantSpec::new(QuantType::Nf4, 64, true, None)?;
    let layout = Layout::new(1, rows, cols, &spec)?;
    let control = Control::default();
    // A sum of uniform numbers is normal enough for timing.
    let mut state = 1u32;
    let mut uniform = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        f64::from(state >> 8) / f64::from(1 << 24) - 0.5
    };
    let single: Vec<f32> =
        (0..layout.elements()).map(|_| (0.02 * (uniform() + uniform() + uniform())) as f32).collect();
    let brain: Vec<bf16> = single.iter().map(|value| bf16::from_f32(*value)).collect();
    let half: Vec<f16> = single.iter().map(|value| f16::from_f32(*value)).collect();
    let inputs = [("f32", Floats::F32(&single), 4), ("bf16", Floats::Bf16(&brain), 2), ("f16", Floats::F16(&half), 2)];
    let mut codes = vec![0u8; layout.code_bytes()];
    let mut absmax = vec![0f32; layout.blocks()];
    let (mut nested, mut scale, mut offset) = (vec![0u8; layout.blocks()], vec![0f32; layout.groups()], [0f32]);
    let (mut f32_out, mut bf16_out, mut f16_out) = (single.clone(), brain.clone(), half.clone());
    let packed = layout.code_bytes() + 4 * layout.blocks();
    println!("NF4, block 64, {rows} x {cols}: milliseconds and GB/s");
    for level in SimdLevel::ALL.into_iter().filter(|level| *level <= SimdLevel::detected()) {
        for threads in [1, Parallel::new(0).threads()] {
            let parallel = Parallel::new(threads);
            print!("{:>6} {threads} thread(s):", level.as_str());
            let add = |name: &str, seconds: f64, bytes: usize| {
                print!("  {name} {:.2} ms {:.1}", 1e3 * seconds, bytes as f64 / seconds / 1e9);
            };
            for (name, input, size) in inputs {
                let seconds = best(|| {
                    let (codes, absmax) = (&mut codes, &mut absmax);
                    quantize_at(level, input, &layout, &spec, Nonfinite::Raise, codes, absmax, &parallel, &control)
                })?;
                add(&format!("quantize {name}"), seconds, size * layout.elements() + packed);
            }
            let seconds = best(|| {
                double_quantize(&absmax, layout.blocks(), &mut nested, &mut scale, &mut offset, &parallel, &control)
            })?;
            add("scales", seconds, 5 * layout.blocks());
            let scales = Scales::Nested { codes: &nested, scale: &scale, offset: &offset };
            for (name, scales, index) in
                [("f32", scales, 0), ("bf16", scales, 1), ("f16", scales, 2), ("bf16 plain", Scales::Plain(&absmax), 1)]
            {
                let seconds = best(|| {
                    let out = match index {
                        0 => FloatsMut::F32(&mut f32_out),
                        1 => FloatsMut::Bf16(&mut bf16_out),
                        _ => FloatsMut::F16(&mut f16_out),
                    };
                    dequantize_at(level, &codes, scales, &layout, &spec, out, &parallel, &control)
                })?;
                add(&format!("dequantize {name}"), seconds, inputs[index].2 * layout.elements() + packed);
            }
            println!();
        }
    }
    Ok(())
}
