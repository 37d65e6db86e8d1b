//! The kernels' PTX, compiled by the driver when a kernel is first used on a device.

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::path::Path;
use std::sync::{Mutex, OnceLock, PoisonError, RwLock};

use cudarc::driver::{result, sys};

use crate::context::Device;
use crate::error::{CudaError, failed};

/// One compilation of a `.cu` file.
#[derive(Debug)]
struct Ptx {
    /// Name of the file in `kernels/ptx`, without `.ptx`.
    stem: &'static str,
    /// Least compute capability, (major, minor).
    least: (i32, i32),
    /// Made of instructions that later devices lack.
    only: bool,
    text: &'static str,
}

macro_rules! ptx {
    ($stem:literal, $least:expr) => {
        ptx!($stem, $least, false)
    };
    ($stem:literal, $least:expr, $only:expr) => {
        Ptx {
            stem: $stem,
            least: $least,
            only: $only,
            text: include_str!(concat!("../../../kernels/ptx/", $stem, ".ptx")),
        }
    };
}

/// A `.cu` file: its compilations, the most demanding first.
#[derive(Debug)]
pub(crate) struct KernelFile(&'static [Ptx]);

impl KernelFile {
    /// The first compilation that a device of this capability runs.
    fn for_device(&self, capability: (i32, i32)) -> Option<&'static Ptx> {
        self.0.iter().find(|ptx| capability == ptx.least || (capability > ptx.least && !ptx.only))
    }

    #[cfg(test)]
    pub(crate) fn text_for(&self, capability: (i32, i32)) -> Option<&'static str> {
        self.for_device(capability).map(|ptx| ptx.text)
    }
}

pub(crate) static DEQUANTIZE: KernelFile =
    KernelFile(&[ptx!("dequantize_sm80", (8, 0)), ptx!("dequantize_sm75", (7, 5))]);
pub(crate) static QUANTIZE: KernelFile =
    KernelFile(&[ptx!("quantize_sm90", (9, 0)), ptx!("quantize_sm80", (8, 0)), ptx!("quantize_sm75", (7, 5))]);
pub(crate) static DOUBLE_QUANTIZE: KernelFile = KernelFile(&[
    ptx!("double_quantize_sm90", (9, 0)),
    ptx!("double_quantize_sm80", (8, 0)),
    ptx!("double_quantize_sm75", (7, 5)),
]);

pub(crate) static OPTIMIZER: KernelFile = KernelFile(&[ptx!("optimizer", (7, 5))]);

pub(crate) static LINEAR_BF16: KernelFile =
    KernelFile(&[ptx!("linear_4bit_bf16_sm90", (9, 0)), ptx!("linear_4bit_bf16_sm80", (8, 0))]);
pub(crate) static LINEAR_F16: KernelFile =
    KernelFile(&[ptx!("linear_4bit_f16_sm90", (9, 0)), ptx!("linear_4bit_f16_sm80", (8, 0))]);
pub(crate) static LINEAR_WIDE_BF16: KernelFile =
    KernelFile(&[ptx!("linear_4bit_wide_bf16_sm90", (9, 0)), ptx!("linear_4bit_wide_bf16_sm80", (8, 0))]);
pub(crate) static LINEAR_WIDE_F16: KernelFile =
    KernelFile(&[ptx!("linear_4bit_wide_f16_sm90", (9, 0)), ptx!("linear_4bit_wide_f16_sm80", (8, 0))]);
pub(crate) static LINEAR_HOPPER_BF16: KernelFile = KernelFile(&[ptx!("linear_4bit_sm90_bf16", (9, 0), true)]);
pub(crate) static LINEAR_HOPPER_F16: KernelFile = KernelFile(&[ptx!("linear_4bit_sm90_f16", (9, 0), true)]);
pub(crate) static GEMM_BF16: KernelFile =
    KernelFile(&[ptx!("gemm_4bit_bf16_sm90", (9, 0)), ptx!("gemm_4bit_bf16_sm80", (8, 0))]);
pub(crate) static GEMM_F16: KernelFile =
    KernelFile(&[ptx!("gemm_4bit_f16_sm90", (9, 0)), ptx!("gemm_4bit_f16_sm80", (8, 0))]);
pub(crate) static GEMM_HOPPER_BF16: KernelFile = KernelFile(&[ptx!("gemm_4bit_sm90_bf16", (9, 0), true)]);
pub(crate) static GEMM_HOPPER_F16: KernelFile = KernelFile(&[ptx!("gemm_4bit_sm90_f16", (9, 0), true)]);
pub(crate) static LINEAR_BACKWARD_BF16: KernelFile =
    KernelFile(&[ptx!("linear_backward_4bit_bf16_sm90", (9, 0)), ptx!("linear_backward_4bit_bf16_sm80", (8, 0))]);
