"""The output folder is absent or whole, and nothing else is ever touched."""

from __future__ import annotations

import fcntl
import itertools
import os
import resource
import shutil
import signal

import pytest

import qlora_rs
from qlora_rs import _core, checkpoint
from qlora_rs.checkpoint import slices


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_an_existing_destination_is_refused_and_stays(make_model, tmp_path):
    source, target = make_model(), tmp_path / "packed"
    target.mkdir()
    (target / "config.json").write_text("old")
    with pytest.raises(FileExistsError, match="--overwrite"):
        checkpoint.quantize(source, target)
    assert names(target) == ["config.json"]


def test_overwrite_replaces_a_model_when_the_new_one_is_whole(make_model, tmp_path):
    source, target = make_model(), tmp_path / "packed"
    target.mkdir()
    (target / "config.json").write_text("old")
    (target / "stale.safetensors").write_bytes(b"")
    checkpoint.quantize(source, target, overwrite=True)
    assert names(target) == ["config.json", "model.safetensors"]
    assert names(tmp_path) == ["packed", "source"]


def test_overwrite_keeps_the_old_model_when_the_new_one_fails(make_model, tmp_path, monkeypatch):
    source, target = make_model(), tmp_path / "packed"
    checkpoint.quantize(source, target)
    before = (target / "model.safetensors").read_bytes()

    def fail(path, value):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("qlora_rs.checkpoint.packing.write_json", fail)
    with pytest.raises(OSError, match=r"No space left on device.*config\.json"):
        checkpoint.quantize(source, target, qlora_rs.QuantSpec("fp4"), overwrite=True)
    assert (target / "model.safetensors").read_bytes() == before
    assert names(tmp_path) == ["packed", "packed.partial", "source"]


def test_overwrite_restores_the_old_model_when_the_rename_fails(make_model, tmp_path, monkeypatch):
    source, target = make_model(), tmp_path / "packed"
    checkpoint.quantize(source, target)
    rename, calls = os.rename, []

    def second_fails(old, new):
        calls.append(new)
        if len(calls) == 2:
            raise OSError(5, "Input/output error", str(new))
        rename(old, new)

    monkeypatch.setattr(_core, "swap_paths", lambda a, b: False)  # where folders cannot change places in one step
    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(OSError, match="Input/output"):
        checkpoint.quantize(source, target, overwrite=True)
    assert names(target) == ["config.json", "model.safetensors"]
    assert names(tmp_path) == ["packed", "packed.partial", "source"]
    monkeypatch.undo()
    checkpoint.quantize(source, target, overwrite=True)
    assert names(tmp_path) == ["packed", "source"]


