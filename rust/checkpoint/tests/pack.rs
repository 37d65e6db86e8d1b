//! A folder through the whole pipeline, against the numbers of `qlora-core` and the format's own crate.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use half::{bf16, f16};
use qlora_checkpoint::{CheckpointError, Finished, Header, PackOptions, Plan, PlanRequest, Resumption, pack};
use qlora_core::{
    Control, CoreError, Floats, Layout, Nonfinite, Parallel, QuantSpec, QuantType, double_quantize, quantize,
};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors, serialize};

fn values(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        f64::from(state >> 8) as f32 / 8_388_608.0 - 1.0
    };
    (0..count).map(|_| next() * next()).collect()
}

fn write(path: &Path, tensors: &[(&str, Dtype, Vec<usize>, Vec<u8>)]) {
    let views = tensors
        .iter()
        .map(|(name, dtype, shape, bytes)| (*name, TensorView::new(*dtype, shape.clone(), bytes).expect("consistent")));
    fs::write(path, serialize(views, None).expect("serializes")).expect("writable");
}

fn bytes_of<T: bytemuck::NoUninit>(values: &[T]) -> Vec<u8> {
    bytemuck::cast_slice(values).to_vec()
}

/// Two files: a bf16 and an f16 matrix with odd columns, a stack of f32 matrices, and tensors that stay.
fn source(folder: &Path) -> Vec<String> {
    let wide: Vec<bf16> = values(37 * 201, 1).into_iter().map(bf16::from_f32).collect();
    let half: Vec<f16> = values(5 * 64, 2).into_iter().map(f16::from_f32).collect();
    let stack = values(3 * 19 * 130, 3);
    write(
        &folder.join("a.safetensors"),
        &[
            ("wide.weight", Dtype::BF16, vec![37, 201], bytes_of(&wide)),
            ("norm.weight", Dtype::BF16, vec![7], bytes_of(&wide[..7])),
            ("ids", Dtype::I64, vec![3], bytes_of(&[1i64, -2, 3])),
            ("mask", Dtype::BOOL, vec![3], vec![1, 0, 1]),
        ],
    );
    write(
        &folder.join("b.safetensors"),
        &[
            ("half.weight", Dtype::F16, vec![5, 64], bytes_of(&half)),
            ("stack", Dtype::F32, vec![3, 19, 130], bytes_of(&stack)),
            ("none.weight", Dtype::F32, vec![0, 5], vec![]),
            ("turned", Dtype::F16, vec![2, 131, 19], bytes_of(&turned())),
        ],
    );
    vec!["a.safetensors".into(), "b.safetensors".into()]
}

const PACKED: [&str; 5] = ["wide.weight", "half.weight", "stack", "none.weight", "turned"];
const TRANSPOSED: [&str; 1] = ["turned"];

/// Two matrices that are packed as (19, 131), and stored as (131, 19).
fn turned() -> Vec<f16> {
    values(2 * 131 * 19, 4).into_iter().map(f16::from_f32).collect()
}

struct Run {
    shards: Vec<Vec<u8>>,
    digests: Vec<String>,
}

fn run(folder: &Path, spec: &QuantSpec, slice_bytes: usize, max_shard_size: u64) -> Run {
    let files = source(folder);
    let packed = PACKED.map(String::from);
    let transposed = TRANSPOSED.map(String::from);
    let request = PlanRequest {
        source: folder,
        files: &files,
        packed: &packed,
        transposed: &transposed,
        spec,
        max_shard_size,
        version: "1.2",
    };
    let plan = Plan::new(&request).expect("plans");
    let out = tempfile::tempdir_in(folder).expect("folder");
    let control = Control::default();
    let options = PackOptions { slice_bytes, num_threads: 2 };
    let digests = pack(&plan, spec, out.path(), options, None, &control).expect("packs");
    let (done, total) = control.progress();
    assert_eq!(done, total);
    let shards = plan.shards.iter().map(|shard| fs::read(out.path().join(&shard.name)).expect("written")).collect();
    Run { shards, digests }
}

