//! Launches `kernels/optimizer.cu`: steps over a list of parameters whose tables are in device memory.

use std::ops::Range;

use bytemuck::{Zeroable, bytes_of, cast_slice};
use qlora_core::STATE_BLOCK_SIZE;
use qlora_core::optim::MOST_STATES;

use crate::context::{Device, device};
use crate::error::CudaError;
use crate::launch::{DevicePtr, Grid, Queue, arg, launch, strided_ctas};
use crate::modules::{Name, OPTIMIZER};
use crate::optimizer_maps::StateMaps;
use crate::optimizer_tables::{
    Counter, FactorSet, GroupOptions, Places, RunRow, StepRun, StepTensor, TensorRow, pieces_of, running_sum,
};

const THREADS: u32 = 256;
const WARPS: usize = THREADS as usize / 32;
/// Sums side by side.
const SUMS: u32 = 128;
const STORE_WORDS: usize = 1008;
/// Bit positions in `Run::page_and_flags`.
const EIGHT_BIT: u32 = 1;
const STATELESS: u32 = 2;
const FLAG_BITS: u32 = 2;
/// Factor sets that a launch takes with it; more are put into device memory first.
const MOST_SETS: usize = 64;
/// Pages that one launch reaches.
pub const MOST_PAGES: usize = 48;

/// An update rule, without its factors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StepRule {
    /// `optimizer_adamw`
    AdamW,
    /// `optimizer_lion`
    Lion,
    /// `optimizer_ademamix`
    AdEMAMix,
    /// `optimizer_sgd`
    Sgd,
}

impl StepRule {
    /// The rule of the name that [`qlora_core::Rule::new`] takes.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "adamw" => Some(Self::AdamW),
            "lion" => Some(Self::Lion),
            "ademamix" => Some(Self::AdEMAMix),
            "sgd" => Some(Self::Sgd),
            _ => None,
        }
    }

    fn kernel(self) -> Name {
        match self {
            Self::AdamW => ("optimizer", "adamw"),
            Self::Lion => ("optimizer", "lion"),
            Self::AdEMAMix => ("optimizer", "ademamix"),
            Self::Sgd => ("optimizer", "sgd"),
        }
    }

    /// `RuleCode` of optimizer.cu.
    fn code(self) -> i32 {
        self as i32
    }
}

/// `StepArguments` of `optimizer_table.cuh`.
#[repr(C)]
struct StepArguments {
    tensors: DevicePtr,
    grads: DevicePtr,
    runs: DevicePtr,
    run_blocks: DevicePtr,
    maps: DevicePtr,
    sets: DevicePtr,
    clip: DevicePtr,
    first_block: i64,
    end_block: i64,
    run_count: i32,
    first_page: u32,
    pages: [u64; MOST_PAGES],
    own_sets: [FactorSet; MOST_SETS],
}

/// Where in it the factor is.
const CLIP_FACTOR: DevicePtr = 16;

/// The factors of one step.
#[derive(Debug, Clone, Copy)]
pub enum Sets<'a> {
    /// Made by the host.
    Host(&'a [FactorSet]),
    /// Those that [`StepTables::make_factors`] left in device memory.
    Device,
}

/// A list of parameters on one device, and where its tables are.
#[derive(Debug)]
pub struct StepTables {
    rule: StepRule,
    address: DevicePtr,
    tensors: Vec<StepTensor>,
    runs: Vec<RunRow>,
    run_blocks: Vec<i64>,
    pieces: Vec<i64>,
    pages: Vec<u32>,
    eight: bool,
    places: Places,
}

fn refused<T>(what: String) -> Result<T, CudaError> {
    Err(CudaError::Unsupported(what))
}

impl StepTables {
    /// Bytes of device memory that the tables take, at a multiple of 16.
    #[must_use]
    pub fn bytes(tensors: &[StepTensor], runs: usize) -> usize {
        Places::of(tensors, runs).end
    }

