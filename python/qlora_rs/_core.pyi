"""
The extension module: private, re-exported under better names by the Python package.
"""

from os import PathLike
from typing import Any, Final, SupportsFloat, SupportsIndex, final

from _typeshed import SupportsGetItem, SupportsLenAndGetItem

MOST_STEP_PAGES: Final[int]
NESTED_BLOCK_SIZE: Final[int]
STATE_BLOCK_SIZE: Final[int]
__version__: Final[str]

@final
class DeviceStep:
    """
    Steps of one rule over a list of parameters of one device, which is made once and used for many steps.

    The caller keeps all memory alive, that of the tables included, and tells where parameters and gradients are when they
    have moved.
    """
    def __new__(
        cls,
        /,
        rule: str,
        *,
        tensors: SupportsGetItem[int, tuple[SupportsIndex, SupportsIndex, SupportsIndex, SupportsIndex]],
        runs: SupportsGetItem[
            int,
            tuple[
                SupportsIndex,
                SupportsIndex,
                SupportsIndex,
                SupportsIndex,
                bool,
                SupportsGetItem[int, tuple[SupportsIndex, SupportsIndex, bool]],
            ],
        ],
        table: tuple[SupportsIndex, SupportsIndex],
        queue: tuple[SupportsIndex, SupportsIndex],
    ) -> DeviceStep:
        """
        Tables in `table` (bytes of device memory), written on the queue. Runs are in the order of their pages.
        """
    def clip(self, /, queue: tuple[SupportsIndex, SupportsIndex], most: SupportsFloat | SupportsIndex) -> None:
        """
        Leave at the table's start, as float64, the sum of the gradients' squares and its root, and behind them the factor
        that brings the root down to `most`.
        """
    def clip_factor(self, /) -> int:
        """
        Address of the factor that `clip` leaves, a float32.
        """
    def make_factors(self, /, queue: tuple[SupportsIndex, SupportsIndex]) -> None:
        """
        Count a step of each parameter on the device, and make its factors there.
        """
    def set_addresses(
        self,
        /,
        queue: tuple[SupportsIndex, SupportsIndex],
        params: SupportsGetItem[int, SupportsIndex] | None,
        grads: SupportsGetItem[int, SupportsIndex] | None,
    ) -> None:
        """
        Where parameters are, and where gradients are; None for what has not changed.
        """
    def set_counters(
        self,
        /,
        queue: tuple[SupportsIndex, SupportsIndex],
        counters: SupportsGetItem[int, tuple[SupportsIndex, SupportsIndex]],
        groups: SupportsGetItem[int, tuple[SupportsLenAndGetItem[SupportsFloat | SupportsIndex], SupportsIndex, bool]],
    ) -> None:
        """
        What `make_factors` needs: for each parameter the address of its float32 number of steps and its group; for each
        group its options, the address of its learning rate (0: it is the last of the options), and is that a float64?
        """
    def step(
        self,
        /,
        queue: tuple[SupportsIndex, SupportsIndex],
        *,
        pages: tuple[SupportsIndex, SupportsIndex],
        addresses: SupportsGetItem[int, SupportsIndex],
        sets: SupportsGetItem[
            int, tuple[SupportsGetItem[int, SupportsFloat | SupportsIndex], SupportsFloat | SupportsIndex]
        ]
        | None,
        clip: SupportsIndex | None,
    ) -> None:
        """
        Update what is in the pages from `pages[0]` to before `pages[1]`, whose `addresses` are given (page 0 has none).
        `sets` None: those of `make_factors`. `clip`: address of a float32 that multiplies all gradients, or None.
        """
    @staticmethod
    def table_bytes(
        tensors: SupportsGetItem[int, tuple[SupportsIndex, SupportsIndex, SupportsIndex, SupportsIndex]],
        runs: SupportsIndex,
    ) -> int:
        """
        Bytes of device memory, at a multiple of 16, that tables take.
        """

