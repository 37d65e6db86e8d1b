//! Large pages under large outputs: first touching 32 MiB of new memory page by page costs several times what the
//! kernels take.

use std::ffi::{c_int, c_void};

/// Outputs from this size on are worth a system call.
const LARGE: usize = 4 << 20;
/// Alignment that `madvise` asks for.
const PAGE: usize = 4096;
const MADV_HUGEPAGE: c_int = 14;

unsafe extern "C" {
    fn madvise(address: *mut c_void, length: usize, advice: c_int) -> c_int;
}

/// Tell the system that all of `memory` will be written, so that large pages waste nothing. Only advice: where the
/// system has no large pages to give, or the memory is in use already, nothing happens.
pub(crate) fn advise_large_pages<T>(memory: &mut [T]) {
    let bytes = size_of_val(memory);
    if bytes < LARGE {
        return;
    }
    let start = memory.as_mut_ptr().cast::<u8>();
    let skipped = start.align_offset(PAGE);
    let length = (bytes - skipped) & !(PAGE - 1);
    // SAFETY: the pages lie within `memory`, and this advice changes no byte of them; a refusal may be ignored.
    let _ = unsafe { madvise(start.add(skipped).cast(), length, MADV_HUGEPAGE) };
}
