"""Other numbers in the form that a quantised weight has: each code the nearest of those that its
block's scale allows, by round to nearest. Scales are what the libraries take.

    no zeros     the block's largest number, over the largest of a code (of each sign)
    zeros        from the block's least number to its largest, 0 among them
    powers of 2  the power below the block's largest, over that below the largest of a code
                 (Open Compute Project, Microscaling formats 1.0, §6.3)
    nested       formula (2) of `QuantisedWeight`; codes are those of the scale before its rounding,
                 as bitsandbytes has it
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_kernels.ops.quantised.formula import spread
from lora_kernels.ops.quantised.weight import HALVES, INT8, LOW_FIRST, NIBBLES, POWERS, QuantisedWeight


def requantised(w: Tensor, like: QuantisedWeight) -> QuantisedWeight:
    """w of the shape of `like`, finite, as codes: `like` with other codes, scales and zeros. W is
    read in float32.

    Raises:
        ValueError: w has another shape than `like`, or is on another device.
    """
    if w.shape != like.shape or w.device != like.device:
        wanted = f"{list(like.shape)} on {like.device}"
        raise ValueError(f"requantised: w must be {wanted}, found {list(w.shape)} on {w.device}")
    with torch.no_grad():
        wide = w.detach().float().contiguous()
        least, most = _range(wide, like)
        low, high = _codes_range(like)
        if like.zeros is None:
            scales = torch.maximum(most / high, least / low if low else most / high)
            zeros = None
        else:
            scales, zeros = _affine(least, most, low, high, like)
        named: dict[str, Any] = {}
        if like.scales.dtype is POWERS:
            exponents = torch.frexp(torch.maximum(most, -least)).exponent - torch.frexp(torch.tensor(high)).exponent
            exponents = torch.where((most > 0) | (least < 0), exponents, -127).clamp(-127, 127)
            scales = torch.ldexp(torch.ones_like(most), exponents)
            named["scales"] = (exponents + 127).to(torch.uint8).view(POWERS)
        elif like.outer is not None:
            named |= _nested(scales, like)
        else:
            named["scales"] = scales
        value = wide.reshape(-1) * spread(like, torch.where(scales > 0, 1 / scales, 0))
        if zeros is not None:
            named["zeros"] = zeros
            value += spread(like, zeros)
        codes = _packed(_nearest(value, like, low, high), like)
        named = {name: part.view(getattr(like, name).shape) for name, part in named.items()}
        return replace(like, codes=codes.view(like.codes.shape), **named)


def _range(wide: Tensor, like: QuantisedWeight) -> tuple[Tensor, Tensor]:
    """The least and the largest number of each block, or 0 if that is beyond."""
    if like.block_rows:
        (*experts, n_out, n_in), rows, columns = like.shape, like.block_rows, like.block
        down, across = -(-n_out // rows), -(-n_in // columns)
        tiles = F.pad(wide, (0, across * columns - n_in, 0, down * rows - n_out))
        blocks = tiles.view(*experts, down, rows, across, columns).transpose(-3, -2).reshape(like.blocks, rows * columns)
    else:
        size = min(like.block, max(like.numel(), 1))
        blocks = F.pad(wide.view(-1), (0, like.blocks * size - like.numel())).view(like.blocks, size)
    return blocks.amin(1).clamp_max(0), blocks.amax(1).clamp_min(0)


def _codes_range(like: QuantisedWeight) -> tuple[float, float]:
    """The least and the largest value of a code."""
    if like.kind == NIBBLES:
        assert like.table is not None
        return float(like.table.min()), float(like.table.max())
    if like.kind == INT8:
        return (-127.0 if like.zeros is None else -128.0), 127.0
    most = torch.finfo(like.codes.dtype).max
    return -most, most


def _affine(least: Tensor, most: Tensor, low: float, high: float, like: QuantisedWeight) -> tuple[Tensor, Tensor]:
    scales = (most - least) / (high - low)
    if like.zero_rounded:  # they are kept in its dtype
        scales = scales.to(like.dtype).float()
    zeros = low - least * torch.where(scales > 0, 1 / scales, 0)
    return scales, zeros.to(like.dtype).float() if like.zero_rounded else zeros.round().clamp(low, high)


def _nested(scales: Tensor, like: QuantisedWeight) -> dict[str, Tensor]:
    assert like.outer_table is not None
    offset, size = scales.mean(), like.outer_block
    centred = scales - offset
    blocks = F.pad(centred, (0, -len(centred) % size)).view(-1, size)
    outer = blocks.abs().amax(1)
    value = (blocks * torch.where(outer > 0, 1 / outer, 0)[:, None]).view(-1)[: len(centred)]
    return {"scales": _among(value, like.outer_table), "outer": outer, "offset": offset}


def _nearest(value: Tensor, like: QuantisedWeight, low: float, high: float) -> Tensor:
    """The code of each value, 4-bit ones one to a byte."""
    if like.kind == NIBBLES:
        assert like.table is not None
        return _among(value, like.table)
    value = value.clamp(low, high)
    return (value.round() if like.kind == INT8 else value).to(like.codes.dtype)


def _among(value: Tensor, table: Tensor) -> Tensor:
    """The place in a table of what is nearest to each value."""
    numbers, order = table.sort(stable=True)
    fresh = torch.cat((numbers.new_ones(1, dtype=torch.bool), numbers[1:] != numbers[:-1]))  # 0 before -0
    numbers, order = numbers[fresh], order[fresh]
    return order.to(torch.uint8)[torch.bucketize(value, (numbers[1:] + numbers[:-1]) / 2)]


def _packed(codes: Tensor, like: QuantisedWeight) -> Tensor:
    if like.kind != NIBBLES:
        return codes
    codes = F.pad(codes, (0, codes.numel() % 2))
    first, second = codes.chunk(2) if like.order == HALVES else (codes[::2], codes[1::2])
    return (second << 4) | first if like.order == LOW_FIRST else (first << 4) | second