@final
class DeviceWeight:
    """
    A packed weight on a CUDA device, checked once, for calls that must cost the host little.

    It stands for the memory that its tensors had when it was made, and does not keep them alive: `holds` tells whether they
    are still the same. `parts` are codes, absmax, and of a doubly quantized weight its scales and offset, else None; the
    weight's shape is that of the codes with `columns` in place of the last dimension. `moves`: copies on other streams bring
    it to this memory, and it goes again, so each launch waits for what is before it on its stream, which waits for the copy.
    """
    def __new__(
        cls, /, spec: Spec, parts: tuple[Any, Any, Any | None, Any | None], columns: SupportsIndex, moves: bool
    ) -> DeviceWeight: ...
    def dequantize(self, /, dtype: Any) -> Any:
        """
        The float weight, a new tensor of `dtype` (float32, bfloat16 or float16).
        """
    @property
    def device(self, /) -> Any: ...
    def fuses(self, /, tokens: SupportsIndex, dtype: Any) -> bool:
        """
        Is the product of this many tokens in this dtype made without dequantizing the weight first?
        """
    def fuses_backward(self, /, tokens: SupportsIndex, dtype: Any) -> bool:
        """
        Is the gradient of x of a product of this many tokens in this dtype made without dequantizing the weight first?
        """
    def holds(self, /, codes: Any, absmax: Any, scale: Any | None, offset: Any | None) -> bool:
        """
        Are these the tensors, and has none of them been moved or restrided in place (as `module.to` moves)?
        """
    def linear(
        self, /, x: Any, bias: Any | None, lora: tuple[Any, Any, SupportsFloat | SupportsIndex] | None = None
    ) -> Any:
        """
        x W^T + bias (+ scale * xa B^T, `lora` being xa (..., r), B (out, r) and scale), rounded once: x (..., in) in bfloat16
        or float16, everything else in its dtype, where `fuses` says so.
        """
    def linear_backward(self, /, grad: Any) -> Any:
        """
        dY W: the gradient of x (..., in), rounded once, from grad (..., out) in bfloat16 or float16, where `fuses_backward` says
        so.
        """
    def plain_dequantize(
        self, /, dtype: Any, codes: Any, absmax: Any, scale: Any | None, offset: Any | None
    ) -> Any | None:
        """
        `dequantize` where the weight is in these tensors and nobody watches; else None.
        """
    def plain_linear(self, /, x: Any, parameters: dict[str, Any]) -> Any | None:
        """
        `linear` without a term, for the plain call: x an ordinary tensor on the weight's device, contiguous, of few tokens in
        bfloat16 or float16, the bias in the same dtype, no gradient wanted, no autocast, nobody watching, and the weight in
        these parameters of a layer, as a module keeps them. None where anything is otherwise: whoever asked does it step by
        step.
        """
    @property
    def shape(self, /) -> tuple[int, ...]:
        """
        The weight's shape.
        """
    @property
    def versions(self, /) -> tuple[int, int, int, int] | None:
        """
        How often each part had been written to when `holds` was last asked; None where torch does not count.
        """

@final
class HostStep:
    """
    Steps of one rule over a list of parameters in CPU memory, which is made once and used for many steps.

    The caller keeps their memory alive, and tells where it is when it has moved.
    """
    def __new__(
        cls,
        /,
        rule: str,
        *,
        tensors: SupportsGetItem[int, tuple[SupportsIndex, SupportsIndex, SupportsIndex, SupportsIndex]],
        runs: SupportsGetItem[
            int,
            tuple[
                SupportsIndex,
                SupportsIndex,
                SupportsIndex,
                SupportsIndex,
                bool,
                SupportsGetItem[int, tuple[SupportsIndex, SupportsIndex, bool]],
            ],
        ],
    ) -> HostStep:
        """
        Runs are in the order of their pages.
        """
    def set_addresses(
        self, /, params: SupportsGetItem[int, SupportsIndex], grads: SupportsGetItem[int, SupportsIndex]
    ) -> None:
        """
        Where parameters are, and where gradients are.
        """
    def squared_norm(self, /, *, num_threads: SupportsIndex) -> float:
        """
        Sum of the squares of all gradients, in float64.
        """
    def step(
        self,
        /,
        *,
        pages: tuple[SupportsIndex, SupportsIndex],
        addresses: SupportsGetItem[int, SupportsIndex],
        sets: SupportsGetItem[
            int, tuple[SupportsGetItem[int, SupportsFloat | SupportsIndex], SupportsFloat | SupportsIndex]
        ],
        clip: SupportsFloat | SupportsIndex,
        num_threads: SupportsIndex,
    ) -> None:
        """
        Update what is in the pages from `pages[0]` to before `pages[1]`, whose `addresses` are given (page 0 has none).
        `clip` multiplies all gradients. Not to be interrupted: it would be half done.
        """