    /// Tables of `tensors` and of `runs`, which are in the order of their pages, at `address`. Nothing is written yet.
    ///
    /// # Errors
    /// [`CudaError::Unsupported`]: a run outside of its tensor, or pages out of order.
    pub fn new(
        rule: StepRule,
        address: DevicePtr,
        tensors: Vec<StepTensor>,
        runs: &[StepRun],
    ) -> Result<Self, CudaError> {
        let mut rows = Vec::with_capacity(runs.len());
        for (index, run) in runs.iter().enumerate() {
            let Some(tensor) = tensors.get(run.tensor) else {
                return refused(format!("run {index} is of tensor {}, of {}", run.tensor, tensors.len()));
            };
            let inside = run.start.checked_add(run.elements).is_some_and(|end| end <= tensor.elements);
            if !inside || run.elements == 0 || !run.start.is_multiple_of(STATE_BLOCK_SIZE) {
                let StepRun { start, elements, .. } = run;
                return refused(format!("run {index}: {elements} elements from {start} on, of {}", tensor.elements));
            }
            if run.states.len() > MOST_STATES || run.page >= 1 << (32 - FLAG_BITS) {
                return refused(format!("run {index}: {} states in page {}", run.states.len(), run.page));
            }
            let flags = if run.eight { EIGHT_BIT } else { 0 } | if run.states.is_empty() { STATELESS } else { 0 };
            let mut row = RunRow {
                tensor: run.tensor as u32,
                page_and_flags: run.page << FLAG_BITS | flags,
                start: run.start as i64,
                elements: run.elements as i64,
                ..RunRow::zeroed()
            };
            for (state, &(values, absmax)) in run.states.iter().enumerate() {
                (row.values[state], row.absmax[state]) = (values, absmax);
            }
            rows.push(row);
        }
        let pages: Vec<u32> = runs.iter().map(|run| run.page).collect();
        if !pages.is_sorted() || i32::try_from(runs.len()).is_err() {
            return refused(format!("{} runs, which have to be in the order of their pages", runs.len()));
        }
        Ok(Self {
            rule,
            address,
            places: Places::of(&tensors, runs.len()),
            run_blocks: running_sum(runs.iter().map(|run| run.elements.div_ceil(STATE_BLOCK_SIZE))),
            pieces: pieces_of(&tensors),
            eight: runs.iter().any(|run| run.eight),
            tensors,
            runs: rows,
            pages,
        })
    }

    fn at(&self, place: usize) -> DevicePtr {
        self.address + place as DevicePtr
    }

    /// Write what does not change from step to step.
    ///
    /// # Errors
    /// [`CudaError`]: the device.
    ///
    /// # Safety
    /// The address that `new` was given is of [`StepTables::bytes`] bytes of the queue's device, which nothing uses but
    /// what is queued there, and which stay until the stream has passed.
    pub unsafe fn upload(&self, queue: Queue) -> Result<(), CudaError> {
        let device = device(queue.device)?;
        let _entered = device.enter()?;
        let tensors: Vec<TensorRow> = self.tensors.iter().map(TensorRow::of).collect();
        // SAFETY: the caller's promise; the places lie inside.
        unsafe {
            if self.eight {
                store(device, queue, self.at(self.places.maps), bytes_of(StateMaps::get()))?;
            }
            store(device, queue, self.at(self.places.tensors), cast_slice(&tensors))?;
            store(device, queue, self.at(self.places.runs), cast_slice(&self.runs))?;
            store(device, queue, self.at(self.places.run_blocks), cast_slice(&self.run_blocks))?;
            store(device, queue, self.at(self.places.pieces), cast_slice(&self.pieces))
        }
    }

    /// Write where parameters are, which may have changed.
    ///
    /// # Errors
    /// [`CudaError`]: the device, or another number of them.
    ///
    /// # Safety
    /// As [`StepTables::upload`].
    pub unsafe fn upload_params(&mut self, queue: Queue, params: &[DevicePtr]) -> Result<(), CudaError> {
        self.expect("parameters", params.len())?;
        for (tensor, &param) in self.tensors.iter_mut().zip(params) {
            tensor.param = param;
        }
        let device = device(queue.device)?;
        let _entered = device.enter()?;
        let rows: Vec<TensorRow> = self.tensors.iter().map(TensorRow::of).collect();
        // SAFETY: the caller's promise.
        unsafe { store(device, queue, self.at(self.places.tensors), cast_slice(&rows)) }
    }

