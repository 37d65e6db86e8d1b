"""`DeviceFolder`, and whole models through it. The copy to the device is replaced by one in plain memory."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import qlora_rs
from qlora_rs import Linear4bit, QuantSpec, _bridge, _core, checkpoint, model
from qlora_rs.checkpoint.placing import DeviceFolder
from qlora_rs.checkpoint.source import open_source

CPU = torch.device("cpu")


@pytest.fixture
def loaded(monkeypatch):
    """Names of the tensors that were read straight from files."""
    names = []

    def loader(files, device):
        def load(progress):
            for path, places in files.items():
                with safe_open(path, "pt") as file:
                    for name, tensor in places:
                        stored = file.get_tensor(name)
                        assert tensor.dtype == stored.dtype
                        tensor.copy_(stored)
                        names.append(name)

        return load

    monkeypatch.setattr(_bridge, "loader", loader)
    return names


def on_device(folder, dtype, monkeypatch, spec=None):
    """`from_pretrained` along the way that it takes for a CUDA device."""

    def load(transformers, folder, dtype, quantization, device):
        cls = getattr(transformers, model.read_config(folder)["architectures"][0])
        return model._load_onto(transformers, cls, folder, dtype, quantization, device)

    with monkeypatch.context() as patch:
        patch.setattr(model, "_load", load)
        return qlora_rs.from_pretrained(folder, spec, dtype=dtype)


def assert_same_model(ours, theirs):
    for kind in ("named_parameters", "named_buffers"):
        a, b = dict(getattr(ours, kind)()), dict(getattr(theirs, kind)())
        assert list(a) == list(b)
        for name in a:
            assert a[name].dtype == b[name].dtype, name
            assert a[name].requires_grad == b[name].requires_grad, name
            assert torch.equal(a[name], b[name]), name
    assert [type(module) for module in ours.modules()] == [type(module) for module in theirs.modules()]
    assert ours.config.to_dict() == theirs.config.to_dict()
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()
    assert ours.name_or_path == theirs.name_or_path
    assert ours.config.name_or_path == theirs.config.name_or_path
    assert ours.model.name_or_path == theirs.model.name_or_path
    assert ours.hf_quantizer.quantization_config.to_dict() == theirs.hf_quantizer.quantization_config.to_dict()
    assert ours.training == theirs.training
    tokens = torch.arange(3, 40)[None]
    assert torch.equal(ours(tokens).logits, theirs(tokens).logits)


@pytest.mark.parametrize("fetched", [False, True])
def test_only_what_is_a_files_own_memory_is_read_from_it(tiny_llama, loaded, fetched):
    name = "model.layers.0.mlp.up_proj.weight"
    with DeviceFolder(open_source(tiny_llama), CPU, [name] if fetched else []) as folder:
        stored = folder.mapped[name]

        class Module(nn.Module):
            def __init__(self):
                super().__init__()
                self.plain, self.again = nn.Parameter(stored), nn.Parameter(stored)
                self.cast = nn.Parameter(stored.float())
                self.part = nn.Parameter(stored[:3])
                self.turned = nn.Parameter(stored.t())
                self.register_buffer("table", torch.arange(3), persistent=False)
                self.shared = self.plain

        module = Module()
        folder.place(module)
    assert loaded == [name]
    assert module.shared is module.plain
    assert torch.equal(module.plain, stored)
    assert torch.equal(module.turned, stored.t())
    assert module.plain.data_ptr() == module.again.data_ptr() != stored.data_ptr()
    assert torch.equal(module.cast, stored.float())


def test_tensors_of_every_type_are_placed(tmp_path, loaded):
    tensors = {
        "ids": torch.arange(5),
        "mask": torch.tensor([True, False]),
        "none": torch.empty(0, 3),
        "one": torch.ones(()),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    module = nn.Module()
    with DeviceFolder(open_source(tmp_path), CPU, ["ids"]) as folder:
        for name, tensor in folder.mapped.items():
            module.register_buffer(name, tensor)
        folder.place(module)
    assert set(loaded) == {"ids", "mask", "one"}
    for name, tensor in tensors.items():
        assert torch.equal(module.get_buffer(name), tensor)
        assert module.get_buffer(name).shape == tensor.shape


def test_files_are_checked_before_a_device_is_asked_for(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(3)}, path)
    options = {"queue": (63, 0), "buffer_bytes": 64, "num_threads": 2, "progress": None}
    for places, match in (([("b", (0, 12))], '"b" is not in it'), ([("a", (0, 13))], '"a": expected 13 bytes')):
        with pytest.raises(qlora_rs.FormatError, match=rf"x\.safetensors: tensor {match}"):
            _core.cuda_load([(str(path), places)], **options)
    with pytest.raises(FileNotFoundError, match="absent"):
        _core.cuda_load([(str(tmp_path / "absent"), [])], **options)
    with pytest.raises(qlora_rs.DeviceError):  # no driver, or no such device
        _core.cuda_load([(str(path), [("a", (0, 12))])], **options)
    _core.cuda_load([], **options)


def test_an_error_of_fetching_is_raised_where_it_is_waited_for(tiny_llama, monkeypatch):
    def loader(files, device):
        def load(progress):
            raise qlora_rs.FormatError("changed")

        return load

    monkeypatch.setattr(_bridge, "loader", loader)
    with (
        DeviceFolder(open_source(tiny_llama), CPU, ["model.norm.weight"]) as folder,
        pytest.raises(qlora_rs.FormatError, match="changed"),
    ):
        folder.place(nn.Module())


def test_leaving_early_ends_the_fetching(tiny_llama, monkeypatch):
    ended = threading.Event()

    def loader(files, device):
        def load(progress):
            try:
                while True:
                    progress(1, 2)
                    time.sleep(0.001)
            finally:
                ended.set()

        return load

    monkeypatch.setattr(_bridge, "loader", loader)
    with pytest.raises(KeyboardInterrupt), DeviceFolder(open_source(tiny_llama), CPU, ["model.norm.weight"]):
        raise KeyboardInterrupt
    assert ended.is_set()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_packed_model_is_the_one_that_transformers_loads(
    make_tiny_llama, tmp_path, loaded, monkeypatch, tied, shards, dtype
):
    source = make_tiny_llama(tmp_path / "source", tie_word_embeddings=tied, attention_bias=True)
    packed = tmp_path / "packed"
    checkpoint.quantize(source, packed, **({"max_shard_size": 20_000} if shards else {}))
    ours = on_device(packed, dtype, monkeypatch)
    assert_same_model(ours, qlora_rs.from_pretrained(packed, dtype=dtype))
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied
    stored = set(open_source(packed).tensors)
    assert len(loaded) == len(set(loaded))
    integers = {name for name in stored if "_proj.weight" in name}
    assert set(loaded) == (stored if dtype == torch.bfloat16 else integers)


def test_what_is_not_in_the_model_is_not_read(tiny_llama, tmp_path, loaded, monkeypatch):
    source = tmp_path / "packed"
    checkpoint.quantize(tiny_llama, source)
    with safe_open(source / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    save_file({**tensors, "model.strange.weight": torch.ones(3)}, source / "model.safetensors", metadata)
    with pytest.warns(UserWarning, match=r"1 tensors are no parameters.*strange"):
        on_device(source, torch.bfloat16, monkeypatch)
    assert loaded
    assert "model.strange.weight" not in loaded  # in a type that has to be cast, so not fetched beforehand either


@pytest.mark.parametrize("spec", [QuantSpec(), QuantSpec("int8", 32, False)], ids=QuantSpec.describe)
def test_quantizing_on_the_way_in_gives_the_packers_bytes(tiny_llama, tmp_path, loaded, monkeypatch, spec):
    checkpoint.quantize(tiny_llama, tmp_path / "packed", spec)
    ours = on_device(tiny_llama, torch.bfloat16, monkeypatch, spec)
    theirs = qlora_rs.from_pretrained(tmp_path / "packed", dtype=torch.bfloat16)
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert sum(isinstance(module, Linear4bit) for module in ours.modules()) == 14
    assert not [name for name in loaded if "_proj" in name]
    ours.save_pretrained(tmp_path / "saved")
    assert "files" not in (tmp_path / "saved" / "config.json").read_text()


def test_a_missing_weight_is_an_error(tiny_llama, tmp_path, loaded, monkeypatch):
    packed = tmp_path / "packed"
    checkpoint.quantize(tiny_llama, packed)
    config = packed / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    with pytest.raises(qlora_rs.FormatError, match=r"weights of .* are in none of its files.*layers\.2"):
        on_device(packed, torch.bfloat16, monkeypatch)
