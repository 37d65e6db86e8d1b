"""``qlora-rs eval MODEL TEXT``: perplexity of a model on a text."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from qlora_rs.cli import output
from qlora_rs.cli.arguments import Arithmetic, Device, MaxTokens, ResultAsJson, TextFile, Window


def evaluate(
    model: Annotated[
        Path,
        typer.Argument(metavar="MODEL", help="Model folder, packed or not (then used as it is).", show_default=False),
    ],
    text: TextFile,
    adapter: Annotated[
        Path | None, typer.Option("--adapter", metavar="DIR", help="Adapter folder to put on the model.")
    ] = None,
    window: Window = 512,
    max_tokens: MaxTokens = None,
    dtype: Arithmetic = "auto",
    device: Device = "auto",
    as_json: ResultAsJson = False,
) -> None:
    """Measure the perplexity of a model on a text.

    It says how well the model predicts each next token; lower is better. The text is cut into consecutive windows; in
    each, every token but the first is scored, given those before it in the window. To see what quantizing cost, run it
    on the 16-bit folder and on the packed one.

    Example:

        qlora-rs eval Llama-3.2-1B-nf4 article.txt

        qlora-rs eval Llama-3.2-1B-nf4 article.txt --adapter adapter --max-tokens 4096 --json
    """
    from qlora_rs.cli.loading import load_model, read_text, text_tokens
    from qlora_rs.eval import perplexity

    content = read_text(text)
    loaded = load_model(model, adapter, dtype, device)
    tokens = text_tokens(loaded.tokenizer, content, text, max_tokens)
    started = time.monotonic()
    with output.progress_tokens("evaluating") as progress:
        result = perplexity(loaded.model, tokens, window=window, progress=progress)
    seconds = time.monotonic() - started
    if as_json:
        output.print_json(
            {
                "model": str(model),
                "adapter": None if adapter is None else str(adapter),
                "weights": loaded.description,
                "text": str(text),
                "dtype": str(loaded.model.dtype).removeprefix("torch."),
                "device": str(loaded.model.device),
                "window": window,
                "windows": result.windows,
                "tokens": result.tokens,
                "perplexity": result.ppl,
                "nats_per_token": result.nll,
                "seconds": seconds,
            }
        )
        return
    windows = f"{result.windows} window{'s' if result.windows != 1 else ''} of {window}"
    output.print_result(f"perplexity  {result.ppl:.4g}" if result.ppl >= 1000 else f"perplexity  {result.ppl:.2f}")
    output.print_result(f"nats/token  {result.nll:.4f}")
    output.print_result(f"tokens      {result.tokens:,} scored, in {windows}")
    output.print_result(f"seconds     {seconds:.1f} ({result.tokens / max(seconds, 1e-9):,.0f} tokens/s)")
