//! Slices of weights to their places in the output: quantized, or as they are.

use std::sync::mpsc::Sender;

use half::{bf16, f16};
use qlora_core::{
    Control, CoreError, FloatType, Floats, Layout, Nonfinite, Parallel, QuantSpec, double_quantize, quantize,
};

use crate::error::CheckpointError;
use crate::plan::{Extent, PackStep, Plan, Step};
use crate::slices::Piece;
use crate::transpose::Transposed;
use crate::writer::{Part, Writer};

/// What is done with slices, in one thread, and memory that is used again from slice to slice.
pub struct Worker<'a> {
    plan: &'a Plan,
    spec: &'a QuantSpec,
    output: Output<'a>,
    control: &'a Control,
    lanes: Vec<Weight>,
    codes: Vec<u8>,
    nested_codes: Vec<u8>,
    group_scales: Vec<f32>,
}

/// The tensor in work, of which there is one for each file in work.
#[derive(Default)]
struct Weight {
    /// Its output: codes, scales, scales of scales and their offsets.
    parts: Vec<Part>,
    /// float32 scales: of the slice, or of the expert so far when they are quantized again.
    absmax: Vec<f32>,
    /// The expert in work, where it is stored transposed.
    matrix: Transposed,
    spoiled: Option<Spoiled>,
}

/// NaN or infinite values met in the weight in work.
struct Spoiled {
    count: u64,
    first: u64,
}

/// Where bytes are written, and who is told of it.
struct Output<'a> {
    writer: &'a Writer,
    written: Sender<Extent>,
}

impl Output<'_> {
    fn append(&self, part: &mut Part, bytes: &[u8]) -> Result<(), CheckpointError> {
        self.writer.append(part, bytes)?;
        if let Some(extent) = part.news() {
            // Whoever follows has left only for a reason that is told once all is written.
            let _ = self.written.send(extent);
        }
        Ok(())
    }
}

impl<'a> Worker<'a> {
    /// For so many `lanes`; `written` hears of output.
    #[must_use]
    pub fn new(
        plan: &'a Plan,
        spec: &'a QuantSpec,
        writer: &'a Writer,
        written: Sender<Extent>,
        lanes: usize,
        control: &'a Control,
    ) -> Self {
        Self {
            plan,
            spec,
            output: Output { writer, written },
            control,
            lanes: (0..lanes).map(|_| Weight::default()).collect(),
            codes: Vec::new(),
            nested_codes: Vec::new(),
            group_scales: Vec::new(),
        }
    }

    /// Take the next piece of a tensor, all pieces of which come through one `lane`, in order. Returns the checksums of its
    /// output once it is finished.
    ///
    /// # Errors
    /// [`CheckpointError::NonFinite`] at the end of a weight, [`CheckpointError::Io`], or the wish to stop.
    pub fn work(
        &mut self,
        lane: usize,
        source: usize,
        tensor: usize,
        piece: Piece,
        bytes: &[u8],
        parallel: &Parallel,
    ) -> Result<Option<String>, CheckpointError> {
        let from = &self.plan.sources[source];
        if self.lanes[lane].parts.is_empty() {
            self.lanes[lane].parts = from.extents(tensor).into_iter().map(Part::new).collect();
        }
        let last = match (&from.steps[tensor], piece) {
            (Step::Copy(_), Piece::Bytes { offset }) => {
                self.output.append(&mut self.lanes[lane].parts[0], bytes)?;
                offset + bytes.len() as u64 == from.header.tensors[tensor].bytes()
            }
            (Step::Pack(step), Piece::Block { expert, row, rows, col, cols }) => {
                let at = At { expert, row, rows, col, cols };
                let ends = (row + rows, col + cols) == step.stored();
                if step.transposed {
                    self.gather(lane, step, at, bytes, ends, parallel)?;
                } else {
                    self.quantize(lane, step, at, bytes, parallel)?;
                }
                ends && expert + 1 == step.experts
            }
            _ => unreachable!("the reader cuts a tensor as its step says"),
        };
        if !last {
            return Ok(None);
        }
        if let Some(Spoiled { count, first }) = self.lanes[lane].spoiled.take() {
            let name = from.header.tensors[tensor].name.clone();
            return Err(CheckpointError::NonFinite { path: from.path.clone(), tensor: name, count, first });
        }
        Ok(Some(Writer::checksum_of(&std::mem::take(&mut self.lanes[lane].parts))))
    }