fn expected(
    name: &str,
    floats: Floats<'_>,
    shape: (usize, usize, usize),
    spec: &QuantSpec,
) -> HashMap<String, Vec<u8>> {
    let layout = Layout::new(shape.0, shape.1, shape.2, spec).expect("fits");
    let (parallel, control) = (Parallel::new(1), Control::default());
    let mut codes = vec![0u8; layout.code_bytes()];
    let mut absmax = vec![0f32; layout.blocks()];
    quantize(floats, &layout, spec, Nonfinite::Raise, &mut codes, &mut absmax, &parallel, &control).expect("finite");
    let mut parts = HashMap::from([(name.to_owned(), codes)]);
    if !spec.double_quant() {
        parts.insert(format!("{name}_absmax"), bytes_of(&absmax));
        return parts;
    }
    let mut nested = vec![0u8; layout.blocks()];
    let mut scale = vec![0f32; layout.groups()];
    let mut offset = vec![0f32; shape.0];
    let per_expert = layout.blocks_per_expert();
    double_quantize(&absmax, per_expert, &mut nested, &mut scale, &mut offset, &parallel, &control).expect("fits");
    parts.insert(format!("{name}_absmax"), nested);
    parts.insert(format!("{name}_absmax_scale"), bytes_of(&scale));
    parts.insert(format!("{name}_absmax_offset"), bytes_of(&offset));
    parts
}

#[test]
fn packed_bytes_equal_the_numbers_crate_for_every_slice_size() {
    for (quant_type, double_quant) in [(QuantType::Nf4, true), (QuantType::Int8, false), (QuantType::Fp4, false)] {
        let spec = QuantSpec::new(quant_type, 64, double_quant, None).expect("valid");
        let folder = tempfile::tempdir().expect("folder");
        let whole = run(folder.path(), &spec, 1 << 20, 1 << 30);
        assert_eq!(whole.shards.len(), 1);
        let file = SafeTensors::deserialize(&whole.shards[0]).expect("the format's own crate reads it");

        let wide: Vec<bf16> = values(37 * 201, 1).into_iter().map(bf16::from_f32).collect();
        let half: Vec<f16> = values(5 * 64, 2).into_iter().map(f16::from_f32).collect();
        let stack = values(3 * 19 * 130, 3);
        let mut parts = expected("wide.weight", Floats::Bf16(&wide), (1, 37, 201), &spec);
        parts.extend(expected("half.weight", Floats::F16(&half), (1, 5, 64), &spec));
        parts.extend(expected("stack", Floats::F32(&stack), (3, 19, 130), &spec));
        parts.extend(expected("none.weight", Floats::F32(&[]), (1, 0, 5), &spec));
        let stored = turned();
        let place = |at: usize| (at / 2489, at % 2489 / 131, at % 131);
        let logical = (0..2 * 2489).map(place).map(|(expert, row, col)| stored[expert * 2489 + col * 19 + row]);
        parts.extend(expected("turned", Floats::F16(&logical.collect::<Vec<_>>()), (2, 19, 131), &spec));
        parts.insert("norm.weight".into(), bytes_of(&wide[..7]));
        parts.insert("ids".into(), bytes_of(&[1i64, -2, 3]));
        parts.insert("mask".into(), vec![1, 0, 1]);
        assert_eq!(file.len(), parts.len());
        for (name, bytes) in &parts {
            assert_eq!(file.tensor(name).expect("present").data(), bytes.as_slice(), "{name}");
        }
        let groups = spec.double_quant().then(|| file.tensor("stack_absmax_scale").expect("present").shape().to_vec());
        assert!(groups.is_none_or(|shape| shape == [3, 1]));
        assert_eq!(file.tensor("turned").expect("present").shape()[..2], [2, 19]);

        for slice_bytes in [1, 100, 257, 402, 1000] {
            let sliced = run(folder.path(), &spec, slice_bytes, 1 << 30);
            assert_eq!(sliced.shards, whole.shards, "slices of {slice_bytes} bytes");
            assert_eq!(sliced.digests, whole.digests);
        }
    }
}

