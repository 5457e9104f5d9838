"""The corpus: which kernel runs on which numbers, how it is launched, and how each tool judges it.

`judge` gives the verdict on a kernel, planted bug or none:
    finding: the tool names what is wrong
    values: only the numbers are wrong, or not the same bits each time
    counter: right numbers, but more sectors or bank conflicts than the kernel needs
    missed: nothing to see
"""

import importlib.util
import inspect
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lora_kernels.ptxsim import Kernel, device
from lora_kernels.ptxsim.nvcc import compile_ptx
from tests.ptxsim import problems
from tests.ptxsim.problems import Problem

FINDING, VALUES, COUNTER, MISSED = "finding", "values", "counter", "missed"
KERNELS = Path(__file__).parent / "kernels"
TOGETHER = 1.3  # passes of shared memory over their ideal, from which on they are conflicts


@dataclass(frozen=True)
class Case:
    kernel: str
    """Of triton_kernels.py, or kernels/….cu if it ends so."""
    problem: Callable[[], Problem]
    grid: tuple[int, ...]
    constants: dict[str, Any] = field(default_factory=dict)
    warps: int = 4
    sectors: int | None = None
    """Most of 32 bytes that are loaded."""
    conflicts: bool = False
    """Of banks, which Triton makes and no bug."""
    launches: int = 1
    """One after the other on the same scratch memory."""
    entry: str | None = None
    options: tuple[str, ...] = ()
    """For nvcc."""
    numbers: int = 0
    """The seed of the random numbers."""
    arch: int = 80
    """From 90 on a launch may begin before the one before it has ended."""

    @property
    def cuda(self) -> bool:
        return self.kernel.endswith(".cu")

    @property
    def interpreted(self) -> bool:
        """Whether it is for Triton's interpreters, too, which know nothing of what came with
        sm_90."""
        return not self.cuda and self.arch < 90


IDS = [0, 1, 2, -1, 1, 0, 2, 2, -1]
FAR = [700_000, -1, 1, 699_999]  # times 16 * 200 elements is more than 2³¹
HALF = ("-DHALF",)
TILES = {"BM": 32, "BN": 32, "BK": 32}
CASES = {
    "vector_add": Case("vector_add", partial(problems.add, 997), (8,), {"B": 128}, sectors=2 * 125),
    "lora": Case("lora", partial(problems.lora, 50, 72, 80, 13), (2, 3), {**TILES, "R": 16}, sectors=2040),
    "row_norm": Case("row_norm", partial(problems.row_norm, 71, 77), (3,), {"BN": 32, "BK": 32, "R": 16}),
    "dot": Case(
        "dot", partial(problems.dot, 64, 32, 96, torch.float32, 1e-6), (2, 1), {**TILES, "PRECISION": "ieee"},
    ),
    "split_k": Case("split_k", partial(problems.split_k, 64, 64, 128), (2, 2, 2), {"ATOMIC": True, "PARTS": 2, "B": 32}),
    "split_k_ticket": Case(
        "split_k_ticket", partial(problems.ticket, 40, 33, 90, 4, 4), (2, 2, 4), {"PARTS": 4, "B": 32}, launches=2,
    ),
    "gather": Case("gather", partial(problems.gather, IDS, 200, 3), (9,), {"R": 16, "BK": 64}),
    "gather, 2³¹ elements": Case(
        "gather", partial(problems.gather, FAR, 200, 700_001, huge=True), (4,), {"R": 16, "BK": 64},
    ),
    "dropout_rows": Case("dropout_rows", partial(problems.dropped, 5, 203), (1, 5), {"B": 256}),
    "softmax": Case("softmax", partial(problems.softmax, 5, 200), (5,), {"B": 256}),
    "through_memory": Case("through_memory", partial(problems.turned, 1024), (1,), {"B": 1024, "BARRIER": True}),
    "vector_add.cu": Case("vector_add.cu", partial(problems.add, 997), (4,), warps=2, sectors=2 * (125 + 1)),
    "matmul.cu": Case("matmul.cu", partial(problems.multiply, 100, 104, 104, torch.bfloat16, 2**-8), (2, 2)),
    "lora.cu": Case("lora.cu", partial(problems.lora, 100, 104, 104, 13), (2, 2), options=HALF),
    "row_norm.cu": Case("row_norm.cu", partial(problems.row_norm, 71, 77), (18,), sectors=10338),
    "split_k.cu": Case("split_k.cu", partial(problems.split_k, 20, 33, 98), (3, 2, 4), warps=8, entry="split_k"),
    "split_k.cu, ticket": Case(
        "split_k.cu", partial(problems.ticket, 20, 33, 98, 4, 6), (3, 2, 4), warps=8, entry="ticket", launches=2,
    ),
    "gather.cu": Case("gather.cu", partial(problems.gather, [*IDS, 3, 1 << 40, 1], 200, 3), (12,)),
    "gather.cu, 2³¹ elements": Case("gather.cu", partial(problems.gather, FAR, 200, 700_001, huge=True), (4,)),
    "dropout.cu": Case("dropout.cu", partial(problems.dropped, 5, 203), (2, 5), warps=1),
    "lora, sm_90": Case(
        "lora", partial(problems.lora, 64, 64, 192, 16), (1, 1), {"BM": 64, "BN": 64, "BK": 64, "R": 16}, arch=90,
    ),
    "cast_dot, sm_90": Case(
        "cast_dot", partial(problems.cast, 64, 64, 256), (1, 1), {"BM": 64, "BN": 64, "BK": 64, "STAGES": 1}, arch=90,
        conflicts=True,
    ),
    "handed_on, sm_90": Case("handed_on", partial(problems.handed, 500), (4,), {"B": 128}, launches=2, arch=90),
    "wgmma.cu": Case("wgmma.cu", partial(problems.multiply, 100, 72, 200, torch.bfloat16, 2**-8), (2, 2), arch=90),
    "softmax.cu": Case("softmax.cu", partial(problems.softmax, 5, 200), (5,), sectors=77),
}  # fmt: skip


