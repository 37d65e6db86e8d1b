//! Tensors from files into other memory, a device's for one: several threads read, each into buffers of its own sink.
//!
//! One thread copies from the page cache at some 10 GB/s, the link to a device takes 50: hence the threads. They take
//! chunks in the order of the file, which is also what a disk reads ahead.

use std::collections::HashMap;
use std::fs::{File, Metadata};
use std::io::ErrorKind;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use qlora_core::{ByteSink, Control, CoreError, Piece};
use rustix::fs::{Advice, fadvise};
use thiserror::Error;

use crate::error::CheckpointError;
use crate::header::{Header, open_source};

/// Where one tensor goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Its name in the file.
    pub tensor: String,
    /// Address of its first byte, as the sink understands it.
    pub to: u64,
    /// Room there, which has to be the tensor's size.
    pub bytes: u64,
}

/// What is wanted of one safetensors file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileTargets {
    /// The file.
    pub path: PathBuf,
    /// Some or all of its tensors, in any order.
    pub targets: Vec<Target>,
}

/// How to load.
#[derive(Debug, Clone, Copy)]
pub struct LoadOptions {
    /// Bytes that are read at a time; each sink's buffers must hold as many.
    pub buffer_bytes: usize,
    /// Threads that read; each has its own sink.
    pub num_threads: usize,
}

/// What can go wrong: files, or where their bytes go.
#[derive(Debug, Error)]
pub enum LoadError<E> {
    /// A file, or the wish to stop.
    #[error(transparent)]
    File(#[from] CheckpointError),
    /// The sink's own.
    #[error("{0}")]
    Sink(E),
}

impl<E> From<CoreError> for LoadError<E> {
    fn from(error: CoreError) -> Self {
        Self::File(error.into())
    }
}

/// A file whose header has been checked against what is wanted of it.
struct Opened {
    path: PathBuf,
    file: File,
    status: Metadata,
}

/// A stretch of a file that is read at once, and where its parts go.
#[derive(Debug, PartialEq, Eq)]
struct Chunk {
    file: usize,
    offset: u64,
    bytes: usize,
    pieces: Vec<Piece>,
    /// The tensor that it begins in, for messages.
    tensor: String,
}

/// Bring the tensors to their places; returns once all of them are there.
///
/// # Errors
/// [`LoadError`]; the places then hold anything.
pub fn load<S, F>(
    files: &[FileTargets],
    options: LoadOptions,
    open_sink: F,
    control: &Control,
) -> Result<(), LoadError<S::Error>>
where
    S: ByteSink,
    S::Error: Send,
    F: Fn() -> Result<S, S::Error> + Sync,
{
    let mut opened = Vec::with_capacity(files.len());
    let mut chunks = Vec::new();
    for (index, wanted) in files.iter().enumerate() {
        opened.push(open(index, wanted, options.buffer_bytes.max(1), &mut chunks)?);
    }
    control.set_total(chunks.iter().map(|chunk| chunk.bytes as u64).sum());
    let work = Work { opened: &opened, chunks: &chunks, next: AtomicUsize::new(0), stop: AtomicBool::new(false) };
    let failure = Mutex::new(None);
    std::thread::scope(|scope| {
        for _ in 0..options.num_threads.clamp(1, chunks.len().max(1)) {
            scope.spawn(|| {
                if let Err(error) = work.run(&open_sink, control) {
                    work.stop.store(true, Ordering::Relaxed);
                    // The first one tells most: others may follow from it.
                    failure.lock().unwrap_or_else(std::sync::PoisonError::into_inner).get_or_insert(error);
                }
            });
        }
    });
    if let Some(error) = failure.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner) {
        return Err(error);
    }
    for Opened { path, file, status } in &opened {
        let now = file.metadata().map_err(CheckpointError::io(path))?;
        let stamp = |status: &Metadata| (status.len(), status.mtime(), status.mtime_nsec());
        if stamp(&now) != stamp(status) {
            return Err(CheckpointError::format(path, "changed while it was being read; load it again").into());
        }
    }
    Ok(())
}

/// What the threads share.
struct Work<'a> {
    opened: &'a [Opened],
    chunks: &'a [Chunk],
    next: AtomicUsize,
    stop: AtomicBool,
}

