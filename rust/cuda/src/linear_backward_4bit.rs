//! Launches `kernels/linear_backward_4bit_*.cu`: the gradient of x of a product of few tokens with a packed weight.

use qlora_core::{FloatType, Layout, QuantSpec};

use crate::context::device;
use crate::dequantize::{DeviceScales, table};
use crate::error::CudaError;
use crate::heuristics::{backward_plan, backward_supported, backward_worthwhile};
use crate::launch::{DevicePtr, Queue, arg};
use crate::linear_4bit::{ALIGNMENT, launch_plan, most_tokens, product, target};

/// What is multiplied, and where the product goes.
#[derive(Debug, Clone, Copy)]
pub struct BackwardOperands {
    /// `[tokens, rows]` of `dtype`.
    pub dy: DevicePtr,
    /// `[tokens, columns]` of `dtype`.
    pub dx: DevicePtr,
    /// Whatever wrote the weight has ended: its bytes may be fetched while the kernel before still runs.
    pub settled: bool,
    /// Rows of dy.
    pub tokens: u32,
    /// bfloat16 or float16.
    pub dtype: FloatType,
}

/// Up to how many tokens the gradient is best made without dequantizing the weight first; 0: never.
///
/// # Errors
/// [`CudaError`]: the device.
pub fn most_fused_backward_tokens(
    ordinal: i32,
    spec: &QuantSpec,
    layout: &Layout,
    codes: DevicePtr,
) -> Result<u32, CudaError> {
    most_tokens(ordinal, spec, layout, codes, |product, target| {
        backward_supported(product, target) && backward_worthwhile(product, target)
    })
}

/// dx = dy W in one kernel, for shapes that `backward_supported` of heuristics.rs names.
///
/// # Errors
/// [`CudaError`]: the device, or operands that the kernels do not take.
///
/// # Safety
/// The pointers name memory of the queue's device with the sizes that `layout` and `operands` give, valid until its stream
/// has passed; where `settled`, nothing that is queued or runs writes to the weight.
pub unsafe fn linear_backward_4bit(
    queue: Queue,
    spec: &QuantSpec,
    layout: &Layout,
    codes: DevicePtr,
    scales: DeviceScales,
    operands: &BackwardOperands,
) -> Result<(), CudaError> {
    let device = device(queue.device)?;
    let BackwardOperands { dy, dx, settled, tokens, dtype } = *operands;
    let product = product(spec, layout, tokens, false);
    let target = target(device);
    let aligned = [codes, dy, dx].iter().all(|at| at.is_multiple_of(ALIGNMENT));
    if !aligned || layout.bits() != 4 || layout.experts() != 1 || !backward_supported(&product, &target) {
        return Err(CudaError::Unsupported(format!(
            "no fused kernel for the gradient of {product:?}: dequantize the weight instead"
        )));
    }
    let plan = backward_plan(&product, &target);
    let tokens = tokens.cast_signed();
    let (rows, columns) = (layout.rows() as i64, layout.cols() as i64);
    let block_shift = spec.block_size().trailing_zeros().cast_signed();
    let table = table::<16>(spec);
    let mut args = [
        arg(&codes),
        arg(&scales.absmax),
        arg(&scales.group_scale),
        arg(&scales.offset),
        arg(&dy),
        arg(&dx),
        arg(&tokens),
        arg(&rows),
        arg(&columns),
        arg(&block_shift),
        arg(&table),
    ];
    // SAFETY: the arguments are LINEAR_BACKWARD_4BIT_PARAMETERS of linear_backward_4bit_problem.cuh; the caller vouches for
    // the memory.
    unsafe { launch_plan(device, &plan, dtype, settled, queue, &mut args) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::heuristics::{MOST_TOKENS, Product, Target};
    use crate::linear_4bit::file;

    /// A plan names a kernel by strings: each must be in the PTX that its device would load.
    #[test]
    fn every_plan_names_a_kernel_that_its_file_holds() {
        for (sm, sms, kilobytes) in [(90, 132, 227), (120, 170, 99), (86, 84, 99), (80, 108, 163)] {
            let target = Target { sm, sms, shared_bytes: kilobytes << 10 };
            let capability = ((sm / 10).cast_signed(), (sm % 10).cast_signed());
            for (rows, columns) in [(17, 64), (33, 128), (1024, 4096), (4096, 14336), (14336, 4096), (28672, 8192)] {
                for tokens in 1..=MOST_TOKENS {
                    let product = Product { tokens, rows, columns, block_size: 64, lora: false };
                    let plan = backward_plan(&product, &target);
                    for dtype in [FloatType::Bf16, FloatType::F16] {
                        let (file, stem) = file(&plan, dtype).expect("a file for each plan");
                        let name = format!(".entry {stem}_{}(", plan.entry);
                        let text = file.text_for(capability).expect("a file for each device");
                        assert!(text.contains(&name), "{name} on sm_{sm}");
                    }
                }
            }
        }
    }
}
