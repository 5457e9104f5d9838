"""A simulated device: how the launches inside a block run, and what they count together."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from lora_kernels import _ptxsim

MIB = 2**20


@dataclass
class Device:
    """What the launches so far did, added up."""

    options: dict[str, Any]
    arch: int = 80
    """What Triton compiles for: 80 is sm_80."""
    launches: int = 0
    counters: Counter[str] = field(default_factory=Counter)
    by_opcode: Counter[str] = field(default_factory=Counter)
    trace: bytearray = field(default_factory=bytearray)
    before: list[tuple[str, int, int, bool]] = field(default_factory=list)
    """What an early launch may still meet: name, address, bytes of what the last one touched, and
    whether it writes it."""
    ends: list[int] = field(default_factory=list)
    """Where in `trace` each launch ends."""

    def dram(self, cache: int = 50 * MIB, line: int = 128, apart: bool = False) -> tuple[int, int]:
        """Bytes read from and written to memory behind a second-level cache of `cache` bytes, from
        the trace of all launches in their order; `device(trace=True)` keeps it. 50 MiB is an
        H100's, 40 an A100's.

        The least recently used line of `line` bytes goes. A load reads the sectors of 32 bytes that
        are not there. A store reads nothing and is written once, when its line goes or at the end.

        `apart`: each launch finds the cache empty. Blocks pass in the order in which they ran:
        `shuffle=False` keeps that of their numbers, and `resident` says how many run side by side.

        Raises:
            ValueError: there is no trace, or a line is not a multiple of 32 bytes up to 1024.
        """
        if not self.options.get("trace"):
            raise ValueError("ptxsim: dram() needs device(trace=True)")
        if line % 32 or not 32 <= line <= 1024:
            raise ValueError(f"ptxsim: a line must be a multiple of 32 bytes up to 1024, found {line}")
        ends = self.ends if apart else [len(self.trace)]
        launches = [bytes(self.trace[first:end]) for first, end in zip([0, *ends], ends, strict=False)]
        passed = [_ptxsim.through_cache(one, cache, line) for one in launches]
        return sum(read for read, _ in passed), sum(written for _, written in passed)


current: ContextVar[Device | None] = ContextVar("device", default=None)


@contextmanager
def device(arch: int = 80, **options: Any) -> Iterator[Device]:
    """Collects the counters of every launch inside the block; `options` are defaults of
    `Kernel.launch` there.

    `arch` is what kernels that are compiled inside the block are compiled for: 80 is sm_80.
    """
    made = Device(options, arch)
    token = current.set(made)
    try:
        yield made
    finally:
        current.reset(token)
