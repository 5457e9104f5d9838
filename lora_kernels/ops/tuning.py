"""Times the candidates of lora_kernels.ops.dispatch, and then a few tiles of the fastest one, on
the GPU that is here.

`tune` keeps what it finds in the user's cache directory, by the GPU's name and the versions of what
runs on it, where every later process finds it: `explain` then says "measured here". `python -m
bench.tune` writes the package's own tables with it.
"""

import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lora_kernels.ops import cost, dispatch, launch, tables, tile_tuning
from lora_kernels.ops.cost import Problem
from lora_kernels.ops.quantised import QuantisedWeight
from lora_kernels.ops.registry import explain, refusals, use_backend
from lora_kernels.ops.tables.tiles import MeasuredTile, as_row

ROUNDS = 11
# bytes: more than any L2, and long enough to write for the host to be ahead with the launches
FLUSH = 2**30
TOKENS = (1, 16, 64, 512, 4096)
LAYERS = ((4096, 4096), (4096, 14336), (14336, 4096), (4096, 1024))  # in × out: Llama-3-8B

Calls = dict[str, Callable[[], object]]
Times = dict[str, float]


def tune(
    problems: Iterable[Problem], device: torch.device | str = "cuda", seconds: float = 60.0,
    clock: Callable[[Calls], Times] | None = None, refuse: tile_tuning.Refuse | None = None,
) -> list[tables.Choice]:  # fmt: skip
    """Times the candidates of each problem that has several, in their order, then tiles of the
    fastest, until `seconds` have passed. The fastest are kept in the user's cache directory beside
    what is there already. Gives the candidates. Beside the operands of one call it takes a gigabyte
    of the GPU's memory. No tiles in the deterministic mode, which would not take them.

    `refuse` says why a launch is not to be timed; by default what does not compile, fit or spills
    on the GPU.

    Raises:
        RuntimeError: there is no GPU.
    """
    here = torch.empty(0, device=device)
    if not here.is_cuda and clock is None:
        raise RuntimeError(f"tune: it measures on a GPU, and the device is {here.device}")
    until, found = time.monotonic() + seconds, []
    tiles: list[MeasuredTile] = []
    read = clock or median_event_seconds
    try:
        for p in dict.fromkeys(problems):
            if time.monotonic() > until:
                break
            with _enough(p, here):
                made = candidate_calls(p, here.device)
                if len(made) > 1:
                    found.append(measured_choice(p, read(made)))
        refuse = refuse or (tile_tuning.refuse_on(here.device) if here.is_cuda else lambda one: None)
        for one in [] if torch.are_deterministic_algorithms_enabled() else found:
            if time.monotonic() > until:
                break
            with _enough(problem(one), here):
                call = candidate_calls(problem(one), here.device)[one.winner]
                tiles += tile_tuning.tune_tiles(one.winner, call, read, refuse, until)
    finally:  # what was measured before an interruption, too
        if found:
            tables.keep_choices(str(launch.gpu_name(here)), launch.architecture(here), found, [as_row(each) for each in tiles])
            dispatch.clear_caches()
    return found


@contextmanager
def _enough(p: Problem, here: Tensor) -> Iterator[None]:
    """Inside it a problem is left, with a line, where there is too little memory for it."""
    try:
        with torch.cuda.device(here.device) if here.is_cuda else nullcontext():
            yield
    except torch.OutOfMemoryError:
        print(f"tune: there is too little memory for {p}", file=sys.stderr)


def measured_choice(p: Problem, taken: Times) -> tables.Choice:
    """What is written of a problem: its fastest candidate, and the seconds of all."""
    seconds = {name: float(f"{value:.4g}") for name, value in taken.items()}
    winner = min(seconds, key=seconds.__getitem__)
    return tables.Choice(p.direction, str(p.dtype)[6:], p.m, p.k, p.n, p.r, winner, seconds, p.flags)


def problem(c: tables.Choice) -> Problem:
    """That of a choice."""
    return Problem(c.direction, c.m, c.k, c.n, c.r, getattr(torch, c.dtype), **dict.fromkeys(c.flags, True))


def common_problems(dtype: torch.dtype, r: int, layers: Sequence[tuple[int, ...]] = LAYERS) -> list[Problem]:
    """Calls of few and of many tokens of these layers; what decides most comes first."""
    return [
        Problem(direction, m, k, (n,), (r,), dtype)
        for m in sorted(TOKENS, key=lambda m: m <= cost.MEMORY_BOUND_ROWS)
        for k, n in layers
        for direction in (("forward", "backward") if m > cost.MEMORY_BOUND_ROWS else ("forward",))
    ]


def candidate_calls(p: Problem, device: torch.device | str) -> Calls:
    """A call for each candidate of a problem that runs here, each checked once to be what its name
    says."""
    name, args = operands(p, device)
    op = getattr(torch.ops.lora_kernels, name).default
    arch, count = launch.architecture(args[0]), launch.multiprocessors(args[0])
    backends = tuple(backend for backend in ("triton", "cuda") if _backend_accepts(backend, name, args))
    made: Calls = {}
    if backends:
        for candidate in dispatch.choose_plan(p, arch, multiprocessors=count, backends=backends).candidates:
            if candidate.refused is None:
                run = partial(_run_candidate, op, args, candidate.name, backends)
                made[candidate.name] = checked(candidate.name, run)
    return made


