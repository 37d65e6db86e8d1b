//! `Pool`: buffers under a budget, in ordinary memory or on a CUDA device.

use std::ffi::c_void;
use std::mem::ManuallyDrop;
use std::panic::catch_unwind;
use std::sync::Arc;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use qlora_core::Control;
use qlora_cuda::CudaError;
use qlora_cuda::pressure::{self, DevicePool};
use qlora_paging::{
    Activity, Backend, BufferId, HostBackend, HostError, Mode, PagingError, Policy, Shared, Span, Until,
};

use crate::boundary::{IntoPyErr, detached};
use crate::dlpack::capsule;

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

/// Buffers under a budget, by number. Addresses are good as long as the pool; see `qlora_rs.paging` for the rest.
#[pyclass(frozen, module = "qlora_rs._core")]
pub struct Pool(ManuallyDrop<Memory>);

impl Drop for Pool {
    fn drop(&mut self) {
        // SAFETY: taken once, here; nobody uses it afterwards.
        let memory = unsafe { ManuallyDrop::take(&mut self.0) };
        // It may wait for the device: not under the GIL. Where the interpreter is ending it is dropped all the same.
        Python::try_attach(|py| py.detach(|| drop(memory)));
    }
}

enum Memory {
    Host(Box<Shared<HostBackend>>),
    /// On the device of this index.
    Cuda(Arc<DevicePool>, i32),
}

/// The same work on either kind of pool, without the GIL; the pool's lock is held by `with` alone.
macro_rules! either {
    ($self:ident, $py:ident, |$pool:ident| $work:expr) => {
        match &*$self.0 {
            Memory::Host($pool) => $py.detach(|| $work).map_err(IntoPyErr::into_py_err),
            Memory::Cuda($pool, _) => $py.detach(|| $work).map_err(IntoPyErr::into_py_err),
        }
    };
}

