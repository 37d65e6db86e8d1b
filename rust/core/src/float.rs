//! The three float types that weights come in.

use half::{bf16, f16};

/// Which float type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FloatType {
    /// IEEE binary32.
    F32,
    /// bfloat16.
    Bf16,
    /// IEEE binary16.
    F16,
}

impl FloatType {
    /// Bytes of one element.
    #[must_use]
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
        }
    }
}

/// A weight's elements, row-major.
#[derive(Debug, Clone, Copy)]
pub enum Floats<'a> {
    /// float32
    F32(&'a [f32]),
    /// bfloat16
    Bf16(&'a [bf16]),
    /// float16
    F16(&'a [f16]),
}

impl Floats<'_> {
    /// Number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::Bf16(values) => values.len(),
            Self::F16(values) => values.len(),
        }
    }

    /// No element at all?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Where dequantized elements go, row-major.
#[derive(Debug)]
pub enum FloatsMut<'a> {
    /// float32
    F32(&'a mut [f32]),
    /// bfloat16
    Bf16(&'a mut [bf16]),
    /// float16
    F16(&'a mut [f16]),
}

impl FloatsMut<'_> {
    /// Which type the elements have.
    #[must_use]
    pub fn float_type(&self) -> FloatType {
        match self {
            Self::F32(_) => FloatType::F32,
            Self::Bf16(_) => FloatType::Bf16,
            Self::F16(_) => FloatType::F16,
        }
    }

    /// Number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::Bf16(values) => values.len(),
            Self::F16(values) => values.len(),
        }
    }

    /// No element at all?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// One element, to and from float32: widening is exact, narrowing rounds to nearest even.
pub trait Element: Copy + Send + Sync {
    /// Which type this is.
    const TYPE: FloatType;
    /// Exact.
    fn widen(self) -> f32;
    /// One rounding, to nearest even; every NaN becomes the canonical positive quiet one.
    fn narrow(value: f32) -> Self;
}

impl Element for f32 {
    const TYPE: FloatType = FloatType::F32;
    #[inline]
    fn widen(self) -> f32 {
        self
    }
    #[inline]
    fn narrow(value: f32) -> Self {
        if value.is_nan() { CANONICAL_NAN } else { value }
    }
}

impl Element for bf16 {
    const TYPE: FloatType = FloatType::Bf16;
    #[inline]
    fn widen(self) -> f32 {
        self.to_f32()
    }
    #[inline]
    fn narrow(value: f32) -> Self {
        Self::from_f32(f32::narrow(value))
    }
}

impl Element for f16 {
    const TYPE: FloatType = FloatType::F16;
    #[inline]
    fn widen(self) -> f32 {
        self.to_f32()
    }
    #[inline]
    fn narrow(value: f32) -> Self {
        Self::from_f32(f32::narrow(value))
    }
}

/// The NaN that is stored and returned, the same on every device.
pub const CANONICAL_NAN: f32 = f32::from_bits(0x7fc0_0000);
