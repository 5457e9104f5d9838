"""Chooses which of its kernels a GPU backend runs, and says why. It costs a dictionary look-up when
a shape comes again.

    problem = Problem("forward", m, k, (n,), (r,), x.dtype, gain=gain is not None)
    p = plan(problem, architecture(x), deterministic, multiprocessors(x))
    note(p)                               # for `explain`
    if p.winner == "one pass": ...

What was measured near the shape on that GPU decides (`tables`, filled by `python -m bench.tune`).
Where nothing was, many rows take the library's GEMM, which is that of a layer without an adapter,
since no prediction shows that ours is faster; few rows, whose bytes decide, take the least
predicted time (`cost`). Nothing is timed at a first call.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from lora_kernels.ops import cost, tables
from lora_kernels.ops.chips import Chip, nearest_chip
from lora_kernels.ops.cost import Problem
from lora_kernels.ops.tables import tiles

FIXED = 4096  # the m for which the deterministic mode chooses, whatever m is

_settings: ContextVar[tuple[str | None, str]] = ContextVar("dispatch", default=(None, tables.FOLDER))


@dataclass(frozen=True)
class Candidate:
    """One way to compute a problem, by prediction."""

    name: str
    bytes: int
    """Read and written, each tensor once a launch."""
    launches: int
    seconds: float
    refused: str | None
    """Why it cannot compute this problem; None if it can."""


@dataclass(frozen=True)
class Plan:
    """What is run for a problem, and why."""

    problem: Problem
    candidates: tuple[Candidate, ...]
    winner: str
    why: str
    chip: Chip
    source: str
    """Where the figures are from."""

    def __str__(self) -> str:
        rows = [("candidate", "MiB", "launches", "predicted µs", "")]
        for c in self.candidates:
            verdict = f"won: {self.why}" if c.name == self.winner else f"refuses: {c.refused}" if c.refused else ""
            rows.append((c.name, f"{c.bytes / 2**20:.2f}", str(c.launches), f"{c.seconds * 1e6:.1f}", verdict))
        first, *others = (max(len(row[i]) for row in rows) for i in range(4))
        lines = ["  ".join([row[0].ljust(first), *map(str.rjust, row[1:4], others), row[4]]).rstrip() for row in rows]
        return "\n".join([str(self.problem), self.source, *lines])


def choose_plan(
    problem: Problem, arch: int, deterministic: bool = False, multiprocessors: int | None = None,
    backends: tuple[str, ...] = ("triton",), gpu: str | None = None, refused: tuple[tuple[str, str], ...] = (),
) -> Plan:  # fmt: skip
    """Decides between the candidates of these backends, "triton" and "cuda". `arch` is 90 for
    sm_90; one that is not known is taken for the nearest that is. `gpu` is the name of the one that
    is here, for what was measured on it. `refused`: candidates that cannot take the tensors
    themselves, and why.

    With `deterministic` the choice is that for m = FIXED on the architecture's own chip. So a row's
    bits depend neither on how many rows come with it nor on the size of the chip. Callers pass
    `torch.are_deterministic_algorithms_enabled()`.

    Raises:
        NotImplementedError: the candidate that `forced_candidate` names refuses.
    """
    here = (None, None) if deterministic else (multiprocessors, gpu)
    return _cached_plan(problem, arch, deterministic, *here, backends, refused, *_settings.get())


@lru_cache(maxsize=4096)
def _cached_plan(
    problem: Problem, arch: int, deterministic: bool, multiprocessors: int | None, gpu: str | None,
    backends: tuple[str, ...], refused: tuple[tuple[str, str], ...], force: str | None, folder: str,
) -> Plan:  # fmt: skip
    on, table = nearest_chip(arch, multiprocessors), tables.table_for(arch, folder)
    asked = problem._replace(m=FIXED) if deterministic else problem
    shares, also = table.efficiencies(asked.is_half, asked.m), dict(refused)
    candidates = tuple(
        Candidate(
            name, sum(step.bytes_moved for step in steps), len(steps), cost.seconds(name, steps, asked, on, shares),
            cost.refusal(name, asked, arch, deterministic) or also.get(name),
        )
        for name, steps in cost.candidate_launches(asked, arch).items()
        if any(backend in backends for backend in cost.OFFERED.get(name, ("triton",)))
    )  # fmt: skip
    if force in (*cost.NAMES[problem.direction], cost.CODES):
        # for the rows that there are, in the deterministic mode, too
        reason = cost.refusal(force, problem, arch, deterministic) or also.get(force)
        if force not in [candidate.name for candidate in candidates]:
            reason = reason or f"its backend refuses, or {' and '.join(backends)} alone was asked"
        if reason:
            raise NotImplementedError(f"lora_linear {problem.direction} cannot run as {force}: {reason}")
        winner, why = force, "forced"
    else:
        winner, why = _winner_and_reason(asked, candidates, table, tables.user_choices(gpu) if gpu else ())
    return Plan(problem, candidates, winner, why, on, _provenance(asked, arch, on, table, deterministic))


def _winner_and_reason(
    p: Problem, candidates: tuple[Candidate, ...], table: tables.Table, local: tuple[tables.Choice, ...]
) -> tuple[str, str]:
    able = {c.name: c for c in candidates if c.refused is None}
    if len(able) == 1:
        return next(iter(able)), "the others refuse"
    # the package's tables are of plain layers; with a gain a forward does as much more in one form
    # as in the other
    plain = p.flags if p.direction == "backward" else tuple(flag for flag in p.flags if flag != "gain")
    for where, choices, flags in (("measured here", local, p.flags), ("measured", table.choices, plain)):
        for near in tables.nearest_choice(choices, p.direction, str(p.dtype)[6:], p[1:5], flags):
            taken = {name: seconds for name, seconds in near.seconds.items() if name in able}
            # its own backend refused, or was not asked
            if near.winner in able or (taken and cost.OFFERED.get(near.winner) == ("cuda",)):
                times = ", ".join(f"{name} {seconds * 1e6:.1f} µs" for name, seconds in near.seconds.items())
                at = f"m {near.m}, k {near.k}, n {' + '.join(map(str, near.n))}, r {' + '.join(map(str, near.r))}"
                winner = near.winner if near.winner in able else min(taken, key=taken.__getitem__)
                return winner, f"{where} at {at}: {times}"
    able = {name: c for name, c in able.items() if name not in cost.UNTRIED}
    if p.m > cost.MEMORY_BOUND_ROWS and cost.LIBRARY in able and not table.has_measured(str(p.dtype)[6:]):
        return cost.LIBRARY, "many rows, and nothing was measured on such a GPU: the library's GEMM"
    # where it is even, the launch decides, which costs the host less than one of Triton's
    return min(able.values(), key=lambda c: c.seconds * (0.98 if c.name == cost.CUDA else 1)).name, "least predicted time"


def _provenance(p: Problem, arch: int, on: Chip, table: tables.Table, deterministic: bool) -> str:
    near = "" if arch == on.arch else f", the nearest to sm_{arch} that is known"
    measured = table.has_measured(str(p.dtype)[6:])
    stood = f"predicted from efficiencies measured on {table.gpu}" if measured else "predicted, not measured"
    fixed = f"; deterministic: chosen and predicted for m {FIXED}, whatever m is" if deterministic else ""
    return f"sm_{on.arch} ({on.name}, {on.multiprocessors} multiprocessors{near}): {stood}{fixed}"


@contextmanager
def forced_candidate(name: str) -> Iterator[None]:
    """Inside it every plan whose direction has a candidate of that name takes it, or raises with
    its refusal.

    Like `use_backend` it holds for this thread and, from torch 2.13 on, for those in which autograd
    runs a backward that is called here; before, only with
    `torch.autograd.set_multithreading_enabled(False)`.

    Raises:
        ValueError: no candidate has that name.
    """
    known = dict.fromkeys((*cost.NAMES["forward"], *cost.BACKWARD, cost.CODES))
    if name not in known:
        raise ValueError(f"a candidate must be one of {', '.join(known)}, found {name!r}")
    with _with_settings(name, _settings.get()[1]):
        yield


def forcing() -> str | None:
    """What `forced_candidate` names here, if it does."""
    return _settings.get()[0]


@contextmanager
def tables_from(folder: str | Path) -> Iterator[None]:
    """Inside it the tables of a folder hold, e.g. those that `python -m bench.tune --out folder`
    wrote."""
    with _with_settings(_settings.get()[0], str(folder)):
        yield


@contextmanager
def _with_settings(name: str | None, folder: str) -> Iterator[None]:
    token = _settings.set((name, folder))
    try:
        yield
    finally:
        _settings.reset(token)


def clear_caches() -> None:
    """Drops what was decided and read: tables on the disk have changed."""
    _cached_plan.cache_clear()
    tables.user_table.cache_clear()
    tables.table_for.cache_clear()
    tiles.forget()
