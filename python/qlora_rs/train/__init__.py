"""Fine-tune a model folder on a JSONL file: `train(TrainOptions(model=..., data=..., output=...))`."""

from __future__ import annotations

from qlora_rs.train.dataset import DataReport
from qlora_rs.train.evaluation import held_out_loss
from qlora_rs.train.log import EvalEntry, StepEntry, read_log
from qlora_rs.train.loop import DivergedError
from qlora_rs.train.options import TrainOptions
from qlora_rs.train.report import TrainReport
from qlora_rs.train.run import train

__all__ = [
    "DataReport",
    "DivergedError",
    "EvalEntry",
    "StepEntry",
    "TrainOptions",
    "TrainReport",
    "held_out_loss",
    "read_log",
    "train",
]
