//! Optimizer steps, and their 8-bit state, in dense CPU memory.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use qlora_core::{
    CoreError, DynamicMap, FloatType, Parallel, Parameter, Rule, STATE_BLOCK_SIZE, State,
    dequantize_state as core_dequantize_state, optimizer_step as core_optimizer_step,
    quantize_state as core_quantize_state, squared_norm as core_squared_norm,
};

use crate::boundary::{IntoPyErr, Memory, detached_brief, read, write};
use crate::quantize::{float_type, floats, floats_mut};

/// A parameter: address, number of elements, dtype code (of parameter and gradient), index of its factors.
pub type TensorOf = (usize, usize, u8, u32);
/// Elements whose states lie together: index of the parameter, first element, number of elements, page, have states 8 bits?,
/// (values, scales, is the map signed?) of each state. Addresses are offsets in the page; page 0 stands for none.
pub type RunOf = (usize, usize, usize, u32, bool, Vec<(usize, usize, bool)>);
/// Factors of a rule, and what gradients are multiplied by first.
pub type SetOf = (Vec<f32>, f32);

fn map_of(signed: bool) -> DynamicMap {
    if signed { DynamicMap::Signed } else { DynamicMap::Unsigned }
}

/// Steps of one rule over a list of parameters in CPU memory, which is made once and used for many steps.
///
/// The caller keeps their memory alive, and tells where it is when it has moved.
#[pyclass(frozen, module = "qlora_rs._core")]
pub struct HostStep {
    rule: String,
    tensors: Vec<(usize, FloatType, usize)>,
    runs: Vec<RunOf>,
    places: Mutex<Places>,
}

/// Addresses by parameter.
struct Places {
    params: Vec<usize>,
    grads: Vec<usize>,
}

#[pymethods]
impl HostStep {
    /// Runs are in the order of their pages.
    #[new]
    #[pyo3(signature = (rule, *, tensors, runs))]
    fn new(rule: String, tensors: Vec<TensorOf>, runs: Vec<RunOf>) -> PyResult<Self> {
        let outside = |(tensor, start, count, ..): &RunOf| {
            let inside = |&(_, elements, ..): &TensorOf| start.checked_add(*count).is_some_and(|end| end <= elements);
            !tensors.get(*tensor).is_some_and(inside) || !start.is_multiple_of(STATE_BLOCK_SIZE)
        };
        if runs.iter().any(outside) || !runs.is_sorted_by_key(|run| run.3) {
            return Err(PyValueError::new_err("runs are not inside of their parameters, in the order of their pages"));
        }
        let params = tensors.iter().map(|tensor| tensor.0).collect();
        let tensors = tensors
            .into_iter()
            .map(|(_, elements, dtype, set)| Ok((elements, float_type(dtype)?, set as usize)))
            .collect::<PyResult<Vec<_>>>()?;
        let places = Mutex::new(Places { params, grads: vec![0; tensors.len()] });
        Ok(Self { rule, tensors, runs, places })
    }

    /// Where parameters are, and where gradients are.
    fn set_addresses(&self, params: Vec<usize>, grads: Vec<usize>) -> PyResult<()> {
        if params.len() != self.tensors.len() || grads.len() != self.tensors.len() {
            let got = format!("{} addresses of parameters, {} of gradients", params.len(), grads.len());
            return Err(PyValueError::new_err(format!("{got}, for {} parameters", self.tensors.len())));
        }
        *self.places() = Places { params, grads };
        Ok(())
    }

    /// Sum of the squares of all gradients, in float64.
    #[pyo3(signature = (*, num_threads))]
    fn squared_norm(&self, py: Python<'_>, num_threads: usize) -> PyResult<f64> {
        let places = self.places();
        let tensors = self.tensors.iter().zip(&places.grads);
        // SAFETY: `_bridge.py` passes addresses of live contiguous tensors of these types and sizes.
        let grads: Vec<_> =
            tensors.map(|(&(elements, dtype, _), &grad)| unsafe { floats((grad, elements), dtype) }).collect();
        let parallel = Parallel::new(num_threads);
        detached_brief(py, |_| core_squared_norm(&grads, &parallel))
    }

