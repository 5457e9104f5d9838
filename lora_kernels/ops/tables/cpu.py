"""Which product of the CPU runs how many tokens: a row for each instruction set, dtype and, where
its vendor library is known to behave otherwise, processor.

`python -m bench.tune --cpu` times the candidates and writes rows of cpu.json. The processor counts
beside the level, since the library's GEMM does not run alike on all that have one level.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class CpuRow:
    """How many tokens each product is the fastest for. 16-bit products on tiles, where the level
    has them, take the place of all but `small` and `outer`. What no number names is the library's
    float32 GEMM, to which 16-bit weights are widened block by block, and a pass in place."""

    level: str
    dtype: str
    small: int
    """A layer's forward up to so many: the kernel that streams W once, adapter and all."""
    packed_from: int
    packed: int
    """x Wᵀ alone with x packed, from and up to; a forward takes it above `small`."""
    addmm_from: int
    """16 bits: a forward by the library's own GEMM, which adds to the adapter's term, as in
    `lora_linear.library`; it comes before `packed`, but not with a gain: what the GEMM gives would
    be rounded before that, which costs 1.6 times the error of one rounding. NEVER in float32."""
    streamed_from: int
    streamed: int
    """dy W streaming W, from and up to."""
    addmm_back_from: int
    """16 bits: dx by the library's own GEMM, which adds to the adapter's term; it comes before
    `streamed`, but not with a gain: dy ⊙ gain would be rounded, for 1.8 times that error."""
    outer: int
    """dA and dB by passes in float32 vectors; above on tiles, where there are any."""
    thin: int = 0
    """float32: up to so many tokens the library multiplies with A and B, too, forward above `small`
    and backward, where nothing is dropped. Ours begin by packing them. Not in torch's deterministic
    mode, and not where ours are as fast: the library's bits may follow the number of threads."""
    processor: str = ""
    """As `processor()` has it; empty for all others."""
    measured: str = ""
    """Where and how."""
    small_codes: int = 0
    """`small` where W is quantised, if that is more: what streams W reads its codes once, too."""
    small_back: int = 0
    """A layer's backward up to so many tokens: the kernel that streams W once, adapter and all."""


ALL = NEVER = 2**31
"""More tokens than there are."""
FILE = Path(__file__).with_name("cpu.json")


def read(file: Path = FILE) -> tuple[CpuRow, ...]:
    """The rows of a file."""
    return tuple(CpuRow(**row) for row in json.loads(file.read_text(encoding="utf-8")))


def write(rows: Iterable[CpuRow], file: Path = FILE) -> None:
    """A line for each row."""
    file.write_text("[\n " + ",\n ".join(json.dumps(asdict(row)) for row in rows) + "\n]\n", encoding="utf-8")


@cache
def processor() -> str:
    """Maker and family of this processor, "AMD 26" for Zen 5; empty where the system does not
    say."""
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as file:
            head = file.read(2048)  # of the first core: there may be hundreds
    except OSError:
        return ""
    said = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in head.splitlines())}
    maker = {"AuthenticAMD": "AMD", "GenuineIntel": "Intel"}.get(said.get("vendor_id", ""), "")
    return f"{maker} {said.get('cpu family', '')}" if maker else ""


def row_for(
    level: str, dtype: str, on: str | None = None, native: bool = False, rows: Iterable[CpuRow] | None = None
) -> CpuRow:
    """The row of a level and dtype for a processor, this one if not given; else that of all
    others. `native`: where the library multiplies the dtype by instructions that our level lacks,
    rows of "<level> native" come first. A level without rows has those of avx512."""
    on, rows = processor() if on is None else on, read() if rows is None else tuple(rows)
    for name in (f"{level} native",) * native + (level, "avx512"):
        for where in (on, ""):
            for row in rows:
                if (row.level, row.dtype, row.processor) == (name, dtype, where):
                    return row
    raise LookupError(f"no row for {level} and {dtype}")