#[test]
fn shards_are_cut_at_their_limit_and_keep_a_weight_together() {
    let spec = QuantSpec::new(QuantType::Nf4, 64, true, None).expect("valid");
    let folder = tempfile::tempdir().expect("folder");
    let run = run(folder.path(), &spec, 512, 1000);
    assert!(run.shards.len() > 2);
    let mut names = Vec::new();
    for shard in &run.shards {
        let file = SafeTensors::deserialize(shard).expect("valid");
        for name in file.names() {
            names.push(name.to_owned());
            if let Some(weight) = name.strip_suffix("_absmax") {
                assert!(file.tensor(weight).is_ok() && file.tensor(&format!("{name}_offset")).is_ok());
            }
        }
    }
    names.sort();
    names.dedup();
    assert_eq!(names.len(), 4 * PACKED.len() + 3);
}

#[test]
fn metadata_hold_version_source_hashes_and_odd_shapes() {
    let spec = QuantSpec::new(QuantType::Nf4, 64, true, None).expect("valid");
    let folder = tempfile::tempdir().expect("folder");
    let run = run(folder.path(), &spec, 512, 1 << 30);
    let path = folder.path().join("out.safetensors");
    fs::write(&path, &run.shards[0]).expect("writable");
    let metadata = Header::read(&path).expect("valid").metadata;
    assert_eq!(metadata["format"], "pt");
    assert_eq!(metadata["qlora_rs_version"], "1.2");
    assert_eq!(metadata["wide.weight.shape"], "[37, 201]");
    assert_eq!((&*metadata["turned.shape"], &*metadata["turned.transposed"]), ("[2, 19, 131]", "true"));
    assert!(!metadata.contains_key("stack.transposed"));
    assert!(!metadata.contains_key("half.weight.shape") && !metadata.contains_key("stack.shape"));
    let hashes: HashMap<String, String> = serde_json::from_str(&metadata["source_sha256"]).expect("JSON");
    assert_eq!(hashes.len(), 2);
    assert_eq!(hashes["b.safetensors"], run.digests[1]);
    assert_eq!(run.digests[0].len(), 64);
}

#[test]
fn files_side_by_side_give_the_bytes_of_one_after_the_other() {
    let folder = tempfile::tempdir().expect("folder");
    let mut files = Vec::new();
    let mut packed = Vec::new();
    for index in 0..11u32 {
        // Of all sizes, from nothing on, so that files end in another order than they begin.
        let rows = [9, 301, 0, 40, 77, 1, 130, 64, 3, 200, 5][index as usize];
        let (weight, norm) = (format!("{index}.weight"), format!("{index}.norm"));
        let elements: Vec<bf16> = values(rows * 70, index).into_iter().map(bf16::from_f32).collect();
        files.push(format!("{index}.safetensors"));
        write(
            &folder.path().join(&files[index as usize]),
            &[
                (weight.as_str(), Dtype::BF16, vec![rows, 70], bytes_of(&elements)),
                (norm.as_str(), Dtype::U8, vec![rows], vec![index as u8; rows]),
            ],
        );
        packed.push(weight);
    }
    let spec = QuantSpec::new(QuantType::Nf4, 64, true, None).expect("valid");
    let request = PlanRequest {
        source: folder.path(),
        files: &files,
        packed: &packed,
        transposed: &[],
        spec: &spec,
        max_shard_size: 20_000,
        version: "1",
    };
    let plan = Plan::new(&request).expect("plans");
    let run = |num_threads: usize| {
        let out = tempfile::tempdir().expect("folder");
        let control = Control::default();
        let options = PackOptions { slice_bytes: 600, num_threads };
        let digests = pack(&plan, &spec, out.path(), options, None, &control).expect("packs");
        let (done, total) = control.progress();
        assert_eq!(done, total);
        let read = |name: &String| fs::read(out.path().join(name)).expect("written");
        (digests, plan.shards.iter().map(|shard| read(&shard.name)).collect::<Vec<_>>())
    };
    let expected = run(1);
    for threads in [2, 3, 7] {
        assert_eq!(run(threads), expected, "{threads} threads");
    }
}

