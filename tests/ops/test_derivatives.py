"""Derivatives beyond the first backward of every op: of a backward, in forward mode, under
torch.func."""

from dataclasses import replace

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from lora_kernels import (
    Member,
    dora_linear,
    lora_linear,
    lora_linear_group,
    merged_weight,
    use_backend,
    weight_norm,
)
from lora_kernels.ops import NormCache, dora_gain, row_norm_squared
from lora_kernels.testing import make_group, make_problem, member

DOUBLE = torch.float64
FLAGS = [
    {},
    {"bias": True},
    {"gain": True, "bias": True},
    {"dropout": 0.4, "bias": True},
    {"gain": True, "bias": True, "dropout": 0.4},
    {"gain": True, "dropout": 0.4, "dropout_semantics": "lora_only"},
]
MEMBERS = [
    {"n_out": 3, "rank": 2, "gain": True, "bias": True},
    {"n_out": 2, "rank": 1, "scale": torch.tensor(0.7, dtype=DOUBLE)},
    {"n_out": 4, "rank": 2, "bias": True},
]
each_flag = pytest.mark.parametrize("flags", FLAGS, ids=str)


def draw(*shape, dtype=DOUBLE, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + len(shape) + shape[0]), dtype=DOUBLE).to(dtype)


def single(flags, dtype=DOUBLE, tokens=4, **values):
    """The op as a function of what may be learnt, and these tensors."""
    p = make_problem(tokens, 5, 3, 2, dtype, **flags | values)
    names = list(p.require_grad(("x", "a", "b", "bias", "gain", "scale")))

    def call(*tensors):
        return lora_linear(*replace(p, **dict(zip(names, tensors, strict=True))).arguments())

    return call, [getattr(p, name) for name in names]


def group(dtype=DOUBLE, **flags):
    members = [m | {"scale": m["scale"].to(dtype)} if "scale" in m else m for m in MEMBERS]
    problems = make_group(members, 4, 5, dtype, **flags)
    names = [list(p.require_grad(("a", "b", "bias", "gain", "scale"))) for p in problems]

    def call(x, *tensors):
        given = iter(tensors)
        found = [replace(p, x=x, **{n: next(given) for n in own}) for p, own in zip(problems, names, strict=True)]
        return lora_linear_group(x, [member(p) for p in found], [p.dropout for p in found])

    return call, [problems[0].x.requires_grad_(), *(getattr(p, n) for p, own in zip(problems, names, strict=True) for n in own)]


def norm_and_gain(dtype=DOUBLE):
    w = draw(3, 5, dtype=dtype)
    a, b, m, scale = draw(2, 5, dtype=dtype), draw(3, 2, dtype=dtype), draw(3, dtype=dtype), torch.tensor(0.7, dtype=dtype)
    leaves = [t.requires_grad_() for t in (a, b, m, scale)]
    return lambda a, b, m, scale: dora_gain(m, weight_norm(w, a, b, scale)), leaves


def whole_dora(dtype=DOUBLE):
    """The layer with the exact gradient of the norm, the input dropped."""
    p = make_problem(4, 5, 3, 2, dtype, bias=True, dropout=0.3)
    m = draw(3, dtype=dtype).requires_grad_()

    def call(x, a, b, bias, m):
        return lora_linear(x, p.w, a, b, 0.7, bias, dora_gain(m, weight_norm(p.w, a, b, 0.7)), 0.3, seed=p.seed)

    return call, [*p.require_grad(("x", "a", "b", "bias")).values(), m]


KINDS = {str(flags): lambda dtype=DOUBLE, flags=flags: single(flags, dtype) for flags in FLAGS} | {
    "scale": lambda dtype=DOUBLE: single({"gain": True, "scale": torch.tensor(0.7, dtype=dtype)}, dtype),
    "group": group,
    "group with dropout": lambda dtype=DOUBLE: group(dtype, dropout=0.4),
    "weight_norm": norm_and_gain,
    "whole DoRA": whole_dora,
}
each_kind = pytest.mark.parametrize("kind", KINDS)


@each_kind
def test_gradgradcheck(kind):
    call, leaves = KINDS[kind]()
    assert gradgradcheck(call, leaves, nondet_tol=0.0)


