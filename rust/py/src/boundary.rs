//! The one way in and out: leaves the GIL, answers Ctrl-C, maps errors, turns addresses into slices.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use pyo3::exceptions::{PyKeyboardInterrupt, PyValueError};
use pyo3::prelude::*;
use qlora_core::{Control, CoreError};

pyo3::import_exception!(qlora_rs.errors, NonFiniteError);

/// How often a waiting thread looks for Ctrl-C and reports progress.
const POLL: Duration = Duration::from_millis(50);

/// The one map from Rust errors to Python exceptions.
pub trait IntoPyErr {
    /// The exception that a Python caller sees.
    fn into_py_err(self) -> PyErr;
}

impl IntoPyErr for CoreError {
    fn into_py_err(self) -> PyErr {
        match self {
            Self::NonFinite { .. } => NonFiniteError::new_err(self.to_string()),
            Self::Interrupted => PyKeyboardInterrupt::new_err(()),
            _ => PyValueError::new_err(self.to_string()),
        }
    }
}

/// Run brief work (milliseconds) without the GIL, on the calling thread.
pub fn detached_brief<T, E, F>(py: Python<'_>, work: F) -> PyResult<T>
where
    T: Send,
    E: IntoPyErr + Send,
    F: FnOnce(&Control) -> Result<T, E> + Send,
{
    py.detach(|| work(&Control::default())).map_err(IntoPyErr::into_py_err)
}

/// Run long work on a thread of its own without the GIL, while the caller polls for signals and calls
/// `progress(done, total)` (bytes). On Ctrl-C, or when `progress` raises, the work is told to stop and waited for.
pub fn detached<T, E, F>(py: Python<'_>, progress: Option<Bound<'_, PyAny>>, work: F) -> PyResult<T>
where
    T: Send,
    E: IntoPyErr + Send,
    F: FnOnce(&Control) -> Result<T, E> + Send,
{
    let control = Control::default();
    let progress = progress.map(Bound::unbind);
    let report = |py: Python<'_>| -> PyResult<()> {
        py.check_signals()?;
        if let Some(callback) = &progress {
            let (done, total) = control.progress();
            if total > 0 {
                callback.call1(py, (done, total))?;
            }
        }
        Ok(())
    };
    py.detach(|| {
        std::thread::scope(|scope| {
            let (finished, wait) = mpsc::channel::<()>();
            let worker = std::thread::Builder::new().name("qlora-rs-work".to_owned()).spawn_scoped(scope, || {
                // Dropped on every way out, a panic included: that is what wakes the waiting thread.
                let _finished = finished;
                work(&control)
            });
            let worker = worker.expect("a system that runs Python has a thread to give");
            let mut interruption = None;
            while wait.recv_timeout(POLL) == Err(RecvTimeoutError::Timeout) {
                if interruption.is_none()
                    && let Err(error) = Python::attach(report)
                {
                    control.cancel();
                    interruption = Some(error);
                }
            }
            let result = match worker.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            };
            match (result, interruption) {
                // An error that the wish to stop did not cause is the more telling one only if nobody asked to stop.
                (_, Some(error)) => Err(error),
                (Err(error), None) => Err(error.into_py_err()),
                (Ok(value), None) => {
                    Python::attach(report)?;
                    Ok(value)
                }
            }
        })
    })
}

/// A tensor's memory as Python hands it over: (address, number of elements).
pub type Memory = (usize, usize);

/// Memory that is only read.
///
/// # Safety
/// `address` must be the start of `len` live, initialised values of `T` for as long as the slice is used, and nothing
/// may write to them meanwhile. `_bridge.py` takes both from a contiguous tensor that it keeps alive.
pub unsafe fn read<'a, T>((address, len): Memory) -> &'a [T] {
    if len == 0 {
        return &[];
    }
    // SAFETY: the caller's promise above.
    unsafe { std::slice::from_raw_parts(address as *const T, len) }
}

/// Memory that is written.
///
/// # Safety
/// As [`read`], and nobody else may read or write it meanwhile. `_bridge.py` allocates outputs itself.
pub unsafe fn write<'a, T>((address, len): Memory) -> &'a mut [T] {
    if len == 0 {
        return &mut [];
    }
    // SAFETY: the caller's promise above.
    unsafe { std::slice::from_raw_parts_mut(address as *mut T, len) }
}

/// Lengths are checked against the layout, so that a wrong call is an error and not a wild write.
pub fn expect(name: &str, got: usize, expected: usize) -> PyResult<()> {
    if got == expected {
        return Ok(());
    }
    Err(PyValueError::new_err(format!("{name}: expected {expected} elements, got {got}")))
}