    /// Write where gradients are.
    ///
    /// # Errors
    /// [`CudaError`]: the device, or another number of them.
    ///
    /// # Safety
    /// As [`StepTables::upload`].
    pub unsafe fn upload_grads(&self, queue: Queue, grads: &[DevicePtr]) -> Result<(), CudaError> {
        self.expect("gradients", grads.len())?;
        let device = device(queue.device)?;
        let _entered = device.enter()?;
        // SAFETY: the caller's promise.
        unsafe { store(device, queue, self.at(self.places.grads), cast_slice(grads)) }
    }

    /// Write what [`StepTables::make_factors`] reads: a counter for each parameter, and the groups that they are in.
    ///
    /// # Errors
    /// [`CudaError`]: the device, or a group that is not there.
    ///
    /// # Safety
    /// As [`StepTables::upload`].
    pub unsafe fn upload_counters(
        &self,
        queue: Queue,
        counters: &[Counter],
        groups: &[GroupOptions],
    ) -> Result<(), CudaError> {
        self.expect("counters", counters.len())?;
        if groups.len() > self.tensors.len() || counters.iter().any(|counter| counter.group as usize >= groups.len()) {
            return refused(format!("{} groups of {} parameters", groups.len(), counters.len()));
        }
        let device = device(queue.device)?;
        let _entered = device.enter()?;
        // SAFETY: the caller's promise.
        unsafe {
            store(device, queue, self.at(self.places.counters), cast_slice(counters))?;
            store(device, queue, self.at(self.places.groups), cast_slice(groups))
        }
    }

    /// Count a step of each parameter and make its factors; parameter i's are those of set i.
    ///
    /// # Errors
    /// [`CudaError`]: the device.
    ///
    /// # Safety
    /// As [`StepTables::upload`], what was uploaded included; addresses in counters and groups are of live memory.
    pub unsafe fn make_factors(&self, queue: Queue) -> Result<(), CudaError> {
        let device = device(queue.device)?;
        let _entered = device.enter()?;
        let (counters, groups, sets) =
            (self.at(self.places.counters), self.at(self.places.groups), self.at(self.places.sets));
        let (count, code) = (self.tensors.len() as i32, self.rule.code());
        let mut args = [arg(&counters), arg(&groups), arg(&sets), arg(&count), arg(&code)];
        let grid = Grid::new((self.tensors.len().div_ceil(SUMS as usize).max(1) as u32, 1), SUMS);
        // SAFETY: the arguments are those of `optimizer_factors`; the caller vouches for the memory.
        unsafe { launch(device.function(&OPTIMIZER, ("optimizer", "factors"))?, grid, queue, &mut args) }
    }

    /// Sum the squares of all gradients; leaves the sum and the norm at the tables' start, as float64, and what gradients
    /// are to be multiplied by so that the norm is at most `most`.
    ///
    /// # Errors
    /// [`CudaError`]: the device.
    ///
    /// # Safety
    /// As [`StepTables::upload`], what was uploaded included; the gradients are live.
    pub unsafe fn clip(&self, queue: Queue, most: f64) -> Result<(), CudaError> {
        let device = device(queue.device)?;
        let _entered = device.enter()?;
        let pieces = self.pieces[self.tensors.len()];
        let (tensors, grads) = (self.at(self.places.tensors), self.at(self.places.grads));
        let (before, sums) = (self.at(self.places.pieces), self.at(self.places.sums));
        let (count, out) = (self.tensors.len() as i32, self.at(self.places.clip));
        if pieces > 0 {
            let mut args = [arg(&tensors), arg(&grads), arg(&before), arg(&sums), arg(&count), arg(&pieces)];
            let grid = Grid::new((strided_ctas(device, pieces.unsigned_abs() as usize, WARPS, 4), 1), THREADS);
            // SAFETY: the arguments are those of `optimizer_squares`; the caller vouches for the memory.
            unsafe { launch(device.function(&OPTIMIZER, ("optimizer", "squares"))?, grid, queue, &mut args) }?;
        }
        let mut args = [arg(&sums), arg(&pieces), arg(&most), arg(&out)];
        let grid = Grid::new((1, 1), SUMS);
        // SAFETY: as above.
        unsafe { launch(device.function(&OPTIMIZER, ("optimizer", "clip"))?, grid, queue, &mut args) }
    }

