"""Every kernel once or twice at real tile sizes against float64: what a few minutes can show of
correctness.

What dispatch chooses by itself stands first, since that is what users get, and there the reference
is a failure; then each backend by force, each in all that it takes; then each candidate.
`correctness` has many more shapes. The checks are made by several processes: each takes its part of
them, and fills Triton's cache for the others.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch

from bench.gpu import correctness as c
from bench.gpu.many import check_multi_lora
from bench.gpu.setting import Refused, Setting, StageFindings, backends_used, fuse_layer, make_peft_layer
from lora_kernels import lora_linear
from lora_kernels.ops import cost, dispatch
from lora_kernels.testing import (
    Problem,
    assert_group,
    assert_within_rounding,
    exact,
    make_group,
    make_problem,
    run,
    run_group,
)  # fmt: skip

Check = tuple[str, Callable[[], object]]
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
# tokens, in, out: several tiles of each and a part of one, more than two steps of a pipelined loop.
# Rows at multiples of 16 bytes, as tensor maps and CUDA C++ want them, and others
ALIGNED_SIZES, UNALIGNED_SIZES = (300, 1032, 520), (300, 1030, 520)
DRY_RUN_SIZES = (130, 264, 136)  # most of a dry run, which has fewer checks, too
PEFT_FLAGS = {"gain": True, "bias": True, "dropout": 0.05}
FLAGS = {
    "lora": {}, "dropout": {"dropout": 0.05}, "dora": {"gain": True, "bias": True}, "dora, dropout": PEFT_FLAGS,
    "dora, dropout, lora_only": {**PEFT_FLAGS, "dropout_semantics": "lora_only"},
}  # fmt: skip


def run_stage(setting: Setting, found: StageFindings) -> None:
    setting = replace(setting, sizes=(*(DRY_RUN_SIZES if setting.dry else ALIGNED_SIZES), 16))
    for name, call in (
        *dispatched_checks(setting),
        *backend_checks(setting, "triton"),
        *backend_checks(setting, "cuda"),
        *candidate_checks(setting),
    ):
        found.check(name, call)
        if setting.tiny and found.met >= 4:
            break


def on_poisoned_memory(setting: Setting, backend: str | None, call: Callable[[], object]) -> None:
    """The call on a backend, or on what is chosen. Memory that kernels make held NaN; a refusal is
    no failure."""
    c.poison_allocator(setting)
    with setting.backend(backend) if backend else setting.as_dispatched():
        try:
            call()
        except NotImplementedError as refusal:
            raise Refused(str(refusal)) from refusal


def dispatched_checks(setting: Setting) -> Iterator[Check]:
    """What a user's call runs: its values, and that it is not the reference."""
    shape = setting.sizes
    for name, flags in FLAGS.items():
        for dtype, adapters in ((BF16, F32), (BF16, BF16), (F16, F32), (F16, F16)):
            p = partial(make_problem, *shape, dtype, adapters, device=setting.device, **flags)
            kind = f"{str(dtype)[6:]}, {str(adapters)[6:]} adapters"
            if not setting.dry or (dtype, adapters) == (BF16, F32) or name == "dora, dropout":
                yield f"chosen: {name}, {kind}", partial(on_poisoned_memory, setting, None, partial(check_dispatched, p))
    for rows in (1, 16, 64):
        p = partial(make_problem, rows, *shape[1:], BF16, F32, device=setting.device)
        yield f"chosen: {rows} rows, float32 adapters", partial(on_poisoned_memory, setting, None, partial(check_dispatched, p))
    for adapters in (F32, BF16):
        name = f"chosen: a group, {str(adapters)[6:]} adapters"
        yield name, partial(on_poisoned_memory, setting, None, partial(check_dispatched_group, setting, adapters))
    for dora in (False, True):
        yield (
            f"chosen: PEFT's layer, dora {dora}",
            partial(on_poisoned_memory, setting, None, partial(check_peft_layer, setting, dora)),
        )


def check_dispatched(make: Callable[[], Problem]) -> None:
    p = make()
    assert_not_reference(lambda: run(p))
    c.assert_problem(p)


def check_dispatched_group(setting: Setting, adapters: torch.dtype) -> None:
    problems = group_problems(setting, adapters)
    assert_not_reference(lambda: run_group(problems))
    assert_group(problems)