/// Lane ("in", "out", "compute", "wait"), stream, buffer, first and last moment in seconds.
type SpanRow = (&'static str, Option<u64>, String, f64, f64);

fn row(span: Span<u64>) -> SpanRow {
    let (lane, stream) = match span.activity {
        Activity::Fetch => ("in", None),
        Activity::WriteBack => ("out", None),
        Activity::Use(stream) => ("compute", Some(stream)),
        Activity::Wait(stream) => ("wait", Some(stream)),
    };
    (lane, stream, span.buffer, span.begin, span.end)
}

fn open<B: Backend>(backend: Result<B, B::Error>, policy: Policy) -> PyResult<Shared<B>>
where
    B::Error: IntoPyErr,
{
    let backend = backend.map_err(IntoPyErr::into_py_err)?;
    qlora_paging::Pool::new(backend, policy).map(Shared::new).map_err(IntoPyErr::into_py_err)
}

/// Prepares in the background of a waiting thread, as far as `control` lets it; the bytes that are ready.
fn reserve<B: Backend>(pool: &Shared<B>, bytes: usize, control: &Control) -> Result<usize, PagingError<B::Error>> {
    control.set_total(bytes as u64);
    let mut reported = 0;
    let mut report = |ready: usize| {
        // What is ready may be a little more than was asked for.
        let ready = ready.min(bytes);
        control.advance((ready - reported) as u64);
        reported = ready;
        control.check().is_ok()
    };
    let ready = pool.reserve_host(bytes, &mut report)?;
    report(ready);
    Ok(ready)
}

#[pymethods]
impl Pool {
    /// `policy`: "trace" or "lru". `device`: index of the CUDA device; None: frames in ordinary memory.
    #[new]
    #[pyo3(signature = (*, frames, page_bytes, policy, device))]
    fn new(py: Python<'_>, frames: usize, page_bytes: usize, policy: &str, device: Option<i32>) -> PyResult<Self> {
        let policy = match policy {
            "trace" => Policy::Trace,
            "lru" => Policy::Lru,
            other => return Err(PyValueError::new_err(format!("policy is \"trace\" or \"lru\", got {other:?}"))),
        };
        let Some(ordinal) = device else {
            return open(HostBackend::new(frames, page_bytes), policy)
                .map(|pool| Self(ManuallyDrop::new(Memory::Host(Box::new(pool)))));
        };
        let backend = py.detach(|| qlora_cuda::CudaBackend::new(ordinal, frames, page_bytes));
        let pool = Arc::new(open(backend, policy)?);
        pressure::register(ordinal, &pool);
        Ok(Self(ManuallyDrop::new(Memory::Cuda(pool, ordinal))))
    }

    /// Number of a new buffer of zeros.
    fn create(&self, py: Python<'_>, name: &str, bytes: usize) -> PyResult<u64> {
        either!(self, py, |pool| pool.create(name, bytes)).map(|id| id.0)
    }

    /// Make host memory ready for buffers of so many bytes; the bytes that were made ready.
    #[pyo3(signature = (bytes, *, progress))]
    fn reserve(&self, py: Python<'_>, bytes: usize, progress: Option<Bound<'_, PyAny>>) -> PyResult<usize> {
        match &*self.0 {
            Memory::Host(pool) => detached(py, progress, |control| reserve(pool, bytes, control)),
            Memory::Cuda(pool, _) => detached(py, progress, |control| reserve(pool, bytes, control)),
        }
    }

    /// Address of the buffer, until `release`. `mode`: "read", "write" or "overwrite".
    #[pyo3(signature = (buffer, *, stream, mode))]
    fn acquire(&self, py: Python<'_>, buffer: u64, stream: u64, mode: &str) -> PyResult<u64> {
        let mode = match mode {
            "read" => Mode::Read,
            "write" => Mode::Write,
            "overwrite" => Mode::Overwrite,
            other => {
                let message = format!("mode is 'read', 'write' or 'overwrite', got '{other}'");
                return Err(PyValueError::new_err(message));
            }
        };
        either!(self, py, |pool| pool.with(|pool| pool.acquire(BufferId(buffer), stream, mode)))
    }

    /// A `DLPack` capsule of memory of this pool (`host`: of its host memory); `dtype`: `DLPack`'s (code, bits).
    #[pyo3(signature = (address, *, host, shape, dtype, owner))]
    fn capsule<'py>(
        &self,
        py: Python<'py>,
        address: u64,
        host: bool,
        shape: Vec<i64>,
        dtype: (u8, u8),
        owner: Py<PyAny>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let device = match *self.0 {
            Memory::Cuda(_, ordinal) if !host => Some(ordinal),
            _ => None,
        };
        capsule(py, address, device, shape, dtype, owner)
    }

    /// Ends the stream's last `acquire`.
    #[pyo3(signature = (buffer, *, stream))]
    fn release(&self, py: Python<'_>, buffer: u64, stream: u64) -> PyResult<()> {
        either!(self, py, |pool| pool.with(|pool| pool.release(BufferId(buffer), stream)))
    }

    /// Fetch buffers in this order, as far as there is room.
    fn prefetch(&self, py: Python<'_>, buffers: Vec<u64>) -> PyResult<()> {
        let ids: Vec<_> = buffers.into_iter().map(BufferId).collect();
        either!(self, py, |pool| pool.with(|pool| pool.prefetch(&ids)))
    }

    /// Address of the up-to-date content in host memory, to be read.
    fn host(&self, py: Python<'_>, buffer: u64) -> PyResult<u64> {
        either!(self, py, |pool| pool.host(BufferId(buffer)))
    }

    /// Address in host memory at which the caller gives the whole buffer new content.
    fn begin_fill(&self, py: Python<'_>, buffer: u64) -> PyResult<u64> {
        either!(self, py, |pool| pool.begin_fill(BufferId(buffer)))
    }

    /// The content is whole, or else the buffer is zeros.
    #[pyo3(signature = (buffer, *, whole))]
    fn end_fill(&self, py: Python<'_>, buffer: u64, whole: bool) -> PyResult<()> {
        either!(self, py, |pool| pool.with(|pool| pool.end_fill(BufferId(buffer), whole)))
    }

    /// Queue the copy of what changed to the host.
    fn flush(&self, py: Python<'_>, buffer: u64) -> PyResult<()> {
        either!(self, py, |pool| pool.with(|pool| pool.flush(BufferId(buffer))))
    }

    /// From now on the buffer is only read.
    fn freeze(&self, py: Python<'_>, buffer: u64) -> PyResult<()> {
        either!(self, py, |pool| pool.with(|pool| pool.freeze(BufferId(buffer))))
    }

    /// Forget the content: zeros again.
    fn discard(&self, py: Python<'_>, buffer: u64) -> PyResult<()> {
        either!(self, py, |pool| pool.with(|pool| pool.discard(BufferId(buffer))))
    }

    /// The buffer is gone.
    fn free(&self, py: Python<'_>, buffer: u64) -> PyResult<()> {
        either!(self, py, |pool| pool.with(|pool| pool.free(BufferId(buffer))))
    }

    /// Bytes of frames that were given back to the device.
    fn give_back(&self, py: Python<'_>, bytes: usize) -> PyResult<usize> {
        either!(self, py, |pool| pool.give_back(bytes, Until::Reclaimed))
    }

    /// Use the whole budget again.
    fn reclaim(&self, py: Python<'_>) -> PyResult<()> {
        either!(self, py, |pool| pool.with(|pool| {
            pool.reclaim();
            Ok(())
        }))
    }

    /// Record what happens when.
    fn start_timeline(&self, py: Python<'_>) -> PyResult<()> {
        either!(self, py, |pool| pool.with(qlora_paging::Pool::start_timeline))
    }

    /// What happened when: (lane, stream, buffer, begin, end), in seconds.
    fn stop_timeline(&self, py: Python<'_>) -> PyResult<Vec<SpanRow>> {
        let spans = either!(self, py, |pool| pool.stop_timeline())?;
        Ok(spans.into_iter().map(row).collect())
    }

    /// Counts so far, and how the pool stands.
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let stats = either!(self, py, |pool| pool.stats())?;
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
        let map = either!(self, py, |pool| pool.with(|pool| Ok(pool.frame_map())))?;
        Ok(map.into_iter().map(|owner| owner.map(|(id, page)| (id.0, page))).collect())
    }
}

/// What torch's pluggable allocator calls for memory of a device; null where there is none, even after the pools of the
/// device have given frames back.
///
/// Called on any thread, with or without the GIL, under torch's own lock: it takes neither.
#[unsafe(no_mangle)]
pub extern "C" fn qlora_rs_alloc(size: isize, device: i32, _stream: *mut c_void) -> *mut c_void {
    let allocate = || usize::try_from(size).ok().and_then(|bytes| pressure::allocate(device, bytes).ok());
    // A panic must not go through torch's frames.
    catch_unwind(allocate).ok().flatten().map_or(std::ptr::null_mut(), |address| address as *mut c_void)
}

/// What torch's pluggable allocator calls to free what `qlora_rs_alloc` gave.
///
/// # Safety
/// The pointer came from `qlora_rs_alloc` for this device, and nothing queued still uses it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qlora_rs_free(pointer: *mut c_void, _size: isize, device: i32, _stream: *mut c_void) {
    // There is nobody to tell: at the end of the process the driver may be gone already.
    // SAFETY: the caller's promise.
    let _: Result<Result<(), CudaError>, _> = catch_unwind(|| unsafe { pressure::release(device, pointer as u64) });
}
