"""nn.LoRAExperts over codes: against float64 of the numbers that the codes stand for, and through
all that a layer is put through."""

import copy
import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_kernels import ops
from lora_kernels.nn import LoRAExperts
from lora_kernels.nn.quantised_experts_base import QuantisedExperts
from lora_kernels.ops.expert_weight_norm import cache
from lora_kernels.testing.poison import poisoned
from tests.integrations.experts_helpers import EXPERTS, HIDDEN, experts_class
from tests.nn.coded_experts import (
    BNB,
    CODES,
    both,
    class_of,
    close,
    dense,
    dense_of,
    fp8_of,
    layer_over,
    module_of,
    mxfp4_of,
    no_numbers,
    same_bits,
    with_factors_of,
)
from tests.nn.layer_helpers import through_pickle, through_torch_save
from tests.nn.test_lora_experts import arguments, exact, experts, found, gradients_of, leaves, named

pytest.importorskip("bitsandbytes.nn.parametrize")
codes = pytest.mark.parametrize("codes", CODES)
GATED = ["gate_up_proj", "down_proj"]
OPTIONS = [{"use_dora": True}, {"use_dora": True, "detach_norm": False}, {}]


@codes
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_outputs_and_gradients(codes, options):
    for dtype, bound in ((torch.float64, 1e-11), (torch.float32, 3e-6), (torch.bfloat16, 3e-2)):
        layer, over_numbers, numbers = both(codes, dtype, **options)
        args = arguments(class_of(codes), dtype)
        with poisoned():
            results = found(layer, args)
        others = found(over_numbers, args)
        for key, wanted in exact(over_numbers, numbers, args).items():
            error, its = (float((each[key].double() - wanted).norm() / wanted.norm()) for each in (results, others))
            least = 3e-7 if results[key].dtype is torch.float32 else 0  # its rounding
            assert error < max(bound / 10, least, 1.5 * its), f"{key} in {dtype}: {error}, over numbers {its}"
        with torch.no_grad():
            close(layer(*args), results["y"], bound)


@pytest.mark.parametrize("kind", ["nested", "fp8", "mxfp4"])
def test_sizes_of_models_err_as_numbers_do(kind):
    """Tiles of 128 × 128, the last of them smaller, and blocks within rows."""
    library = pytest.importorskip("bitsandbytes.nn.parametrize")
    sizes = {"num_local_experts": 4, "hidden_size": 256, "intermediate_size": 192, "moe_intermediate_size": 192}
    config = SimpleNamespace(**sizes, hidden_act="silu", _experts_implementation="eager", dtype=torch.bfloat16)
    torch.manual_seed(0)
    numbers = experts_class("MixtralExperts")(config)
    for p in numbers.parameters():
        nn.init.normal_(p, std=256**-0.5)
    if kind == "fp8":
        # 192 numbers are a tile and a half
        module = fp8_of({name: getattr(numbers, name) for name in GATED}, (128, 128), config)
    elif kind == "mxfp4":
        module = mxfp4_of(config)
    else:
        module = copy.deepcopy(numbers.bfloat16())
        for name in GATED:
            library.replace_parameter_4bit(module, name, compress_statistics=True)
    for name in GATED:
        getattr(numbers, name).data = dense(module, name, torch.bfloat16)
    layer = layer_over(module, r=16, use_dora=True)
    over_numbers = with_factors_of(LoRAExperts.from_experts(copy.deepcopy(numbers), r=16, lora_alpha=5, use_dora=True), layer)
    draw = torch.Generator().manual_seed(1)
    index = torch.stack([torch.randperm(4, generator=draw)[:2] for _ in range(40)])
    args = torch.randn(40, 256, generator=draw).bfloat16(), index, torch.rand(40, 2, generator=draw)
    mine, its = found(layer, args), found(over_numbers, args)
    for key, wanted in exact(over_numbers, numbers, args).items():
        error, allowed = (float((each[key].double() - wanted).norm() / wanted.norm()) for each in (mine, its))
        assert error < 1.3 * allowed + 1e-6, f"{key}: {error}, over numbers {allowed}"
    with torch.no_grad():
        exact_w = layer._merged("down_proj", torch.float32)
        state = layer.state_dict()
        error = layer.merge(requantise=True)
        merged = dense(layer._requantised.module, "down_proj")
        assert float((merged - exact_w).norm() / exact_w.norm()) <= error * (1 + 1e-5) < 0.3
        close(layer(*args), with_merged(numbers, layer)(*args), 3e-2)
        layer.unmerge()
        again = layer_over(copy.deepcopy(layer).plain_layer(False), seed=9, r=16, use_dora=True)
        again.load_state_dict(state)
        assert torch.equal(again(*args), layer(*args))


