"""Triton: the mask of dropout (ops/dropout.py) inside a kernel, and the argument that it takes."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from lora_kernels.ops.dropout import inverse_keep_rate, threshold


class Dropout(NamedTuple):
    """What a kernel takes for the dropout of a layer."""

    low: Any
    """A pointer to the seed, or its first half as `odd_word` packs it, and in `high` the other."""
    high: Any
    limit: Any
    """The smallest word that is kept."""
    inverse: Any
    """By which what is kept is multiplied."""


@triton.jit
def dropout_mask(drop, rows, first, BM: tl.constexpr, BK: tl.constexpr):
    """Whether a `Dropout` keeps elements `first` and on of these rows, [BM, BK]: ops/dropout.py's
    Philox, a word an element."""
    if drop.low.dtype.is_ptr():
        seed = tl.load(drop.low)
    else:
        seed = ((drop.high >> 1) << 32) | ((drop.low >> 1) & 0xFFFFFFFF)
    group = (first // 4 + tl.arange(0, BK // 4)).to(tl.uint32)[None, :] + tl.zeros((BM, 1), tl.uint32)
    near, far = rows.to(tl.uint32)[:, None] + 0 * group, (rows >> 32).to(tl.uint32)[:, None] + 0 * group
    w0, w1, w2, w3 = tl.philox(seed, group, near, far, 0 * group)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BM, BK))
    return words.to(tl.int64) >= drop.limit


def odd_word(word):
    """A word as an argument: always 64 bits and odd, since Triton compiles anew for a narrow one
    and for a multiple of 16."""
    return 2**33 + 2 * (word & 0xFFFFFFFF) + 1


def dropout_fields(dropout, seed):
    """The `Dropout` of a layer, or None. A seed on the CPU is passed by value: no copy to the
    device."""
    if seed is None or dropout <= 0:
        return None
    number = int(seed) if seed.is_cpu else 0
    low, high = (odd_word(number), odd_word(number >> 32)) if seed.is_cpu else (seed, 0)
    return Dropout(low, high, threshold(dropout), inverse_keep_rate(dropout, seed))
