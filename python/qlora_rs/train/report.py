"""What a run of training did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qlora_rs.train.dataset import DataReport


@dataclass(frozen=True)
class TrainReport:
    """Nothing is left out of it in silence; ``str(report)`` is for people, `to_dict` for programs.

    Attributes:
        model: folder of the base.
        output: folder of the adapter.
        files: what was written there.
        data: what became of the data.
        layers: layers with an adapter.
        trainable_parameters: elements of all A and B.
        total_parameters: elements of the model.
        steps: done in all, those before a resumption too.
        resumed_at: steps that were done before; 0 if the run was not resumed.
        epochs: passes over the samples to train on; None where only a part of them was read.
        tokens: that went through the model, without padding.
        counted_tokens: those that the loss counted.
        seconds: that all steps took.
        peak_memory_bytes: of this process.
        peak_device_memory_bytes: of tensors on the CUDA device; None where the CPU computed.
        first_loss: mean of the first tenth of the steps (at least one), in nats.
        last_loss: mean of the last tenth.
        eval_loss_before, eval_loss_after: on the held-out samples; None where none were held out.
        settings: everything that the numbers depend on.
    """

    model: str
    output: str
    files: tuple[str, ...]
    data: DataReport
    layers: int
    trainable_parameters: int
    total_parameters: int
    steps: int
    resumed_at: int
    epochs: float | None
    tokens: int
    counted_tokens: int
    seconds: float
    peak_memory_bytes: int
    peak_device_memory_bytes: int | None
    first_loss: float
    last_loss: float
    eval_loss_before: float | None
    eval_loss_after: float | None
    settings: dict[str, Any]

    @property
    def tokens_per_second(self) -> float:
        """Of the steps alone, without loading and measuring."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The same in plain lists and dicts, as ``--json`` prints it."""
        return {**asdict(self), "tokens_per_second": self.tokens_per_second}

    def __str__(self) -> str:
        """A few lines."""
        from qlora_rs.report import format_bytes

        resumed = f" ({self.resumed_at} of them before it was resumed)" if self.resumed_at else ""
        epochs = f", {self.epochs:.2f} epochs" if self.epochs is not None else ""
        device = self.peak_device_memory_bytes
        on_device = "" if device is None else f", on the device {format_bytes(device)}"
        lines = [
            f"trained {self.steps} step{'' if self.steps == 1 else 's'}{resumed}{epochs} in {clock(self.seconds)}: "
            f"{self.tokens:,} tokens, {self.counted_tokens:,} of them counted; {self.tokens_per_second:,.0f} tokens/s, "
            f"peak memory {format_bytes(self.peak_memory_bytes)}{on_device}",
            f"loss           {self.first_loss:.4f} -> {self.last_loss:.4f} (first and last tenth of the steps)",
        ]
        if self.eval_loss_before is not None and self.eval_loss_after is not None:
            samples = f"{self.data.held_out} sample{'' if self.data.held_out == 1 else 's'}"
            lines.append(
                f"held-out loss  {self.eval_loss_before:.4f} -> {self.eval_loss_after:.4f} (before and after, "
                f"{samples})"
            )
        lines.append(f"in {self.output}: {', '.join(self.files)}")
        return "\n".join(lines)


def loss_at_both_ends(entries: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Mean loss of the first and of the last tenth of the steps, each token counted alike."""
    steps = [entry for entry in entries if "loss" in entry]
    tenth = max(1, len(steps) // 10)
    first, last = (
        sum(entry["loss"] * entry["counted_tokens"] for entry in part) / sum(entry["counted_tokens"] for entry in part)
        for part in (steps[:tenth], steps[-tenth:])
    )
    return first, last


def clock(seconds: float) -> str:
    """A time as people write it.

    >>> clock(75), clock(3.21), clock(7322)
    ('1:15', '3.2 s', '2:02:02')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
