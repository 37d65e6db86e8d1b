//! The pipeline: one thread reads, one hashes, this one quantizes on the pool and writes, one keeps the journal; four
//! slices are in flight.

use std::path::Path;
use std::sync::mpsc::{self, Receiver};
use std::thread;

use half::{bf16, f16};
use qlora_core::{
    Control, CoreError, FloatType, Floats, Layout, Nonfinite, Parallel, QuantSpec, double_quantize, quantize,
};

use crate::error::CheckpointError;
use crate::hasher::{Hashed, hash_all};
use crate::journal::{Finished, Journal};
use crate::plan::{PackStep, Plan, Step};
use crate::reader::{Buffer, Lines, Piece, Slice, changed, read_all};
use crate::resume::Remaining;
use crate::transpose::Transposed;
use crate::writer::Writer;

/// Slices in flight: being read, hashed, quantized, and one waiting.
const BUFFERS: usize = 4;

/// How the pipeline runs; none of it changes the bytes.
#[derive(Debug, Clone, Copy)]
pub struct PackOptions {
    /// Bytes of a slice.
    pub slice_bytes: usize,
    /// Threads that quantize; 0 for all.
    pub num_threads: usize,
}

impl Default for PackOptions {
    fn default() -> Self {
        Self { slice_bytes: 8 << 20, num_threads: 0 }
    }
}

/// How an interruption is survived.
#[derive(Debug, Clone, Copy)]
pub struct Resumption<'a> {
    /// Gets a line for each tensor and source file that is finished.
    pub journal: &'a Path,
    /// What earlier runs of the same plan have finished; it is checked.
    pub finished: &'a Finished,
}

/// Carry out a plan: write its shards into the existing folder `destination`, which belongs to nobody else. Returns the
/// SHA-256 of each source file, in hexadecimal.
///
/// # Errors
/// Everything that [`CheckpointError`] names; the shards are then not valid files, and it is the caller who removes or
/// resumes them.
pub fn pack(
    plan: &Plan,
    spec: &QuantSpec,
    destination: &Path,
    options: PackOptions,
    resumption: Option<Resumption<'_>>,
    control: &Control,
) -> Result<Vec<String>, CheckpointError> {
    control.set_total(plan.source_bytes());
    let journal = resumption.map(|resumption| Journal::open(resumption.journal)).transpose()?;
    let writer = Writer::open(destination, plan)?;
    let nothing = Finished::default();
    let finished = resumption.map_or(&nothing, |resumption| resumption.finished);
    let Remaining { done, wanted, digests } = Remaining::check(plan, &writer, finished, control)?;
    let mut digests = digests;
    let slice_bytes = options.slice_bytes.max(1);
    let (events, unhashed) = mpsc::sync_channel(BUFFERS);
    let (hashed, incoming) = mpsc::sync_channel(BUFFERS);
    let (recycle, empties) = mpsc::channel();
    let (news, written) = mpsc::channel();
    for _ in 0..BUFFERS {
        // The receiver lives in this function.
        let _ = recycle.send(Buffer::new(slice_bytes));
    }
    thread::scope(|scope| {
        let (lines, wanted) = (Lines { events, empties }, &wanted);
        scope.spawn(move || read_all(&plan.sources, wanted, slice_bytes, &lines, control));
        scope.spawn(move || hash_all(unhashed, &hashed));
        let output = &writer;
        let recorder = journal.map(|journal| scope.spawn(move || record_all(plan, output, journal, written, control)));
        let mut worker = Worker::new(plan, spec, &writer, options.num_threads, control);
        // Moved in, so that on every way out the other threads find nobody listening and end.
        let (incoming, recycle, news) = (incoming, recycle, news);
        for event in &incoming {
            match event? {
                Hashed::Slice(Slice { source, tensor, piece, buffer }) => {
                    if !done[source][tensor] && worker.work(source, tensor, piece, buffer.filled())? {
                        // Nobody listens where there is no journal, or where it failed, which is told below.
                        let _ = news.send(Written::Tensor { source, tensor });
                    }
                    control.advance(buffer.filled().len() as u64);
                    let _ = recycle.send(buffer);
                }
                Hashed::Digest { source, digest } => {
                    control.advance(plan.sources[source].header.data_start());
                    if digests[source].as_ref().is_some_and(|earlier| *earlier != digest) {
                        return Err(changed(&plan.sources[source]));
                    }
                    let _ = news.send(Written::File { source, digest: digest.clone() });
                    digests[source] = Some(digest);
                }
            }
        }
        drop(news);
        match recorder.map(thread::ScopedJoinHandle::join) {
            Some(Ok(outcome)) => outcome?,
            Some(Err(panic)) => std::panic::resume_unwind(panic),
            None => {}
        }
        control.check().map_err(CheckpointError::from)
    })?;
    let digests: Vec<String> = digests.into_iter().flatten().collect();
    for shard in 0..plan.shards.len() {
        control.check()?;
        writer.finish(shard, &plan.header_bytes(shard, &digests))?;
    }
    Ok(digests)
}

