"""Products with W on the CPU, in float32 whatever the dtype: x Wᵀ and dy W."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor

from lora_kernels import _cpu
from lora_kernels.ops.cpu_amx import on_tiles, product, product_back
from lora_kernels.ops.cpu_quantised import Packed, held, some_rows, widen_into
from lora_kernels.ops.tables.cpu import NEVER, CpuRow, row_for

BLOCK = 256  # rows of W widened at a time: 4 MiB of float32 at 4096 columns
PIECE = 2**22  # float32 numbers of the product of 16-bit weights that are there at a time
CHUNK = 512  # tokens that are packed at a time: 8 MiB of float32 at 4096 columns

_level = _cpu.level
_rows: dict[tuple[str, torch.dtype], CpuRow] = {}


def choice(dtype: torch.dtype) -> CpuRow:
    """The table's row for a dtype on the level in use."""
    try:
        return _rows[_level(), dtype]
    except KeyError:
        level = _level()
        return _rows.setdefault((level, dtype), row_for(level, str(dtype)[6:], native=_is_native(level, dtype)))


def outer_on_tiles(dtype: torch.dtype) -> bool:
    """Whether dA of some token count is a product on tiles, where there are any."""
    return choice(dtype).outer != NEVER


def _is_native(level: str, dtype: torch.dtype) -> bool:
    """Whether the library multiplies a dtype by instructions that our level lacks: float16 on Arm
    and by AVX512-FP16, bf16 on Arm. Of bf16 it says so of every AVX-512, too."""
    if not torch.backends.mkldnn.is_available():  # as in the wheels for macOS
        return False
    if dtype is torch.bfloat16:
        return level == "portable" and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype is torch.float16 and bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


@contextmanager
def forced_choice(row: CpuRow) -> Iterator[None]:
    """Inside it a row stands in for the table's on the level in use; for tests and measurements, in
    one thread."""
    key = (_cpu.level(), getattr(torch, row.dtype))
    before = _rows.get(key)
    _rows[key] = row
    try:
        yield
    finally:
        _rows.pop(key)
        if before is not None:
            _rows[key] = before


def packs_x(x: Tensor, w: Tensor | Packed) -> bool:
    """Whether the product of x, by rows, is the one that packs x."""
    row = choice(x.dtype)
    if not row.packed_from <= x.shape[0] <= row.packed or x.dtype is not w.dtype:
        return False
    return w.stride(1) == 1 and w.numel() > 0 and not on_tiles(x, w)


def streams_up_to(x: Tensor, w: Tensor | Packed) -> int:
    """The most tokens of the kernel that streams W once."""
    row = choice(x.dtype)
    return max(row.small, row.small_codes) if isinstance(w, Packed) else row.small


def base_product(x: Tensor, w: Tensor | Packed, out: Tensor | None = None) -> Tensor:
    """x Wᵀ in float32, for float32 in `out`; x by rows."""
    tokens, (n_out, n_in) = x.shape[0], w.shape
    if packs_x(x, w):
        y = x.new_empty(tokens, n_out, dtype=torch.float32) if out is None else out
        if _packed(x, w, y):
            return y
    if tokens and w.numel() and tokens <= streams_up_to(x, w):
        y = x.new_empty(tokens, n_out, dtype=torch.float32) if out is None else out
        a, b = no_adapter(n_out, n_in, w.dtype)
        if _cpu.forward_small(x, w, a, b, y, None, None, None, None, 1.0, None, torch.get_num_threads()):
            return y
    if on_tiles(x, w) and tokens and w.numel():
        return product(x, w)
    if x.dtype is torch.float32 and isinstance(w, Tensor):
        return torch.mm(x, w.T, out=out)
    y = x.new_empty(tokens, n_out, dtype=torch.float32) if out is None else out
    for rows, wide in base_product_slices(x, w):
        y[:, rows] = wide
    return y


def _packed(x: Tensor, w: Tensor | Packed, y: Tensor) -> bool:
    """Fills y, as many tokens at a time as stay in the caches; False if y has gaps, and nothing
    done."""
    threads = torch.get_num_threads()
    if len(x) <= CHUNK:
        return _cpu.base_product(x, w, y, threads)
    w = held(w)
    return all(_cpu.base_product(x[t : t + CHUNK], w, y[t : t + CHUNK], threads) for t in range(0, len(x), CHUNK))


@lru_cache(maxsize=1024)
def no_adapter(n_out: int, n_in: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A and B of rank 0; to make them anew costs as much as a row of a small layer."""
    return torch.empty(0, n_in, dtype=dtype), torch.empty(n_out, 0, dtype=dtype)


def base_product_slices(x: Tensor, w: Tensor | Packed) -> Iterator[tuple[slice, Tensor]]:
    """x Wᵀ as (rows of W, product): in float32 one piece, of 16-bit weights float32 pieces."""
    if x.dtype is w.dtype is torch.float32 and isinstance(w, Tensor):
        yield slice(0, w.shape[0]), base_product(x, w)
        return
    w = held(w)
    if packs_x(x, w) or (on_tiles(x, w) and x.numel() and w.numel()):
        piece = max(BLOCK, PIECE // len(x))
        for first in range(0, w.shape[0], piece):
            rows = slice(first, min(first + piece, w.shape[0]))
            yield rows, base_product(x, some_rows(w, rows))
        return
    wide, scratch = x.float(), x.new_empty(min(BLOCK, w.shape[0]), w.shape[1], dtype=torch.float32)
    part = wide.new_empty(x.shape[0], len(scratch))
    for first in range(0, w.shape[0], BLOCK):
        rows = slice(first, min(first + BLOCK, w.shape[0]))
        block = scratch[: rows.stop - first]
        widen_into(block, some_rows(w, rows))
        product = part if len(block) == len(scratch) else wide.new_empty(x.shape[0], len(block))
        torch.mm(wide, block.T, out=product)
        yield rows, product


def back_product(dy: Tensor, w: Tensor | Packed) -> Tensor:
    """dy W in float32; dy by rows, of the dtype of W or float32."""
    if on_tiles(dy, w):
        return product_back(dy, w)
    row = choice(w.dtype)
    if row.streamed_from <= dy.shape[0] <= row.streamed and w.stride(1) == 1:
        return _streamed(dy, w)
    if isinstance(w, Tensor) and w.dtype is torch.float32:
        return dy @ w
    w, wide = held(w), dy.float()
    out = wide.new_zeros(dy.shape[0], w.shape[1])
    scratch = wide.new_empty(min(BLOCK, w.shape[0]), w.shape[1])
    for first in range(0, w.shape[0], BLOCK):
        rows = slice(first, min(first + BLOCK, w.shape[0]))
        block = scratch[: rows.stop - first]
        widen_into(block, some_rows(w, rows))
        out.addmm_(wide[:, rows], block)
    return out


def _streamed(dy: Tensor, w: Tensor | Packed) -> Tensor:
    """By the kernel of dA, pᵀ x with W in the place of x: a row of W is widened in the cache, for
    all tokens."""
    out = dy.new_empty(dy.shape[0], w.shape[1], dtype=torch.float32)
    rows = held(w) if len(dy) > CHUNK else w
    for t in range(0, dy.shape[0], CHUNK):
        part = dy[t : t + CHUNK].float().T.contiguous()  # [out, tokens]
        _cpu.outer(rows, out[t : t + CHUNK], None, part, None, torch.get_num_threads())
    return out
