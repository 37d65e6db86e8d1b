//! The output files: made at their full size, filled in any order, their headers written last.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::{Errno, retry_on_intr};

use crate::error::CheckpointError;
use crate::plan::{Plan, Slot};

/// All output files of a plan, open.
#[derive(Debug)]
pub struct Writer {
    files: Vec<(PathBuf, File)>,
}

impl Writer {
    /// Make the files in `folder`, with their space reserved: a full disk shows now, not hours later.
    ///
    /// # Errors
    /// [`CheckpointError::Io`] naming the file; one that exists is not touched.
    pub fn create(folder: &Path, plan: &Plan) -> Result<Self, CheckpointError> {
        let mut files = Vec::with_capacity(plan.shards.len());
        for shard in &plan.shards {
            let path = folder.join(&shard.name);
            let make = || {
                let file = OpenOptions::new().write(true).create_new(true).open(&path)?;
                reserve(&file, shard.data_start + shard.data_bytes())?;
                Ok(file)
            };
            let file = make().map_err(CheckpointError::io(&path))?;
            files.push((path, file));
        }
        Ok(Self { files })
    }

    /// Write `bytes`, `skip` bytes behind `slot`.
    ///
    /// # Errors
    /// [`CheckpointError::Io`] naming the file.
    pub fn write(&self, slot: Slot, skip: usize, bytes: &[u8]) -> Result<(), CheckpointError> {
        let (path, file) = &self.files[slot.shard];
        file.write_all_at(bytes, slot.offset + skip as u64).map_err(CheckpointError::io(path))
    }

    /// Write a file's header and wait until the file is on the disk.
    ///
    /// # Errors
    /// [`CheckpointError::Io`] naming the file.
    pub fn finish(&self, shard: usize, header: &[u8]) -> Result<(), CheckpointError> {
        let (path, file) = &self.files[shard];
        file.write_all_at(header, 0).and_then(|()| file.sync_all()).map_err(CheckpointError::io(path))
    }
}

/// Give the file its size, with blocks behind it where the file system can.
fn reserve(file: &File, bytes: u64) -> io::Result<()> {
    match retry_on_intr(|| fallocate(file, FallocateFlags::empty(), 0, bytes)) {
        Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => file.set_len(bytes),
        outcome => outcome.map_err(io::Error::from),
    }
}
