"""What a training run is asked to do."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from qlora_rs.lora import ALL_LINEAR
from qlora_rs.report import parse_bytes
from qlora_rs.train.optimizer import OPTIMIZERS

DTYPES = ("auto", "float32", "bfloat16")
DEFAULT_MAX_LENGTH = 1024


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """A run of `train`; the command line's options have the same names and defaults.

    Attributes:
        model: model folder, packed or not, or a GGUF file; what is not packed is quantized on the way in (NF4, double
            quantization).
        data: JSONL file, see `qlora_rs.train.records`.
        output: folder for the adapter, the log, the loss curve and the state for ``resume``.
        r, lora_alpha, lora_dropout, target_modules, use_rslora: see `qlora_rs.attach_lora`.
        lr: the highest learning rate.
        steps: optimizer steps; exclusive with ``epochs``, and one epoch where neither is given.
        epochs: passes over the data.
        batch_size: samples that go through the model at once.
        grad_accum: batches per step.
        max_length: longer samples are cut to so many tokens; by default 1024, or what the model takes if that is less.
        warmup: steps over which the learning rate rises to ``lr``; by default 3 % of the steps.
        max_grad_norm: larger gradients are scaled down to this norm; 0 leaves them.
        weight_decay: AdamW's.
        seed: fixes A's first values, the order of samples, which ones are held out, and dropout.
        eval_fraction: share of the samples that is held out and only measured, in [0, 1).
        eval_every: measure the held-out loss every so many steps too, not only before and after.
        save_every: save adapter and state every so many steps; 0 for at the end only.
        dtype: of the arithmetic: ``"auto"``, ``"float32"`` or ``"bfloat16"``.
        device: where to compute: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, or ``"auto"``: a CUDA device if there is one.
        optimizer: ``"adamw"`` (torch's, float32 state), ``"adamw8bit"``, ``"paged_adamw"``, ``"paged_adamw8bit"``.
        memory_budget: bytes of device memory for everything, e.g. ``"24GiB"``: what does not fit is paged, see
            `qlora_rs.paging.fit`. The numbers do not depend on it.
        gradient_checkpointing: compute activations twice rather than keep them.
        keep_dequantized: with it, keep the weights that the second computation dequantizes until the backward pass has
            used them: faster, and a layer's weights in 16 or 32 bits more memory. See `qlora_rs.keep_dequantized`.
        resume: go on with the run in ``output``.
        overwrite: replace the files of another run in ``output``.

    Raises:
        ValueError: a value is out of its range, or two exclude each other.
    """

    model: Path
    data: Path
    output: Path
    r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    use_rslora: bool = False
    lr: float = 2e-4
    steps: int | None = None
    epochs: int | None = None
    batch_size: int = 4
    grad_accum: int = 1
    max_length: int | None = None
    warmup: int | None = None
    max_grad_norm: float = 0.3
    weight_decay: float = 0.0
    seed: int = 0
    eval_fraction: float = 0.0
    eval_every: int | None = None
    save_every: int = 100
    dtype: str = "auto"
    device: str = "auto"
    optimizer: str = "adamw"
    memory_budget: str | None = None
    gradient_checkpointing: bool = False
    keep_dequantized: bool = False
    resume: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Check every value that can be judged alone."""
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"--steps {self.steps} and --epochs {self.epochs} exclude each other: give one of them")
        if self.resume and self.overwrite:
            raise ValueError("--resume goes on with what --overwrite would replace: give one of them, or neither")
        least = {"r": 1, "steps": 1, "epochs": 1, "batch_size": 1, "grad_accum": 1, "max_length": 2}
        least |= {"warmup": 0, "eval_every": 1, "save_every": 0}
        for name, minimum in least.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise ValueError(f"{option(name)} is at least {minimum}; got {value}")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ValueError(f"--lr is positive and finite; got {self.lr}")
        if not (self.lora_alpha > 0 and math.isfinite(self.lora_alpha)):
            raise ValueError(f"--lora-alpha is positive and finite; got {self.lora_alpha}")
        for name in ("max_grad_norm", "weight_decay"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{option(name)} is zero or positive, and finite; got {value}")
        for name in ("lora_dropout", "eval_fraction"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ValueError(f"{option(name)} lies in [0, 1); got {value}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed lies in [0, 2^63); got {self.seed}")
        if self.eval_every is not None and self.eval_fraction == 0:
            raise ValueError("--eval-every needs held-out samples: give --eval-fraction too")
        if self.keep_dequantized and not self.gradient_checkpointing:
            raise ValueError(
                "--keep-dequantized keeps what --gradient-checkpointing computes again: give both, or neither"
            )
        if self.dtype not in DTYPES:
            raise ValueError(f"--dtype is one of {', '.join(DTYPES)}; got {self.dtype!r}")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"--optimizer is one of {', '.join(OPTIMIZERS)}; got {self.optimizer!r}")
        if self.memory_budget is not None:
            try:
                parse_bytes(self.memory_budget)
            except ValueError as error:
                raise ValueError(f"--memory-budget: {error}") from None


@dataclass(frozen=True)
class Plan:
    """What the options leave open, settled once data and model are known.

    Attributes:
        steps: optimizer steps in all.
        warmup: of them with a rising learning rate.
        max_length: tokens of the longest sample.
    """

    steps: int
    warmup: int
    max_length: int


def plan_steps(options: TrainOptions, samples: int) -> tuple[int, int]:
    """Steps in all, and of warm-up.

    Raises:
        ValueError: the warm-up is longer than the run.
    """
    if options.steps is not None:
        steps = options.steps
    else:
        steps = math.ceil(samples * (options.epochs or 1) / (options.batch_size * options.grad_accum))
    warmup = int(0.03 * steps) if options.warmup is None else options.warmup
    if warmup > steps:
        raise ValueError(f"--warmup {warmup} is longer than the run of {steps} steps: lower it")
    return steps, warmup


def plan_max_length(options: TrainOptions, model_limit: int | None) -> int:
    """Tokens of the longest sample.

    Raises:
        ValueError: the model takes fewer.
    """
    if options.max_length is None:
        return min(DEFAULT_MAX_LENGTH, model_limit or DEFAULT_MAX_LENGTH)
    if model_limit is not None and options.max_length > model_limit:
        raise ValueError(
            f"--max-length {options.max_length} is more than the {model_limit} tokens that the model takes"
        )
    return options.max_length


def option(name: str) -> str:
    """A field as one types it: ``"batch_size"`` is ``--batch-size``."""
    return "--" + name.replace("_", "-")
