//! Loading into plain memory: every byte where it belongs, whatever the sizes, and every way in which it can end early.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use proptest::prelude::*;
use qlora_checkpoint::{CheckpointError, FileTargets, LoadError, LoadOptions, Target, load};
use qlora_core::{ByteSink, Control, CoreError, Piece};
use tempfile::TempDir;

/// Gap between tensors in memory, which nothing may touch.
const GUARD: usize = 3;
const UNTOUCHED: u8 = 0xAA;

/// Plain memory, addressed from 0, and a hook that is called before each buffer is handed out.
struct Memory<'a> {
    bytes: Mutex<Vec<u8>>,
    hook: Box<dyn Fn(usize) -> Result<(), String> + Sync + 'a>,
    buffers: AtomicUsize,
    sinks: AtomicUsize,
}

impl<'a> Memory<'a> {
    fn new(bytes: usize) -> Self {
        Self::with_hook(bytes, |_| Ok(()))
    }

    fn with_hook(bytes: usize, hook: impl Fn(usize) -> Result<(), String> + Sync + 'a) -> Self {
        let bytes = Mutex::new(vec![UNTOUCHED; bytes]);
        Self { bytes, hook: Box::new(hook), buffers: AtomicUsize::new(0), sinks: AtomicUsize::new(0) }
    }

    fn sink(&self, capacity: usize) -> MemorySink<'_> {
        self.sinks.fetch_add(1, Ordering::Relaxed);
        MemorySink { memory: self, buffer: vec![0; capacity], sent: Vec::new() }
    }
}

/// Like a device: what is sent arrives later, when the buffer is needed again or the sink finishes.
struct MemorySink<'a> {
    memory: &'a Memory<'a>,
    buffer: Vec<u8>,
    sent: Vec<Piece>,
}

impl MemorySink<'_> {
    fn arrive(&mut self) {
        let mut memory = self.memory.bytes.lock().expect("no thread panicked");
        for Piece { start, bytes, to } in self.sent.drain(..) {
            let to = to as usize;
            memory[to..to + bytes].copy_from_slice(&self.buffer[start..start + bytes]);
        }
    }
}

impl ByteSink for MemorySink<'_> {
    type Error = String;

    fn buffer(&mut self, bytes: usize) -> Result<&mut [u8], String> {
        self.arrive();
        (self.memory.hook)(self.memory.buffers.fetch_add(1, Ordering::Relaxed))?;
        if bytes > self.buffer.len() {
            return Err(format!("asked for {bytes} of {}", self.buffer.len()));
        }
        Ok(&mut self.buffer[..bytes])
    }

    fn send(&mut self, pieces: &[Piece]) -> Result<(), String> {
        assert!(self.sent.is_empty(), "one send for a buffer");
        self.sent.extend_from_slice(pieces);
        Ok(())
    }

    fn finish(&mut self) -> Result<(), String> {
        self.arrive();
        Ok(())
    }
}

