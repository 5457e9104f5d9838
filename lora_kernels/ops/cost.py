"""What each way to compute lora_linear moves, computes and, by a roofline, costs on a chip.

Forward, y = gain ⊙ (x Wᵀ + h Bᵀ) + bias with h = s·drop(x) Aᵀ:
    two launches    F1 reads x and A and writes h; F2 reads x, W, h and B and writes y
    one pass        one launch: h is summed beside y in the loop over the depth, anew in every
                    column tile
    codes           of a quantised W, the same from its codes; in the others a launch before makes
                    W of them
    addmm           F1; h Bᵀ is written, and the library's GEMM adds x Wᵀ. With a gain: x Wᵀ, and a
                    pass over y. With a dropped base: F1 writes drop(x), too; drop(x) Wᵀ; a pass
                    that reads it and writes y; the GEMM adds x Wᵀ
    cuda            CUDA C++: up to 64 tokens without dropout one launch that reads x, W or its
                    codes, A and B; else two
    specialised     F1; h is written as pairs of bfloat16; F2 by warp groups with tasks of their
                    own, sm_90a
Backward, with P = s·(dy ⊙ gain) B:
    fused           B1 reads dy, h and B (and y, for the gain's gradient) and writes P and dB; B2
                    reads dy, W, P and A and writes dx; B3 reads x and P and writes dA
    addmm           B1, which writes dy ⊙ gain, too; B3; drop(P A) is written, and the library's
                    GEMM adds (dy ⊙ gain) W. With a dropped base: (dy ⊙ (gain - 1)) W; a pass that
                    adds P A and drops; the GEMM adds dy W. Then the parts' sums
    codes           of a quantised W "fused", B2 from its codes; else a launch before it makes W

A launch takes the longest of: its bytes at the memory's rate, those that the launch before left in
L2 at L2's rate, its operations at the chip's rate in whole waves of tiles, and the stream of one
tile through one multiprocessor. Launches add up.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from lora_kernels.ops.chips import Chip
from lora_kernels.ops.cuda_split_k import part_of_rows
from lora_kernels.ops.tables.tiles import Tile, compiled, tile

LIBRARY, CUDA, SPECIALISED, CODES = "addmm", "cuda", "specialised", "codes"
FORWARD, BACKWARD = ("two launches", "one pass", LIBRARY), ("fused", LIBRARY)
# by which backends; the others by Triton's
OFFERED = {CUDA: ("cuda",), SPECIALISED: ("cuda",), LIBRARY: ("triton", "cuda")}
UNTRIED = (SPECIALISED,)  # taken where they were measured, never by a prediction
MEMORY_BOUND_ROWS = 64  # rows, up to which bytes decide, and the fused kernels move the fewest
ONE_PASS_RANKS = 64  # up to which h fits beside the sums
NAMES = {"forward": (*FORWARD, CUDA, SPECIALISED), "backward": (*BACKWARD, SPECIALISED)}
# integer operations for a word of Philox 4x32-10: ten rounds of two wide products and six others
# make four words
MASK = 20


class Problem(NamedTuple):
    """One call: x [m, k] and, for each layer of a group that shares x, W [n, k] and an adapter of
    rank r."""

    direction: str
    m: int
    k: int
    n: tuple[int, ...]
    r: tuple[int, ...]
    dtype: torch.dtype
    gain: bool = False
    drop_base: bool = False
    dropout: bool = False
    tf32: bool = False
    codes: int = 0
    """Bytes of all parts of a quantised W; 0 where it is plain."""

    @property
    def is_half(self) -> bool:
        return self.dtype.itemsize == 2

    @property
    def flags(self) -> tuple[str, ...]:
        return tuple(name for name in ("gain", "drop_base", "dropout", "tf32", "codes") if getattr(self, name))

    def __str__(self) -> str:
        n, r = (" + ".join(map(str, numbers)) for numbers in (self.n, self.r))
        flags = [f"w of {self.codes / 2**20:.2f} MiB" if flag == "codes" else flag for flag in self.flags]
        return ", ".join([f"{self.direction} m {self.m}, k {self.k}, n {n}, r {r}", str(self.dtype)[6:], *flags])


@dataclass(frozen=True)
class Step:
    """One launch. Bytes count each tensor once, however often tiles read it again."""

    kind: str
    """Whose efficiency it has: "fused", "one_pass", "library", "thin", "mma" or "specialised"."""
    reads: Mapping[str, int]
    writes: Mapping[str, int]
    flops: float
    tile_count: int
    tile: int = 0
    """Bytes that one tile streams through its multiprocessor."""
    again: int = 0
    """Bytes that tiles read again out of L2, where that is more than a GEMM's own (which is in its
    efficiency)."""
    masks: int = 0
    """Elements whose dropout it draws."""

    @property
    def bytes_moved(self) -> int:
        return sum(self.reads.values()) + sum(self.writes.values())


def candidate_launches(p: Problem, arch: int = 80) -> dict[str, list[Step]]:
    """The launches of each candidate, with the tiles of an architecture.

    Raises:
        ValueError: the direction is neither "forward" nor "backward".
    """
    if p.direction not in NAMES:
        raise ValueError(f"dispatch: direction must be forward or backward, found {p.direction!r}")
    made = _forward(p, arch) if p.direction == "forward" else _backward(p, arch)
    return _of_codes(p, made) if p.codes else made


def _of_codes(p: Problem, made: dict[str, list[Step]]) -> dict[str, list[Step]]:
    """The candidates of a quantised W: each with a launch that makes W for it, and those that read
    the codes themselves."""
    whole = _operand_bytes(p)[1]
    slab = Step("thin", {"codes": p.codes}, {"w": whole}, 0.0, _ceil_div(p.k * sum(p.n), tile("dequantise", 80).columns))
    found = {}
    for name, steps in made.items():
        if name == CUDA and len(steps) == 1:  # it reads them
            found[name] = [_reads_codes(steps[0], p.codes)]
            continue
        first = next(i for i, step in enumerate(steps) if "w" in step.reads)
        found[name] = [*steps[:first], slab, *steps[first:]]
    fused = made["one pass" if p.direction == "forward" else "fused"]
    found[CODES] = [_reads_codes(step, p.codes) if "w" in step.reads else step for step in fused]
    return found


def _reads_codes(step: Step, size: int) -> Step:
    return replace(step, reads={name: each for name, each in step.reads.items() if name != "w"} | {"codes": size})


def _forward(p: Problem, arch: int) -> dict[str, list[Step]]:
    m, k, size = p.m, p.k, p.dtype.itemsize
    x, w, a, b, h, y = _operand_bytes(p)
    t = tile(
        "forward", arch, dtype=p.dtype, m=m, k=k, n=sum(p.n), layers=len(p.n), two_sums=p.drop_base, one_pass=False,
        mapped=False,
    )  # fmt: skip
    bm, bn = t.rows, t.columns
    columns = sum(_ceil_div(n, bn) for n in p.n)
    tile_count = _ceil_div(m, bm) * columns
    base, up = 2.0 * m * k * sum(p.n), 2.0 * m * sum(n * r for n, r in zip(p.n, p.r, strict=True))
    shared = 1 if m > 64 or p.drop_base else split_k_count(tile_count, k)
    last = up * shared  # by the last program of a tile alone
    streamed = k * (min(bm, m) + bn) * size // shared
    drawn = m * k if p.dropout else 0
    thin = tile(
        "shrink", arch, dtype=p.dtype, m=m, k=k, r=max(p.r, default=0), layers=len(p.n), drawing=p.dropout, keeps=False
    )  # fmt: skip
    # each block of ranks draws the dropout anew
    ranks, blocks = sum(p.r), _ceil_div(sum(p.r), thin.ranks)
    shrink = Step(
        "thin", {"x": x, "a": a}, {"h": h}, 2.0 * m * k * ranks, _ceil_div(m, thin.rows) * blocks,
        k * (min(thin.rows, m) + min(thin.ranks, ranks)) * size, masks=drawn * blocks,
    )  # fmt: skip
    fused = Step(
        "fused", {"x": x, "w": w, "h": h, "b": b}, {"y": y}, base * (1 + p.drop_base) + last, tile_count * shared, streamed,
        masks=m * k * columns if p.drop_base else 0,
    )  # fmt: skip
    per_tile = sum(_ceil_div(n, bn) * max(16, r) for n, r in zip(p.n, p.r, strict=True))
    single = Step(
        "one_pass", {"x": x, "w": w, "a": a, "b": b}, {"y": y}, base + 2.0 * m * k * per_tile + last, tile_count * shared,
        streamed + k * max(p.r, default=0) * size // shared, again=_ceil_div(m, bm) * per_tile * k * size,
        masks=drawn * columns,
    )  # fmt: skip
    cuda = [shrink, replace(fused, kind="mma")]
    if m <= MEMORY_BOUND_ROWS and not p.dropout:
        rows = columns * shared + blocks  # of blocks, which have 64 rows of W or of A
        flops = base + up + 2.0 * m * k * ranks
        cuda = [Step("mma", {"x": x, "w": w, "a": a, "b": b}, {"y": y, "h": h}, flops, rows, streamed)]
    made = {"two launches": [shrink, fused], "one pass": [single], LIBRARY: _forward_by_library(p, shrink, up), CUDA: cuda}
    return made | {SPECIALISED: [shrink, *_specialised(p, {"x": x, "w": w, "b": b}, {"y": y}, k, p.n, base + 2 * up)]}


def _specialised(
    p: Problem, reads: dict[str, int], writes: dict[str, int], depth: int, columns: tuple[int, ...], flops: float
) -> list[Step]:
    """h, or P, as pairs of bfloat16, in pieces of so many ranks; and the GEMM."""
    t = compiled("lora_linear_specialised.cu")
    numbers = p.m * sum(t.ranks * _ceil_div(r, t.ranks) for r in p.r)
    pairs, h = {"pairs": 4 * numbers}, {"h": 4 * p.m * sum(p.r)}
    tile_count = _ceil_div(p.m, t.rows) * sum(_ceil_div(n, t.columns) for n in columns)
    return [
        Step("thin", h, pairs, 0.0, _ceil_div(numbers, compiled("lora_linear_pairs.cu").columns)),
        Step("specialised", {**reads, **pairs}, writes, flops, tile_count, depth * (t.rows + t.columns) * p.dtype.itemsize),
    ]


def gemm_step(p: Problem) -> Step:
    """The library's GEMM alone: x Wᵀ, or back dy W."""
    x, w, _, _, _, y = _operand_bytes(p)
    (bm, bn), flops = (64, 64) if p.m <= 64 or not p.is_half else (128, 128), 2.0 * p.m * p.k * sum(p.n)
    if p.direction == "forward":
        return Step("library", {"x": x, "w": w}, {"y": y}, flops, _ceil_div(p.m, bm) * sum(_ceil_div(n, bn) for n in p.n))
    return Step("library", {"dy": y, "w": w}, {"dx": x}, flops, _ceil_div(p.m, bm) * _ceil_div(p.k, bn))