def _backend_accepts(backend: str, name: str, args: tuple[Any, ...]) -> bool:
    """Whether a backend can run this; unforced, one refuses what another does better."""
    with use_backend(backend, simulate=args[0].is_cpu):
        return refusals(name, args)[backend] is None


def _run_candidate(op: Any, args: tuple[Any, ...], name: str, backends: tuple[str, ...]) -> object:
    backend = next(each for each in cost.OFFERED.get(name, ("triton",)) if each in backends)
    with use_backend(backend, simulate=args[0].is_cpu), dispatch.forced_candidate(name):
        return op(*args)


def checked(name: str, call: Callable[[], object]) -> Callable[[], object]:
    """The call, that first makes sure that the candidate runs by that name: the times of another
    would be filed under it."""
    sure = False

    def run() -> object:
        nonlocal sure
        if not sure:
            noted = [decision.plan for decision in explain(call).decisions]
            if not noted or noted[-1] is None or noted[-1].winner != name:
                raise RuntimeError(f"tune: {name} was forced, and the backend that ran noted {noted}")
            sure = True
        return call()

    return run


def operands(p: Problem, device: torch.device | str) -> tuple[str, tuple[Any, ...]]:
    """The name of a problem's op, and random arguments for it."""

    def normal(*shape: int, dtype: torch.dtype = p.dtype) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    x, single = normal(p.m, p.k), len(p.n) == 1
    w, a = [normal(n, p.k) for n in p.n], [normal(r, p.k) for r in p.r]
    b = [normal(n, r) for n, r in zip(p.n, p.r, strict=True)]
    seeds = [torch.tensor(i) if p.dropout else None for i in range(len(w))]
    gains = [torch.ones(n, device=device) if p.gain else None for n in p.n]
    rates, scales, none = [0.05 if p.dropout else 0.0] * len(w), [1.0] * len(w), [None] * len(w)
    given: list[Any] = [w, a, b, scales, none, gains, rates, seeds]
    h: Any = [normal(p.m, r, dtype=torch.float32) for r in p.r]
    y: Any = [normal(p.m, n) if p.gain else None for n in p.n]
    z = y if p.drop_base else none
    y = none if p.drop_base else y
    wanted = [True, True, False, p.gain]  # of a member: da, db, dbias, dgain
    dy: Any = [normal(p.m, n) for n in p.n]
    op = f"lora_linear{'' if single else '_group'}_{p.direction}"
    if single:
        given, dy, h, y, z = [each[0] for each in given], dy[0], h[0], y[0], z[0]
    quantised: tuple[Any, ...] = ()
    if p.codes:
        given[0], *rest = _quantised(p, device).fields()
        quantised = (None, *rest)
    if p.direction == "forward":
        return op, (x, *given, p.drop_base, True, p.drop_base, *quantised)
    return op, (*((dy, x) if single else (x, dy)), *given, p.drop_base, h, y, z, [True, *wanted * len(w)], *quantised)


def _quantised(p: Problem, device: torch.device | str) -> QuantisedWeight:
    """4 bits in blocks of 64, or 8 bits with a scale for each row: what is nearer to the bytes of a
    problem's W."""
    numbers = p.n[0] * p.k
    nibbles = p.codes < 0.75 * numbers
    block = 64 if nibbles else max(1, p.k)
    codes = torch.randint(256, (-(-numbers // 2) if nibbles else numbers,), device=device).to(torch.uint8)
    scales = torch.rand(-(-numbers // block), device=device)
    table = torch.linspace(-1, 1, 16, device=device) if nibbles else None
    shape = torch.Size((p.n[0], p.k))
    return QuantisedWeight(codes if nibbles else codes.view(torch.int8), shape, scales, block, p.dtype, table)


def median_event_seconds(calls: Calls) -> Times:
    """The median seconds of each call on the GPU, by CUDA events, over interleaved rounds with L2
    flushed."""
    flush = torch.empty(FLUSH, dtype=torch.int8, device="cuda")
    shuffled, order = random.Random(0), list(calls)
    marks: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in calls}
    for name in order * 2:
        calls[name]()
    for _ in range(ROUNDS):
        shuffled.shuffle(order)
        for name in order:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            start.record()
            calls[name]()
            end.record()
            marks[name].append((start, end))
        torch.cuda.synchronize()
    return {name: statistics.median(a.elapsed_time(b) for a, b in pairs) / 1e3 for name, pairs in marks.items()}


def describe_choices(found: Sequence[tables.Choice]) -> list[str]:
    """A line for each choice: the shape, the winner, the microseconds of all."""
    lines = []
    for c in found:
        times = ", ".join(f"{name} {1e6 * seconds:.1f}" for name, seconds in sorted(c.seconds.items(), key=lambda one: one[1]))
        lines.append(f"{problem(c)}: {c.winner} (µs: {times})")
    return lines
