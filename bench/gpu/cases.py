"""Each op once, forward and backward, as a call that gives all its results: for the stages that
repeat, record or watch it."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from bench.gpu.setting import Setting
from lora_kernels import dora_linear, lora_linear, merged_weight, nn, weight_norm
from lora_kernels.ops import row_norm_squared
from lora_kernels.testing import Problem, make_group, make_problem, run, run_group

Case = Callable[[], list[Tensor]]
FLAGS = {
    "lora": {}, "bias": {"bias": True}, "dora, bias": {"gain": True, "bias": True}, "dropout": {"dropout": 0.3},
    "dora, dropout, bias": {"gain": True, "bias": True, "dropout": 0.3},
    "dora, lora_only": {"gain": True, "dropout": 0.3, "dropout_semantics": "lora_only"},
}  # fmt: skip


def problem_sizes(setting: Setting) -> tuple[int, int, int, int]:
    """Tokens, in, out, rank: more than one tile of each on a GPU, and no multiple of one."""
    return setting.sizes or ((5, 33, 20, 3) if setting.dry else (300, 1030, 777, 24))


def make_sized_problem(setting: Setting, dtype: torch.dtype = torch.bfloat16, **flags) -> Problem:
    return make_problem(*problem_sizes(setting), dtype, device=setting.device, **flags)


def repeatable_cases(setting: Setting) -> dict[str, Case]:
    """By name. Every call of one computes the same; gradients are its results, too."""
    made: dict[str, Case] = {}
    kinds = [torch.bfloat16] if setting.tiny else [torch.bfloat16, torch.float32]
    for dtype in kinds:
        for name in ["dora, bias"] if setting.tiny else FLAGS:
            if setting.dry and dtype is torch.float32 and name != "dora, bias":
                continue  # each is a kernel to compile and to simulate
            p = make_sized_problem(setting, dtype, **FLAGS[name])
            made[f"lora_linear {name} {str(dtype)[6:]}"] = _lora_linear_case(p)
    few = replace(p := make_sized_problem(setting), x=p.x[:2].clone(), dy=p.dy[:2].clone())
    made["lora_linear, 2 rows"] = _lora_linear_case(few)
    made["lora_linear_group"] = _group_case(setting)
    made["weight_norm"] = _weight_norm_case(setting)
    made["merged_weight"] = _merged_weight_case(setting)
    q = make_sized_problem(setting, gain=True, bias=True)
    made["dora_linear, 2 rows"] = lambda: list(dora_linear(q.x[:2], q.w, q.a, q.b, q.gain, 0.5, q.bias))
    made["nn.DoRALinear"] = _layer_case(setting)
    return made


def _lora_linear_case(p: Problem) -> Case:
    p.require_grad()
    return lambda: list(run(p).values())


def _group_case(setting: Setting) -> Case:
    tokens, n_in, n_out, rank = problem_sizes(setting)
    members = [{"n_out": n_out, "rank": rank}, {"n_out": n_out // 2, "rank": rank, "gain": True, "bias": True}]
    problems = make_group(members, tokens, n_in, torch.bfloat16, device=setting.device)
    return lambda: [t for found in run_group(problems) for t in found.values()]


def _weight_norm_case(setting: Setting) -> Case:
    p = make_sized_problem(setting)
    p.require_grad(("a", "b"))
    dn = torch.linspace(-1, 1, p.w.shape[0], device=setting.device)

    def norm_and_gradients():
        norm = weight_norm(p.w, p.a, p.b, 0.5)
        return [norm.detach(), row_norm_squared(p.w), *torch.autograd.grad(norm, (p.a, p.b), dn)]

    return norm_and_gradients


def _merged_weight_case(setting: Setting) -> Case:
    p = make_sized_problem(setting, gain=True)

    def merge_twice():
        out = p.w.clone()
        return [merged_weight(p.w, p.a, p.b, 0.5, p.gain), merged_weight(out, p.a, p.b, 0.5, p.gain, out=out)]

    return merge_twice


def _layer_case(setting: Setting) -> Case:
    tokens, n_in, n_out, rank = problem_sizes(setting)
    torch.manual_seed(0)
    layer = nn.DoRALinear(n_in, n_out, r=rank, device=setting.device, dtype=torch.bfloat16)
    torch.nn.init.normal_(layer.lora_B, std=0.02)
    trained = [p for p in layer.parameters() if p.requires_grad]
    x = torch.randn(tokens, n_in, device=setting.device, dtype=torch.bfloat16, requires_grad=True)

    def forward_backward():
        y = layer(x)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *trained])]

    return forward_backward


SANITIZED_IN_MINUTES = ("lora_linear dora, dropout, bias bfloat16", "lora_linear, 2 rows", "lora_linear_group")


def run_cases_once(setting: Setting, few: bool = False) -> int:
    """Runs each case once, and forced as each candidate; what compute-sanitizer looks at. `few`:
    those of SANITIZED_IN_MINUTES, as dispatch chooses. The exit status."""
    if few:
        with setting.as_dispatched():
            made = repeatable_cases(setting)
            for name in [name for name in SANITIZED_IN_MINUTES if name in made]:
                print(f"{name}: {len(made[name]())} results", flush=True)
        if not setting.dry:
            torch.cuda.synchronize()
        return 0
    from lora_kernels.ops import dispatch
    from lora_kernels.ops.cost import FORWARD

    with setting.backend(), torch.no_grad():
        for rows in (2, problem_sizes(setting)[0]):
            p = make_sized_problem(setting)
            for name in FORWARD:
                try:
                    with dispatch.forced_candidate(name):
                        lora_linear(p.x[:rows], *p.arguments()[1:])
                except NotImplementedError as refusal:
                    print(f"{name}, {rows} rows: {refusal}")
    with setting.backend():
        for name, case in repeatable_cases(setting).items():
            found = case()
            if not setting.dry:
                torch.cuda.synchronize()
            print(f"{name}: {len(found)} results", flush=True)
    return 0