def first(call):
    """The gradients of a sum of squares, with a graph."""

    def gradients(*tensors):
        ys = call(*tensors)
        total = sum(y.square().sum() for y in (ys if isinstance(ys, tuple) else (ys,)))
        return torch.autograd.grad(total, tensors, create_graph=True)

    return gradients


@pytest.mark.parametrize("kind", [str(FLAGS[4]), "group", "whole DoRA"])
def test_the_third_derivative(kind):
    call, leaves = KINDS[kind]()
    assert gradgradcheck(first(call), leaves, nondet_tol=0.0)


@each_kind
def test_second_derivatives_of_the_kernels(backend, kind):
    def second(dtype):
        call, leaves = KINDS[kind](dtype)
        return torch.autograd.grad(sum(g.square().sum() for g in first(call)(*leaves)), leaves)

    with use_backend("reference"):
        wanted = second(DOUBLE)
    for found, exact in zip(second(torch.float32), wanted, strict=True):
        assert found.dtype is torch.float32
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4 * float(exact.abs().max()))


@pytest.mark.parametrize("needs", ["x", "a", "gain"])
def test_second_derivatives_in_16_bits(backend, needs):
    def second(dtype):
        p = make_problem(6, 24, 20, 4, torch.bfloat16, gain=True, bias=True)
        p = replace(p, **{n: getattr(p, n).to(dtype) for n in ("x", "w", "a", "b", "bias", "gain")})
        leaf = p.require_grad((needs,))[needs]
        y = lora_linear(*p.arguments())
        (g,) = torch.autograd.grad(y.pow(3).sum(), leaf, create_graph=True)
        return torch.autograd.grad(g.square().sum(), leaf)[0]

    found = second(torch.bfloat16)
    with use_backend("reference"):
        exact = second(DOUBLE)
    assert found.dtype is torch.bfloat16
    assert float((found.double() - exact).norm() / exact.norm()) < 0.03


def test_an_input_that_hangs_on_another_counts_once():
    x, w, a = draw(4, 5), draw(3, 5), draw(2, 5).requires_grad_()
    found = []
    for y in (lora_linear(x, w, a, a[:, :3].T, 0.5), x @ (w + 0.5 * a[:, :3].T @ a).T):
        gradient = y.pow(3).sum()
        for _ in range(3):
            (gradient,) = torch.autograd.grad(gradient.square().sum(), a, create_graph=True)
        found.append(gradient)
    torch.testing.assert_close(*found, rtol=1e-9, atol=0)


def test_a_gradient_penalty_in_a_step(backend):
    """backward(create_graph=True), as a WGAN or a hypergradient calls it."""
    p = make_problem(6, 24, 20, 4, bias=True)
    leaves = p.require_grad()
    wanted = []
    for plain in (True, False):
        y = p.x @ (p.w + p.scale * p.b @ p.a).T + p.bias if plain else lora_linear(*p.arguments())
        (g,) = torch.autograd.grad(y.pow(3).sum(), p.x, create_graph=True)
        (g.norm(dim=1) - 1).square().sum().backward()
        wanted.append([leaf.grad for leaf in leaves.values()])
        for leaf in leaves.values():
            leaf.grad = None
    for plain, ours in zip(*wanted, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-4 * float(plain.abs().max()))


def test_a_zero_row_of_the_norm_has_derivatives_of_zero():
    w, a, b, t = draw(3, 5), draw(2, 5).requires_grad_(), draw(3, 2), draw(3).requires_grad_()
    w[1], b[1] = 0, 0
    b.requires_grad_()
    g = torch.autograd.grad((weight_norm(w, a, b) * t).sum(), (a, b), create_graph=True)
    second = torch.autograd.grad(g[0].square().sum() + g[1].square().sum(), (a, b, t))
    forward = torch.func.grad(lambda b: weight_norm(w, a.detach(), b).sum())(b.detach())
    dora = torch.func.grad(lambda b: dora_linear(draw(4, 5), w, a.detach(), b, draw(3))[0].sum())(b.detach())
    assert all(g.isfinite().all() for g in (*second, forward, dora))
    assert not second[1][1].any() and not second[2][1] and not forward[1].any()


