//! The output files: made at their full size, filled in any order, their headers written last.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use qlora_core::Control;
use rustix::fs::{FallocateFlags, FsWord, OFlags, fallocate, fstatfs};
use rustix::io::{Errno, retry_on_intr};

use crate::behind::WORTH_TELLING;
use crate::checksum::Checksum;
use crate::error::CheckpointError;
use crate::plan::{Extent, Plan, Slot};

/// Zeros that are written at a time.
const ZEROS: usize = 1 << 20;

/// A stretch of an output file that is written front to back.
#[derive(Debug)]
pub struct Part {
    extent: Extent,
    written: u64,
    /// What of it was told.
    told: u64,
    checksum: Checksum,
}

impl Part {
    /// Nothing of `extent` is written yet.
    #[must_use]
    pub fn new(extent: Extent) -> Self {
        Self { extent, written: 0, told: 0, checksum: Checksum::default() }
    }

    /// What was written since this was last asked; none while that is little.
    pub fn news(&mut self) -> Option<Extent> {
        let Slot { shard, offset } = self.extent.slot;
        let news = Extent { slot: Slot { shard, offset: offset + self.told }, bytes: self.written - self.told };
        (news.bytes >= WORTH_TELLING).then(|| {
            self.told = self.written;
            news
        })
    }
}

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

    /// Write the next bytes of a part.
    ///
    /// # Errors
    /// [`CheckpointError::Io`] naming the file.
    pub fn append(&self, part: &mut Part, bytes: &[u8]) -> Result<(), CheckpointError> {
        let Extent { slot, bytes: room } = part.extent;
        debug_assert!(part.written + bytes.len() as u64 <= room, "a part is as large as planned");
        let (path, file) = &self.files[slot.shard];
        file.write_all_at(bytes, slot.offset + part.written).map_err(CheckpointError::io(path))?;
        part.checksum.update(bytes);
        part.written += bytes.len() as u64;
        Ok(())
    }

    /// Checksums of what was written into these parts, one after the other.
    #[must_use]
    pub fn checksum_of(parts: &[Part]) -> String {
        parts.iter().map(|part| part.checksum.finish()).collect()
    }

    /// Checksums of what is in these places now, one after the other.
    ///
    /// # Errors
    /// [`CheckpointError::Io`] naming the file, or the wish to stop.
    pub fn checksum(&self, extents: &[Extent], control: &Control) -> Result<String, CheckpointError> {
        let of = |Extent { slot, bytes }: &Extent| {
            let (path, file) = &self.files[slot.shard];
            Checksum::of_file(path, file, slot.offset, *bytes, control)
        };
        extents.iter().map(of).collect()
    }

    /// Fill places with zeros.
    ///
    /// # Errors
    /// [`CheckpointError::Io`] naming the file.
    pub fn clear(&self, extents: &[Extent]) -> Result<(), CheckpointError> {
        for Extent { slot, bytes } in extents {
            let (path, file) = &self.files[slot.shard];
            for done in (0..*bytes).step_by(ZEROS) {
                let zeros = vec![0u8; (bytes - done).min(ZEROS as u64) as usize];
                file.write_all_at(&zeros, slot.offset + done).map_err(CheckpointError::io(path))?;
            }
        }
        Ok(())
    }

    /// A file, as it is open here.
    #[must_use]
    pub fn file(&self, shard: usize) -> &File {
        &self.files[shard].1
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

/// What a file system in memory calls itself.
const TMPFS: FsWord = 0x0102_1994;

/// Give the file its size, with blocks behind it where the file system can.
fn reserve(file: &File, bytes: u64) -> io::Result<()> {
    if fstatfs(file)?.f_type == TMPFS {
        // It would find and clear all of the memory first, while everything else waits.
        return file.set_len(bytes);
    }
    match retry_on_intr(|| fallocate(file, FallocateFlags::empty(), 0, bytes)) {
        Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => file.set_len(bytes),
        outcome => outcome.map_err(io::Error::from),
    }
}
