//! Codes and scales back to floats.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::codebook::Codebook;
use crate::control::Control;
use crate::double_quant::decode_scales;
use crate::error::CoreError;
use crate::float::{CANONICAL_NAN, Element, FloatsMut};
use crate::layout::{Layout, Runs};
use crate::pack::nibble;
use crate::parallel::Parallel;
use crate::simd::{self, SimdLevel};
use crate::spec::QuantSpec;

/// The scales of a packed weight.
#[derive(Debug, Clone, Copy)]
pub enum Scales<'a> {
    /// One float32 a block.
    Plain(&'a [f32]),
    /// Doubly quantized.
    Nested {
        /// One code a block.
        codes: &'a [u8],
        /// One float32 per 256 blocks of an expert.
        scale: &'a [f32],
        /// One float32 an expert.
        offset: &'a [f32],
    },
}

/// What codes stand for, padded with zeros to all that they can be.
#[derive(Debug, Clone)]
pub enum Table {
    /// Codes of four bits.
    Nibbles([f32; 16]),
    /// Codes of eight.
    Bytes(Box<ByteTable>),
}

/// 256 values, as scalar and as vector code looks them up.
#[derive(Debug, Clone)]
pub struct ByteTable {
    pub(crate) values: [f32; 256],
    /// The lower halves of their bits.
    pub(crate) lower: [u16; 256],
    /// The upper halves.
    pub(crate) upper: [u16; 256],
}

impl ByteTable {
    fn new(book: &Codebook) -> Self {
        let values: [f32; 256] = padded(book);
        let half = |shift: u32| values.map(|value| (value.to_bits() >> shift) as u16);
        Self { values, lower: half(0), upper: half(16) }
    }
}

impl Table {
    /// Of a codebook.
    #[must_use]
    pub fn new(book: &Codebook) -> Self {
        if book.bits() == 4 { Self::Nibbles(padded(book)) } else { Self::Bytes(Box::new(ByteTable::new(book))) }
    }

    /// Bits that a code takes: 4 or 8.
    #[must_use]
    pub fn bits(&self) -> u8 {
        match self {
            Self::Nibbles(_) => 4,
            Self::Bytes(_) => 8,
        }
    }
}

fn padded<const N: usize>(book: &Codebook) -> [f32; N] {
    let mut table = [0.0; N];
    table[..book.values().len()].copy_from_slice(book.values());
    table
}

/// Scales decoded at a time; they stay in the first-level cache.
const SCALE_BATCH: usize = 256;
/// Outputs from this size on are written past the caches: the next reader would find little of them there.
const STREAMING_BYTES: usize = 16 << 20;

/// Dequantize a whole weight: `T(codebook[code] * absmax)`, one float32 product and one rounding.
///
/// A scale that is not finite gives a block of NaN, a scale of 0 a block of +0.
///
/// # Errors
/// [`CoreError::Shape`] when a length does not fit the layout, [`CoreError::Code`] for a code that the codebook does
/// not have, [`CoreError::Interrupted`].
pub fn dequantize(
    codes: &[u8],
    scales: Scales<'_>,
    layout: &Layout,
    spec: &QuantSpec,
    out: FloatsMut<'_>,
    parallel: &Parallel,
    control: &Control,
) -> Result<(), CoreError> {
    dequantize_at(simd::simd_level()?, codes, scales, layout, spec, out, parallel, control)
}

/// [`dequantize`] with a given instruction set, which the processor must have.
///
/// # Errors
/// As [`dequantize`].
#[allow(clippy::too_many_arguments)] // inputs, output, then how to run; each has its own type
pub fn dequantize_at(
    level: SimdLevel,
    codes: &[u8],
    scales: Scales<'_>,
    layout: &Layout,
    spec: &QuantSpec,
    out: FloatsMut<'_>,
    parallel: &Parallel,
    control: &Control,
) -> Result<(), CoreError> {
    let fits = match scales {
        Scales::Plain(absmax) => absmax.len() == layout.blocks(),
        Scales::Nested { codes, scale, offset } => {
            (codes.len(), scale.len(), offset.len()) == (layout.blocks(), layout.groups(), layout.experts())
        }
    };
    if !fits || codes.len() != layout.code_bytes() || out.len() != layout.elements() {
        return Err(CoreError::Shape(format!(
            "expected {} code bytes, {} scales and {} elements; got {} bytes and {} elements{}",
            layout.code_bytes(),
            layout.blocks(),
            layout.elements(),
            codes.len(),
            out.len(),
            if fits { "" } else { ", and scales of other lengths" }
        )));
    }
    let table = Table::new(spec.codebook());
    let streaming = layout.elements() * out.float_type().size() >= STREAMING_BYTES;
    let job = Job { level, codes, scales, layout, spec, runs: layout.runs(), table, streaming };
    match out {
        FloatsMut::F32(out) => job.run(out, parallel, control),
        FloatsMut::Bf16(out) => job.run(out, parallel, control),
        FloatsMut::F16(out) => job.run(out, parallel, control),
    }
}

struct Job<'a> {
    level: SimdLevel,
    codes: &'a [u8],
    scales: Scales<'a>,
    layout: &'a Layout,
    spec: &'a QuantSpec,
    runs: Runs,
    table: Table,
    streaming: bool,
}

