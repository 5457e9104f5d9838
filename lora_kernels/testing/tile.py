"""`python -m lora_kernels.testing.tile KERNEL [--arch 90]`: what a row of
lora_kernels/ops/tables/tiles.json does.

For one kernel on one architecture, after an edit of its rows: the tiles, and which row each number
is from; the gates, compiled where the launch is another one than that of tests/gates/table.json;
results in the simulator against float64; and the cost model's prediction. It writes nothing. Ends
with 1 where a gate is broken or a result wrong. `--list` names the kernels.
"""

import argparse
import importlib
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch

from lora_kernels.ops import cost, dispatch, dora_linear, merged_weight, tables, use_backend, weight_norm
from lora_kernels.ops.chips import nearest_chip
from lora_kernels.ops.cost import Problem
from lora_kernels.ops.tables import tiles
from lora_kernels.ptxsim import device
from lora_kernels.testing.check import assert_problem
from lora_kernels.testing.exact import make_problem
from lora_kernels.testing.gates import Configuration, Cuda, Table, Triton, broken, current, differences

GATES = Path("tests/gates")
SIMULATED = (80, 86, 89, 90, 120)
BF16 = torch.bfloat16
# of the kernels of lora_linear the candidate that runs it, and its place among the launches of that
PLACES = {
    "shrink": ("forward", "two launches", 0), "forward": ("forward", "two launches", 1), "expand": ("forward", "addmm", 1),
    "lora_linear_pairs.cu": ("forward", cost.SPECIALISED, 1), "lora_linear_specialised.cu": ("forward", cost.SPECIALISED, 2),
    "both_sides": ("backward", "fused", 0), "input_gradient": ("backward", "fused", 1), "outer": ("backward", "fused", 2),
}  # fmt: skip
SUFFIX = ".cu"
FOR_90A = ("lora_linear_specialised.cu", "lora_linear_pairs.cu")


def rows(kernel: str, arch: int) -> list[str]:
    """The rows that a kernel has on an architecture, in their order."""
    known = tiles.read()[kernel]
    asks = ", ".join(known.asks) or "nothing"
    here = [row for row in known.rows if any(a <= arch <= b for a, b in tiles.ranges(row.conditions.get("arch", "0-")))]
    first = f"{kernel} on sm_{arch} asks for {asks}; each number is that of the first row that has it and holds"
    return [first, *(f"    {row.line()}" for row in here)]


def gates(kernel: str, arch: int) -> tuple[list[str], bool]:
    """What the gates say of each configuration that launches the kernel, and whether all pass."""
    table, lines, passed = Table.read(GATES / "table.json"), [], True
    for one in _configurations(kernel):
        if (place := f"sm_{arch}") not in one.chips:
            continue
        try:
            row, kept = current(one, place, table)
        except FileNotFoundError as error:
            return [f"not asked: {error}"], True
        wrong = broken(row, one.budget(place), place)
        passed = passed and not wrong
        said = [] if kept else differences(table.rows.get((one.name, place)), row)
        how = "as in the table" if kept else "compiled"
        lines.append(f"{'BROKEN' if wrong else 'passes'} ({how}): {one.name}: {_words(one.kernel_on(place))}")
        lines += [f"    {text}" for text in (*wrong, *said)]
    return lines or [f"no configuration of {GATES}/configurations.py launches it on sm_{arch}"], passed


def _configurations(kernel: str) -> list[Configuration]:
    found: list[Configuration] = importlib.import_module(".".join(GATES.parts) + ".configurations").GATES
    return [one for one in found if _is(one.kernel, kernel)]


def _is(kernel: Triton | Cuda, name: str) -> bool:
    if isinstance(kernel, Triton):
        return kernel.function.rpartition(":")[2] == f"{name}_kernel" and kernel.function.startswith("lora_kernels.")
    stem = name.removesuffix(SUFFIX)
    if name == "lora_linear_sums.cu" and kernel.kernel == "lora_linear_zero_gain":
        return True
    of_any = "any" in stem or stem.startswith("lora_linear") or "_any_" not in kernel.kernel
    return name.endswith(SUFFIX) and f"{kernel.kernel}_".startswith(f"{stem}_") and of_any


def _words(kernel: Triton | Cuda) -> str:
    if isinstance(kernel, Cuda):
        return f"{kernel.kernel}, {kernel.threads} threads, {kernel.shared} bytes of shared memory"
    sizes = " ".join(f"{name} {value}" for name, value in kernel.args.items() if name in ("BM", "BN", "BK", "BR"))
    return f"{sizes}, {kernel.warps} warps, {kernel.stages} stages, registers {kernel.registers or 'as ptxas likes'}"


def simulation(kernel: str) -> Callable[[], None]:
    """Calls of the op that launches the kernel, held to float64."""
    if kernel.startswith(("norm", "row_norm", "weight_norm")):
        return _norm
    if kernel.startswith("merge"):
        return _merge
    if kernel == "dora":
        return _dora
    if kernel.startswith("multi"):
        return _multi
    if kernel in FOR_90A:
        return _specialised
    return _expand if kernel.startswith(("expand", "lora_linear_expand")) else _linear


def _linear() -> None:
    with dispatch.forced_candidate("two launches"), dispatch.forced_candidate("fused"):
        for m, r in ((20, 16), (130, 64)):
            assert_problem(make_problem(m, 136, 72, r, BF16, gain=True))
            assert_problem(make_problem(m, 136, 72, r, BF16, dropout=0.2))