def with_merged(numbers, layer):
    """A module of numbers with those of the merged codes."""
    other = copy.deepcopy(numbers)
    for name in GATED:
        getattr(other, name).data = dense(layer._requantised.module, name, torch.bfloat16)
    return other


@codes
def test_no_numbers_of_all_experts(codes, monkeypatch):
    """Neither the library nor this package makes them, with the adapter or without."""
    layer, args = layer_over(module_of(codes), use_dora=True), arguments(class_of(codes))
    no_numbers(monkeypatch)
    found(layer, args)
    with torch.no_grad(), layer.adapter_disabled():
        layer(*args)


@codes
def test_it_begins_as_its_base(codes):
    module, args = module_of(codes), arguments(class_of(codes))
    numbers = dense_of(codes, module)
    torch.manual_seed(3)
    layer = LoRAExperts.from_experts(module, r=4, use_dora=True)
    torch.manual_seed(3)
    other = LoRAExperts.from_experts(copy.deepcopy(numbers), r=4, use_dora=True)
    for name, p in leaves(other).items():
        torch.testing.assert_close(leaves(layer)[name], p, msg=name)
    with torch.no_grad():
        close(layer(*args), numbers(*args))
        for p in layer.adapted:
            gain = layer._gain(p, layer._weight_in(p), layer._factor("A", p), layer._factor("B", p))
            assert torch.equal(gain, torch.ones_like(gain))
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == list(leaves(layer))


@codes
def test_without_the_adapter(codes):
    layer, _, numbers = both(codes, use_dora=True)
    args = arguments(class_of(codes))
    y = layer(*args)
    with layer.adapter_disabled():
        plain = [t.detach().requires_grad_() if t.is_floating_point() else t for t in args]
        mine = gradients_of(layer(*plain), named(plain))
    plain = [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in args]
    for key, wanted in gradients_of(numbers.double()(*plain), named(plain)).items():
        close(mine[key], wanted)
    assert torch.equal(layer(*args), y) and not torch.allclose(mine["y"], y, rtol=1e-2)


def test_a_gain_is_kept_until_something_changes(monkeypatch):
    counted = []
    monkeypatch.setattr(cache, "expert_weight_norm", lambda *a: counted.append(1) or ops.expert_weight_norm(*a))
    for kind in ("nested", "fp8"):
        layer, args = layer_over(module_of(kind), use_dora=True), arguments(class_of(kind))

        def outputs(layer=layer, args=args):
            counted.clear()
            with torch.no_grad():
                return layer(*args), len(counted)

        first, computed = outputs()
        again, none = outputs()
        assert computed == 2 and none == 0 and torch.equal(first, again)
        layer.lora_A_down_proj.data[0, 0, 0].add_(1)
        changed, computed = outputs()
        assert computed == 1 and not torch.equal(changed, first)
        held = layer._quantised
        with torch.no_grad():
            (held.state("down_proj").absmax if kind == "nested" else layer.down_proj_scale_inv).fill_(1)
        numbers = dense_of(kind, held.module)
        args64 = [t.double() if t.is_floating_point() else t for t in args]
        wanted = with_factors_of(LoRAExperts.from_experts(numbers.double(), r=3, lora_alpha=5, use_dora=True), layer)
        close(outputs()[0], wanted(*args64))


@codes
def test_x_of_other_dtypes(codes):
    layer, args = layer_over(module_of(codes), use_dora=True), arguments(class_of(codes))
    with torch.no_grad():
        wanted = layer(*args)
        for dtype in (torch.float16, torch.bfloat16, torch.float64):
            y = layer(*(t.to(dtype) if t.is_floating_point() else t for t in args))
            assert y.dtype is dtype
            close(y, wanted, 3e-2)
        with torch.autocast("cpu", torch.bfloat16):
            close(layer(*args), wanted, 3e-2)
            assert not torch.equal(layer(*args), wanted)


def test_an_implementation_that_casts():
    module = module_of("nf4", torch.bfloat16)
    module.config._experts_implementation = "grouped_mm"
    layer, args = layer_over(module), arguments("MixtralExperts")
    half = [args[0].bfloat16(), args[1], args[2]]
    assert layer(*args).dtype is torch.float32 and torch.equal(layer(*args).bfloat16(), layer(*half))


