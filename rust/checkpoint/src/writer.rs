//! The output files: made at their full size, filled in any order, their headers written last.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use qlora_core::Control;
use rustix::fs::{FallocateFlags, OFlags, fallocate};
use rustix::io::{Errno, retry_on_intr};
use sha2::{Digest, Sha256};

use crate::error::CheckpointError;
use crate::hasher::hexadecimal;
use crate::plan::{Extent, Plan, Slot};

/// Bytes that are hashed at a time.
const HASHED_BYTES: usize = 1 << 20;

/// All output files of a plan, open.
#[derive(Debug)]
pub struct Writer {
    files: Vec<(PathBuf, File)>,
}

impl Writer {
    /// Make the files in `folder`, or open what an interrupted run left of them, with their space reserved: a full disk
    /// shows now, not hours later. The folder has to be ours alone: whatever regular files are there are written on.
    ///
    /// # Errors
    /// [`CheckpointError::Io`] naming the file; a link is not followed.
    pub fn open(folder: &Path, plan: &Plan) -> Result<Self, CheckpointError> {
        let mut files = Vec::with_capacity(plan.shards.len());
        for shard in &plan.shards {
            let path = folder.join(&shard.name);
            let bytes = shard.data_start + shard.data_bytes();
            let make = || {
                let mut options = OpenOptions::new();
                options.read(true).write(true).create(true).custom_flags(OFlags::NOFOLLOW.bits().cast_signed());
                let file = options.open(&path)?;
                if file.metadata()?.len() > bytes {
                    file.set_len(bytes)?;
                }
                reserve(&file, bytes)?;
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

    /// SHA-256, in hexadecimal, of the bytes in these places, one after the other, as they are in the files now.
    ///
    /// # Errors
    /// [`CheckpointError::Io`] naming the file, or the wish to stop.
    pub fn hash(&self, extents: &[Extent], control: &Control) -> Result<String, CheckpointError> {
        let mut hash = Sha256::new();
        let mut buffer = vec![0u8; HASHED_BYTES];
        for Extent { slot, bytes } in extents {
            let (path, file) = &self.files[slot.shard];
            let mut done = 0;
            while done < *bytes {
                control.check()?;
                let part = &mut buffer[..(bytes - done).min(HASHED_BYTES as u64) as usize];
                file.read_exact_at(part, slot.offset + done).map_err(CheckpointError::io(path))?;
                hash.update(&*part);
                done += part.len() as u64;
            }
        }
        Ok(hexadecimal(&hash.finalize()))
    }

    /// Fill places with zeros.
    ///
    /// # Errors
    /// [`CheckpointError::Io`] naming the file.
    pub fn clear(&self, extents: &[Extent]) -> Result<(), CheckpointError> {
        for Extent { slot, bytes } in extents {
            for done in (0..*bytes).step_by(HASHED_BYTES) {
                let zeros = vec![0u8; (bytes - done).min(HASHED_BYTES as u64) as usize];
                self.write(*slot, done as usize, &zeros)?;
            }
        }
        Ok(())
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
