//! A packed weight in device memory and its products. Python's bytecode for the checks that every call makes costs the host
//! more than the launch: they are here.

use std::sync::Mutex;

use pyo3::exceptions::PyValueError;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyString, PyTuple, PyWeakrefMethods, PyWeakrefReference};
use qlora_core::{FloatType, Layout, QuantSpec};
use qlora_cuda::{BackwardOperands, DevicePtr, DeviceScales, LowRank, Operands, Queue};

use crate::boundary::{IntoPyErr, Memory, expect};
use crate::cuda::run;
use crate::quantize::layout_of;
use crate::spec::Spec;
use crate::torch::{
    Tensor, Torch, address_of, contiguous, device_of, elements_of, float_type_of, is_contiguous, memory_of,
    requires_grad, shape_of, version_of,
};

/// What the kernels ask of addresses: of x; of a term's matrices. A bias lies at a multiple of its element's size.
const ALIGNMENT: usize = 16;
const RANK_ALIGNMENT: usize = 4;

/// Codes, absmax, absmax scale and absmax offset, as a call names them.
type Parts<'a, 'py> = [Option<&'a Tensor<'py>>; 4];

/// A tensor whose memory is used, and what it was.
struct Part {
    tensor: Py<PyWeakrefReference>,
    address: usize,
    elements: usize,
}

/// How often each part was written to, -1 for one that is not there; None where torch does not count.
type Versions = Option<[i64; 4]>;

struct Writes {
    versions: Versions,
    /// A launch was queued since the weight was last seen to change.
    settled: bool,
}

/// A packed weight on a CUDA device, checked once, for calls that must cost the host little.
///
/// It stands for the memory that its tensors had when it was made, and does not keep them alive: `holds` tells whether they
/// are still the same. `parts` are codes, absmax, and of a doubly quantized weight its scales and offset, else None; the
/// weight's shape is that of the codes with `columns` in place of the last dimension. `moves`: copies on other streams bring
/// it to this memory, and it goes again, so each launch waits for what is before it on its stream, which waits for the copy.
#[pyclass(frozen, module = "qlora_rs._core")]
pub struct DeviceWeight {
    spec: QuantSpec,
    layout: Layout,
    codes: DevicePtr,
    scales: DeviceScales,
    most_fused: u32,
    most_fused_backward: u32,
    shape: Vec<usize>,
    ordinal: i32,
    #[pyo3(get)]
    device: Py<PyAny>,
    parts: [Option<Part>; 4],
    /// Of strided parts, which live as long as this.
    copies: Vec<Py<PyAny>>,
    writes: Mutex<Writes>,
    moves: bool,
}

