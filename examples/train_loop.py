"""Fine-tune a packed model through LoRA in a loop of your own: run `make demo` once, then this file.

    python examples/train_loop.py

To stay short it cuts chats to one length, and the loss counts every token: the template's and the user's turns
too. `qlora-rs train` counts the assistant's alone, so the two print different losses.
"""

import json
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer

import qlora_rs

STEPS, BATCH, LENGTH = 40, 4, 128
root = Path(__file__).resolve().parent.parent
base = root / "demo-output" / "smollm2-nf4-dq"  # made by: qlora-rs quantize SRC DST
chats = root / ".cache" / "data" / "chitchat" / "train.jsonl"

model = qlora_rs.from_pretrained(base, dtype=torch.float32)
print(qlora_rs.attach_lora(model, r=8, lora_alpha=16, seed=0))
model.train()

tokenizer = AutoTokenizer.from_pretrained(base)
samples = []
for line in chats.read_text(encoding="utf-8").splitlines()[:1000]:
    ids = tokenizer.apply_chat_template(json.loads(line)["messages"])["input_ids"]
    if len(ids) >= LENGTH:
        samples.append(torch.tensor(ids[:LENGTH]))

optimizer = torch.optim.AdamW(qlora_rs.lora_parameters(model), lr=5e-4)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-4, total_steps=STEPS)
started = time.monotonic()
for step in range(STEPS):
    batch = torch.stack([samples[(step * BATCH + i) % len(samples)] for i in range(BATCH)])
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(qlora_rs.lora_parameters(model), 0.3)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    print(f"step {step + 1:2d}  loss {loss.item():.3f}  {time.monotonic() - started:4.0f} s", flush=True)

qlora_rs.save_adapter(model, root / "demo-output" / "loop-adapter", base_model_name_or_path=str(base))
