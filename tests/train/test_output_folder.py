"""`qlora_rs.train.folder`: what may be written where."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_rs.errors import UnsupportedError
from qlora_rs.train.folder import FILES, check_output, claimed
from qlora_rs.train.options import TrainOptions


@pytest.fixture
def options(tmp_path: Path) -> Callable[..., TrainOptions]:
    (tmp_path / "model").mkdir()

    def make(output: str = "out", **changes: Any) -> TrainOptions:
        data = changes.pop("data", "data.jsonl")
        return TrainOptions(model=tmp_path / "model", data=tmp_path / data, output=tmp_path / output, **changes)

    return make


def test_absent_and_empty_folders_are_free(options, tmp_path):
    check_output(options())
    check_output(options("deep/in/it"))
    (tmp_path / "out").mkdir()
    check_output(options())


def test_a_folder_with_anything_in_it_is_refused_without_overwrite(options, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").touch()
    with pytest.raises(FileExistsError, match="exists and is not empty: choose another, or --overwrite"):
        check_output(options())
    check_output(options(overwrite=True))
    (tmp_path / "out" / "training_state.safetensors").touch()
    with pytest.raises(FileExistsError, match="--resume goes on with the run in it, --overwrite replaces that"):
        check_output(options())
    check_output(options(resume=True))


def test_what_a_run_left_that_saved_nothing_is_no_hindrance(options, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "log.jsonl").touch()
    (tmp_path / "out" / "adapter_model.safetensors.partial").touch()
    check_output(options())


@pytest.mark.parametrize("output", ["model", "model/adapter", "link", "link/adapter"])
@pytest.mark.parametrize("choice", [{}, {"overwrite": True}, {"resume": True}])
def test_the_models_folder_is_never_written(options, tmp_path, output, choice):
    (tmp_path / "link").symlink_to("model")
    with pytest.raises(UnsupportedError, match=r"lies in the model's folder .* which is only read"):
        check_output(options(output, **choice))


def test_data_that_the_run_would_replace_is_refused(options, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "log.jsonl").touch()
    with pytest.raises(UnsupportedError, match=r"is where the run would write its own log\.jsonl"):
        check_output(options(data="out/log.jsonl", overwrite=True))


def test_a_file_in_the_way_is_named(options, tmp_path):
    (tmp_path / "out").touch()
    for output in ("out", "out/adapter"):
        with pytest.raises(NotADirectoryError) as caught:
            check_output(options(output, overwrite=True))
        assert caught.value.filename == str(tmp_path / "out")


def test_a_folder_that_may_not_be_written_is_told_before_the_work(options, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(PermissionError, match="may not be written to"):
        check_output(options())


def test_there_must_be_something_to_resume(options):
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        check_output(options(resume=True))


def test_a_new_run_clears_what_an_old_one_left_but_its_adapter_and_files_of_others(tmp_path):
    for name in (*FILES, "loss.png.partial", "notes.txt"):
        (tmp_path / name).touch()
    with claimed(tmp_path, resume=False):
        pass
    assert sorted(os.listdir(tmp_path)) == ["adapter_config.json", "adapter_model.safetensors", "notes.txt"]


def test_a_resumed_run_keeps_everything_but_half_written_files(tmp_path):
    for name in (*FILES, "training_state.safetensors.partial"):
        (tmp_path / name).touch()
    with claimed(tmp_path, resume=True):
        pass
    assert sorted(os.listdir(tmp_path)) == sorted(FILES)


def test_two_runs_into_one_folder_are_refused_and_the_first_is_not_harmed(tmp_path):
    with claimed(tmp_path, resume=False):
        (tmp_path / "log.jsonl").touch()
        with (
            pytest.raises(UnsupportedError, match="another process is training into it"),
            claimed(tmp_path, resume=False),
        ):
            pass
        assert (tmp_path / "log.jsonl").exists()
    with claimed(tmp_path, resume=False):
        pass


def test_a_file_system_without_locks_is_good_enough(tmp_path, monkeypatch):
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with claimed(tmp_path / "new", resume=False):
        assert (tmp_path / "new").is_dir()