/// What the journal hears of.
#[derive(Debug)]
enum Written {
    /// A tensor's output.
    Tensor { source: usize, tensor: usize },
    /// A source file is read to its end.
    File { source: usize, digest: String },
}

/// Keep the journal until nobody has news. Outputs are read back, from the page cache, to be hashed: a quarter of what is
/// hashed of the source, and off the path that everything else waits on.
fn record_all(
    plan: &Plan,
    writer: &Writer,
    mut journal: Journal,
    written: Receiver<Written>,
    control: &Control,
) -> Result<(), CheckpointError> {
    for news in written {
        match news {
            Written::Tensor { source, tensor } => {
                let source = &plan.sources[source];
                let sha256 = writer.hash(&source.extents(tensor), control)?;
                journal.add_tensor(&source.header.tensors[tensor].name, &sha256)?;
            }
            Written::File { source, digest } => journal.add_file(&plan.sources[source].name, &digest)?,
        }
    }
    Ok(())
}

/// The weight in work, and memory that is used again from slice to slice.
struct Worker<'a> {
    plan: &'a Plan,
    spec: &'a QuantSpec,
    writer: &'a Writer,
    parallel: Parallel,
    control: &'a Control,
    codes: Vec<u8>,
    /// float32 scales: of the slice, or of the expert in work when they are quantized again.
    absmax: Vec<f32>,
    nested_codes: Vec<u8>,
    group_scales: Vec<f32>,
    /// The expert in work, of a weight that is stored transposed.
    matrix: Transposed,
    spoiled: Option<Spoiled>,
}

/// NaN or infinite values met in the weight in work.
struct Spoiled {
    count: u64,
    first: u64,
}

impl<'a> Worker<'a> {
    fn new(plan: &'a Plan, spec: &'a QuantSpec, writer: &'a Writer, num_threads: usize, control: &'a Control) -> Self {
        Self {
            plan,
            spec,
            writer,
            parallel: Parallel::new(num_threads),
            control,
            codes: Vec::new(),
            absmax: Vec::new(),
            nested_codes: Vec::new(),
            group_scales: Vec::new(),
            matrix: Transposed::default(),
            spoiled: None,
        }
    }

    /// Returns whether the tensor is finished with this slice.
    fn work(&mut self, source: usize, tensor: usize, piece: Piece, bytes: &[u8]) -> Result<bool, CheckpointError> {
        match (&self.plan.sources[source].steps[tensor], piece) {
            (Step::Copy(slot), Piece::Bytes { offset }) => {
                self.writer.write(*slot, offset as usize, bytes)?;
                Ok(offset + bytes.len() as u64 == self.plan.sources[source].header.tensors[tensor].bytes())
            }
            (Step::Pack(step), Piece::Block { expert, row, rows, col, cols }) => {
                let at = At { expert, row, rows, col, cols };
                let (stored_rows, stored_cols) = step.stored();
                let ends = at.row + at.rows == stored_rows && at.col + at.cols == stored_cols;
                if step.transposed {
                    self.gather(step, at, bytes, ends)?;
                } else {
                    self.quantize(step, at, bytes)?;
                }
                let last = ends && at.expert + 1 == step.experts;
                if last {
                    self.refuse_nonfinite(source, tensor)?;
                }
                Ok(last)
            }
            _ => unreachable!("the reader cuts a tensor as its step says"),
        }
    }

