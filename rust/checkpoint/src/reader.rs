//! The one pass over the source: each file front to back in slices, more than one file where one alone is hashed too slowly.

use std::fs::{File, Metadata};
use std::io::ErrorKind;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::mpsc::{Receiver, SyncSender};

use qlora_core::Control;
use rustix::fs::{Advice, fadvise};

use crate::error::CheckpointError;
use crate::header::{Header, open_source};
use crate::page_cache::Trail;
use crate::plan::Source;
use crate::slices::{Buffer, Piece, pieces};

/// Part of a tensor, with its bytes.
#[derive(Debug)]
pub struct Slice {
    /// Index into the plan's sources.
    pub source: usize,
    /// Index into that file's tensors.
    pub tensor: usize,
    /// Which part.
    pub piece: Piece,
    /// The bytes.
    pub buffer: Buffer,
}

/// What the reader hands on: all bytes of a file, in their order.
#[derive(Debug)]
pub enum Event {
    /// Everything before the data.
    Front(Vec<u8>),
    /// The next bytes of the data.
    Slice(Slice),
    /// The file was read to its end, and is still the one that was opened.
    End {
        /// Index into the plan's sources.
        source: usize,
    },
}

/// Where one file after the other goes to be hashed.
struct Lane<'a> {
    events: SyncSender<Result<Event, CheckpointError>>,
    empties: Vec<Buffer>,
    reading: Option<Reading<'a>>,
}

/// What became of a lane.
enum Outcome {
    /// It goes on.
    Open,
    /// There is no file left for it.
    Over,
    /// Nobody listens any more.
    Deaf,
}

/// Read the sources that `wanted` names, each into one of the `lanes`; empty buffers are `returned` with the number of
/// the lane that they belong to. Ends early, in silence, once the other end is gone.
///
/// Files are read in their order, and from a later one only while the buffers of all earlier ones are full: a disk that
/// is no faster than one lane reads one file from front to back.
pub fn read_all(
    sources: &[Source],
    wanted: &[bool],
    slice_bytes: usize,
    lanes: Vec<SyncSender<Result<Event, CheckpointError>>>,
    returned: &Receiver<(usize, Buffer)>,
    control: &Control,
) {
    let mut left = sources.iter().enumerate().filter(|(index, _)| wanted[*index]);
    let open = |events| Some(Lane { events, empties: Vec::new(), reading: None });
    let mut lanes: Vec<Option<Lane<'_>>> = lanes.into_iter().map(open).collect();
    while lanes.iter().any(Option::is_some) {
        let ready = lanes.iter_mut().filter(|lane| lane.as_ref().is_some_and(|lane| !lane.empties.is_empty()));
        let Some(next) = ready.min_by_key(|lane| lane.as_ref().map(Lane::file)) else {
            let Ok(first) = returned.recv() else { return };
            for (number, buffer) in std::iter::once(first).chain(returned.try_iter()) {
                if let Some(lane) = &mut lanes[number] {
                    lane.empties.push(buffer);
                }
            }
            continue;
        };
        let Some(lane) = next else { unreachable!("only open lanes are ready") };
        match control.check().map_err(CheckpointError::from).and_then(|()| lane.go_on(&mut left, slice_bytes)) {
            Ok(Outcome::Open) => {}
            Ok(Outcome::Over) => *next = None,
            Ok(Outcome::Deaf) => return,
            Err(error) => {
                // Nobody listens any more: whoever left had its own reason.
                let _ = lane.events.send(Err(error));
                return;
            }
        }
    }
}

impl<'a> Lane<'a> {
    /// Its place in the order of files; lanes without one come last.
    fn file(&self) -> usize {
        self.reading.as_ref().map_or(usize::MAX, |reading| reading.index)
    }

