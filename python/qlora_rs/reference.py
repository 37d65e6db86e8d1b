"""The specification in plain PyTorch: what every kernel must give, bit for bit. Slow on purpose.

Only torch is imported here, and every table is written out or derived again, so that an error elsewhere cannot hide.
Shapes: a weight is (..., out, in); leading dimensions are experts. Blocks of ``block_size`` run along ``in`` and never
cross a row. Source: Dettmers et al., QLoRA, 2023, and bitsandbytes' file format for the bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NESTED_BLOCK_SIZE = 256
SUBNORMAL_BELOW = 2.0**-126
LIFT = 2.0**64


def _from_bits(words: str) -> Tensor:
    values = [int(word, 16) for word in words.split()]
    return torch.tensor([v - (1 << 32) if v >> 31 else v for v in values], dtype=torch.int32).view(torch.float32)


NF4 = _from_bits(
    "bf800000 bf3239b1 bf066b30 beca32a0 be91a24d be3d353f bdba7871 00000000 "
    "3da2faff 3e24cae3 3e7c04dd 3ead033a 3ee1a4b8 3f1007ab 3f3913b3 3f800000"
)
_FP4_HALF = _from_bits("00000000 3baaaaab 3f2aaaab 3f800000 3eaaaaab 3f000000 3e2aaaab 3e800000")
FP4 = torch.cat([_FP4_HALF, -_FP4_HALF])
FP4_THRESHOLDS = _from_bits("3b2aaab9 3db00000 3e555555 3e955555 3ed55556 3f155550 3f555555")  # on |x|, ascending
FP4_BY_RANK = torch.tensor([0, 1, 6, 7, 4, 5, 2, 3])  # code of the k-th smallest magnitude
INT4 = torch.arange(-7, 8, dtype=torch.float32) / 7
INT8 = torch.arange(-127, 128, dtype=torch.float32) / 127
DYNAMIC = {"dynamic8": True, "udynamic8": False}  # has the map negative values?


def codebook_of(quant_type: str, codebook: list[float] | tuple[float, ...] | None = None) -> Tensor:
    """float32 table of a data type, indexed by code."""
    if codebook is not None:
        return torch.tensor(codebook, dtype=torch.float32)
    if quant_type in DYNAMIC:
        return dynamic_map(signed=DYNAMIC[quant_type])
    return {"nf4": NF4, "fp4": FP4, "int4": INT4, "int8": INT8}[quant_type]


def zero_code(table: Tensor) -> int:
    """Code of the entry nearest zero (the lower one of two)."""
    return int(table.abs().argmin())


def dynamic_map(signed: bool = True) -> Tensor:
    """The 8-bit dynamic map: 256 ascending float32 values, for i in 0..6 linear in each decade.

    Each step is a float32 operation; the fused multiply-add of the recipe is done in float64, which is exact enough
    here to round once to the same float32.
    """
    values = []
    for i in range(7):
        n = 2**i if signed else 2 ** (i + 1)
        tenth = torch.tensor(0.1, dtype=torch.float32)
        step = ((1 - tenth) / n).double()
        j = torch.arange(n + 1, dtype=torch.float64)
        low = (step * j + tenth.double()).float()
        high = (-step * (n - j) + 1.0).float()
        bounds = torch.where(j < (n + 1) // 2, low, high)
        means = (bounds[:-1] + bounds[1:]) / 2
        decade = means * torch.tensor(10.0 ** (i - 6), dtype=torch.float32)
        values += [decade, -decade] if signed else [decade]
    values.append(torch.tensor([0.0, 1.0]))
    return torch.cat(values).sort().values


def decimals(table: Tensor) -> Tensor:
    """float64 values of the shortest decimals that name the float32 entries (0.3 for the float32 nearest to 0.3)."""
    shortest = []
    for value in table.tolist():
        digits = (float(f"{value:.{n}g}") for n in range(1, 10))
        shortest.append(next(d for d in digits if torch.tensor(d, dtype=torch.float32).item() == value))
    return torch.tensor(shortest, dtype=torch.float64)


def nearest_code(x: Tensor, table: Tensor, quant_type: str) -> Tensor:
    """Index of the nearest table entry for normalized float32 ``x``; an exact tie goes down.

    A dynamic map is compared exactly, and a tie goes to the even index. The other built-in types compare with float32
    midpoints. A user's codebook compares with the midpoints of the decimals it was written in, so that {0.3, 0.5} sends
    4/10, whose float32 lies just above 0.4, to 0.5.
    """
    x = x.contiguous()
    if quant_type in DYNAMIC:
        return nearest_even(x, table).long()
    if quant_type == "fp4":
        rank = torch.bucketize(x.abs(), FP4_THRESHOLDS)  # number of thresholds strictly below |x|
        return FP4_BY_RANK[rank] + 8 * (x < 0)
    if quant_type == "codebook":
        exact = decimals(table)
        return torch.bucketize(x.double(), (exact[:-1] + exact[1:]) / 2)
    return torch.bucketize(x, (table[:-1] + table[1:]) / 2)


def normalize(values: Tensor, absmax: Tensor) -> Tensor:
    """``values * (1 / absmax)`` in float32, both lifted by 2^64 where absmax is subnormal (exact: no bit is lost)."""
    lift = torch.where(absmax < SUBNORMAL_BELOW, LIFT, 1.0).float()
    return (values * lift) * (1.0 / (absmax * lift))


def quantize_blocks(
    weight: Tensor, block_size: int, quant_type: str = "nf4", codebook: list[float] | None = None
) -> tuple[Tensor, Tensor]:
    """Unpacked codes int64 (..., out, in) and float32 absmax (..., out, ceil(in/block_size)).

    A zero block has absmax 0 and the code of zero; a block with NaN (else Inf) has absmax NaN (Inf) and that code too.
    """
    table = codebook_of(quant_type, codebook)
    zero = zero_code(table)
    columns = weight.shape[-1]
    codes = torch.full(weight.shape, zero, dtype=torch.int64)
    absmax = torch.zeros((*weight.shape[:-1], -(-columns // block_size)), dtype=torch.float32)
    for b, start in enumerate(range(0, columns, block_size)):
        block = weight[..., start : start + block_size].float()
        top = block.abs().amax(-1)  # amax propagates NaN
        absmax[..., b] = top
        usable = (torch.isfinite(top) & (top > 0))[..., None]
        x = normalize(block, torch.where(usable, top[..., None], 1.0))
        codes[..., start : start + block_size] = torch.where(usable, nearest_code(x, table, quant_type), zero)
    absmax[torch.isnan(absmax)] = float("nan")
    return codes, absmax


def dequantize_blocks(
    codes: Tensor,
    absmax: Tensor,
    block_size: int,
    dtype: torch.dtype,
    quant_type: str = "nf4",
    codebook: list[float] | None = None,
) -> Tensor:
    """``dtype(table[code] * absmax)``: one float32 product, one rounding. A non-finite absmax gives a block of NaN, a
    zero one a block of +0."""
    table = codebook_of(quant_type, codebook)
    per_element = absmax.repeat_interleave(block_size, -1)[..., : codes.shape[-1]]
    product = table[codes] * per_element
    product = torch.where(torch.isfinite(per_element), product, float("nan"))
    return torch.where(per_element == 0, 0.0, product).to(dtype)


def pack(codes: Tensor, zero: int) -> Tensor:
    """Two codes a byte, even element in the high nibble; an odd row's last low nibble is the code of zero."""
    if codes.shape[-1] % 2:
        codes = torch.cat([codes, torch.full_like(codes[..., :1], zero)], -1)
    return (codes[..., 0::2] << 4 | codes[..., 1::2]).to(torch.uint8)