@each_kind
def test_forward_mode(kind):
    call, leaves = KINDS[kind]()
    assert gradcheck(call, leaves, check_forward_ad=True, check_backward_ad=False, check_batched_forward_grad=True)


@pytest.mark.parametrize("kind", [str(FLAGS[0]), str(FLAGS[4]), "group", "weight_norm"])
def test_the_tangent_of_each_tensor(backend, kind):
    """Frozen tensors, as load_adapter leaves them: the kernels would drop the tangent."""
    call, leaves = KINDS[kind](torch.float32)
    frozen = [leaf.detach() for leaf in leaves]
    for mode in (torch.no_grad, torch.enable_grad):
        for i, leaf in enumerate(frozen):
            step = draw(*leaf.shape, dtype=torch.float32, seed=7) if leaf.dim() else torch.tensor(1.0)
            with use_backend("reference"):
                exact, whole = KINDS[kind]()
                steps = [step.double() if t is whole[i] else torch.zeros_like(t) for t in whole]
                wanted = torch.func.jvp(exact, tuple(whole), tuple(steps))[1]
            with mode(), forward_ad.dual_level():
                ys = call(*frozen[:i], forward_ad.make_dual(leaf, step), *frozen[i + 1 :])
                ys = ys if isinstance(ys, tuple) else (ys,)
                found = [forward_ad.unpack_dual(y).tangent for y in ys]
            for one, two in zip(found, wanted if isinstance(wanted, tuple) else (wanted,), strict=True):
                one = torch.zeros_like(two) if one is None else one
                torch.testing.assert_close(one.double(), two.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [str(FLAGS[1]), str(FLAGS[4]), "group", "weight_norm", "whole DoRA"])
def test_many_dy_at_once(backend, kind):
    """is_grads_batched, as jacobian(vectorize=True) uses it."""
    call, leaves = KINDS[kind](torch.float32)
    ys = call(*leaves)
    ys = ys if isinstance(ys, tuple) else (ys,)
    dys = [draw(6, *y.shape, dtype=torch.float32) for y in ys]
    together = torch.autograd.grad(ys, leaves, dys, is_grads_batched=True, retain_graph=True)
    for i in range(6):
        alone = torch.autograd.grad(ys, leaves, [dy[i] for dy in dys], retain_graph=True)
        for one, all_of_them in zip(alone, together, strict=True):
            torch.testing.assert_close(all_of_them[i], one, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [str(FLAGS[1]), "group"])
def test_dy_with_a_tangent(backend, kind):
    call, leaves = KINDS[kind](torch.float32)
    ys = call(*leaves)
    ys = ys if isinstance(ys, tuple) else (ys,)
    dys, steps = ([draw(*y.shape, dtype=torch.float32, seed=seed) for y in ys] for seed in (1, 2))
    wanted = torch.autograd.grad(ys, leaves[0], steps, retain_graph=True)[0]
    with forward_ad.dual_level():
        given = [forward_ad.make_dual(dy, step) for dy, step in zip(dys, steps, strict=True)]
        found = forward_ad.unpack_dual(torch.autograd.grad(ys, leaves[0], given)[0]).tangent
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@each_flag
def test_torch_func(backend, flags):
    call, leaves = single(flags, torch.float32)
    x, *others = (leaf.detach() for leaf in leaves)
    y = call(x, *others)
    if "dropout" not in flags:  # whose mask belongs to a row's place
        torch.testing.assert_close(torch.func.vmap(lambda row: call(row, *others))(x), y)
    wanted = torch.autograd.grad(call(*leaves).square().sum(), leaves)
    found = torch.func.grad(lambda *t: call(*t).square().sum(), argnums=tuple(range(len(leaves))))(x, *others)
    for one, two in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


def test_w_has_a_gradient_under_torch_func():
    p = make_problem(4, 5, 3, 2, DOUBLE)
    found = torch.func.grad(lambda w: lora_linear(p.x, w, p.a, p.b, 0.5).square().sum())(p.w)
    torch.testing.assert_close(found, 2 * lora_linear(p.x, p.w, p.a, p.b, 0.5).T @ p.x)
    with pytest.raises(ValueError, match="w is frozen"):
        lora_linear(p.x, p.w.clone().requires_grad_(), p.a, p.b, 0.5)