pub(crate) static LINEAR_BACKWARD_F16: KernelFile =
    KernelFile(&[ptx!("linear_backward_4bit_f16_sm90", (9, 0)), ptx!("linear_backward_4bit_f16_sm80", (8, 0))]);
pub(crate) static LINEAR_BACKWARD_HOPPER_BF16: KernelFile =
    KernelFile(&[ptx!("linear_backward_4bit_sm90_bf16", (9, 0), true)]);
pub(crate) static LINEAR_BACKWARD_HOPPER_F16: KernelFile =
    KernelFile(&[ptx!("linear_backward_4bit_sm90_f16", (9, 0), true)]);

/// All of them, for [`Device::warmup`].
static FILES: [&KernelFile; 18] = [
    &DEQUANTIZE,
    &QUANTIZE,
    &DOUBLE_QUANTIZE,
    &OPTIMIZER,
    &LINEAR_BF16,
    &LINEAR_F16,
    &LINEAR_WIDE_BF16,
    &LINEAR_WIDE_F16,
    &LINEAR_HOPPER_BF16,
    &LINEAR_HOPPER_F16,
    &GEMM_BF16,
    &GEMM_F16,
    &GEMM_HOPPER_BF16,
    &GEMM_HOPPER_F16,
    &LINEAR_BACKWARD_BF16,
    &LINEAR_BACKWARD_F16,
    &LINEAR_BACKWARD_HOPPER_BF16,
    &LINEAR_BACKWARD_HOPPER_F16,
];

/// Names a folder whose PTX is used instead of the embedded text, for work on kernels.
const PTX_DIR: &str = "QLORA_RS_PTX_DIR";
/// The assembler's messages are cut here.
const LOG_BYTES: usize = 8192;

/// A kernel on one device.
#[derive(Debug)]
pub(crate) struct Function {
    pub(crate) handle: sys::CUfunction,
    /// Bytes of dynamic shared memory that it has been allowed. The driver sets what it is told, not the larger, so that
    /// two threads must not do this at once.
    allowed_shared: Mutex<u32>,
    /// CTAs that are on a multiprocessor at once; asked for once.
    resident: OnceLock<u32>,
}

// SAFETY: a CUfunction is a handle that the driver lets any thread use.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

impl Function {
    /// Lets the kernel be launched with this much dynamic shared memory.
    pub(crate) fn allow_shared(&self, bytes: u32) -> Result<(), CudaError> {
        use sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as LIMIT;
        if bytes == 0 {
            return Ok(());
        }
        let mut allowed = self.allowed_shared.lock().unwrap_or_else(PoisonError::into_inner);
        if bytes > *allowed {
            // SAFETY: the handle lives as long as the process.
            unsafe { result::function::set_function_attribute(self.handle, LIMIT, bytes.cast_signed()) }
                .map_err(failed("cuFuncSetAttribute"))?;
            *allowed = bytes;
        }
        Ok(())
    }

    /// CTAs of this many threads, without dynamic shared memory, that are on a multiprocessor at once. Always asked for the
    /// same number.
    pub(crate) fn resident_ctas(&self, threads: u32) -> Result<u32, CudaError> {
        if let Some(&known) = self.resident.get() {
            return Ok(known);
        }
        // SAFETY: the handle lives as long as the process.
        let count =
            unsafe { result::occupancy::max_active_block_per_multiprocessor(self.handle, threads.cast_signed(), 0) }
                .map_err(failed("cuOccupancyMaxActiveBlocksPerMultiprocessor"))?;
        Ok(*self.resident.get_or_init(|| u32::try_from(count).unwrap_or(1).max(1)))
    }
}

/// A kernel's name in two parts, which are joined by `_`; the first may be empty.
pub(crate) type Name = (&'static str, &'static str);

/// What has been loaded on one device. Loaded kernels stay to the end of the process.
#[derive(Debug, Default)]
pub(crate) struct Modules {
    /// By file and by what follows the file's name in the kernel's.
    functions: RwLock<HashMap<Name, &'static Function>>,
    /// `CUmodule` handles by file stem; the lock also makes every file be compiled once.
    modules: Mutex<HashMap<&'static str, usize>>,
}

