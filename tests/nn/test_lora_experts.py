"""nn.LoRAExperts: DoRA and LoRA of experts against W' formed in float64, and the layer as a
module."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.checkpoint import checkpoint
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

from lora_kernels import explain, ops, refresh
from lora_kernels.nn import LoRAExperts
from lora_kernels.ops.expert_weight_norm import cache
from lora_kernels.testing.poison import poisoned
from tests.integrations.experts_helpers import EXPERTS, HIDDEN, INNER, TOP_K, Config, choices, experts_class, inputs
from tests.nn.layer_helpers import through_pickle, through_torch_save
from tests.nn.test_snapshot import neither

NAMES = ["MixtralExperts", "GptOssExperts", "NemotronHExperts", "Llama4TextExperts"]
names = pytest.mark.parametrize("name", NAMES)


def experts(name="MixtralExperts", dtype=torch.float32):
    torch.manual_seed(0)
    made = Llama4TextExperts(Llama4()) if name == "Llama4TextExperts" else experts_class(name)(Config())
    for p in made.parameters():
        nn.init.normal_(p, std=0.3)
    return made.to(dtype)


class Llama4:
    num_local_experts, intermediate_size, hidden_size, hidden_act = EXPERTS, INNER, HIDDEN, "silu"


def layer_of(made, seed=1, **options):
    layer = LoRAExperts.from_experts(made, **{"r": 3, "lora_alpha": 5} | options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in layer.named_parameters():
            if name.startswith("lora_"):
                p += 0.3 * torch.randn(p.shape, generator=generator).to(p)
    return layer


def arguments(name, dtype=torch.float32):
    if name == "Llama4TextExperts":
        return (torch.cat([inputs(dtype)] * EXPERTS),)
    weights = torch.rand(17, TOP_K, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return inputs(dtype), choices(), weights.to(dtype)


def leaves(layer):
    return {n: p for n, p in layer.named_parameters() if n.startswith("lora_")}


def formed(layer, p, factors):
    """gain ⊙ (W + s·BA) as the parameter lies, by autograd's own ops, with the norm detached."""
    w, a, b = layer._parameters[p].detach().double(), factors[f"lora_A_{p}"], factors[f"lora_B_{p}"]
    w = w.mT if layer._transposed else w
    sums = w + layer.scaling[p] * b @ a
    if layer.use_dora:
        norm = sums.norm(dim=2, keepdim=True)
        sums = factors[f"lora_magnitude_vector_{p}"][..., None] / (norm.detach() if layer.detach_norm else norm) * sums
    return sums.mT if layer._transposed else sums


def exact(layer, made, args):
    """y and every gradient in float64, by the module's own loop on W'."""
    factors = {n: p.detach().double().requires_grad_() for n, p in leaves(layer).items()}
    args = [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in args]
    weights = {p: formed(layer, p, factors) for p in layer.adapted}
    y = functional_call(copy.deepcopy(made).double(), weights, tuple(args))
    return gradients_of(y, {**factors, **named(args)})


def found(layer, args):
    args = [t.detach().requires_grad_() if t.is_floating_point() else t for t in args]
    return gradients_of(layer(*args), {**leaves(layer), **named(args)})


def named(args):
    return {name: t for name, t in zip(("x", "index", "weights"), args, strict=False) if t.is_floating_point()}


def gradients_of(y, wanted):
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(4)).to(y)
    return {"y": y.detach()} | dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), dy), strict=True))


@names
@pytest.mark.parametrize("options", [{"use_dora": True}, {"use_dora": True, "detach_norm": False}, {}], ids=str)
def test_outputs_and_gradients(name, options):
    for dtype, bound in ((torch.float64, 1e-11), (torch.float32, 2e-6), (torch.bfloat16, 3e-2)):
        made = experts(name, dtype)
        layer, args = layer_of(made, **options), arguments(name, dtype)
        with poisoned():
            results = found(layer, args)
        for key, wanted in exact(layer, made, args).items():
            error = (results[key].double() - wanted).norm() / wanted.norm()
            assert error < bound, f"{key} in {dtype}: {error}"


