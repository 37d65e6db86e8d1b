"""Make the folders in `foreign` beside this file with the code of GPTQ, AWQ and compressed-tensors libraries.

    pip download --no-deps auto-gptq==0.7.1 gptqmodel==7.7.0 autoawq==0.2.9 compressed-tensors==0.20.0
    pip download --no-deps -d old compressed-tensors==0.12.2    # wrote weight_g_idx, which later versions dropped
    pip install --target site --no-deps pypcre logbar threadpoolctl device-smi tokenicer defuser loguru pydantic
    python tests/golden/make_foreign.py PACKAGES    # the folder with all of that, wheels and archives unpacked

Each library packs the layers of one tiny Llama and dequantizes them again: `expected.json` holds the SHA-256 of each
weight that it then has, row-major [out, in] in the type of its scales. Made with torch 2.15.0, transformers 5.24.0.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent / "foreign"
LAYERS = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (32, 64),
    "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (96, 64),
    "mlp.up_proj": (96, 64),
    "mlp.down_proj": (64, 96),
}
PREFIX = "model.layers.0."
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "dtype": "float16",
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "model_type": "llama",
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "num_key_value_heads": 1,
    "tie_word_embeddings": False,
    "vocab_size": 32,
}


def draw(*shape: int, seed: int) -> Tensor:
    return 0.05 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def others(dtype: torch.dtype) -> dict[str, Tensor]:
    """What no library quantizes."""
    norms = ("model.norm", f"{PREFIX}input_layernorm", f"{PREFIX}post_attention_layernorm")
    tensors = {f"{name}.weight": (1 + draw(64, seed=99)).to(dtype) for name in norms}
    tensors["model.embed_tokens.weight"] = draw(32, 64, seed=100).to(dtype)
    tensors["lm_head.weight"] = draw(32, 64, seed=101).to(dtype)
    return tensors


def write(name: str, tensors: dict[str, Tensor], quantization: dict[str, object], expected: dict[str, Tensor]) -> None:
    dtype = next(iter(expected.values())).dtype
    folder = HERE / name
    folder.mkdir(parents=True)
    config = {**CONFIG, "dtype": str(dtype).removeprefix("torch."), "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    whole = {key: tensor.contiguous() for key, tensor in {**others(dtype), **tensors}.items()}
    save_file(whole, folder / "model.safetensors", {"format": "pt"})
    hashes = {
        f"{PREFIX}{layer}.weight": hashlib.sha256(weight.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for layer, weight in expected.items()
    }
    record = {"dtype": str(dtype).removeprefix("torch."), "sha256": hashes}
    (folder / "expected.json").write_text(json.dumps(record, indent=2) + "\n")


def grid(weight: Tensor, bits: int, sym: bool, g_idx: Tensor) -> tuple[Tensor, Tensor]:
    """float16-exact scales and integer zero points [out, groups] that span each group of columns."""
    top = 2**bits - 1
    scales, zeros = [], []
    for group in range(int(g_idx.max()) + 1):
        part = weight[:, g_idx == group]
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        if sym:
            high = torch.maximum(-low, high)
            low = -high
        scale = ((high - low) / top).half().float()
        scales.append(scale)
        zeros.append(torch.full_like(scale, (top + 1) // 2) if sym else torch.round(-low / scale).clamp(0, top))
    return torch.stack(scales, 1), torch.stack(zeros, 1)


def on_grid(weight: Tensor, bits: int, scales: Tensor, zeros: Tensor, g_idx: Tensor) -> Tensor:
    """The nearest weight that the grid has: packing takes such ones, and does not clamp others."""
    scale, zero = scales[:, g_idx.long()], zeros[:, g_idx.long()]
    return scale * ((weight / scale + zero).round().clamp(0, 2**bits - 1) - zero)


def groups_of(columns: int, group_size: int, act_order: bool) -> Tensor:
    size = columns if group_size == -1 else group_size
    g_idx = torch.arange(columns, dtype=torch.int32) // size
    if act_order:
        g_idx = g_idx[torch.randperm(columns, generator=torch.Generator().manual_seed(columns))]
    return g_idx


def linear_of(layer: str, seed: int) -> nn.Linear:
    rows, columns = LAYERS[layer]
    linear = nn.Linear(columns, rows, bias=False)
    linear.weight.data = draw(rows, columns, seed=seed)
    return linear


def load_alone(path: Path, name: str) -> types.ModuleType:
    """One file of a package, without the package."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_gptq(name: str, make: Callable[..., nn.Module], quantization: dict[str, object], act_order: bool) -> None:
    """``make(linear, scales, zeros, g_idx)`` packs a layer; the result has the buffers and ``dequantized``."""
    tensors, expected = {}, {}
    bits, group_size, sym = (quantization[key] for key in ("bits", "group_size", "sym"))
    for seed, layer in enumerate(LAYERS):
        linear = linear_of(layer, seed)
        g_idx = groups_of(linear.in_features, group_size, act_order)
        scales, zeros = grid(linear.weight.data, bits, sym, g_idx)
        linear.weight.data = on_grid(linear.weight.data, bits, scales, zeros, g_idx)
        packed = make(linear.half(), scales, zeros, g_idx)
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            tensors[f"{PREFIX}{layer}.{part}"] = getattr(packed, part).clone()
        expected[layer] = packed.dequantized.half()
    write(name, tensors, quantization, expected)