impl Device {
    /// The kernel `name` of `file`; its context must be current. The first use of a file compiles it.
    pub(crate) fn function(&self, file: &'static KernelFile, name: Name) -> Result<&'static Function, CudaError> {
        let functions = &self.modules.functions;
        if let Some(found) = functions.read().unwrap_or_else(PoisonError::into_inner).get(&name) {
            return Ok(found);
        }
        let module = self.module(file)?;
        let symbol = [name.0, name.1].join("_");
        let symbol = CString::new(symbol.trim_start_matches('_'))
            .map_err(|_| CudaError::Unsupported(format!("kernel name {name:?}")))?;
        // SAFETY: `module` was loaded on this device and is never unloaded.
        let handle = unsafe { result::module::get_function(module, symbol) }.map_err(failed("cuModuleGetFunction"))?;
        let function =
            &*Box::leak(Box::new(Function { handle, allowed_shared: Mutex::new(0), resident: OnceLock::new() }));
        Ok(functions.write().unwrap_or_else(PoisonError::into_inner).entry(name).or_insert(function))
    }

    fn module(&self, file: &'static KernelFile) -> Result<sys::CUmodule, CudaError> {
        let ptx = file.for_device(self.capability).ok_or_else(|| CudaError::OldDevice {
            name: self.name.clone(),
            capability: self.capability,
            need: file.0[0].stem,
            least: file.0[file.0.len() - 1].least,
        })?;
        let mut modules = self.modules.modules.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(&module) = modules.get(ptx.stem) {
            return Ok(module as sys::CUmodule);
        }
        let module = match std::env::var_os(PTX_DIR) {
            Some(folder) if !folder.is_empty() => {
                let path = Path::new(&folder).join(ptx.stem).with_extension("ptx");
                let text = std::fs::read_to_string(&path)
                    .map_err(|source| CudaError::PtxDir { path: path.display().to_string(), source })?;
                load(&path.display().to_string(), &text)?
            }
            _ => load(ptx.stem, ptx.text)?,
        };
        modules.insert(ptx.stem, module as usize);
        Ok(module)
    }

    /// Compile every kernel that this device can run, so that none is compiled in a graph capture or a timed step.
    ///
    /// # Errors
    /// [`CudaError`]: a kernel file could not be compiled.
    pub fn warmup(&self) -> Result<(), CudaError> {
        let _entered = self.enter()?;
        for file in FILES {
            match self.module(file) {
                // A kernel whose handle nobody asked for may be loaded only at its first launch.
                Ok(module) => file.for_device(self.capability).map_or(Ok(()), |ptx| resolve(module, ptx.text))?,
                Err(CudaError::OldDevice { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// Ask for every kernel that the PTX text declares.
fn resolve(module: sys::CUmodule, text: &str) -> Result<(), CudaError> {
    for name in text.split(".entry ").skip(1).filter_map(|rest| rest.split('(').next()) {
        let symbol = CString::new(name.trim()).map_err(|_| CudaError::Unsupported(format!("kernel name {name:?}")))?;
        // SAFETY: `module` was loaded from this text and is never unloaded.
        match unsafe { result::module::get_function(module, symbol) } {
            Ok(_) => {}
            // A file of QLORA_RS_PTX_DIR need not hold all of them.
            Err(error) if error.0 == sys::CUresult::CUDA_ERROR_NOT_FOUND => {}
            Err(error) => return Err(failed("cuModuleGetFunction")(error)),
        }
    }
    Ok(())
}

fn load(file: &str, text: &str) -> Result<sys::CUmodule, CudaError> {
    use sys::CUjit_option::{CU_JIT_ERROR_LOG_BUFFER, CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES};

    let image = CString::new(text)
        .map_err(|_| CudaError::Unsupported(format!("{file} is not PTX text: it holds a zero byte")))?;
    let mut log = vec![0u8; LOG_BYTES];
    let mut options = [CU_JIT_ERROR_LOG_BUFFER, CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES];
    let mut values = [log.as_mut_ptr().cast::<c_void>(), LOG_BYTES as *mut c_void];
    let mut module = std::ptr::null_mut();
    // SAFETY: the image ends in a zero byte, the two options have their values in the same order, and the log buffer has
    // the size that is stated; all of them outlive the call.
    unsafe {
        sys::cuModuleLoadDataEx(
            &raw mut module,
            image.as_ptr().cast(),
            options.len() as u32,
            options.as_mut_ptr(),
            values.as_mut_ptr(),
        )
    }
    .result()
    .map_err(|source| {
        let end = log.iter().position(|&byte| byte == 0).unwrap_or(log.len());
        let log = String::from_utf8_lossy(&log[..end]).trim().to_owned();
        CudaError::Load { file: file.to_owned(), source, log }
    })?;
    Ok(module)
}