    /// Open a file, read a slice or close the file. There has to be an empty buffer.
    fn go_on(
        &mut self,
        left: &mut impl Iterator<Item = (usize, &'a Source)>,
        slice_bytes: usize,
    ) -> Result<Outcome, CheckpointError> {
        let event = if let Some(reading) = &mut self.reading {
            match (reading.slices.next(), self.empties.pop()) {
                (Some(cut), Some(buffer)) => Event::Slice(reading.read(cut, buffer)?),
                (Some(_), None) => unreachable!("lanes without empty buffers wait"),
                (None, unused) => {
                    self.empties.extend(unused);
                    let source = reading.close()?;
                    self.reading = None;
                    Event::End { source }
                }
            }
        } else {
            let Some((index, source)) = left.next() else { return Ok(Outcome::Over) };
            let (reading, front) = Reading::open(index, source, slice_bytes)?;
            self.reading = Some(reading);
            Event::Front(front)
        };
        Ok(if self.events.send(Ok(event)).is_ok() { Outcome::Open } else { Outcome::Deaf })
    }
}

/// A tensor's index, a piece of it, and the bytes of that.
type Cut = (usize, Piece, usize);

/// A file in work.
struct Reading<'a> {
    index: usize,
    source: &'a Source,
    file: File,
    position: u64,
    trail: Trail,
    opened: Metadata,
    slices: Box<dyn Iterator<Item = Cut> + 'a>,
}

impl<'a> Reading<'a> {
    /// Returns everything before the data, too.
    fn open(index: usize, source: &'a Source, slice_bytes: usize) -> Result<(Self, Vec<u8>), CheckpointError> {
        let path = &source.path;
        let file = open_source(path)?;
        let opened = file.metadata().map_err(CheckpointError::io(path))?;
        let trail = Trail::new(&file, opened.len());
        // Advice only: a file system that has none to take reads just the same.
        let _ = fadvise(&file, 0, None, Advice::Sequential);
        match Header::read_open(path, &file) {
            Ok(header) if header == source.header => {}
            // It was whole when the plan was made.
            Ok(_) | Err(CheckpointError::Format { .. }) => return Err(changed(source)),
            Err(error) => return Err(error),
        }
        let slices =
            source.header.tensors.iter().zip(&source.steps).enumerate().flat_map(move |(tensor, (info, step))| {
                pieces(info, step, slice_bytes).map(move |(piece, bytes)| (tensor, piece, bytes))
            });
        let mut reading = Self { index, source, file, position: 0, trail, opened, slices: Box::new(slices) };
        let mut front = vec![0u8; source.header.data_start() as usize];
        reading.read_exact(&mut front)?;
        Ok((reading, front))
    }

    fn read(&mut self, (tensor, piece, bytes): Cut, mut buffer: Buffer) -> Result<Slice, CheckpointError> {
        self.read_exact(buffer.prepare(bytes))?;
        self.trail.leave(&self.file, self.position);
        Ok(Slice { source: self.index, tensor, piece, buffer })
    }

    /// Returns the index of the file, which is still the one that was opened.
    fn close(&self) -> Result<usize, CheckpointError> {
        let now = self.file.metadata().map_err(CheckpointError::io(&self.source.path))?;
        self.trail.end(&self.file);
        let stamp = |status: &Metadata| (status.len(), status.mtime(), status.mtime_nsec());
        if stamp(&now) == stamp(&self.opened) { Ok(self.index) } else { Err(changed(self.source)) }
    }

    fn read_exact(&mut self, slice: &mut [u8]) -> Result<(), CheckpointError> {
        let outcome = self.file.read_exact_at(slice, self.position);
        outcome.map_err(|error| {
            if error.kind() == ErrorKind::UnexpectedEof {
                changed(self.source)
            } else {
                CheckpointError::io(&self.source.path)(error)
            }
        })?;
        self.position += slice.len() as u64;
        Ok(())
    }
}

/// The error for a source that is not what it was when it was opened.
#[must_use]
pub fn changed(source: &Source) -> CheckpointError {
    CheckpointError::format(&source.path, "changed while it was being read; start again once nothing writes to it")
}