def make_auto_gptq(packages: Path) -> None:
    file = packages / "auto_gptq/auto_gptq/nn_modules/qlinear/qlinear_cuda.py"
    layer_class = load_alone(file, "qlinear_cuda").QuantLinear

    def packer(bits: int, group_size: int) -> Callable[..., nn.Module]:
        def make(linear: nn.Linear, scales: Tensor, zeros: Tensor, g_idx: Tensor) -> nn.Module:
            layer = layer_class(bits, group_size, linear.in_features, linear.out_features, False)
            layer.pack(linear, scales.half(), zeros.half(), g_idx)
            layer.dequantized = layer(torch.eye(linear.in_features, dtype=torch.float16)).T
            return layer

        return make

    for bits, group_size, sym, act_order in (
        (4, 32, True, False),
        (4, 32, False, True),
        (4, -1, True, False),
        (2, 32, True, False),
        (3, 32, True, True),
        (8, 32, True, False),
    ):
        quantization = {
            "bits": bits,
            "group_size": group_size,
            "damp_percent": 0.01,
            "desc_act": act_order,
            "static_groups": False,
            "sym": sym,
            "true_sequential": True,
            "model_name_or_path": None,
            "model_file_base_name": None,
            "is_marlin_format": False,
            "quant_method": "gptq",
        }
        size = "channel" if group_size == -1 else f"g{group_size}"
        name = f"gptq-{bits}bit-{size}-{'sym' if sym else 'asym'}{'-act-order' if act_order else ''}"
        write_gptq(name, packer(bits, group_size), quantization, act_order)


def make_gptqmodel(packages: Path) -> None:
    sys.path[:0] = [str(packages / "site"), str(next(packages.glob("gptqmodel-*/")))]
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.utils.backend import BACKEND
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module, convert_gptq_v2_to_v1_format_module

    for bits, version, act_order in ((4, "gptq_v2", True), (4, "gptq", False), (3, "gptq_v2", False)):
        config = QuantizeConfig(bits=bits, group_size=32, sym=False, desc_act=act_order, format=version)

        def make(linear, scales, zeros, g_idx, bits=bits, version=version, act_order=act_order, config=config):
            layer = TorchLinear(
                bits=bits,
                group_size=32,
                sym=False,
                desc_act=act_order,
                in_features=linear.in_features,
                out_features=linear.out_features,
                bias=False,
                pack_dtype=torch.int32,
                backend=BACKEND.GPTQ_TORCH,
                format=version,
            )
            zeros[:3, 0] = 0  # what version 1 stores as -1, borrowing from the field beside it
            zeros[5, :] = 2**bits - 1
            layer.pack_original(linear, scales, zeros, g_idx)
            if version == "gptq":
                convert_gptq_v2_to_v1_format_module(layer, config)
                stored = layer.qzeros.clone()
                convert_gptq_v1_to_v2_format_module(layer, bits, torch.int32)
            layer.post_init()
            layer.dequantized = layer.dequantize_weight().T
            if version == "gptq":
                layer.qzeros = stored
            return layer

        quantization = {key: value for key, value in config.to_dict().items() if key != "meta"}
        order = "-act-order" if act_order else ""
        write_gptq(f"gptqmodel-{bits}bit-g32-asym-{version}{order}", make, quantization, act_order)


def make_awq(packages: Path) -> None:
    # Packages without their __init__, which import much that is not needed.
    root = next(packages.glob("autoawq-*/")) / "awq"
    for name in ("awq", "awq.utils", "awq.modules", "awq.modules.linear", "awq.models"):
        module = types.ModuleType(name)
        module.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = module
    from awq.models._config import AwqConfig
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    for group_size in (32, -1):
        tensors, expected = {}, {}
        for seed, layer in enumerate(LAYERS):
            linear = linear_of(layer, seed)
            size = linear.in_features if group_size == -1 else group_size
            g_idx = groups_of(linear.in_features, group_size, False)
            scales, zeros = grid(linear.weight.data, 4, False, g_idx)
            linear.weight.data = on_grid(linear.weight.data, 4, scales, zeros, g_idx)
            packed = WQLinear_GEMM.from_linear(linear.half(), 4, size, False, scales.T.half(), zeros.T)
            for part in ("qweight", "qzeros", "scales"):
                tensors[f"{PREFIX}{layer}.{part}"] = getattr(packed, part)
            dense = dequantize_gemm(packed.qweight, packed.qzeros, packed.scales, 4, size)
            expected[layer] = dense.half().T
        quantization = AwqConfig(q_group_size=group_size).to_transformers_dict()
        write(f"awq-{'channel' if group_size == -1 else f'g{group_size}'}", tensors, quantization, expected)


