"""What a training step takes of a device, part by part, before it is run."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qlora_rs.chunked_loss import CHUNK_BYTES
from qlora_rs.linear import Linear4bit
from qlora_rs.optim.rules import RULES
from qlora_rs.paging.weights import block_bytes, packed_blocks
from qlora_rs.report import format_bytes

Place = Literal["device", "pool", "step"]
Blocks = Mapping[str, Mapping[str, Linear4bit]]

# Of state for a trained element.
OPTIMIZER_BYTES: Mapping[str, float] = {
    rule.name + suffix: rule.state_bytes(bits) for rule in RULES for suffix, bits in (("", 32), ("8bit", 8))
}
PAGED = "paged_"  # before an optimizer's name: its state is in the pool

# What autograd keeps of a decoder layer, and what is alive at the worst moment of its backward pass, over the inputs
# and outputs of its Linear layers. Llama layers with LoRA on all of them keep 1.11 to 1.14 (bfloat16; the norms'
# float32 is in it); gradients and dequantized weights come on top.
_KEPT = 1.25
_ALIVE = 2.2
_LOGIT_BYTES = 16  # of a logit in the backward pass: 16 bits, float32, its softmax, the gradients of all three
_CUDA_CONTEXT = 768 << 20  # the context, its kernels, and cuBLAS's workspaces


@dataclass(frozen=True)
class Part:
    """A part of what a step takes.

    Attributes:
        name: what it is.
        place: ``"device"``: there all the time; ``"pool"``: under the pool's budget; ``"step"``: while a step runs.
        nbytes: its size; an estimate where it is not there yet.
    """

    name: str
    place: Place
    nbytes: int


@dataclass(frozen=True)
class Plan:
    """All parts; ``str`` gives a table for people.

    Attributes:
        budget: bytes of the device that may be used.
        parts: what has to go in.
        frames: bytes of the pool's frames; None where everything fits without a pool.
    """

    budget: int
    parts: tuple[Part, ...]
    frames: int | None

    def total(self, *places: Place) -> int:
        """Bytes of the parts in these places."""
        return sum(part.nbytes for part in self.parts if part.place in places)

    def __str__(self) -> str:
        """A line for each part, then the pool and the budget."""
        where = {"device": "on the device", "pool": "in the pool", "step": "during a step"}
        rows = [(part.name, where[part.place], format_bytes(part.nbytes)) for part in self.parts if part.nbytes]
        used = self.total("device", "step") + (self.total("pool") if self.frames is None else self.frames)
        if self.frames is not None:
            paged = format_bytes(max(0, self.total("pool") - self.frames))
            rows.append(("the pool's frames", f"{paged} wait on the host", format_bytes(self.frames)))
        rows.append(("together", "of the budget" if self.frames is not None else "no paging", format_bytes(used)))
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        return "\n".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}" for a, b, c in rows)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What `plan` is asked; see `qlora_rs.paging.fit`."""

    budget: int
    device: torch.device
    tokens: int
    optimizer: str
    page_activations: bool | None
    checkpointing: bool
    keep_dequantized: bool
    whole_logits: bool
    page_bytes: int


def check_optimizer(name: str) -> None:
    """Raise ValueError unless the state of this optimizer is known."""
    if name.removeprefix(PAGED) not in OPTIMIZER_BYTES:
        raise ValueError(
            f"optimizer is one of {', '.join(OPTIMIZER_BYTES)}, or paged_ before one of them; got {name!r}"
        )


def plan(model: nn.Module, request: Request) -> Plan:
    """Split the budget.

    Raises:
        ValueError: it is too small; the message says what would do.
    """
    blocks = packed_blocks(model)
    resident = _resident(model, request)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    state = round(trained * OPTIMIZER_BYTES[request.optimizer.removeprefix(PAGED)])
    with_state = request.optimizer.startswith(PAGED)
    weights = {name: block_bytes(layers) for name, layers in blocks.items()}
    kept, largest_kept = _kept(model, blocks, request)

    fixed = [*resident, Part("working set", "step", _working_set(model, blocks, request))]
    everything = [
        Part("packed weights", "device", sum(weights.values())),
        Part("optimizer state", "device", state),
        Part("saved activations", "step", kept),
    ]
    whole = Plan(request.budget, (*everything, *fixed), None)
    needed = whole.total("device", "step")
    if needed <= request.budget:
        return whole
    if not blocks:
        raise ValueError(
            f"a budget of {format_bytes(request.budget)} is too small, and the model has no packed layers that could "
            f"be paged: give at least {needed} bytes, or pack it with quantize_model before\n{whole}"
        )

    page_activations = request.checkpointing if request.page_activations is None else request.page_activations
    parts = (
        Part("packed weights", "pool", sum(weights.values())),
        Part("optimizer state", "pool" if with_state else "device", state),
        Part("saved activations", "pool" if page_activations else "step", kept),
        *fixed,
    )
    outside = sum(part.nbytes for part in parts if part.place != "pool")
    # One block is used while the next one comes, beside what is saved meanwhile.
    least = 2 * _pages(max(weights.values()), request) + (2 * _pages(largest_kept, request) if page_activations else 0)
    frames = request.budget - outside
    if frames < least:
        table = Plan(request.budget, parts, 0)
        fewer = f"fewer tokens a step than {request.tokens}"
        if request.keep_dequantized:
            fewer = f"keep no dequantized weights, or {fewer}"
        if not request.checkpointing:
            fewer = f"gradient checkpointing, or {fewer}"
        raise ValueError(
            f"a budget of {format_bytes(request.budget)} is too small: {format_bytes(outside)} are needed beside the "
            f"pool, and {format_bytes(least)} in it; give at least {outside + least} bytes, or "
            f"{fewer}\n{table}"
        )
    return Plan(request.budget, parts, frames)


