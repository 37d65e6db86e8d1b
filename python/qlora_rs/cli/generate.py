"""``qlora-rs generate MODEL --prompt TEXT``: one answer."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from qlora_rs.cli import output
from qlora_rs.cli.arguments import Arithmetic, Device


def generate(
    model: Annotated[
        Path,
        typer.Argument(metavar="MODEL", help="Model folder, packed or not (then used as it is).", show_default=False),
    ],
    prompt: Annotated[str, typer.Option("--prompt", metavar="TEXT", help="What the user says.", show_default=False)],
    adapter: Annotated[
        Path | None, typer.Option("--adapter", metavar="DIR", help="Adapter folder to put on the model.")
    ] = None,
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="System message before the prompt.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the answer at most.")] = 128,
    temperature: Annotated[
        float, typer.Option(min=0, help="0: always the most likely token. Above: draw, the wilder the higher.")
    ] = 0.0,
    top_p: Annotated[
        float | None, typer.Option(help="Draw only from the likeliest tokens with this much probability.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Makes drawing repeatable.")] = None,
    no_chat_template: Annotated[
        bool, typer.Option("--no-chat-template", help="Continue the prompt as plain text.")
    ] = False,
    dtype: Arithmetic = "auto",
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print text and counts as one JSON document.")] = False,
) -> None:
    """Answer a prompt through the model's chat template.

    The answer alone goes to stdout.

    Example:

        qlora-rs generate SmolLM2-135M-nf4 --prompt "How was your day?" --adapter adapter

        qlora-rs generate SmolLM2-135M-nf4 --prompt "Tell me a story." --temperature 0.8 --top-p 0.9 --seed 1
    """
    from qlora_rs import eval as evaluation
    from qlora_rs.cli.loading import load_model, warnings_as_messages

    loaded = load_model(model, adapter, dtype, device)
    started = time.monotonic()
    with warnings_as_messages():
        answer = evaluation.generate(
            loaded.model,
            loaded.tokenizer,
            prompt,
            system=system,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            chat_template=not no_chat_template,
        )
    seconds = time.monotonic() - started
    if as_json:
        output.print_json(
            {
                "model": str(model),
                "adapter": None if adapter is None else str(adapter),
                "text": answer.text,
                "prompt_tokens": answer.prompt_tokens,
                "new_tokens": answer.new_tokens,
                "finished": answer.finished,
                "device": str(loaded.model.device),
                "seconds": seconds,
            }
        )
        return
    output.print_result(answer.text)
    if not answer.finished:
        output.message(f"cut after {answer.new_tokens} tokens; --max-new-tokens allows more")