def make_compressed_tensors(name: str, dtype: torch.dtype, weights: dict[str, object]) -> None:
    """With the installed version, through its own model compressor and the config that it writes."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams
    from transformers import LlamaConfig, LlamaForCausalLM

    scheme = {"targets": ["Linear"], "weights": {"type": "int", **weights}}
    asked = QuantizationConfig(config_groups={"group_0": scheme}, format="pack-quantized", ignore=["lm_head"])
    model = LlamaForCausalLM(LlamaConfig(**{key: CONFIG[key] for key in CONFIG if key not in ("dtype",)})).to(dtype)
    model.load_state_dict(others(dtype), strict=False)
    apply_quantization_config(model, asked)
    modules = {layer: model.get_submodule(PREFIX + layer) for layer in LAYERS}
    for seed, (layer, module) in enumerate(modules.items()):
        module.weight.data = linear_of(layer, seed).weight.data.to(dtype)
        args = module.quantization_scheme.weights
        parts = module.weight.data.unflatten(1, (-1, args.group_size or module.in_features))
        scale, zero_point = calculate_qparams(parts.amin(2), parts.amax(2), args)
        module.weight_scale.data = scale.to(dtype)
        if not args.symmetric:
            module.weight_zero_point.data = zero_point.round().to(torch.int8)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    tensors = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    folder = HERE / "config-only"
    folder.mkdir(parents=True)
    compressor.update_config(str(folder))
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    shutil.rmtree(folder)
    compressor.decompress_model(model)
    write(name, tensors, quantization, {layer: module.weight.data for layer, module in modules.items()})


def make_old_compressed_tensors(name: str) -> None:
    """Activation order by groups: only versions before 0.20 write it."""
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=32, actorder="group")
    compressor = PackedQuantizationCompressor()
    tensors, expected = {}, {}
    for seed, layer in enumerate(LAYERS):
        weight = linear_of(layer, seed).weight.data.to(torch.bfloat16)
        g_idx = groups_of(weight.shape[1], 32, True)
        parts = weight[:, g_idx.argsort(stable=True)].unflatten(1, (-1, 32))
        scale, zero_point = calculate_qparams(parts.amin(2), parts.amax(2), args)
        scale, zero_point = scale.to(torch.bfloat16), zero_point.to(torch.int8)
        packed = compressor.compress_weight(weight, scale, args, zero_point, g_idx)
        packed |= {"weight_scale": scale, "weight_g_idx": g_idx}
        for part, tensor in packed.items():
            tensors[f"{PREFIX}{layer}.{part}"] = tensor
        expected[layer] = compressor.decompress_weight(packed, args)
    scheme = {"targets": ["Linear"], "weights": args}
    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        format="pack-quantized",
        ignore=["lm_head"],
        quantization_status="compressed",
    )
    write(name, tensors, json.loads(config.model_dump_json()), expected)


def main() -> None:
    packages = Path(sys.argv[1])
    if sys.argv[2:] == ["old"]:
        sys.path.insert(0, str(next(packages.glob("ct12*/"))))
        make_old_compressed_tensors("ct-int4-g32-sym-act-order")
        return
    shutil.rmtree(HERE, ignore_errors=True)
    make_auto_gptq(packages)
    make_gptqmodel(packages)
    make_awq(packages)
    group = {"strategy": "group", "group_size": 32}
    make_compressed_tensors("ct-int4-g32-sym", torch.bfloat16, {"num_bits": 4, "symmetric": True, **group})
    make_compressed_tensors("ct-int4-g32-asym", torch.float16, {"num_bits": 4, "symmetric": False, **group})
    make_compressed_tensors(
        "ct-int4-channel", torch.bfloat16, {"num_bits": 4, "symmetric": True, "strategy": "channel"}
    )
    make_compressed_tensors(
        "ct-int4-channel-asym", torch.float32, {"num_bits": 4, "symmetric": False, "strategy": "channel"}
    )
    make_compressed_tensors("ct-int2-g32-sym", torch.bfloat16, {"num_bits": 2, "symmetric": True, **group})
    make_compressed_tensors("ct-int8-g32-asym", torch.bfloat16, {"num_bits": 8, "symmetric": False, **group})
    subprocess.run([sys.executable, __file__, str(packages), "old"], check=True)
    for path in HERE.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


if __name__ == "__main__":
    main()
