"""CUDA graphs and torch.compile: the bits of the eager call, and no memory that grows."""

from functools import partial

import torch

from bench.gpu.cases import FLAGS, make_sized_problem, problem_sizes, repeatable_cases
from bench.gpu.setting import Setting, StageFindings, any_bit_differs, fuse_layer, make_peft_layer
from lora_kernels import lora_linear
from lora_kernels.testing import rms

REPLAYS = 100


def run_stage(setting: Setting, found: StageFindings) -> None:
    with setting.backend():
        if setting.dry:
            found.skip("CUDA graphs: capture needs a GPU")
        else:
            for name in FLAGS:
                p = make_sized_problem(setting, **FLAGS[name])
                found.check(f"graph of a forward, {name}", partial(check_graph_replay, partial(forward, p)))
            for name, case in repeatable_cases(setting).items():
                found.check(f"graph of forward and backward, {name}", partial(check_graph_replay, case))
        for name in ["dora, bias"] if setting.dry else FLAGS:
            found.check(f"torch.compile, {name}", partial(check_compiled_op, setting, FLAGS[name]))
        for use_dora in [False] if setting.tiny else [False, True]:
            found.check(f"torch.compile of the fused layer, dora {use_dora}", partial(check_compiled_layer, setting, use_dora))


def forward(p) -> list[torch.Tensor]:
    with torch.no_grad():
        return [lora_linear(*p.arguments())]


def check_graph_replay(call) -> None:
    """Captures, replays, compares, and replays on to see whether memory grows."""
    eager = [t.clone() for t in call()]
    # torch wants its first calls before a capture on another stream than the default one
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    made = torch.cuda.CUDAGraph()
    with torch.cuda.graph(made):
        results = call()
    for t in results:
        t.detach().zero_()
    made.replay()
    torch.cuda.synchronize()
    assert not any_bit_differs(eager, results).item(), "a replay gives other bits than the eager call"
    held = torch.cuda.memory_stats()["allocated_bytes.all.current"]
    wrong = torch.zeros((), dtype=torch.bool, device="cuda")
    for _ in range(REPLAYS):
        made.replay()
        wrong |= any_bit_differs(eager, results)
    assert not wrong.item(), f"one of {REPLAYS} replays gives other bits"
    del wrong
    grown = torch.cuda.memory_stats()["allocated_bytes.all.current"] - held
    assert grown <= 0, f"{REPLAYS} replays left {grown} more bytes allocated"


def check_compiled_op(setting: Setting, flags: dict) -> None:
    """lora_linear, forward and backward, in one graph without a break."""
    p = make_sized_problem(setting, **flags)
    leaves = list(p.require_grad().values())

    def forward_backward(function):
        y = function(*p.arguments())
        return [y.detach(), *torch.autograd.grad(y, leaves, p.dy)]

    check_compiled_bits(setting, lora_linear, forward_backward)


def check_compiled_layer(setting: Setting, use_dora: bool) -> None:
    """PEFT's layer on our kernels."""
    tokens, n_in, n_out, rank = problem_sizes(setting)
    torch.manual_seed(0)
    layer = fuse_layer(make_peft_layer(n_in, n_out, rank, torch.bfloat16, setting.device, use_dora=use_dora))
    x = torch.randn(tokens, n_in, device=setting.device, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(tokens, n_out, device=setting.device, dtype=torch.bfloat16)
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]

    def forward_backward(module):
        y = module(x)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    check_compiled_bits(setting, layer, forward_backward, near=use_dora)


def check_compiled_bits(setting: Setting, function, call, near: bool = False) -> None:
    """Through torch.compile y and the gradients have the same bits. `near`: but for one rounding to
    bfloat16, because DoRA's m / n is torch's own arithmetic, and inductor divides in another
    way."""
    torch._dynamo.reset()
    # inductor for the CPU would run the C++ compiler for what surrounds the op, minutes of nothing
    # that a GPU does
    how = {"backend": "aot_eager"} if setting.dry else {}
    eager, got = call(function), call(torch.compile(function, fullgraph=True, **how))
    other = exceeds_rounding if near else lambda one, two: bool(any_bit_differs([one], [two]))
    wrong = [i for i, pair in enumerate(zip(eager, got, strict=True)) if other(*pair)]
    assert not wrong, f"of y and the gradients, in that order, these differ: {wrong}"


def exceeds_rounding(eager: torch.Tensor, got: torch.Tensor) -> bool:
    return rms(got.double() - eager.double()) > 2**-8 * rms(eager)