    /// Take a slice of a matrix that is stored transposed; with the one that `ends` it the matrix is quantized.
    fn gather(
        &mut self,
        lane: usize,
        step: &PackStep,
        at: At,
        bytes: &[u8],
        ends: bool,
        parallel: &Parallel,
    ) -> Result<(), CheckpointError> {
        let Weight { matrix, spoiled, .. } = &mut self.lanes[lane];
        if at.row == 0 && at.col == 0 {
            matrix.begin(step.rows, step.cols, step.float_type);
        }
        let (rows, columns) = (at.row..at.row + at.rows, at.col..at.col + at.cols);
        matrix.gather(bytes, rows, columns, step.float_type, parallel, self.control)?;
        if !ends {
            return Ok(());
        }
        let (matrix, sound) = (std::mem::take(matrix), spoiled.is_none());
        let whole = At { expert: at.expert, row: 0, rows: step.rows, col: 0, cols: step.cols };
        self.quantize(lane, step, whole, matrix.bytes(), parallel)?;
        let weight = &mut self.lanes[lane];
        if let Some(spoiled) = weight.spoiled.as_mut().filter(|_| sound) {
            let before = (at.expert * step.rows * step.cols) as u64;
            spoiled.first = matrix.first_nonfinite(step.float_type).map_or(spoiled.first, |first| before + first);
        }
        weight.matrix = matrix;
        Ok(())
    }

    fn quantize(
        &mut self,
        lane: usize,
        step: &PackStep,
        at: At,
        bytes: &[u8],
        parallel: &Parallel,
    ) -> Result<(), CheckpointError> {
        let Weight { parts, absmax, spoiled, .. } = &mut self.lanes[lane];
        let layout = Layout::new(1, at.rows, at.cols, self.spec)?;
        if step.nested.is_none() || (at.row == 0 && at.col == 0) {
            absmax.clear();
        }
        let before = absmax.len();
        absmax.resize(before + layout.blocks(), 0.0);
        self.codes.resize(layout.code_bytes(), 0);
        let outcome = quantize(
            floats(step.float_type, bytes),
            &layout,
            self.spec,
            Nonfinite::Raise,
            &mut self.codes,
            &mut absmax[before..],
            parallel,
            self.control,
        );
        match outcome {
            Err(CoreError::NonFinite { count, first }) => {
                let element = (at.expert * step.rows + at.row) * step.cols + at.col;
                let spoiled = spoiled.get_or_insert(Spoiled { count: 0, first: element as u64 + first });
                spoiled.count += count;
            }
            outcome => outcome?,
        }
        if spoiled.is_some() {
            // Read on only to count; nothing of this weight will be kept.
            return Ok(());
        }
        self.output.append(&mut parts[0], &self.codes)?;
        if step.nested.is_none() {
            return self.output.append(&mut parts[1], bytemuck::cast_slice(absmax));
        }
        if at.row + at.rows < step.rows || at.col + at.cols < step.cols {
            return Ok(());
        }
        let (blocks, groups) = (step.layout.blocks_per_expert(), step.layout.groups_per_expert());
        self.nested_codes.resize(blocks, 0);
        self.group_scales.resize(groups, 0.0);
        let mut mean = [0.0];
        double_quantize(
            absmax,
            blocks,
            &mut self.nested_codes,
            &mut self.group_scales,
            &mut mean,
            parallel,
            self.control,
        )?;
        self.output.append(&mut parts[1], &self.nested_codes)?;
        self.output.append(&mut parts[2], bytemuck::cast_slice(&self.group_scales))?;
        self.output.append(&mut parts[3], bytemuck::cast_slice(&mean))
    }
}

/// Where a slice lies in its weight.
#[derive(Debug, Clone, Copy)]
struct At {
    expert: usize,
    row: usize,
    rows: usize,
    col: usize,
    cols: usize,
}

/// Bytes as the floats that they are.
#[must_use]
pub fn floats(float_type: FloatType, bytes: &[u8]) -> Floats<'_> {
    match float_type {
        FloatType::F32 => Floats::F32(bytemuck::cast_slice::<u8, f32>(bytes)),
        FloatType::Bf16 => Floats::Bf16(bytemuck::cast_slice::<u8, bf16>(bytes)),
        FloatType::F16 => Floats::F16(bytemuck::cast_slice::<u8, f16>(bytes)),
    }
}
