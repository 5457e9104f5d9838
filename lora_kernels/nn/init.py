"""The first values of A and B: PEFT's formulas, which draw the same numbers from torch's
generator."""

import math
import re
from typing import Any

import torch
from torch import Tensor, nn

INITS = ("True", "False", "gaussian", "pissa", "pissa_niter_[number]", "olora", "orthogonal")

CHANGES_CODES = (
    "takes a product out of the base weight, which is quantised: what is left would be rounded to codes again; take it out"
    " of the floating weight and quantise that"
)

_NITER = re.compile(r"pissa_niter_([0-9]{1,6})")


def check_init(layer: str, init: Any, r: int, weight: Tensor, scaling: float, quantised: bool = False) -> Any:
    """The initialisation in its canonical form, if these sizes can have it.

    Raises:
        TypeError: init is neither a bool, a name nor a pair of floating tensors.
        ValueError: there is no such name, or r, scaling or the tensors do not fit, or the weight is
            quantised and would have to change; the message says what would.
    """
    if isinstance(init, bool):
        return init
    if isinstance(init, tuple):
        return _check_pair(layer, init, r, weight)
    if not isinstance(init, str):
        raise TypeError(
            f"{layer}: init_lora_weights must be True, False, a name or a pair of tensors, found {type(init).__name__}"
        )
    name = init.lower()
    if name not in ("gaussian", "pissa", "olora", "orthogonal") and not _NITER.fullmatch(name):
        raise ValueError(f"{layer}: init_lora_weights must be one of {', '.join(INITS)}, found {init!r}")
    if name == "orthogonal" and r % 2:
        raise ValueError(f"{layer}: init_lora_weights='orthogonal' needs an even r, found {r}")
    if name.startswith(("pissa", "olora")):
        if quantised:
            raise ValueError(f"{layer}: init_lora_weights={init!r} {CHANGES_CODES}")
        if r > min(weight.shape):
            raise ValueError(
                f"{layer}: init_lora_weights={init!r} needs an r of at most {min(weight.shape)}"
                f" (weight is {list(weight.shape)}), found {r}"
            )
        if name != "olora" and scaling <= 0:
            raise ValueError(f"{layer}: init_lora_weights={init!r} needs a positive scaling, found {scaling}")
    return name


def _check_pair(layer: str, init: tuple[Any, ...], r: int, weight: Tensor) -> tuple[Tensor, Tensor]:
    if len(init) != 2 or not all(isinstance(t, Tensor) for t in init):
        kinds = ", ".join(type(t).__name__ for t in init)
        raise TypeError(f"{layer}: init_lora_weights must be two tensors (A, B), found ({kinds})")
    n_out, n_in = weight.shape
    for name, tensor, shape in (("A", init[0], (r, n_in)), ("B", init[1], (n_out, r))):
        if tensor.shape != shape:
            raise ValueError(
                f"{layer}: init_lora_weights: {name} must have shape {list(shape)}, found {list(tensor.shape)}"
            )
        if not tensor.is_floating_point():
            raise TypeError(f"{layer}: init_lora_weights: {name} must be floating, found {tensor.dtype}")
        if not tensor.is_meta and not bool(tensor.isfinite().all()):
            raise ValueError(f"{layer}: init_lora_weights: {name} has values that are not finite")
    return init[0], init[1]


