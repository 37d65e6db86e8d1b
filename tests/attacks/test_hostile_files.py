"""Hostile, broken and changing input: a clear error, the source untouched, nothing in the output's place."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file

import qlora_rs
from qlora_rs import checkpoint
from qlora_rs.checkpoint import comparison, conversion, packing, verification
from qlora_rs.model import load_float

INDEX = "model.safetensors.index.json"


def snapshot(folder):
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def assert_refused(source, error, match, **options):
    before = snapshot(source)
    with pytest.raises(error, match=match) as caught:
        checkpoint.quantize(source, source.parent / "packed", **options)
    assert snapshot(source) == before
    assert [path.name for path in source.parent.iterdir()] == ["source"]
    return str(caught.value)


def test_a_broken_file_is_refused_and_named(broken_folder):
    folder, reason = broken_folder
    message = assert_refused(folder, qlora_rs.FormatError, reason)
    assert "model.safetensors" in message
    with pytest.raises(qlora_rs.FormatError, match=reason):
        checkpoint.inspect(folder)


def test_an_unknown_dtype_is_copied_where_the_tensor_stays(good_folder):
    file = good_folder / "model.safetensors"
    entry = b'"model.norm.weight":{"dtype":"F32"'
    file.write_bytes(file.read_bytes().replace(entry, entry.replace(b"F32", b"F99")))
    report = checkpoint.quantize(good_folder, good_folder.parent / "packed")
    assert len(report.packed) == 7
    rows = {row.name: row for row in checkpoint.inspect(good_folder.parent / "packed").tensors}
    assert (rows["model.norm.weight"].dtype, rows["model.norm.weight"].bytes) == ("F99", 32)


@pytest.mark.parametrize("key", ["source_sha256", "model.layers.0.self_attn.q_proj.weight.shape"])
def test_metadata_nested_beyond_all_measure_is_refused(good_folder, key):
    packed = good_folder.parent / "packed"
    checkpoint.quantize(good_folder, packed)
    file = packed / "model.safetensors"
    save_file(load_file(file), file, {"format": "pt", key: "[" * 100_000})
    with pytest.raises(qlora_rs.FormatError, match=rf"model\.safetensors: .*{key.rpartition('.')[2]}"):
        checkpoint.inspect(packed)


def test_an_unknown_dtype_is_no_fault_of_ours_where_transformers_loads_it(good_folder):
    file = good_folder / "model.safetensors"
    entry = b'"model.norm.weight":{"dtype":"F32"'
    file.write_bytes(file.read_bytes().replace(entry, entry.replace(b"F32", b"F99")))
    with pytest.raises(qlora_rs.FormatError, match="cannot load it: SafetensorError"):
        load_float(good_folder)


def edit_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


SECOND = "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    "file",
    ["../source/" + SECOND, "/etc/passwd", "a/../../x.safetensors", "", "..", 7, None, "x\0.safetensors"],
)
def test_an_index_that_leads_out_of_the_folder_is_refused(sharded_folder, file):
    edit_index(sharded_folder, lambda weight_map: weight_map.update({"model.norm.weight": file}))
    assert_refused(sharded_folder, qlora_rs.FormatError, r"model\.norm\.weight.*outside this folder")


def test_an_index_and_files_that_disagree_are_refused(sharded_folder):
    edit_index(sharded_folder, lambda weight_map: weight_map.update({"model.norm.weight": SECOND}))
    assert_refused(sharded_folder, qlora_rs.FormatError, "said to be in model-00002.*, but is in model-00001")


def test_an_index_that_names_an_absent_tensor_is_refused(sharded_folder):
    edit_index(sharded_folder, lambda weight_map: weight_map.update({"ghost.weight": SECOND}))
    assert_refused(sharded_folder, qlora_rs.FormatError, "'ghost.weight' is said .*, but is nowhere")


def test_a_tensor_that_the_index_does_not_name_is_refused(sharded_folder):
    edit_index(sharded_folder, lambda weight_map: weight_map.pop("model.norm.weight"))
    assert_refused(sharded_folder, qlora_rs.FormatError, r"1 tensors .* are not in it.*model\.norm\.weight")


def test_a_missing_shard_is_named(sharded_folder):
    (sharded_folder / SECOND).unlink()
    assert_refused(sharded_folder, qlora_rs.FormatError, f"1 are missing: {SECOND}")


def test_a_shard_with_another_shards_tensors_is_refused(sharded_folder):
    first = sharded_folder / SECOND.replace("00002-of", "00001-of")
    (sharded_folder / SECOND).write_bytes(first.read_bytes())
    assert_refused(sharded_folder, qlora_rs.FormatError, "each tensor belongs in one file")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": 3}', "[" * 100_000, "\xff"])
def test_an_index_that_is_no_index_is_refused(sharded_folder, text):
    (sharded_folder / INDEX).write_bytes(text.encode("latin-1"))
    assert_refused(sharded_folder, qlora_rs.FormatError, INDEX)


def test_an_index_that_names_a_tensor_twice_is_refused(sharded_folder):
    path = sharded_folder / INDEX
    path.write_text(path.read_text().replace('"weight_map": {', f'"weight_map": {{"model.norm.weight": "{SECOND}", '))
    assert_refused(sharded_folder, qlora_rs.FormatError, r"'model\.norm\.weight' occurs twice")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("target", ["absent", "itself"])
def test_links_to_nowhere_are_refused_and_named(good_folder, name, target):
    (good_folder / name).unlink()
    (good_folder / name).symlink_to(name if target == "itself" else "absent")
    with pytest.raises((qlora_rs.FormatError, OSError), match=r"config\.json|model\.safetensors"):
        checkpoint.quantize(good_folder, good_folder.parent / "packed")
    assert [path.name for path in good_folder.parent.iterdir()] == ["source"]


def test_links_to_files_elsewhere_are_read_as_a_download_cache_has_them(good_folder, tmp_path):
    (tmp_path / "blobs").mkdir()
    file = good_folder / "model.safetensors"
    file.rename(tmp_path / "blobs" / "1234")
    file.symlink_to("../blobs/1234")
    (good_folder / "device").symlink_to("/dev/zero")
    report = checkpoint.quantize(good_folder, tmp_path / "packed")
    assert len(report.packed) == 7
    assert [(entry.name, entry.reason) for entry in report.left_out] == [("device", "not a regular file")]
    assert not any(path.is_symlink() for path in (tmp_path / "packed").iterdir())


def test_a_link_in_the_place_of_the_partial_folder_is_not_followed(good_folder, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "packed.partial").symlink_to("precious")
    with pytest.raises(FileExistsError, match="in the way"):
        checkpoint.quantize(good_folder, tmp_path / "packed")
    assert os.listdir(tmp_path / "precious") == []


@pytest.mark.parametrize("command", ["quantize", "convert", "verify", "diff"])
def test_a_shard_that_vanishes_is_named_whatever_reads_it(sharded_folder, monkeypatch, command):
    packed = sharded_folder.parent / "packed"
    checkpoint.quantize(sharded_folder, packed, qlora_rs.QuantSpec(block_size=32), max_shard_size=500)
    victim = sharded_folder / SECOND if command == "quantize" else sorted(packed.glob("*.safetensors"))[-1]
    opened = victim.with_suffix(".gone")
    module, name = {
        "quantize": (packing, "choose_tensors"),
        "convert": (conversion, "resolve_destination"),
        "verify": (verification, "SliceReader"),
        "diff": (comparison, "SliceReader"),
    }[command]
    original = getattr(module, name)

    def vanish(*arguments, **options):
        if victim.exists():
            victim.rename(opened)
        return original(*arguments, **options)

    monkeypatch.setattr(module, name, vanish)
    out = sharded_folder.parent / "out"
    calls = {
        "quantize": lambda: checkpoint.quantize(sharded_folder, out),
        "convert": lambda: checkpoint.convert(packed, out, "bf16"),
        "verify": lambda: checkpoint.verify(packed, sharded_folder),
        "diff": lambda: checkpoint.diff(packed, sharded_folder),
    }
    with pytest.raises((OSError, qlora_rs.FormatError), match=victim.name):
        calls[command]()
    assert not out.exists()


def test_an_index_of_pickles_is_refused(sharded_folder):
    (sharded_folder / "model.bin").write_bytes(b"")
    edit_index(sharded_folder, lambda weight_map: weight_map.update({"model.norm.weight": "model.bin"}))
    assert_refused(sharded_folder, qlora_rs.UnsupportedError, "only safetensors files are read")


@pytest.mark.parametrize("text", ["{", "[]", "7", "\xff"])
def test_a_config_that_is_no_object_is_refused(good_folder, text):
    (good_folder / "config.json").write_bytes(text.encode("latin-1"))
    assert_refused(good_folder, qlora_rs.FormatError, r"config\.json")


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("num_hidden_layers", 1 << 40, qlora_rs.FormatError),
        ("attention_bias", [7], qlora_rs.UnsupportedError),
        ("hidden_size", "eight", qlora_rs.UnsupportedError),
        ("hidden_size", 1 << 62, qlora_rs.UnsupportedError),
        ("model_type", 7, qlora_rs.UnsupportedError),
    ],
)
def test_settings_that_no_model_has_are_refused_at_once(good_folder, field, value, error):
    path = good_folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    assert_refused(good_folder, error, r"config\.json")


@pytest.mark.parametrize(
    ("model_type", "changes", "match"),
    [
        ("t5", {"num_layers": 10**8}, "num_layers is 100000000, but the files hold 11 tensors"),
        ("t5", {"num_decoder_layers": 10**8}, "num_decoder_layers is 100000000"),
        ("gpt2", {"n_layer": 10**8}, "n_layer is 100000000"),
        ("llama", {"num_labels": 10**11}, "num_labels is 100000000000"),
        ("llama", {"text_config": {"inner": {"num_hidden_layers": 10**8}}}, "num_hidden_layers is 100000000"),
        ("switch_transformers", {"num_experts": 10**8}, "more than 20000 parameters, but the files hold 11 tensors"),
    ],
)
def test_models_that_take_hours_to_build_are_refused_at_once(good_folder, model_type, changes, match):
    path = good_folder / "config.json"
    config = {**json.loads(path.read_text()), "model_type": model_type, "architectures": None, **changes}
    path.write_text(json.dumps(config))
    assert_refused(good_folder, qlora_rs.FormatError, match)
    if "parameters" not in match:
        with pytest.raises(qlora_rs.FormatError, match=match):
            qlora_rs.from_pretrained(good_folder)


def test_missing_parts_of_a_folder_are_named(good_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such model folder"):
        checkpoint.quantize(tmp_path / "absent", tmp_path / "packed")
    with pytest.raises(NotADirectoryError, match="not a model folder"):
        checkpoint.quantize(good_folder / "model.safetensors", tmp_path / "packed")
    (good_folder / "model.safetensors").rename(good_folder / "adapter_model.safetensors")
    assert_refused(good_folder, qlora_rs.FormatError, "neither model.safetensors nor model.safetensors.index")
    (good_folder / "adapter_model.safetensors").rename(good_folder / "pytorch_model.bin")
    assert_refused(good_folder, qlora_rs.UnsupportedError, "pytorch_model.bin and no safetensors file: conv")
    (good_folder / "pytorch_model.bin").unlink()
    assert_refused(good_folder, qlora_rs.FormatError, "there is no model.safetensors")
    (good_folder / "config.json").unlink()
    with pytest.raises(qlora_rs.FormatError, match=r"no config\.json"):
        checkpoint.quantize(good_folder, tmp_path / "packed")


def test_a_folder_or_a_pipe_in_place_of_a_file_is_refused(good_folder):
    (good_folder / "model.safetensors").unlink()
    (good_folder / "model.safetensors").mkdir()
    with pytest.raises(qlora_rs.FormatError, match="not a regular file"):
        checkpoint.quantize(good_folder, good_folder.parent / "packed")
    (good_folder / "model.safetensors").rmdir()
    os.mkfifo(good_folder / "model.safetensors")
    with pytest.raises(qlora_rs.FormatError, match="not a regular file"):
        checkpoint.quantize(good_folder, good_folder.parent / "packed")


def test_a_source_that_shrinks_while_it_is_read_is_noticed(sparse_folder):
    def shrink(done, total):
        os.truncate(sparse_folder / "model.safetensors", total // 2)

    with pytest.raises(qlora_rs.FormatError, match=r"model\.safetensors: changed while it was being read"):
        checkpoint.quantize(sparse_folder, sparse_folder.parent / "packed", progress=shrink)
    assert [path.name for path in sparse_folder.parent.iterdir()] == ["source"]


def test_a_source_that_is_written_to_while_it_is_read_is_noticed(sparse_folder):
    def touch(done, total):
        if done < total:
            os.utime(sparse_folder / "model.safetensors")

    with pytest.raises(qlora_rs.FormatError, match="changed while it was being read"):
        checkpoint.quantize(sparse_folder, sparse_folder.parent / "packed", progress=touch)


def test_interruption_in_the_middle_stops_at_once_and_leaves_no_output(sparse_folder):
    seen = []

    def interrupt(done, total):
        seen.append(done)
        if len(seen) == 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match=r"packed\.partial"):
        checkpoint.quantize(sparse_folder, sparse_folder.parent / "packed", progress=interrupt)
    assert 0 < seen[-1] < (sparse_folder / "model.safetensors").stat().st_size
    assert sorted(path.name for path in sparse_folder.parent.iterdir()) == ["packed.partial", "source"]


def test_a_full_disk_names_the_file_and_removes_what_was_written(good_folder):
    program = (
        "import sys\nfrom qlora_rs import checkpoint\n"
        "try:\n    checkpoint.quantize(sys.argv[1], sys.argv[2], include=['*_proj'])\n"
        "except OSError as error:\n    print(error.errno, error.filename)\n"
    )
    before = snapshot(good_folder)
    run = subprocess.run(
        [sys.executable, "-c", program, str(good_folder), str(good_folder.parent / "packed")],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)),
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert run.stdout.split()[0] == "27", run.stderr  # EFBIG, what a limit gives in place of ENOSPC
    assert run.stdout.split()[1].endswith("packed.partial/model.safetensors")
    assert snapshot(good_folder) == before
    assert [path.name for path in good_folder.parent.iterdir()] == ["source"]
