//! `Header::read` of arbitrary files: what it accepts covers the data exactly, and the format's own crate accepts it too.

#![no_main]

use libfuzzer_sys::fuzz_target;
use qlora_checkpoint::Header;
use qlora_checkpoint::header::known_dtype;
use qlora_fuzz::{MemoryFile, as_file};
use safetensors::SafeTensors;

fn check(content: &[u8]) {
    let file = MemoryFile::new(content);
    let Ok(header) = Header::read(&file.path()) else { return };
    let mut end = 0;
    for tensor in &header.tensors {
        assert_eq!(tensor.start, end);
        end = tensor.end;
    }
    assert_eq!(end, header.data_bytes());
    assert_eq!(header.file_bytes(), content.len() as u64);
    // A dtype that it does not know is an error there, and copied here.
    if header.tensors.iter().all(|tensor| known_dtype(&tensor.dtype).is_some()) {
        let theirs = SafeTensors::deserialize(content).expect("accepted by the format's own crate");
        assert_eq!(theirs.len(), header.tensors.len());
        for tensor in &header.tensors {
            let view = theirs.tensor(&tensor.name).expect("the same names");
            assert_eq!(view.data().len() as u64, tensor.bytes());
        }
    }
}

fuzz_target!(|input: &[u8]| {
    check(input);
    if let Some(file) = as_file(input, usize::MAX) {
        check(&file);
    }
});