/// A file of byte tensors `t0`, `t1`, ... of these sizes, and its data.
fn write_file(path: &Path, sizes: &[usize]) -> Vec<u8> {
    let mut entries = Vec::new();
    let mut end = 0;
    for (index, size) in sizes.iter().enumerate() {
        let start = end;
        end += size;
        entries.push(format!(r#""t{index}":{{"dtype":"U8","shape":[{size}],"data_offsets":[{start},{end}]}}"#));
    }
    let json = format!("{{{}}}", entries.join(","));
    let data: Vec<u8> = (0..end).map(|index| (index * 7 % 251 % 170) as u8).collect();
    fs::write(path, [&(json.len() as u64).to_le_bytes()[..], json.as_bytes(), &data].concat()).expect("writable");
    data
}

/// Targets for the chosen tensors, last first, `GUARD` bytes apart from `base` on; and one past the last place.
fn targets(sizes: &[usize], chosen: impl Fn(usize) -> bool, base: usize) -> (Vec<Target>, usize) {
    let mut to = base;
    let mut targets = Vec::new();
    for (index, &size) in sizes.iter().enumerate().rev().filter(|(index, _)| chosen(*index)) {
        targets.push(Target { tensor: format!("t{index}"), to: to as u64, bytes: size as u64 });
        to += size + GUARD;
    }
    (targets, to)
}

fn check_arrived(memory: &Memory<'_>, files: &[(FileTargets, Vec<u8>, Vec<usize>)]) {
    let got = memory.bytes.lock().expect("no thread panicked");
    let mut expected = vec![UNTOUCHED; got.len()];
    for (wanted, data, sizes) in files {
        for target in &wanted.targets {
            let index: usize = target.tensor[1..].parse().expect("a number");
            let start: usize = sizes[..index].iter().sum();
            let to = target.to as usize;
            expected[to..to + sizes[index]].copy_from_slice(&data[start..start + sizes[index]]);
        }
    }
    assert!(*got == expected, "bytes differ");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn every_byte_arrives_at_its_place_and_no_other_is_written(
        shapes in prop::collection::vec(prop::collection::vec(0usize..60, 0..9), 0..4),
        buffer_bytes in 1usize..90, num_threads in 0usize..6, skip in 0usize..4,
    ) {
        let folder = TempDir::new().expect("a temporary folder");
        let mut files = Vec::new();
        let mut end = GUARD;
        for (number, sizes) in shapes.iter().enumerate() {
            let path = folder.path().join(format!("{number}.safetensors"));
            let data = write_file(&path, sizes);
            let (targets, next) = targets(sizes, |index| skip == 0 || index % (skip + 1) != 0, end);
            files.push((FileTargets { path, targets }, data, sizes.clone()));
            end = next;
        }
        let memory = Memory::new(end);
        let wanted: Vec<_> = files.iter().map(|(wanted, ..)| wanted.clone()).collect();
        let control = Control::default();
        let options = LoadOptions { buffer_bytes, num_threads };
        load(&wanted, options, || Ok(memory.sink(buffer_bytes)), &control).expect("loads");
        check_arrived(&memory, &files);
        let total: u64 = wanted.iter().flat_map(|file| &file.targets).map(|target| target.bytes).sum();
        prop_assert_eq!(control.progress(), (total, total));
        prop_assert!(memory.sinks.load(Ordering::Relaxed) <= num_threads.max(1));
    }
}

struct Case {
    _folder: TempDir,
    path: PathBuf,
    wanted: Vec<FileTargets>,
    end: usize,
}

fn case() -> Case {
    let folder = TempDir::new().expect("a temporary folder");
    let path = folder.path().join("x.safetensors");
    let sizes = [100, 1000, 7, 300];
    write_file(&path, &sizes);
    let (targets, end) = targets(&sizes, |_| true, 0);
    Case { _folder: folder, wanted: vec![FileTargets { path: path.clone(), targets }], path, end }
}

const OPTIONS: LoadOptions = LoadOptions { buffer_bytes: 64, num_threads: 3 };

fn load_case(case: &Case, memory: &Memory<'_>, control: &Control) -> Result<(), LoadError<String>> {
    load(&case.wanted, OPTIONS, || Ok(memory.sink(64)), control)
}

fn message(case: &Case, memory: &Memory<'_>) -> String {
    load_case(case, memory, &Control::default()).expect_err("fails").to_string()
}

#[test]
fn a_file_that_is_not_what_was_planned_for_is_named_with_the_tensor() {
    let mut case = case();
    case.wanted[0].targets[2].bytes += 1;
    let text = message(&case, &Memory::new(case.end));
    assert!(
        text.contains("x.safetensors") && text.contains("\"t1\": expected 1001 bytes, the file has 1000"),
        "{text}"
    );
    case.wanted[0].targets[2].tensor = "gone".into();
    let text = message(&case, &Memory::new(case.end));
    assert!(text.contains("x.safetensors") && text.contains("\"gone\" is not in it"), "{text}");
}

#[test]
fn a_file_that_was_cut_off_is_an_error_before_anything_is_read() {
    let case = case();
    let whole = fs::read(&case.path).expect("readable");
    fs::write(&case.path, &whole[..whole.len() - 1]).expect("writable");
    let memory = Memory::new(case.end);
    assert!(message(&case, &memory).contains("cut off"));
    assert_eq!(memory.buffers.load(Ordering::Relaxed), 0);
    fs::remove_file(&case.path).expect("was there");
    assert!(message(&case, &memory).contains("x.safetensors: No such file"));
}

#[test]
fn a_file_that_is_cut_while_it_is_read_is_an_error_that_names_the_tensor() {
    let case = case();
    let size = fs::metadata(&case.path).expect("there").len();
    let memory = Memory::with_hook(case.end, |buffer| {
        if buffer == 4 {
            fs::File::options().write(true).open(&case.path).and_then(|file| file.set_len(size - 5)).expect("cut");
        }
        Ok(())
    });
    let text = message(&case, &memory);
    assert!(text.contains("x.safetensors: ends within tensor \"t3\""), "{text}");
}

#[test]
fn a_file_that_is_written_while_it_is_read_is_an_error() {
    let case = case();
    let memory = Memory::with_hook(case.end, |buffer| {
        if buffer == 4 {
            let file = fs::File::options().write(true).open(&case.path).expect("there");
            file.set_modified(std::time::SystemTime::UNIX_EPOCH).expect("settable");
        }
        Ok(())
    });
    assert!(message(&case, &memory).contains("changed while it was being read"));
}

#[test]
fn the_sinks_error_comes_back_and_stops_every_thread() {
    let case = case();
    let memory = Memory::with_hook(case.end, |buffer| if buffer < 2 { Ok(()) } else { Err("no link".into()) });
    assert_eq!(message(&case, &memory), "no link");
    assert!(memory.buffers.load(Ordering::Relaxed) <= 2 + OPTIONS.num_threads);
    let error = load::<MemorySink<'_>, _>(&case.wanted, OPTIONS, || Err("no memory".to_owned()), &Control::default());
    assert_eq!(error.expect_err("fails").to_string(), "no memory");
}

#[test]
fn a_wish_to_stop_is_answered_between_two_buffers() {
    let case = case();
    let control = Control::default();
    let memory = Memory::with_hook(case.end, |buffer| {
        if buffer == 2 {
            control.cancel();
        }
        Ok(())
    });
    let error = load_case(&case, &memory, &control).expect_err("stops");
    assert!(matches!(error, LoadError::File(CheckpointError::Core(CoreError::Interrupted))), "{error}");
    assert!(memory.buffers.load(Ordering::Relaxed) <= 3 + OPTIONS.num_threads);
}
