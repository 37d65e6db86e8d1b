"""Damaged or strange GPTQ, AWQ and compressed-tensors folders: a clear error, and no output."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_rs import FormatError, UnsupportedError, from_pretrained
from qlora_rs.checkpoint import convert, inspect, open_weights, quantize

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "foreign"
GPTQ, ORDERED, AWQ = "gptq-4bit-g32-sym", "gptq-4bit-g32-asym-act-order", "awq-g32"
CT, ASYMMETRIC, CT_ORDERED = "ct-int4-g32-sym", "ct-int4-g32-asym", "ct-int4-g32-sym-act-order"
DOWN = "model.layers.0.mlp.down_proj"  # [64, 96]

Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors, dict[str, Any]], None]


def without(part: str) -> Change:
    def change(tensors: Tensors, config: dict[str, Any]) -> None:
        del tensors[f"{DOWN}.{part}"]

    return change


def stored(part: str, edit: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    def change(tensors: Tensors, config: dict[str, Any]) -> None:
        tensors[f"{DOWN}.{part}"] = edit(tensors[f"{DOWN}.{part}"]).contiguous()

    return change


def says(**fields: object) -> Change:
    """Other fields of ``quantization_config``; ... removes one."""

    def change(tensors: Tensors, config: dict[str, Any]) -> None:
        for key, value in fields.items():
            if value is ...:
                del config[key]
            else:
                config[key] = value

    return change


def weights_say(**fields: object) -> Change:
    def change(tensors: Tensors, config: dict[str, Any]) -> None:
        config["config_groups"]["group_0"]["weights"] |= fields

    return change


def at(index: int, value: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def edit(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor[index] = value
        return tensor

    return edit


def also(name: str, tensor: torch.Tensor) -> Change:
    def change(tensors: Tensors, config: dict[str, Any]) -> None:
        tensors[name] = tensor

    return change


@pytest.fixture
def altered(tmp_path):
    def alter(name: str, change: Change) -> Path:
        folder = tmp_path / "altered"
        shutil.copytree(GOLDEN / name, folder)
        tensors = load_file(folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text())
        change(tensors, config["quantization_config"])
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return alter


def assert_refused(folder: Path, error: type[Exception], message: str) -> None:
    before = sorted(os.listdir(folder.parent))
    with pytest.raises(error, match=message):
        convert(folder, folder.parent / "out", "fp16")
    assert sorted(os.listdir(folder.parent)) == before


HEADERS = {
    "no qzeros": (GPTQ, without("qzeros"), r"quantized weight that lacks model\.layers\.0\.mlp\.down_proj\.qzeros"),
    "no scales": (AWQ, without("scales"), "lacks .*down_proj.scales"),
    "no codes": (AWQ, without("qweight"), "lacks .*down_proj.qweight"),
    "no shape": (CT, without("weight_shape"), "lacks .*down_proj.weight_shape"),
    "scales of activations": (AWQ, also("model.layers.0.mlp.act.scales", torch.ones(96)), "lacks .*act.qweight"),
    "a float weight too": (GPTQ, also(f"{DOWN}.weight", torch.ones(64, 96)), "is a weight that .* holds once more"),
    "a word less of codes": (GPTQ, stored("qweight", lambda t: t[:-1]), "expected I32.*4 bits of .64, 88.*got"),
    "a row more of codes": (ORDERED, stored("qweight", lambda t: t.repeat(2, 1)), "expected I32.*got I32 .24, 64"),
    "codes of 64 bits": (GPTQ, stored("qweight", torch.Tensor.long), "expected a matrix of I32, got I64"),
    "codes in one row": (CT, stored("weight_packed", torch.flatten), "expected a matrix of I32, got I32 .768"),
    "no codes at all": (CT, stored("weight_packed", lambda t: t[:0]), "expected a matrix of I32"),
    "integer scales": (GPTQ, stored("scales", torch.Tensor.int), "expected a matrix of F32 or BF16 or F16, got I32"),
    "scales of fewer rows": (AWQ, stored("scales", lambda t: t[:, :-8]), "expected F32 or BF16 or F16 .3, 64"),
    "a group less of scales": (GPTQ, stored("scales", lambda t: t[:-1]), "qzeros': expected I32 .2, 8"),
    "a group less": (
        GPTQ,
        lambda tensors, config: [stored(part, lambda t: t[:-1])(tensors, config) for part in ("scales", "qzeros")],
        "has 2 groups; 96 columns in groups of 32 are 3",
    ),
    "zero points by rows": (AWQ, stored("qzeros", lambda t: t.T), "qzeros': expected I32 .3, 8. .* got I32 .8, 3"),
    "float indices": (ORDERED, stored("g_idx", torch.Tensor.float), "g_idx': expected I32 or I64 .96"),
    "too many indices": (ORDERED, stored("g_idx", lambda t: t.repeat(2)), "g_idx': expected I32 or I64 .96"),
    "no indices": (ORDERED, without("g_idx"), "desc_act asks for .*g_idx, which no file holds"),
    "another shape": (CT, stored("weight_shape", at(1, 95)), "none of the schemes in config.json"),
    "a huge shape": (CT, stored("weight_shape", at(1, 1 << 62)), "none of the schemes in config.json"),
    "a negative shape": (CT, stored("weight_shape", at(0, -64)), r"says \[-64, 96\], but .* has 64 rows"),
    "a shape of three": (CT, stored("weight_shape", lambda t: torch.ones(3).long()), "for the shape of a matrix"),
    "asked asymmetric": (CT, weights_say(symmetric=False), "and no zero points is none of the schemes"),
    "asked 8 bits": (CT, weights_say(num_bits=8), "none of the schemes in config.json"),
    "asked other groups": (CT, weights_say(group_size=64), "none of the schemes in config.json"),
    "zero points cut": (ASYMMETRIC, stored("weight_zero_point", lambda t: t[:-1]), "zero_point': expected I32 .8, 3"),
    "int8 zero points": (ASYMMETRIC, stored("weight_zero_point", torch.Tensor.char), "expected I32 .8, 3. .* got I8"),
    "bits of text": (GPTQ, says(bits="4"), "bits is '4', not an integer"),
    "bits left out": (GPTQ, says(bits=...), "bits is None, not an integer"),
    "other bits": (GPTQ, says(bits=8), "expected I32"),
    "no groups": (GPTQ, says(group_size=0), "group_size is 0; a positive number, or -1"),
    "no config groups": (CT, says(config_groups={}), "there are no config_groups"),
    "a group of nothing": (CT, says(config_groups={"group_0": {"targets": ["Linear"]}}), "says nothing of weights"),
    "symmetric or so": (CT, weights_say(symmetric="yes"), "symmetric is 'yes', neither true nor false"),
    "half a group": (CT, weights_say(group_size=32.5), "group_size is 32.5, not a positive integer"),
}
# Known only once the indices are read.
INDICES = {
    "a group too many": (ORDERED, stored("g_idx", at(7, 3)), "g_idx': holds group 3, but there are 3"),
    "a negative group": (ORDERED, stored("g_idx", at(95, -1)), "g_idx': holds group -1, but there are 3"),
    "packed, too many": (CT_ORDERED, stored("weight_g_idx", at(0, 9)), "weight_g_idx': holds group 9"),
    "packed, uneven": (
        CT_ORDERED,
        stored("weight_g_idx", lambda t: t.sort().values.clamp(max=1)),
        "weight_g_idx': gives some group more or fewer",
    ),
}
UNREAD = {
    "marlin": (GPTQ, says(is_marlin_format=True), "laid out as 'marlin' are not read, only gptq and gptq_v2"),
    "bitblas": (GPTQ, says(checkpoint_format="bitblas"), "laid out as 'bitblas' are not read"),
    "5 bits": (GPTQ, says(bits=5), "GPTQ weights of 5 bits are not read, only 2, 3, 4, 8"),
    "gemv": (AWQ, says(version="gemv_fast"), "AWQ weights laid out as 'gemv_fast' are not read, only 'gemm'"),
    "awq of 8 bits": (AWQ, says(bits=8), "AWQ weights of 8 bits are not read, only 4"),
    "float-quantized": (CT, says(format="float-quantized"), "the format 'float-quantized' is not read, only 'pack-q"),
    "3 packed bits": (CT, weights_say(num_bits=3), "compressed-tensors weights of 3 bits .* only integers of 2, 4, 8"),
    "floats": (CT, weights_say(type="float"), "of type 'float' .* are not read"),
    "by tensor": (CT, weights_say(strategy="tensor", group_size=None), "scales by 'tensor' are not read"),
    "transforms": (CT, says(transform_config={"config_groups": {"u": {}}}), "with transforms of its weights"),
    "sparse": (CT, says(sparsity_config={"format": "sparse-24-bitmask"}), "with sparse weights"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_parts_that_do_not_fit_are_refused_before_anything_is_written(altered, case) -> None:
    name, change, message = HEADERS[case]
    folder = altered(name, change)
    assert_refused(folder, FormatError, message)
    with pytest.raises(FormatError, match=message):
        inspect(folder)


@pytest.mark.parametrize("case", INDICES)
def test_wrong_indices_are_refused_when_the_weight_is_read(altered, case) -> None:
    name, change, message = INDICES[case]
    folder = altered(name, change)
    assert_refused(folder, FormatError, f"model.safetensors: tensor '{DOWN}.{message}")
    with pytest.raises(FormatError, match=message):
        open_weights(folder)(f"{DOWN}.weight")


@pytest.mark.parametrize("case", UNREAD)
def test_variants_that_are_not_read_say_so_and_inspect_still_lists_them(altered, case) -> None:
    name, change, message = UNREAD[case]
    folder = altered(name, change)
    assert_refused(folder, UnsupportedError, message)
    info = inspect(folder)
    assert info.unread is not None
    assert not info.packed
    assert f"{DOWN}.{'weight_packed' if name == CT else 'qweight'}" in {row.name for row in info.tensors}


def test_a_config_without_its_weights_is_refused(altered) -> None:
    def change(tensors: Tensors, config: dict[str, Any]) -> None:
        for name in [name for name in tensors if "_proj" in name]:
            del tensors[name]

    folder = altered(GPTQ, change)
    with pytest.raises(FormatError, match="says quant_method 'gptq', but no file holds such a weight"):
        open_weights(folder)
    assert_refused(folder, UnsupportedError, "is quantized by 'gptq' and holds no 4-bit weight")


def test_a_cut_shard_is_refused(altered) -> None:
    folder = altered(GPTQ, lambda tensors, config: None)
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 1)
    assert_refused(folder, FormatError, "model.safetensors")


def test_values_that_do_not_fit_the_type_are_refused(altered) -> None:
    folder = altered(CT, stored("weight_scale", lambda t: torch.full_like(t, 1e30)))
    assert_refused(folder, FormatError, "do not fit float16; choose bfloat16")


def test_every_index_minus_one_means_columns_in_order(altered) -> None:
    with_order = altered(CT, also(f"{DOWN}.weight_g_idx", torch.full((96,), -1, dtype=torch.int32)))
    read, plain = open_weights(with_order), open_weights(GOLDEN / CT)
    assert torch.equal(read(f"{DOWN}.weight"), plain(f"{DOWN}.weight"))


def test_each_weight_may_have_bits_of_its_own_where_the_config_says_so(altered) -> None:
    donor = load_file(GOLDEN / "gptq-8bit-g32-sym" / "model.safetensors")

    def change(tensors: Tensors, config: dict[str, Any]) -> None:
        tensors |= {name: tensor for name, tensor in donor.items() if name.startswith(DOWN)}
        config["dynamic"] = {"+:.*down_proj": {"bits": 8}}

    folder = altered(GPTQ, change)
    assert {row.dtype for row in inspect(folder).packed} == {"int4", "int8"}
    values, expected = open_weights(folder), open_weights(GOLDEN / "gptq-8bit-g32-sym")
    assert torch.equal(values(f"{DOWN}.weight"), expected(f"{DOWN}.weight"))


def test_old_gptq_files_without_indices_have_columns_in_order(altered) -> None:
    folder = altered(GPTQ, without("g_idx"))
    assert torch.equal(open_weights(folder)(f"{DOWN}.weight"), open_weights(GOLDEN / GPTQ)(f"{DOWN}.weight"))


@pytest.mark.parametrize("case", ["marlin", "gemv", "3 packed bits"])
def test_what_is_not_read_is_neither_quantized_nor_loaded(altered, case) -> None:
    name, change, message = UNREAD[case]
    folder = altered(name, change)
    with pytest.raises(UnsupportedError, match=message):
        quantize(folder, folder.parent / "out")
    with pytest.raises(UnsupportedError, match=message):
        from_pretrained(folder)


@pytest.mark.parametrize("case", INDICES)
def test_wrong_indices_leave_no_output_and_no_model(altered, case) -> None:
    name, change, message = INDICES[case]
    folder = altered(name, change)
    with pytest.raises(FormatError, match=message):
        quantize(folder, folder.parent / "out")
    assert os.listdir(folder.parent) == ["altered"]
    with pytest.raises(FormatError, match=message):
        from_pretrained(folder)


EDITS: list[Callable[[torch.Tensor], torch.Tensor]] = [
    lambda t: t[:-1],
    lambda t: t[:0],
    torch.Tensor.flatten,
    lambda t: t.mT if t.ndim == 2 else t[None],
    torch.Tensor.long,
    torch.Tensor.double,
    torch.Tensor.char,
    torch.Tensor.bool,
    torch.zeros_like,
    lambda t: torch.randint(-(2**31), 2**31 - 1, t.shape).to(t.dtype),
    lambda t: t.repeat(*[2] * t.ndim),
    lambda t: t.reshape(-1)[0].clone(),
    lambda t: t.to(torch.float8_e4m3fn) if t.is_floating_point() else t,
]
VALUES = [None, 0, -1, 1, 3, 8, 32, 128, 1 << 40, "4", "gptq", "group", [], {}, True, 2.5, "marlin"]


def fields_of(config: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    inner = [field for value in config.values() if isinstance(value, dict) for field in fields_of(value)]
    return [(config, key) for key in config] + inner


@pytest.mark.parametrize("name", sorted(folder.name for folder in GOLDEN.iterdir()))
def test_no_change_of_parts_and_fields_gives_anything_but_our_errors(altered, name) -> None:
    generator = random.Random(name)

    def change(tensors: Tensors, config: dict[str, Any]) -> None:
        for _ in range(generator.randint(1, 2)):
            part = generator.choice(sorted(key for key in tensors if "_proj" in key))
            holder, field = generator.choice(fields_of(config))
            match generator.randrange(4):
                case 0:
                    del tensors[part]
                case 1:
                    tensors[part] = generator.choice(EDITS)(tensors[part]).contiguous()
                case 2:
                    del holder[field]
                case _:
                    holder[field] = generator.choice(VALUES)

    refused = []
    for _ in range(8):
        folder = altered(name, change)
        try:
            inspect(folder)
            open_weights(folder)(f"{DOWN}.weight")
        except (FormatError, UnsupportedError) as error:
            refused.append(str(error))
        shutil.rmtree(folder)
    assert refused
    assert all(str(folder) in message for message in refused)
