"""`--overwrite`: the new folder takes the old one's place in one step, and what is whole stays whole."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from qlora_rs import QuantSpec
from qlora_rs.checkpoint import convert, inspect, partial, quantize


@pytest.fixture
def packed(make_model, tmp_path) -> tuple[Path, Path]:
    """A source, and a packed folder to be replaced."""
    source = make_model()
    quantize(source, tmp_path / "packed", QuantSpec("int8"))
    return source, tmp_path / "packed"


def left_beside(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder.parent) if name.startswith((f"{folder.name}.", f".{folder.name}."))]


def test_there_is_no_moment_without_the_folder(packed, can_swap) -> None:
    source, folder = packed
    if not can_swap:
        pytest.skip("the file system cannot let folders change places in one step")
    done, absent, looks = threading.Event(), [], 0

    def watch() -> None:
        nonlocal looks
        while not done.is_set():
            looks += 1
            if not (folder / "config.json").exists():
                absent.append(looks)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        for spec in [QuantSpec(), QuantSpec("int8")] * 10:
            quantize(source, folder, spec, overwrite=True)
    finally:
        done.set()
        thread.join()
    assert looks > 100
    assert absent == []
    assert inspect(folder).spec == QuantSpec("int8")
    assert left_beside(folder) == []


@pytest.mark.parametrize("swaps", [True, False])
def test_the_new_folder_is_there_and_nothing_else(packed, tmp_path, monkeypatch, swaps) -> None:
    source, folder = packed
    if not swaps:
        monkeypatch.setattr(partial._core, "swap_paths", lambda a, b: False)
    (folder / "of the old one.txt").write_text("old")
    quantize(source, folder, overwrite=True)
    assert inspect(folder).spec == QuantSpec()
    assert not (folder / "of the old one.txt").exists()
    assert left_beside(folder) == []


@pytest.mark.parametrize("swaps", [True, False])
def test_a_failure_leaves_the_old_folder_and_the_same_command_finishes(packed, monkeypatch, swaps) -> None:
    source, folder = packed
    old = (folder / "model.safetensors").read_bytes()

    def fail(*paths: object) -> bool:
        raise OSError(errno.EIO, "broken", str(paths[0]))

    with monkeypatch.context() as patch:
        if swaps:
            patch.setattr(partial._core, "swap_paths", fail)
        else:
            patch.setattr(partial._core, "swap_paths", lambda a, b: False)
            rename = os.rename
            patch.setattr(partial.os, "rename", lambda a, b: fail(a) if str(a).endswith(".partial") else rename(a, b))
        with pytest.raises(OSError, match="broken"):
            quantize(source, folder, overwrite=True)
    assert (folder / "model.safetensors").read_bytes() == old
    report = quantize(source, folder, overwrite=True)
    assert any("was resumed" in note for note in report.notes)
    assert inspect(folder).spec == QuantSpec()
    assert left_beside(folder) == []


def test_killed_between_change_and_clearing_the_new_folder_is_whole_and_the_old_one_goes(packed, monkeypatch) -> None:
    source, folder = packed

    class Killed(BaseException):
        pass

    def kill(path: Path, aside: Path) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(partial, "_put_aside", kill)
        patch.setattr(partial.shutil, "rmtree", lambda *arguments, **options: None)  # a killed process clears nothing
        with pytest.raises(Killed):
            quantize(source, folder, overwrite=True)
    if "packed.partial" not in left_beside(folder):
        pytest.skip("the file system cannot let folders change places in one step")
    assert inspect(folder).spec == QuantSpec()
    quantize(source, folder, overwrite=True)
    assert inspect(folder).spec == QuantSpec()
    assert left_beside(folder) == []


def test_converted_folders_are_replaced_alike(packed, tmp_path) -> None:
    _, folder = packed
    convert(folder, tmp_path / "plain", "bf16")
    convert(folder, tmp_path / "plain", "fp16", overwrite=True)
    assert {row.dtype for row in inspect(tmp_path / "plain").tensors} == {"F16"}
    assert left_beside(tmp_path / "plain") == []
