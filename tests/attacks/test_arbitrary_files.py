"""Arbitrary changes of files that Python reads: an error of ours or the system's that names a file, or a result."""

from __future__ import annotations

import json
import random
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_rs import QloraError, checkpoint
from qlora_rs.checkpoint.journal import JOURNAL, VERSION, Journal

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "bitsandbytes"
FEW = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
# What a program might take for a number, a size, a name or a path.
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=-(1 << 70), max_value=1 << 70),
    st.floats(),
    st.text(max_size=9),
    st.sampled_from(["../x.safetensors", "/dev/zero", "\0", "nf4", "bitsandbytes", "U8", ""]),
    st.lists(st.integers(min_value=-3, max_value=1 << 62), max_size=4),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


def changed(value: object, draw: st.DataObject) -> object:
    """The JSON value with one of its parts replaced, removed or named otherwise."""
    if isinstance(value, dict) and value and draw.draw(st.integers(0, 4)):
        key = draw.draw(st.sampled_from(sorted(value)))
        way = draw.draw(st.integers(0, 5))
        if way == 0:
            return {name: each for name, each in value.items() if name != key}
        if way == 1:
            return {**value, draw.draw(st.text(max_size=5)): value[key]}
        return {**value, key: changed(value[key], draw)}
    if isinstance(value, list) and value and draw.draw(st.integers(0, 3)):
        place = draw.draw(st.integers(0, len(value) - 1))
        return [*value[:place], changed(value[place], draw), *value[place + 1 :]]
    return draw.draw(ODD)


def read_all(folder: Path, out: Path) -> None:
    """Everything that reads a packed folder; each call may refuse it in its own way."""
    for read in (
        lambda: checkpoint.inspect(folder),
        lambda: checkpoint.verify(folder, GOLDEN / "source"),
        lambda: checkpoint.diff(folder, GOLDEN / "nf4"),
        lambda: checkpoint.convert(folder, out, "bf16"),
        lambda: checkpoint.convert(folder, out, "native"),
    ):
        # A ValueError is for a quantization_config that asks for what there is not.
        with suppress(QloraError, OSError):
            try:
                read()
            except ValueError as error:
                if not any(word in str(error) for word in ("block_size", "quant_type", "codebook")):
                    raise
        if out.exists():
            shutil.rmtree(out)
        assert not out.with_name("out.partial").exists()


@FEW
@given(draw=st.data())
def test_a_changed_quant_state_is_read_or_refused(tmp_path, draw) -> None:
    folder = tmp_path / "flat"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(GOLDEN / "nf4-double", folder)
    path = folder / "model.safetensors"
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    name = draw.draw(st.sampled_from([key for key in header if "quant_state" in key]))
    begin, end = header[name]["data_offsets"]
    state = json.loads(content[start + begin : start + end])
    text = json.dumps(changed(state, draw)).encode()
    size = end - begin
    # In place where it fits, as the offsets of all others depend on it: JSON may end in blanks.
    path.write_bytes(content[: start + begin] + text[:size].ljust(size) + content[start + end :])
    read_all(folder, tmp_path / "out")


@FEW
@given(draw=st.data())
@pytest.mark.parametrize("name", ["nf4-double", "nf4-double-sharded"])
def test_a_changed_header_index_or_config_is_read_or_refused(tmp_path, name, draw) -> None:
    folder = tmp_path / "flat"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(GOLDEN / name, folder)
    path = draw.draw(st.sampled_from(sorted(folder.iterdir())))
    if path.suffix == ".safetensors":
        content = path.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        text = json.dumps(changed(json.loads(content[8:start]), draw)).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[start:])
    else:
        path.write_text(json.dumps(changed(json.loads(path.read_text()), draw)))
    read_all(folder, tmp_path / "out")


@FEW
@given(seed=st.integers(0, 1 << 30))
def test_flipped_bits_anywhere_are_read_or_refused(tmp_path, seed) -> None:
    folder = tmp_path / "flat"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(GOLDEN / "fp4-double", folder)
    chance = random.Random(seed)
    path = chance.choice(sorted(folder.iterdir()))
    content = bytearray(path.read_bytes())
    for _ in range(chance.randint(1, 8)):
        content[chance.randrange(min(len(content), 6000))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)
    read_all(folder, tmp_path / "out")


KEYS = ["tensor", "file", "xxh3_128", "sha256"]


@FEW
@given(lines=st.lists(st.one_of(ODD, st.dictionaries(st.sampled_from(KEYS), ODD)), max_size=5))
def test_a_journal_of_anything_is_read_as_far_as_it_goes(tmp_path, lines) -> None:
    path = tmp_path / JOURNAL
    head = {"format_version": VERSION, "command": {}}
    path.write_text("\n".join(json.dumps(line) for line in [head, *lines]))
    journal = Journal.read(path)
    assert journal is not None
    assert all(isinstance(text, str) for pair in (*journal.tensors.items(), *journal.files.items()) for text in pair)