def _expand() -> None:
    for r in (16, 64):
        with dispatch.forced_candidate("addmm"):
            assert_problem(make_problem(70, 136, 72, r, BF16, gain=True, dropout=0.2))


def _specialised() -> None:
    with dispatch.forced_candidate(cost.SPECIALISED):
        assert_problem(make_problem(130, 136, 72, 40, BF16, gain=True))


def _factors(n: int, k: int, r: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return tuple(torch.randn(shape).to(BF16) for shape in ((n, k), (r, k), (n, r)))  # type: ignore[return-value]


def _norm() -> None:
    for r in (8, 72):
        w, a, b = _factors(130, 136, r)
        exact = (w.double() + 0.5 * b.double() @ a.double()).norm(dim=1)
        _within(weight_norm(w, a, b, 0.5), exact, 1e-5)


def _merge() -> None:
    for r in (8, 72):
        w, a, b = _factors(130, 136, r)
        _within(merged_weight(w, a, b, 0.5), w.double() + 0.5 * b.double() @ a.double(), 2**-8)


def _dora() -> None:
    (w, a, b), magnitude = _factors(72, 136, 16), torch.rand(72) + 0.5
    x = torch.randn(20, 136).to(BF16)
    whole = w.double() + 0.5 * b.double() @ a.double()
    y, _ = dora_linear(x, w, a, b, magnitude, 0.5)
    _within(y, magnitude / whole.norm(dim=1) * (x.double() @ whole.T), 2**-7)


def _multi() -> None:
    helpers = importlib.import_module("tests.ops.multi")
    from lora_kernels.ops import BatchPlan, multi_lora

    slots, (w, _, _) = helpers.make_slots(136, (72,), (8, 40, 0), BF16, dora=(1,)), _factors(72, 136, 1)
    for tokens in (12, 70):
        x, slot = torch.randn(tokens, 136).to(BF16), torch.arange(tokens)[:, None] % 4 - 1
        plan = BatchPlan.build(helpers.ids_of(slot, slots), 3)
        _within(multi_lora(x, w, slots, plan), helpers.exact(x, w, slots, slot), 2**-7)


def _within(found: torch.Tensor, exact: torch.Tensor, bound: float) -> None:
    error = ((found.double() - exact).norm() / exact.norm()).item()
    if not error <= bound:
        raise AssertionError(f"the relative error is {error:.2e}, and {bound:.2e} is allowed")


def simulated(kernel: str, arch: int) -> tuple[str, bool]:
    """What the simulator says of it."""
    if arch not in SIMULATED:
        return f"not asked: the simulator runs sm_{', '.join(map(str, SIMULATED))}", True
    if kernel in FOR_90A and arch != 90:
        return "not asked: its code is for sm_90a", True
    start, backend = time.monotonic(), "cuda" if kernel.endswith(SUFFIX) else "triton"
    with ExitStack() as inside:
        inside.enter_context(use_backend(backend, simulate=True))
        sim = inside.enter_context(device(arch))
        try:
            simulation(kernel)()
        # a race, an access out of bounds, a wrong number: each is the answer
        except Exception as error:
            return f"WRONG: {type(error).__name__}: {error}"[:1500], False
    return f"right, {sim.launches} launches in {time.monotonic() - start:.0f} s", True


def predicted(kernel: str, arch: int) -> list[str]:
    """The cost model's prediction for two sizes of a layer of Llama-3-8B, and what bounds the
    kernel there."""
    if kernel not in PLACES:
        return ["the cost model has the kernels of lora_linear's candidates alone"]
    (direction, candidate, place), lines = PLACES[kernel], []
    for m in (16, 8192):
        p = Problem(direction, m, 4096, (4096,), (16,), BF16)
        on, shares = nearest_chip(arch), tables.table_for(arch).efficiencies(p.is_half, m)
        steps = cost.candidate_launches(p, arch)
        before = steps[candidate][place - 1] if place else None
        bounds = cost.rooflines(steps[candidate][place], before, p, on, shares)
        times = ", ".join(f"{name} {1e6 * cost.seconds(name, each, p, on, shares):.1f}" for name, each in steps.items())
        of = ", ".join(f"{name} {1e6 * value:.1f}" for name, value in bounds.items())
        lines.append(f"{p}: {kernel} {1e6 * max(bounds.values()):.1f} µs ({of}); candidates {times}")
    return [
        *lines,
        f"on {nearest_chip(arch).name}, {'measured' if tables.table_for(arch).measured else 'predicted, not measured'}",
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lora_kernels.testing.tile", description=__doc__)
    parser.add_argument("kernel", nargs="?", choices=sorted(tiles.read()), metavar="KERNEL")
    parser.add_argument("--arch", type=int, default=90, help="90 is sm_90")
    parser.add_argument("--list", action="store_true", help="the kernels")
    options = parser.parse_args(argv)
    if options.list or options.kernel is None:
        print(*sorted(tiles.read()), sep="\n")
        return 0 if options.list else 2
    print(*rows(options.kernel, options.arch), sep="\n")
    said, passed = gates(options.kernel, options.arch)
    print("gates", *(f"    {line}" for line in said), sep="\n", flush=True)
    verdict, right = simulated(options.kernel, options.arch)
    print(f"simulator\n    {verdict}", flush=True)
    print("cost", *(f"    {line}" for line in predicted(options.kernel, options.arch)), sep="\n")
    if options.kernel.endswith(SUFFIX):
        print("Its tile is compiled in: change csrc, too; tests/ops/test_tiles.py compares both.")
    return int(not (passed and right))


if __name__ == "__main__":
    sys.exit(main())