    /// Runs of the pages `pages`: 0 for those with absolute addresses.
    fn runs_of(&self, pages: &Range<u32>) -> Range<usize> {
        let before = |page: u32| self.pages.partition_point(|&of| of < page);
        before(pages.start)..before(pages.end)
    }

    /// Update what is in the pages `pages`, whose addresses are given; page 0 stands for all that is in none.
    ///
    /// `clip` is null or the address of a float32 that gradients are multiplied by; `clipped` says that it is the one that
    /// [`StepTables::clip`] has left.
    ///
    /// # Errors
    /// [`CudaError`]: the device, more than [`MOST_PAGES`], or a set that is not there.
    ///
    /// # Safety
    /// As [`StepTables::upload`], what was uploaded included; all addresses are of live memory of this device that nothing
    /// else writes before the stream has passed.
    pub unsafe fn step(
        &self,
        queue: Queue,
        pages: Range<u32>,
        addresses: &[DevicePtr],
        sets: Sets<'_>,
        clip: Option<DevicePtr>,
    ) -> Result<(), CudaError> {
        let device = device(queue.device)?;
        let _entered = device.enter()?;
        let runs = self.runs_of(&pages);
        let first_page = pages.start.max(1);
        let expected = pages.end.saturating_sub(first_page) as usize;
        if addresses.len() != expected || expected > MOST_PAGES {
            return refused(format!("{} addresses of {expected} pages; a launch takes {MOST_PAGES}", addresses.len()));
        }
        if runs.is_empty() {
            return Ok(());
        }
        let mut step = StepArguments {
            tensors: self.at(self.places.tensors),
            grads: self.at(self.places.grads),
            runs: self.at(self.places.runs),
            run_blocks: self.at(self.places.run_blocks),
            maps: if self.eight { self.at(self.places.maps) } else { 0 },
            sets: 0,
            clip: clip.unwrap_or(0),
            first_block: self.run_blocks[runs.start],
            end_block: self.run_blocks[runs.end],
            run_count: self.runs.len() as i32,
            first_page,
            pages: [0; MOST_PAGES],
            own_sets: [FactorSet::zeroed(); MOST_SETS],
        };
        step.pages[..expected].copy_from_slice(addresses);
        match sets {
            Sets::Device => step.sets = self.at(self.places.sets),
            Sets::Host(sets) => {
                if self.tensors.iter().any(|tensor| tensor.set as usize >= sets.len())
                    || sets.len() > self.tensors.len()
                {
                    return refused(format!("{} factor sets for {} parameters", sets.len(), self.tensors.len()));
                }
                if let Some(own) = step.own_sets.get_mut(..sets.len()) {
                    own.copy_from_slice(sets);
                } else {
                    step.sets = self.at(self.places.sets);
                    // SAFETY: the caller's promise.
                    unsafe { store(device, queue, step.sets, cast_slice(sets)) }?;
                }
            }
        }
        let rounds = ((step.end_block - step.first_block).unsigned_abs() as usize).div_ceil(WARPS);
        let function = device.function(&OPTIMIZER, self.rule.kernel())?;
        let grid = Grid::new((strided_ctas(device, rounds, 1, function.resident_ctas(THREADS)?), 1), THREADS);
        // SAFETY: the argument is that of `optimizer_*`; the caller vouches for the memory.
        unsafe { launch(function, grid, queue, &mut [arg(&step)]) }
    }