def unpack(packed: Tensor, columns: int) -> Tensor:
    """Inverse of `pack`: int64 (..., columns)."""
    codes = torch.stack([packed >> 4, packed & 15], -1).flatten(-2)
    return codes[..., :columns].long()


def tree_mean(values: Tensor) -> float:
    """Mean of the finite ones of 1-D float32 values, rounded once to float32; 0 where there is none.

    The sum is float64 over a fixed tree: 256 consecutive values are added in index order (a non-finite one adds 0),
    then the partial sums likewise.
    """
    finite = torch.isfinite(values)
    sums = torch.where(finite, values, 0.0).double()
    while len(sums) > 1:
        padded = torch.nn.functional.pad(sums, (0, -len(sums) % NESTED_BLOCK_SIZE)).view(-1, NESTED_BLOCK_SIZE)
        total = torch.zeros(len(padded), dtype=torch.float64)
        for column in padded.T:
            total = total + column
        sums = total
    count = int(finite.sum())
    return float((sums[0] / count).float()) if count else 0.0


def double_quantize(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize the scales of one expert (any shape, in storage order).

    Returns uint8 codes of the same shape, float32 group scales ``[ceil(n/256)]`` and the float32 offset ``[1]``.
    The offset is the mean of the finite scales; a group that holds a non-finite one gets the scale NaN.
    """
    flat = absmax.flatten()
    finite = torch.isfinite(flat)
    offset = torch.tensor([tree_mean(flat)], dtype=torch.float32)
    table = dynamic_map()
    zero = zero_code(table)
    codes = torch.full(flat.shape, zero, dtype=torch.uint8)
    scales = torch.zeros(-(-len(flat) // NESTED_BLOCK_SIZE), dtype=torch.float32)
    for g in range(len(scales)):
        group = slice(g * NESTED_BLOCK_SIZE, (g + 1) * NESTED_BLOCK_SIZE)
        if not finite[group].all():
            scales[g] = float("nan")
            continue
        centred = flat[group] - offset
        scales[g] = centred.abs().max()
        if scales[g] > 0:
            codes[group] = nearest_even(normalize(centred, scales[g]), table)
    return codes.view(absmax.shape), scales, offset


def nearest_even(x: Tensor, table: Tensor) -> Tensor:
    """Index of the entry truly nearest to ``x`` (float64 comparison), an exact tie to the even index."""
    x64, t64 = x.double(), table.double()
    above = torch.bucketize(x64, t64).clamp(1, len(table) - 1)
    below = above - 1
    to_below, to_above = x64 - t64[below], t64[above] - x64
    up = (to_above < to_below) | ((to_above == to_below) & (above % 2 == 0))
    return torch.where(up, above, below).to(torch.uint8)


def nested_absmax(codes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """``map[code] * scale[i / 256] + offset``, each step rounded to float32, for the scales of one expert."""
    per_block = scale.repeat_interleave(NESTED_BLOCK_SIZE)[: codes.numel()].view(codes.shape)
    return dynamic_map()[codes.long()] * per_block + offset


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b in float64: what products are judged against."""
    product = x.double() @ weight.double().T
    return product if bias is None else product + bias.double()


def squared_norm(grads: Sequence[Tensor]) -> float:
    """Sum of the squares of all elements, in float64 and in a fixed order.

    Each gradient is cut into pieces of 4096 elements; of a piece, element i goes into sum i % 128, in index order, and
    the sums are added in halves, the upper 64 to the lower, then 32, and so on. The pieces' sums are added likewise.
    """
    pieces = [piece for grad in grads for piece in grad.flatten().double().square().split(4096) if len(piece)]
    return float(_side_by_side(torch.stack([_side_by_side(piece) for piece in pieces])) if pieces else 0.0)


def _side_by_side(values: Tensor) -> Tensor:
    rows = torch.nn.functional.pad(values, (0, -len(values) % 128)).view(-1, 128)
    sums = torch.zeros(128, dtype=torch.float64)
    for row in rows:
        sums = sums + row
    while len(sums) > 1:
        sums = sums[: len(sums) // 2] + sums[len(sums) // 2 :]
    return sums[0]


def adamw_update(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    wd: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """One AdamW step: the new parameter, first and second moment, all float32, each operation rounded by itself.

    Factors are float64, rounded once (Loshchilov and Hutter, 2019; decay comes first, as in torch).
    """
    b1, b2 = betas
    m = m + (g - m) * _f32(1 - b1)
    v = v * _f32(b2) + g * g * _f32(1 - b2)
    denominator = _sqrt(v) / _f32((1 - b2**step) ** 0.5) + _f32(eps)
    return p * _f32(1 - lr * wd) - m / denominator * _f32(lr / (1 - b1**step)), m, v


def lion_update(
    p: Tensor, g: Tensor, m: Tensor, *, lr: float, betas: tuple[float, float], wd: float
) -> tuple[Tensor, Tensor]:
    """One Lion step (Chen et al., 2023): the new parameter and moment."""
    b1, b2 = betas
    direction = (m * _f32(b1) + g * _f32(1 - b1)).sign()
    return p * _f32(1 - lr * wd) - direction * _f32(lr), m * _f32(b2) + g * _f32(1 - b2)


def ademamix_update(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    slow: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float, float],
    alpha: float,
    eps: float,
    wd: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One AdEMAMix step (Pagliardini et al., 2024), beta 3 and alpha being those of this step."""
    b1, b2, b3 = betas
    m = m + (g - m) * _f32(1 - b1)
    v = v * _f32(b2) + g * g * _f32(1 - b2)
    slow = slow + (g - slow) * _f32(1 - b3)
    denominator = _sqrt(v) / _f32((1 - b2**step) ** 0.5) + _f32(eps)
    mixed = m / _f32(1 - b1**step) + slow * _f32(alpha)
    return p * _f32(1 - lr * wd) - mixed / denominator * _f32(lr), m, v, slow


def sgd_update(
    p: Tensor,
    g: Tensor,
    buffer: Tensor,
    *,
    first: bool,
    lr: float,
    momentum: float,
    dampening: float,
    wd: float,
    nesterov: bool,
) -> tuple[Tensor, Tensor]:
    """One step of gradient descent with momentum, as torch defines it (decay is added to the gradient)."""
    g = g + p * _f32(wd)
    buffer = buffer * _f32(momentum) + g * _f32(1.0 if first else 1 - dampening)
    return p - (g + buffer * _f32(momentum) if nesterov else buffer) * _f32(lr), buffer


def quantize_state(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """8-bit optimizer state: uint8 codes and float32 scales [ceil(n/256)] of 1-D values, in blocks of 256."""
    codes, absmax = quantize_blocks(values, 256, "dynamic8" if signed else "udynamic8")
    return codes.to(torch.uint8), absmax


def dequantize_state(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    """The float32 values of `quantize_state`'s codes and scales."""
    return dequantize_blocks(codes.long(), absmax, 256, torch.float32, "dynamic8" if signed else "udynamic8")


def _sqrt(values: Tensor) -> Tensor:
    """Correctly rounded, which torch's float32 square root is not on every processor."""
    return values.double().sqrt().float()


def _f32(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)
