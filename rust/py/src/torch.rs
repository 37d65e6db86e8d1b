//! Torch as the extension sees it: types and functions of its Python modules, looked up once, and tensors by their methods.

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyTuple;
use qlora_core::FloatType;

use crate::boundary::Memory;

/// A tensor, as Python holds it.
pub type Tensor<'py> = Bound<'py, PyAny>;

/// What is needed of torch's modules.
pub struct Torch {
    tensor: Py<PyAny>,
    parameter: Py<PyAny>,
    device_context: Py<PyAny>,
    floats: [(FloatType, Py<PyAny>); 3],
    dispatch_modes: Py<PyAny>,
    function_modes: Py<PyAny>,
    function_mode: Py<PyAny>,
    functorch_interpreter: Py<PyAny>,
    tracing_state: Py<PyAny>,
    forward_ad: Py<PyAny>,
    autocast: Py<PyAny>,
    grad_mode: Py<PyAny>,
    current_device: Option<Py<PyAny>>,
    current_stream: Option<Py<PyAny>>,
    empty: Py<PyAny>,
    /// Past the dispatcher, a third of the time; what compiled code of torch calls, where this torch has it.
    empty_strided: Option<Py<PyAny>>,
}

static TORCH: PyOnceLock<Torch> = PyOnceLock::new();