    /// Address of the float32 that [`StepTables::clip`] leaves.
    #[must_use]
    pub fn clip_factor(&self) -> DevicePtr {
        self.at(self.places.clip) + CLIP_FACTOR
    }

    fn expect(&self, what: &str, got: usize) -> Result<(), CudaError> {
        if got == self.tensors.len() {
            return Ok(());
        }
        refused(format!("{got} {what} for {} parameters", self.tensors.len()))
    }
}

/// Write `bytes`, which are whole words, to device memory. They travel as kernel arguments, so that they need no memory
/// that has to live until the stream is there, and a capture takes them with it.
///
/// # Safety
/// The context is current, and the memory is the caller's to write.
unsafe fn store(device: &Device, queue: Queue, to: DevicePtr, bytes: &[u8]) -> Result<(), CudaError> {
    let function = device.function(&OPTIMIZER, ("optimizer", "store"))?;
    for (index, part) in bytes.chunks(4 * STORE_WORDS).enumerate() {
        let mut words = [0u8; 4 * STORE_WORDS];
        words[..part.len()].copy_from_slice(part);
        let (to, count) = (to + (index * 4 * STORE_WORDS) as DevicePtr, (part.len() / 4) as i32);
        // SAFETY: the arguments are those of `optimizer_store`; the caller vouches for the memory.
        unsafe { launch(function, Grid::new((1, 1), THREADS), queue, &mut [arg(&to), arg(&count), arg(&words)]) }?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optimizer_tables::CLIP_BYTES;
    use qlora_core::FloatType;

    fn tensor(elements: usize) -> StepTensor {
        StepTensor { param: 256, elements, dtype: FloatType::F32, set: 0 }
    }

    fn run(tensor: usize, start: usize, elements: usize, page: u32) -> StepRun {
        StepRun { tensor, start, elements, page, eight: false, states: vec![(0, 0); 2] }
    }

    #[test]
    fn arguments_fit_what_a_kernel_takes() {
        assert!(size_of::<StepArguments>() <= 4096);
        assert_eq!((size_of::<RunRow>(), size_of::<TensorRow>(), size_of::<FactorSet>()), (72, 24, 44));
        assert_eq!((size_of::<GroupOptions>(), size_of::<Counter>()), (120, 16));
    }

    #[test]
    fn tables_lie_apart_and_count_blocks_and_pieces() {
        let tensors = vec![tensor(4097), tensor(5), tensor(300)];
        let runs = [run(1, 0, 5, 0), run(0, 0, 4096, 1), run(0, 4096, 1, 2), run(2, 0, 300, 2)];
        let tables = StepTables::new(StepRule::AdamW, 0, tensors.clone(), &runs).expect("fits");
        assert_eq!(tables.run_blocks, [0, 1, 17, 18, 20]);
        assert_eq!(tables.pieces, [0, 2, 3, 4]);
        assert_eq!((tables.runs_of(&(0..1)), tables.runs_of(&(1..3)), tables.runs_of(&(2..3))), (0..1, 1..4, 2..4));
        let places = tables.places;
        assert!(places.sums + 4 * 8 <= places.end && places.end == StepTables::bytes(&tensors, 4));
        assert!(places.clip + CLIP_BYTES <= places.maps && places.runs + 4 * 72 <= places.run_blocks);
    }

    #[test]
    fn runs_outside_of_their_tensors_are_refused() {
        for (runs, what) in [
            (vec![run(0, 0, 301, 0)], "301 elements from 0 on, of 300"),
            (vec![run(0, 100, 1, 0)], "1 elements from 100"),
            (vec![run(1, 0, 1, 0)], "of tensor 1, of 1"),
            (vec![run(0, 0, 256, 2), run(0, 256, 44, 1)], "in the order of their pages"),
        ] {
            let error = StepTables::new(StepRule::Lion, 0, vec![tensor(300)], &runs).expect_err("refused");
            assert!(error.to_string().contains(what), "{error}");
        }
    }
}