impl Job<'_> {
    fn run<T: simd::Kernels>(
        &self,
        mut out: &mut [T],
        parallel: &Parallel,
        control: &Control,
    ) -> Result<(), CoreError> {
        simd::advise_large_pages(out);
        let runs = &self.runs;
        let mut pieces = Vec::new();
        for blocks in runs.pieces(parallel.blocks_per_piece(runs.blocks, runs.block_size)) {
            let (here, rest) = out.split_at_mut(runs.element(blocks.end) - runs.element(blocks.start));
            out = rest;
            pieces.push((blocks, here));
        }
        let unknown = AtomicBool::new(false);
        parallel.for_each(pieces, control, |(blocks, out)| {
            let base = runs.element(blocks.start);
            let mut first = blocks.start;
            while first < blocks.end {
                let last = blocks.end.min(first + SCALE_BATCH);
                if self.has_unknown_code(&self.codes[runs.byte(first)..runs.byte(last)]) {
                    unknown.store(true, Ordering::Relaxed);
                    return;
                }
                let (from, to) = (runs.element(first) - base, runs.element(last) - base);
                self.batch(first..last, &mut out[from..to]);
                first = last;
            }
        })?;
        if unknown.into_inner() {
            let entries = self.spec.codebook().values().len();
            return Err(first_unknown_code(self.codes, &self.runs, entries).expect("such a code was seen"));
        }
        Ok(())
    }

    /// Does a byte, the padding of odd rows included, hold a code that the table lacks? A full table needs no look.
    fn has_unknown_code(&self, bytes: &[u8]) -> bool {
        let entries = self.spec.codebook().values().len();
        // The largest code is sought without an early end, so that the compiler makes vector code of it.
        let largest = match (self.runs.nibbles, entries) {
            (true, 16) | (false, 256) => return false,
            (true, _) => bytes.iter().fold(0, |top, byte| top.max(byte >> 4).max(byte & 15)),
            (false, _) => bytes.iter().fold(0, |top, byte| top.max(*byte)),
        };
        usize::from(largest) >= entries
    }

    /// At most [`SCALE_BATCH`] consecutive blocks.
    fn batch<T: simd::Kernels>(&self, blocks: std::ops::Range<usize>, out: &mut [T]) {
        let mut buffer = [0.0f32; SCALE_BATCH];
        let absmax = match self.scales {
            Scales::Plain(absmax) => &absmax[blocks.clone()],
            Scales::Nested { codes, scale, offset } => {
                let absmax = &mut buffer[..blocks.len()];
                let (per_expert, groups) = (self.layout.blocks_per_expert(), self.layout.groups_per_expert());
                let mut done = 0;
                while done < absmax.len() {
                    let block = blocks.start + done;
                    let (expert, within) = (block / per_expert, block % per_expert);
                    let here = (absmax.len() - done).min(per_expert - within);
                    decode_scales(
                        self.level,
                        &codes[expert * per_expert..],
                        &scale[expert * groups..],
                        offset[expert],
                        within,
                        &mut absmax[done..done + here],
                    );
                    done += here;
                }
                absmax
            }
        };
        let runs = &self.runs;
        let (first, base) = (blocks.start, runs.element(blocks.start));
        let mut block = first;
        while block < blocks.end {
            let element = runs.element(block) - base;
            let bytes = &self.codes[runs.byte(block)..];
            let full = if self.level == SimdLevel::Scalar { 0 } else { runs.full_blocks(block, blocks.end) };
            if full > 0 {
                let elements = full * runs.block_size;
                T::decode(
                    self.level,
                    &bytes[..elements * usize::from(self.table.bits()) / 8],
                    &absmax[block - first..block - first + full],
                    runs.block_size,
                    &self.table,
                    self.streaming,
                    &mut out[element..element + elements],
                );
                block += full;
            } else {
                let out = &mut out[element..element + runs.len(block)];
                dequantize_block(bytes, absmax[block - first], &self.table, out);
                block += 1;
            }
        }
    }
}

/// The error that names the first code beyond a table of so many entries; `None` where there is no such code.
pub(crate) fn first_unknown_code(codes: &[u8], runs: &Runs, entries: usize) -> Option<CoreError> {
    for block in 0..runs.blocks {
        let bytes = &codes[runs.byte(block)..];
        let len = runs.len(block);
        let padded = if runs.nibbles { len.next_multiple_of(2) } else { len };
        for index in 0..padded {
            let code = if runs.nibbles { nibble(bytes, index) } else { bytes[index] };
            if usize::from(code) >= entries {
                // Odd padding counts as part of the row's last element.
                let first = runs.element(block) + index.min(len - 1);
                return Some(CoreError::Code { code, first: first as u64, entries });
            }
        }
    }
    None
}

/// The truth: one block, whose codes lie at the start of `bytes`.
pub(crate) fn dequantize_block<T: Element>(bytes: &[u8], absmax: f32, table: &Table, out: &mut [T]) {
    match table {
        Table::Nibbles(table) => {
            // At most 16 different elements: each is rounded only once.
            let values = table.map(|entry| T::narrow(decode(entry, absmax)));
            for (pair, byte) in out.chunks_mut(2).zip(bytes) {
                pair[0] = values[usize::from(byte >> 4)];
                if let Some(odd) = pair.get_mut(1) {
                    *odd = values[usize::from(byte & 15)];
                }
            }
        }
        Table::Bytes(table) => {
            for (value, code) in out.iter_mut().zip(bytes) {
                *value = T::narrow(decode(table.values[usize::from(*code)], absmax));
            }
        }
    }
}

/// What a table entry stands for in a block of this scale, before it is rounded to the output type.
#[inline]
pub(crate) fn decode(entry: f32, absmax: f32) -> f32 {
    if absmax == 0.0 {
        0.0
    } else if absmax.is_finite() {
        entry * absmax
    } else {
        CANONICAL_NAN
    }
}
