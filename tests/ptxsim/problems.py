"""The numbers that the corpus of kernels is tried on: arguments, and in float64 what must come
out."""

import mmap
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_kernels.ops import dropout

MARGIN = 1 << 15
SEED = 0x1234_5678_9ABC_DEF1


@dataclass(frozen=True)
class Problem:
    args: dict[str, Any]
    """In the order of the CUDA kernel's parameters; a Triton kernel takes those that it has."""
    wanted: dict[str, Tensor]
    tolerance: float
    """Of the largest number wanted."""
    scratch: tuple[str, ...] = ()
    """What else it writes, full of NaN before."""
    zeroed: tuple[str, ...] = ()
    """What is zero before, and may be read."""
    exact: bool = True
    """The same bits each time."""

    @property
    def writes(self) -> list[Tensor]:
        return [self.args[name] for name in dict.fromkeys((*self.wanted, *self.scratch, *self.zeroed))]

    @property
    def poisoned(self) -> list[Tensor]:
        return [self.args[name] for name in (*self.wanted, *self.scratch) if name not in self.zeroed]

    def right(self) -> bool:
        for name, wanted in self.wanted.items():
            error = (self.args[name].double() - wanted).abs().max()
            if not error <= self.tolerance * wanted.abs().max():
                return False
        return True


def held(t: Tensor) -> Tensor:
    """The tensor between random numbers, as in a full memory: what is touched beside it does not
    fault."""
    margin = (torch.randn(MARGIN) if t.is_floating_point() else torch.randint(0, 3, (MARGIN,))).to(t.dtype)
    return torch.cat([margin, t.reshape(-1), margin])[MARGIN : MARGIN + t.numel()].view(t.shape)


