//! Optimizer steps, and their 8-bit state, in dense CPU memory.

use pyo3::prelude::*;
use qlora_core::{
    CoreError, DynamicMap, Floats, Parallel, Parameter, Rule, State, dequantize_state as core_dequantize_state,
    optimizer_step as core_optimizer_step, quantize_state as core_quantize_state, squared_norm as core_squared_norm,
};

use crate::boundary::{IntoPyErr, Memory, detached_brief, read, write};
use crate::quantize::{float_type, floats, floats_mut};

/// Values of a state, or its codes with (scales, is the map signed?).
type StateMemory = (Memory, Option<(Memory, bool)>);
/// Factors of the rule, gradient scale, parameter, gradient, dtype code of both, states.
type ParameterMemory = (Vec<f32>, f32, Memory, Memory, u8, Vec<StateMemory>);

fn map_of(signed: bool) -> DynamicMap {
    if signed { DynamicMap::Signed } else { DynamicMap::Unsigned }
}

/// One step of `rule` over parameters, each `(factors, gradient scale, parameter, gradient, dtype, states)`; a state is
/// `(float32 values, None)` or `(codes, (float32 scales, signed))`. Not to be interrupted: it would be half done.
#[pyfunction]
#[pyo3(signature = (rule, parameters, *, num_threads))]
pub fn optimizer_step(
    py: Python<'_>,
    rule: &str,
    parameters: Vec<ParameterMemory>,
    num_threads: usize,
) -> PyResult<()> {
    let parameter = |(factors, scale, param, grad, dtype, states): ParameterMemory| {
        let rule = Rule::new(rule, &factors).map_err(IntoPyErr::into_py_err)?;
        let dtype = float_type(dtype)?;
        // SAFETY: `_bridge.py` passes live contiguous tensors of these types that do not overlap.
        let state = |(values, scales): StateMemory| unsafe {
            match scales {
                None => State::Full(write::<f32>(values)),
                Some((absmax, signed)) => {
                    State::Blockwise { map: map_of(signed), codes: write::<u8>(values), absmax: write::<f32>(absmax) }
                }
            }
        };
        // SAFETY: as above.
        let (param, grad) = unsafe { (floats_mut(param, dtype), floats(grad, dtype)) };
        Ok(Parameter { rule, scale, param, grad, states: states.into_iter().map(state).collect() })
    };
    let parameters = parameters.into_iter().map(parameter).collect::<PyResult<Vec<_>>>()?;
    let parallel = Parallel::new(num_threads);
    detached_brief(py, |_| core_optimizer_step(parameters, &parallel))
}

/// Sum of the squares of gradients, each `(memory, dtype)`, in float64.
#[pyfunction]
#[pyo3(signature = (grads, *, num_threads))]
pub fn squared_norm(py: Python<'_>, grads: Vec<(Memory, u8)>, num_threads: usize) -> PyResult<f64> {
    // SAFETY: `_bridge.py` passes live contiguous tensors of these types.
    let grad = |(memory, dtype)| Ok(unsafe { floats(memory, float_type(dtype)?) });
    let grads = grads.into_iter().map(grad).collect::<PyResult<Vec<Floats<'_>>>>()?;
    let parallel = Parallel::new(num_threads);
    detached_brief(py, |_| core_squared_norm(&grads, &parallel))
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
