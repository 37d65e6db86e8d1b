//! Asks the CUDA driver what it sees, without ever panicking where there is none.

use cudarc::driver::{result, sys};

use crate::error::{CudaError, failed};

/// One CUDA device as the driver describes it.
#[derive(Debug, Clone)]
pub struct Device {
    /// Marketing name.
    pub name: String,
    /// Compute capability, (major, minor).
    pub compute_capability: (i32, i32),
    /// Global memory in bytes.
    pub memory_bytes: usize,
    /// Number of streaming multiprocessors.
    pub multiprocessors: i32,
}

/// Driver version and devices.
#[derive(Debug, Clone)]
pub struct Driver {
    /// CUDA version the driver supports, (major, minor).
    pub cuda_version: (i32, i32),
    /// Devices in the driver's order; never empty.
    pub devices: Vec<Device>,
}

pub(crate) fn attribute(device: sys::CUdevice, which: sys::CUdevice_attribute) -> Result<i32, CudaError> {
    // SAFETY: callers pass what cuDeviceGet returned.
    unsafe { result::device::get_attribute(device, which) }.map_err(failed("cuDeviceGetAttribute"))
}

/// Initialise the driver; the version it supports, (major, minor), and how many devices it sees (at least one).
///
/// # Errors
/// [`CudaError`] says why no device can be used.
pub(crate) fn initialise() -> Result<((i32, i32), i32), CudaError> {
    // SAFETY: only tries to open the library; cudarc would panic on the first call if it were missing.
    if !unsafe { sys::is_culib_present() } {
        return Err(CudaError::NoDriver);
    }
    result::init().map_err(|error| match error.0 {
        // So answers a driver that was started before a fork.
        sys::CUresult::CUDA_ERROR_NOT_INITIALIZED => CudaError::Forked,
        _ => failed("cuInit")(error),
    })?;
    let mut version = 0;
    // SAFETY: the out pointer is a live local.
    unsafe { sys::cuDriverGetVersion(&raw mut version) }.result().map_err(failed("cuDriverGetVersion"))?;
    let count = result::device::get_count().map_err(failed("cuDeviceGetCount"))?;
    if count == 0 {
        return Err(CudaError::NoDevice);
    }
    Ok(((version / 1000, version % 1000 / 10), count))
}

/// Initialise the driver and list its devices. Creates no context.
///
/// # Errors
/// [`CudaError`] says why no device can be used.
pub fn probe() -> Result<Driver, CudaError> {
    use sys::CUdevice_attribute as Attribute;

    let (cuda_version, count) = initialise()?;
    let mut devices = Vec::new();
    for ordinal in 0..count {
        let device = result::device::get(ordinal).map_err(failed("cuDeviceGet"))?;
        devices.push(Device {
            name: result::device::get_name(device).map_err(failed("cuDeviceGetName"))?,
            compute_capability: (
                attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            ),
            // SAFETY: `device` was returned by cuDeviceGet above.
            memory_bytes: unsafe { result::device::total_mem(device) }.map_err(failed("cuDeviceTotalMem"))?,
            multiprocessors: attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        });
    }
    Ok(Driver { cuda_version, devices })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probe_answers_with_a_device_or_a_reason_and_never_panics() {
        match probe() {
            Ok(driver) => assert!(!driver.devices.is_empty()),
            Err(error) => assert!(error.to_string().contains("CUDA driver")),
        }
    }
}