def test_learnt_tensors_inside_a_transform_that_does_not_see_them():
    p = make_problem(4, 5, 3, 2, bias=True)
    p.require_grad()
    found = torch.func.grad(lambda t: (lora_linear(*p.arguments()) * t).sum())(torch.ones(4, 3))
    assert torch.allclose(found, lora_linear(*p.arguments()))


@pytest.mark.parametrize("at", [0, 1, 2])
def test_ops_without_a_backward_in_forward_mode(at):
    x, w, tensors = draw(4, 5), draw(3, 5), [draw(2, 5), draw(3, 2), draw(3) + 3]

    def jacobians(call):
        def of(t):
            return call(*tensors[:at], t, *tensors[at + 1 :])

        return torch.func.jacfwd(of)(tensors[at]), torch.func.jacrev(of)(tensors[at])

    def dora(a, b, m):
        adapted = w + 0.5 * b @ a
        return x @ (m[:, None] * adapted / adapted.norm(dim=1, keepdim=True)).T

    for ours, plain in (
        (lambda a, b, m: dora_linear(x, w, a, b, m, 0.5)[0], dora),
        (lambda a, b, m: merged_weight(w, a, b, 0.5, m), lambda a, b, m: m[:, None] * (w + 0.5 * b @ a)),
    ):
        for found, wanted in zip(jacobians(ours), jacobians(plain), strict=True):
            torch.testing.assert_close(found, wanted)
    assert torch.func.vmap(lambda a: merged_weight(w, a, tensors[1]))(tensors[0][None]).shape == (1, 3, 5)
    torch.testing.assert_close(torch.func.grad(lambda w: row_norm_squared(w).sum())(w), 2 * w)


def test_int8_weights_in_forward_mode():
    p = make_problem(4, 6, 3, 2)
    w, scales = torch.randint(-127, 127, (3, 6), dtype=torch.int8), torch.rand(3) + 0.5
    found = torch.func.jvp(lambda x: lora_linear(x, w, p.a, p.b, 0.5, w_scale=scales), (p.x,), (p.dy.new_ones(4, 6),))[1]
    torch.testing.assert_close(found, torch.ones(4, 6) @ (w * scales[:, None] + 0.5 * p.b @ p.a).T)


@pytest.mark.parametrize("grad", [torch.no_grad, torch.enable_grad])
def test_a_cached_norm_is_a_constant_and_its_gain_is_not(grad):
    w, a, b, m = draw(3, 5), draw(2, 5), draw(3, 2), draw(3)
    cache = NormCache()
    with grad():
        plain = cache.gain(w, a, b, 0.5, m)
        found = torch.func.jvp(lambda m, a: cache.gain(w, a, b, 0.5, m), (m, a), (torch.ones_like(m), torch.ones_like(a)))
        after = cache.gain(w, a, b, 0.5, m)
    torch.testing.assert_close(found[1], 1 / weight_norm(w, a, b, 0.5))
    assert torch.allclose(found[0], plain) and torch.equal(after, plain)
    assert not torch._C._functorch.is_functorch_wrapped_tensor(after)


def test_a_compiled_jvp():
    p = make_problem(4, 5, 3, 2)
    arguments = p.arguments()[1:5]

    def tangent(x, t):
        return torch.func.jvp(lambda x: lora_linear(x, *arguments), (x,), (t,))[1]

    torch.testing.assert_close(torch.compile(tangent, backend="eager")(p.x, p.x), tangent(p.x, p.x))
    torch.testing.assert_close(tangent(p.x, p.x), lora_linear(p.x, *arguments))


def test_a_group_member_by_member():
    ms = [Member(draw(n, 5), draw(2, 5), draw(n, 2), 0.5) for n in (3, 4)]
    x = draw(6, 5)
    for found, m in zip(torch.func.vmap(lambda row: lora_linear_group(row, ms))(x), ms, strict=True):
        torch.testing.assert_close(found, lora_linear(x, *m[:4]))
