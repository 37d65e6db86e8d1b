"""Make tests/golden/sentencepiece: a Llama-like tokenizer by SentencePiece itself, and what other libraries make of it.

    pip install sentencepiece protobuf gguf transformers; python tests/golden/make_sentencepiece.py

Made with sentencepiece 0.2.3, gguf 0.19.0, transformers 5.24.0. `tokenizer.model` is trained on
tests/data/brown_eval.txt with byte fallback and dummy prefix as Llama 2 has them; `tokenizer.json` has vocabulary and
merges of transformers' conversion of it; `fields.json` is what gguf-py's `SentencePieceVocab`, which llama.cpp's
converter uses, takes from it; `expected.json` has texts, and the token ids that SentencePiece gives them.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from pathlib import Path

import sentencepiece
from gguf.vocab import SentencePieceVocab
from tokenizers import Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from transformers.convert_slow_tokenizer import SentencePieceExtractor

HERE = Path(__file__).resolve().parent
FOLDER = HERE / "sentencepiece"
TEXT = HERE.parent / "data" / "brown_eval.txt"
TEXTS = [
    "",
    " ",
    "Hello",
    " Hello",
    "  two spaces  inside and behind  ",
    "line\nbreak\n\n\tand tab",
    "The Fulton County Grand Jury said Friday an investigation of Atlanta's recent primary election produced.",
    "Größe, naïve café; £5 ≈ ½ — “quoted” 東京 🦀",
    "1234567890 3.14159 0x1F",
    "def f(x):\n    return x ** 2  # squared\n",
    "UPPERCASE MiXeD camelCase snake_case",
    "▁ the mark itself ▁▁",
    "a" * 37,
    "\u0000\u0007\u200b\ufeff",
]


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        input=str(TEXT),
        model_prefix=str(FOLDER / "tokenizer"),
        vocab_size=600,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        unk_surface=" \u2047 ",
        num_threads=1,
    )
    (FOLDER / "tokenizer.vocab").unlink()
    processor = sentencepiece.SentencePieceProcessor(model_file=str(FOLDER / "tokenizer.model"))
    write_json(FOLDER / "expected.json", [{"text": text, "ids": processor.encode(text)} for text in TEXTS])
    tokens = list(SentencePieceVocab(FOLDER).all_tokens())
    fields = {
        "tokens": [token.decode("utf-8") for token, _, _ in tokens],
        "scores": [score for _, score, _ in tokens],
        "types": [int(kind) for _, _, kind in tokens],
    }
    write_json(FOLDER / "fields.json", fields)
    by_transformers(processor).save(str(FOLDER / "tokenizer.json"))
    for path in FOLDER.iterdir():
        path.chmod(0o644)


def by_transformers(processor: sentencepiece.SentencePieceProcessor) -> Tokenizer:
    """As the tokenizer.json of Llama 2 is: vocabulary and merges by transformers, the rest in its words."""
    extracted = SentencePieceExtractor(str(FOLDER / "tokenizer.model")).extract(None)
    vocab = extracted["vocab"]
    ids = {token: number for number, (token, _) in enumerate(vocab)} if isinstance(vocab, list) else vocab
    tokenizer = Tokenizer(BPE(ids, extracted["merges"], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", processor.bos_id())])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    print({name: importlib.metadata.version(name) for name in ("sentencepiece", "gguf", "transformers")})
    main()
