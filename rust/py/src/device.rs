//! What the CUDA driver says of this machine.

use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};

/// `{"available", "reason", "driver_version", "devices"}`; `reason` says why no device can be used.
#[pyfunction]
pub fn driver_probe(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let answer = PyDict::new(py);
    match py.detach(qlora_cuda::driver::probe) {
        Ok(driver) => {
            let devices = PyList::empty(py);
            for device in driver.devices {
                let row = PyDict::new(py);
                row.set_item("name", device.name)?;
                row.set_item("compute_capability", device.compute_capability)?;
                row.set_item("memory_bytes", device.memory_bytes)?;
                row.set_item("multiprocessors", device.multiprocessors)?;
                devices.append(row)?;
            }
            let (major, minor) = driver.cuda_version;
            answer.set_item("available", true)?;
            answer.set_item("reason", py.None())?;
            answer.set_item("driver_version", format!("{major}.{minor}"))?;
            answer.set_item("devices", devices)?;
        }
        Err(error) => {
            answer.set_item("available", false)?;
            answer.set_item("reason", error.to_string())?;
            answer.set_item("driver_version", py.None())?;
            answer.set_item("devices", PyList::empty(py))?;
        }
    }
    Ok(answer)
}
