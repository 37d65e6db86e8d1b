//! Launches `kernels/linear_4bit_*.cu` and `kernels/gemm_4bit_*.cu`: products of few tokens with a packed weight.

use std::ffi::c_void;

use qlora_core::{FloatType, Layout, QuantSpec};

use crate::context::{Device, device};
use crate::dequantize::{DeviceScales, table};
use crate::error::CudaError;
use crate::heuristics::{MOST_TOKENS, Plan, Product, Target, plan, supported, worthwhile};
use crate::launch::{DevicePtr, Grid, Queue, arg, launch};
use crate::modules::{
    GEMM_BF16, GEMM_F16, GEMM_HOPPER_BF16, GEMM_HOPPER_F16, KernelFile, LINEAR_BACKWARD_BF16, LINEAR_BACKWARD_F16,
    LINEAR_BACKWARD_HOPPER_BF16, LINEAR_BACKWARD_HOPPER_F16, LINEAR_BF16, LINEAR_F16, LINEAR_HOPPER_BF16,
    LINEAR_HOPPER_F16, LINEAR_WIDE_BF16, LINEAR_WIDE_F16,
};

/// Wide loads and stores begin here.
pub(crate) const ALIGNMENT: DevicePtr = 16;
const RANK_ALIGNMENT: DevicePtr = 4;

/// A low-rank term `scale * xa B^T`; both matrices are of x's type.
#[derive(Debug, Clone, Copy)]
pub struct LowRank {
    /// `[tokens, rank]`.
    pub xa: DevicePtr,
    /// `[rows, rank]`.
    pub b: DevicePtr,
    /// The factor.
    pub scale: f32,
    /// Columns of both.
    pub rank: i32,
}

/// What is multiplied, and where the product goes.
#[derive(Debug, Clone, Copy)]
pub struct Operands {
    /// `[tokens, columns]` of `dtype`.
    pub x: DevicePtr,
    /// `[tokens, rows]` of `dtype`.
    pub y: DevicePtr,
    /// `[rows]` of `dtype`, or 0.
    pub bias: DevicePtr,
    /// Whatever wrote the weight has ended: its bytes may be fetched while the kernel before still runs.
    pub settled: bool,
    /// An adapter's term, added before the one rounding.
    pub lora: Option<LowRank>,
    /// Rows of x.
    pub tokens: u32,
    /// bfloat16 or float16.
    pub dtype: FloatType,
}

/// Up to how many tokens the weight is best multiplied without being dequantized first; 0: never.
///
/// # Errors
/// [`CudaError`]: the device.
pub fn most_fused_tokens(ordinal: i32, spec: &QuantSpec, layout: &Layout, codes: DevicePtr) -> Result<u32, CudaError> {
    most_tokens(ordinal, spec, layout, codes, |product, target| supported(product, target) && worthwhile(product))
}

/// The most tokens of which a kernel takes this weight; 0: none does.
pub(crate) fn most_tokens(
    ordinal: i32,
    spec: &QuantSpec,
    layout: &Layout,
    codes: DevicePtr,
    takes: impl Fn(&Product, &Target) -> bool,
) -> Result<u32, CudaError> {
    let target = target(device(ordinal)?);
    if layout.bits() != 4 || layout.experts() != 1 || !codes.is_multiple_of(ALIGNMENT) {
        return Ok(0);
    }
    let takes = |&tokens: &u32| takes(&product(spec, layout, tokens, false), &target);
    Ok((1..=MOST_TOKENS).rev().find(takes).unwrap_or(0))
}

/// y = x W^T + bias + the low-rank term, in one kernel, for shapes that `supported` of heuristics.rs names.
///
/// # Errors
/// [`CudaError`]: the device, or operands that the kernels do not take.
///
/// # Safety
/// The pointers name memory of the queue's device with the sizes that `layout` and `operands` give, valid until its stream
/// has passed; where `settled`, nothing that is queued or runs writes to the weight.
pub unsafe fn linear_4bit(
    queue: Queue,
    spec: &QuantSpec,
    layout: &Layout,
    codes: DevicePtr,
    scales: DeviceScales,
    operands: &Operands,
) -> Result<(), CudaError> {
    let device = device(queue.device)?;
    let Operands { x, y, bias, settled, lora, tokens, dtype } = *operands;
    let lora = lora.unwrap_or(LowRank { xa: 0, b: 0, scale: 0.0, rank: 0 });
    let product = product(spec, layout, tokens, lora.rank > 0);
    let target = target(device);
    let aligned = [codes, x, y].iter().all(|at| at.is_multiple_of(ALIGNMENT))
        && [lora.xa, lora.b].iter().all(|at| at.is_multiple_of(RANK_ALIGNMENT));
    if !aligned || layout.bits() != 4 || layout.experts() != 1 || !supported(&product, &target) {
        return Err(CudaError::Unsupported(format!("no fused kernel for {product:?}: dequantize the weight instead")));
    }
    let plan = plan(&product, &target);
    let (tokens, rank) = (tokens.cast_signed(), lora.rank);
    let (rows, columns) = (layout.rows() as i64, layout.cols() as i64);
    let block_shift = spec.block_size().trailing_zeros().cast_signed();
    let table = table::<16>(spec);
    let mut args = [
        arg(&codes),
        arg(&scales.absmax),
        arg(&scales.group_scale),
        arg(&scales.offset),
        arg(&x),
        arg(&y),
        arg(&bias),
        arg(&lora.xa),
        arg(&lora.b),
        arg(&lora.scale),
        arg(&rank),
        arg(&tokens),
        arg(&rows),
        arg(&columns),
        arg(&block_shift),
        arg(&table),
    ];
    // SAFETY: the arguments are LINEAR_4BIT_PARAMETERS of linear_4bit_problem.cuh; the caller vouches for the memory.
    unsafe { launch_plan(device, &plan, dtype, settled, queue, &mut args) }
}

