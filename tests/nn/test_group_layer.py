"""GroupedLinear beside its layers called one by one: outputs, gradients, states of the layers, what
it refuses."""

import copy

import pytest
import torch
from layer_helpers import KINDS, adapter, ours
from torch import nn

from lora_kernels import explain
from lora_kernels.nn import DoRALinear, GroupedLinear, LoRALinear

WIDTHS = {"q_proj": 10, "k_proj": 4, "v_proj": 7}
MIXES = {
    "lora": ("lora", "lora", "lora"),
    "dora": ("dora", "rsdora", "dora"),
    "mixed": ("dora", "lora", "rslora"),
}
mixes = pytest.mark.parametrize("mix", MIXES)


def make(mix, dtype=torch.float32, **more):
    kinds = MIXES[mix] if isinstance(mix, str) else mix
    return GroupedLinear(
        {
            name: ours(kind, dtype, n_out=n_out, bias=name != "k_proj", **more)
            for kind, (name, n_out) in zip(kinds, WIDTHS.items(), strict=True)
        }
    )


def one_by_one(group, x):
    return tuple(layer(x) for layer in group.children())


def results(group, call, tokens=(2, 9), dtype=torch.float32, seed=2):
    """Outputs, and the gradients of x and of all that the adapters train."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*tokens, 12, generator=generator).to(dtype).requires_grad_()
    torch.manual_seed(seed)
    ys = call(x)
    dys = [torch.randn(y.shape, generator=generator).to(dtype) for y in ys]
    trained = [p for layer in group.children() for p in adapter(layer)]
    grads = torch.autograd.grad(ys, [x, *trained], dys, allow_unused=True)
    return [y.detach() for y in ys], grads


def assert_same(group, dtype=torch.float32, **more):
    """The group computes what its layers do: outputs and adapters' gradients bit for bit, x's
    rounded once."""
    ys, (dx, *grads) = results(group, group, dtype=dtype, **more)
    wanted, (dx_wanted, *grads_wanted) = results(group, lambda x: one_by_one(group, x), dtype=dtype, **more)
    assert all(y.equal(w) for y, w in zip(ys, wanted, strict=True))
    assert all(g is w is None or g.equal(w) for g, w in zip(grads, grads_wanted, strict=True))
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2 if dtype is torch.bfloat16 else 1e-12
    torch.testing.assert_close(dx, dx_wanted, rtol=tolerance, atol=10 * tolerance)


def ops(call, x):
    return [decision.op for decision in explain(call, x).decisions if decision.op.startswith("lora_linear")]


@mixes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_outputs_and_gradients_are_those_of_the_layers(mix, dtype):
    group = make(mix, dtype)
    assert_same(group, dtype)
    x = torch.randn(5, 12).to(dtype)
    with torch.no_grad():
        assert all(y.equal(w) for y, w in zip(group(x), one_by_one(group, x), strict=True))
        assert ops(group, x) == ["lora_linear_group_forward"]


@mixes
def test_dropout_draws_the_masks_of_the_layers(mix):
    group = make(mix, lora_dropout=0.4).train()
    assert_same(group)
    torch.manual_seed(1)
    x = torch.ones(4, 12)
    assert not group(x)[0].equal(group(x)[0])
    group.eval()
    assert group(x)[0].equal(group(x)[0])
    assert_same(group)
    group.train()
    group.k_proj.eval()
    assert_same(group)


def test_layers_that_drop_differently_are_two_calls():
    group = make(("dora", "lora", "dora"), lora_dropout=0.4).train()
    group.v_proj.dropout_semantics = "lora_only"
    x = torch.ones(4, 12)
    assert ops(group, x) == ["lora_linear_group_forward"] * 2
    assert_same(group)
    group.eval()
    assert ops(group, x) == ["lora_linear_group_forward"]
    group.train()
    group.q_proj.dropout_semantics = "lora_only"
    assert ops(group, x) == ["lora_linear_group_forward"]
    assert_same(group)


def test_the_exact_gradient_of_the_norm():
    group = make("mixed", torch.float64)
    group.q_proj.detach_norm = False
    assert_same(group, torch.float64)


@mixes
def test_disabled_and_merged_layers_run_alone(mix):
    group, x = make(mix), torch.randn(5, 12)
    plain = group(x)
    with group.k_proj.adapter_disabled():
        ys = group(x)
        assert ys[1].equal(nn.functional.linear(x, group.k_proj.weight, group.k_proj.bias))
        assert ys[0].equal(plain[0]) and ys[2].equal(plain[2])
        assert_same(group)
    group.q_proj.merge()
    assert group(x)[0].equal(nn.functional.linear(x, group.q_proj.weight, group.q_proj.bias))
    assert_same(group)
    for name in ("k_proj", "v_proj"):
        getattr(group, name).merge()
    assert ops(group, x) == []
    assert_same(group)
    for layer in group.children():
        layer.unmerge()
    assert all(y.equal(w) for y, w in zip(group(x), plain, strict=True))


def test_hooks_and_forwards_of_a_layer_run():
    group, x, seen = make("mixed"), torch.randn(5, 12), []
    plain = group(x)
    handle = group.k_proj.register_forward_hook(lambda module, args, y: seen.append("hook") or y + 1)
    assert group(x)[1].equal(plain[1] + 1) and seen == ["hook"]
    handle.remove()

    class Doubled(LoRALinear):
        def forward(self, x):
            return 2 * super().forward(x)

    group.k_proj.__class__ = Doubled
    assert group(x)[1].equal(2 * plain[1])
    group.k_proj.__class__ = LoRALinear
    group.k_proj.forward = lambda x: x
    assert group(x)[1] is x
    del group.k_proj.forward
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, y: seen.append(type(module)))
    try:
        group(x)
    finally:
        handle.remove()
    assert seen[1:] == [DoRALinear, LoRALinear, LoRALinear, GroupedLinear]
    group.v_proj = nn.Linear(12, 3)
    assert group(x)[2].equal(group.v_proj(x)) and group(x)[0].equal(plain[0])


def test_names_and_state():
    group = make("mixed")
    keys = {f"{name}.{key}" for name, layer in group.named_children() for key in layer.state_dict()}
    assert set(group.state_dict()) == keys and "q_proj.lora_magnitude_vector" in keys
    other = copy.deepcopy(group)
    with torch.no_grad():
        for layer in other.children():
            layer.lora_B.zero_()
    x = torch.randn(3, 12)
    assert not other(x)[0].equal(group(x)[0])
    other.load_state_dict(group.state_dict())
    assert all(y.equal(w) for y, w in zip(other(x), group(x), strict=True))
    unnamed = GroupedLinear(list(group.children()))
    assert [name for name, _ in unnamed.named_children()] == ["0", "1", "2"]
    assert unnamed(x)[1].equal(group(x)[1])
    twice = GroupedLinear([group.q_proj, group.q_proj])
    assert len(twice(x)) == 2 and twice(x)[1].equal(group(x)[0])


@mixes
def test_training_moves_the_layers_as_alone(mix):
    losses = []
    for call in (lambda group, x: group(x), one_by_one):
        torch.manual_seed(4)
        group = make(mix, torch.float64)
        trained = [p for layer in group.children() for p in adapter(layer)]
        optimizer = torch.optim.AdamW(trained, lr=0.05)
        x = torch.randn(9, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        for _ in range(4):
            optimizer.zero_grad()
            loss = sum((y - 1).square().mean() for y in call(group, x))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[:4] == pytest.approx(losses[4:], rel=1e-9) and losses[3] < losses[0]


@mixes
def test_compiled(mix):
    torch._dynamo.reset()
    group = make(mix, lora_dropout=0.2).train()
    compiled = torch.compile(group, fullgraph=True, backend="aot_eager")
    for dropped in (True, False):
        group.train(dropped)
        found, wanted = results(group, compiled), results(group, group)
        for one, two in zip([*found[0], *found[1]], [*wanted[0], *wanted[1]], strict=True):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_autocast():
    group, x = make("mixed"), torch.randn(5, 12)
    with torch.autocast("cpu", torch.bfloat16):
        ys, wanted = group(x), one_by_one(group, x)
    assert all(y.dtype is torch.bfloat16 and y.equal(w) for y, w in zip(ys, wanted, strict=True))


def test_what_is_refused():
    good = ours("lora")
    with pytest.raises(ValueError, match="GroupedLinear: layers must hold at least one layer, found none"):
        GroupedLinear([])
    with pytest.raises(TypeError, match="GroupedLinear: layer '1' must be a LoRALinear or DoRALinear, found Linear"):
        GroupedLinear([good, nn.Linear(12, 4)])
    with pytest.raises(ValueError, match="GroupedLinear: layer 'k' must have in_features 12 as the first, found 5"):
        GroupedLinear({"q": good, "k": ours("lora", n_in=5)})
    with pytest.raises(KeyError):
        GroupedLinear({"forward": good})
    with pytest.raises(ValueError, match="lora_linear_group: member 0: x must have 12 features"):
        GroupedLinear([good])(torch.ones(3, 5))
    with pytest.raises(TypeError, match="lora_linear_group: member 1: w must have the dtype of x"):
        GroupedLinear([good, ours("dora", torch.bfloat16)])(torch.ones(3, 12))
    assert set(KINDS) >= {kind for mix in MIXES.values() for kind in mix}