def random(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return held(torch.randn(shape).to(dtype))


def unwritten(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return held(torch.full(shape, float("nan"), dtype=dtype))


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return held(torch.zeros(shape, dtype=dtype))


def add(n: int) -> Problem:
    x, z = random(n, dtype=torch.float32), random(n, dtype=torch.float32)
    return Problem({"x": x, "z": z, "y": unwritten(n), "n": n}, {"y": x.double() + z.double()}, 2**-23)


def multiply(m: int, n: int, k: int, dtype: torch.dtype = torch.float16, tolerance: float = 1e-5) -> Problem:
    """y = x wᵀ, y in the dtype of x."""
    x, w = random(m, k, dtype=dtype), random(n, k, dtype=dtype)
    args = {"x": x, "w": w, "y": unwritten(m, n, dtype=dtype), "m": m, "n": n, "k": k}
    return Problem(args, {"y": x.double() @ w.double().T}, tolerance)


def dot(m: int, n: int, k: int, dtype: torch.dtype, tolerance: float) -> Problem:
    """y = x w in float32."""
    x, w = random(m, k, dtype=dtype), random(k, n, dtype=dtype)
    args = {"x": x, "w": w, "y": unwritten(m, n), "m": m, "n": n, "k": k}
    return Problem(args, {"y": x.double() @ w.double()}, tolerance)


def cast(m: int, n: int, k: int) -> Problem:
    """y = x w in float32 with x rounded to the 16 bits of w [k, n]."""
    x, w = random(m, k, dtype=torch.float32), random(k, n)
    args = {"x": x, "w": w, "y": unwritten(m, n), "m": m, "n": n, "k": k}
    return Problem(args, {"y": x.half().double() @ w.double()}, 1e-6)


def handed(n: int) -> Problem:
    x = random(n, dtype=torch.float32)
    return Problem({"x": x, "held": zeros(n), "y": unwritten(n), "n": n}, {"y": x.double()}, 0, zeroed=("held",))


def lora(m: int, n: int, k: int, r: int, dtype: torch.dtype = torch.float16, tolerance: float = 2**-9) -> Problem:
    """The rows of a beyond r are there, full of NaN."""
    x, w, b = random(m, k, dtype=dtype), random(n, k, dtype=dtype), random(n, r, dtype=dtype)
    a = unwritten(16, k, dtype=dtype)
    a[:r] = torch.randn(r, k).to(dtype)
    y = unwritten(m, n, dtype=dtype)
    args = {"x": x, "w": w, "a": a, "b": b, "y": y, "m": m, "n": n, "k": k, "r": r, "scale": 0.5}
    wanted = x.double() @ w.double().T + 0.5 * (x.double() @ a[:r].double().T) @ b.double().T
    return Problem(args, {"y": wanted}, tolerance)


def row_norm(n: int, k: int) -> Problem:
    w, a, b = random(n, k), random(16, k), random(n, 16)
    args = {"w": w, "a": a, "b": b, "norm": unwritten(n), "n": n, "k": k, "scale": 0.5}
    return Problem(args, {"norm": torch.linalg.vector_norm(w.double() + 0.5 * b.double() @ a.double(), dim=1)}, 1e-6)


def split_k(m: int, n: int, k: int) -> Problem:
    x, w = random(m, k), random(n, k)
    args = {"x": x, "w": w, "y": zeros(m, n), "m": m, "n": n, "k": k}
    return Problem(args, {"y": x.double() @ w.double().T}, 1e-6, zeroed=("y",), exact=False)


def ticket(m: int, n: int, k: int, parts: int, tiles: int) -> Problem:
    x, w = random(m, k), random(n, k)
    args = {
        "x": x, "w": w, "y": unwritten(m, n), "parts": unwritten(parts, m, n), "counter": zeros(tiles, dtype=torch.int32),
        "m": m, "n": n, "k": k,
    }  # fmt: skip
    return Problem(args, {"y": x.double() @ w.double().T}, 1e-6, scratch=("parts",), zeroed=("counter",))


def gather(which: list[int], k: int, adapters: int, huge: bool = False) -> Problem:
    """h of an adapter that is not there is zero. `huge`: a has more than 2³¹ elements, whose pages
    exist where touched."""
    x, h = random(len(which), k), unwritten(len(which), 16)
    a = _huge(adapters, k) if huge else random(adapters, 16, k)
    wanted = torch.zeros(len(which), 16, dtype=torch.float64)
    for token, adapter in enumerate(which):
        if 0 <= adapter < adapters:
            if huge:
                a[adapter] = torch.randn(16, k).half()
            wanted[token] = a[adapter].double() @ x[token].double()
    args = {"x": x, "a": a, "which": held(torch.tensor(which)), "h": h, "k": k, "adapters": adapters}
    return Problem(args, {"h": wanted}, 1e-6)


def _huge(adapters: int, k: int) -> Tensor:
    # room before and behind for offsets that wrap, which a plain interpreter reads without a word
    size, room = adapters * 16 * k * 2, 1 << 33
    # no reserve
    memory = mmap.mmap(-1, size + 2 * room, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)
    return torch.frombuffer(memory, dtype=torch.float16, offset=room, count=size // 2).view(adapters, 16, k)


def dropped(rows: int, columns: int, p: float = 0.3) -> Problem:
    x = random(rows, columns, dtype=torch.float32)
    args = {
        "x": x, "y": unwritten(rows, columns), "rows": rows, "columns": columns, "threshold": dropout.threshold(p),
        "kept": 1 / (1 - p), "seed": SEED,
    }  # fmt: skip
    mask = dropout.mask(torch.tensor(SEED), p, rows, columns, torch.float32, x.device)
    return Problem(args, {"y": x.double() * mask.double()}, 2**-22)


def softmax(rows: int, n: int) -> Problem:
    """Rows around -120, -60, …: exp overflows without the maximum, a zero of the padding shows."""
    x = held((torch.randn(rows, n) * 3 + 60 * (torch.arange(rows)[:, None] - 2)).half())
    args = {"x": x, "y": unwritten(rows, n, dtype=torch.float16), "n": n}
    return Problem(args, {"y": x.double().softmax(1)}, 2**-10)


def turned(n: int) -> Problem:
    x = random(n, dtype=torch.float32)
    args = {"x": x, "scratch": unwritten(n), "y": unwritten(n), "n": n}
    return Problem(args, {"y": x.double().flip(0)}, 0, scratch=("scratch",))
