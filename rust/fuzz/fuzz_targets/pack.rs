//! The whole pipeline over arbitrary files: a plan or an error, then output whose headers can be read, or an error.

#![no_main]

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use libfuzzer_sys::fuzz_target;
use qlora_checkpoint::{Finished, Header, PackOptions, Plan, PlanRequest, Resumption, Tensor, pack};
use qlora_core::{Control, QuantSpec, QuantType};
use qlora_fuzz::{MemoryFile, as_file};

/// Bytes of output beyond which nothing is written: a plan may ask for as much as the file claims.
const OUTPUT_LIMIT: u64 = 1 << 18;

fuzz_target!(|input: &[u8]| {
    let Some((&choice, rest)) = input.split_first() else { return };
    let Some(content) = as_file(rest, 1 << 14) else { return };
    let file = MemoryFile::new(&content);
    let Ok(header) = Header::read(&file.path()) else { return };
    let quant_type = [QuantType::Nf4, QuantType::Fp4, QuantType::Int4, QuantType::Int8][usize::from(choice & 3)];
    let double_quant = choice & 4 != 0;
    let spec = QuantSpec::new(quant_type, 32 << (choice >> 3 & 3), double_quant, None).expect("valid");
    let floats = header.tensors.iter().filter(|tensor| {
        ["F32", "BF16", "F16"].contains(&tensor.dtype.as_str()) && matches!(tensor.shape.len(), 2 | 3)
    });
    let packed: Vec<String> = if choice & 32 == 0 {
        floats.map(|tensor| tensor.name.clone()).collect()
    } else {
        header.tensors.iter().map(|tensor| tensor.name.clone()).collect()
    };
    let path = file.path();
    let files = [path.file_name().expect("named").to_string_lossy().into_owned()];
    let source = path.parent().expect("in a folder");
    let transposed = if choice & 64 == 0 { &[][..] } else { &packed[..] };
    let request = PlanRequest {
        source,
        files: &files,
        packed: &packed,
        transposed,
        spec: &spec,
        max_shard_size: 500,
        version: "0",
    };
    let Ok(plan) = Plan::new(&request) else { return };
    let size = plan.shards.iter().try_fold(0u64, |sum, shard| sum.checked_add(shard.data_bytes()));
    if size.is_none_or(|size| size > OUTPUT_LIMIT) || plan.shards.len() > 40 {
        return;
    }
    let folder = tempfile::tempdir_in("/dev/shm").expect("a folder in memory");
    let journal = folder.path().join("journal");
    fs::write(&journal, "").expect("writable");
    let run = |finished: &Finished| {
        let resumption = Some(Resumption { journal: &journal, finished });
        let options = PackOptions { slice_bytes: 256, num_threads: 1 };
        pack(&plan, &spec, folder.path(), options, resumption, &Control::default())
    };
    let Ok(digests) = run(&Finished::default()) else { return };
    let read = |folder: &Path| -> Vec<Vec<u8>> {
        plan.shards.iter().map(|shard| fs::read(folder.join(&shard.name)).expect("written")).collect()
    };
    for shard in &plan.shards {
        let header = Header::read(&folder.path().join(&shard.name)).expect("what was written can be read");
        // Tensors without data lie in one place, in any order.
        let by_name = |tensors: &[Tensor]| {
            let mut tensors = tensors.to_vec();
            tensors.sort_by(|a, b| a.name.cmp(&b.name));
            tensors
        };
        assert_eq!(by_name(&header.tensors), by_name(&shard.tensors));
    }
    // Whatever part of it was finished, a resumed run leaves the same bytes.
    let mut finished = Finished::default();
    for (index, line) in fs::read_to_string(&journal).expect("readable").lines().enumerate() {
        if (usize::from(choice) + index) % 3 > 0 {
            let entry: HashMap<String, String> = serde_json::from_str(line).expect("a line of strings");
            let (name, hash, into) = match entry.get("tensor") {
                Some(name) => (name, &entry["xxh3_128"], &mut finished.tensors),
                None => (&entry["file"], &entry["sha256"], &mut finished.files),
            };
            into.insert(name.clone(), hash.clone());
        }
    }
    let whole = read(folder.path());
    assert_eq!(run(&finished).expect("as before"), digests);
    assert_eq!(read(folder.path()), whole);
});
