"""Every op against float64, computed on the CPU, by the bounds of lora_kernels.testing.tolerances;
PEFT as a second witness."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch

from bench.gpu.cases import FLAGS, problem_sizes
from bench.gpu.many import check_multi_lora
from bench.gpu.setting import Refused, Setting, StageFindings, fuse_layer, make_peft_layer
from lora_kernels import (
    QuantisedWeight,
    dora_linear,
    explain,
    lora_linear,
    merged_weight,
    nn,
    use_backend,
    weight_norm,
)
from lora_kernels.ops import dispatch, launch, row_norm_squared
from lora_kernels.ops.cost import BACKWARD, FORWARD, SPECIALISED
from lora_kernels.ops.quantised.formula import dequantised
from lora_kernels.testing import (
    LAYOUTS,
    RANKS,
    SHAPES,
    Problem,
    as_layout,
    assert_group,
    assert_no_worse_than_torch,
    assert_problem,
    assert_within_rounding,
    exact,
    make_group,
    make_problem,
    poisoned,
    rms,
)  # fmt: skip

Check = tuple[str, Callable[[], object]]
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = [F32, BF16, F16]
# of a model: one with all the tiles of a real layer, one of a single token
LARGE = [(512, 4096, 4096, 16), (1, 4096, 14336, 64), (300, 4096, 1024, 128)]


def run_stage(setting: Setting, found: StageFindings) -> None:
    """Memory that a kernel makes is NaN before it runs, so that what it leaves out shows."""
    with setting.backend():
        # after the deterministic mode, in which `poisoned` puts torch, the plain one: its kernels
        # are others
        with poisoned():
            for name, call in deterministic_mode_checks(setting):
                found.check(name, call)
        for name, call in (*plain_mode_checks(setting), *candidate_checks(setting, found), *cuda_kernel_checks(setting, found)):
            poison_allocator(setting)
            found.check(name, call)
    found.note(f"{found.checked} checks against float64, {found.kept['failed']} failed")


def poison_allocator(setting: Setting) -> None:
    """Leaves NaN in what torch's allocator will give out next: `poisoned` would change which
    kernels run."""
    blocks = [] if setting.dry else [torch.full((1 << i,), torch.nan, device=setting.device) for i in range(7, 25)]
    del blocks


def deterministic_mode_checks(setting: Setting) -> Iterator[Check]:
    """lora_linear with all flags, shapes, ranks and layouts; then the other ops and the layers."""
    shape = problem_sizes(setting)
    for dtype in DTYPES[1:2] if setting.tiny else DTYPES:
        name = str(dtype)[6:]
        for flags in ["dora, bias"] if setting.tiny or (setting.dry and dtype is not BF16) else FLAGS:
            yield f"lora_linear {flags} {shape} {name}", partial(check_lora_linear, setting, shape, dtype, **FLAGS[flags])
        if not setting.dry:
            for odd in SHAPES:
                for flags in ("lora", "dora, dropout, bias"):
                    yield f"lora_linear {flags} {odd} {name}", partial(check_lora_linear, setting, odd, dtype, **FLAGS[flags])
            for rank in RANKS:
                yield (
                    f"lora_linear r {rank} {name}",
                    partial(check_lora_linear, setting, (130, 300, 200, rank), dtype, gain=True),
                )
            for large in () if setting.quick else LARGE:
                yield f"lora_linear {large} {name}", partial(check_lora_linear, setting, large, dtype, gain=True)
    yield "lora_linear, float32 adapters", partial(check_lora_linear, setting, shape, BF16, adapter_dtype=F32, gain=True)
    for layout in ["gapped_rows"] if setting.dry else LAYOUTS:
        yield f"lora_linear, {layout}", partial(check_layout, setting, layout)
    scale = torch.tensor(0.75, device=setting.device)
    yield "lora_linear, a tensor as scale", partial(check_lora_linear, setting, shape, BF16, scale=scale)
    for dtype in [BF16] if setting.dry else DTYPES:
        yield f"lora_linear_group {str(dtype)[6:]}", partial(check_group, setting, dtype)
    for shape in (
        [problem_sizes(setting)]
        if setting.dry
        else [(1, 4096, 777, 16), (64, 130, 65, 64), (3, 40, 33, 100), problem_sizes(setting)]
    ):
        for dtype in [BF16] if setting.dry else DTYPES:
            yield f"dora_linear {shape} {str(dtype)[6:]}", partial(check_dora_linear, setting, shape, dtype)
    for r in [5] if setting.dry else RANKS:
        for dtype in [BF16] if setting.dry else DTYPES:
            yield f"weight_norm r {r} {str(dtype)[6:]}", partial(check_weight_norm, setting, r, dtype)
            yield f"merged_weight r {r} {str(dtype)[6:]}", partial(check_merged_weight, setting, r, dtype)
    for kind in [nn.DoRALinear] if setting.tiny else [nn.LoRALinear, nn.DoRALinear]:
        for dtype in [BF16] if setting.dry else DTYPES:
            yield f"nn.{kind.__name__} {str(dtype)[6:]}", partial(check_layer, setting, kind, dtype)
    for rows in (5,) if setting.dry else (1, 5, 64, 300):
        for dtype in [BF16] if setting.dry else DTYPES:
            for several in (False,) if setting.tiny else (False, True):
                what = f"{'several adapters' if several else 'an adapter'} a row, {rows} rows, {str(dtype)[6:]}"
                yield f"multi_lora: {what}", partial(check_multi_lora, setting, rows, dtype, several)
    for use_dora in (False, True):
        for dtype in [BF16] if setting.dry else DTYPES:
            yield f"PEFT's layer, dora {use_dora}, {str(dtype)[6:]}", partial(check_peft_layer, setting, dtype, use_dora)


def plain_mode_checks(setting: Setting) -> Iterator[Check]:
    """A few rows share the depth among blocks, and the dispatch looks at their number: not so in
    the deterministic mode."""
    _, n_in, n_out, rank = problem_sizes(setting)
    for rows in (1,) if setting.dry else (1, 2, 16, 33, 64, 65, 300):
        for dtype in (BF16,) if setting.dry else DTYPES:
            shape = (rows, n_in if setting.dry else 4096, n_out, rank)
            yield (
                f"lora_linear {shape} {str(dtype)[6:]}, plain mode",
                partial(check_lora_linear, setting, shape, dtype, gain=True),
            )


def candidate_checks(setting: Setting, found: StageFindings) -> Iterator[Check]:
    """Each kernel that dispatch can choose, by force; one that refuses is noted."""
    tokens, n_in, n_out, rank = problem_sizes(setting)
    flags = [{}] if setting.tiny else [{}, {"gain": True, "bias": True}] if setting.dry else FLAGS.values()
    for name in dict.fromkeys(FORWARD + BACKWARD):
        for dtype in [BF16] if setting.dry else DTYPES:
            for each in flags:
                for rows in {tokens} if setting.dry else (1, 16, 64, 200):
                    p = make_problem(rows, n_in, n_out, rank, dtype, device=setting.device, **each)
                    what = f"{name}: {rows} rows, {str(dtype)[6:]}, {', '.join(each) or 'lora'}"
                    try:
                        with dispatch.forced_candidate(name), torch.no_grad():
                            ran = forward_plans(p)
                    except NotImplementedError as refusal:
                        found.skip(f"{what}: {refusal}")
                        continue
                    except Exception as error:
                        found.fail(f"{what}: {type(error).__name__}: {error}")
                        continue
                    if name in FORWARD and ran != [name]:
                        found.fail(f"{what}: it was forced, and the backend ran {ran}")
                        continue
                    yield what, partial(check_forced_candidate, name, p)


def cuda_kernel_checks(setting: Setting, found: StageFindings) -> Iterator[Check]:
    """The kernels of CUDA C++, which the rest of this stage does not run: it is for Triton's."""
    on = torch.empty(0, device=setting.device)
    reason = None if setting.dry else launch.refuse_binary(launch.architecture(on))
    if reason:
        return found.skip(f"CUDA C++: {reason}")
    tokens, n_in, n_out, rank = problem_sizes(setting)
    n_in += -n_in % 8  # rows at multiples of 16 bytes
    flags = [{"gain": True, "bias": True}] if setting.dry else [{}, {"gain": True, "bias": True}, {"dropout": 0.1}]
    for dtype in [BF16] if setting.dry else [BF16, F16]:
        for rows in {tokens} if setting.dry else (1, 16, 17, 64, 65, 300, 2048):
            for each in flags:
                p = make_problem(rows, n_in, n_out, rank, dtype, device=setting.device, **each)
                what = f"CUDA C++ lora_linear: {rows} rows, {str(dtype)[6:]}, {', '.join(each) or 'lora'}"
                yield what, partial(check_cuda_linear, setting, p)
        for rows in () if setting.dry and setting.arch != 90 else (70,) if setting.dry else (65, 300, 2048):
            for adapters in (dtype,) if setting.dry else (dtype, F32):
                p = make_problem(rows, n_in, n_out + -n_out % 8, rank, dtype, adapters, device=setting.device)
                what = f"CUDA C++ specialised: {rows} rows, {str(dtype)[6:]}, {str(adapters)[6:]} adapters"
                yield what, partial(check_cuda_specialised, setting, p)
        for rows in () if setting.tiny else (tokens,) if setting.dry else (1, 16, 33, 64):
            shape = (n_in + -n_in % 16, n_out, rank)
            yield f"CUDA C++ int8: {rows} rows, {str(dtype)[6:]}", partial(check_cuda_int8, setting, rows, shape, dtype)
            shape = (n_in + -n_in % 32, n_out, rank)
            yield f"CUDA C++ codes: {rows} rows, {str(dtype)[6:]}", partial(check_cuda_codes, setting, rows, shape, dtype)
        for rows in (tokens,) if setting.dry else (1, 16, 33, 64):
            what = f"CUDA C++ multi_lora: {rows} rows, {str(dtype)[6:]}"
            yield what, partial(check_multi_lora, setting, rows, dtype, False, by_cuda=True)
        for r in (rank,) if setting.dry else (1, 17, 64, 128):
            yield (
                f"CUDA C++ norm and merge: r {r}, {str(dtype)[6:]}",
                partial(check_cuda_weights, setting, (n_in, n_out, r), dtype),
            )