impl Torch {
    /// The one there is; the first call imports torch.
    pub fn get(py: Python<'_>) -> PyResult<&'static Self> {
        TORCH.get_or_try_init(py, || Self::look_up(py))
    }

    fn look_up(py: Python<'_>) -> PyResult<Self> {
        let torch = py.import("torch")?;
        let core = torch.getattr("_C")?;
        let of = |holder: &Bound<'_, PyAny>, name: &str| holder.getattr(name).map(Bound::unbind);
        // CPU builds of torch have no functions of CUDA.
        let maybe = |name: &str| core.getattr(name).map(Bound::unbind).ok();
        let guards = core.getattr("_dynamo").and_then(|module| module.getattr("guards"));
        Ok(Self {
            tensor: of(&torch, "Tensor")?,
            parameter: of(&torch.getattr("nn")?, "Parameter")?,
            device_context: of(py.import("torch.utils._device")?.as_any(), "DeviceContext")?,
            floats: [
                (FloatType::Bf16, of(&torch, "bfloat16")?),
                (FloatType::F16, of(&torch, "float16")?),
                (FloatType::F32, of(&torch, "float32")?),
            ],
            dispatch_modes: of(&core, "_len_torch_dispatch_stack")?,
            function_modes: of(&core, "_len_torch_function_stack")?,
            function_mode: of(&core, "_get_function_stack_at")?,
            functorch_interpreter: of(&core.getattr("_functorch")?, "peek_interpreter_stack")?,
            tracing_state: of(&core, "_get_tracing_state")?,
            forward_ad: py.import("torch.autograd.forward_ad")?.into_any().unbind(),
            autocast: of(&torch, "is_autocast_enabled")?,
            grad_mode: of(&torch, "is_grad_enabled")?,
            current_device: maybe("_cuda_getDevice"),
            current_stream: maybe("_cuda_getCurrentRawStream"),
            empty: of(&torch, "empty")?,
            empty_strided: guards.and_then(|module| of(&module, "_empty_strided_cuda")).ok(),
        })
    }

    /// Is this a tensor, or a parameter, and of no class derived from them?
    pub fn is_plain(&self, tensor: &Tensor<'_>) -> bool {
        let class = tensor.get_type();
        class.is(&self.tensor) || class.is(&self.parameter)
    }

    /// Is this a tensor like any other, and does nobody watch the operators that are called? A compiler, which has to be
    /// asked in Python, is not looked for.
    pub fn is_unwatched(&self, tensor: &Tensor<'_>) -> PyResult<bool> {
        let py = tensor.py();
        Ok(self.is_plain(tensor)
            && self.dispatch_modes.call0(py)?.extract::<usize>(py)? == 0
            && self.only_devices_are_set(py)?
            && self.functorch_interpreter.call0(py)?.is_none(py)
            && self.forward_ad.getattr(py, intern!(py, "_current_level"))?.extract::<i64>(py)? < 0
            && self.tracing_state.call0(py)?.is_none(py))
    }

    /// `torch.set_default_device` and `with torch.device(...)` are function modes too, but watch nothing.
    fn only_devices_are_set(&self, py: Python<'_>) -> PyResult<bool> {
        for index in 0..self.function_modes.call0(py)?.extract::<usize>(py)? {
            if !self.function_mode.bind(py).call1((index,))?.is_instance(self.device_context.bind(py))? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Does autocast choose the type of operands on CUDA devices? They are what is meant where no kind is named.
    pub fn casts(&self, py: Python<'_>) -> PyResult<bool> {
        self.autocast.bind(py).call0()?.extract()
    }

    /// Are operations recorded for a backward pass?
    pub fn records(&self, py: Python<'_>) -> PyResult<bool> {
        self.grad_mode.bind(py).call0()?.extract()
    }

    /// The float type of this dtype, if it is one that kernels know.
    pub fn float_type(&self, dtype: &Bound<'_, PyAny>) -> Option<FloatType> {
        self.floats.iter().find(|(_, known)| dtype.is(known)).map(|(float, _)| *float)
    }

    /// The handle of torch's current stream on a device.
    pub fn stream(&self, py: Python<'_>, device: i32) -> PyResult<usize> {
        // NOTE: torch.cuda.current_stream() makes an object, which takes longer than a launch.
        let known = self.current_stream.as_ref().ok_or_else(|| PyValueError::new_err("this torch has no CUDA"))?;
        known.bind(py).call1((device,))?.extract()
    }

    /// A new contiguous tensor on a CUDA device, its values left to the caller.
    pub fn empty<'py>(
        &self,
        py: Python<'py>,
        shape: &[usize],
        dtype: &Bound<'py, PyAny>,
        device: i32,
    ) -> PyResult<Tensor<'py>> {
        let sizes = PyTuple::new(py, shape)?;
        if let (Some(empty), Some(current)) = (&self.empty_strided, &self.current_device)
            && current.bind(py).call0()?.extract::<i32>()? == device
        {
            return empty.bind(py).call1((sizes, PyTuple::new(py, strides(shape))?, dtype));
        }
        let options = pyo3::types::PyDict::new(py);
        options.set_item(intern!(py, "dtype"), dtype)?;
        options.set_item(intern!(py, "device"), format!("cuda:{device}"))?;
        self.empty.bind(py).call((sizes,), Some(&options))
    }
}

/// Of a contiguous tensor, as torch counts them: a dimension of none is as one of one.
fn strides(shape: &[usize]) -> Vec<usize> {
    let mut strides = vec![1; shape.len()];
    for i in (1..shape.len()).rev() {
        strides[i - 1] = strides[i] * shape[i].max(1);
    }
    strides
}

/// Index of a tensor's CUDA device; negative on the CPU.
pub fn device_of(tensor: &Tensor<'_>) -> PyResult<i32> {
    tensor.call_method0(intern!(tensor.py(), "get_device"))?.extract()
}

/// Sizes of a tensor's dimensions.
pub fn shape_of(tensor: &Tensor<'_>) -> PyResult<Vec<usize>> {
    tensor.getattr(intern!(tensor.py(), "shape"))?.extract()
}

/// Address of the first element, 0 where there is no memory.
pub fn address_of(tensor: &Tensor<'_>) -> PyResult<usize> {
    tensor.call_method0(intern!(tensor.py(), "data_ptr"))?.extract()
}

/// Number of elements.
pub fn elements_of(tensor: &Tensor<'_>) -> PyResult<usize> {
    tensor.call_method0(intern!(tensor.py(), "numel"))?.extract()
}

/// Do the elements lie one after the other?
pub fn is_contiguous(tensor: &Tensor<'_>) -> PyResult<bool> {
    tensor.call_method0(intern!(tensor.py(), "is_contiguous"))?.extract()
}

/// Is a gradient of it wanted?
pub fn requires_grad(tensor: &Tensor<'_>) -> PyResult<bool> {
    tensor.getattr(intern!(tensor.py(), "requires_grad"))?.extract()
}

/// How often it was written to; None for tensors made in inference mode, which do not count.
pub fn version_of(tensor: &Tensor<'_>) -> PyResult<Option<i64>> {
    let py = tensor.py();
    match tensor.getattr(intern!(py, "_version")) {
        Ok(version) => version.extract().map(Some),
        Err(error) if error.is_instance_of::<pyo3::exceptions::PyRuntimeError>(py) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The same values, one after the other.
pub fn contiguous<'py>(tensor: &Tensor<'py>) -> PyResult<Tensor<'py>> {
    tensor.call_method0(intern!(tensor.py(), "contiguous"))
}

/// The memory of a contiguous tensor.
pub fn memory_of(tensor: &Tensor<'_>) -> PyResult<Memory> {
    let (address, elements) = (address_of(tensor)?, elements_of(tensor)?);
    if address == 0 && elements > 0 {
        let shape = shape_of(tensor)?;
        return Err(PyValueError::new_err(format!(
            "a tensor of shape {shape:?} has no memory: it was freed, or is sharded elsewhere"
        )));
    }
    Ok((address, elements))
}

/// The float type of a tensor's elements, and torch's name for it.
pub fn float_type_of<'py>(torch: &Torch, tensor: &Tensor<'py>) -> PyResult<(FloatType, Bound<'py, PyAny>)> {
    let dtype = tensor.getattr(intern!(tensor.py(), "dtype"))?;
    match torch.float_type(&dtype) {
        Some(float) => Ok((float, dtype)),
        None => Err(PyTypeError::new_err(format!("expected float32, bfloat16 or float16; got {dtype}"))),
    }
}

/// Is this a tensor like any other, and does nobody but perhaps a compiler watch the operators that are called?
#[pyfunction]
pub fn unwatched(tensor: &Bound<'_, PyAny>) -> PyResult<bool> {
    Torch::get(tensor.py())?.is_unwatched(tensor)
}