def shaped(name: str, grid: tuple[int, ...], make: Callable[..., Problem], *args: Any, **changed: Any) -> Case:
    """The case on other numbers, whose sectors are not known."""
    return replace(CASES[name], problem=partial(make, *args), grid=grid, sectors=None, **changed)


def tiles(n: int, size: int) -> int:
    return -(-n // size)


def edited(text: str, old: str, new: str) -> str:
    if text.count(old) != 1:
        raise ValueError(f"{old!r} is there {text.count(old)} times, not once")
    return text.replace(old, new)


# Triton and tracebacks read a kernel's source from its file
_folder = tempfile.TemporaryDirectory()


def _written(text: str, ending: str) -> Path:
    path = Path(_folder.name) / f"mutant_{len(list(Path(_folder.name).iterdir()))}{ending}"
    path.write_text(text)
    return path


@cache
def triton_kernel(name: str, old: str | None = None, new: str = "") -> Any:
    """The kernel, with one text in its source exchanged."""
    from tests.ptxsim import triton_kernels

    kernel = getattr(triton_kernels, name)
    if old is None:
        return kernel
    head = "import triton\nimport triton.language as tl\n\n\n"
    path = _written(head + edited(inspect.getsource(kernel.fn), old, new), ".py")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


@cache
def cuda_kernel(
    name: str, options: tuple[str, ...], entry: str | None, old: str | None = None, new: str = "", arch: int = 80
) -> Kernel:
    """The same for kernels/….cu and what it includes of ours."""
    path = KERNELS / name
    if old is not None:
        header = (KERNELS / "ptx.cuh").read_text().replace("#pragma once", "")
        path = _written(edited(path.read_text().replace('#include "ptx.cuh"', header), old, new), ".cu")
    return Kernel(compile_ptx(path, "sm_80" if arch == 80 else f"sm_{arch}a", *options), entry)


@np.errstate(all="ignore")  # an interpreter's overflow shows in its numbers
def judge(case: Case, run: Callable[[Problem, Any], dict[str, int] | None], orders: tuple[Any, ...]) -> tuple[str, str]:
    """The verdict, and what was said. `run` gives counters, if it has any; `orders` of blocks are
    tried one after another."""
    verdict, said, bits = MISSED, "", []
    for order in orders:
        torch.manual_seed(case.numbers)
        problem = case.problem()
        for _ in range(case.launches):
            for t in problem.poisoned:
                t.fill_(float("nan"))
            try:
                counters = run(problem, order)
            except AssertionError as error:  # SimulationError and InterpreterViolation
                return FINDING, str(error)
            if not problem.right():
                verdict, said = VALUES, "wrong numbers"
        bits.append([problem.args[name].clone().view(torch.uint8) for name in problem.wanted])
        if problem.exact and verdict == MISSED and not all(map(torch.equal, bits[0], bits[-1])):
            verdict, said = VALUES, "other bits in another order"
        if counters and verdict == MISSED:
            said = _too_much(case, counters)
            verdict = COUNTER if said else MISSED
    return verdict, said


def _too_much(case: Case, counters: dict[str, int]) -> str:
    if case.sectors is not None and counters["load_sectors"] > case.sectors:
        return f"{counters['load_sectors']} sectors loaded, {case.sectors} are enough"
    passes, ideal = counters["shared_wavefronts"], counters["shared_ideal"]
    return f"{passes} passes of shared memory, ideally {ideal}" if passes > TOGETHER * ideal and not case.conflicts else ""


def by_simulator(case: Case, *edit: str, ptx: Callable[[str], str] | None = None, **options: Any) -> tuple[str, str]:
    """`ptx` changes what Triton made; `options` are those of a launch."""

    seen: list[Problem] = []

    def run(problem: Problem, seed: int) -> dict[str, int]:
        if not seen or seen[0] is not problem:  # the launches on other memory are over
            seen[:] = [problem]
            sim.before = []
        if case.cuda:
            kernel, shared = cuda_kernel(case.kernel, case.options, case.entry, *edit, arch=case.arch), 0
            args = list(problem.args.values())
        else:
            made = compiled(case, problem, *edit)
            kernel, shared = _kernel(ptx(made.ptx) if ptx else made.ptx), made.shared
            args = made.launch_arguments(problem.args, kernel)
        run = kernel.launch(
            case.grid, (case.warps * 32,), args, problem.writes, problem.poisoned, shared, seed=seed, early=True, **options
        )  # fmt: skip
        return run.counters

    with device(case.arch) as sim:
        return judge(case, run, (0, 1, 2))


def compiled(case: Case, problem: Problem, *edit: str) -> Any:
    from lora_kernels.ptxsim.triton_ptx import compile_triton

    return compile_triton(triton_kernel(case.kernel, *edit), problem.args | case.constants, case.arch, case.warps)


@cache
def _kernel(ptx: str) -> Kernel:
    return Kernel(ptx)


def by_mended_interpreter(case: Case, *edit: str) -> tuple[str, str]:
    from lora_kernels.testing.triton_interpreter import interpret

    kernel = triton_kernel(case.kernel, *edit)

    def run(problem: Problem, order: int | None) -> None:
        args = {name: value for name, value in (problem.args | case.constants).items() if name in kernel.arg_names}
        interpret(kernel, case.grid, args, problem.writes, seed=order)

    return judge(case, run, (None, 1))


def by_plain_interpreter(case: Case, *edit: str) -> tuple[str, str]:
    """Triton's own, in a process with TRITON_INTERPRET=1: the loop of its GridExecutor, without its
    copies of all tensors."""
    from triton.runtime import interpreter as stock

    kernel = triton_kernel(case.kernel, *edit)
    function = kernel.rewrite()

    def run(problem: Problem, order: None) -> None:
        args = {name: value for name, value in problem.args.items() if name in kernel.arg_names}
        given = {name: stock._implicit_cvt(value) for name, value in args.items()} | case.constants
        sizes = (*case.grid, 1, 1)[:3]
        scope = stock._patch_lang(kernel.fn)
        try:
            stock.interpreter_builder.set_grid_dim(*sizes)
            for x in range(sizes[0]):
                for y in range(sizes[1]):
                    for z in range(sizes[2]):
                        stock.interpreter_builder.set_grid_idx(x, y, z)
                        function(**given)
        finally:
            scope.restore()

    return judge(case, run, (None,))