@final
class Pool:
    """
    Buffers under a budget, by number. Addresses are good as long as the pool; see `qlora_rs.paging` for the rest.
    """
    def __new__(
        cls, /, *, frames: SupportsIndex, page_bytes: SupportsIndex, policy: str, device: SupportsIndex | None
    ) -> Pool:
        """
        `policy`: "trace" or "lru". `device`: index of the CUDA device; None: frames in ordinary memory.
        """
    def acquire(self, /, buffer: SupportsIndex, *, stream: SupportsIndex, mode: str) -> int:
        """
        Address of the buffer, until `release`. `mode`: "read", "write" or "overwrite".
        """
    def begin_fill(self, /, buffer: SupportsIndex) -> int:
        """
        Address in host memory at which the caller gives the whole buffer new content.
        """
    def capsule(
        self,
        /,
        address: SupportsIndex,
        *,
        host: bool,
        shape: SupportsGetItem[int, SupportsIndex],
        dtype: tuple[SupportsIndex, SupportsIndex],
        owner: Any,
    ) -> Any:
        """
        A `DLPack` capsule of memory of this pool (`host`: of its host memory); `dtype`: `DLPack`'s (code, bits).
        """
    def create(self, /, name: str, bytes: SupportsIndex) -> int:
        """
        Number of a new buffer of zeros.
        """
    def discard(self, /, buffer: SupportsIndex) -> None:
        """
        Forget the content: zeros again.
        """
    def end_fill(self, /, buffer: SupportsIndex, *, whole: bool) -> None:
        """
        The content is whole, or else the buffer is zeros.
        """
    def flush(self, /, buffer: SupportsIndex) -> None:
        """
        Queue the copy of what changed to the host.
        """
    def frame_map(self, /) -> list[tuple[int, int] | None]:
        """
        Which page of which buffer each frame holds.
        """
    def free(self, /, buffer: SupportsIndex) -> None:
        """
        The buffer is gone.
        """
    def freeze(self, /, buffer: SupportsIndex) -> None:
        """
        From now on the buffer is only read.
        """
    def give_back(self, /, bytes: SupportsIndex) -> int:
        """
        Bytes of frames that were given back to the device.
        """
    def host(self, /, buffer: SupportsIndex) -> int:
        """
        Address of the up-to-date content in host memory, to be read.
        """
    def prefetch(self, /, buffers: SupportsGetItem[int, SupportsIndex]) -> None:
        """
        Fetch buffers in this order, as far as there is room.
        """
    def reclaim(self, /) -> None:
        """
        Use the whole budget again.
        """
    def release(self, /, buffer: SupportsIndex, *, stream: SupportsIndex) -> None:
        """
        Ends the stream's last `acquire`.
        """
    def reserve(self, /, bytes: SupportsIndex, *, progress: Any | None) -> int:
        """
        Make host memory ready for buffers of so many bytes; the bytes that were made ready.
        """
    def start_timeline(self, /) -> None:
        """
        Record what happens when.
        """
    def stats(self, /) -> dict[str, Any]:
        """
        Counts so far, and how the pool stands.
        """
    def stop_timeline(self, /) -> list[tuple[str, int | None, str, float, float]]:
        """
        What happened when: (lane, stream, buffer, begin, end), in seconds.
        """

@final
class Spec:
    """
    How weights become codes; made once, valid from then on.
    """
    def __new__(
        cls,
        /,
        quant_type: str,
        block_size: SupportsIndex,
        double_quant: bool,
        codebook: SupportsGetItem[int, SupportsFloat | SupportsIndex] | None = None,
    ) -> Spec: ...
    @property
    def bits(self, /) -> int:
        """
        Bits that one code takes in storage: 4 or 8.
        """
    def most_fused_tokens(self, /, dtype: SupportsIndex) -> int:
        """
        Most tokens of `dtype` (0 float32, 1 bfloat16, 2 float16) for which `linear` is faster on this processor than
        dequantizing and a dense product.
        """
    @property
    def values(self, /) -> list[float]:
        """
        The table, indexed by code.
        """
    @property
    def zero_code(self, /) -> int:
        """
        Code of the value nearest zero.
        """

