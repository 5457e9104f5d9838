"""The error figures that every kernel is held to. Each compares with the float64 result of the
given-dtype inputs.

None is a fixed number: each scales with the rounding of the output's dtype, the length of the sums,
or the error of PyTorch itself, so that one rule serves every dtype and size and leaves no room for
a wrong term.
"""

import math

import torch
from torch import Tensor

_SMALL_SAMPLE = 1024


def rms(t: Tensor) -> float:
    """The root mean square of all elements, in float64; 0 of an empty tensor."""
    return t.detach().double().square().mean().sqrt().item() if t.numel() else 0.0


def unit_roundoff(dtype: torch.dtype) -> float:
    """The largest relative error of one rounding to `dtype`: 2⁻⁸ of bfloat16, 2⁻¹¹ of float16, 2⁻²⁴
    of float32."""
    return torch.finfo(dtype).eps / 2


def assert_within_rounding(
    actual: Tensor,
    exact: Tensor,
    dtype: torch.dtype,
    ideal_ratio: float = 1.5,
    inherited: float = 0.0,
    name: str = "result",
) -> None:
    """rms(actual - exact) is at most `ideal_ratio` times that of `exact`, correctly rounded to
    `dtype`.

    For 16-bit results; the error of a float32 one is that of its sums (`assert_componentwise`).
    `dtype` is the lowest precision that anything on the way may have. `inherited` is the rms error
    that a correctly rounded operand brings into a sum, where a result is defined on one; the larger
    of the two yardsticks counts. The rms of n < 1024 errors is itself uncertain by about 1/√n,
    which is allowed twice, and the yardstick is then at least that of evenly spread errors,
    ulp/√12.
    """
    actual, exact = actual.detach().double(), exact.detach().double()
    _assert_comparable(actual, exact, name)
    if not exact.numel():
        return
    ideal, ratio = max(rms(exact.to(dtype).double() - exact), inherited), ideal_ratio
    if exact.numel() < _SMALL_SAMPLE:
        exponent = torch.frexp(exact).exponent.double()
        ulp = torch.maximum(2.0 ** (exponent - 1) * torch.finfo(dtype).eps, torch.tensor(_smallest(dtype)))
        ideal, ratio = max(ideal, rms(ulp) / math.sqrt(12)), ideal_ratio * (1 + 2 / math.sqrt(exact.numel()))
    error = rms(actual - exact)
    assert error <= ratio * ideal, (
        f"{name} {list(exact.shape)}: rms error {error:.3e} is {error / ideal if ideal else math.inf:.3f} times that of"
        f" the correctly rounded result ({ideal:.3e}, {dtype}); {ratio:.3f} is allowed"
    )


def assert_componentwise(
    actual: Tensor,
    exact: Tensor,
    magnitude: Tensor,
    terms: int,
    dtype: torch.dtype,
    roundings: int = 1,
    sums: torch.dtype | None = None,
    name: str = "result",
) -> None:
    """|actual - exact| <= u·|exact| + ((roundings - 1)·u + terms·u_s)·magnitude for each element.

    `magnitude` is the formula with every input replaced by its absolute value, e.g. |x||Wᵀ| +
    s|x||Aᵀ||Bᵀ|. `terms` is the total length of the nested sums. u is the unit roundoff of `dtype`,
    u_s that of `sums` (float32, or float64 for float64). With `roundings` = 1 nothing on the way
    may be kept in `dtype`.
    """
    actual, exact, magnitude = (t.detach().double() for t in (actual, exact, magnitude))
    _assert_comparable(actual, exact, name)
    u, u_sums = unit_roundoff(dtype), unit_roundoff(sums or torch.promote_types(dtype, torch.float32))
    bound = u * exact.abs() + ((roundings - 1) * u + (terms + 2) * u_sums) * magnitude + _smallest(dtype)
    excess = (actual - exact).abs() - bound
    if exact.numel() and not (excess <= 0).all():
        at = int(excess.argmax())
        raise AssertionError(
            f"{name} {list(exact.shape)}: {int((excess > 0).sum())} elements outside the bound; worst at index {at}:"
            f" {actual.flatten()[at]:.9g}, exact {exact.flatten()[at]:.9g}, allowed ±{bound.flatten()[at]:.3g}"
        )


def assert_no_worse_than_torch(actual: Tensor, exact: Tensor, torch_result: Tensor, name: str = "result") -> None:
    """FlashAttention's rule: max error <= 2 · that of PyTorch's unfused result in the same dtype +
    2 · noise floor.

    The noise floor is what adding and subtracting 0.3 in that dtype does to the exact result.
    """
    actual, exact = actual.detach().double(), exact.detach().double()
    _assert_comparable(actual, exact, name)
    if not exact.numel():
        return
    rounded = exact.to(torch_result.dtype)
    floor = (rounded + 0.3 - 0.3).double().sub(exact).abs().max().item()
    error, yardstick = (actual - exact).abs().max().item(), (torch_result.detach().double() - exact).abs().max().item()
    assert error <= 2 * yardstick + 2 * floor, (
        f"{name} {list(exact.shape)}: max error {error:.3e}, PyTorch's {yardstick:.3e}, noise floor {floor:.3e}"
    )


def _smallest(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


def _assert_comparable(actual: Tensor, exact: Tensor, name: str) -> None:
    assert actual.shape == exact.shape, f"{name}: shape {list(actual.shape)}, wanted {list(exact.shape)}"
    wrong = int((~actual.isfinite() & exact.isfinite()).sum())
    assert not wrong, f"{name} {list(exact.shape)}: {wrong} elements are not finite"
