"""An interrupted quantize goes on where it was, to the bytes of an uninterrupted one; another command is refused."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch

import qlora_rs
from qlora_rs import QuantSpec, _core, checkpoint
from qlora_rs.checkpoint.journal import JOURNAL

OPTIONS = {"slice_bytes": 900, "max_shard_size": 30_000}


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def interrupted(make_model, tmp_path):
    """A function that stops quantizing once ``count`` tensors are finished, and returns source and partial folder."""

    def stop(count: int = 20, **options):
        source, partial = make_model(shards=3), tmp_path / "packed.partial"
        (source / "tokenizer.json").write_text("{}")

        def interrupt(done, total):
            if (partial / JOURNAL).read_text().count("\n") > count:
                signal.raise_signal(signal.SIGINT)

        with pytest.raises(KeyboardInterrupt, match=r"packed\.partial; the same command resumes it"):
            checkpoint.quantize(source, tmp_path / "packed", progress=interrupt, **{**OPTIONS, **options})
        return source, partial

    return stop


@pytest.fixture
def watched(monkeypatch):
    """What is handed to the extension as finished."""
    seen = []
    pack = _core.pack_checkpoint

    def watch(spec, **arguments):
        if arguments["destination"]:
            seen.append((dict(arguments["finished_tensors"]), dict(arguments["finished_files"])))
        return pack(spec, **arguments)

    monkeypatch.setattr(_core, "pack_checkpoint", watch)
    return seen


def cut_journal(partial, lines):
    """As if the run had been killed after so many lines, in the middle of the next."""
    path = partial / JOURNAL
    text = path.read_text().splitlines(keepends=True)
    path.write_text("".join(text[: 1 + lines]) + text[-1][:17])


def finish_all(source, target, spec=None, **options):
    """A partial folder in which everything but the commit is done."""

    def stop(*arguments):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qlora_rs.checkpoint.partial._commit", stop)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.quantize(source, target, spec, **(options or OPTIONS))
    return target.with_name(f"{target.name}.partial")


@pytest.mark.parametrize("spec", [QuantSpec(), QuantSpec("int8", 32, False)], ids=QuantSpec.describe)
@pytest.mark.parametrize("lines", [0, 1, 7, 13, 22, 24])
def test_a_resumed_run_writes_the_bytes_of_an_uninterrupted_one(make_model, tmp_path, watched, spec, lines):
    source = make_model(shards=3)
    (source / "tokenizer.json").write_text("{}")
    checkpoint.quantize(source, tmp_path / "expected", spec, **OPTIONS)
    partial = finish_all(source, tmp_path / "packed", spec)
    cut_journal(partial, lines)
    for file in partial.glob("*.safetensors"):
        data = bytearray(file.read_bytes())
        header = 8 + int.from_bytes(data[:8], "little")
        data[:header] = bytes(header)  # headers come last
        file.write_bytes(data)
    report = checkpoint.quantize(source, tmp_path / "packed", spec, **OPTIONS)
    assert content(tmp_path / "packed") == content(tmp_path / "expected")
    assert sum(map(len, watched[-1])) == lines
    assert report.notes == (
        f"{partial} of an interrupted run was resumed: {len(watched[-1][0])} tensors were finished",
    )
    assert sorted(os.listdir(tmp_path)) == ["expected", "packed", "source"]


def test_what_an_interruption_leaves_is_resumed(interrupted, tmp_path):
    source, partial = interrupted(0)
    assert sorted(os.listdir(tmp_path)) == ["packed.partial", "source"]
    checkpoint.quantize(source, tmp_path / "packed", **OPTIONS)
    checkpoint.quantize(source, tmp_path / "expected", **OPTIONS)
    assert content(tmp_path / "packed") == content(tmp_path / "expected")
    assert not partial.exists()


def test_finished_source_files_are_not_read_again(make_model, tmp_path, monkeypatch):
    source = make_model(shards=3)
    partial = finish_all(source, tmp_path / "packed")
    journal = [json.loads(line) for line in (partial / JOURNAL).read_text().splitlines()]
    # They are read side by side, and end in any order.
    first, second, third = (source / entry["file"] for entry in journal if "file" in entry)
    assert sorted([first, second, third]) == sorted(source.glob("*.safetensors"))
    stamps = {path: path.stat() for path in (first, second)}
    for path, status in stamps.items():  # what is read would be noticed to be another file's
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    cut_journal(partial, [entry.get("file") for entry in journal].index(second.name))
    checkpoint.quantize(source, tmp_path / "packed", **OPTIONS)
    report = checkpoint.verify(tmp_path / "packed", source)
    assert {file.file: file.same for file in report.files} == {first.name: False, second.name: False, third.name: True}


@pytest.mark.parametrize("damage", ["flipped", "cut", "absent", "linked"])
def test_damaged_output_is_made_again(make_model, tmp_path, damage):
    source = make_model(shards=2)
    checkpoint.quantize(source, tmp_path / "expected", **OPTIONS)
    partial = finish_all(source, tmp_path / "packed")
    file = sorted(partial.glob("*.safetensors"))[1]
    data = bytearray(file.read_bytes())
    if damage == "flipped":
        data[-5] ^= 16
        file.write_bytes(data)
    elif damage == "cut":
        file.write_bytes(data[:-100])
    else:
        file.unlink()
    if damage == "linked":
        (tmp_path / "precious").write_bytes(data[:50])
        file.symlink_to(tmp_path / "precious")
    checkpoint.quantize(source, tmp_path / "packed", **OPTIONS)
    assert content(tmp_path / "packed") == content(tmp_path / "expected")
    if damage == "linked":
        assert (tmp_path / "precious").read_bytes() == data[:50]


def test_a_file_with_another_name_elsewhere_is_not_written_on(make_model, tmp_path):
    source = make_model()
    partial = finish_all(source, tmp_path / "packed")
    file = next(iter(partial.glob("*.safetensors")))
    os.link(file, tmp_path / "precious")
    before = (tmp_path / "precious").read_bytes()
    cut_journal(partial, 0)
    file.write_bytes(b"")
    (tmp_path / "precious").write_bytes(before)
    checkpoint.quantize(source, tmp_path / "packed", **OPTIONS)
    assert (tmp_path / "precious").read_bytes() == before
    assert (tmp_path / "packed" / file.name).stat().st_nlink == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spec": QuantSpec("fp4")}, r'spec quant_type was "nf4", now "fp4"'),
        ({"spec": QuantSpec(block_size=128)}, "spec block_size was 64, now 128"),
        ({"skip_modules": ["up_proj"]}, r'packed was .*; skip was \[\], now \["up_proj"\]'),
        ({"max_shard_size": 31_000}, "max_shard_size was 30000, now 31000"),
    ],
)
def test_another_command_is_refused_and_says_what_differs(interrupted, tmp_path, options, message):
    source, partial = interrupted()
    before = content(partial)
    with pytest.raises(qlora_rs.UnsupportedError, match=f"unfinished output of another command: .*{message}"):
        checkpoint.quantize(source, tmp_path / "packed", **{**OPTIONS, **options})
    assert content(partial) == before
    assert not (tmp_path / "packed").exists()


def test_another_source_and_a_changed_one_are_refused(interrupted, make_model, tmp_path):
    source, partial = interrupted()
    other = make_model(shards=3, name="other")
    with pytest.raises(qlora_rs.UnsupportedError, match=r"source folder was .*source\", now .*other\""):
        checkpoint.quantize(other, tmp_path / "packed", **OPTIONS)
    os.utime(source / "model-00002-of-00003.safetensors")
    with pytest.raises(
        qlora_rs.UnsupportedError, match=r"source model-00002-of-00003\.safetensors was \"\d+ bytes, ch"
    ):
        checkpoint.quantize(source, tmp_path / "packed", **OPTIONS)
    assert partial.exists()


def test_another_command_of_another_name_is_refused(interrupted, tmp_path):
    source, _ = interrupted()
    checkpoint.quantize(source, tmp_path / "native")
    with pytest.raises(qlora_rs.UnsupportedError, match='command was "quantize", now "convert"'):
        checkpoint.convert(tmp_path / "native", tmp_path / "packed", "bf16")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"format_version": 3}', '{"format_version": 3, "command": 7}', "[" * 100_000, "\xff"],
)
def test_a_journal_that_is_none_makes_the_folder_somebody_elses(make_model, tmp_path, text):
    source, partial = make_model(), tmp_path / "packed.partial"
    partial.mkdir()
    (partial / JOURNAL).write_bytes(text.encode("latin-1"))
    (partial / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="in the way"):
        checkpoint.quantize(source, tmp_path / "packed")
    assert (partial / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("version", [2, 4])
def test_what_another_version_left_is_refused_and_says_so(interrupted, tmp_path, version):
    source, partial = interrupted()
    head, *lines = (partial / JOURNAL).read_text().splitlines()
    # As version 2 wrote it.
    text = "\n".join([json.dumps({**json.loads(head), "format_version": version}), *lines])
    (partial / JOURNAL).write_text(text.replace("xxh3_128", "sha256"))
    before = content(partial)
    message = rf"another version of qlora-rs, .* format {version}, and not 3 .* remove .*packed\.partial"
    with pytest.raises(qlora_rs.UnsupportedError, match=message):
        checkpoint.quantize(source, tmp_path / "packed", **OPTIONS)
    assert content(partial) == before
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize(
    "line",
    [
        "7",
        "{}",
        '{"tensor": 7, "xxh3_128": "0"}',
        '{"tensor": "model.norm.weight", "xxh3_128": null}',
        '{"tensor": "model.norm.weight", "sha256": "0"}',
        "\xff",
        "{" * 9000,
    ],
)
def test_a_line_that_is_none_ends_the_journal(make_model, tmp_path, watched, line):
    source = make_model()
    checkpoint.quantize(source, tmp_path / "expected", **OPTIONS)
    partial = finish_all(source, tmp_path / "packed")
    lines = (partial / JOURNAL).read_bytes().splitlines()
    lines[3] = line.encode("latin-1")
    (partial / JOURNAL).write_bytes(b"\n".join(lines))
    checkpoint.quantize(source, tmp_path / "packed", **OPTIONS)
    assert len(watched[-1][0]) == 2
    assert content(tmp_path / "packed") == content(tmp_path / "expected")


def test_wrong_hashes_and_unknown_names_are_not_believed(make_model, tmp_path):
    source = make_model()
    checkpoint.quantize(source, tmp_path / "expected", **OPTIONS)
    partial = finish_all(source, tmp_path / "packed")
    lines = [json.loads(line) for line in (partial / JOURNAL).read_text().splitlines()]
    for entry in lines[1:]:
        if "tensor" in entry:
            entry["xxh3_128"] = lines[1]["xxh3_128"]
    lines.append({"tensor": "ghost", "xxh3_128": "0"})
    (partial / JOURNAL).write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    checkpoint.quantize(source, tmp_path / "packed", **OPTIONS)
    assert content(tmp_path / "packed") == content(tmp_path / "expected")


def test_leftovers_that_are_no_weights_are_cleared(interrupted, tmp_path):
    source, partial = interrupted()
    (partial / "tokenizer.json").write_text("half")
    (partial / "config.json").symlink_to(source / "config.json")
    (partial / "sub").mkdir()
    (partial / "sub" / "stale").write_text("")
    (partial / "model-00009-of-00009.safetensors").write_text("stale")
    checkpoint.quantize(source, tmp_path / "packed", **OPTIONS)
    checkpoint.quantize(source, tmp_path / "expected", **OPTIONS)
    assert content(tmp_path / "packed") == content(tmp_path / "expected")


@pytest.mark.parametrize("swaps", [True, False])
@pytest.mark.parametrize(("overwrite", "step"), [*((False, n) for n in range(3)), *((True, n) for n in range(4))])
def test_a_kill_between_the_steps_of_the_commit_loses_nothing(
    make_model, tmp_path, monkeypatch, can_swap, step, overwrite, swaps
):
    source, target = make_model(), tmp_path / "packed"
    checkpoint.quantize(source, tmp_path / "expected")
    if overwrite:
        checkpoint.quantize(source, target, QuantSpec("fp4"))
    calls = 0

    class Kill(BaseException):
        pass

    def dying(function):
        def call(*arguments):
            nonlocal calls
            if calls >= step:
                raise Kill  # from here on nothing happens any more
            calls += 1
            return function(*arguments)

        return call

    with monkeypatch.context() as patch:
        commit = qlora_rs.checkpoint.partial._commit

        def commit_until(*arguments):
            for name in ("rename", "replace"):
                patch.setattr(os, name, dying(getattr(os, name)))
            swap = _core.swap_paths if swaps else lambda a, b: False
            patch.setattr(_core, "swap_paths", dying(swap) if swaps else swap)
            patch.setattr("pathlib.Path.unlink", dying(type(target).unlink))
            patch.setattr("shutil.rmtree", lambda *arguments, **options: None)
            commit(*arguments)

        patch.setattr("qlora_rs.checkpoint.partial._commit", commit_until)
        with pytest.raises(Kill):
            checkpoint.quantize(source, target, overwrite=overwrite)
    old = (target / "model.safetensors").read_bytes() if target.exists() else None
    expected = (tmp_path / "expected" / "model.safetensors").read_bytes()
    if not overwrite:
        assert old in (None, expected)
    elif swaps and can_swap:
        assert old is not None
    if old != expected:
        checkpoint.quantize(source, target, overwrite=overwrite)
    else:
        checkpoint.quantize(source, target, overwrite=True)
    assert content(target) == content(tmp_path / "expected")
    assert sorted(os.listdir(tmp_path)) == ["expected", "packed", "source"]


def test_a_full_disk_leaves_what_is_finished_for_the_same_command(make_model, tmp_path, monkeypatch):
    source = make_model()

    def full(path, value):
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("qlora_rs.checkpoint.packing.write_json", full)
        with pytest.raises(OSError, match=r"No space left .*packed\.partial; the same command resumes it") as caught:
            checkpoint.quantize(source, tmp_path / "packed")
    assert caught.value.errno == 28
    assert caught.value.filename.endswith("config.json")
    report = checkpoint.quantize(source, tmp_path / "packed")
    assert "21 tensors were finished" in report.notes[0]


@pytest.mark.parametrize("overwrite", [False, True])
def test_ctrl_c_at_the_moment_that_the_output_gets_its_name_is_no_failure_of_the_disk(
    make_model, tmp_path, monkeypatch, overwrite
):
    source, rename = make_model(), os.rename
    checkpoint.quantize(source, tmp_path / "expected")

    def interrupted(old, new):
        rename(old, new)
        if os.fspath(new) == os.fspath(tmp_path / "packed"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.quantize(source, tmp_path / "packed", overwrite=overwrite)
    assert content(tmp_path / "packed") == content(tmp_path / "expected")
    checkpoint.quantize(source, tmp_path / "packed", overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["expected", "packed", "source"]


def test_space_that_the_unfinished_output_holds_is_not_asked_for_again(make_model, tmp_path, monkeypatch):
    import shutil

    source = make_model()
    finish_all(source, tmp_path / "packed")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=5000))
    checkpoint.quantize(source, tmp_path / "packed", **OPTIONS)


def test_a_weight_without_elements_does_not_take_what_another_run_left(write_tensors, tmp_path):
    tensors = {"a.up.weight": torch.zeros(3, 0, 5), "b.up.weight": torch.ones(3, 70)}
    source = write_tensors(tmp_path / "source", tensors, model_type="unknown")
    checkpoint.quantize(source, tmp_path / "expected", include=["up"])
    options = {"include": ["up"]}
    file = finish_all(source, tmp_path / "packed", **options) / "model.safetensors"
    file.write_bytes(b"\xff" * file.stat().st_size)
    checkpoint.quantize(source, tmp_path / "packed", **options)
    assert content(tmp_path / "packed") == content(tmp_path / "expected")