#[pymethods]
impl DeviceWeight {
    #[new]
    #[pyo3(signature = (spec, parts, columns, moves))]
    fn new(
        py: Python<'_>,
        spec: &Spec,
        parts: (Tensor<'_>, Tensor<'_>, Option<Tensor<'_>>, Option<Tensor<'_>>),
        columns: usize,
        moves: bool,
    ) -> PyResult<Self> {
        let (codes, absmax, scale, offset) = parts;
        let (device, ordinal) = (codes.getattr(intern!(py, "device"))?.unbind(), device_of(&codes)?);
        let mut shape = shape_of(&codes)?;
        let dimensions = shape.len();
        *shape.last_mut().ok_or_else(|| PyValueError::new_err("the codes have no dimension"))? = columns;
        let rows = if dimensions > 1 { shape[dimensions - 2] } else { 1 };
        let experts = shape[..dimensions.saturating_sub(2)].iter().product();
        let layout = layout_of(spec, (experts, rows, columns))?;
        let mut copies = Vec::new();
        let mut dense = |part: Option<&Tensor<'_>>| -> PyResult<Option<Memory>> {
            let Some(part) = part else { return Ok(None) };
            let dense = contiguous(part)?;
            if !dense.is(part) {
                copies.push(dense.clone().unbind());
            }
            memory_of(&dense).map(Some)
        };
        let parts = [Some(&codes), Some(&absmax), scale.as_ref(), offset.as_ref()];
        let [codes, absmax, scale, offset] = [dense(parts[0])?, dense(parts[1])?, dense(parts[2])?, dense(parts[3])?];
        let codes = codes.unwrap_or_default();
        expect("codes", codes.1, layout.code_bytes())?;
        let scales = scales_of(spec, &layout, absmax, scale, offset)?;
        let codes = codes.0 as DevicePtr;
        let (mut most_fused, mut most_fused_backward) = (0, 0);
        if dimensions == 2 && columns > 0 && ordinal >= 0 {
            let of_device = qlora_cuda::most_fused_tokens(ordinal, &spec.inner, &layout, codes);
            most_fused = of_device.map_err(IntoPyErr::into_py_err)?;
            let of_device = qlora_cuda::most_fused_backward_tokens(ordinal, &spec.inner, &layout, codes);
            most_fused_backward = of_device.map_err(IntoPyErr::into_py_err)?;
        }
        let writes = Mutex::new(Writes { versions: versions_of(&parts)?, settled: false });
        let parts = [part_of(parts[0])?, part_of(parts[1])?, part_of(parts[2])?, part_of(parts[3])?];
        let spec = spec.inner.clone();
        Ok(Self {
            spec,
            layout,
            codes,
            scales,
            most_fused,
            most_fused_backward,
            shape,
            ordinal,
            device,
            parts,
            copies,
            writes,
            moves,
        })
    }

    /// The weight's shape.
    #[getter]
    fn shape<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, &self.shape)
    }

    /// How often each part had been written to when `holds` was last asked; None where torch does not count.
    #[getter]
    fn versions(&self) -> Option<(i64, i64, i64, i64)> {
        self.writes().versions.map(|[codes, absmax, scale, offset]| (codes, absmax, scale, offset))
    }

    /// Are these the tensors, and has none of them been moved or restrided in place (as `module.to` moves)?
    #[pyo3(signature = (codes, absmax, scale, offset))]
    fn holds(
        &self,
        codes: &Tensor<'_>,
        absmax: &Tensor<'_>,
        scale: Option<&Tensor<'_>>,
        offset: Option<&Tensor<'_>>,
    ) -> PyResult<bool> {
        self.holds_all(&[Some(codes), Some(absmax), scale, offset])
    }

    /// Is the product of this many tokens in this dtype made without dequantizing the weight first?
    fn fuses(&self, tokens: usize, dtype: &Bound<'_, PyAny>) -> PyResult<bool> {
        Ok(self.fuses_tokens(tokens) && is_half(Torch::get(dtype.py())?.float_type(dtype)))
    }

    /// `dequantize` where the weight is in these tensors and nobody watches; else None.
    #[pyo3(signature = (dtype, codes, absmax, scale, offset))]
    fn plain_dequantize<'py>(
        &self,
        dtype: &Bound<'py, PyAny>,
        codes: &Tensor<'py>,
        absmax: &Tensor<'py>,
        scale: Option<&Tensor<'py>>,
        offset: Option<&Tensor<'py>>,
    ) -> PyResult<Option<Tensor<'py>>> {
        let torch = Torch::get(dtype.py())?;
        let plain = torch.float_type(dtype).is_some()
            && torch.is_unwatched(codes)?
            && self.holds_all(&[Some(codes), Some(absmax), scale, offset])?;
        if plain { self.dequantize(dtype).map(Some) } else { Ok(None) }
    }

    /// Is the gradient of x of a product of this many tokens in this dtype made without dequantizing the weight first?
    fn fuses_backward(&self, tokens: usize, dtype: &Bound<'_, PyAny>) -> PyResult<bool> {
        let fuses = (1..=self.most_fused_backward as usize).contains(&tokens);
        Ok(fuses && is_half(Torch::get(dtype.py())?.float_type(dtype)))
    }

    /// The float weight, a new tensor of `dtype` (float32, bfloat16 or float16).
    fn dequantize<'py>(&self, dtype: &Bound<'py, PyAny>) -> PyResult<Tensor<'py>> {
        let py = dtype.py();
        let torch = Torch::get(py)?;
        let float = torch.float_type(dtype).ok_or_else(|| {
            pyo3::exceptions::PyTypeError::new_err(format!("dequantize to float32, bfloat16 or float16, not {dtype}"))
        })?;
        let queue = self.queue(py, torch)?;
        let out = torch.empty(py, &self.shape, dtype, self.ordinal)?;
        let address = address_of(&out)? as DevicePtr;
        run(py, || {
            // SAFETY: `out` was made for this layout; whoever holds this object keeps the weight's tensors alive.
            unsafe { qlora_cuda::dequantize(queue, &self.spec, &self.layout, self.codes, self.scales, address, float) }
        })?;
        Ok(out)
    }

    /// x W^T + bias (+ scale * xa B^T, `lora` being xa (..., r), B (out, r) and scale), rounded once: x (..., in) in bfloat16
    /// or float16, everything else in its dtype, where `fuses` says so.
    #[pyo3(signature = (x, bias, lora=None))]
    fn linear<'py>(
        &self,
        x: &Tensor<'py>,
        bias: Option<&Tensor<'py>>,
        lora: Option<(Tensor<'py>, Tensor<'py>, f32)>,
    ) -> PyResult<Tensor<'py>> {
        let py = x.py();
        let torch = Torch::get(py)?;
        let (float, dtype) = float_type_of(torch, x)?;
        let x = self.operand("x", x, ALIGNMENT, &dtype)?;
        let bias = bias.map(|bias| self.operand("bias", bias, 2, &dtype)).transpose()?;
        let lora = match lora {
            None => None,
            Some((xa, b, scale)) => {
                let xa = self.operand("xa", &xa, RANK_ALIGNMENT, &dtype)?;
                let b = self.operand("B", &b, RANK_ALIGNMENT, &dtype)?;
                Some((xa, b, scale))
            }
        };
        let shape = shape_of(&x)?;
        let tokens = elements_of(&x)? / self.layout.cols().max(1);
        expect("x", elements_of(&x)?, tokens * self.layout.cols())?;
        let mut operands = Operands {
            x: address_of(&x)? as DevicePtr,
            y: 0,
            bias: 0,
            settled: false,
            lora: None,
            tokens: u32::try_from(tokens).map_err(|_| PyValueError::new_err(format!("{tokens} tokens at once")))?,
            dtype: float,
        };
        if let Some(bias) = &bias {
            expect("bias", elements_of(bias)?, self.layout.rows())?;
            operands.bias = address_of(bias)? as DevicePtr;
        }
        if let Some((xa, b, scale)) = &lora {
            let rank = shape_of(b)?.last().copied().unwrap_or(0);
            expect("xa", elements_of(xa)?, tokens * rank)?;
            expect("B", elements_of(b)?, self.layout.rows() * rank)?;
            let (xa, b) = (address_of(xa)? as DevicePtr, address_of(b)? as DevicePtr);
            operands.lora = Some(LowRank { xa, b, scale: *scale, rank: rank as i32 });
        }
        self.launch(py, torch, shape, &dtype, operands)
    }

    /// dY W: the gradient of x (..., in), rounded once, from grad (..., out) in bfloat16 or float16, where `fuses_backward` says
    /// so.
    fn linear_backward<'py>(&self, grad: &Tensor<'py>) -> PyResult<Tensor<'py>> {
        let py = grad.py();
        let torch = Torch::get(py)?;
        let (float, dtype) = float_type_of(torch, grad)?;
        let grad = self.operand("grad", grad, ALIGNMENT, &dtype)?;
        let mut shape = shape_of(&grad)?;
        let tokens = elements_of(&grad)? / self.layout.rows().max(1);
        expect("grad", elements_of(&grad)?, tokens * self.layout.rows())?;
        if let Some(last) = shape.last_mut() {
            *last = self.layout.cols();
        }
        let queue = self.queue(py, torch)?;
        let dx = torch.empty(py, &shape, &dtype, self.ordinal)?;
        let (versions, settled) = self.settled();
        let operands = BackwardOperands {
            dy: address_of(&grad)? as DevicePtr,
            dx: address_of(&dx)? as DevicePtr,
            settled,
            tokens: u32::try_from(tokens).map_err(|_| PyValueError::new_err(format!("{tokens} tokens at once")))?,
            dtype: float,
        };
        run(py, || {
            // SAFETY: grad and dx are contiguous tensors of this device whose sizes were checked, and live until the call
            // returns; torch frees their memory in the order of the stream.
            unsafe {
                qlora_cuda::linear_backward_4bit(queue, &self.spec, &self.layout, self.codes, self.scales, &operands)
            }
        })?;
        self.settle(versions);
        Ok(dx)
    }

    /// `linear` without a term, for the plain call: x an ordinary tensor on the weight's device, contiguous, of few tokens in
    /// bfloat16 or float16, the bias in the same dtype, no gradient wanted, no autocast, nobody watching, and the weight in
    /// these parameters of a layer, as a module keeps them. None where anything is otherwise: whoever asked does it step by
    /// step.
    fn plain_linear<'py>(&self, x: &Tensor<'py>, parameters: &Bound<'py, PyDict>) -> PyResult<Option<Tensor<'py>>> {
        let py = x.py();
        let torch = Torch::get(py)?;
        let (shape, columns) = (shape_of(x)?, self.layout.cols());
        let tokens =
            shape.split_last().filter(|(last, _)| **last == columns).map_or(0, |(_, rest)| rest.iter().product());
        if !self.fuses_tokens(tokens) || !torch.is_unwatched(x)? || torch.casts(py)? || device_of(x)? != self.ordinal {
            return Ok(None);
        }
        let dtype = x.getattr(intern!(py, "dtype"))?;
        let (float, address) = (torch.float_type(&dtype), address_of(x)?);
        if !is_half(float) || address == 0 || !address.is_multiple_of(ALIGNMENT) || !is_contiguous(x)? {
            return Ok(None);
        }
        let mut operands = Operands {
            x: address as DevicePtr,
            y: 0,
            bias: 0,
            settled: false,
            lora: None,
            tokens: tokens as u32,
            dtype: float.unwrap_or(FloatType::F32),
        };
        let held = |name: &Bound<'py, PyString>| {
            Ok::<_, PyErr>(parameters.get_item(name)?.filter(|parameter| !parameter.is_none()))
        };
        let bias = held(intern!(py, "bias"))?;
        if let Some(bias) = &bias {
            let ordinary = torch.is_plain(bias) && bias.getattr(intern!(py, "dtype"))?.is(&dtype);
            if !ordinary || device_of(bias)? != self.ordinal || !is_contiguous(bias)? {
                return Ok(None);
            }
            expect("bias", elements_of(bias)?, self.layout.rows())?;
            operands.bias = address_of(bias)? as DevicePtr;
            if operands.bias == 0 {
                return Ok(None); // its memory was freed: no bias to a kernel
            }
        }
        if torch.records(py)? && (requires_grad(x)? || bias.as_ref().map_or(Ok(false), requires_grad)?) {
            return Ok(None);
        }
        let parts = [
            held(intern!(py, "weight"))?,
            held(intern!(py, "weight_absmax"))?,
            held(intern!(py, "weight_absmax_scale"))?,
            held(intern!(py, "weight_absmax_offset"))?,
        ];
        if !self.holds_all(&parts.each_ref().map(Option::as_ref))? {
            return Ok(None);
        }
        self.launch(py, torch, shape, &dtype, operands).map(Some)
    }
}

