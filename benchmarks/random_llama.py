"""Llamas of any shape with random packed weights and adapters, made on the device in seconds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

import qlora_rs
from qlora_rs import Linear4bit, QuantSpec

RANK = 16
SPREAD = 0.55  # standard deviation of NF4's values under uniform codes


def build(layers: int, shape: Mapping[str, int], length: int, device: torch.device) -> Any:
    """The model: packed layers on the meta device, everything else random on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **shape, num_hidden_layers=layers, max_position_embeddings=max(2048, length), use_cache=False, pad_token_id=0
    )
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            packed = Linear4bit(
                module.in_features, module.out_features, False, QuantSpec(double_quant=True), device="meta"
            )
            qlora_rs.lora.replace_module(model, name, packed)
    qlora_rs.attach_lora(model, r=RANK)
    generator = torch.Generator(device).manual_seed(1)
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta and parameter.is_floating_point():
                values = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                if parameter.ndim == 1:
                    values.fill_(1)
                else:
                    values.normal_(0, 0.5 / math.sqrt(parameter.shape[1]), generator=generator)
                setattr(module, key, nn.Parameter(values, requires_grad=parameter.requires_grad))
    checkpoint_layers(model)
    return model.train()


def checkpoint_layers(model: Any, **options: Any) -> None:
    """Switch gradient checkpointing on; ``options`` are those of torch's."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    enable(**{f"{name}_checkpointing_kwargs": {"use_reentrant": False, **options}})


def draw_weights(device: torch.device) -> Any:
    """What gives packed layers random values: the same ones for the same names."""

    def load(layers: Mapping[str, Linear4bit]) -> None:
        for name, layer in layers.items():
            generator = torch.Generator(device).manual_seed(sum(name.encode()) * 7919 + len(name))
            absmax = 0.5 / SPREAD / math.sqrt(layer.in_features)
            for key, parameter in layer.named_parameters(recurse=False):
                if key in ("weight", "weight_absmax"):
                    values = torch.empty(parameter.shape, dtype=torch.uint8, device=device)
                    values.random_(0, 256, generator=generator)
                else:  # scales are offset + code * scale, codes within [-1, 1]
                    value = absmax if key.endswith("offset") else absmax / 2
                    values = torch.full(parameter.shape, value, dtype=torch.float32, device=device).view(torch.int32)
                setattr(layer, key, nn.Parameter(values, requires_grad=False))

    return load