/// Queue what a plan says; where the weight is `settled`, over the end of the kernel before.
///
/// # Safety
/// As [`launch`], of the plan's kernel; where `settled`, nothing that is queued or runs writes to the weight.
pub(crate) unsafe fn launch_plan(
    device: &Device,
    plan: &Plan,
    dtype: FloatType,
    settled: bool,
    queue: Queue,
    args: &mut [*mut c_void],
) -> Result<(), CudaError> {
    let (file, stem) = file(plan, dtype)?;
    let _entered = device.enter()?;
    let grid = Grid {
        ctas: plan.grid,
        shared_bytes: plan.shared_bytes,
        cluster: plan.grid.2,
        overlap: settled && device.overlaps(),
        ..Grid::new((1, 1), plan.threads)
    };
    // SAFETY: the caller's promise.
    unsafe { launch(device.function(file, (stem, plan.entry))?, grid, queue, args) }
}

pub(crate) fn product(spec: &QuantSpec, layout: &Layout, tokens: u32, lora: bool) -> Product {
    Product {
        tokens,
        rows: layout.rows() as u64,
        columns: layout.cols() as u64,
        block_size: spec.block_size() as u32,
        lora,
    }
}

pub(crate) fn target(device: &Device) -> Target {
    let (major, minor) = device.capability;
    Target { sm: (major * 10 + minor).cast_unsigned(), sms: device.multiprocessors, shared_bytes: device.shared_bytes }
}

/// The kernels of a plan for a type, and what their names begin with.
pub(crate) fn file(plan: &Plan, dtype: FloatType) -> Result<(&'static KernelFile, &'static str), CudaError> {
    match (plan.file, dtype) {
        ("linear_4bit", FloatType::Bf16) => Ok((&LINEAR_BF16, "linear_4bit_bf16")),
        ("linear_4bit", FloatType::F16) => Ok((&LINEAR_F16, "linear_4bit_f16")),
        ("linear_4bit_wide", FloatType::Bf16) => Ok((&LINEAR_WIDE_BF16, "linear_4bit_wide_bf16")),
        ("linear_4bit_wide", FloatType::F16) => Ok((&LINEAR_WIDE_F16, "linear_4bit_wide_f16")),
        ("linear_4bit_sm90", FloatType::Bf16) => Ok((&LINEAR_HOPPER_BF16, "linear_4bit_sm90_bf16")),
        ("linear_4bit_sm90", FloatType::F16) => Ok((&LINEAR_HOPPER_F16, "linear_4bit_sm90_f16")),
        ("gemm_4bit", FloatType::Bf16) => Ok((&GEMM_BF16, "gemm_4bit_bf16")),
        ("gemm_4bit", FloatType::F16) => Ok((&GEMM_F16, "gemm_4bit_f16")),
        ("gemm_4bit_sm90", FloatType::Bf16) => Ok((&GEMM_HOPPER_BF16, "gemm_4bit_sm90_bf16")),
        ("gemm_4bit_sm90", FloatType::F16) => Ok((&GEMM_HOPPER_F16, "gemm_4bit_sm90_f16")),
        ("linear_backward_4bit", FloatType::Bf16) => Ok((&LINEAR_BACKWARD_BF16, "linear_backward_4bit_bf16")),
        ("linear_backward_4bit", FloatType::F16) => Ok((&LINEAR_BACKWARD_F16, "linear_backward_4bit_f16")),
        ("linear_backward_4bit_sm90", FloatType::Bf16) => {
            Ok((&LINEAR_BACKWARD_HOPPER_BF16, "linear_backward_4bit_sm90_bf16"))
        }
        ("linear_backward_4bit_sm90", FloatType::F16) => {
            Ok((&LINEAR_BACKWARD_HOPPER_F16, "linear_backward_4bit_sm90_f16"))
        }
        (file, _) => Err(CudaError::Unsupported(format!("{file} has no kernel for {dtype:?}: dequantize instead"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A plan names a kernel by strings: each must be in the PTX that its device would load.
    #[test]
    fn every_plan_names_a_kernel_that_its_file_holds() {
        let targets = [(90, 132, 227), (120, 170, 99), (86, 84, 99), (80, 108, 163)];
        for (sm, sms, kilobytes) in targets {
            let target = Target { sm, sms, shared_bytes: kilobytes << 10 };
            let capability = ((sm / 10).cast_signed(), (sm % 10).cast_signed());
            for (rows, columns) in
                [(17, 64), (1024, 4096), (4096, 4096), (4096, 14336), (14336, 4096), (128_256, 4096), (128_256, 8192)]
            {
                for tokens in 1..=MOST_TOKENS {
                    let plan = plan(&Product { tokens, rows, columns, block_size: 64, lora: true }, &target);
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