def checksum(source: tuple[SupportsIndex, SupportsIndex]) -> str:
    """
    XXH3 (128 bits, hexadecimal) of memory: what a journal knows written bytes by.
    """

def cuda_load(
    files: SupportsGetItem[
        int, tuple[str | PathLike[str], SupportsGetItem[int, tuple[str, tuple[SupportsIndex, SupportsIndex]]]]
    ],
    *,
    queue: tuple[SupportsIndex, SupportsIndex],
    buffer_bytes: SupportsIndex,
    num_threads: SupportsIndex,
    progress: Any | None,
) -> None:
    """
    Read tensors of safetensors files, each `(path, [(tensor, (address, bytes)), ...])`, into memory of the queue's device,
    after what is queued on its stream; all of it has arrived when the call returns.
    """

def cuda_quantize(
    spec: Spec,
    *,
    queue: tuple[SupportsIndex, SupportsIndex],
    layout: tuple[SupportsIndex, SupportsIndex, SupportsIndex],
    source: tuple[SupportsIndex, SupportsIndex],
    dtype: SupportsIndex,
    codes: tuple[SupportsIndex, SupportsIndex],
    absmax: tuple[SupportsIndex, SupportsIndex],
    nested: tuple[
        tuple[SupportsIndex, SupportsIndex], tuple[SupportsIndex, SupportsIndex], tuple[SupportsIndex, SupportsIndex]
    ]
    | None,
    scratch: tuple[SupportsIndex, SupportsIndex],
    check_finite: bool,
) -> None:
    """
    Quantize `source` into `codes` and float32 `absmax`, and these again into `nested`, which is given iff the spec asks for
    it. `scratch`: `cuda_quantize_scratch` int64; with `check_finite` its first four bytes, an int32, become 1 where NaN or
    Inf is seen, else 0.
    """

def cuda_quantize_scratch(spec: Spec, layout: tuple[SupportsIndex, SupportsIndex, SupportsIndex]) -> int:
    """
    How many int64 `cuda_quantize` needs to work in.
    """

def cuda_warmup(device: SupportsIndex) -> None:
    """
    Compile every kernel for this device now, so that none is compiled in a graph capture or a timed step.
    """

def dequantize(
    spec: Spec,
    *,
    layout: tuple[SupportsIndex, SupportsIndex, SupportsIndex],
    codes: tuple[SupportsIndex, SupportsIndex],
    absmax: tuple[SupportsIndex, SupportsIndex],
    scale: tuple[SupportsIndex, SupportsIndex] | None,
    offset: tuple[SupportsIndex, SupportsIndex] | None,
    out: tuple[SupportsIndex, SupportsIndex],
    dtype: SupportsIndex,
    num_threads: SupportsIndex,
) -> None:
    """
    Dequantize into `out` (elements of `dtype`). With `scale` and `offset` the `absmax` are 8-bit codes, else float32.
    """

def dequantize_state(
    *,
    signed: bool,
    codes: tuple[SupportsIndex, SupportsIndex],
    absmax: tuple[SupportsIndex, SupportsIndex],
    values: tuple[SupportsIndex, SupportsIndex],
) -> None:
    """
    The float32 `values` of `codes` and `absmax`.
    """

def double_quantize(
    spec: Spec,
    *,
    layout: tuple[SupportsIndex, SupportsIndex, SupportsIndex],
    absmax: tuple[SupportsIndex, SupportsIndex],
    codes: tuple[SupportsIndex, SupportsIndex],
    scale: tuple[SupportsIndex, SupportsIndex],
    offset: tuple[SupportsIndex, SupportsIndex],
    num_threads: SupportsIndex,
) -> None:
    """
    Quantize the float32 scales of each expert to 8-bit codes, group scales and an offset.
    """

def driver_probe() -> dict[str, Any]:
    """
    `{"available", "reason", "driver_version", "devices"}`; `reason` says why no device can be used.
    """

