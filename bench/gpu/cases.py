"""Each op once, forward and backward, as a call that gives all its results: for the stages that repeat, record or watch it."""

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


def sizes(setting: Setting) -> tuple[int, int, int, int]:
    """Tokens, in, out, rank: more than one tile of each on a GPU, and no multiple of one."""
    return setting.sizes or ((5, 33, 20, 3) if setting.dry else (300, 1030, 777, 24))


def problem(setting: Setting, dtype: torch.dtype = torch.bfloat16, **flags) -> Problem:
    return make_problem(*sizes(setting), dtype, device=setting.device, **flags)


def cases(setting: Setting) -> dict[str, Case]:
    """By name. Every call of one computes the same; gradients are its results, too."""
    made: dict[str, Case] = {}
    kinds = [torch.bfloat16] if setting.tiny else [torch.bfloat16, torch.float32]
    for dtype in kinds:
        for name in ["dora, bias"] if setting.tiny else FLAGS:
            if setting.dry and dtype is torch.float32 and name != "dora, bias":
                continue  # each is a kernel to compile and to simulate
            p = problem(setting, dtype, **FLAGS[name])
            made[f"lora_linear {name} {str(dtype)[6:]}"] = _single(p)
    few = replace(p := problem(setting), x=p.x[:2].clone(), dy=p.dy[:2].clone())
    made["lora_linear, 2 rows"] = _single(few)
    made["lora_linear_group"] = _group(setting)
    made["weight_norm"] = _norm(setting)
    made["merged_weight"] = _merged(setting)
    q = problem(setting, gain=True, bias=True)
    made["dora_linear, 2 rows"] = lambda: list(dora_linear(q.x[:2], q.w, q.a, q.b, q.gain, 0.5, q.bias))
    made["nn.DoRALinear"] = _layer(setting)
    return made


def _single(p: Problem) -> Case:
    p.require_grad()
    return lambda: list(run(p).values())


def _group(setting: Setting) -> Case:
    tokens, n_in, n_out, rank = sizes(setting)
    members = [{"n_out": n_out, "rank": rank}, {"n_out": n_out // 2, "rank": rank, "gain": True, "bias": True}]
    problems = make_group(members, tokens, n_in, torch.bfloat16, device=setting.device)
    return lambda: [t for found in run_group(problems) for t in found.values()]


def _norm(setting: Setting) -> Case:
    p = problem(setting)
    p.require_grad(("a", "b"))
    dn = torch.linspace(-1, 1, p.w.shape[0], device=setting.device)

    def call():
        norm = weight_norm(p.w, p.a, p.b, 0.5)
        return [norm.detach(), row_norm_squared(p.w), *torch.autograd.grad(norm, (p.a, p.b), dn)]

    return call


def _merged(setting: Setting) -> Case:
    p = problem(setting, gain=True)

    def call():
        out = p.w.clone()
        return [merged_weight(p.w, p.a, p.b, 0.5, p.gain), merged_weight(out, p.a, p.b, 0.5, p.gain, out=out)]

    return call


def _layer(setting: Setting) -> Case:
    tokens, n_in, n_out, rank = sizes(setting)
    torch.manual_seed(0)
    layer = nn.DoRALinear(n_in, n_out, r=rank, device=setting.device, dtype=torch.bfloat16)
    torch.nn.init.normal_(layer.lora_B, std=0.02)
    trained = [p for p in layer.parameters() if p.requires_grad]
    x = torch.randn(tokens, n_in, device=setting.device, dtype=torch.bfloat16, requires_grad=True)

    def call():
        y = layer(x)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *trained])]

    return call


FEW = ("lora_linear dora, dropout, bias bfloat16", "lora_linear, 2 rows", "lora_linear_group")


def once(setting: Setting, few: bool = False) -> int:
    """Runs each case once, and forced as each candidate; what compute-sanitizer looks at. `few`: those of FEW, as dispatch
    chooses. The exit status."""
    if few:
        with setting.chosen():
            made = cases(setting)
            for name in [name for name in FEW if name in made]:
                print(f"{name}: {len(made[name]())} results", flush=True)
        if not setting.dry:
            torch.cuda.synchronize()
        return 0
    from lora_kernels.ops import dispatch
    from lora_kernels.ops.cost import FORWARD

    with setting.backend(), torch.no_grad():
        for rows in (2, sizes(setting)[0]):
            p = problem(setting)
            for name in FORWARD:
                try:
                    with dispatch.forced(name):
                        lora_linear(p.x[:rows], *p.arguments()[1:])
                except NotImplementedError as refusal:
                    print(f"{name}, {rows} rows: {refusal}")
    with setting.backend():
        for name, case in cases(setting).items():
            found = case()
            if not setting.dry:
                torch.cuda.synchronize()
            print(f"{name}: {len(found)} results", flush=True)
    return 0
