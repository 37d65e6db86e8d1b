"""``qlora-rs train``: a packed model and a JSONL file to an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qlora_rs.cli import output
from qlora_rs.cli.arguments import Device
from qlora_rs.cli.loading import quiet_transformers
from qlora_rs.cli.training_progress import training_progress


def train(
    model: Annotated[
        Path,
        typer.Option(
            "--model",
            metavar="M",
            help="Model folder, as `qlora-rs quantize` makes one, or a GGUF file.",
            show_default=False,
        ),
    ],
    data: Annotated[
        Path,
        typer.Option(
            "--data",
            metavar="D",
            help="JSONL: messages, conversations (sharegpt), instruction and output (alpaca), or text.",
            show_default=False,
        ),
    ],
    destination: Annotated[
        Path,
        typer.Option(
            "--output",
            metavar="O",
            help="Folder for adapter, log and loss curve; absent or empty.",
            show_default=False,
        ),
    ],
    r: Annotated[int, typer.Option("--r", min=1, help="Rank of the adapters.")] = 16,
    lora_alpha: Annotated[float, typer.Option("--lora-alpha", help="The adapter is scaled by alpha / r.")] = 32,
    lora_dropout: Annotated[float, typer.Option("--lora-dropout", help="Dropout of the adapters' inputs.")] = 0.0,
    target_modules: Annotated[
        list[str] | None,
        typer.Option(
            "--target-modules",
            metavar="PATTERN",
            help="Layers that get an adapter: full name, last part or glob. Repeatable; by default all Linear layers "
            "but the head and experts.",
        ),
    ] = None,
    use_rslora: Annotated[bool, typer.Option("--use-rslora", help="Scale by alpha / sqrt(r), for large r.")] = False,
    lr: Annotated[float, typer.Option("--lr", help="Highest learning rate.")] = 2e-4,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Optimizer steps. Excludes --epochs.")] = None,
    epochs: Annotated[
        int | None, typer.Option("--epochs", min=1, help="Passes over the data; 1 without --steps.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Samples at once.")] = 4,
    grad_accum: Annotated[
        int, typer.Option("--grad-accum", min=1, help="Batches per step: more samples, no more memory.")
    ] = 1,
    max_length: Annotated[
        int | None,
        typer.Option("--max-length", min=2, help="Cut samples to so many tokens; 1024, or the model's limit if less."),
    ] = None,
    warmup: Annotated[
        int | None, typer.Option("--warmup", min=0, help="Steps of rising rate; 3 % of all by default.")
    ] = None,
    max_grad_norm: Annotated[
        float, typer.Option("--max-grad-norm", help="Clip gradients to this norm; 0 leaves them.")
    ] = 0.3,
    weight_decay: Annotated[float, typer.Option("--weight-decay", help="Of AdamW.")] = 0.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Same seed, same machine: same bits of loss.")] = 0,
    eval_fraction: Annotated[
        float,
        typer.Option("--eval-fraction", help="Hold out this share of the samples and report the loss on them."),
    ] = 0.0,
    eval_every: Annotated[
        int | None,
        typer.Option("--eval-every", min=1, help="Measure them every N steps too, not only before and after."),
    ] = None,
    save_every: Annotated[
        int, typer.Option("--save-every", min=0, help="Save every N steps too; 0 for at the end only.")
    ] = 100,
    dtype: Annotated[str, typer.Option("--dtype", help="Arithmetic: auto, float32 or bfloat16.")] = "auto",
    device: Device = "auto",
    optimizer: Annotated[
        str, typer.Option("--optimizer", help="adamw, adamw8bit, paged_adamw or paged_adamw8bit.")
    ] = "adamw",
    memory_budget: Annotated[
        str | None,
        typer.Option(
            "--memory-budget",
            metavar="BYTES",
            help="Device memory for everything, e.g. 24GiB; what does not fit waits on the host.",
        ),
    ] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, a third more time.")
    ] = False,
    keep_dequantized: Annotated[
        bool,
        typer.Option(
            "--keep-dequantized",
            help="With --gradient-checkpointing: a little faster, for the memory of one layer's weights in 16 bits.",
        ),
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in O, bit for bit.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the files of another run in O.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON document.")] = False,
) -> None:
    """Fine-tune a 4-bit model through LoRA adapters.

    The base stays frozen in 4 bits; the adapter is written as PEFT's two files, beside a log (a JSON object a
    step), the loss curve, and a state for --resume. Chats go through the tokenizer's chat template, and the loss
    counts the assistant's turns only. Ctrl-C saves the last whole step.

    Example:

        qlora-rs train --model Llama-3.2-1B-nf4 --data chats.jsonl --output my-adapter

        qlora-rs train --model Llama-3.2-1B-nf4 --data chats.jsonl --output my-adapter --steps 500 --batch-size 2
        --grad-accum 8 --eval-fraction 0.05 --eval-every 100

    The same command with --resume goes on where it stopped. Then:

        qlora-rs generate Llama-3.2-1B-nf4 --adapter my-adapter --prompt "Hello!"
    """
    from qlora_rs.lora import ALL_LINEAR
    from qlora_rs.train import TrainOptions
    from qlora_rs.train import train as run

    options = TrainOptions(
        model=model,
        data=data,
        output=destination,
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=ALL_LINEAR if target_modules in (None, [], [ALL_LINEAR]) else tuple(target_modules or ()),
        use_rslora=use_rslora,
        lr=lr,
        steps=steps,
        epochs=epochs,
        batch_size=batch_size,
        grad_accum=grad_accum,
        max_length=max_length,
        warmup=warmup,
        max_grad_norm=max_grad_norm,
        weight_decay=weight_decay,
        seed=seed,
        eval_fraction=eval_fraction,
        eval_every=eval_every,
        save_every=save_every,
        dtype=dtype,
        device=device,
        optimizer=optimizer,
        memory_budget=memory_budget,
        gradient_checkpointing=gradient_checkpointing,
        keep_dequantized=keep_dequantized,
        resume=resume,
        overwrite=overwrite,
    )
    quiet_transformers("training")
    with training_progress() as on_step:
        report = run(options, on_step=on_step, on_message=output.message)
    if as_json:
        output.print_json(report.to_dict())
    else:
        output.print_report(str(report))
