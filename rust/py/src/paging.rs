//! `HostPool`: buffers under a budget in ordinary memory.

use std::sync::{Mutex, PoisonError};

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use qlora_paging::{BufferId, HostBackend, HostError, Mode, PagingError, Policy, Pool};

use crate::boundary::{IntoPyErr, Memory, read, write};

pyo3::import_exception!(qlora_rs.errors, DeviceError);
pyo3::import_exception!(qlora_rs.errors, PageError);

impl IntoPyErr for HostError {
    fn into_py_err(self) -> PyErr {
        match self {
            Self::PageSize(_) => PyValueError::new_err(self.to_string()),
            Self::Memory { .. } => DeviceError::new_err(self.to_string()),
        }
    }
}

impl<E: std::error::Error + IntoPyErr> IntoPyErr for PagingError<E> {
    fn into_py_err(self) -> PyErr {
        match self {
            Self::Size(message) => PyValueError::new_err(message),
            Self::Backend(error) => error.into_py_err(),
            _ => PageError::new_err(self.to_string()),
        }
    }
}

type Outcome<T> = Result<T, PagingError<HostError>>;

/// Buffers in ordinary memory, by number. Addresses are good as long as the pool; see `qlora_rs.paging` for the rest.
#[pyclass(frozen, module = "qlora_rs._core")]
pub struct HostPool {
    pool: Mutex<Pool<HostBackend>>,
}

impl HostPool {
    fn with<T: Send>(
        &self,
        py: Python<'_>,
        work: impl FnOnce(&mut Pool<HostBackend>) -> Outcome<T> + Send,
    ) -> PyResult<T> {
        py.detach(|| {
            // A panic in the bookkeeping cannot be mended, but it must not become a second one here.
            work(&mut self.pool.lock().unwrap_or_else(PoisonError::into_inner))
        })
        .map_err(IntoPyErr::into_py_err)
    }
}

fn mode(write: bool) -> Mode {
    if write { Mode::Write } else { Mode::Read }
}

#[pymethods]
impl HostPool {
    /// `policy`: "trace" or "lru".
    #[new]
    #[pyo3(signature = (*, frames, page_bytes, policy))]
    fn new(frames: usize, page_bytes: usize, policy: &str) -> PyResult<Self> {
        let policy = match policy {
            "trace" => Policy::Trace,
            "lru" => Policy::Lru,
            other => return Err(PyValueError::new_err(format!("policy is \"trace\" or \"lru\", got {other:?}"))),
        };
        let backend = HostBackend::new(frames, page_bytes).map_err(IntoPyErr::into_py_err)?;
        let pool = Pool::new(backend, policy).map_err(IntoPyErr::into_py_err)?;
        Ok(Self { pool: Mutex::new(pool) })
    }

    /// Number of a new buffer of zeros.
    fn create(&self, py: Python<'_>, name: &str, bytes: usize) -> PyResult<u64> {
        self.with(py, |pool| pool.create(name, bytes)).map(|id| id.0)
    }

    /// Address of the buffer, until `release`.
    #[pyo3(signature = (buffer, *, stream, write))]
    fn acquire(&self, py: Python<'_>, buffer: u64, stream: u64, write: bool) -> PyResult<u64> {
        self.with(py, |pool| pool.acquire(BufferId(buffer), stream, mode(write)))
    }

    /// Ends the stream's last `acquire`.
    #[pyo3(signature = (buffer, *, stream))]
    fn release(&self, py: Python<'_>, buffer: u64, stream: u64) -> PyResult<()> {
        self.with(py, |pool| pool.release(BufferId(buffer), stream))
    }

    /// Fetch buffers in this order, as far as there is room.
    fn prefetch(&self, py: Python<'_>, buffers: Vec<u64>) -> PyResult<()> {
        let ids: Vec<_> = buffers.into_iter().map(BufferId).collect();
        self.with(py, |pool| pool.prefetch(&ids))
    }

    /// Address of the up-to-date content in host memory, to be read.
    fn host(&self, py: Python<'_>, buffer: u64) -> PyResult<u64> {
        self.with(py, |pool| pool.host(BufferId(buffer), Mode::Read))
    }

    /// Replace the content by `source`'s (address, bytes), which are as many as the buffer was created with.
    fn fill(&self, py: Python<'_>, buffer: u64, source: Memory) -> PyResult<()> {
        self.with(py, |pool| {
            let home = pool.host(BufferId(buffer), Mode::Write)?;
            // SAFETY: `_bridge.py` passes a live contiguous tensor of the buffer's size, and the pool has just said that
            // the home is this buffer's and that nothing else uses it; the lock is held.
            unsafe { write::<u8>((home as usize, source.1)).copy_from_slice(read::<u8>(source)) };
            Ok(())
        })
    }

    /// From now on the buffer is only read.
    fn freeze(&self, py: Python<'_>, buffer: u64) -> PyResult<()> {
        self.with(py, |pool| pool.freeze(BufferId(buffer)))
    }

    /// Forget the content: zeros again.
    fn discard(&self, py: Python<'_>, buffer: u64) -> PyResult<()> {
        self.with(py, |pool| pool.discard(BufferId(buffer)))
    }

    /// The buffer is gone.
    fn free(&self, py: Python<'_>, buffer: u64) -> PyResult<()> {
        self.with(py, |pool| pool.free(BufferId(buffer)))
    }

    /// Bytes of frames that were given back to the device.
    fn give_back(&self, py: Python<'_>, bytes: usize) -> PyResult<usize> {
        self.with(py, |pool| pool.give_back(bytes))
    }

    /// Use the whole budget again.
    fn reclaim(&self, py: Python<'_>) -> PyResult<()> {
        self.with(py, |pool| {
            pool.reclaim();
            Ok(())
        })
    }

    /// Counts so far, and how the pool stands.
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let stats = self.with(py, |pool| Ok(pool.stats()))?;
        let answer = PyDict::new(py);
        answer.set_item("limit_bytes", stats.limit_bytes)?;
        answer.set_item("committed_bytes", stats.committed_bytes)?;
        answer.set_item("resident_bytes", stats.resident_bytes)?;
        answer.set_item("paged_bytes", stats.paged_bytes)?;
        answer.set_item("host_bytes", stats.host_bytes)?;
        answer.set_item("buffers", stats.buffers)?;
        answer.set_item("hits", stats.hits)?;
        answer.set_item("misses", stats.misses)?;
        answer.set_item("prefetches", stats.prefetches)?;
        answer.set_item("evicted_pages", stats.evicted_pages)?;
        answer.set_item("bytes_in", stats.bytes_in)?;
        answer.set_item("bytes_out", stats.bytes_out)?;
        answer.set_item("trace_breaks", stats.trace_breaks)?;
        answer.set_item("trace_period", stats.trace_period)?;
        answer.set_item("stall_seconds", stats.stall.as_secs_f64())?;
        Ok(answer)
    }

    /// Which page of which buffer each frame holds.
    fn frame_map(&self, py: Python<'_>) -> PyResult<Vec<Option<(u64, usize)>>> {
        let map = self.with(py, |pool| Ok(pool.frame_map()))?;
        Ok(map.into_iter().map(|owner| owner.map(|(id, page)| (id.0, page))).collect())
    }
}