impl DeviceWeight {
    fn writes(&self) -> std::sync::MutexGuard<'_, Writes> {
        // No code that can panic runs under the lock.
        self.writes.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn fuses_tokens(&self, tokens: usize) -> bool {
        (1..=self.most_fused as usize).contains(&tokens)
    }

    fn queue(&self, py: Python<'_>, torch: &Torch) -> PyResult<Queue> {
        Ok(Queue { device: self.ordinal, stream: torch.stream(py, self.ordinal)? })
    }

    fn holds_all(&self, parts: &Parts<'_, '_>) -> PyResult<bool> {
        if !self.copies.is_empty() {
            return Ok(false);
        }
        for (part, known) in parts.iter().zip(&self.parts) {
            match (part, known) {
                (None, None) => {}
                (Some(part), Some(known)) => {
                    // A tensor of as many contiguous elements at this address holds the same bytes.
                    let same = known.tensor.bind(part.py()).upgrade().is_some_and(|tensor| tensor.is(part));
                    if !same
                        || address_of(part)? != known.address
                        || elements_of(part)? != known.elements
                        || !is_contiguous(part)?
                    {
                        return Ok(false);
                    }
                }
                _ => return Ok(false),
            }
        }
        let versions = versions_of(parts)?;
        let mut writes = self.writes();
        if versions.is_none() || versions != writes.versions {
            *writes = Writes { versions, settled: false };
        }
        Ok(true)
    }

