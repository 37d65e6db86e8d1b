//! Files to files: headers, plans, and the streamed packing.

use std::collections::HashMap;
use std::fs::File;
use std::path::PathBuf;

use pyo3::exceptions::PyOSError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};
use qlora_checkpoint::{
    CheckpointError, Checksum, Finished, Header, PackOptions, Plan, PlanRequest, Resumption, Tensor, pack, swap,
};

use crate::boundary::{IntoPyErr, Memory, detached, detached_brief, read};
use crate::spec::Spec;

pyo3::import_exception!(qlora_rs.errors, FormatError);
pyo3::import_exception!(qlora_rs.errors, NonFiniteError);
pyo3::import_exception!(qlora_rs.errors, UnsupportedError);

impl IntoPyErr for CheckpointError {
    fn into_py_err(self) -> PyErr {
        match self {
            Self::Io { path, source } => {
                let text = source.to_string();
                let reason = text.split(" (os error").next().unwrap_or(&text).to_owned();
                PyOSError::new_err((source.raw_os_error(), reason, path.to_string_lossy().into_owned()))
            }
            Self::Format { .. } => FormatError::new_err(self.to_string()),
            Self::Unsupported(_) => UnsupportedError::new_err(self.to_string()),
            Self::NonFinite { .. } => NonFiniteError::new_err(self.to_string()),
            Self::Core(error) => error.into_py_err(),
        }
    }
}

/// (name, dtype, shape, start, end)
type Row = (String, String, Vec<u64>, u64, u64);

fn rows(tensors: &[Tensor]) -> Vec<Row> {
    let row =
        |tensor: &Tensor| (tensor.name.clone(), tensor.dtype.clone(), tensor.shape.clone(), tensor.start, tensor.end);
    tensors.iter().map(row).collect()
}

/// `{"metadata": {...}, "tensors": [(name, dtype, shape, start, end), ...]}` of a safetensors file, in data order.
#[pyfunction]
#[pyo3(signature = (path))]
#[allow(clippy::needless_pass_by_value)] // pyo3 hands arguments over by value
pub fn read_header(py: Python<'_>, path: PathBuf) -> PyResult<Bound<'_, PyDict>> {
    let header = detached_brief(py, |_| Header::read(&path))?;
    let answer = PyDict::new(py);
    answer.set_item("metadata", header.metadata)?;
    answer.set_item("tensors", rows(&header.tensors))?;
    Ok(answer)
}

/// Let two existing paths of one file system change places in one step; false, and nothing has happened, where the file
/// system cannot.
#[pyfunction]
#[pyo3(signature = (a, b))]
#[allow(clippy::needless_pass_by_value)] // pyo3 hands arguments over by value
pub fn swap_paths(py: Python<'_>, a: PathBuf, b: PathBuf) -> PyResult<bool> {
    detached_brief(py, |_| swap(&a, &b))
}

/// XXH3 (128 bits, hexadecimal) of memory: what a journal knows written bytes by.
#[pyfunction]
#[pyo3(signature = (source))]
pub fn checksum(py: Python<'_>, source: Memory) -> PyResult<String> {
    detached_brief(py, |_| {
        // SAFETY: `_bridge.py` passes the memory of a live contiguous tensor.
        let bytes = unsafe { read::<u8>(source) };
        Ok::<_, CheckpointError>(Checksum::of(bytes))
    })
}

/// The same of `bytes` bytes of the file `path`, from `start` on.
#[pyfunction]
#[pyo3(signature = (path, *, start, bytes))]
#[allow(clippy::needless_pass_by_value)] // pyo3 hands arguments over by value
pub fn file_checksum(py: Python<'_>, path: PathBuf, start: u64, bytes: u64) -> PyResult<String> {
    detached(py, None, |control| {
        let file = File::open(&path).map_err(|source| CheckpointError::Io { path: path.clone(), source })?;
        Checksum::of_file(&path, &file, start, bytes, control)
    })
}

/// Quantize the tensors named `packed` of `files` in the folder `source`, those that are `transposed` too as the matrices
/// (out, in) that the files hold as (in, out), copy the others, and write safetensors files into the existing folder
/// `destination`; with none, only plan. What is finished gets a line in the existing file `journal`. What was so already,
/// by the checksums of source tensors' outputs and the SHA-256 of source files, is checked and kept.
///
/// Returns `{"shards": [{"name", "tensors": [(name, dtype, shape, start, end), ...]}, ...], "source_sha256": {file: hex}}`.
#[pyfunction]
#[pyo3(signature = (spec, *, source, files, packed, transposed, destination, journal, finished_tensors, finished_files, max_shard_size, slice_bytes, num_threads, progress))]
#[allow(clippy::too_many_arguments, clippy::needless_pass_by_value)] // named at the only call; pyo3 hands over values
pub fn pack_checkpoint<'py>(
    py: Python<'py>,
    spec: &Spec,
    source: PathBuf,
    files: Vec<String>,
    packed: Vec<String>,
    transposed: Vec<String>,
    destination: Option<PathBuf>,
    journal: Option<PathBuf>,
    finished_tensors: HashMap<String, String>,
    finished_files: HashMap<String, String>,
    max_shard_size: u64,
    slice_bytes: usize,
    num_threads: usize,
    progress: Option<Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyDict>> {
    let spec = &spec.inner;
    let version = env!("CARGO_PKG_VERSION");
    let (plan, digests) = detached(py, progress, |control| {
        let request = PlanRequest {
            source: &source,
            files: &files,
            packed: &packed,
            transposed: &transposed,
            spec,
            max_shard_size,
            version,
        };
        let plan = Plan::new(&request)?;
        let digests = match destination {
            Some(folder) => {
                let finished = Finished { tensors: finished_tensors, files: finished_files };
                let resumption = journal.as_deref().map(|journal| Resumption { journal, finished: &finished });
                pack(&plan, spec, &folder, PackOptions { slice_bytes, num_threads }, resumption, control)?
            }
            None => Vec::new(),
        };
        Ok::<_, CheckpointError>((plan, digests))
    })?;
    let shards = PyList::empty(py);
    for shard in &plan.shards {
        let row = PyDict::new(py);
        row.set_item("name", &shard.name)?;
        row.set_item("tensors", rows(&shard.tensors))?;
        shards.append(row)?;
    }
    let hashes = PyDict::new(py);
    for (source, digest) in plan.sources.iter().zip(digests) {
        hashes.set_item(&source.name, digest)?;
    }
    let answer = PyDict::new(py);
    answer.set_item("shards", shards)?;
    answer.set_item("source_sha256", hashes)?;
    Ok(answer)
}