def group_problems(setting: Setting, adapters: torch.dtype, dropout: float = 0.05) -> list[Problem]:
    """Like q, k and v: three layers of one x, one of them narrow, one of another rank with DoRA."""
    tokens, n_in, n_out, rank = setting.sizes or (0, 0, 0, 0)
    of = [{"n_out": n_out, "rank": rank}, {"n_out": n_out // 4, "rank": 64, "gain": True, "bias": True}, {"n_out": n_out // 4}]
    shared = {"adapter_dtype": adapters, "dropout": dropout, "device": setting.device}
    # adapters as training leaves them: beside the library's GEMM those that dominate are rounded
    # once more for each layer
    return [replace(p, b=0.15 * p.b) for p in make_group(of, tokens, n_in, BF16, **shared)]


def check_peft_layer(setting: Setting, dora: bool) -> None:
    """PEFT's default: float32 adapters on a bfloat16 base. Against PEFT's layer in float64, within
    rounding to bfloat16."""
    tokens, n_in, n_out, rank = setting.sizes or (0, 0, 0, 0)
    torch.manual_seed(0)
    stock = make_peft_layer(n_in, n_out, rank, BF16, setting.device, use_dora=dora)
    for each in (stock.lora_A, stock.lora_B, stock.lora_magnitude_vector):
        each.to(F32)
    wide, ours = copy.deepcopy(stock).cpu().double(), fuse_layer(copy.deepcopy(stock))
    x, dy = (torch.randn(tokens, n, device=setting.device, dtype=BF16) for n in (n_in, n_out))
    assert_not_reference(lambda: c.trained(ours, x, dy))
    truth, found = c.trained(wide, x.cpu().double(), dy.cpu().double()), c.trained(ours, x, dy)
    # what y inherits from its rounding, the gradient of the magnitude, a sum over y, inherits from
    # y
    for name in truth:
        assert_within_rounding(found[name].cpu(), truth[name], BF16, 3 if "magnitude" in name else 1.5, name=name)


def assert_not_reference(call: Callable[[], object]) -> None:
    _, slow = backends_used(call)
    assert not slow, "; ".join(slow)


def backend_checks(setting: Setting, backend: str) -> Iterator[Check]:
    """All ops on one backend."""
    for name, make in named_problems(setting):
        yield (
            f"{backend}: lora_linear {name}",
            partial(on_poisoned_memory, setting, backend, partial(check_forward_backward, make)),
        )
    ops: dict[str, Callable[[], object]] = {}
    for adapters in (F32,) if setting.dry and backend == "triton" else (BF16, F32):
        ops[f"group, {str(adapters)[6:]} adapters"] = lambda a=adapters: assert_group(group_problems(setting, a))
    for r in (16,) if setting.dry else (16, 64):
        ops[f"norm, r {r}"], ops[f"merge, r {r}"] = (
            partial(c.check_weight_norm, setting, r, BF16),
            partial(c.check_merged_weight, setting, r, BF16),
        )
    if backend == "triton":
        ops["dora_linear"] = partial(c.check_dora_linear, setting, setting.sizes, BF16)
        ops["several adapters a row"] = partial(check_multi_lora, setting, 33, BF16, True)
    for name, call in ops.items():
        yield f"{backend}: {name}", partial(on_poisoned_memory, setting, backend, call)
    for rows in (5,) if setting.dry else (1, 16, 64, 300):
        # the batch itself is forced onto CUDA C++, and what the pool computes for it is not
        call = partial(check_multi_lora, setting, rows, BF16, False, by_cuda=backend == "cuda")
        on = "triton" if backend == "triton" else None
        yield f"{backend}: many adapters, {rows} rows", partial(on_poisoned_memory, setting, on, call)


def named_problems(setting: Setting) -> Iterator[tuple[str, Callable[[], Problem]]]:
    """By name: flags, ranks, dtypes, few rows."""
    tokens, n_in, n_out, _ = setting.sizes or (0, 0, 0, 0)
    make = partial(make_problem, device=setting.device)
    for name, flags in FLAGS.items():
        for r in (16,) if setting.dry and name not in ("lora", "dora, dropout") else (64, 16):
            at = ALIGNED_SIZES if r == 64 else (tokens, n_in, n_out)
            yield f"{name} {at} r {r} bfloat16", partial(make, *at, r, BF16, **flags)
    for name in ("lora", "dora, dropout"):
        kinds = {"float16": (F16, F16), "float32": (F32, F32), "float32 adapters": (BF16, F32)}
        for kind, (dtype, adapters) in kinds.items():
            if setting.dry and (name == "lora") == (adapters is F32):
                continue
            yield f"{name} r 16 {kind}", partial(make, tokens, n_in, n_out, 16, dtype, adapters, **FLAGS[name])
        odd = (tokens, n_in - 2, n_out) if setting.dry else UNALIGNED_SIZES
        yield f"{name} {odd} r 16 bfloat16", partial(make, *odd, 16, BF16, **FLAGS[name])
    for rows in (16,) if setting.dry else (1, 16, 64):
        yield f"{rows} rows r 16 bfloat16", partial(make, rows, n_in, n_out, 16, BF16, gain=True)


def check_forward_backward(make: Callable[[], Problem]) -> None:
    """Forward and backward; of a backend that has no such backward the forward."""
    p = make()
    try:
        c.assert_problem(p)
    except NotImplementedError as refusal:
        if "backward" not in str(refusal).split(":")[0]:
            raise
        check_forward(p)
        raise Refused(f"the forward is right; {refusal}") from refusal


def check_forward(p: Problem) -> None:
    with torch.no_grad():
        y = lora_linear(*p.arguments()).cpu()
    truth = exact(p).values["y"]
    c.assert_sums(y, truth, "y") if p.x.dtype is F32 else assert_within_rounding(y, truth, p.x.dtype, name="y")


def candidate_checks(setting: Setting) -> Iterator[Check]:
    """Each that dispatch can choose, by force; those of `by` are CUDA C++'s other ones."""
    tokens, n_in, n_out, rank = setting.sizes or (0, 0, 0, 0)
    names = [name for name in dict.fromkeys(cost.NAMES["forward"] + cost.NAMES["backward"]) if name != cost.CUDA]
    for name in names:
        backend = cost.OFFERED.get(name, ("triton",))[0]
        tried = [("lora", tokens)] if backend == "cuda" else [("lora", 16), ("dora, dropout", tokens)]
        for flags in FLAGS:
            for rows in (tokens, 16):
                if setting.dry and (flags, rows) not in tried:
                    continue
                make = partial(make_problem, rows, n_in, n_out, rank, BF16, device=setting.device, **FLAGS[flags])
                call = partial(on_poisoned_memory, setting, backend, partial(check_forced_candidate, name, make))
                yield f"candidate {name}: {flags}, {rows} rows", call


def check_forced_candidate(name: str, make: Callable[[], Problem]) -> None:
    with dispatch.forced_candidate(name):
        check_forward_backward(make)