def test_overwrite_does_not_replace_what_is_no_model(make_model, tmp_path):
    source, target = make_model(), tmp_path / "home"
    target.mkdir()
    (target / "thesis.tex").write_text("precious")
    with pytest.raises(qlora_rs.UnsupportedError, match="holds no model"):
        checkpoint.quantize(source, target, overwrite=True)
    (tmp_path / "file").write_text("precious")
    with pytest.raises(NotADirectoryError, match="is no folder"):
        checkpoint.quantize(source, tmp_path / "file", overwrite=True)
    assert (target / "thesis.tex").read_text() == (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize("strayed", ["adapter_model.safetensors", "config.json"])
def test_a_file_of_a_model_among_other_things_does_not_give_them_up_to_overwrite(make_model, tmp_path, strayed):
    source, target = make_model(), tmp_path / "home"
    (target / "thesis").mkdir(parents=True)
    (target / "thesis" / "main.tex").write_text("precious")
    (target / strayed).write_bytes(b"")
    with pytest.raises(qlora_rs.UnsupportedError, match="holds no model"):
        checkpoint.quantize(source, target, overwrite=True)
    assert (target / "thesis" / "main.tex").read_text() == "precious"


@pytest.mark.parametrize("where", ["source", "source/packed", "source/../source/x", "link/packed", "."])
def test_a_destination_in_or_around_the_source_is_refused(make_model, tmp_path, where):
    source = make_model()
    (tmp_path / "link").symlink_to(source)
    before = names(source)
    with pytest.raises(qlora_rs.UnsupportedError, match="choose another"):
        checkpoint.quantize(source, tmp_path / where, overwrite=True)
    assert names(source) == before


def test_a_partial_folder_of_somebody_else_is_not_touched(make_model, tmp_path):
    source, partial = make_model(), tmp_path / "packed.partial"
    partial.mkdir()
    (partial / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="in the way"):
        checkpoint.quantize(source, tmp_path / "packed")
    assert names(partial) == ["notes.txt"]


def test_two_processes_do_not_write_one_destination(make_model, tmp_path):
    source, partial = make_model(), tmp_path / "packed.partial"
    partial.mkdir()
    lock = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(qlora_rs.UnsupportedError, match="another process"):
            checkpoint.quantize(source, tmp_path / "packed")
    finally:
        os.close(lock)
    assert names(partial) == []


def test_interruption_leaves_the_partial_folder_and_says_so(make_model, tmp_path):
    source = make_model()

    def interrupt(done, total):
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match=r"packed\.partial"):
        checkpoint.quantize(source, tmp_path / "packed", progress=interrupt)
    assert names(tmp_path) == ["packed.partial", "source"]
    checkpoint.quantize(source, tmp_path / "packed")
    assert names(tmp_path) == ["packed", "source"]


def test_a_failing_progress_callback_ends_the_work_and_removes_what_was_written(make_model, tmp_path):
    def fail(done, total):
        raise RuntimeError("no terminal")

    with pytest.raises(RuntimeError, match="no terminal"):
        checkpoint.quantize(make_model(), tmp_path / "packed", progress=fail)
    assert names(tmp_path) == ["source"]


def test_a_disk_that_is_too_small_is_noticed_before_the_work(make_model, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OSError, match=r"needed for the output, 1\.00 kB are free") as caught:
        checkpoint.quantize(make_model(), tmp_path / "packed")
    assert caught.value.errno == 28
    assert caught.value.filename == str(tmp_path)
    assert names(tmp_path) == ["source"]


def test_a_file_system_that_tells_no_size_is_no_full_one(make_model, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(total=0, used=0, free=0))
    checkpoint.quantize(make_model(), tmp_path / "packed")
    assert names(tmp_path) == ["packed", "source"]


@pytest.fixture
def few_files():
    """Let this process open only so many files more than it has now."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)

    def limit(more: int) -> None:
        # A new descriptor is the lowest number that is free, and has to be below the limit.
        used = {int(name) for name in os.listdir("/proc/self/fd")}
        free = (number for number in itertools.count() if number not in used)
        *_, last = itertools.islice(free, more)
        resource.setrlimit(resource.RLIMIT_NOFILE, (last + 1, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_folders_of_more_files_than_a_process_may_open(make_model, tmp_path, monkeypatch, few_files):
    source = make_model(shards=21)
    assert len(list(source.glob("*.safetensors"))) == 21
    checkpoint.quantize(source, tmp_path / "expected")
    monkeypatch.setattr(slices, "MOST_OPEN", 3)
    few_files(14)
    checkpoint.quantize(source, tmp_path / "packed")
    file = "model.safetensors"
    assert (tmp_path / "packed" / file).read_bytes() == (tmp_path / "expected" / file).read_bytes()
    assert checkpoint.verify(tmp_path / "packed", source).same
    assert checkpoint.diff(source, source).same
    assert not checkpoint.diff(source, tmp_path / "packed").same
    checkpoint.convert(tmp_path / "packed", tmp_path / "plain", "bf16", max_shard_size=3000)
    assert len(list((tmp_path / "plain").glob("*.safetensors"))) > 14


def test_missing_parents_of_the_destination_are_made(make_model, tmp_path):
    checkpoint.quantize(make_model(), tmp_path / "a" / "b" / "packed")
    assert names(tmp_path / "a" / "b") == ["packed"]