@codes
def test_state_dicts(codes):
    """The names and parts that the library has; another layer's codes with all that they mean."""
    module = module_of(codes)
    library = {name: t.clone() for name, t in module.state_dict().items()}
    layer, args = layer_over(module, use_dora=True), arguments(class_of(codes))
    state = {name: t.clone() for name, t in layer.state_dict().items()}
    assert {*state} == {*library, *leaves(layer)} and all(torch.equal(state[name], t) for name, t in library.items())
    for assign in (False, True):
        other = layer_over(module_of(codes, seed=5), seed=7, use_dora=True)
        with torch.no_grad():
            assert not torch.allclose(other(*args), layer(*args), rtol=1e-2)
            missing, unexpected = other.load_state_dict({n: t.clone() for n, t in state.items()}, assign=assign)
            assert not missing and not unexpected and torch.equal(other(*args), layer(*args))
            assert all(torch.equal(t, state[name]) for name, t in other.state_dict().items())
            other.load_state_dict({n: t.clone() for n, t in library.items()}, strict=False)
            assert torch.equal(other(*args), layer(*args))
    if codes in BNB:
        name = layer.adapted[0]
        bare = {key: t for key, t in state.items() if not key.startswith(f"{name}.")}
        with pytest.raises(RuntimeError, match=f"{name} has codes, and the state_dict nothing that says what they mean"):
            layer.load_state_dict(bare)
        other = next(each for each in layer.adapted if dense(module, each).shape != dense(module, name).shape)
        wrong = {key.replace(f"{name}.", f"{other}."): t for key, t in state.items() if not key.startswith(f"{other}.")}
        with pytest.raises(RuntimeError, match=f"{other}: the codes are of a weight "):
            layer.load_state_dict(wrong | {f"{other}": state[other]}, strict=False)


@codes
@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_torch_save])
def test_a_copy_computes_the_same_and_shares_nothing(codes, copied):
    if codes == "fp8" and copied is through_pickle:
        pytest.skip("torch pickles no float8 but by torch.save")
    layer, args = layer_over(module_of(codes), use_dora=True), arguments(class_of(codes))
    with torch.no_grad():
        wanted = layer(*args)
        other = copied(layer)
        assert torch.equal(other(*args), wanted)
        for name in layer._quantised.names:
            assert other._quantised.parameter(name) is other._parameters[name] is not layer._parameters[name]
            other._parameters[name].data.view(torch.uint8).fill_(17)
        assert torch.equal(layer(*args), wanted) and not torch.equal(other(*args), wanted)
        with other.adapter_disabled():
            other(*args)
        plain = other.plain_layer(False)
        assert type(plain).__name__ == type(layer.plain_layer(False)).__name__
        assert plain.state_dict().keys() == layer.plain_layer(False).state_dict().keys()


@codes
def test_casts_and_moves(codes):
    layer, args = layer_over(module_of(codes), use_dora=True), arguments(class_of(codes))
    names = layer._quantised.names
    before = {name: (p, p.detach().clone()) for name, p in layer.named_parameters()}
    with torch.no_grad():
        wanted = layer(*args)
        for change in (lambda: layer.to("cpu"), layer.double, layer.float, layer.half, lambda: layer.to(torch.bfloat16)):
            change()
        for name, (_, value) in before.items():
            now = layer.get_parameter(name)
            if name in names or name.endswith("_scale_inv") or "magnitude" in name:
                assert same_bits(now, value), name
            else:
                assert now.dtype is torch.bfloat16, name
        layer.float()
        close(layer(*args), wanted, 2e-2)
    held = layer._quantised
    assert all(held.parameter(name) is layer._parameters[name] for name in held.parameters())


@pytest.mark.parametrize("only", [["gate_up_proj"], ["down_proj"]], ids=str)
@pytest.mark.parametrize("adapted", [None, ["gate_up_proj"], ["down_proj"]], ids=str)
def test_one_matrix_of_codes(only, adapted):
    layer, over_numbers, numbers = both("nf4", module=module_of("nf4", only=only), parameters=adapted, use_dora=True)
    args = arguments("MixtralExperts")
    results = found(layer, args)
    for key, wanted in exact(over_numbers, numbers, args).items():
        close(results[key], wanted)
    state = layer.state_dict()
    other = layer_over(module_of("nf4", seed=3, only=only), seed=5, parameters=adapted, use_dora=True)
    other.load_state_dict(copy.deepcopy(state))
    with torch.no_grad():
        assert torch.equal(other(*args), results["y"])
        with layer.adapter_disabled():
            base = layer(*args)
        close(base, numbers(*args))
        layer.merge()
        close(layer(*args), results["y"])
        again = copy.deepcopy(layer)
        still = [name for name in only if name not in layer.adapted]
        assert {key.partition(".")[0] for key in layer.state_dict() if "." in key} == {*still}
        with again.adapter_disabled():
            assert torch.equal(again(*args), base)
        plain = layer.plain_layer(True)
        assert [*getattr(plain, "parametrizations", [])] == still
        again.unmerge()
        assert torch.equal(again(*args), results["y"])
    with pytest.raises(TypeError, match=f"x must have the dtype of {layer.adapted[0]}, torch.float32, found torch.bfloat16"):
        again(args[0].bfloat16(), *args[1:])
    again.bfloat16()
    close(again(args[0].bfloat16(), *args[1:]), results["y"], 3e-2)


