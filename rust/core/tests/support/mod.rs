//! Weights to test with, and calls without ceremony.

#![allow(dead_code)] // each test file uses its own part

use half::{bf16, f16};
use qlora_core::dequantize::dequantize_at;
use qlora_core::float::Element;
use qlora_core::quantize::quantize_at;
use qlora_core::{
    Control, CoreError, FloatType, Floats, FloatsMut, Layout, Nonfinite, Parallel, QuantSpec, QuantType, Scales,
    SimdLevel,
};

pub const FLOAT_TYPES: [FloatType; 3] = [FloatType::F32, FloatType::Bf16, FloatType::F16];

pub fn levels() -> impl Iterator<Item = SimdLevel> {
    SimdLevel::ALL.into_iter().filter(|level| *level <= SimdLevel::detected())
}

/// Every data type; the user's tables are one of 16 and one of 200 that are clustered, which no cell table can hold, two
/// short ones and a long one.
pub fn specs(block_size: usize) -> Vec<QuantSpec> {
    let mut specs: Vec<_> = QuantType::ALL
        .into_iter()
        .filter(|quant_type| *quant_type != QuantType::Codebook)
        .map(|quant_type| QuantSpec::new(quant_type, block_size, false, None).expect("built in"))
        .collect();
    let clustered: Vec<f32> = (0..16).map(|i| 0.3 + 1e-4 * i as f32).collect();
    let long: Vec<f32> = (0..99).map(|i| (i as f32 / 49.0 - 1.0).powi(3)).collect();
    let dense: Vec<f32> = (0..200).map(|i| 0.3 + 1e-5 * i as f32).collect();
    for values in [clustered, dense, vec![-1.0, 0.3, 0.5, 1.0], vec![-0.25, 0.25], long] {
        specs.push(QuantSpec::new(QuantType::Codebook, block_size, false, Some(&values)).expect("valid"));
    }
    specs
}

pub fn spec(quant_type: QuantType, block_size: usize) -> QuantSpec {
    QuantSpec::new(quant_type, block_size, false, None).expect("built in")
}

/// A small generator (splitmix64): the same numbers everywhere.
pub struct Random(pub u64);

impl Random {
    pub fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    }

    pub fn below(&mut self, bound: usize) -> usize {
        (self.word() % bound as u64) as usize
    }

    /// In (0, 1).
    pub fn uniform(&mut self) -> f64 {
        ((self.word() >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    }

    pub fn normal(&mut self) -> f32 {
        ((-2.0 * self.uniform().ln()).sqrt() * (std::f64::consts::TAU * self.uniform()).cos()) as f32
    }
}

/// Weights that sit where mistakes would show: at thresholds and beside them, at both ends of the exponents, zeros of
/// both signs, and (if wanted) infinities and NaN of all kinds.
pub fn nasty_weights(random: &mut Random, len: usize, spec: &QuantSpec, nonfinite: bool) -> Vec<f32> {
    let tops =
        [1.0, 0.37, 3.0e-3, 65504.0, f32::MAX, f32::MIN_POSITIVE, 1.2e-38, 1.0e-40, 1.4e-45, 1.7e38, 8.5e37, 6.0e-8];
    let thresholds = spec.codebook().thresholds();
    let mut weights = Vec::with_capacity(len);
    while weights.len() < len {
        let top = tops[random.below(tops.len())];
        let kind = random.below(5);
        for index in 0..spec.block_size() {
            let near = thresholds[random.below(thresholds.len())] * top;
            weights.push(match (kind, random.below(40)) {
                (0, _) => [0.0, -0.0][index % 2],
                (1, 0) if nonfinite => f32::from_bits(0x7f80_0000 | random.word() as u32),
                (2, 0) if nonfinite => f32::INFINITY,
                (_, 1) => top,
                (_, 2) => -top,
                (_, 3) => -0.0,
                (_, 4) => f32::from_bits(random.below(1 << 23) as u32).min(top),
                (_, 5..15) => near,
                (_, 15..20) => near.next_up().clamp(-top, top),
                (_, 20..25) => near.next_down().clamp(-top, top),
                (_, 25..28) => -near,
                _ => (2.0 * random.uniform() as f32 - 1.0) * top,
            });
        }
    }
    weights.truncate(len);
    weights
}

/// The same weights as one of the float types; bytes are compared, so NaN is too.
#[derive(Debug, Clone)]
pub enum Weights {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
    F16(Vec<f16>),
}

impl Weights {
    pub fn new(values: &[f32], float_type: FloatType) -> Self {
        match float_type {
            FloatType::F32 => Self::F32(values.to_vec()),
            FloatType::Bf16 => Self::Bf16(values.iter().map(|v| bf16::from_f32(*v)).collect()),
            FloatType::F16 => Self::F16(values.iter().map(|v| f16::from_f32(*v)).collect()),
        }
    }

    pub fn floats(&self) -> Floats<'_> {
        match self {
            Self::F32(values) => Floats::F32(values),
            Self::Bf16(values) => Floats::Bf16(values),
            Self::F16(values) => Floats::F16(values),
        }
    }

    pub fn floats_mut(&mut self) -> FloatsMut<'_> {
        match self {
            Self::F32(values) => FloatsMut::F32(values),
            Self::Bf16(values) => FloatsMut::Bf16(values),
            Self::F16(values) => FloatsMut::F16(values),
        }
    }

    pub fn bytes(&self) -> &[u8] {
        match self {
            Self::F32(values) => bytemuck::cast_slice(values),
            Self::Bf16(values) => bytemuck::cast_slice(values),
            Self::F16(values) => bytemuck::cast_slice(values),
        }
    }

    pub fn widened(&self) -> Vec<f32> {
        match self {
            Self::F32(values) => values.clone(),
            Self::Bf16(values) => values.iter().map(|v| v.widen()).collect(),
            Self::F16(values) => values.iter().map(|v| v.widen()).collect(),
        }
    }
}

/// How a call runs; must not change a bit.
#[derive(Debug, Clone, Copy)]
pub struct Way {
    pub level: SimdLevel,
    pub threads: usize,
}

pub const TRUTH: Way = Way { level: SimdLevel::Scalar, threads: 1 };

pub fn quantize(
    weights: &Weights,
    shape: (usize, usize, usize),
    spec: &QuantSpec,
    nonfinite: Nonfinite,
    way: Way,
) -> Result<(Vec<u8>, Vec<f32>), CoreError> {
    let layout = Layout::new(shape.0, shape.1, shape.2, spec)?;
    // Filled, so that a byte left unwritten shows.
    let (mut codes, mut absmax) = (vec![0xee; layout.code_bytes()], vec![-1.0; layout.blocks()]);
    let (parallel, control) = (Parallel::new(way.threads), Control::default());
    let floats = weights.floats();
    quantize_at(way.level, floats, &layout, spec, nonfinite, &mut codes, &mut absmax, &parallel, &control)?;
    Ok((codes, absmax))
}

pub fn dequantize(
    codes: &[u8],
    scales: Scales<'_>,
    shape: (usize, usize, usize),
    spec: &QuantSpec,
    float_type: FloatType,
    way: Way,
) -> Result<Weights, CoreError> {
    let layout = Layout::new(shape.0, shape.1, shape.2, spec)?;
    let mut out = Weights::new(&vec![123.0; layout.elements()], float_type);
    let (parallel, control) = (Parallel::new(way.threads), Control::default());
    dequantize_at(way.level, codes, scales, &layout, spec, out.floats_mut(), &parallel, &control)?;
    Ok(out)
}

pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}
