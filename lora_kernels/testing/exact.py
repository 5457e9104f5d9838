"""lora_linear in float64 by autograd, from the formula alone: what every backend is compared
with."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lora_kernels.ops.dropout import mask

GRADIENTS = ("x", "a", "b", "bias", "gain", "scale")


@dataclass
class Problem:
    """The arguments of one `lora_linear` call, and the gradient that comes back into it."""

    x: Tensor
    w: Tensor
    a: Tensor
    b: Tensor
    scale: float | Tensor
    bias: Tensor | None
    gain: Tensor | None
    dropout: float
    dropout_semantics: str
    seed: Tensor | None
    dy: Tensor

    def arguments(self) -> tuple[Any, ...]:
        """In the order of `lora_linear`'s parameters."""
        return (
            self.x,
            self.w,
            self.a,
            self.b,
            self.scale,
            self.bias,
            self.gain,
            self.dropout,
            self.dropout_semantics,
            self.seed,
        )

    def require_grad(self, names: tuple[str, ...] = GRADIENTS) -> dict[str, Tensor]:
        """Marks the tensors among `names` and returns them."""
        found = {n: t for n in names if isinstance(t := getattr(self, n), Tensor)}
        for t in found.values():
            t.requires_grad_()
        return found

    def terms(self) -> dict[str, int]:
        """The length of the nested sums behind y and behind each gradient."""
        (n_out, n_in), rank, tokens = self.w.shape, self.a.shape[0], self.x.shape[:-1].numel()
        return {
            "y": n_in + rank,
            "x": n_out + rank,
            "a": n_out + tokens,
            "b": n_in + tokens,
            "bias": tokens,
            "gain": n_in + rank + tokens,
            "scale": n_in + n_out + rank + tokens,
        }


@dataclass
class Exact:
    """float64 values by name ("y", "x", "a", …), and the same formulas on absolute values."""

    values: dict[str, Tensor] = field(default_factory=dict)
    magnitudes: dict[str, Tensor] = field(default_factory=dict)
    dgain_terms: Tensor | None = None
    """√Σ (dy·z)² over the tokens, z being what gain multiplies: gain's gradient is the sum of these
    terms."""


def make_problem(
    tokens: int | tuple[int, ...] = 5,
    n_in: int = 64,
    n_out: int = 48,
    rank: int = 8,
    dtype: torch.dtype = torch.float32,
    adapter_dtype: torch.dtype | None = None,
    bias: bool = False,
    gain: bool = False,
    scale: float | Tensor = 1.5,
    dropout: float = 0.0,
    dropout_semantics: str = "peft",
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Problem:
    """A random problem with values of both signs, of the sizes of a trained layer. `tokens` ()
    makes x a vector.

    The values are the same on every device; the seed of the dropout stays on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)

    def random_normal(shape: tuple[int, ...], deviation: float, kind: torch.dtype) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * deviation).to(device, kind)

    lead = tokens if isinstance(tokens, tuple) else (tokens,)
    kind = adapter_dtype or dtype
    vector = torch.promote_types(dtype, torch.float32)
    return Problem(
        x=random_normal((*lead, n_in), 1.0, dtype),
        w=random_normal((n_out, n_in), n_in**-0.5, dtype),
        a=random_normal((rank, n_in), n_in**-0.5, kind),
        b=random_normal((n_out, rank), 0.5 * rank**-0.5, kind),
        scale=scale,
        bias=random_normal((n_out,), 0.5, dtype) if bias else None,
        gain=1 + random_normal((n_out,), 0.3, vector) if gain else None,
        dropout=dropout,
        dropout_semantics=dropout_semantics,
        seed=torch.tensor(0x1234_5678_9ABC_DEF0 ^ seed) if dropout else None,
        dy=random_normal((*lead, n_out), 1.0, dtype),
    )


def make_group(
    members: Sequence[dict[str, Any]],
    tokens: int | tuple[int, ...] = 5,
    n_in: int = 64,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **shared: Any,
) -> list[Problem]:
    """Problems with one x. Each member, and `shared` for all of them, says what `make_problem`
    takes: n_out, rank, bias, …"""
    problems = [make_problem(tokens, n_in, dtype=dtype, seed=seed + 101 * i, **shared | m) for i, m in enumerate(members)]
    return [replace(p, x=problems[0].x) for p in problems]


def exact(problem: Problem) -> Exact:
    """y and the gradients that `problem.dy` sends to x, a, b, bias, gain and a tensor scale, on the
    CPU.

    A problem on a GPU is brought over first: no product of that GPU has a part in what its kernels
    are compared with.
    """
    out = Exact()
    for absolute, into in ((False, out.values), (True, out.magnitudes)):
        p = replace(problem)
        for name in ("x", "w", "a", "b", "scale", "bias", "gain", "dy"):
            value = getattr(problem, name)
            if isinstance(value, Tensor):
                value = value.detach().to("cpu", torch.float64, copy=True)
            if value is not None:
                setattr(p, name, abs(value) if absolute else value)
        leaves = p.require_grad()
        y = _formula(p, absolute)
        into["y"] = y.detach()
        if p.gain is not None and not absolute:
            with torch.no_grad():
                z = _formula(replace(p, gain=torch.ones_like(p.gain)), False) - _formula(
                    replace(p, gain=torch.zeros_like(p.gain)), False
                )
            out.dgain_terms = (p.dy * z).reshape(-1, z.shape[-1]).norm(dim=0)
        into.update(zip(leaves, torch.autograd.grad(y, list(leaves.values()), p.dy), strict=True))
    return out


def _formula(p: Problem, absolute: bool) -> Tensor:
    x_dropped = p.x
    if p.dropout:
        assert p.seed is not None
        rows = p.x.shape[:-1].numel()
        keep = mask(p.seed, p.dropout, rows, p.x.shape[-1], torch.float64, p.x.device)
        x_dropped = p.x * keep.reshape(p.x.shape)
    scale = p.scale.reshape(()) if isinstance(p.scale, Tensor) else p.scale
    update = scale * (x_dropped @ p.a.T @ p.b.T)
    if p.gain is None:
        y = p.x @ p.w.T + update
    elif p.dropout and p.dropout_semantics == "peft":
        y = p.x @ p.w.T + (p.gain + (1 if absolute else -1)) * (x_dropped @ p.w.T) + p.gain * update
    else:
        y = p.gain * (p.x @ p.w.T + update)
    return y if p.bias is None else y + p.bias
