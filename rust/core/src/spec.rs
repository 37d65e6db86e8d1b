//! What a quantization is: data type, block size, double quantization.

use std::str::FromStr;

use crate::codebook::Codebook;
use crate::error::CoreError;

/// Block sizes that are supported.
pub const BLOCK_SIZES: [usize; 8] = [32, 64, 128, 256, 512, 1024, 2048, 4096];

/// The data types.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QuantType {
    /// 4-bit `NormalFloat`.
    Nf4,
    /// 4-bit float.
    Fp4,
    /// Symmetric integers -7..7.
    Int4,
    /// Symmetric integers -127..127.
    Int8,
    /// The signed dynamic map: 8 bits, finer towards zero.
    Dynamic8,
    /// The unsigned one, for what is never negative: the nearest to a negative value is 0.
    Udynamic8,
    /// A table given by the user.
    Codebook,
}

impl QuantType {
    /// All of them, in the order in which messages name them.
    pub const ALL: [Self; 7] =
        [Self::Nf4, Self::Fp4, Self::Int4, Self::Int8, Self::Dynamic8, Self::Udynamic8, Self::Codebook];

    /// The name that users type.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Nf4 => "nf4",
            Self::Fp4 => "fp4",
            Self::Int4 => "int4",
            Self::Int8 => "int8",
            Self::Dynamic8 => "dynamic8",
            Self::Udynamic8 => "udynamic8",
            Self::Codebook => "codebook",
        }
    }
}

impl FromStr for QuantType {
    type Err = CoreError;

    fn from_str(name: &str) -> Result<Self, CoreError> {
        Self::ALL.into_iter().find(|quant_type| quant_type.as_str() == name).ok_or_else(|| {
            let known: Vec<_> = Self::ALL.iter().map(|quant_type| quant_type.as_str()).collect();
            CoreError::Spec(format!("quant_type is one of {}; got {name:?}", known.join(", ")))
        })
    }
}

/// How weights become codes; valid by construction.
#[derive(Debug, Clone, PartialEq)]
pub struct QuantSpec {
    quant_type: QuantType,
    block_size: usize,
    double_quant: bool,
    codebook: Codebook,
}

impl QuantSpec {
    /// # Errors
    /// [`CoreError::Spec`] for a block size that is not supported, an impossible codebook, or a codebook given for a
    /// built-in type (or missing for [`QuantType::Codebook`]).
    pub fn new(
        quant_type: QuantType,
        block_size: usize,
        double_quant: bool,
        codebook: Option<&[f32]>,
    ) -> Result<Self, CoreError> {
        if !BLOCK_SIZES.contains(&block_size) {
            return Err(CoreError::Spec(format!("block_size is one of {BLOCK_SIZES:?}; got {block_size}")));
        }
        let codebook = match (Codebook::built_in(quant_type), codebook) {
            (Some(book), None) => book,
            (None, Some(values)) => Codebook::user(values)?,
            (None, None) => {
                return Err(CoreError::Spec("quant_type \"codebook\" needs codebook=[...], its values".into()));
            }
            (Some(_), Some(_)) => {
                let name = quant_type.as_str();
                return Err(CoreError::Spec(format!("a codebook cannot be given for the built-in type {name:?}")));
            }
        };
        Ok(Self { quant_type, block_size, double_quant, codebook })
    }

    /// The data type.
    #[must_use]
    pub fn quant_type(&self) -> QuantType {
        self.quant_type
    }

    /// Elements that share a scale.
    #[must_use]
    pub fn block_size(&self) -> usize {
        self.block_size
    }

    /// Are the scales quantized too?
    #[must_use]
    pub fn double_quant(&self) -> bool {
        self.double_quant
    }

    /// The table.
    #[must_use]
    pub fn codebook(&self) -> &Codebook {
        &self.codebook
    }
}