impl Work<'_> {
    fn run<S, F>(&self, open_sink: &F, control: &Control) -> Result<(), LoadError<S::Error>>
    where
        S: ByteSink,
        F: Fn() -> Result<S, S::Error>,
    {
        let mut sink: Option<S> = None;
        while let Some(chunk) = self.chunks.get(self.next.fetch_add(1, Ordering::Relaxed)) {
            control.check()?;
            if self.stop.load(Ordering::Relaxed) {
                return Ok(());
            }
            // Not before there is work: a sink can be costly to make.
            let sink = match &mut sink {
                Some(sink) => sink,
                none => none.insert(open_sink().map_err(LoadError::Sink)?),
            };
            let buffer = sink.buffer(chunk.bytes).map_err(LoadError::Sink)?;
            self.read(chunk, buffer)?;
            sink.send(&chunk.pieces).map_err(LoadError::Sink)?;
            control.advance(chunk.bytes as u64);
        }
        sink.map_or(Ok(()), |mut sink| sink.finish().map_err(LoadError::Sink))
    }

    fn read(&self, chunk: &Chunk, buffer: &mut [u8]) -> Result<(), CheckpointError> {
        let Opened { path, file, .. } = &self.opened[chunk.file];
        file.read_exact_at(buffer, chunk.offset).map_err(|error| {
            if error.kind() == ErrorKind::UnexpectedEof {
                let what = format!("ends within tensor {:?}: it was cut while it was being read", chunk.tensor);
                CheckpointError::format(path, what)
            } else {
                CheckpointError::io(path)(error)
            }
        })
    }
}

/// Open a file, check what is wanted of it against its header, and plan how it is read.
fn open(
    index: usize,
    wanted: &FileTargets,
    buffer_bytes: usize,
    chunks: &mut Vec<Chunk>,
) -> Result<Opened, CheckpointError> {
    let path = &wanted.path;
    let file = open_source(path)?;
    let status = file.metadata().map_err(CheckpointError::io(path))?;
    // Advice only: a file system that has none to take reads just the same.
    let _ = fadvise(&file, 0, None, Advice::Sequential);
    let header = Header::read_open(path, &file)?;
    let stored: HashMap<&str, _> = header.tensors.iter().map(|tensor| (tensor.name.as_str(), tensor)).collect();
    let mut spans = Vec::with_capacity(wanted.targets.len());
    for target in &wanted.targets {
        let name = &target.tensor;
        let tensor = stored
            .get(name.as_str())
            .ok_or_else(|| CheckpointError::format(path, format!("tensor {name:?} is not in it (any more)")))?;
        if tensor.bytes() != target.bytes {
            let what = format!("tensor {name:?}: expected {} bytes, the file has {}", target.bytes, tensor.bytes());
            return Err(CheckpointError::format(path, what));
        }
        spans.push((header.data_start() + tensor.start, target));
    }
    spans.sort_by_key(|(offset, _)| *offset);
    plan(index, &spans, buffer_bytes, chunks);
    Ok(Opened { path: path.clone(), file, status })
}

/// Cut (offset, target) spans, sorted, into chunks of at most `buffer_bytes`. Small neighbours are read together; a tensor
/// that takes a buffer or more begins one, so that its parts lie aligned on both sides.
fn plan(file: usize, spans: &[(u64, &Target)], buffer_bytes: usize, chunks: &mut Vec<Chunk>) {
    let first = chunks.len();
    for &(start, target) in spans {
        let large = target.bytes >= buffer_bytes as u64;
        let mut done = 0;
        while done < target.bytes {
            let offset = start + done;
            let room = match chunks[first..].last() {
                Some(chunk) if chunk.bytes == 0 => buffer_bytes,
                Some(chunk) if chunk.offset + chunk.bytes as u64 == offset && !(large && done == 0) => {
                    buffer_bytes - chunk.bytes
                }
                _ => 0,
            };
            if room == 0 {
                let tensor = target.tensor.clone();
                chunks.push(Chunk { file, offset, bytes: 0, pieces: Vec::new(), tensor });
                continue;
            }
            let Some(chunk) = chunks.last_mut() else { continue };
            let bytes = (target.bytes - done).min(room as u64) as usize;
            chunk.pieces.push(Piece { start: chunk.bytes, bytes, to: target.to + done });
            chunk.bytes += bytes;
            done += bytes as u64;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn planned(sizes: &[u64], buffer_bytes: usize) -> Vec<Chunk> {
        let targets: Vec<_> = (0..)
            .zip(sizes)
            .map(|(index, &bytes)| Target { tensor: format!("t{index}"), to: index * 1000, bytes })
            .collect();
        let mut offset = 8;
        let mut spans = Vec::new();
        for target in &targets {
            spans.push((offset, target));
            offset += target.bytes;
        }
        let mut chunks = Vec::new();
        plan(0, &spans, buffer_bytes, &mut chunks);
        chunks
    }

    #[test]
    fn small_neighbours_share_a_chunk_and_a_large_tensor_begins_one() {
        let chunks = planned(&[3, 5, 21, 4, 10, 2], 10);
        let bytes: Vec<_> = chunks.iter().map(|chunk| chunk.bytes).collect();
        assert_eq!(bytes, [8, 10, 10, 5, 10, 2]);
        assert_eq!(chunks[0].pieces.len(), 2);
        assert_eq!(chunks[3].pieces, [Piece { start: 0, bytes: 1, to: 2020 }, Piece { start: 1, bytes: 4, to: 3000 }]);
        assert_eq!((chunks[4].pieces[0].start, chunks[4].tensor.as_str()), (0, "t4"));
    }
}