def _pages(nbytes: int, request: Request) -> int:
    """Bytes of the whole pages that a buffer takes."""
    return -(-nbytes // request.page_bytes) * request.page_bytes


def _resident(model: nn.Module, request: Request) -> Iterator[Part]:
    """What is on the device all the time, beside packed weights and optimizer state."""
    packed = {id(p) for m in model.modules() if isinstance(m, Linear4bit) for p in m.parts() if p is not None}
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers()) if id(t) not in packed}
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    find_head: Any = getattr(model, "get_output_embeddings", None)
    head = find_head() if find_head is not None else None
    if head is not None and not isinstance(head, Linear4bit):
        tables |= {id(p) for p in head.parameters() if not p.requires_grad}
    trained = sum(t.nbytes for t in tensors.values() if t.requires_grad)
    in_tables = sum(t.nbytes for key, t in tensors.items() if key in tables and not t.requires_grad)
    others = sum(t.nbytes for key, t in tensors.items() if key not in tables and not t.requires_grad)
    yield Part("embeddings and head", "device", in_tables)
    yield Part("norms, biases, buffers", "device", others)
    yield Part("trained parameters", "device", trained)
    yield Part("their gradients", "device", trained)
    yield Part("CUDA context", "device", _CUDA_CONTEXT if request.device.type == "cuda" else 0)


def _kept(model: nn.Module, blocks: Blocks, request: Request) -> tuple[int, int]:
    """Bytes that the forward pass leaves to the backward pass, and of the largest single tensor of them."""
    size, layers = _element_size(model), _layers(blocks)
    if request.checkpointing:
        inputs = [next(iter(packed.values())).in_features * size * request.tokens for packed in layers.values()]
        return sum(inputs), max(inputs, default=0)
    widths = sum(_widths(model, name, packed) for name, packed in layers.items())
    largest = max((layer.out_features for packed in layers.values() for layer in packed.values()), default=0)
    return round(_KEPT * widths * size * request.tokens), largest * size * request.tokens


def _working_set(model: nn.Module, blocks: Blocks, request: Request) -> int:
    """Bytes alive at the worst moment, beside what the forward pass has left."""
    size, layers = _element_size(model), _layers(blocks)
    widths = max((_widths(model, name, packed) for name, packed in layers.items()), default=0)
    matrices = [[layer.in_features * layer.out_features for layer in packed.values()] for packed in layers.values()]
    # Kept, those of a layer are there together.
    dense = max((sum(own) if request.keep_dequantized else max(own) for own in matrices), default=0)
    layer = round((_ALIVE - (0 if request.checkpointing else _KEPT)) * widths * size * request.tokens)
    config = getattr(model, "config", None)
    logits = _number(config, "vocab_size", 0) * request.tokens
    if not request.whole_logits:
        logits = min(logits, CHUNK_BYTES // 4)
    return max(layer + dense * size, logits * _LOGIT_BYTES)


def _layers(blocks: Blocks) -> dict[str, dict[str, Linear4bit]]:
    """Blocks that lie in a larger one, as experts in a decoder layer, together."""
    layers: dict[str, dict[str, Linear4bit]] = {}
    for name, packed in blocks.items():
        parts = name.split(".")
        first = next((place for place, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
        layers.setdefault(".".join(parts[: first + 1]), {}).update(packed)
    return layers


def _widths(model: nn.Module, name: str, packed: Mapping[str, Linear4bit]) -> int:
    """Inputs and outputs of a layer's Linear modules, in elements a token; of experts those that a token meets."""
    config = getattr(model, "config", None)
    plain, of_experts = 0, {"": 0}
    linears = {id(module): (path, module) for path, module in model.get_submodule(name).named_modules()}
    linears |= {id(module): (path, module) for path, module in packed.items() if id(module) not in linears}
    for path, module in linears.values():
        if not isinstance(module, nn.Linear):
            continue
        width = module.in_features + module.out_features
        expert = next((path[: match.end()] for match in re.finditer(r"(?<=\.)\d+(?=\.)", path)), None)
        if expert is None:
            plain += width
        else:
            of_experts[expert] = of_experts.get(expert, 0) + width
    met = min(_number(config, "num_experts_per_tok", 2), max(1, len(of_experts) - 1))
    return plain + met * max(of_experts.values())


def _number(config: Any, name: str, default: int) -> int:
    found = getattr(config, name, None)
    return found if isinstance(found, int) else default


def _element_size(model: nn.Module) -> int:
    """Of what flows between layers: the type of the frozen floats."""
    frozen: Iterator[Tensor] = (p for p in model.parameters() if p.is_floating_point() and not p.requires_grad)
    first = next(frozen, None)
    if first is not None:
        return first.element_size()
    packed = next((m for m in model.modules() if isinstance(m, Linear4bit)), None)
    return 4 if packed is None else packed.float_dtype.itemsize