    /// Take a slice of a matrix that is stored transposed; with the one that `ends` it the matrix is quantized.
    fn gather(&mut self, step: &PackStep, at: At, bytes: &[u8], ends: bool) -> Result<(), CheckpointError> {
        if at.row == 0 && at.col == 0 {
            self.matrix.begin(step.rows, step.cols, step.float_type);
        }
        let (rows, columns) = (at.row..at.row + at.rows, at.col..at.col + at.cols);
        self.matrix.gather(bytes, rows, columns, step.float_type, &self.parallel, self.control)?;
        if !ends {
            return Ok(());
        }
        let matrix = std::mem::take(&mut self.matrix);
        let (row, col, sound) = (0, 0, self.spoiled.is_none());
        self.quantize(step, At { expert: at.expert, row, rows: step.rows, col, cols: step.cols }, matrix.bytes())?;
        if let Some(spoiled) = self.spoiled.as_mut().filter(|_| sound) {
            let before = (at.expert * step.rows * step.cols) as u64;
            spoiled.first = matrix.first_nonfinite(step.float_type).map_or(spoiled.first, |first| before + first);
        }
        self.matrix = matrix;
        Ok(())
    }

    fn quantize(&mut self, step: &PackStep, at: At, bytes: &[u8]) -> Result<(), CheckpointError> {
        let layout = Layout::new(1, at.rows, at.cols, self.spec)?;
        let blocks_before = at.row * step.layout.blocks_per_row() + at.col / step.layout.block_size();
        self.codes.resize(layout.code_bytes(), 0);
        let held = if step.nested.is_some() {
            self.absmax.resize(step.layout.blocks_per_expert(), 0.0);
            blocks_before..blocks_before + layout.blocks()
        } else {
            self.absmax.resize(layout.blocks(), 0.0);
            0..layout.blocks()
        };
        let outcome = quantize(
            floats(step.float_type, bytes),
            &layout,
            self.spec,
            Nonfinite::Raise,
            &mut self.codes,
            &mut self.absmax[held],
            &self.parallel,
            self.control,
        );
        match outcome {
            Err(CoreError::NonFinite { count, first }) => {
                let element = (at.expert * step.rows + at.row) * step.cols + at.col;
                let spoiled = self.spoiled.get_or_insert(Spoiled { count: 0, first: element as u64 + first });
                spoiled.count += count;
            }
            outcome => outcome?,
        }
        if self.spoiled.is_some() {
            // Read on only to count; nothing of this weight will be kept.
            return Ok(());
        }
        let row = at.expert * step.rows + at.row;
        let in_row = if layout.bits() == 8 { at.col } else { at.col / 2 };
        self.writer.write(step.codes, row * step.layout.bytes_per_row() + in_row, &self.codes)?;
        let Some((scale, offset)) = step.nested else {
            let block = at.expert * step.layout.blocks_per_expert() + blocks_before;
            return self.writer.write(step.absmax, 4 * block, bytemuck::cast_slice(&self.absmax));
        };
        if at.row + at.rows < step.rows || at.col + at.cols < step.cols {
            return Ok(());
        }
        let (blocks, groups) = (step.layout.blocks_per_expert(), step.layout.groups_per_expert());
        self.nested_codes.resize(blocks, 0);
        self.group_scales.resize(groups, 0.0);
        let mut mean = [0.0];
        double_quantize(
            &self.absmax,
            blocks,
            &mut self.nested_codes,
            &mut self.group_scales,
            &mut mean,
            &self.parallel,
            self.control,
        )?;
        self.writer.write(step.absmax, at.expert * blocks, &self.nested_codes)?;
        self.writer.write(scale, 4 * at.expert * groups, bytemuck::cast_slice(&self.group_scales))?;
        self.writer.write(offset, 4 * at.expert, bytemuck::cast_slice(&mean))
    }

    fn refuse_nonfinite(&mut self, source: usize, tensor: usize) -> Result<(), CheckpointError> {
        let source = &self.plan.sources[source];
        match self.spoiled.take() {
            None => Ok(()),
            Some(Spoiled { count, first }) => Err(CheckpointError::NonFinite {
                path: source.path.clone(),
                tensor: source.header.tensors[tensor].name.clone(),
                count,
                first,
            }),
        }
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
