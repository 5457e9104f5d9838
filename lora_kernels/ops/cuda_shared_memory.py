"""Dynamic shared memory of CUDA C++ kernels in bytes, by their tiles; x, dy and W have 16 bits."""

from lora_kernels.ops.tables.tiles import Tile

WIDTH = 128  # bytes of a row of a tile in shared memory, 64 numbers, as in the sources


def shared_of_small(t: Tile) -> int:
    """In each stage rows of W, of `WIDTH` bytes, and as many columns of x."""
    return t.stages * (t.rows * WIDTH + t.columns * t.depth * 2)


def shared_of_codes(t: Tile) -> int:
    """In each stage rows of W, two numbers a byte, as many columns of x, and two words for each 32
    numbers of W: its scale, and where that is a code the scale of its block."""
    return t.stages * (t.rows * t.depth // 2 + t.columns * t.depth * 2 + t.rows * t.depth // 32 * 8)


def shared_of_gemm(t: Tile) -> int:
    """In each stage rows of one matrix and of the other."""
    return t.stages * (t.rows + t.columns) * t.depth * 2


def shared_of_dx_small(t: Tile) -> int:
    """In each stage a step's rows of W, of int8, and of dy; and dy once more, as two parts."""
    return (t.stages * (t.depth + t.rows) + 2 * t.rows) * WIDTH


def shared_of_shrink(t: Tile, split: bool) -> int:
    """In each stage rows of x and ranks of A, of which there is a second part where it is split."""
    return t.stages * (t.rows + (1 + split) * t.ranks) * WIDTH


def shared_of_specialised(t: Tile) -> int:
    """In each stage rows of both matrices; four boxes of 64 rows of y; and 64 bytes of barriers."""
    return t.stages * (t.rows + t.columns) * WIDTH + 4 * 64 * WIDTH + 64


def shared_of_expand(t: Tile) -> int:
    """Tiles of h and b, as two parts each, and the float32 sums of a tile, whose rows are eight
    numbers apart."""
    return (t.columns + t.rows) * WIDTH + t.rows * (t.columns + 8) * 4


def shared_of_sides(t: Tile) -> int:
    """Four tiles of u, or two of u and two of y, two of h; v of all columns, as two parts."""
    return (4 + 2) * t.rows * WIDTH + 2 * t.columns * t.ranks * 2


def shared_of_outer(t: Tile) -> int:
    """In each stage a tile of u for each 64 columns; and two of p."""
    return (t.stages * t.columns // 64 + 2) * t.rows * WIDTH


def shared_of_update(t: Tile, ranks: int) -> int:
    """Of csrc/common/update.cuh: in each stage rows of W and ranks of A."""
    return t.stages * (t.rows + ranks) * WIDTH


def shared_of_update_any(t: Tile) -> int:
    """Of csrc/common/update_any.cuh: in each stage A, of two times 64 columns, and B, as two
    parts."""
    return t.stages * (4 * t.ranks + t.rows) * WIDTH
