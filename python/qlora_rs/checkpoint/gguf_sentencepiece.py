"""SentencePiece's BPE tokenizers, those of Llama 2 and Mistral, as fields of a GGUF file, and from it.

A file holds tokens and scores, no merges: a reader joins the two neighbours whose token has the highest score. In
tokenizer.json the same is a list of merges in that order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_rs.errors import UnsupportedError

MARK = "\u2581"  # what stands for a space
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": MARK}
_PREPEND = {"type": "Prepend", "prepend": MARK}
# gguf.TokenType
_NORMAL, _UNKNOWN, _BYTE_TOKEN = 1, 2, 6


@dataclass(frozen=True)
class TokenizerFields:
    """What a GGUF file says of its tokenizer besides the tokens.

    Attributes:
        kind: ``"gpt2"`` (byte-level BPE), ``"llama"`` (SentencePiece) or another.
        cuts: of the first, the name of the way in which text is cut before merging.
        prefix: of the second, whether a space is put before a text.
        before, after: ids of the tokens that go before and after a text, where they do.
    """

    kind: str
    cuts: str = ""
    prefix: bool = True
    before: int | None = None
    after: int | None = None

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> TokenizerFields:
        """From the fields of a file; llama.cpp's defaults where it has none."""

        def field(name: str, default: Any = None) -> Any:
            return fields.get(f"tokenizer.ggml.{name}", default)

        kind = str(field("model", ""))
        bos, eos = field("bos_token_id"), field("eos_token_id")
        return cls(
            kind=kind,
            cuts=str(field("pre", "")) if kind == "gpt2" else "",
            prefix=bool(field("add_space_prefix", True)),
            before=bos if field("add_bos_token", True) and isinstance(bos, int) else None,
            after=eos if field("add_eos_token", False) and isinstance(eos, int) else None,
        )


def is_sentencepiece(model: Mapping[str, Any]) -> bool:
    """Whether the ``model`` of a tokenizer.json is SentencePiece's BPE."""
    return model.get("type", "BPE") == "BPE" and bool(model.get("byte_fallback"))


def sentencepiece_fields(
    path: Path, content: Mapping[str, Any], tokens: Sequence[str], types: list[int], notes: list[str]
) -> tuple[list[float], bool]:
    """The scores of the tokens, and whether a space is put before a text; ``types`` are mended.

    Args:
        path: of tokenizer.json, for messages.
        content: of it.
        tokens: by id.
        types: of the tokens, as gguf-py numbers them.
        notes: gets what the user should know.

    Raises:
        UnsupportedError: readers of the file would give other tokens for a text.
    """
    model = content["model"]
    byte_tokens = {token for token in tokens if _BYTE.fullmatch(token)}
    if len(byte_tokens) != 256:
        raise UnsupportedError(
            f"{path}: has tokens for {len(byte_tokens)} bytes, not for all 256, as a GGUF file needs"
        )
    normal = [token in model["vocab"] and kind == _NORMAL for token, kind in zip(tokens, types, strict=True)]
    normal = [here and token not in byte_tokens for here, token in zip(normal, tokens, strict=True)]
    scores = _scores(path, model, tokens, normal)
    for number, token in enumerate(tokens):
        if token in byte_tokens:
            types[number] = _BYTE_TOKEN
        elif token == model.get("unk_token"):
            types[number] = _UNKNOWN
    return scores, _prefix(path, content, notes)


def _scores(path: Path, model: Mapping[str, Any], tokens: Sequence[str], normal: Sequence[bool]) -> list[float]:
    """Descending in the order of merges, then of single characters; 0 for tokens that are not ``normal``."""
    vocabulary: dict[str, int] = model["vocab"]
    pairs = [
        tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model.get("merges", ())
    ]
    made: dict[str, int] = {}
    order = []
    for left, right in pairs:
        made.setdefault(left + right, len(made))
        order.append(made[left + right])
    found = set(pairs)
    # What a reader joins is whatever gives a token: other merges than those, or others first, give other tokens.
    absent = next(
        (
            (token[:cut], token[cut:])
            for token, is_normal in zip(tokens, normal, strict=True)
            for cut in range(1, len(token) if is_normal else 0)
            if token[:cut] in vocabulary and token[cut:] in vocabulary and (token[:cut], token[cut:]) not in found
        ),
        None,
    )
    if absent is not None or order != sorted(order):
        what = f"does not merge {absent[0]!r} and {absent[1]!r}" if absent else "merges to a token at several ranks"
        raise UnsupportedError(
            f"{path}: {what}; a GGUF file tells merges by scores of tokens alone, so a reader would cut text otherwise"
        )
    scores = [0.0] * len(tokens)
    rest = len(made)
    for number, token in enumerate(tokens):
        if token in made:
            scores[number] = float(-made[token])
        elif normal[number]:
            scores[number] = float(-rest)
            rest += 1
    return scores


def _prefix(path: Path, content: Mapping[str, Any], notes: list[str]) -> bool:
    """Whether a space is put before a text, in one of the forms that tokenizer.json has for it."""
    normalizer, cutter = content.get("normalizer"), content.get("pre_tokenizer")
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    if cutter is None and steps in ([_PREPEND, _REPLACE], [_REPLACE]):
        return len(steps) == 2
    if cutter is not None and not steps and cutter.get("type") == "Metaspace" and cutter.get("replacement") == MARK:
        scheme = cutter.get("prepend_scheme", "always" if cutter.get("add_prefix_space", True) else "never")
        if not cutter.get("split", False):
            if scheme != "never":
                notes.append(
                    "the tokenizer puts no space before a text that begins with one, or after a special token: readers "
                    "of a GGUF file do"
                )
            return bool(scheme != "never")
    raise UnsupportedError(
        f"{path}: normalizes or cuts text in a way that no SentencePiece tokenizer in a GGUF file is read to have"
    )


def mend_sentencepiece(content: dict[str, Any], settings: dict[str, Any], fields: TokenizerFields) -> None:
    """Put right what transformers makes of the tokenizer: it puts no second space before a text that begins with one.

    SentencePiece and llama.cpp do. Its class would make the same again from vocabulary and merges, so another is named.

    Args:
        content: of tokenizer.json.
        settings: of tokenizer_config.json.
        fields: of the file.
    """
    names = {number: token for token, number in content["model"]["vocab"].items()}
    content["normalizer"] = {"type": "Sequence", "normalizers": [*([_PREPEND] if fields.prefix else []), _REPLACE]}
    content["pre_tokenizer"] = None
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if fields.prefix else []
    back = {"type": "Replace", "pattern": {"String": MARK}, "content": " "}
    content["decoder"] = {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]}
    content["model"] |= {"byte_fallback": True, "fuse_unk": True}
    around = [(fields.before, 0), (None, None), (fields.after, 1)]
    single: list[dict[str, Any]] = []
    special: dict[str, Any] = {}
    for number, place in around:
        if place is None:
            single.append({"Sequence": {"id": "A", "type_id": 0}})
        elif number is not None and number in names:
            token = names[number]
            single.append({"SpecialToken": {"id": token, "type_id": 0}})
            special[token] = {"id": token, "ids": [number], "tokens": [token]}
    second = [
        {kind: {**part, "id": "B" if kind == "Sequence" else part["id"], "type_id": 1} for kind, part in step.items()}
        for step in single
    ]
    template = {"type": "TemplateProcessing", "single": single, "pair": [*single, *second], "special_tokens": special}
    content["post_processor"] = template if special else None
    for key in ("add_bos_token", "add_eos_token", "legacy", "add_prefix_space", "use_default_system_prompt"):
        settings.pop(key, None)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
