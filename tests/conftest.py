"""What several test folders share: seeds, the `gpu` marker, a tiny model on disk, the real model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# NOTE: before anything imports transformers, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
SMOLLM2 = REPOSITORY / ".cache" / "models" / "smollm2-135m-instruct"
CHATS = REPOSITORY / ".cache" / "data" / "chitchat"
BROWN = Path(__file__).resolve().parent / "data" / "brown_eval.txt"

CHAT_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)

TinyLlamaMaker = Callable[..., Path]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked or torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and torch finds none here")
    for item in marked:
        item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _commands_compute_on_the_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is a CUDA device too: only tests that are about it shall need it."""
    if torch.cuda.is_available() and request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr("qlora_rs.devices._has_usable_cuda_device", lambda: False)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def brown_text() -> str:
    """Edited English prose to judge perplexity with."""
    return BROWN.read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct in bf16; read-only."""
    if not SMOLLM2.is_dir():
        pytest.skip(f"{SMOLLM2} is absent: run `make test`, or `python examples/prepare_demo.py --model`")
    return SMOLLM2


@pytest.fixture(scope="session")
def chats() -> Path:
    """The folder with `train.jsonl` and `heldout.jsonl`; read-only."""
    if not CHATS.is_dir():
        pytest.skip(f"{CHATS} is absent: run `make test`, or `python examples/prepare_demo.py --data`")
    return CHATS


def write_tiny_llama(
    folder: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    tie_word_embeddings: bool = False,
    seed: int = 0,
    **changes: object,
) -> Path:
    """Save a random two-layer Llama with a byte-level tokenizer and a chat template; returns ``folder``.

    ``changes`` go into its LlamaConfig. Its sizes are no multiples of 64, so that rows end in short blocks.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = byte_tokenizer()
    settings: dict[str, object] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 72,
        "intermediate_size": 131,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tie_word_embeddings,
        "bos_token_id": tokenizer.convert_tokens_to_ids("<|start|>"),
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|end|>"),
        "pad_token_id": tokenizer.convert_tokens_to_ids("<|pad|>"),
        **changes,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**settings)).to(dtype)  # type: ignore[arg-type]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def byte_tokenizer():  # type: ignore[no-untyped-def]
    """One token a byte, three special ones, and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|pad|>", "<|start|>", "<|end|>"]
    symbols = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        bos_token="<|start|>",
        eos_token="<|end|>",
        chat_template=CHAT_TEMPLATE,
    )


@pytest.fixture(scope="session")
def make_tiny_llama() -> TinyLlamaMaker:
    """`write_tiny_llama`, for tests that change the model they need."""
    return write_tiny_llama


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random two-layer Llama in bf16, its tokenizer and a chat template; read-only."""
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture
def flip_bit() -> Callable[..., None]:
    """Flip bits of a tensor's byte in a safetensors file: ``flip_bit(path, name, offset=0, bit=1)``."""

    def flip(path: Path, name: str, offset: int = 0, bit: int = 1) -> None:
        content = bytearray(path.read_bytes())
        data = 8 + int.from_bytes(content[:8], "little")
        start = json.loads(content[8:data])[name]["data_offsets"][0]
        content[data + start + offset] ^= bit
        path.write_bytes(content)

    return flip


@pytest.fixture
def write_chats(tmp_path: Path) -> Callable[..., Path]:
    """Write ``count`` short chats as JSONL of messages; returns the file."""

    def write(count: int = 24, name: str = "chats.jsonl") -> Path:
        path = tmp_path / name
        with path.open("w", encoding="utf-8") as sink:
            for number in range(count):
                messages = [
                    {"role": "user", "content": f"What comes after {number}?"},
                    {"role": "assistant", "content": f"After {number} comes {number + 1}."},
                ]
                sink.write(json.dumps({"messages": messages}) + "\n")
        return path

    return write


@pytest.fixture(scope="session")
def descend() -> Callable[..., list[float]]:
    """Steps of a causal language model on the same ``(samples, length)`` tokens; the loss before each."""

    def run(model: Any, optimizer: torch.optim.Optimizer, ids: torch.Tensor, steps: int) -> list[float]:
        found = []
        for _ in range(steps):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    return run


@pytest.fixture(scope="session")
def losses() -> Callable[[Path], list[float]]:
    """The losses of a training run's steps, read from its output folder."""
    from qlora_rs.train import read_log

    def read(output: Path) -> list[float]:
        return [entry["loss"] for entry in read_log(output / "log.jsonl") if "loss" in entry]

    return read
