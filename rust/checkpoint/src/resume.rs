//! What an interrupted run has left to do: its claims, checked against the files.

use qlora_core::Control;

use crate::error::CheckpointError;
use crate::journal::Finished;
use crate::plan::Plan;
use crate::writer::Writer;

/// What is finished and what is not.
#[derive(Debug)]
pub struct Remaining {
    /// For each source, for each of its tensors: whether its output is there.
    pub done: Vec<Vec<bool>>,
    /// For each source: whether it has to be read, be it only for its hash.
    pub wanted: Vec<bool>,
    /// For each source: its SHA-256, where it is known.
    pub digests: Vec<Option<String>>,
}

impl Remaining {
    /// Check the output of every tensor that is said to be finished. What is not there as it was is made again, on zeros.
    ///
    /// # Errors
    /// [`CheckpointError::Io`], or the wish to stop.
    pub fn check(
        plan: &Plan,
        writer: &Writer,
        finished: &Finished,
        control: &Control,
    ) -> Result<Self, CheckpointError> {
        let mut remaining = Self { done: Vec::new(), wanted: Vec::new(), digests: Vec::new() };
        for source in &plan.sources {
            let mut done = Vec::with_capacity(source.steps.len());
            for (index, tensor) in source.header.tensors.iter().enumerate() {
                let extents = source.extents(index);
                let found = match finished.tensors.get(&tensor.name) {
                    Some(recorded) => writer.checksum(&extents, control)? == *recorded,
                    None => false,
                };
                // An empty tensor is never read, but may have parts, whose zeros must not be what another run left.
                if !found && tensor.bytes() == 0 {
                    writer.clear(&extents)?;
                }
                done.push(found || tensor.bytes() == 0);
            }
            let digest = finished.files.get(&source.name).cloned();
            let wanted = digest.is_none() || done.contains(&false);
            if !wanted {
                control.advance(source.header.file_bytes());
            }
            remaining.done.push(done);
            remaining.wanted.push(wanted);
            remaining.digests.push(digest);
        }
        Ok(remaining)
    }
}
