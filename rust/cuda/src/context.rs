//! Devices as this process uses them: the primary context, which torch shares, and what the kernels must know.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, Once, OnceLock};

use cudarc::driver::{result, sys};

use crate::driver::{attribute, initialise};
use crate::error::{CudaError, failed};
use crate::modules::Modules;

/// Devices beyond this many are not used; no machine has them.
const MAX_DEVICES: usize = 64;
/// What the kernels' PTX asks of a driver.
const LEAST_DRIVER: (i32, i32) = (12, 0);
/// Drivers before this one do not capture overlapping launches.
const OVERLAP_DRIVER: (i32, i32) = (12, 3);
/// What the oldest kernels' PTX asks of a device.
const LEAST_CAPABILITY: (i32, i32) = (7, 5);

/// A device whose primary context this process holds.
#[derive(Debug)]
pub struct Device {
    context: sys::CUcontext,
    handle: sys::CUdevice,
    /// Its index.
    pub ordinal: i32,
    /// Compute capability, (major, minor).
    pub capability: (i32, i32),
    /// Number of streaming multiprocessors.
    pub multiprocessors: u32,
    /// CUDA version that the driver supports, (major, minor).
    driver: (i32, i32),
    /// Bytes of shared memory that one CTA may ask for.
    pub shared_bytes: u32,
    /// Marketing name.
    pub name: String,
    pub(crate) modules: Modules,
}

// SAFETY: a CUcontext is a handle that the driver lets any thread use; the rest is plain data or locked.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

static DEVICES: [OnceLock<Device>; MAX_DEVICES] = [const { OnceLock::new() }; MAX_DEVICES];
static STARTING: Mutex<()> = Mutex::new(());
/// Is this process a child of one that had started CUDA?
static FORKED: AtomicBool = AtomicBool::new(false);

/// A forked child cannot use the devices of its parent.
///
/// # Errors
/// [`CudaError::Forked`] there.
pub(crate) fn not_forked() -> Result<(), CudaError> {
    if FORKED.load(Ordering::Relaxed) { Err(CudaError::Forked) } else { Ok(()) }
}

/// Have children of this process told that they are. Asking for the process's number instead would be a system call in
/// every launch.
fn watch_forks() {
    extern "C" fn in_child() {
        if DEVICES.iter().any(|slot| slot.get().is_some()) {
            FORKED.store(true, Ordering::Relaxed);
        }
    }
    static WATCHED: Once = Once::new();
    WATCHED.call_once(|| {
        // SAFETY: the handler only looks at atomics and sets one; code of an extension is never unloaded.
        let error = unsafe { libc::pthread_atfork(None, None, Some(in_child)) };
        assert_eq!(error, 0, "out of memory for a handler of forks");
    });
}

/// The device of this index, its primary context retained on the first call.
///
/// # Errors
/// [`CudaError`] says why it cannot be used.
pub fn device(ordinal: i32) -> Result<&'static Device, CudaError> {
    not_forked()?;
    let slot = usize::try_from(ordinal).ok().and_then(|index| DEVICES.get(index));
    if let Some(device) = slot.and_then(OnceLock::get) {
        return Ok(device);
    }
    // A panic while starting leaves nothing half made: the lock guards no data.
    let _starting = STARTING.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let (version, count) = initialise()?;
    if version < LEAST_DRIVER {
        return Err(CudaError::OldDriver { version });
    }
    let slot = slot.filter(|_| ordinal < count).ok_or(CudaError::Ordinal { ordinal, count })?;
    if slot.get().is_none() {
        watch_forks();
        let device = open(ordinal, version)?;
        // Nobody else can have filled it: the lock is held.
        let _ = slot.set(device);
    }
    slot.get().ok_or(CudaError::NoDevice)
}

