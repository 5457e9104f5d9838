"""Triton: the mask of dropout (ops/dropout.py) inside a kernel, and the arguments that it takes."""

import triton
import triton.language as tl

from lora_kernels.ops.dropout import threshold


@triton.jit
def dropout_mask(low, high, rows, first, limit, BM: tl.constexpr, BK: tl.constexpr):
    """Whether dropout keeps elements `first` and on of these rows, [BM, BK]: ops/dropout.py's
    Philox, a word an element.

    The seed is what `low` points to, or its halves are in `low` and `high` as `dropout_args` packs
    them.
    """
    if low.dtype.is_ptr():
        seed = tl.load(low)
    else:
        seed = ((high >> 1) << 32) | ((low >> 1) & 0xFFFFFFFF)
    group = (first // 4 + tl.arange(0, BK // 4)).to(tl.uint32)[None, :] + tl.zeros((BM, 1), tl.uint32)
    near, far = rows.to(tl.uint32)[:, None] + 0 * group, (rows >> 32).to(tl.uint32)[:, None] + 0 * group
    w0, w1, w2, w3 = tl.philox(seed, group, near, far, 0 * group)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BM, BK))
    return words.to(tl.int64) >= limit


def odd_word(word):
    """A word as an argument: always 64 bits and odd, since Triton compiles anew for a narrow one
    and for a multiple of 16."""
    return 2**33 + 2 * (word & 0xFFFFFFFF) + 1


def dropout_args(drops):
    """The arguments `lows`, `highs`, `limits` of a kernel, for a (dropout, seed) of each layer. A
    seed on the CPU is passed by value: no copy to the device."""
    lows, highs, limits = [], [], []
    for dropout, seed in drops:
        drops_any = seed is not None and dropout > 0
        by_value = drops_any and seed.is_cpu
        number = int(seed) if by_value else 0
        lows.append(odd_word(number) if by_value else seed if drops_any else None)
        highs.append(odd_word(number >> 32) if by_value else None)
        limits.append(threshold(dropout) if drops_any else 0)
    return {"lows": tuple(lows), "highs": tuple(highs), "limits": tuple(limits)}