#[test]
fn every_nonfinite_value_of_a_weight_is_counted_across_slices() {
    let folder = tempfile::tempdir().expect("folder");
    let mut weight = vec![0.5f32; 9 * 70];
    weight[3 * 70 + 5] = f32::NAN;
    weight[8 * 70 + 69] = f32::INFINITY;
    write(&folder.path().join("x.safetensors"), &[("w", Dtype::F32, vec![9, 70], bytes_of(&weight))]);
    let spec = QuantSpec::new(QuantType::Nf4, 32, true, None).expect("valid");
    let (files, packed) = (["x.safetensors".to_owned()], ["w".to_owned()]);
    for (transposed, slice_bytes) in [false, true].into_iter().flat_map(|turn| [64, 600, 1 << 20].map(|n| (turn, n))) {
        let request = PlanRequest {
            source: folder.path(),
            files: &files,
            packed: &packed,
            transposed: if transposed { &packed } else { &[] },
            spec: &spec,
            max_shard_size: 1 << 30,
            version: "1",
        };
        let plan = Plan::new(&request).expect("plans");
        let out = tempfile::tempdir().expect("folder");
        let options = PackOptions { slice_bytes, num_threads: 1 };
        let error = pack(&plan, &spec, out.path(), options, None, &Control::default()).expect_err("refused");
        let CheckpointError::NonFinite { count, first, tensor, .. } = error else { panic!("{error}") };
        assert_eq!((count, first, tensor.as_str()), (2, 215, "w"));
    }
}

#[test]
fn a_source_that_changes_after_planning_is_noticed() {
    let spec = QuantSpec::new(QuantType::Nf4, 64, false, None).expect("valid");
    let folder = tempfile::tempdir().expect("folder");
    let files = source(folder.path());
    let request = PlanRequest {
        source: folder.path(),
        files: &files,
        packed: &[],
        transposed: &[],
        spec: &spec,
        max_shard_size: 1 << 30,
        version: "1",
    };
    let plan = Plan::new(&request).expect("plans");
    write(&folder.path().join("b.safetensors"), &[("other", Dtype::U8, vec![1], vec![9])]);
    let out = tempfile::tempdir().expect("folder");
    let error = pack(&plan, &spec, out.path(), PackOptions::default(), None, &Control::default()).expect_err("refused");
    assert!(error.to_string().contains("changed while it was being read"), "{error}");
}

#[test]
fn what_cannot_be_packed_is_refused_before_anything_is_written() {
    let spec = QuantSpec::new(QuantType::Nf4, 64, true, None).expect("valid");
    let folder = tempfile::tempdir().expect("folder");
    let files = source(folder.path());
    write(
        &folder.path().join("c.safetensors"),
        &[("wide.weight_absmax", Dtype::U8, vec![1], vec![0]), ("ids2", Dtype::I64, vec![1, 1], vec![0; 8])],
    );
    let more: Vec<String> = files.iter().cloned().chain(["c.safetensors".to_owned()]).collect();
    let cases: [(&[String], &str, &str); 5] = [
        (&files, "norm.weight", "shape [7]"),
        (&files, "ids", "is I64"),
        (&files, "absent", "not in its safetensors files"),
        (&more, "wide.weight", "written twice"),
        (&more, "ids2", "only F32, BF16 and F16"),
    ];
    for (files, name, reason) in cases {
        let packed = [name.to_owned()];
        let request = PlanRequest {
            source: folder.path(),
            files,
            packed: &packed,
            transposed: &[],
            spec: &spec,
            max_shard_size: 1 << 30,
            version: "1",
        };
        let message = Plan::new(&request).expect_err(reason).to_string();
        assert!(message.contains(reason) && message.contains(name), "{message}");
    }
}

