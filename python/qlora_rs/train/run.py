"""`train`: from a model folder and a JSONL file to an adapter folder."""

from __future__ import annotations

import errno
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.checkpoint import noop_context_fn

from qlora_rs.checkpoint.dequantized import READERS
from qlora_rs.checkpoint.gguf_source import is_gguf_file, open_gguf
from qlora_rs.checkpoint.source import find_quantization_config, read_config, require_model
from qlora_rs.devices import resolve_device
from qlora_rs.errors import FormatError, UnsupportedError, require_extra
from qlora_rs.lora import AttachReport, attach_lora
from qlora_rs.model import from_pretrained, resolve_dtype
from qlora_rs.paging import Fitted, fit
from qlora_rs.pictures.canvas import require_matplotlib
from qlora_rs.recomputation import keep_dequantized
from qlora_rs.train.curve import EXTRA, PURPOSE
from qlora_rs.train.dataset import Dataset, make_dataset
from qlora_rs.train.encoding import Encoder, load_tokenizer, pad_token
from qlora_rs.train.folder import FILES, check_output, claimed
from qlora_rs.train.log import LOG_FILE, Log, read_log
from qlora_rs.train.loop import Callbacks, MessageCallback, StepCallback, Trainer
from qlora_rs.train.options import Plan, TrainOptions, option, plan_max_length, plan_steps
from qlora_rs.train.records import RecordFile, read_records
from qlora_rs.train.report import TrainReport, loss_at_both_ends
from qlora_rs.train.reproducible import reproducible
from qlora_rs.train.state import STATE_FILE, TrainingState, check_same_run, model_digest, read_state


def train(
    options: TrainOptions,
    *,
    on_step: StepCallback | None = None,
    on_message: MessageCallback | None = None,
) -> TrainReport:
    """Train LoRA adapters on a model's Linear layers, and write them to ``options.output``.

    Everything that can be checked without the model (options, output, data, state to resume) is, before it is loaded.

    Args:
        options: what to do.
        on_step: called after every step with its `StepEntry` and the number of steps in all.
        on_message: called with lines for people: what became of the data, held-out losses.

    Raises:
        OSError: a file or folder is missing, in the way, or cannot be written.
        FormatError: the data, the model or the state is damaged; file and line are named.
        UnsupportedError: a wish that cannot be met, a run that differs from the one to resume, nothing left to do.
        ValueError: options do not fit each other, the data or the model.
        DeviceError: there is no such device, or it fails.
        DivergedError: the loss is no longer finite.
        KeyboardInterrupt: Ctrl-C; the message says how to go on.

    >>> report = train(TrainOptions(model=Path("m"), data=Path("d"), output=Path("o")))  # doctest: +SKIP
    """
    callbacks = Callbacks(on_step, on_message)
    require_extra("transformers", "train", "training")
    require_matplotlib(EXTRA, PURPOSE)
    require_model(options.model)
    config = open_gguf(options.model).config if is_gguf_file(options.model) else read_config(options.model)
    device = resolve_device(options.device)
    check_output(options)
    state = read_state(options.output / STATE_FILE) if options.resume else None
    file = _read_data(options.data)
    tokenizer = load_tokenizer(options.model)
    dataset, plan = _prepare(options, config, file, tokenizer)
    settings = _settings(options, plan, device, file, dataset)
    if state is not None:
        _check_resumable(state, settings, options)
    for line in str(dataset.report).splitlines():
        callbacks.message(line)
    method = (find_quantization_config(config) or {}).get("quant_method")
    if method is None or method in READERS:
        held = "is not packed" if method is None else f"is quantized by {method}"
        callbacks.message(
            f"{options.model} {held}: quantized on the way in (NF4, double quantization); "
            "`qlora-rs quantize` does that once and for all"
        )
    with reproducible(device):
        attached = _train(options, plan, device, dataset, pad_token(tokenizer), settings, state, callbacks)
    return _report(options, plan, device, dataset, attached, settings, 0 if state is None else state.step)


def _train(
    options: TrainOptions,
    plan: Plan,
    device: torch.device,
    dataset: Dataset,
    pad_id: int,
    settings: dict[str, Any],
    state: TrainingState | None,
    callbacks: Callbacks,
) -> AttachReport:
    model, attached = _load(options, device, dataset)
    callbacks.message(f"{attached}; arithmetic in {str(model.dtype).removeprefix('torch.')} on {device}")
    fitted = _fit(model, options, device, dataset, callbacks)
    trainer = Trainer(
        model,
        dataset.training,
        dataset.held_out,
        pad_id=pad_id,
        options=options,
        plan=plan,
        settings=settings,
        state=state,
        callbacks=callbacks,
        fitted=fitted,
    )
    if state is not None:
        callbacks.message(f"going on after step {state.step} of {plan.steps}")
    kept = 0 if state is None else state.log_bytes
    with claimed(options.output, resume=options.resume), Log(options.output / LOG_FILE, kept) as log:
        trainer.run(log)
    return attached


def _read_data(path: Path) -> RecordFile:
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder; --data takes one JSONL file", str(path))
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, "no such file; --data takes a JSONL file", str(path))
    return read_records(path)