def test_parameters_that_a_move_replaces():
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        for kind in ("nested", "fp8"):
            layer, args = layer_over(module_of(kind)), arguments(class_of(kind))
            before, wanted = dict(layer._parameters), layer(*args)
            layer.double().float()
            held = layer._quantised
            assert all(layer._parameters[name] is not before[name] for name in held.names)
            assert all(held.parameter(name) is layer._parameters[name] for name in held.parameters())
            close(layer(*args), wanted)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def test_scales_that_must_be_copied_are_followed():
    module, args = module_of("fp8"), arguments("MixtralExperts")
    module.down_proj_scale_inv.data = module.down_proj_scale_inv.data.bfloat16()
    layer = layer_over(module)
    with torch.no_grad():
        layer(*args)
        layer.down_proj_scale_inv.mul_(3)
        again = with_factors_of(LoRAExperts.from_experts(dense_of("fp8", module), r=3, lora_alpha=5), layer)
        close(layer(*args), again(*args))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    layer, args = layer_over(module_of("nf4"), use_dora=True), arguments("MixtralExperts")
    wanted = found(layer, args)
    args = [t.detach().requires_grad_() if t.is_floating_point() else t for t in args]
    y = checkpoint(layer, *args, use_reentrant=reentrant)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(4)))
    results = {"y": y.detach(), "x": args[0].grad} | {n: p.grad for n, p in leaves(layer).items()}
    assert all(torch.equal(t, wanted[n]) for n, t in results.items())


@pytest.mark.parametrize("kind", ["nested", pytest.param("fp8", marks=pytest.mark.slow)])
def test_a_compiled_layer_is_one_graph_with_the_bits_of_eager(kind):
    torch._dynamo.reset()
    layer, args = layer_over(module_of(kind), use_dora=True), arguments(class_of(kind))
    wanted = found(layer, args)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    args = [t.detach().requires_grad_() if t.is_floating_point() else t for t in args]
    results = gradients_of(compiled(*args), {**leaves(layer), **named(args)})
    assert all(torch.equal(results[n], t) for n, t in wanted.items())
    torch._dynamo.reset()


@codes
def test_bad_calls_are_refused(codes):
    """Of the experts that the codes are of, however they lie."""
    layer, (x, *routing) = layer_over(module_of(codes)), arguments(class_of(codes))
    for call in (layer, layer_off(layer)):
        if not routing:
            with pytest.raises(ValueError, match=f"as many tokens of {HIDDEN} features for each of the {EXPERTS} experts, f"):
                call(x[1:])
            continue
        index, weights = routing
        with pytest.raises(ValueError, match=f"index must hold numbers of experts up to {EXPERTS}, found {EXPERTS + 1}"):
            call(x, index.clone().fill_(EXPERTS + 1), weights)
        with pytest.raises(TypeError, match=r"wanted are three tensors, \(x, index, weights\), found \(Tensor, Tensor\)"):
            call(x, index)


def layer_off(layer):
    def call(*args):
        with layer.adapter_disabled():
            return layer(*args)

    return call


def test_codes_that_cannot_be_read():
    module = module_of("nf4")
    module.parametrizations.down_proj[0].quant_state.packing_format_for_cpu = True
    with pytest.raises(TypeError, match="LoRAExperts: down_proj of MixtralExperts cannot be read: bitsandbytes has packed"):
        LoRAExperts.from_experts(module)
    module = module_of("nf4")
    nn.utils.parametrize.register_parametrization(module, "down_proj", nn.Identity())
    with pytest.raises(TypeError, match="LoRAExperts: another parametrization is on the module"):
        LoRAExperts.from_experts(module)
    module = module_of("fp8")
    module.activation_scheme = "static"
    with pytest.raises(TypeError, match="gate_up_proj of FP8Experts cannot be read: the float8 experts have fixed scales"):
        LoRAExperts.from_experts(module)
    assert QuantisedExperts.of(experts(), ("gate_up_proj", "down_proj")) is None


def test_codes_that_cannot_be_read_any_more():
    layer, args = layer_over(module_of("nf4")), arguments("MixtralExperts")
    layer(*args)
    layer._quantised.state("down_proj").packing_format_for_cpu = True
    with pytest.raises(RuntimeError, match=re.escape("MixtralExperts: bitsandbytes has packed down_proj")):
        layer(*args)