def test_one_of_two_parameters_with_options_of_its_own():
    made = experts("GptOssExperts", torch.float64)
    layer = layer_of(made, parameters=["down_proj"], use_dora=True, use_rslora=True)
    assert sorted(leaves(layer)) == [f"lora_{kind}_down_proj" for kind in ("A", "B", "magnitude_vector")]
    args = arguments("GptOssExperts", torch.float64)
    torch.testing.assert_close(found(layer, args), exact(layer, made, args))
    layer = layer_of(made, r={"gate_up_proj": 2, "down_proj": 5}, lora_alpha={"gate_up_proj": 3, "down_proj": 10})
    assert layer.lora_A_gate_up_proj.shape == (EXPERTS, 2, HIDDEN) and layer.lora_B_down_proj.shape == (EXPERTS, HIDDEN, 5)
    assert layer.scaling == {"gate_up_proj": 1.5, "down_proj": 2.0}
    torch.testing.assert_close(found(layer, args), exact(layer, made, args))


@names
def test_it_begins_as_its_base(name):
    for options in ({}, {"use_dora": True}):
        made, args = experts(name), arguments(name)
        with torch.no_grad():
            wanted = made(*args)
            first = LoRAExperts.from_experts(made, r=4, **options)
            torch.testing.assert_close(first(*args), wanted)
            if options:
                for p in first.adapted:
                    norm = first._norms[p].gain(first._frozen(p), *(first._factor(k, p) for k in ("A", "B")), first.scaling[p],
                        first._factor("magnitude_vector", p))  # fmt: skip
                    assert torch.equal(norm, torch.ones_like(norm))


@names
def test_the_plain_gate_is_one_pass_unless_somebody_watches(name):
    made, args = experts(name), arguments(name)
    layer = layer_of(made)
    ran = {decision.op for decision in explain(layer, *args).decisions}
    assert ("gated_activation_forward" in ran) is (name in ("MixtralExperts", "Llama4TextExperts"))
    y, seen = layer(*args), []
    handle = register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        torch.testing.assert_close(layer(*args), y)
    finally:
        handle.remove()
    # the act_fn of gpt-oss is a formula in its _apply_gate
    assert seen == ([layer] if name == "GptOssExperts" else [layer.act_fn, layer])


def test_the_module_goes_on_as_it_was():
    made = experts("GptOssExperts")
    layer = LoRAExperts.from_experts(made.eval())
    assert (layer.num_experts, layer.hidden_size, layer.limit, layer.config) == (EXPERTS, HIDDEN, made.limit, made.config)
    assert layer.gate_up_proj is made.gate_up_proj and not layer.training
    h = torch.randn(3, 2 * INNER)
    assert torch.equal(layer._apply_gate(h), made._apply_gate(h))
    x, index, weights = arguments("GptOssExperts")
    by_name = layer(hidden_states=x, router_indices=index, routing_weights=weights)
    assert torch.equal(by_name, layer(x, index, weights))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        layer.nothing  # noqa: B018
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == list(leaves(layer))


def test_a_gain_is_kept_until_something_changes(monkeypatch):
    counted = []
    monkeypatch.setattr(cache, "expert_weight_norm", lambda *a: counted.append(1) or ops.expert_weight_norm(*a))
    made, args = experts(), arguments("MixtralExperts")
    layer = layer_of(made, use_dora=True)

    def outputs():
        counted.clear()
        with torch.no_grad():
            return layer(*args), len(counted)

    first, computed = outputs()
    again, none = outputs()
    assert computed == 2 and none == 0 and torch.equal(first, again)
    for change in (
        lambda: layer.lora_A_down_proj.data[-1, -1, -1].add_(1),
        lambda: layer.gate_up_proj.data.mul_(2),
        lambda: layer.set_scale(0.5),
        lambda: layer.load_state_dict(layer.state_dict()),
        lambda: refresh(layer),
    ):
        change()
        assert outputs()[1] > 0
        torch.testing.assert_close(found(layer, args), exact(layer, made, args), check_dtype=False, rtol=1e-4, atol=1e-5)