    /// Contiguous, aligned, of this dtype and on this device.
    fn operand<'py>(
        &self,
        name: &str,
        tensor: &Tensor<'py>,
        alignment: usize,
        dtype: &Bound<'py, PyAny>,
    ) -> PyResult<Tensor<'py>> {
        let py = tensor.py();
        if device_of(tensor)? != self.ordinal {
            let (theirs, ours) = (tensor.getattr(intern!(py, "device"))?, self.device.bind(py));
            let message = format!("{name} is on {theirs}, the weight is on {ours}: move one of them");
            return Err(PyValueError::new_err(message));
        }
        let own = tensor.getattr(intern!(py, "dtype"))?;
        if !own.is(dtype) {
            return Err(PyValueError::new_err(format!("{name} is {own}, x is {dtype}")));
        }
        let dense = contiguous(tensor)?;
        let (address, _) = memory_of(&dense)?;
        if address.is_multiple_of(alignment) { Ok(dense) } else { dense.call_method0(intern!(py, "clone")) }
    }

    /// The product into a new tensor; `shape` is that of x.
    fn launch<'py>(
        &self,
        py: Python<'py>,
        torch: &Torch,
        mut shape: Vec<usize>,
        dtype: &Bound<'py, PyAny>,
        mut operands: Operands,
    ) -> PyResult<Tensor<'py>> {
        let queue = self.queue(py, torch)?;
        if let Some(last) = shape.last_mut() {
            *last = self.layout.rows();
        }
        let y = torch.empty(py, &shape, dtype, self.ordinal)?;
        operands.y = address_of(&y)? as DevicePtr;
        let versions;
        (versions, operands.settled) = self.settled();
        run(py, || {
            // SAFETY: the operands are contiguous tensors of this device whose sizes were checked, and live until the call
            // returns; torch frees their memory in the order of the stream.
            unsafe { qlora_cuda::linear_4bit(queue, &self.spec, &self.layout, self.codes, self.scales, &operands) }
        })?;
        self.settle(versions);
        Ok(y)
    }

    /// The versions of the parts, and whether whatever wrote them had ended at an earlier launch.
    fn settled(&self) -> (Versions, bool) {
        let writes = self.writes();
        (writes.versions, writes.settled)
    }

    /// From now on a launch may fetch the weight while the kernel before it still runs: whatever wrote the weight has ended by
    /// then. Where versions are not counted, nobody would notice that it is written again; where another thread has seen a
    /// later write since `versions`, the launch before says nothing of it.
    fn settle(&self, versions: Versions) {
        let mut writes = self.writes();
        if writes.versions == versions {
            writes.settled = versions.is_some() && !self.moves;
        }
    }
}