def _forward_by_library(p: Problem, shrink: Step, up: float) -> list[Step]:
    x, w, _, b, h, y = _operand_bytes(p)
    base = gemm_step(p)
    add = replace(base, reads={**base.reads, "y": y})
    expand = Step("thin", {"h": h, "b": b}, {"y": y}, up, base.tile_count)
    if p.drop_base:
        dropped = {"dropped": len(p.n) * x}
        of_dropped = replace(base, reads={**dropped, "w": w}, writes={"z": y})
        return [
            replace(shrink, writes={**shrink.writes, **dropped}), of_dropped,
            replace(expand, reads={**expand.reads, "z": y}), add,
        ]  # fmt: skip
    if p.gain:
        return [shrink, base, replace(expand, reads={**expand.reads, "y": y})]
    return [shrink, expand, add]


def split_k_count(tile_count: int, k: int) -> int:
    """How many programs share the depth of a tile, where there are too few tiles for the
    multiprocessors of a GPU."""
    return max(1, min(8, 128 // max(1, tile_count), k // 256))


def tile_order(panel: int, column: int, tile: int, across: int, l2: int) -> tuple[int, int]:
    """(GROUP, SLAB), the order of a GEMM's tiles that lets L2 save most: GROUP rows of them take
    their turns side by side, in slabs of SLAB columns of them, 0 for all. In bytes: `panel` is what
    a row of tiles reads beside W, `column` what a column of them reads of W, `tile` what one
    writes; `across` is how many columns there are.

    Either the part of W of a slab stays in L2 while all rows pass: then each panel is read once a
    slab. Or GROUP panels stay while W passes: then W is read once for each such group. What is
    written, and what the programs that run read ahead, pass through L2, too: so only a part of it
    counts, 0.8 and 0.5. The numbers are from an LRU model of 132 programs.
    """
    few, most = 4, int(0.5 * l2 / panel) // 4 * 4
    fit = int((0.8 * l2 - few * panel) / (column + few * tile))
    slabs = _ceil_div(across, fit) if fit > 0 else across + 1
    # of many rows, each reads its panel once a slab, or once and its share of a pass of W
    if slabs == 1:
        return few, 0
    if slabs * panel <= panel + across * column / max(most, few):
        return few, _ceil_div(across, slabs)
    return min(max(most, few), 64), 0


def _backward(p: Problem, arch: int) -> dict[str, list[Step]]:
    m, k, size = p.m, p.k, p.dtype.itemsize
    x, w, a, b, h, dy = _operand_bytes(p)
    depth, ranks, most = sum(p.n), sum(p.r), max(p.r, default=0)
    asked = {"dtype": p.dtype, "m": m, "layers": len(p.n)}
    t = tile("input_gradient", arch, **asked, k=k, n=depth, gains=p.gain, two_sums=p.drop_base)
    of_dy = tile("both_sides", arch, **asked, n=depth, r=most, heavy=p.gain)
    of_x = tile("outer", arch, **asked, n=k, r=most, drawing=p.dropout)
    bm, bk = t.rows, t.columns
    tile_count = _ceil_div(m, bm) * _ceil_div(k, bk)
    base, up = 2.0 * m * k * depth, 2.0 * m * sum(n * r for n, r in zip(p.n, p.r, strict=True))
    down, drawn = 2.0 * m * k * ranks, m * k if p.dropout else 0
    y = {"y": dy} if p.gain else {}
    tiles_of_dy, streamed, _ = _parts(m, depth, ranks, of_dy)
    b1 = Step("thin", {"dy": dy, "h": h, "b": b, **y}, {"p": h, "db": b}, 2 * up, tiles_of_dy, streamed * size)
    b2 = Step(
        "fused", {"dy": dy, "w": w, "p": h, "a": a}, {"dx": x}, base * (1 + p.drop_base) + down, tile_count,
        depth * (min(bm, m) + bk) * size, masks=drawn,
    )  # fmt: skip
    tiles_of_x, streamed, blocks = _parts(m, k, ranks, of_x)
    b3 = Step("thin", {"x": x, "p": h}, {"da": a}, down, tiles_of_x, streamed * size, masks=drawn * blocks)
    scaled = {"scaled": dy} if p.gain else {}
    both = replace(b1, writes={**b1.writes, **scaled})
    product = _specialised(p, {**(scaled or {"dy": dy}), "w": w, "a": a}, {"dx": x}, depth, (k,), base + 2 * down)
    product[1] = replace(product[1], masks=drawn)
    made = {"fused": [b1, b2, b3], LIBRARY: _backward_by_library(p, both, b3)}
    return made | {SPECIALISED: [both, b3, *product, _sums(p)]}


def _sums(p: Problem) -> Step:
    """Of dA's parts."""
    return Step("thin", {"parts": 4 * p.k * sum(p.r)}, {"da": _operand_bytes(p)[2]}, 0.0, 1)


def _backward_by_library(p: Problem, both: Step, b3: Step) -> list[Step]:
    x, w, a, _, h, dy = _operand_bytes(p)
    base = gemm_step(p)
    scaled = {"scaled": dy} if p.gain else {}
    masks = p.m * p.k * len(p.n) if p.dropout else 0
    expand = Step("thin", {"p": h, "a": a}, {"dx": x}, b3.flops, base.tile_count, masks=masks)
    of = {"dy": dy} if p.drop_base else scaled or {"dy": dy}
    between = [expand, replace(base, reads={**of, "w": w, "dx": x})]
    if p.drop_base:
        of_scaled = {"t": len(p.n) * x}
        between[:1] = [
            replace(base, reads={**scaled, "w": w}, writes=of_scaled), replace(expand, reads={**expand.reads, **of_scaled}),
        ]  # fmt: skip
    return [both, b3, *between, _sums(p)]


def seconds(name: str, launches: list[Step], p: Problem, chip: Chip, shares: Mapping[str, float]) -> float:
    """The predicted time of one candidate; `shares` are a table's efficiencies."""
    times, before = [], None
    for step in launches:
        times.append(max(rooflines(step, before, p, chip, shares).values()))
        before = step
    total = sum(times) + len(times) * chip.launch
    if name == "two launches" and chip.arch >= 90 and p.m <= 64:
        # programmatic dependent launch: F2 streams W while F1 runs, and waits for h only then; we
        # count half of what could hide
        total -= 0.5 * min(times)
    return total


def rooflines(step: Step, before: Step | None, p: Problem, chip: Chip, shares: Mapping[str, float]) -> dict[str, float]:
    """The seconds that each resource needs for one launch; the longest decides."""
    touched = {**before.reads, **before.writes} if before else {}
    # of a tensor that does not fit beside the others, little is left in L2 by the time that it is
    # read again
    warm = sum(size for name, size in step.reads.items() if name in touched and size <= chip.l2 // 2)
    thin, library = step.kind == "thin", step.kind == "library"
    waves = _ceil_div(step.tile_count, chip.multiprocessors) * chip.multiprocessors / step.tile_count
    if library and step.tile_count < chip.multiprocessors:
        waves = 1.0  # it splits the depth
    peak = chip.half if p.is_half else chip.tf32 if p.tf32 else chip.fp32
    # tiles of a thin matrix are narrow; half the efficiency is a guess
    share = shares["fused"] / 2 if thin else shares[step.kind]
    return {
        "memory": (step.bytes_moved - warm) / (chip.dram * shares["thin" if thin else "stream"]),
        "l2": (warm + step.again) / chip.l2_rate,
        # integer products have half the rate of float32's, and one of those counts two operations
        "compute": waves * (step.flops / (peak * share) + step.masks * MASK / (chip.fp32 / 4)),
        # a multiprocessor alone pulls about two fair shares of L2's rate
        "tile": step.tile * chip.multiprocessors / (2 * chip.l2_rate),
    }


def refusal(name: str, p: Problem, arch: int, deterministic: bool = False) -> str | None:
    """Why a candidate cannot compute this, in words; None if it can."""
    if name == LIBRARY and deterministic:
        return "deterministic: the library chooses its GEMM by the number of rows, and with it the bits of a row"
    if name in ("one pass", CODES):
        if p.drop_base:
            return "the base is dropped, too, which takes two sums of their own"
        if p.direction == "forward" and max(p.r, default=0) > ONE_PASS_RANKS:
            return f"r is {max(p.r)}: above {ONE_PASS_RANKS}, h does not fit beside the sums"
    if name == "one pass":
        if p.m > 256 and arch < 100:
            return f"m is {p.m}: above 256, before sm_100, h in every column tile costs more than a launch"
    elif name == CODES:
        if p.m > MEMORY_BOUND_ROWS:
            return f"m is {p.m}: above {MEMORY_BOUND_ROWS}, codes become numbers once and not in each row of tiles"
    elif name == CUDA:
        if not p.is_half:
            return f"{str(p.dtype)[6:]}: it takes 16 bits"
        if p.drop_base:
            return "the base is dropped, too, and it drops the input of A only"
        if p.k % 8:
            return f"k is {p.k}: it takes multiples of 8"
        if len(p.n) > 1:
            return f"{len(p.n)} layers share x, and it takes one"
        if p.codes and (p.m > MEMORY_BOUND_ROWS or p.dropout):
            return f"m is {p.m}: of codes it takes up to {MEMORY_BOUND_ROWS}, without dropout"
    elif name == SPECIALISED:
        if p.codes:
            return "w is quantised: it reads 16 bits"
        if arch != 90:
            return f"sm_{arch}: its code is for sm_90a"
        if p.m <= MEMORY_BOUND_ROWS:
            return f"m is {p.m}: it takes more than {MEMORY_BOUND_ROWS}"
        if not p.is_half:
            return f"{str(p.dtype)[6:]}: it takes 16 bits"
        if p.drop_base:
            return "the base is dropped, too, and it drops the input of A only"
        if len(p.n) > 1:
            return f"{len(p.n)} layers share x, and it takes one"
        if p.k % 8 or p.n[0] % 8:
            return f"k is {p.k} and n {p.n[0]}: it takes multiples of 8"
    return None


def _operand_bytes(p: Problem) -> tuple[int, int, int, int, int, int]:
    """Bytes of x, W, A, B, h (or P, both float32) and y (or dy) of all the group."""
    size, n, r = p.dtype.itemsize, sum(p.n), sum(p.r)
    b = sum(one * rank for one, rank in zip(p.n, p.r, strict=True))
    return p.m * p.k * size, n * p.k * size, r * p.k * size, b * size, p.m * r * 4, p.m * n * size


def _parts(m: int, across: int, ranks: int, t: Tile) -> tuple[int, int, int]:
    """Of a sum over m rows of a matrix [m, across]: the programs, the numbers that one reads, and
    the blocks of ranks."""
    columns, blocks = _ceil_div(across, t.columns), _ceil_div(ranks, t.ranks)
    rows = part_of_rows(m, columns, t.part)
    return _ceil_div(m, rows) * columns * blocks, min(rows, m) * min(t.columns, across), blocks


def _ceil_div(a: int, b: int) -> int:
    return max(1, -(-a // b))
