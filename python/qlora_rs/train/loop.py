"""The loop: evaluate, save, step, until all steps are done."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from qlora_rs.adapters import WEIGHTS_FILE, save_adapter
from qlora_rs.checkpoint.folder import naming
from qlora_rs.errors import QloraError
from qlora_rs.eval.mode import device_of, own_random_state
from qlora_rs.lora import lora_parameters
from qlora_rs.paging import Fitted
from qlora_rs.train.batches import SampleStream, batches, derived_seed
from qlora_rs.train.curve import CURVE_FILE, draw_curve
from qlora_rs.train.encoding import Sample
from qlora_rs.train.evaluation import mean_loss
from qlora_rs.train.interruption import Interruption
from qlora_rs.train.log import LOG_FILE, EvalEntry, Log, StepEntry, read_log
from qlora_rs.train.loss import loss_sum
from qlora_rs.train.optimizer import make_optimizer
from qlora_rs.train.options import Plan, TrainOptions
from qlora_rs.train.reproducible import settle_for_less
from qlora_rs.train.schedule import learning_rate
from qlora_rs.train.state import STATE_FILE, TrainingState, capture, restore, save_state

T = TypeVar("T")

StepCallback = Callable[[StepEntry, int], object]
MessageCallback = Callable[[str], object]


class DivergedError(QloraError):
    """The loss or its gradient is no longer a finite number. The message names the step."""


@dataclass(frozen=True)
class Callbacks:
    """Who hears of a run.

    Attributes:
        on_step: called after every step with its log entry and the number of steps in all.
        on_message: called with a line for people.
    """

    on_step: StepCallback | None = None
    on_message: MessageCallback | None = None

    def message(self, text: str) -> None:
        """Tell people something."""
        if self.on_message is not None:
            self.on_message(text)


class Trainer:
    """A model with adapters, its optimizer, and how far the run is.

    Args:
        model: with adapters attached.
        training, held_out: encoded samples.
        pad_id: token that fills rows up.
        options, plan: what to do.
        settings: what a resumed run must have in common with this one.
        state: of the run to go on with.
        callbacks: who hears of it.
        fitted: how the model is held to a memory budget.

    Raises:
        FormatError: the state does not fit the model.
    """

    def __init__(
        self,
        model: Any,
        training: Sequence[Sample],
        held_out: Sequence[Sample],
        *,
        pad_id: int,
        options: TrainOptions,
        plan: Plan,
        settings: dict[str, Any],
        state: TrainingState | None,
        callbacks: Callbacks,
        fitted: Fitted | None = None,
    ) -> None:
        self._model = model
        self._held_out = held_out
        self._pad_id = pad_id
        self._options, self._plan = options, plan
        self._settings = settings
        self._callbacks = callbacks
        self._parameters = lora_parameters(model)
        self._fitted = fitted
        pool = None if fitted is None else fitted.pool
        self._optimizer = make_optimizer(options.optimizer, self._parameters, options.lr, options.weight_decay, pool)
        per_step = options.batch_size * options.grad_accum
        epochs = None if options.steps is not None else options.epochs or 1
        self._stream = SampleStream(training, options.seed, per_step, epochs)
        self._step = 0
        self._evaluated = -1
        self._saved = -1
        if state is not None:
            restore(model, self._optimizer, state.tensors, options.output / STATE_FILE)
            self._step, self._evaluated, self._saved = state.step, state.evaluated, state.step
        self._interruption = Interruption()

    def run(self, log: Log) -> None:
        """Train to the end.

        Raises:
            KeyboardInterrupt: Ctrl-C; the state after the last whole step is saved, and the message says how to go on.
            DivergedError: a loss, a gradient or the adapter is not finite; what was saved before stays.
            OSError: the system failed; what was saved before stays.
        """
        # Dropout draws from the global generator: the caller gets it back as it was.
        with own_random_state(device_of(self._model)), self._interruption:
            try:
                while True:
                    self._evaluate_if_due(log)
                    self._save_if_due(log)
                    if self._step == self._plan.steps:
                        return
                    self._advance(log)
            except KeyboardInterrupt:
                with self._interruption.held(last=True):
                    self._save(log)
                raise KeyboardInterrupt(
                    f"interrupted after step {self._step} of {self._plan.steps}, which is saved in "
                    f"{self._options.output}: the same command with --resume goes on from there"
                ) from None

    def _advance(self, log: Log) -> None:
        started, stalled = time.monotonic(), self._stalled()
        options, step = self._options, self._step + 1
        rate = learning_rate(step, self._plan.steps, self._plan.warmup, options.lr)
        samples = self._stream.step(step)
        counted = sum(sample.counted_tokens for sample in samples)
        loss = self._as_torch_can(lambda: self._gradients(step, samples, counted))
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, options.max_grad_norm or math.inf).item()
        if not math.isfinite(norm):
            raise self._diverged(f"step {step}", f"the gradient's norm is {norm}")
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        with self._interruption.held():
            self._optimizer.step()
            self._step = step
            tokens = sum(sample.length for sample in samples)
            stalled = self._stalled() - stalled
            entry = StepEntry(step, loss, rate, norm, tokens, counted, time.monotonic() - started, stalled)
            log.append(entry)
            if self._callbacks.on_step is not None:
                self._callbacks.on_step(entry, self._plan.steps)

    def _gradients(self, step: int, samples: Sequence[Sample], counted: int) -> float:
        """The loss of a step, its gradients left with the parameters; the same however often it is called."""
        torch.manual_seed(derived_seed(self._options.seed, "dropout", step))
        loss = 0.0
        self._model.train()
        self._optimizer.zero_grad(set_to_none=True)
        for batch in batches(samples, self._options.batch_size, self._pad_id):
            with nullcontext() if self._fitted is None else self._fitted.step():
                part = loss_sum(self._model, batch) / counted
            loss += part.item()
            if not math.isfinite(loss):
                raise self._diverged(f"step {step}", f"the loss is {loss}")
            # What a broken backward pass leaves, torch drops at the exit of the process, when the Python objects that
            # checkpointing hung on it are gone: it would crash.
            with self._interruption.held():
                part.backward()
        return loss

    def _as_torch_can(self, work: Callable[[], T]) -> T:
        """Do what may be done twice, again where torch refused for want of an algorithm that gives the same bits."""
        try:
            return work()
        except RuntimeError as error:
            message = settle_for_less(error)
            if message is None:
                raise
            self._callbacks.message(message)
        return work()

    def _stalled(self) -> float:
        return 0.0 if self._fitted is None else self._fitted.stall_seconds

    def _evaluate_if_due(self, log: Log) -> None:
        every = self._options.eval_every
        due = self._step in (0, self._plan.steps) or (every is not None and self._step % every == 0)
        if not self._held_out or not due or self._evaluated == self._step:
            return
        started = time.monotonic()
        batch_size = self._options.batch_size
        loss, counted = self._as_torch_can(
            lambda: mean_loss(self._model, self._held_out, batch_size=batch_size, pad_id=self._pad_id)
        )
        if not math.isfinite(loss):
            raise self._diverged(f"after step {self._step}", f"the held-out loss is {loss}")
        entry = EvalEntry(self._step, loss, counted, time.monotonic() - started)
        with self._interruption.held():
            log.append(entry)
            self._evaluated = self._step
            self._callbacks.message(
                f"held-out loss after step {entry.step}: {entry.eval_loss:.4f} ({counted:,} tokens)"
            )

    def _save_if_due(self, log: Log) -> None:
        every = self._options.save_every
        due = self._step == self._plan.steps or (every > 0 and self._step > 0 and self._step % every == 0)
        if due and self._saved != self._step:
            with self._interruption.held():
                self._save(log)

    def _save(self, log: Log) -> None:
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self._parameters):
            raise self._diverged(f"after step {self._step}", "the adapter is no longer finite")
        output = self._options.output
        with naming(output / WEIGHTS_FILE):
            save_adapter(self._model, output, base_model_name_or_path=str(self._options.model))
        tensors = capture(self._model, self._optimizer)
        state = TrainingState(self._step, self._settings, log.sync(), self._evaluated, tensors)
        save_state(output / STATE_FILE, state)
        self._saved = self._step
        draw_curve(read_log(output / LOG_FILE), output / CURVE_FILE, f"{self._options.model.name}: training loss")

    def _diverged(self, where: str, what: str) -> DivergedError:
        """The error; nothing is saved, as the adapter of this moment is the one that brought it about."""
        kept = f"the adapter after step {self._saved} is kept in {self._options.output}"
        if self._saved <= 0:
            kept = "no adapter was saved before (--save-every)"
        elif self._saved == self._step:
            kept += ", but is the one that gives this"
        return DivergedError(
            f"{where} of {self._plan.steps}: {what}; {kept}. Lower --lr, raise --warmup, or look at the samples there"
        )
