"""Host microseconds of a call on a CUDA device, eager, beside bitsandbytes; the device is never waited for.

python benchmarks/device_overhead.py
"""

from __future__ import annotations

import torch

import device_harness as device
import harness
import qlora_rs

SIZE = 1024  # small, so that the device is always ahead of the host
MUST_REACH = {"dequantize": 10, "linear, M = 1": 10}


def main() -> None:
    qlora_rs.warmup("cuda")
    print(device.machine())
    weight = torch.randn(SIZE, SIZE, device="cuda").bfloat16()
    linear = torch.nn.Linear(SIZE, SIZE, bias=False, device="cuda", dtype=torch.bfloat16)
    layer = qlora_rs.Linear4bit.from_float(linear)
    packed = layer.packed()
    one = torch.randn(1, SIZE, device="cuda", dtype=torch.bfloat16)
    many = torch.randn(512, SIZE, device="cuda", dtype=torch.bfloat16)
    trained = torch.randn(1, SIZE, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    work = {
        "dequantize": lambda: qlora_rs.dequantize(packed),
        "quantize": lambda: qlora_rs.quantize(weight, nonfinite="propagate"),
        "linear, M = 1": lambda: layer(one),
        "linear, M = 512": lambda: layer(many),
        "linear, M = 1, recorded": lambda: layer(trained),
        "torch's linear, M = 1": lambda: linear(one),
    }
    with torch.no_grad():
        ours = device.host_us({name: call for name, call in work.items() if "recorded" not in name})
    ours |= device.host_us({name: call for name, call in work.items() if "recorded" in name})
    peers = peer_times(linear, one, many)
    lines = [
        (name, f"{time:.1f}", f"{peers[name]:.1f}" if name in peers else "-", str(MUST_REACH.get(name, "-")))
        for name, time in ours.items()
    ]
    print(harness.table(("call", "host us", "peer's", "must reach"), lines))


def peer_times(linear: torch.nn.Linear, one: torch.Tensor, many: torch.Tensor) -> dict[str, float]:
    try:
        import bitsandbytes as peer
    except ImportError:
        return {}
    layer = peer.nn.Linear4bit(SIZE, SIZE, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer.weight = peer.nn.Params4bit(linear.weight.detach().cpu(), requires_grad=False, quant_type="nf4")
    layer = layer.cuda()
    state = layer.weight.quant_state
    with torch.no_grad():
        return device.host_us({
            "dequantize": lambda: peer.functional.dequantize_4bit(layer.weight.data, state),
            "linear, M = 1": lambda: layer(one),
            "linear, M = 512": lambda: layer(many),
        })  # fmt: skip


if __name__ == "__main__":
    main()
