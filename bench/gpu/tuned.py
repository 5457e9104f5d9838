"""`bench.tune` on a few shapes, into sm_<arch>.json beside the JSON file of the run: to be looked
at, and then copied into lora_kernels/ops/tables. The file is written anew after each shape."""

from collections.abc import Callable, Iterator
from functools import cache, partial

import torch

from bench import tune
from bench.gpu import speed
from bench.gpu.setting import Refused, Setting, StageFindings
from lora_kernels import explain, use_backend
from lora_kernels.ops import dispatch, launch
from lora_kernels.ops.chips import nearest_chip
from lora_kernels.ops.cost import Problem
from lora_kernels.testing import make_problem, run

Times = dict[str, float]


def problems_to_measure(setting: Setting) -> Iterator[Problem]:
    """What is worth most first."""
    if setting.dry:
        yield from (Problem(direction, 130, 136, (72,), (16,), torch.bfloat16) for direction in ("forward", "backward"))
        return
    for m, k, n in ((8192, 4096, 4096), (16, 4096, 4096), (1024, 4096, 4096), (64, 4096, 4096), (8192, 4096, 14336),
                    (8192, 14336, 4096), (8192, 4096, 1024), (256, 4096, 4096), (1, 4096, 4096)):  # fmt: skip
        for direction in ("forward", "backward"):
            yield Problem(direction, m, k, (n,), (16,), torch.bfloat16)


def run_stage(setting: Setting, found: StageFindings) -> None:
    measured: dict[Problem, Times] = {}
    for p in problems_to_measure(setting):
        found.check(str(p), partial(measure_problem, setting, found, p, measured))


def fill_caches(setting: Setting, found: StageFindings) -> None:
    for p in problems_to_measure(setting):
        found.check(str(p), lambda p=p: speed.run_untimed(candidate_calls(setting, p)))


def measure_problem(setting: Setting, found: StageFindings, p: Problem, measured: dict[Problem, Times]) -> None:
    made = candidate_calls(setting, p)
    if setting.dry:
        speed.run_untimed(made)
        return
    measured[p] = tune.median_event_seconds(made)
    found.add_measurement({"op": "tune", "what": str(p), "seconds": measured[p]})
    if found.record is not None:
        write_table(measured, able_backends(), found.record.path.parent)


def write_table(measured: dict[Problem, Times], able: tuple[str, ...], folder) -> None:
    """The table of what was measured so far, by `tune.write_measured_table`, whose clock gives
    it."""
    here = torch.empty(0, device="cuda")
    arch, stamp = launch.architecture(here), tune.circumstances()

    def measured_calls(p: Problem) -> tune.Calls:
        return {name: partial(measured[p].__getitem__, name) for name in measured[p]}

    def measured_seconds(asked: tune.Calls) -> Times:
        return {name: float(call()) for name, call in asked.items()}  # type: ignore[arg-type]

    tune.write_measured_table(
        nearest_chip(arch, launch.multiprocessors(here)),
        arch,
        measured,
        measured_calls,
        measured_seconds,
        folder,
        stamp["gpu"],
        stamp,
        able,
    )


@cache
def able_backends() -> tuple[str, ...]:
    """Those that run a layer on this GPU."""
    found = []
    for name in ("triton", "cuda"):
        try:
            with use_backend(name), torch.autograd.set_multithreading_enabled(False):
                explain(run, make_problem(16, 64, 64, 16, torch.bfloat16, device="cuda"))
            found.append(name)
        except NotImplementedError as refusal:
            print(f"    {name} is left out: {refusal}", flush=True)
    return tuple(found)


def candidate_calls(setting: Setting, p: Problem) -> dict[str, Callable[[], object]]:
    """Those candidates of a problem that can run it, and the library's product alone."""
    if setting.dry:
        with setting.backend():
            planned = dispatch.choose_plan(p, setting.arch)
    else:
        here = torch.empty(0, device="cuda")
        planned = dispatch.choose_plan(
            p, launch.architecture(here), multiprocessors=launch.multiprocessors(here), backends=able_backends()
        )
    able = [each.name for each in planned.candidates if each.refused is None]
    if not able:
        raise Refused("none of our backends runs on this GPU")
    made = tune.on_device(setting.device)(p)
    if setting.dry:  # what on_device forces is no simulation
        return {tune.BASE: made[tune.BASE]}
    return {name: made[name] for name in (*able, tune.BASE)}
