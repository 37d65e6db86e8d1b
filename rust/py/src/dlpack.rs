//! Memory as a capsule of `DLPack`, from which torch makes a tensor without a copy.

use std::ffi::{CStr, c_void};
use std::mem::ManuallyDrop;
use std::ptr::NonNull;

use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::PyCapsule;

/// Name of a capsule that nobody has taken the tensor out of.
const UNUSED: &CStr = c"dltensor";
const DEVICE_CPU: i32 = 1;
const DEVICE_CUDA: i32 = 2;

#[repr(C)]
struct DlDevice {
    kind: i32,
    index: i32,
}

#[repr(C)]
struct DlType {
    code: u8,
    bits: u8,
    lanes: u16,
}

#[repr(C)]
struct DlTensor {
    data: *mut c_void,
    device: DlDevice,
    dimensions: i32,
    dtype: DlType,
    shape: *mut i64,
    /// Null: contiguous.
    strides: *mut i64,
    byte_offset: u64,
}

/// The struct of `DLPack` before 1.0, which every version of torch takes.
#[repr(C)]
struct DlManagedTensor {
    tensor: DlTensor,
    context: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut DlManagedTensor)>,
}

/// What the tensor refers to while it lives.
struct Exported {
    managed: DlManagedTensor,
    shape: Box<[i64]>,
    owner: Option<Py<PyAny>>,
}

/// `address`: of contiguous memory that is good as long as `owner` lives; on the CUDA device of this index, or on the host
/// (None). `dtype`: `DLPack`'s (code, bits).
pub fn capsule(
    py: Python<'_>,
    address: u64,
    device: Option<i32>,
    shape: Vec<i64>,
    dtype: (u8, u8),
    owner: Py<PyAny>,
) -> PyResult<Bound<'_, PyAny>> {
    let mut exported = Box::new(Exported {
        managed: DlManagedTensor {
            tensor: DlTensor {
                data: address as *mut c_void,
                device: device
                    .map_or(DlDevice { kind: DEVICE_CPU, index: 0 }, |index| DlDevice { kind: DEVICE_CUDA, index }),
                dimensions: i32::try_from(shape.len())?,
                dtype: DlType { code: dtype.0, bits: dtype.1, lanes: 1 },
                shape: std::ptr::null_mut(),
                strides: std::ptr::null_mut(),
                byte_offset: 0,
            },
            context: std::ptr::null_mut(),
            deleter: Some(delete),
        },
        shape: shape.into(),
        owner: Some(owner),
    });
    exported.managed.tensor.shape = exported.shape.as_mut_ptr();
    let pointer = NonNull::from(Box::leak(exported));
    // SAFETY: points at the whole, whose context is read by nobody else yet.
    unsafe { (*pointer.as_ptr()).managed.context = pointer.as_ptr().cast() };
    // SAFETY: inside of the same allocation.
    let managed = unsafe { NonNull::new_unchecked(&raw mut (*pointer.as_ptr()).managed) };
    // SAFETY: the pointer is valid until its deleter has been called, once: by whoever took the tensor, and else by
    // `destroy`. Both may be called on any thread.
    let made = unsafe { PyCapsule::new_with_pointer_and_destructor(py, managed.cast(), UNUSED, Some(destroy)) };
    if made.is_err() {
        // SAFETY: no capsule has it.
        unsafe { delete(managed.as_ptr()) };
    }
    made.map(Bound::into_any)
}

/// The capsule is gone: if nobody took the tensor out of it (and renamed it), the tensor is too.
unsafe extern "C" fn destroy(capsule: *mut ffi::PyObject) {
    // SAFETY: Python calls this with the capsule, attached to the interpreter; the pointer is the one it was made with.
    unsafe {
        if ffi::PyCapsule_IsValid(capsule, UNUSED.as_ptr()) == 1 {
            delete(ffi::PyCapsule_GetPointer(capsule, UNUSED.as_ptr()).cast());
        }
    }
}

/// The tensor is gone; called on any thread, with or without the GIL.
unsafe extern "C" fn delete(managed: *mut DlManagedTensor) {
    // SAFETY: made by `capsule`, and deleted once.
    let mut exported = unsafe { Box::from_raw((*managed).context.cast::<Exported>()) };
    let owner = ManuallyDrop::new(exported.owner.take());
    // Where the interpreter is gone, so is the object: then nothing is dropped.
    Python::try_attach(|_| drop(ManuallyDrop::into_inner(owner)));
}
