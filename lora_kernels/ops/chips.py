"""What the cost model knows of GPUs: one of each architecture, from its vendor's figures."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import lru_cache


@dataclass(frozen=True)
class Chip:
    """Peaks, which no kernel reaches; the tables have the share that one does."""

    arch: int
    """90 is sm_90."""
    name: str
    multiprocessors: int
    dram: float
    """Bytes a second."""
    l2: int
    """Bytes."""
    l2_rate: float
    """Bytes a second."""
    half: float
    """Of 16-bit tensor cores with float32 sums and dense operands: operations a second, a product
    and a sum being two."""
    tf32: float
    fp32: float
    launch: float = 2.5e-6
    """Seconds from the end of one kernel to the start of the next, in one stream."""


# Sources, of NVIDIA: the data sheets "A100 80GB SXM", "A10", "L40S", "H100 SXM" and "HGX B200" (an
# eighth of it), the white papers "NVIDIA A100", "Ada GPU Architecture", "H100 Tensor Core GPU" and
# "RTX Blackwell GPU Architecture" (multiprocessors, L2; the RTX 5090's rates). Nobody publishes
# l2_rate, nor L2 and multiprocessors of the B200: those and `launch` are estimates.
CHIPS = {
    chip.arch: chip
    for chip in (
        Chip(80, "A100", 108, 2.039e12, 40 << 20, 4.0e12, 312e12, 156e12, 19.5e12),
        Chip(86, "A10", 72, 0.600e12, 6 << 20, 1.8e12, 125e12, 62.5e12, 31.2e12),
        Chip(89, "L40S", 142, 0.864e12, 96 << 20, 4.0e12, 362e12, 183e12, 91.6e12),
        Chip(90, "H100", 132, 3.35e12, 50 << 20, 5.5e12, 989e12, 494e12, 66.9e12),
        Chip(100, "B200", 148, 8.0e12, 126 << 20, 10e12, 2250e12, 1125e12, 75e12),
        Chip(120, "RTX 5090", 170, 1.792e12, 96 << 20, 6.0e12, 209.5e12, 104.8e12, 104.8e12),
    )
}


def nearest_architecture(arch: int, known: Collection[int]) -> int:
    """Of the known architectures one of the same major version, if there is one, and then the
    nearest number."""
    return min(sorted(known), key=lambda other: (other // 10 != arch // 10, abs(other - arch)))


@lru_cache
def nearest_chip(arch: int, multiprocessors: int | None = None) -> Chip:
    """The known chip that is nearest to this one. What grows with multiprocessors is scaled to
    theirs; memory is not."""
    known = CHIPS[nearest_architecture(arch, CHIPS)]
    if not multiprocessors or multiprocessors == known.multiprocessors:
        return known
    part = multiprocessors / known.multiprocessors
    scaled = {name: part * getattr(known, name) for name in ("l2_rate", "half", "tf32", "fp32")}
    return replace(known, multiprocessors=multiprocessors, **scaled)