#[test]
fn a_wish_to_stop_ends_the_work() {
    let spec = QuantSpec::new(QuantType::Nf4, 64, true, None).expect("valid");
    let folder = tempfile::tempdir().expect("folder");
    let files = source(folder.path());
    let request = PlanRequest {
        source: folder.path(),
        files: &files,
        packed: &[],
        transposed: &[],
        spec: &spec,
        max_shard_size: 1 << 30,
        version: "1",
    };
    let plan = Plan::new(&request).expect("plans");
    let control = Control::default();
    control.cancel();
    let out = tempfile::tempdir().expect("folder");
    let error = pack(&plan, &spec, out.path(), PackOptions::default(), None, &control).expect_err("stopped");
    assert!(matches!(error, CheckpointError::Core(CoreError::Interrupted)));
}

/// The lines that a run has added to its journal, as (kind, name, hash).
fn journal_lines(path: &Path) -> Vec<(String, String, String)> {
    let text = fs::read_to_string(path).expect("readable");
    text.lines()
        .map(|line| {
            let entry: HashMap<String, String> = serde_json::from_str(line).expect("a line of strings");
            let (kind, hash) = if entry.contains_key("tensor") { ("tensor", "xxh3_128") } else { ("file", "sha256") };
            (kind.to_owned(), entry[kind].clone(), entry[hash].clone())
        })
        .collect()
}

#[test]
fn whatever_was_finished_the_rest_makes_the_same_files() {
    let spec = QuantSpec::new(QuantType::Nf4, 64, true, None).expect("valid");
    let folder = tempfile::tempdir().expect("folder");
    let (files, packed) = (source(folder.path()), PACKED.map(String::from));
    let request = PlanRequest {
        source: folder.path(),
        files: &files,
        packed: &packed,
        transposed: &packed[4..],
        spec: &spec,
        max_shard_size: 1000,
        version: "1",
    };
    let plan = Plan::new(&request).expect("plans");
    let (journal, out) = (folder.path().join("journal"), folder.path().join("out"));
    fs::create_dir(&out).expect("made");
    let run = |finished: &Finished| {
        let control = Control::default();
        let options = PackOptions { slice_bytes: 500, num_threads: 1 };
        fs::write(&journal, "").expect("writable");
        let resumption = Some(Resumption { journal: &journal, finished });
        let digests = pack(&plan, &spec, &out, options, resumption, &control).expect("packs");
        let (done, total) = control.progress();
        assert_eq!(done, total);
        let read = |name: &String| fs::read(out.join(name)).expect("written");
        (digests, plan.shards.iter().map(|shard| read(&shard.name)).collect::<Vec<_>>())
    };
    let whole = run(&Finished::default());
    let lines = journal_lines(&journal);
    assert_eq!(lines.len(), 9); // seven tensors that are not empty, two files
    for count in 0..=lines.len() {
        let mut finished = Finished::default();
        for (kind, name, hash) in &lines[..count] {
            let into = if kind == "tensor" { &mut finished.tensors } else { &mut finished.files };
            into.insert(name.clone(), hash.clone());
        }
        // Everything that is not said to be finished is spoilt.
        for (index, source) in plan.sources.iter().enumerate() {
            for (tensor, info) in source.header.tensors.iter().enumerate() {
                if !finished.tensors.contains_key(&info.name) {
                    for extent in plan.sources[index].extents(tensor) {
                        let path = out.join(&plan.shards[extent.slot.shard].name);
                        let mut bytes = fs::read(&path).expect("readable");
                        let start = extent.slot.offset as usize;
                        bytes[start..start + extent.bytes as usize].fill(0xa5);
                        fs::write(&path, bytes).expect("writable");
                    }
                }
            }
        }
        assert_eq!(run(&finished), whole, "after {count} lines");
        assert!(journal_lines(&journal).len() >= lines.len() - count);
    }
    let mut wrong = Finished::default();
    wrong.files.insert(files[0].clone(), "0".repeat(64));
    fs::write(&journal, "").expect("writable");
    let resumption = Some(Resumption { journal: &journal, finished: &wrong });
    let error = pack(&plan, &spec, &out, PackOptions::default(), resumption, &Control::default()).expect_err("changed");
    assert!(error.to_string().contains("changed while it was being read"), "{error}");
}
