//! `Spec`: a checked data type, block size and codebook.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use qlora_core::{BLOCK_SIZES, QuantSpec, QuantType, most_fused_tokens};

use crate::boundary::IntoPyErr;
use crate::quantize::float_type;

/// How weights become codes; made once, valid from then on.
#[pyclass(frozen, module = "qlora_rs._core")]
pub struct Spec {
    pub inner: QuantSpec,
}

#[pymethods]
impl Spec {
    #[new]
    #[pyo3(signature = (quant_type, block_size, double_quant, codebook=None))]
    fn new(quant_type: &str, block_size: usize, double_quant: bool, codebook: Option<Vec<f64>>) -> PyResult<Self> {
        let quant_type: QuantType = quant_type.parse().map_err(IntoPyErr::into_py_err)?;
        let codebook: Option<Vec<f32>> = codebook.map(|values| values.into_iter().map(|v| v as f32).collect());
        let inner = QuantSpec::new(quant_type, block_size, double_quant, codebook.as_deref())
            .map_err(|error| PyValueError::new_err(error.to_string()))?;
        Ok(Self { inner })
    }

    /// The table, indexed by code.
    #[getter]
    fn values(&self) -> Vec<f32> {
        self.inner.codebook().values().to_vec()
    }

    /// Bits that one code takes in storage: 4 or 8.
    #[getter]
    fn bits(&self) -> usize {
        usize::from(self.inner.codebook().bits())
    }

    /// Code of the value nearest zero.
    #[getter]
    fn zero_code(&self) -> u8 {
        self.inner.codebook().zero_code()
    }

    /// Most tokens of `dtype` (0 float32, 1 bfloat16, 2 float16) for which `linear` is faster on this processor than
    /// dequantizing and a dense product.
    fn most_fused_tokens(&self, dtype: u8) -> PyResult<usize> {
        most_fused_tokens(&self.inner, float_type(dtype)?).map_err(IntoPyErr::into_py_err)
    }
}

pub fn quant_types() -> Vec<&'static str> {
    QuantType::ALL.iter().map(|quant_type| quant_type.as_str()).collect()
}

pub fn block_sizes() -> Vec<usize> {
    BLOCK_SIZES.to_vec()
}
