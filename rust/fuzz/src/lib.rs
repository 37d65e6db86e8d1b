//! What the targets share: arbitrary bytes as a file, without a disk.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use rustix::fs::{MemfdFlags, memfd_create};

/// A file in memory; it has a path as long as it lives.
pub struct MemoryFile {
    file: File,
}

impl MemoryFile {
    /// A file of these bytes.
    ///
    /// # Panics
    /// Where the system has no files in memory.
    #[must_use]
    pub fn new(content: &[u8]) -> Self {
        let mut file = File::from(memfd_create("fuzz", MemfdFlags::CLOEXEC).expect("the system has memfd"));
        file.write_all(content).expect("memory");
        Self { file }
    }

    /// Where it can be opened.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.file.as_raw_fd()))
    }
}

/// A safetensors file of a header and of as many bytes of data, at most `limit`, as its first two bytes say: libFuzzer would
/// not find the length field by itself.
#[must_use]
pub fn as_file(input: &[u8], limit: usize) -> Option<Vec<u8>> {
    let (size, json) = input.split_first_chunk::<2>()?;
    let data = usize::from(u16::from_le_bytes(*size)).min(limit);
    let mut file = (json.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(json);
    // Not all zeros: blocks of them take a way of their own. Not all finite either.
    file.extend((0..data).map(|index| (index.wrapping_mul(37) >> (index % 3)) as u8));
    Some(file)
}
