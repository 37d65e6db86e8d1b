"""Training on a GGUF file: what it stands for is quantized on the way in, its tokenizer encodes the data."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_rs import UnsupportedError, checkpoint
from qlora_rs.train import TrainReport


def write_gguf(make_tiny_llama: Callable[..., Path], folder: Path, seed: int) -> Path:
    """A file whose tokenizer merges, as transformers wants it."""
    source = make_tiny_llama(folder / "source", vocab_size=260, seed=seed)
    content = json.loads((source / "tokenizer.json").read_text())
    content["model"]["merges"].append(["A", "f"])
    content["model"]["vocab"]["Af"] = 259
    (source / "tokenizer.json").write_text(json.dumps(content))
    checkpoint.convert(source, folder / "tiny.gguf", "gguf", output_type="bf16")
    return folder / "tiny.gguf"


@pytest.fixture(scope="module")
def gguf_file(make_tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(make_tiny_llama, tmp_path_factory.mktemp("gguf"), seed=0)


def test_the_adapter_is_that_over_the_packed_folder_made_of_the_file(
    gguf_file: Path, fine_tune: Callable[..., TrainReport], tmp_path: Path, adapter_bytes: Callable[[Path], bytes]
) -> None:
    checkpoint.quantize(gguf_file, tmp_path / "packed")
    messages: list[str] = []
    report = fine_tune("from-file", model=gguf_file, steps=3, on_message=messages.append)
    fine_tune("from-folder", model=tmp_path / "packed", steps=3)
    assert report.first_loss is not None
    assert adapter_bytes(tmp_path / "from-file") == adapter_bytes(tmp_path / "from-folder")
    assert any("quantized on the way in" in message for message in messages)
    assert str(gguf_file) in (tmp_path / "from-file" / "adapter_config.json").read_text()


def test_a_run_goes_on_with_the_same_file_and_with_no_other(
    gguf_file: Path,
    fine_tune: Callable[..., TrainReport],
    make_tiny_llama: Callable[..., Path],
    tmp_path: Path,
    adapter_bytes: Callable[[Path], bytes],
) -> None:
    shutil.copy(gguf_file, tmp_path / "model.gguf")
    settings = {"model": tmp_path / "model.gguf", "steps": 4, "save_every": 2}

    class Stop(Exception):
        pass

    def stop(entry: object, steps: int) -> None:
        if getattr(entry, "step", 0) == 3:
            raise Stop

    with pytest.raises(Stop):
        fine_tune("stopped", on_step=stop, **settings)
    shutil.copytree(tmp_path / "stopped", tmp_path / "other")
    fine_tune("stopped", resume=True, **settings)
    fine_tune("whole", **settings)
    assert adapter_bytes(tmp_path / "stopped") == adapter_bytes(tmp_path / "whole")
    shutil.move(write_gguf(make_tiny_llama, tmp_path / "another", seed=9), tmp_path / "model.gguf")
    with pytest.raises(UnsupportedError, match="the model of --model has changed"):
        fine_tune("other", resume=True, **settings)