    /// Update what is in the pages from `pages[0]` to before `pages[1]`, whose `addresses` are given (page 0 has none).
    /// `clip` multiplies all gradients. Not to be interrupted: it would be half done.
    #[pyo3(signature = (*, pages, addresses, sets, clip, num_threads))]
    #[allow(clippy::needless_pass_by_value)] // pyo3 makes vectors of lists
    fn step(
        &self,
        py: Python<'_>,
        pages: (u32, u32),
        addresses: Vec<usize>,
        sets: Vec<SetOf>,
        clip: f32,
        num_threads: usize,
    ) -> PyResult<()> {
        let first_page = pages.0.max(1);
        if addresses.len() != pages.1.saturating_sub(first_page) as usize {
            return Err(PyValueError::new_err(format!("{} addresses of pages {pages:?}", addresses.len())));
        }
        let rules = sets
            .iter()
            .map(|(factors, scale)| Ok((Rule::new(&self.rule, factors)?, scale * clip)))
            .collect::<Result<Vec<_>, CoreError>>()
            .map_err(IntoPyErr::into_py_err)?;
        let places = self.places();
        let mut parameters = Vec::with_capacity(self.runs.len());
        for &(tensor, start, count, page, eight, ref states) in &self.runs[self.runs_of(pages.0..pages.1)] {
            let (_, dtype, set) = self.tensors[tensor];
            let &(rule, scale) = rules.get(set).ok_or_else(|| PyValueError::new_err(format!("no factor set {set}")))?;
            let base = if page == 0 { 0 } else { addresses[(page - first_page) as usize] };
            let at = |address: usize| address + start * dtype.size();
            // SAFETY: `_bridge.py` passes addresses of live contiguous tensors of these types and sizes, that do not
            // overlap; runs lie inside of them and do not overlap either.
            let state = |&(values, absmax, signed): &(usize, usize, bool)| unsafe {
                if eight {
                    let (codes, scales) = ((base + values, count), (base + absmax, count.div_ceil(STATE_BLOCK_SIZE)));
                    State::Blockwise { map: map_of(signed), codes: write::<u8>(codes), absmax: write::<f32>(scales) }
                } else {
                    State::Full(write::<f32>((base + values, count)))
                }
            };
            // SAFETY: as above.
            let (param, grad) = unsafe {
                (
                    floats_mut((at(places.params[tensor]), count), dtype),
                    floats((at(places.grads[tensor]), count), dtype),
                )
            };
            parameters.push(Parameter { rule, scale, param, grad, states: states.iter().map(state).collect() });
        }
        let parallel = Parallel::new(num_threads);
        detached_brief(py, |_| core_optimizer_step(parameters, &parallel))
    }
}

impl HostStep {
    fn places(&self) -> std::sync::MutexGuard<'_, Places> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn runs_of(&self, pages: Range<u32>) -> Range<usize> {
        let before = |page: u32| self.runs.partition_point(|run| run.3 < page);
        before(pages.start)..before(pages.end)
    }
}

/// Quantize float32 `values` into `codes` and a scale for each 256 of them in `absmax`.
#[pyfunction]
#[pyo3(signature = (*, signed, values, codes, absmax))]
pub fn quantize_state(py: Python<'_>, signed: bool, values: Memory, codes: Memory, absmax: Memory) -> PyResult<()> {
    // SAFETY: `_bridge.py` passes live contiguous tensors of these types, the outputs freshly made by itself.
    let (values, codes, absmax) = unsafe { (read::<f32>(values), write::<u8>(codes), write::<f32>(absmax)) };
    detached_brief(py, |_| core_quantize_state(map_of(signed), values, codes, absmax))
}

/// The float32 `values` of `codes` and `absmax`.
#[pyfunction]
#[pyo3(signature = (*, signed, codes, absmax, values))]
pub fn dequantize_state(py: Python<'_>, signed: bool, codes: Memory, absmax: Memory, values: Memory) -> PyResult<()> {
    // SAFETY: as in `quantize_state`.
    let (codes, absmax, values) = unsafe { (read::<u8>(codes), read::<f32>(absmax), write::<f32>(values)) };
    detached_brief(py, |_| -> Result<(), CoreError> { core_dequantize_state(map_of(signed), codes, absmax, values) })
}
