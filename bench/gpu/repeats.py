"""The same bits every time, on whatever stream, and in a CUDA graph: each op as dispatch chooses
it, and by each backend."""

from dataclasses import replace
from functools import partial

import torch

from bench.gpu.cases import Case, repeatable_cases
from bench.gpu.determinism import assert_same_bits
from bench.gpu.graphs import check_graph_replay
from bench.gpu.setting import Refused, Setting, StageFindings, any_bit_differs

TIMES, STREAMS = 200, 4


def run_stage(setting: Setting, found: StageFindings) -> None:
    # rows at multiples of 16 bytes, as CUDA C++ and tensor maps want them
    setting = replace(setting, sizes=(5, 40, 24, 4) if setting.dry else (300, 1032, 776, 24))
    with setting.as_dispatched():
        made = repeatable_cases(setting)
    for name in list(made)[:1] if setting.tiny else made:
        found.check(f"again, {name}", partial(run_on_backend, setting, None, partial(check_repeats, setting, made[name])))
        if not setting.dry:
            found.check(f"streams, {name}", partial(run_on_backend, setting, None, partial(check_streams, made[name])))
            found.check(f"graph, {name}", partial(run_on_backend, setting, None, partial(check_graph_replay, made[name])))
        for backend in () if setting.tiny else ("triton", "cuda"):
            found.check(
                f"again, {backend}, {name}",
                partial(run_on_backend, setting, backend, partial(check_repeats, setting, made[name])),
            )
    if setting.dry and found.process[0] == 0:
        found.skip("other streams and CUDA graphs: they need a GPU")


def run_on_backend(setting: Setting, backend: str | None, call) -> None:
    with setting.backend(backend) if backend else setting.as_dispatched():
        try:
            call()
        except NotImplementedError as refusal:
            raise Refused(str(refusal)) from refusal


def check_repeats(setting: Setting, case: Case) -> None:
    assert_same_bits(case, 1 if setting.dry else TIMES, setting.device)


def check_streams(case: Case) -> None:
    """On several streams side by side, which share the GPU in another way each time."""
    first = [t.clone() for t in case()]
    others = [torch.cuda.Stream() for _ in range(STREAMS)]
    torch.cuda.synchronize()
    wrong = []
    for _ in range(TIMES // STREAMS):
        for stream in others:
            with torch.cuda.stream(stream):
                wrong.append(any_bit_differs(first, case()))
    torch.cuda.synchronize()
    count = sum(bool(each) for each in wrong)
    assert not count, f"{count} of {len(wrong)} calls on other streams gave other bits"