def dynamic_map(signed: bool = True) -> list[float]:
    """
    The 256 float32 values of the signed 8-bit dynamic map, which double quantization uses, or of the unsigned one.
    """

def file_checksum(path: str | PathLike[str], *, start: SupportsIndex, bytes: SupportsIndex) -> str:
    """
    The same of `bytes` bytes of the file `path`, from `start` on.
    """

def linear(
    spec: Spec,
    *,
    layout: tuple[SupportsIndex, SupportsIndex, SupportsIndex],
    codes: tuple[SupportsIndex, SupportsIndex],
    absmax: tuple[SupportsIndex, SupportsIndex],
    scale: tuple[SupportsIndex, SupportsIndex] | None,
    offset: tuple[SupportsIndex, SupportsIndex] | None,
    x: tuple[SupportsIndex, SupportsIndex],
    bias: tuple[SupportsIndex, SupportsIndex] | None,
    y: tuple[SupportsIndex, SupportsIndex],
    dtype: SupportsIndex,
    num_threads: SupportsIndex,
) -> None:
    """
    `y` (tokens, rows) = `x` (tokens, columns) times the transposed matrix, plus `bias` (rows), elements of `dtype`; the
    dequantized matrix is never written. `absmax`, `scale` and `offset` as in `dequantize`.
    """

def pack_checkpoint(
    spec: Spec,
    *,
    source: str | PathLike[str],
    files: SupportsGetItem[int, str],
    packed: SupportsGetItem[int, str],
    transposed: SupportsGetItem[int, str],
    destination: str | PathLike[str] | None,
    journal: str | PathLike[str] | None,
    finished_tensors: dict[str, str],
    finished_files: dict[str, str],
    max_shard_size: SupportsIndex,
    slice_bytes: SupportsIndex,
    num_threads: SupportsIndex,
    progress: Any | None,
) -> dict[str, Any]:
    """
    Quantize the tensors named `packed` of `files` in the folder `source`, those that are `transposed` too as the matrices
    (out, in) that the files hold as (in, out), copy the others, and write safetensors files into the existing folder
    `destination`; with none, only plan. What is finished gets a line in the existing file `journal`. What was so already,
    by the checksums of source tensors' outputs and the SHA-256 of source files, is checked and kept.

    Returns `{"shards": [{"name", "tensors": [(name, dtype, shape, start, end), ...]}, ...], "source_sha256": {file: hex}}`.
    """

def quantize(
    spec: Spec,
    *,
    layout: tuple[SupportsIndex, SupportsIndex, SupportsIndex],
    source: tuple[SupportsIndex, SupportsIndex],
    dtype: SupportsIndex,
    codes: tuple[SupportsIndex, SupportsIndex],
    absmax: tuple[SupportsIndex, SupportsIndex],
    check_finite: bool,
    num_threads: SupportsIndex,
) -> None:
    """
    Quantize `source` (elements of `dtype`: 0 float32, 1 bfloat16, 2 float16) into `codes` (bytes) and `absmax` (float32).
    """

def quantize_state(
    *,
    signed: bool,
    values: tuple[SupportsIndex, SupportsIndex],
    codes: tuple[SupportsIndex, SupportsIndex],
    absmax: tuple[SupportsIndex, SupportsIndex],
) -> None:
    """
    Quantize float32 `values` into `codes` and a scale for each 256 of them in `absmax`.
    """

def read_header(path: str | PathLike[str]) -> dict[str, Any]:
    """
    `{"metadata": {...}, "tensors": [(name, dtype, shape, start, end), ...]}` of a safetensors file, in data order.
    """

def simd_level() -> str:
    """
    The instruction set that the kernels use here: "scalar", "avx2" or "avx512" (`QLORA_RS_SIMD` lowers it).
    """

def swap_paths(a: str | PathLike[str], b: str | PathLike[str]) -> bool:
    """
    Let two existing paths of one file system change places in one step; false, and nothing has happened, where the file
    system cannot.
    """

def unwatched(tensor: Any) -> bool:
    """
    Is this a tensor like any other, and does nobody but perhaps a compiler watch the operators that are called?
    """

BLOCK_SIZES: Final[list[int]]
QUANT_TYPES: Final[list[str]]
