//! From files to a device: connects the reader of one crate with the sink of another.

use std::path::PathBuf;

use pyo3::prelude::*;
use qlora_checkpoint::{FileTargets, LoadError, LoadOptions, Target, load};
use qlora_cuda::{Queue, Uploader};

use crate::boundary::{IntoPyErr, detached};

impl<E: IntoPyErr> IntoPyErr for LoadError<E> {
    fn into_py_err(self) -> PyErr {
        match self {
            Self::File(error) => error.into_py_err(),
            Self::Sink(error) => error.into_py_err(),
        }
    }
}

/// Name of a tensor in its file, (address, bytes) of its place on the device.
type Place = (String, (usize, u64));

/// Read tensors of safetensors files, each `(path, [(tensor, (address, bytes)), ...])`, into memory of the queue's device,
/// after what is queued on its stream; all of it has arrived when the call returns.
#[pyfunction]
#[pyo3(signature = (files, *, queue, buffer_bytes, num_threads, progress))]
pub fn cuda_load(
    py: Python<'_>,
    files: Vec<(PathBuf, Vec<Place>)>,
    queue: (i32, usize),
    buffer_bytes: usize,
    num_threads: usize,
    progress: Option<Bound<'_, PyAny>>,
) -> PyResult<()> {
    let target = |(tensor, (address, bytes))| Target { tensor, to: address as u64, bytes };
    let files: Vec<_> = files
        .into_iter()
        .map(|(path, places)| FileTargets { path, targets: places.into_iter().map(target).collect() })
        .collect();
    let queue = Queue { device: queue.0, stream: queue.1 };
    detached(py, progress, |control| {
        let options = LoadOptions { buffer_bytes, num_threads };
        // SAFETY: `_bridge.py` passes live tensors of this device, which its caller keeps until the call has returned.
        load(&files, options, || unsafe { Uploader::new(queue, buffer_bytes) }, control)
    })
}