@names
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_merging_and_taking_it_back(name, use_dora):
    made, args = experts(name), arguments(name)
    bases = dict(made.named_parameters())
    with torch.no_grad():
        base = made(*args)
        layer = layer_of(made, use_dora=use_dora)
        wanted = layer(*args)
        state = layer.state_dict()
        layer.merge(safe=True)
        assert layer.merged and layer.state_dict().keys() == made.state_dict().keys()
        torch.testing.assert_close(layer(*args), wanted, rtol=1e-4, atol=1e-4)
        assert not torch.equal(layer(*args), base)
        with layer.adapter_disabled():
            assert torch.equal(layer(*args), base)
        for call in (layer.merge, lambda: layer.set_scale(2), layer.reset_parameters, lambda: layer.load_state_dict(state)):
            with pytest.raises(RuntimeError, match="merge"):
                call()
        layer.double().float()
        plain = layer.plain_layer(True)
        torch.testing.assert_close(plain(*args), wanted, rtol=1e-4, atol=1e-4)
        layer.unmerge()
        assert all(torch.equal(layer.get_parameter(n), p) for n, p in bases.items())
        assert torch.equal(layer(*args), wanted)
        with layer.adapter_disabled():
            assert torch.equal(layer(*args), base)
        plain = layer.plain_layer(False)
        assert type(plain) is type(made) and plain.state_dict().keys() == made.state_dict().keys()
        assert torch.equal(plain(*args), base) and all(p.requires_grad for p in plain.parameters())
        made.requires_grad_(False)
        layer.lora_B_down_proj[0, 0, 0] = torch.inf
        with pytest.raises(ValueError, match="merged down_proj must be finite"):
            layer.merge(safe=True)
        assert not layer.merged


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_torch_save])
def test_a_copy_computes_the_same_and_shares_nothing(copied):
    layer, args = layer_of(experts("GptOssExperts"), use_dora=True), arguments("GptOssExperts")
    for merged in (False, True):
        if merged:
            layer.merge()
        with torch.no_grad():
            wanted = layer(*args)
            other = copied(layer)
            assert torch.equal(other(*args), wanted)
            if merged:
                other.unmerge()
            other.lora_B_down_proj.mul_(2)
            assert torch.equal(layer(*args), wanted) and not torch.equal(other(*args), wanted)


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_goes_round(assign):
    layer, args = layer_of(experts(), use_dora=True), arguments("MixtralExperts")
    state = {n: t.bfloat16() if "magnitude" in n else t for n, t in layer.state_dict().items()}
    assert sorted(state) == sorted([*dict(experts().named_parameters()), *leaves(layer)])
    other = layer_of(experts(), seed=7, use_dora=True)
    with torch.no_grad():
        other(*args)
        other.load_state_dict(copy.deepcopy(state), assign=assign)
        assert other.lora_magnitude_vector_down_proj.dtype is torch.float32
        for p in layer.adapted:
            layer._factor("magnitude_vector", p).copy_(state[f"lora_magnitude_vector_{p}"])
        assert torch.equal(other(*args), layer(*args))
    base = LoRAExperts.from_experts(experts())
    assert base.load_state_dict(experts().state_dict(), strict=False).unexpected_keys == []


def test_casts_keep_the_magnitude():
    layer = layer_of(experts(), use_dora=True)
    before = layer.lora_magnitude_vector_down_proj.clone()
    layer.bfloat16()
    assert layer.lora_A_down_proj.dtype is layer.down_proj.dtype is torch.bfloat16
    assert torch.equal(layer.lora_magnitude_vector_down_proj, before)
    assert layer(*arguments("MixtralExperts", torch.bfloat16)).dtype is torch.bfloat16