@torch.no_grad()
def linear_factors(init: Any, r: int, weight: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r] in float32 (float64 if weight is float64), for an `init` that
    `check_init` returned.

    | True            | A uniform in ±1/√in (Kaiming, a = √5), B = 0                              |
    | False           | A as above, B uniform in ±1/√r                                            |
    | "gaussian"      | A normal with deviation 1/r, B = 0                                        |
    | "orthogonal"    | A, B from odd and even rows of a random orthogonal matrix: BA = 0         |
    | "pissa"         | W = U S V, B = U_r √(S_r/s), A = √(S_r/s) V_r; weight becomes W - s·BA    |
    | "pissa_niter_N" | the same by a randomised svd with N iterations                            |
    | "olora"         | W = Q R, B = Q_r, A = R_r; weight becomes W - s·BA                        |

    The weight changes in place. As PEFT does, random values are rounded to its dtype. The factors
    of pissa and olora are not, unlike PEFT's: rounding them would move a 16-bit model away from its
    base before the first step.
    Sources: PiSSA, arXiv:2404.02948, eq. 2–4; OLoRA, arXiv:2406.01775, §3; PEFT 0.21.2,
    tuners/lora/layer.py.
    """
    n_out, n_in = weight.shape
    wide = torch.promote_types(weight.dtype, torch.float32)
    if isinstance(init, tuple):
        a, b = (t.detach().to(weight.device, wide, copy=True).contiguous() for t in init)
        return a, b
    a, b = _two_linears(r, n_in, n_out)
    if isinstance(init, str) and init.startswith("pissa"):
        return _pissa_factors(init, r, weight, scaling, wide)
    if init == "olora":
        return _olora_factors(r, weight, scaling, wide)
    if init == "orthogonal":
        a, b = _orthogonal_factors(r, n_out, n_in)
    else:
        _draw(init, a, b, r)
    return _rounded(a, weight), _rounded(b, weight)


@torch.no_grad()
def expert_factors(init: bool | str, r: int, experts: int, n_in: int, n_out: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """A [experts · r, in] and B [out, r · experts] of a parameter as PEFT has them, by True, False
    or "gaussian" of `linear_factors`."""
    a, b = _two_linears(r * experts, n_in, n_out)
    _draw(init, a, b, r)
    return _rounded(a, like), _rounded(b, like)


def _two_linears(rows: int, n_in: int, n_out: int) -> tuple[Tensor, Tensor]:
    """What PEFT begins with: two nn.Linear in torch's default dtype, whose draws come before those
    of any initialisation."""
    a, b = torch.empty(rows, n_in), torch.empty(n_out, rows)
    nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    nn.init.kaiming_uniform_(b, a=math.sqrt(5))
    return a, b


def _draw(init: bool | str, a: Tensor, b: Tensor, r: int) -> None:
    if init is False:
        return
    if init is True:
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    else:
        nn.init.normal_(a, std=1 / r)
    nn.init.zeros_(b)


@torch.no_grad()
def embedding_factors(init: bool, r: int, weight: Tensor) -> tuple[Tensor, Tensor]:
    """A [r, num_embeddings] and B [dim, r] of an embedding: A = 0, B normal; both normal if `init`
    is False."""
    a, b = torch.randn(r, weight.shape[0]), torch.randn(weight.shape[1], r)
    if init:
        nn.init.zeros_(a)
        nn.init.normal_(b)
    return _rounded(a, weight), _rounded(b, weight)


def _rounded(tensor: Tensor, weight: Tensor) -> Tensor:
    return tensor.to(weight.device, weight.dtype).to(torch.promote_types(weight.dtype, torch.float32))


def _pissa_factors(init: str, r: int, weight: Tensor, scaling: float, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    w = weight.detach().to(wide)
    niter = _NITER.fullmatch(init)
    if niter:
        u, s, v = torch.svd_lowrank(w, r, niter=int(niter[1]))
        v = v.t()
    else:
        u, s, v = torch.linalg.svd(w, full_matrices=False)
        u, s, v = u[:, :r], s[:r], v[:r]
    root = torch.diag(torch.sqrt(s / scaling))
    a, b = root @ v, u @ root
    weight.copy_(w - scaling * b @ a)
    return a, b


def _olora_factors(r: int, weight: Tensor, scaling: float, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    w = weight.detach().to(wide)
    q, triangle = torch.linalg.qr(w)
    a, b = triangle[:r].contiguous(), q[:, :r].contiguous()
    weight.copy_(w - scaling * b @ a)
    return a, b


def _orthogonal_factors(r: int, n_out: int, n_in: int) -> tuple[Tensor, Tensor]:
    q, _ = torch.linalg.qr(torch.randn(r, r))
    a = torch.randn(n_in, r // 2).mm(q[0::2]).T / 10.0
    b = torch.randn(r // 2, n_out).T.mm(q[1::2]) / 10.0
    return a.contiguous(), b.contiguous()
