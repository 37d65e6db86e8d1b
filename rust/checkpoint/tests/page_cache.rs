//! What a large pass through the pipeline leaves in the page cache: what was there before, and little else.

use std::fs::{self, File};
use std::path::Path;

use qlora_checkpoint::page_cache::{drop_pages, is_cached};
use qlora_checkpoint::{PackOptions, Plan, PlanRequest, pack};
use qlora_core::{Control, QuantSpec, QuantType};
use rustix::fs::{Advice, fadvise};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, serialize};

const BYTES: usize = (150 << 20) + 4567;
const PLACES: u64 = 500;

/// At how many of so many places a file is in the page cache. To be asked once: asking fetches what is not there.
fn cached_places(path: &Path) -> u64 {
    let file = File::open(path).expect("there");
    // What is asked for alone, and not what may be next.
    fadvise(&file, 0, None, Advice::Random).expect("a file on a disk");
    let step = file.metadata().expect("readable").len() / PLACES;
    (0..PLACES).filter(|place| is_cached(&file, step * place)).count() as u64
}

/// Write a file that is on the disk alone. Returns whether the file system can tell.
fn write_dropped(path: &Path, content: &[u8]) -> bool {
    fs::write(path, content).expect("written");
    let file = File::open(path).expect("there");
    file.sync_all().expect("synced");
    drop_pages(&file, 0, None);
    !is_cached(&file, content.len() as u64 / 2)
}

/// Copy one large tensor, which was read `before`. Returns what is cached of source and output then; none where the file
/// system cannot tell.
fn copy_large(before: bool) -> Option<[u64; 2]> {
    // Temporary files proper may lie in memory, where nothing is cached.
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("folder");
    let (path, out) = (folder.path().join("a.safetensors"), folder.path().join("out"));
    let content = vec![7u8; BYTES];
    let tensor = TensorView::new(Dtype::U8, vec![BYTES], &content).expect("consistent");
    let content = serialize([("large", tensor)], None).expect("serializes");
    if !write_dropped(&path, &content) {
        return None;
    }
    if before {
        fs::read(&path).expect("readable");
    }
    let spec = QuantSpec::new(QuantType::Nf4, 64, true, None).expect("valid");
    let request = PlanRequest {
        source: folder.path(),
        files: &["a.safetensors".to_owned()],
        packed: &[],
        transposed: &[],
        spec: &spec,
        max_shard_size: 1 << 40,
        version: "1",
    };
    let plan = Plan::new(&request).expect("plans");
    fs::create_dir(&out).expect("folder");
    let options = PackOptions { slice_bytes: (1 << 20) + 8, num_threads: 1 };
    pack(&plan, &spec, &out, options, None, &Control::default()).expect("packs");
    Some([cached_places(&path), cached_places(&out.join(&plan.shards[0].name))])
}

#[test]
fn a_source_that_was_not_in_the_page_cache_leaves_it_and_so_does_the_output() {
    if let Some([source, output]) = copy_large(false) {
        assert!(source < PLACES / 20, "{source} of {PLACES} places of the source are cached");
        // What was written last is synced by the end, and stays.
        assert!(output < PLACES * 3 / 4, "{output} of {PLACES} places of the output are cached");
    }
}

#[test]
fn a_source_that_was_in_the_page_cache_stays_there() {
    if let Some([source, _]) = copy_large(true) {
        assert!(source > PLACES * 19 / 20, "{source} of {PLACES} places of the source are cached");
    }
}
