//! The rows of `kernels/optimizer.cu`'s tables, and where each table lies.

use bytemuck::{Pod, Zeroable};
use qlora_core::FloatType;
use qlora_core::optim::MOST_STATES;

use crate::error::CudaError;
use crate::launch::DevicePtr;
use crate::optimizer_maps::StateMaps;

/// Factors that a rule has at most.
pub const MOST_FACTORS: usize = 10;
/// Elements whose squares are summed by one warp.
const PIECE: usize = 4096;
/// Tables begin at multiples of this.
const ALIGNMENT: usize = 16;
/// `Clip` of optimizer.cu, as it lies in the tables.
pub const CLIP_BYTES: usize = 24;

/// A parameter.
#[derive(Debug, Clone, Copy)]
pub struct StepTensor {
    /// Its elements, contiguous.
    pub param: DevicePtr,
    /// How many.
    pub elements: usize,
    /// Of parameter and gradient.
    pub dtype: FloatType,
    /// Index of its factors among those that a step is given.
    pub set: u32,
}

/// Elements of a parameter whose states lie together.
#[derive(Debug, Clone)]
pub struct StepRun {
    /// Index of the parameter.
    pub tensor: usize,
    /// The first element, a multiple of 256.
    pub start: usize,
    /// How many; more than none.
    pub elements: usize,
    /// What addresses of states are relative to: 0 nothing, else the page of this number.
    pub page: u32,
    /// Do states have 8 bits?
    pub eight: bool,
    /// (values, scales) of each state; scales are 0 where there are none.
    pub states: Vec<(DevicePtr, DevicePtr)>,
}

/// `Tensor` of `optimizer_table.cuh`.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct TensorRow {
    pub(crate) param: u64,
    pub(crate) elements: i64,
    pub(crate) dtype: u32,
    pub(crate) set: u32,
}

/// `Run` of `optimizer_table.cuh`.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct RunRow {
    pub(crate) tensor: u32,
    pub(crate) page_and_flags: u32,
    pub(crate) start: i64,
    pub(crate) elements: i64,
    pub(crate) values: [u64; MOST_STATES],
    pub(crate) absmax: [u64; MOST_STATES],
}

/// `FactorSet` of `optimizer_table.cuh`: factors of a rule, and what gradients are multiplied by first.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct FactorSet {
    values: [f32; MOST_FACTORS],
    scale: f32,
}

impl FactorSet {
    /// Of a rule's factors, in the order of its fields.
    ///
    /// # Errors
    /// [`CudaError::Unsupported`]: more than any rule has.
    pub fn new(factors: &[f32], scale: f32) -> Result<Self, CudaError> {
        let mut values = [0.0; MOST_FACTORS];
        values
            .get_mut(..factors.len())
            .ok_or_else(|| CudaError::Unsupported(format!("{} factors", factors.len())))?
            .copy_from_slice(factors);
        Ok(Self { values, scale })
    }
}

/// `GroupOptions` of optimizer.cu, for factors that are made on the device.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct GroupOptions {
    /// Weight decay, three betas, eps, alpha, `t_alpha`, `t_beta3`, momentum, dampening, nesterov, sign of the gradient, lr.
    pub values: [f64; 13],
    /// Where the learning rate is, instead of the last of the values; 0: nowhere.
    pub lr_address: u64,
    /// 1 where it is a float64 there, else 0.
    pub lr_is_double: u32,
    /// Padding.
    pub unused: u32,
}

/// `Counter` of optimizer.cu.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct Counter {
    /// Address of the float32 number of steps.
    pub steps: u64,
    /// Index of the group.
    pub group: u32,
    /// Padding.
    pub unused: u32,
}

impl TensorRow {
    pub(crate) fn of(tensor: &StepTensor) -> Self {
        let dtype = match tensor.dtype {
            FloatType::F32 => 0,
            FloatType::Bf16 => 1,
            FloatType::F16 => 2,
        };
        Self { param: tensor.param, elements: tensor.elements as i64, dtype, set: tensor.set }
    }
}

/// Byte offsets of the tables.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Places {
    pub(crate) clip: usize,
    pub(crate) maps: usize,
    pub(crate) tensors: usize,
    pub(crate) grads: usize,
    pub(crate) runs: usize,
    pub(crate) run_blocks: usize,
    pub(crate) pieces: usize,
    pub(crate) counters: usize,
    pub(crate) groups: usize,
    pub(crate) sets: usize,
    pub(crate) sums: usize,
    pub(crate) end: usize,
}

impl Places {
    pub(crate) fn of(tensors: &[StepTensor], runs: usize) -> Self {
        let mut end = 0usize;
        let mut take = |bytes: usize| {
            let start = end;
            end = (start + bytes).next_multiple_of(ALIGNMENT);
            start
        };
        let count = tensors.len();
        let mut places = Self {
            clip: take(CLIP_BYTES),
            maps: take(size_of::<StateMaps>()),
            tensors: take(count * size_of::<TensorRow>()),
            grads: take(count * 8),
            runs: take(runs * size_of::<RunRow>()),
            run_blocks: take((runs + 1) * 8),
            pieces: take((count + 1) * 8),
            counters: take(count * size_of::<Counter>()),
            groups: take(count * size_of::<GroupOptions>()),
            sets: take(count * size_of::<FactorSet>()),
            sums: take(pieces_of(tensors).last().map_or(0, |pieces| pieces.unsigned_abs() as usize) * 8),
            end: 0,
        };
        places.end = end;
        places
    }
}

/// Pieces before each tensor, and in all.
pub(crate) fn pieces_of(tensors: &[StepTensor]) -> Vec<i64> {
    running_sum(tensors.iter().map(|tensor| tensor.elements.div_ceil(PIECE)))
}

pub(crate) fn running_sum(counts: impl Iterator<Item = usize>) -> Vec<i64> {
    let mut sum = 0;
    let sums = counts.map(|count| {
        sum += count as i64;
        sum
    });
    std::iter::once(0).chain(sums.collect::<Vec<_>>()).collect()
}