def _prepare(options: TrainOptions, config: dict[str, Any], file: RecordFile, tokenizer: Any) -> tuple[Dataset, Plan]:
    limit = config.get("max_position_embeddings")
    max_length = plan_max_length(options, limit if isinstance(limit, int) and limit > 1 else None)
    if options.steps is not None:
        plan_steps(options, 0)  # a warm-up that is too long is told before the data is encoded
    encoder = Encoder(tokenizer, max_length, model=options.model, data=options.data)
    needed = None if options.steps is None else options.steps * options.batch_size * options.grad_accum
    dataset = make_dataset(
        file,
        encoder,
        fraction=options.eval_fraction,
        seed=options.seed,
        max_length=max_length,
        needed=needed,
    )
    steps, warmup = plan_steps(options, len(dataset.training))
    return dataset, Plan(steps, warmup, max_length)


def _settings(
    options: TrainOptions, plan: Plan, device: torch.device, file: RecordFile, dataset: Dataset
) -> dict[str, Any]:
    """Everything that the numbers of a run depend on; under a sentence's subject where no option sets it."""
    names = (
        "r lora_alpha lora_dropout target_modules use_rslora lr batch_size grad_accum max_grad_norm weight_decay seed "
        "eval_fraction dtype optimizer"
    )
    settings: dict[str, Any] = {option(name): getattr(options, name) for name in names.split()}
    settings |= {option(name): getattr(plan, name) for name in ("steps", "warmup", "max_length")}
    settings["--device"] = device.type
    settings["the file of --data"] = file.sha256
    settings["the model of --model"] = model_digest(options.model)
    settings["what the tokenizer and its chat template make of the data"] = dataset.digest
    return settings


def _check_resumable(state: TrainingState, settings: dict[str, Any], options: TrainOptions) -> None:
    path = options.output / STATE_FILE
    unsaid = {"--device": "cpu", "--optimizer": "adamw"}  # by older states
    check_same_run({**unsaid, **state.settings}, settings, path)
    steps = settings["--steps"]
    if state.step >= steps:
        raise UnsupportedError(
            f"{path}: nothing left to do: {state.step} of {steps} steps are done; a longer run starts anew, with "
            "--overwrite or another --output, as its learning rates are others"
        )


def _load(options: TrainOptions, device: torch.device, dataset: Dataset) -> tuple[Any, AttachReport]:
    dtype = resolve_dtype(options.dtype, device)
    if dtype == torch.float16:  # a device without bfloat16: gradients of float16 would vanish
        dtype = torch.float32
    # Under a budget the device may have no room for all weights: they go there from the host, as far as they fit.
    place = device if options.memory_budget is None else torch.device("cpu")
    model = from_pretrained(options.model, dtype=dtype, device=place)
    embedding = model.get_input_embeddings()
    highest = max(int(sample.ids.max()) for sample in (*dataset.training, *dataset.held_out))
    if highest >= embedding.num_embeddings:
        raise FormatError(
            f"{options.model}: its tokenizer gives token {highest}, but the model has {embedding.num_embeddings} "
            "embeddings: the tokenizer is of another model"
        )
    model.config.use_cache = False
    attached = attach_lora(
        model,
        r=options.r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=options.target_modules,
        use_rslora=options.use_rslora,
        seed=options.seed,
    )
    if options.gradient_checkpointing:
        _checkpoint_activations(model, keep_dequantized if options.keep_dequantized else noop_context_fn)
    return model, attached


def _fit(
    model: Any, options: TrainOptions, device: torch.device, dataset: Dataset, callbacks: Callbacks
) -> Fitted | None:
    if options.memory_budget is None:
        return None
    longest = max(sample.length for sample in (*dataset.training, *dataset.held_out))
    fitted = fit(
        model,
        options.memory_budget,
        device,
        tokens=options.batch_size * longest,
        optimizer=options.optimizer,
        checkpointing=options.gradient_checkpointing,
        keep_dequantized=options.keep_dequantized,
    )
    for line in str(fitted).splitlines():
        callbacks.message(line)
    if device.type == "cpu":
        callbacks.message("on the CPU a memory budget saves nothing: what is paged moves within the same memory")
    return fitted


def _checkpoint_activations(model: Any, context_fn: Callable[[], Any]) -> None:
    settings = {"use_reentrant": False, "context_fn": context_fn}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    else:  # its only name in older versions
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)


def _report(
    options: TrainOptions,
    plan: Plan,
    device: torch.device,
    dataset: Dataset,
    attached: AttachReport,
    settings: dict[str, Any],
    resumed_at: int,
) -> TrainReport:
    entries = read_log(options.output / LOG_FILE)
    steps = [entry for entry in entries if "loss" in entry]
    held_out = [entry["eval_loss"] for entry in entries if "eval_loss" in entry]
    first, last = loss_at_both_ends(entries)
    seen = plan.steps * options.batch_size * options.grad_accum
    if options.steps is None:
        seen = min(seen, (options.epochs or 1) * len(dataset.training))
    return TrainReport(
        model=str(options.model),
        output=str(options.output),
        files=tuple(name for name in FILES if (options.output / name).exists()),
        data=dataset.report,
        layers=len(attached.attached),
        trainable_parameters=attached.trainable_parameters,
        total_parameters=attached.total_parameters,
        steps=plan.steps,
        resumed_at=resumed_at,
        epochs=None if dataset.report.unread else seen / len(dataset.training),
        tokens=sum(entry["tokens"] for entry in steps),
        counted_tokens=sum(entry["counted_tokens"] for entry in steps),
        seconds=sum(entry["seconds"] for entry in steps),
        peak_device_memory_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        first_loss=first,
        last_loss=last,
        eval_loss_before=held_out[0] if held_out else None,
        eval_loss_after=held_out[-1] if held_out else None,
        settings=settings,
    )