def test_made_on_the_meta_device():
    with torch.device("meta"):
        layer = LoRAExperts.from_experts(experts_class("MixtralExperts")(Config()), use_dora=True)
    layer.to_empty(device="cpu")
    layer.load_state_dict(experts().state_dict(), strict=False)
    made = experts()
    torch.manual_seed(3)
    layer.reset_parameters()
    torch.manual_seed(3)
    wanted = LoRAExperts.from_experts(made, use_dora=True)
    assert all(torch.equal(t, wanted.state_dict()[n]) for n, t in layer.state_dict().items() if "gate_up" in n)
    args = arguments("MixtralExperts")
    torch.testing.assert_close(layer(*args), experts()(*args))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    layer, args = layer_of(experts(), use_dora=True), arguments("MixtralExperts")
    wanted = found(layer, args)

    args = [t.detach().requires_grad_() if t.is_floating_point() else t for t in args]
    y = checkpoint(layer, *args, use_reentrant=reentrant)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(4)).to(y)
    y.backward(dy)
    results = {"y": y.detach(), "x": args[0].grad} | {n: p.grad for n, p in leaves(layer).items()}
    assert all(torch.equal(t, wanted[n]) for n, t in results.items())


def test_a_compiled_layer_is_one_graph_with_the_bits_of_eager():
    torch._dynamo.reset()
    for options in ({}, {"use_dora": True}):
        layer, args = layer_of(experts(), **options), arguments("MixtralExperts")
        wanted = found(layer, args)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        args = [t.detach().requires_grad_() if t.is_floating_point() else t for t in args]
        results = gradients_of(compiled(*args), {**leaves(layer), **named(args)})
        assert all(torch.equal(results[n], t) for n, t in wanted.items())
    torch._dynamo.reset()


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_a_change_beside_calls_is_whole(use_dora):
    """A call has one scale for both matrices, and merged weights or adapters."""
    layer, args, states = layer_of(experts(), use_dora=use_dora), arguments("MixtralExperts"), []
    layer.requires_grad_(False)

    def change():
        for scale in (-1, 1):
            layer.set_scale(scale)
            layer.merge()
            layer.unmerge()

    for scale in (-1, 1):
        layer.set_scale(scale)
        states.append(layer(*args))
    wrong, calls = neither(lambda: layer(*args), states, change)
    assert wrong == 0 and calls > 10


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"parameters": ["up_proj"]}, ValueError, "parameters must be some of gate_up_proj, down_proj, found"),
        ({"parameters": []}, ValueError, "parameters must be some of"),
        ({"parameters": "down_proj"}, TypeError, "found the string 'down_proj'"),
        ({"r": 0}, ValueError, "r must be at least 1"),
        ({"r": {"down_proj": 2}}, ValueError, "r must be a number, or one for each of gate_up_proj, down_proj"),
        ({"lora_alpha": "8"}, TypeError, "lora_alpha must be a number"),
        ({"use_dora": 1}, TypeError, "use_dora must be True or False"),
        ({"init_lora_weights": "pissa"}, ValueError, "init_lora_weights must be True, False or 'gaussian'"),
    ],
)
def test_a_bad_option_is_refused_by_name(options, error, says):
    made = experts()
    with pytest.raises(error, match=says):
        LoRAExperts.from_experts(made, **options)
    assert all(p.requires_grad for p in made.parameters())


def test_modules_that_are_no_known_experts_are_refused():
    for module, says in (
        (nn.Linear(3, 3), "Linear has one matrix and no experts"),
        (nn.LayerNorm(3), "the forward of LayerNorm is not known"),
    ):
        with pytest.raises(TypeError, match=says):
            LoRAExperts.from_experts(module)
    for change, says in (
        (lambda m: setattr(m, "r", 3), "has an attribute r"),
        (lambda m: setattr(m, "forward", m.forward), "has a forward of its own"),
        (
            lambda m: setattr(m, "down_proj", nn.Parameter(m.down_proj.data.to(torch.float8_e4m3fn))),
            "down_proj must be float32",
        ),
        (lambda m: setattr(m, "down_proj", nn.Parameter(m.down_proj[1:].detach())), "must be \\[experts, …\\] in one dtype"),
    ):
        made = experts()
        change(made)
        with pytest.raises(TypeError, match=says):
            LoRAExperts.from_experts(made)
