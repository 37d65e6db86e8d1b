"""The tokenizer of a model folder as the fields of a GGUF file: tokens, merges, special tokens, chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_rs.checkpoint.gguf_sentencepiece import (
    TokenizerFields,
    is_sentencepiece,
    mend_sentencepiece,
    sentencepiece_fields,
)
from qlora_rs.checkpoint.source import read_json
from qlora_rs.errors import FormatError, UnsupportedError

TOKENIZER = "tokenizer.json"
# What of a folder a GGUF file holds itself.
TOKENIZER_FILES = (
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)

# gguf.TokenType
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTES_ALONE = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_BYTES_AFTER = {**_BYTES_ALONE, "use_regex": False}
_SPLIT = {"type": "Split", "pattern": {"Regex": _LLAMA3_SPLIT}, "behavior": "Isolated", "invert": False}

# How text is cut before merging, as tokenizer.json tells it in steps, by the name that readers of GGUF know it under.
CUTS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [_BYTES_ALONE],
    "smollm": [{"type": "Digits", "individual_digits": True}, _BYTES_ALONE],
    "llama-bpe": [_SPLIT, _BYTES_AFTER],
}
# Those that take a word whole if it is a token, whatever merges say.
MERGES_IGNORED = ("llama-bpe",)


def add_tokenizer(writer: Any, special: Any, folder: Path, vocabulary: int, notes: list[str]) -> None:
    """Add the tokenizer in ``folder`` to what a GGUF file will hold.

    Args:
        writer: a ``gguf.GGUFWriter``.
        special: what ``gguf.SpecialVocab`` read of the folder: merges, special tokens, chat template.
        folder: the model folder.
        vocabulary: rows of the embedding; ids without a token are written as unused.
        notes: gets what the user should know.

    Byte-level BPE is told by its merges, SentencePiece's by the scores of its tokens.

    Raises:
        FormatError: ``tokenizer.json`` is missing or damaged, or has more tokens than the embedding has rows.
        UnsupportedError: a kind of tokenizer that GGUF files have no name for here.
    """
    path = folder / TOKENIZER
    if not path.is_file():
        raise FormatError(
            f"{folder}: there is no {TOKENIZER}; a GGUF file carries its tokenizer, so save it there first"
        )
    content = read_json(path)
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
        got = model.get("type") if isinstance(model, dict) else None
        raise UnsupportedError(f"{path}: is a {got!r} tokenizer; byte-level and SentencePiece's BPE are written")
    pieces = is_sentencepiece(model)
    pre = "default" if pieces else _pre_tokenizer(path, content, model)
    tokens, types = _tokens(path, content, model, vocabulary)
    writer.add_tokenizer_model("llama" if pieces else "gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    if pieces:
        scores, prefix = sentencepiece_fields(path, content, tokens, types, notes)
        writer.add_token_scores(scores)
        writer.add_add_space_prefix(prefix)
        special.merges = []
    writer.add_token_types(types)
    if "bos" not in special.add_special_token:
        special.add_special_token["bos"] = False  # readers differ in what they take for granted
    special.add_to_gguf(writer, quiet=True)
    if not special.merges and not pieces:
        notes.append("the tokenizer merges nothing: llama.cpp wants merges in a file that it loads")


def _pre_tokenizer(path: Path, content: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    """The name under which readers of GGUF know how this tokenizer cuts text before merging."""
    if model.get("type", "BPE") != "BPE":
        raise UnsupportedError(
            f"{path}: is a {model['type']!r} tokenizer; byte-level and SentencePiece's BPE are written"
        )
    if content.get("normalizer") is not None:
        kind = content["normalizer"].get("type")
        raise UnsupportedError(f"{path}: normalizes text ({kind}), which a GGUF file cannot tell its reader")
    found = content.get("pre_tokenizer") or {}
    steps = found.get("pretokenizers") or [found]
    shapes = [_shape(step) for step in steps]
    for name, expected in CUTS.items():
        if shapes == expected and bool(model.get("ignore_merges")) == (name in MERGES_IGNORED):
            return name
    raise UnsupportedError(
        f"{path}: cuts text in a way that has no name here (known are {', '.join(CUTS)}), so a reader of the GGUF "
        "file would cut it otherwise; llama.cpp's own converter knows more"
    )


def mend_tokenizer(folder: Path, fields: TokenizerFields, vocabulary: int) -> None:
    """Put right what transformers makes of a GGUF file's tokenizer, saved in ``folder``.

    It knows fewer ways to cut text than files have names for, and takes GPT-2's for the others. It also adds GPT-2's
    ``<|endoftext|>`` where a file has none: a token that the embedding has no row for. Of SentencePiece's see
    `mend_sentencepiece`.

    Args:
        folder: with ``tokenizer.json`` and ``tokenizer_config.json``.
        fields: what the file says of it.
        vocabulary: rows of the embedding.
    """
    file, settings = folder / TOKENIZER, folder / "tokenizer_config.json"
    if not file.is_file():
        return  # of a kind that is kept in other files
    content = read_json(file)
    steps = CUTS.get(fields.cuts)
    if steps is not None:
        steps = [{**step, "trim_offsets": True} if step["type"] == "ByteLevel" else step for step in steps]
        content["model"]["ignore_merges"] = fields.cuts in MERGES_IGNORED
        content["pre_tokenizer"] = steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps}
    added = content.get("added_tokens") or []
    beyond = {token["content"] for token in added if token["id"] >= vocabulary}
    content["added_tokens"] = [token for token in added if token["content"] not in beyond]
    named = {
        key: value for key, value in read_json(settings).items() if not (isinstance(value, str) and value in beyond)
    }
    if fields.kind == "llama":
        mend_sentencepiece(content, named, fields)
    for path, value in ((file, content), (settings, named)):
        path.write_text(json.dumps(value, ensure_ascii=False, indent=2), encoding="utf-8")


def _shape(step: Mapping[str, Any]) -> dict[str, Any]:
    """What of a step decides where text is cut; offsets are for those who ask where tokens came from."""
    return {key: value for key, value in step.items() if key != "trim_offsets"}


def _tokens(
    path: Path, content: Mapping[str, Any], model: Mapping[str, Any], vocabulary: int
) -> tuple[list[str], list[int]]:
    """Every token by its id, and what kind it is of."""
    tokens = [f"[PAD{number}]" for number in range(vocabulary)]
    types = [UNUSED] * vocabulary
    added = content.get("added_tokens") or []
    entries = [(token, number, NORMAL) for token, number in model["vocab"].items()]
    entries += [(each["content"], each["id"], CONTROL if each.get("special") else USER_DEFINED) for each in added]
    for token, number, kind in entries:
        if type(number) is not int or not 0 <= number < vocabulary:
            raise FormatError(
                f"{path}: token {token!r} has the id {number!r}, but the embedding has {vocabulary} rows: "
                "tokenizer and model do not belong together"
            )
        tokens[number], types[number] = token, kind
    return tokens, types