def check_cuda_int8(setting: Setting, rows: int, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    p = make_problem(rows, *shape, dtype, gain=True, device=setting.device)
    w = torch.randint(-128, 128, p.w.shape, dtype=torch.int8, device=setting.device)
    w_scale = p.w.float().abs().amax(1) / 127
    with use_backend("cuda", simulate=setting.dry), torch.no_grad():
        y = lora_linear(p.x, w, p.a, p.b, p.scale, p.bias, p.gain, w_scale=w_scale)
    x, a, b, gain = (t.detach().cpu().double() for t in (p.x, p.a, p.b, p.gain))
    wanted = gain * (x @ (w_scale.cpu().double()[:, None] * w.cpu().double()).T + p.scale * (x @ a.T) @ b.T)
    assert_within_rounding(y.cpu(), wanted, dtype, name="y")


def check_cuda_codes(setting: Setting, rows: int, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Codes of 4 bits in blocks of 64, whose scales are codes, too."""
    p, on = make_problem(rows, *shape, dtype, gain=True, device=setting.device), {"device": setting.device}
    (n_out, n_in), numbers = p.w.shape, p.w.numel()
    blocks = -(-numbers // 64)
    codes, scales = (torch.randint(256, (count,), dtype=torch.uint8, **on) for count in (numbers // 2, blocks))
    table, outer_table = (torch.linspace(-1, 1, count, **on) for count in (16, 256))
    outer, offset = (torch.rand(-(-blocks // 256), **on) + 0.5) * n_in**-0.5, torch.tensor(1.5 * n_in**-0.5, **on)
    nested = {"outer": outer, "outer_table": outer_table, "offset": offset}
    w = QuantisedWeight(codes, (n_out, n_in), scales, 64, dtype, table, **nested)
    with use_backend("cuda", simulate=setting.dry), torch.no_grad():
        y, again = (lora_linear(p.x, w, p.a, p.b, p.scale, p.bias, p.gain) for _ in range(2))
    assert torch.equal(y, again), "other bits the second time"
    assert_within_rounding(y.cpu(), exact(replace(p, w=dequantised(w))).values["y"], dtype, name="y")


def check_cuda_linear(setting: Setting, p: Problem) -> None:
    with use_backend("cuda", simulate=setting.dry), torch.no_grad():
        y, again = lora_linear(*p.arguments()), lora_linear(*p.arguments())
    assert torch.equal(y, again), "other bits the second time"
    assert_within_rounding(y.cpu(), exact(p).values["y"], p.x.dtype, name="y")


def check_cuda_specialised(setting: Setting, p: Problem) -> None:
    """Forward and backward, on an H100 or its like."""
    try:
        with setting.backend("cuda"), dispatch.forced_candidate(SPECIALISED):
            assert_problem(p)
    except NotImplementedError as refusal:
        raise Refused(str(refusal)) from refusal


def check_cuda_weights(setting: Setting, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    p = make_problem(0, *shape, dtype, gain=True, device=setting.device)
    w, a, b, gain = (t.cpu().double() for t in (p.w, p.a, p.b, p.gain))
    wanted = w + 0.5 * b @ a
    with use_backend("cuda", simulate=setting.dry), torch.no_grad():
        norm, merged = weight_norm(p.w, p.a, p.b, 0.5), merged_weight(p.w, p.a, p.b, 0.5, p.gain)
        assert torch.equal(merged_weight(p.w, p.a, p.b, 0.5, p.gain, out=p.w), merged), "other bits in place"
    error = (norm.cpu() / wanted.norm(dim=1) - 1).abs().max().item()
    assert error <= 1e-5, f"the norm is off by {error:.2e}"
    assert_within_rounding(merged.cpu(), gain[:, None] * wanted, dtype, ideal_ratio=1.02)


def forward_plans(p: Problem) -> list[str | None]:
    """The candidates that a call's forward took."""
    return [d.plan and d.plan.winner for d in explain(lora_linear, *p.arguments()).decisions]


def check_forced_candidate(name: str, p: Problem) -> None:
    try:
        with dispatch.forced_candidate(name):
            assert_problem(p)
    except NotImplementedError as refusal:
        if "backward cannot run as" not in str(refusal):
            raise
        with dispatch.forced_candidate(name), torch.no_grad():
            y = lora_linear(*p.arguments()).cpu()
        truth = exact(p).values["y"]
        if p.x.dtype is F32:
            assert_sums(y, truth, "y")
        else:
            assert_within_rounding(y, truth, p.x.dtype, name="y")


def check_lora_linear(setting: Setting, shape: tuple[int, ...], dtype: torch.dtype, **flags) -> None:
    assert_problem(make_problem(*shape, dtype=dtype, device=setting.device, **flags))


def check_layout(setting: Setting, layout: str) -> None:
    # rows that are all the same are also rounded all the same, and the bound on gain's gradient
    # counts on chance
    p = make_problem(*problem_sizes(setting), BF16, gain=layout != "expanded", device=setting.device)
    tensors = {name: t for name in ("x", "w", "a", "b", "gain", "dy") if (t := getattr(p, name)) is not None}
    assert_problem(replace(p, **{name: as_layout(t, layout) for name, t in tensors.items()}))


def check_group(setting: Setting, dtype: torch.dtype) -> None:
    tokens, n_in, n_out, rank = problem_sizes(setting)
    members = [{"n_out": n_out, "rank": rank}, {"n_out": n_out // 2, "rank": 1, "gain": True, "bias": True}]
    members += [] if setting.dry else [{"n_out": 3 * n_out, "rank": 64, "dropout": 0.3}]
    assert_group(make_group(members, tokens, n_in, dtype, device=setting.device))


def check_weight_norm(setting: Setting, r: int, dtype: torch.dtype) -> None:
    """Values by the error that weight_norm states, with a row that cancels; gradients in the
    norm."""
    _, n_in, n_out, _ = problem_sizes(setting)
    p = make_problem(0, n_in, n_out, r, dtype, device=setting.device)
    with torch.no_grad():
        p.b[3] = 0
        p.w[5] = (-0.5 * p.b[5].float() @ p.a.float()).to(dtype)
    p.require_grad(("a", "b"))
    found = weight_norm(p.w, p.a, p.b, 0.5)
    w, a, b = (t.detach().cpu().double() for t in (p.w, p.a, p.b))
    a.requires_grad_(), b.requires_grad_()
    wanted = (w + 0.5 * b @ a).square().sum(1).sqrt()
    size = (w.square().sum(1).sqrt() + 0.5 * (b.abs() @ a.abs()).norm(dim=1)).detach()
    error = ((found.detach().cpu() - wanted.detach()).abs() / size).max().item()
    most = 1e-5 if dtype is F32 else 1e-4
    assert error <= most, f"the norm is off by {error:.2e} of its terms, allowed {most:.0e}"
    again = weight_norm(p.w, p.a, p.b, 0.5, row_norm_squared(p.w))
    assert torch.equal(again, found), "other bits with row_norm_squared given"
    dn = torch.linspace(-1, 1, n_out)
    dn[5] = 0  # the direction of a row that is next to nothing is rounding
    grads = torch.autograd.grad(found, (p.a, p.b), dn.to(setting.device))
    for name, got, right in zip("ab", grads, torch.autograd.grad(wanted, (a, b), dn.double()), strict=True):
        error = ((got.cpu() - right).norm() / right.norm()).item()
        assert error <= (1e-5 if dtype is F32 else 0.01), f"the gradient of {name} is off by {error:.2e}"


def check_dora_linear(setting: Setting, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    p = make_problem(*shape, dtype=dtype, gain=True, bias=True, device=setting.device)
    y, found = dora_linear(p.x, p.w, p.a, p.b, p.gain, 0.5, p.bias)
    x, w, a, b, magnitude, bias = (t.cpu().double() for t in (p.x, p.w, p.a, p.b, p.gain, p.bias))
    adapted = w + 0.5 * b @ a
    length = adapted.norm(dim=1)
    error = ((found.cpu() - length).abs() / length).max().item()
    assert error <= (1e-5 if dtype is F32 else 1e-4), f"the norm is off by {error:.2e}"
    truth = magnitude / length * (x @ adapted.T) + bias
    if dtype is F32:
        assert_sums(y, truth, "y")
    else:
        assert_within_rounding(y.cpu(), truth, dtype, name="y")


def check_merged_weight(setting: Setting, r: int, dtype: torch.dtype) -> None:
    _, n_in, n_out, _ = problem_sizes(setting)
    for kind, gain in ((dtype, False), (F32, True)):
        p = make_problem(0, n_in, n_out, r, dtype, kind, gain=gain, device=setting.device)
        w, a, b = (t.cpu().double() for t in (p.w, p.a, p.b))
        wanted = w + 0.5 * b @ a
        wanted = wanted if p.gain is None else p.gain.cpu().double()[:, None] * wanted
        found = merged_weight(p.w, p.a, p.b, 0.5, p.gain)
        if dtype is F32:
            error = rms(found.cpu().double() - wanted) / rms(wanted)
            assert error <= 1e-6, f"rms error {error:.2e}"
        else:
            assert_within_rounding(found.cpu(), wanted, dtype, ideal_ratio=1.02)
        assert torch.equal(merged_weight(p.w, p.a, p.b, 0.5, p.gain, out=p.w), found), "other bits in place"


def check_layer(setting: Setting, kind, dtype: torch.dtype) -> None:
    """Against the same layer in float64 on the CPU."""
    tokens, n_in, n_out, rank = problem_sizes(setting)
    torch.manual_seed(0)
    made = kind(n_in, n_out, r=rank, device=setting.device, dtype=dtype)
    torch.nn.init.normal_(made.lora_B, std=0.02)
    wide = copy.deepcopy(made).cpu().double()
    x, dy = (torch.randn(tokens, n, device=setting.device, dtype=dtype) for n in (n_in, n_out))
    found = trained(made, x, dy)
    with use_backend("reference"):
        truth = trained(wide, x.cpu().double(), dy.cpu().double())
    for name in truth:
        if dtype is F32:
            assert_sums(found[name], truth[name], name)
        # what y inherits from its rounding, the gradient of the magnitude, a sum over y, inherits
        # from y
        else:
            ratio = 3 if name == "lora_magnitude_vector" else 1.5
            assert_within_rounding(found[name].cpu(), truth[name], dtype, ratio, name=name)


def check_peft_layer(setting: Setting, dtype: torch.dtype, use_dora: bool) -> None:
    """Against PEFT's layer in float64 on the CPU, and no worse than PEFT's own in the same
    dtype."""
    tokens, n_in, n_out, rank = problem_sizes(setting)
    torch.manual_seed(0)
    stock = make_peft_layer(n_in, n_out, rank, dtype, setting.device, use_dora=use_dora)
    wide, ours = copy.deepcopy(stock).cpu().double(), fuse_layer(copy.deepcopy(stock))
    x, dy = (torch.randn(tokens, n, device=setting.device, dtype=dtype) for n in (n_in, n_out))
    truth = trained(wide, x.cpu().double(), dy.cpu().double())
    found, yardstick = trained(ours, x, dy), trained(stock, x, dy)
    for name in truth:
        if dtype is F32:
            assert_sums(found[name], truth[name], name)
        else:
            assert_no_worse_than_torch(found[name].cpu(), truth[name], yardstick[name].cpu(), name)


def assert_sums(found: torch.Tensor, truth: torch.Tensor, name: str) -> None:
    """Of float32 only the order of the sums is free."""
    error = ((found.detach().cpu() - truth).norm() / truth.norm()).item()
    assert error <= 1e-5, f"{name} {list(truth.shape)} is off by {error:.2e}"


def trained(module, x, dy) -> dict[str, torch.Tensor]:
    """y and the gradients of x and of all that is trained."""
    x = x.detach().clone().requires_grad_()
    leaves = {"x": x} | {name: p for name, p in module.named_parameters() if p.requires_grad}
    y = module(x)
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach()} | dict(zip(leaves, grads, strict=True))