fn open(ordinal: i32, driver: (i32, i32)) -> Result<Device, CudaError> {
    use sys::CUdevice_attribute as Attribute;

    let handle = result::device::get(ordinal).map_err(failed("cuDeviceGet"))?;
    let unsigned = |which| attribute(handle, which).map(|value| u32::try_from(value).unwrap_or(0));
    let capability = (
        attribute(handle, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
        attribute(handle, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
    );
    let name = result::device::get_name(handle).map_err(failed("cuDeviceGetName"))?;
    if capability < LEAST_CAPABILITY {
        return Err(CudaError::OldDevice { name, capability, need: "qlora_rs", least: LEAST_CAPABILITY });
    }
    Ok(Device {
        // SAFETY: `handle` was returned by cuDeviceGet. Never released: torch holds the same context to the end.
        context: unsafe { result::primary_ctx::retain(handle) }.map_err(failed("cuDevicePrimaryCtxRetain"))?,
        handle,
        ordinal,
        capability,
        multiprocessors: unsigned(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?.max(1),
        driver,
        shared_bytes: unsigned(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
        name,
        modules: Modules::default(),
    })
}

impl Device {
    pub(crate) fn attribute(&self, which: sys::CUdevice_attribute) -> Result<i32, CudaError> {
        attribute(self.handle, which)
    }

    /// Where it is on the PCI bus, as sysfs writes it: `0000:3b:00.0`.
    pub(crate) fn pci_address(&self) -> Result<String, CudaError> {
        let mut name = [0_u8; 32];
        // SAFETY: the pointer is to a live local of the length that is said; the handle was returned by cuDeviceGet.
        unsafe { sys::cuDeviceGetPCIBusId(name.as_mut_ptr().cast(), name.len() as i32, self.handle) }
            .result()
            .map_err(failed("cuDeviceGetPCIBusId"))?;
        let end = name.iter().position(|&byte| byte == 0).unwrap_or(name.len());
        Ok(String::from_utf8_lossy(&name[..end]).to_lowercase())
    }

    /// Bytes of device memory in all.
    pub(crate) fn memory_bytes(&self) -> Result<usize, CudaError> {
        // SAFETY: the handle was returned by cuDeviceGet.
        unsafe { result::device::total_mem(self.handle) }.map_err(failed("cuDeviceTotalMem"))
    }

    /// Can a kernel start before the one before it has ended, also in a graph that is captured? Kernels for 9.0 and
    /// later wait by themselves; older ones do not know how.
    pub(crate) fn overlaps(&self) -> bool {
        self.capability >= (9, 0) && self.driver >= OVERLAP_DRIVER
    }

    /// Makes this device's context the calling thread's, until the guard is dropped where the thread had another.
    ///
    /// # Errors
    /// [`CudaError::Driver`].
    pub(crate) fn enter(&self) -> Result<Entered, CudaError> {
        let mut current = std::ptr::null_mut();
        // SAFETY: the out pointer is a live local.
        unsafe { sys::cuCtxGetCurrent(&raw mut current) }.result().map_err(failed("cuCtxGetCurrent"))?;
        if current == self.context {
            return Ok(Entered { pushed: false });
        }
        if current.is_null() {
            // As the CUDA runtime does on a fresh thread: libraries that run on it next look for a current context.
            // SAFETY: the context is retained for as long as the process lives.
            unsafe { sys::cuCtxSetCurrent(self.context) }.result().map_err(failed("cuCtxSetCurrent"))?;
            return Ok(Entered { pushed: false });
        }
        // SAFETY: the context is retained for as long as the process lives.
        unsafe { sys::cuCtxPushCurrent_v2(self.context) }.result().map_err(failed("cuCtxPushCurrent"))?;
        Ok(Entered { pushed: true })
    }
}

/// Puts the thread's former context back.
pub(crate) struct Entered {
    pushed: bool,
}

impl Drop for Entered {
    fn drop(&mut self) {
        if self.pushed {
            let mut old = std::ptr::null_mut();
            // SAFETY: pops what `enter` pushed on this thread. A failure leaves the context current, which harms nobody.
            let _ = unsafe { sys::cuCtxPopCurrent_v2(&raw mut old) };
        }
    }
}

/// While a stream is captured, CUDA refuses on all threads what might get into the graph by accident. Until this guard is
/// dropped the calling thread may do it: it allocates, or asks about events that no graph knows.
pub(crate) struct Relaxed {
    before: sys::CUstreamCaptureMode,
}

impl Relaxed {
    pub(crate) fn enter() -> Result<Self, CudaError> {
        let mut mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the pointer is to a live local.
        unsafe { sys::cuThreadExchangeStreamCaptureMode(&raw mut mode) }
            .result()
            .map_err(failed("cuThreadExchangeStreamCaptureMode"))?;
        Ok(Self { before: mode })
    }
}

impl Drop for Relaxed {
    fn drop(&mut self) {
        // SAFETY: the pointer is to a live field. A failure leaves the thread less guarded, which harms nobody.
        let _ = unsafe { sys::cuThreadExchangeStreamCaptureMode(&raw mut self.before) };
    }
}
