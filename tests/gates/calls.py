"""The configurations of the ops' Triton kernels: what their launchers choose for some sizes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from unittest.mock import patch

import torch

from lora_kernels import (
    Member,
    dora_linear,
    lora_linear,
    lora_linear_group,
    merged_weight,
    multi_lora,
    multi_lora_add_,
    use_backend,
    weight_norm,
)
from lora_kernels.ops import BatchPlan, Slots, triton_compiler
from lora_kernels.ops.dispatch import forced_candidate
from lora_kernels.ops.launch import Launch, recorded
from lora_kernels.ptxsim import device
from lora_kernels.testing.gates import Budget, Change, Configuration, versions
from lora_kernels.testing.gates.configuration import BY, CHIPS, NVIDIA
from lora_kernels.testing.gates.launched import launched

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
WIDE = 4096
Call = Callable[[], None]


def linear(
    m: int, r: int, dtype: torch.dtype = BF16, gain: bool = False, dropout: float = 0.0, semantics: str = "peft",
    form: str = "two launches", dx: bool = True, adapters: torch.dtype | None = None,
) -> Callable[[], None]:  # fmt: skip
    """A forward and a backward of one layer; nothing is computed but the library's products, which
    are small. Up to 64 tokens in one pass."""
    library = form == "addmm"
    wide = 512 if library else WIDE
    form = "one pass" if m <= 64 and not library else form

    def call() -> None:
        x, w = (torch.empty(s, dtype=dtype) for s in ((m, wide), (wide, wide)))
        a, b = (torch.empty(s, dtype=adapters or dtype) for s in ((r, wide), (wide, r)))
        given = torch.ones(wide).requires_grad_() if gain else None
        seed = torch.tensor(2**40) if dropout else None
        leaves = x.requires_grad_(dx), a.requires_grad_(), b.requires_grad_()
        with forced_candidate(form):
            y = lora_linear(leaves[0], w, *leaves[1:], 0.5, None, given, dropout, semantics, seed)
        with forced_candidate(form if library else "fused"):
            # not backward: it would copy what it accumulates
            torch.autograd.grad(y, [t for t in (*leaves, given) if t is not None and t.requires_grad], torch.empty_like(y))

    return call


def group(m: int, r: int, dropout: float = 0.0) -> Callable[[], None]:
    """The same for the queries, keys and values of a layer of Llama-3-8B."""

    def call() -> None:
        members = [
            Member(
                torch.empty(n, WIDE, dtype=BF16), *(torch.empty(s, dtype=BF16).requires_grad_() for s in ((r, WIDE), (n, r))),
                0.5, seed=torch.tensor(2**40) if dropout else None,
            )
            for n in (4096, 1024, 1024)
        ]  # fmt: skip
        x = torch.empty(m, WIDE, dtype=BF16).requires_grad_()
        with forced_candidate("two launches"):
            ys = lora_linear_group(x, members, dropout)
        with forced_candidate("fused"):
            leaves = [x, *(t for member in members for t in (member.a, member.b))]
            torch.autograd.grad(ys, leaves, list(map(torch.empty_like, ys)))

    return call


def dora(m: int, r: int, dtype: torch.dtype = BF16) -> Callable[[], None]:
    def call() -> None:
        x, w, a, b = (torch.empty(s, dtype=dtype) for s in ((m, WIDE), (WIDE, WIDE), (r, WIDE), (WIDE, r)))
        dora_linear(x, w, a, b, torch.ones(WIDE), 0.5)

    return call


def norm(r: int, dtype: torch.dtype = BF16) -> Callable[[], None]:
    def call() -> None:
        weight_norm(*(torch.empty(s, dtype=dtype) for s in ((WIDE, WIDE), (r, WIDE), (WIDE, r))), 0.5)

    return call


def merge(r: int, dtype: torch.dtype = BF16, adapters: torch.dtype | None = None) -> Callable[[], None]:
    def call() -> None:
        a, b = (torch.empty(s, dtype=adapters or dtype) for s in ((r, WIDE), (WIDE, r)))
        merged_weight(torch.empty(WIDE, WIDE, dtype=dtype), a, b, 0.5, torch.ones(WIDE))

    return call


def multi(
    tokens: int, outs: Sequence[int] = (WIDE,), each: int = 1, adds: bool = False, dtype: torch.dtype = BF16, most: int = 512
) -> Call:
    """Many adapters over one base; `each`: adapters of a token, `adds`: on a product that is there,
    `most`: largest rank."""

    def call() -> None:
        count, pages = 64, most // 8
        i32 = lambda *shape: torch.empty(shape, dtype=torch.int32)  # noqa: E731
        sites = [
            Slots(torch.empty(8, WIDE, dtype=dtype), torch.empty(8, n, dtype=dtype), i32(count, pages), i32(count),
                  torch.zeros(count), i32(count), torch.empty(count, n), torch.empty(count, n), i32(count))
            for n in outs
        ]  # fmt: skip
        ids = torch.zeros(tokens, each, dtype=torch.int64)
        plan = BatchPlan.build(ids, count, None if each == 1 else torch.ones(tokens, each))
        x, bias = torch.empty(tokens, WIDE, dtype=dtype), torch.empty(sum(outs), dtype=dtype)
        if adds:
            multi_lora_add_(torch.empty(tokens, sum(outs), dtype=dtype), x, sites, plan, bias)
        else:
            multi_lora(x, torch.empty(sum(outs), WIDE, dtype=dtype), sites, plan, bias)

    return call


@contextmanager
def chooses_as(version: str) -> Iterator[None]:
    """Inside it launchers choose tiles, stages and warps as they do under this Triton."""
    numbers = tuple(map(int, version.partition(versions.PTXAS)[0].split(".")))
    with patch.object(triton_compiler, "version", lambda: numbers):
        yield


def _chooses_otherwise(version: str) -> bool:
    usual = triton_compiler.has_fences()  # all that they ask of the version
    with chooses_as(version):
        return triton_compiler.has_fences() != usual


OTHERWISE = [version for version in versions.other_versions() if _chooses_otherwise(version)]


def launches(call: Callable[[], None], arch: str, last: bool) -> dict[str, Launch]:
    """The first launch of each kernel on a chip, or the last."""
    hip = None if arch in NVIDIA else "7.0"
    with use_backend("triton", simulate=True), device(80 if hip else int(arch[3:])), recorded() as found:
        with patch.object(torch.version, "hip", hip):
            call()
    return {launch.kernel.__name__: launch for launch in (found if last else reversed(found))}


def on_chips(
    name: str, kernel: str, call: Callable[[], None], default: Budget, rows: dict[str, Change] | None = None, *,
    without: dict[str, str] | None = None, last: bool = False,
) -> Configuration:  # fmt: skip
    """What the launcher chooses on each chip, in the kernel's first launch or in its `last`."""
    shipped = [arch for arch in CHIPS if arch not in " ".join(without or {}).split()]
    made = {arch: launched(launches(call, arch, last)[kernel]) for arch in shipped}
    special = {arch: one for arch, one in made.items() if one != made["sm_80"]}
    for version in OTHERWISE:
        with chooses_as(version):
            for arch in set(versions.CHIPS) & set(shipped):
                special[f"{arch}{BY}{version}"] = launched(launches(call, arch, last)[kernel])
    return Configuration(name, made["sm_80"], default, rows or {}, without or {}, special)


DROPPED = linear(64, 16, gain=True, dropout=0.1, form="addmm")
DROPPED_F16 = linear(8192, 16, F16, gain=True, dropout=0.1)
LORA_ONLY = linear(8192, 16, gain=True, dropout=0.1, semantics="lora_only")
