//! The pipeline: one thread reads, one hashes for each file in work, this one quantizes on the pool and writes, one follows
//! it to the disk.

use std::io;
use std::path::Path;
use std::sync::mpsc::{self, TryRecvError};
use std::thread::{self, Scope};

use qlora_core::{Control, Parallel, QuantSpec};

use crate::behind::write_behind;
use crate::error::CheckpointError;
use crate::hasher::{Hashed, hash_all};
use crate::journal::{Finished, Journal};
use crate::plan::Plan;
use crate::reader::{Slice, changed, read_all};
use crate::resume::Remaining;
use crate::slices::Buffer;
use crate::worker::Worker;
use crate::writer::Writer;

/// Slices of a file in flight: being read, hashed, quantized, and some waiting, so that nobody waits for a thread that the
/// system lets wait.
const BUFFERS: usize = 12;
/// Files in work at a time: SHA-256 takes a file from front to back on one thread, which keeps up with a quarter of a
/// fast disk.
const LANES: usize = 4;

/// How the pipeline runs; none of it changes the bytes.
#[derive(Debug, Clone, Copy)]
pub struct PackOptions {
    /// Bytes of a slice.
    pub slice_bytes: usize,
    /// Threads that quantize, and most files that are hashed side by side; 0 for all.
    pub num_threads: usize,
}

impl Default for PackOptions {
    fn default() -> Self {
        Self { slice_bytes: 2 << 20, num_threads: 0 }
    }
}

/// How an interruption is survived.
#[derive(Debug, Clone, Copy)]
pub struct Resumption<'a> {
    /// Gets a line for each tensor and source file that is finished.
    pub journal: &'a Path,
    /// What earlier runs of the same plan have finished; it is checked.
    pub finished: &'a Finished,
}

/// Carry out a plan: write its shards into the existing folder `destination`, which belongs to nobody else. Returns the
/// SHA-256 of each source file, in hexadecimal.
///
/// # Errors
/// Everything that [`CheckpointError`] names; the shards are then not valid files, and it is the caller who removes or
/// resumes them.
pub fn pack(
    plan: &Plan,
    spec: &QuantSpec,
    destination: &Path,
    options: PackOptions,
    resumption: Option<Resumption<'_>>,
    control: &Control,
) -> Result<Vec<String>, CheckpointError> {
    control.set_total(plan.source_bytes());
    let mut journal = resumption.map(|resumption| Journal::open(resumption.journal)).transpose()?;
    let writer = Writer::open(destination, plan)?;
    let nothing = Finished::default();
    let finished = resumption.map_or(&nothing, |resumption| resumption.finished);
    let Remaining { done, wanted, mut digests } = Remaining::check(plan, &writer, finished, control)?;
    let slice_bytes = options.slice_bytes.max(1);
    let threads = Parallel::new(options.num_threads).threads();
    let lanes = wanted.iter().filter(|wanted| **wanted).count().clamp(1, LANES.min(threads));
    let (hashed, incoming) = mpsc::sync_channel(lanes * BUFFERS);
    let (recycle, returned) = mpsc::channel();
    let (written, news) = mpsc::channel();
    thread::scope(|scope| {
        let mut files = Vec::with_capacity(lanes);
        for lane in 0..lanes {
            let (events, unhashed) = mpsc::sync_channel(BUFFERS + 2); // a file's front and its end, too
            let hashed = hashed.clone();
            spawn(scope, destination, "hash", move || hash_all(lane, unhashed, &hashed))?;
            files.push(events);
            for _ in 0..BUFFERS {
                // The receiver lives in this function.
                let _ = recycle.send((lane, Buffer::new(slice_bytes)));
            }
        }
        drop(hashed);
        let wanted = &wanted;
        spawn(scope, destination, "read", move || {
            read_all(&plan.sources, wanted, slice_bytes, files, &returned, control);
        })?;
        let output = &writer;
        spawn(scope, destination, "write", move || write_behind(output, news, control))?;
        let mut worker = Worker::new(plan, spec, &writer, written, lanes, control);
        let (alone, together) = (Parallel::new(1), Parallel::new(threads));
        // Moved in, so that on every way out the other threads find nobody listening and end.
        let (incoming, recycle) = (incoming, recycle);
        loop {
            // Where nothing waits this thread keeps up alone, and others would only take turns with the hashers.
            let (next, parallel) = match incoming.try_recv() {
                Err(TryRecvError::Empty) => (incoming.recv().ok(), &alone),
                next => (next.ok(), &together),
            };
            let Some((lane, event)) = next else { break };
            match event? {
                Hashed::Slice(Slice { source, tensor, piece, buffer }) => {
                    if !done[source][tensor]
                        && let Some(checksums) = worker.work(lane, source, tensor, piece, buffer.filled(), parallel)?
                        && let Some(journal) = &mut journal
                    {
                        journal.add_tensor(&plan.sources[source].header.tensors[tensor].name, &checksums)?;
                    }
                    control.advance(buffer.filled().len() as u64);
                    let _ = recycle.send((lane, buffer));
                }
                Hashed::Digest { source, digest } => {
                    control.advance(plan.sources[source].header.data_start());
                    if digests[source].as_ref().is_some_and(|earlier| *earlier != digest) {
                        return Err(changed(&plan.sources[source]));
                    }
                    if let Some(journal) = &mut journal {
                        journal.add_file(&plan.sources[source].name, &digest)?;
                    }
                    digests[source] = Some(digest);
                }
            }
        }
        control.check().map_err(CheckpointError::from)
    })?;
    let digests: Vec<String> = digests.into_iter().flatten().collect();
    for shard in 0..plan.shards.len() {
        control.check()?;
        writer.finish(shard, &plan.header_bytes(shard, &digests))?;
    }
    Ok(digests)
}

/// A thread with a name to find it by; `destination` is for the message where the system gives none.
fn spawn<'scope>(
    scope: &'scope Scope<'scope, '_>,
    destination: &Path,
    name: &str,
    work: impl FnOnce() + Send + 'scope,
) -> Result<(), CheckpointError> {
    let spawned = thread::Builder::new().name(format!("qlora-rs-{name}")).spawn_scoped(scope, work);
    spawned.map(drop).map_err(|error| {
        CheckpointError::io(destination)(io::Error::new(error.kind(), format!("no thread to {name} with: {error}")))
    })
}
