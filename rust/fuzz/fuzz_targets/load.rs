//! Loading arbitrary files into memory: every tensor's bytes where they belong, or an error.

#![no_main]

use std::sync::Mutex;

use libfuzzer_sys::fuzz_target;
use qlora_checkpoint::{FileTargets, Header, LoadOptions, Target, load};
use qlora_core::{ByteSink, Control, Piece};
use qlora_fuzz::{MemoryFile, as_file};

struct Sink<'a> {
    memory: &'a Mutex<Vec<u8>>,
    buffer: Vec<u8>,
}

impl ByteSink for Sink<'_> {
    type Error = String;

    fn buffer(&mut self, bytes: usize) -> Result<&mut [u8], String> {
        self.buffer.get_mut(..bytes).ok_or_else(|| format!("asked for {bytes}"))
    }

    fn send(&mut self, pieces: &[Piece]) -> Result<(), String> {
        let mut memory = self.memory.lock().expect("no thread panicked");
        for Piece { start, bytes, to } in pieces {
            let to = *to as usize;
            memory[to..to + bytes].copy_from_slice(&self.buffer[*start..start + bytes]);
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<(), String> {
        Ok(())
    }
}

fuzz_target!(|input: &[u8]| {
    let Some((&choice, rest)) = input.split_first() else { return };
    let Some(content) = as_file(rest, usize::MAX) else { return };
    let file = MemoryFile::new(&content);
    let Ok(header) = Header::read(&file.path()) else { return };
    let options = LoadOptions { buffer_bytes: 1 + usize::from(choice) * 16, num_threads: 1 + usize::from(choice & 1) };
    let mut targets: Vec<Target> = Vec::new();
    for tensor in &header.tensors {
        targets.push(Target { tensor: tensor.name.clone(), to: tensor.start, bytes: tensor.bytes() });
    }
    if choice & 2 != 0 {
        targets.reverse();
    }
    let memory = Mutex::new(vec![0u8; header.data_bytes() as usize]);
    let sink = || Ok(Sink { memory: &memory, buffer: vec![0; options.buffer_bytes] });
    let wanted = [FileTargets { path: file.path(), targets }];
    load(&wanted, options, sink, &Control::default()).expect("the header was checked");
    assert_eq!(memory.into_inner().expect("no thread panicked"), content[header.data_start() as usize..]);
});