fn is_half(float: Option<FloatType>) -> bool {
    matches!(float, Some(FloatType::Bf16 | FloatType::F16))
}

fn part_of(tensor: Option<&Tensor<'_>>) -> PyResult<Option<Part>> {
    let Some(tensor) = tensor else { return Ok(None) };
    let (address, elements) = (address_of(tensor)?, elements_of(tensor)?);
    Ok(Some(Part { tensor: PyWeakrefReference::new(tensor)?.unbind(), address, elements }))
}

fn versions_of(parts: &Parts<'_, '_>) -> PyResult<Versions> {
    let mut versions = [-1; 4];
    for (version, part) in versions.iter_mut().zip(parts) {
        let Some(part) = part else { continue };
        match version_of(part)? {
            Some(counted) => *version = counted,
            None => return Ok(None),
        }
    }
    Ok(Some(versions))
}

/// Checked against the layout; the two parts of doubly quantized scales are there iff the spec says so.
fn scales_of(
    spec: &Spec,
    layout: &Layout,
    absmax: Option<Memory>,
    scale: Option<Memory>,
    offset: Option<Memory>,
) -> PyResult<DeviceScales> {
    let nested = spec.inner.double_quant();
    let elements = |memory: Option<Memory>| memory.map_or(0, |memory| memory.1);
    let address = |memory: Option<Memory>| memory.map_or(0, |memory| memory.0 as DevicePtr);
    expect("absmax", elements(absmax), layout.blocks())?;
    expect("scale", elements(scale), if nested { layout.groups() } else { 0 })?;
    expect("offset", elements(offset), if nested { layout.experts() } else { 0 })?;
    Ok(DeviceScales { absmax: address(absmax), group_scale: address(scale), offset: address(offset) })
}
