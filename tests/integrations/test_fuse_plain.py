"""The C++ reading of a plain layer of PEFT's gives what `read_state` and `input_refusal` give, or
nothing, whatever was done to the layer."""

import copy
import sys
from types import MethodType

import pytest
import torch
from fuse_helpers import fused_copy, model
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from lora_kernels import explain
from lora_kernels.integrations.peft.linear import input_refusal, plain_call
from lora_kernels.integrations.peft.state import read_state

pytestmark = pytest.mark.skipif(plain_call is None, reason="the CPU extension is not built")


class Parameter(nn.Parameter):
    """A subclass, which may do anything."""


class Linear(nn.Linear):
    """A subclass, too."""


def inner(layer, group):
    return layer._modules[group]._modules["default"]


def hooked(module):
    module.register_forward_hook(lambda *_: None)


def with_class(module, cls):
    module.__class__ = cls


def with_weight(module, change, name="weight"):
    module._parameters[name] = change(module._parameters[name])


def learns(p, yes=True):
    return nn.Parameter(p.detach(), requires_grad=yes)


def with_lora_bias(layer, group="lora_B"):
    module = inner(layer, group)
    module._parameters["bias"] = nn.Parameter(torch.zeros(module.out_features))


def with_dropout(layer, p, train=True, **options):
    layer._modules["lora_dropout"]._modules["default"] = nn.Dropout(p, **options).train(train)


def second_adapter(layer, active):
    for group in ("lora_A", "lora_B", "lora_dropout"):
        layer._modules[group]._modules["other"] = inner(layer, group)
    layer.scaling["other"] = 3.0
    layer._active_adapter = active


FACTORS = ("lora_A", "lora_B")
PLAIN = {
    "another scale": lambda layer: layer.scaling.update(default=0.25),
    "a whole scale": lambda layer: layer.scaling.update(default=2),
    "a tensor scale": lambda layer: layer.scaling.update(default=torch.tensor(2.0)),
    "dropout": lambda layer: with_dropout(layer, 0.25),
    "dropout in eval mode": lambda layer: with_dropout(layer, 0.25, train=False),
    "the layer in eval mode": lambda layer: setattr(layer, "training", False),
    "dropout within a layer in eval mode": lambda layer: [with_dropout(layer, 0.25), setattr(layer, "training", False)],
    "the active adapter is a name": lambda layer: setattr(layer, "_active_adapter", "default"),
    "a frozen adapter": lambda layer: [with_weight(inner(layer, g), lambda p: learns(p, False)) for g in FACTORS],
    "a base that is a tensor": lambda layer: with_weight(layer.base_layer, torch.Tensor.detach),
    "no bias": lambda layer: with_weight(layer.base_layer, lambda p: None, "bias"),
    "a bias that learns": lambda layer: with_weight(layer.base_layer, learns, "bias"),
    "hooks on the layer": hooked,
}
OTHERS = {
    "disabled": lambda layer: setattr(layer, "_disable_adapters", True),
    "merged": lambda layer: layer.merged_adapters.append("default"),
    "fan_in_fan_out": lambda layer: setattr(layer, "fan_in_fan_out", True),
    "no adapter active": lambda layer: setattr(layer, "_active_adapter", []),
    "an unknown adapter": lambda layer: setattr(layer, "_active_adapter", ["unknown"]),
    "two active adapters": lambda layer: second_adapter(layer, ["default", "other"]),
    "a hook on base_layer": lambda layer: hooked(layer.base_layer),
    "a pre-hook on lora_A": lambda layer: inner(layer, "lora_A").register_forward_pre_hook(lambda *_: None),
    "a hook on lora_B": lambda layer: hooked(inner(layer, "lora_B")),
    "a backward hook on lora_B": lambda layer: inner(layer, "lora_B").register_full_backward_hook(lambda *_: None),
    "a backward pre-hook": lambda layer: layer.base_layer.register_full_backward_pre_hook(lambda *_: None),
    "a hook on lora_dropout": lambda layer: hooked(inner(layer, "lora_dropout")),
    "another forward": lambda layer: setattr(layer.base_layer, "forward", lambda x: x),
    "another forward of lora_dropout": lambda layer: setattr(inner(layer, "lora_dropout"), "forward", lambda x: x),
    "the base's own forward": lambda layer: vars(layer.base_layer).update(
        forward=MethodType(nn.Linear.forward, layer.base_layer)
    ),
    "a base of a subclass": lambda layer: with_class(layer.base_layer, Linear),
    "lora_A of a subclass": lambda layer: with_class(inner(layer, "lora_A"), Linear),
    "lora_B of a subclass": lambda layer: with_class(inner(layer, "lora_B"), Linear),
    "the base learns": lambda layer: with_weight(layer.base_layer, learns),
    "a weight of a subclass": lambda layer: with_weight(layer.base_layer, lambda p: Parameter(p.detach(), False)),
    "a of a subclass": lambda layer: with_weight(inner(layer, "lora_A"), lambda p: Parameter(p.detach())),
    "b of a subclass": lambda layer: with_weight(inner(layer, "lora_B"), lambda p: Parameter(p.detach())),
    "a bias of a subclass": lambda layer: with_weight(layer.base_layer, lambda p: Parameter(torch.ones(40)), "bias"),
    "no weight": lambda layer: with_weight(layer.base_layer, lambda p: None),
    "a base on meta": lambda layer: with_weight(layer.base_layer, lambda p: learns(p.to("meta"), False)),
    "a sparse base": lambda layer: with_weight(layer.base_layer, lambda p: learns(p.to_sparse(), False)),
    "a float64 base": lambda layer: with_weight(layer.base_layer, lambda p: learns(p.double(), False)),
    "an int8 base": lambda layer: with_weight(layer.base_layer, lambda p: p.detach().to(torch.int8)),
    "a of another dtype": lambda layer: with_weight(inner(layer, "lora_A"), lambda p: learns(p.to(torch.float64))),
    "lora_bias": with_lora_bias,
    "a bias of lora_A": lambda layer: with_lora_bias(layer, "lora_A"),
    "an unknown variant": lambda layer: layer.lora_variant.update(default=object()),
    "dropout in place": lambda layer: with_dropout(layer, 0.25, inplace=True),
    "dropout of all": lambda layer: with_dropout(layer, 1.0),
    "another dropout": lambda layer: layer._modules["lora_dropout"]._modules.update(default=nn.AlphaDropout(0.25)),
    "no scale": lambda layer: layer.scaling.pop("default"),
    "no dropout": lambda layer: layer._modules["lora_dropout"]._modules.pop("default"),
    "a magnitude of a subclass": lambda layer: (
        with_weight(inner(layer, "lora_magnitude_vector"), lambda p: Parameter(p.detach()))
        if layer.lora_variant
        else layer.merged_adapters.append("default")
    ),
    "a hook on the magnitude": lambda layer: hooked(
        inner(layer, "lora_magnitude_vector") if layer.lora_variant else layer.base_layer
    ),
    "a layer of a subclass": lambda layer: with_class(layer, type("Sub", (type(layer),), {})),
}
INPUTS = {
    "2-d": lambda x: x,
    "3-d": lambda x: x[None],
    "strided": lambda x: x.repeat(1, 2)[:, ::2],
    "of a subclass": lambda x: Parameter(x),
    "a parameter": nn.Parameter,
    "float64": lambda x: x.double(),
    "int64": lambda x: x.long(),
    "on meta": lambda x: x.to("meta"),
    "None": lambda x: None,
}
BASES = {dora: fused_copy(model(use_dora=dora)).base_model.model.a for dora in (False, True)}
HALF = {dora: fused_copy(model(torch.bfloat16, use_dora=dora)).base_model.model.a for dora in (False, True)}


def changed(dora, half, changes):
    """A layer as PEFT makes it, with some changes."""
    layer = copy.deepcopy((HALF if half else BASES)[dora])
    for change in changes:
        (PLAIN | OTHERS)[change](layer)
    return layer


def truth(layer, x):
    """The state of a call that the kernels run as it is, or None."""
    try:
        state = read_state(layer)
        refused = type(state) is str or input_refusal(layer, x, state) is not None
    except (AttributeError, KeyError, TypeError):  # PEFT's forward raises its own
        return None
    return None if refused else state


def is_same(found, state):
    return len(found) == len(state) and all(one is other or one == other for one, other in zip(found, state, strict=True))


def check(layer, x):
    """Whether it was plain."""
    found, state = plain_call(layer, x), truth(layer, x)
    if found is not None:
        assert state is not None, "the truth is another way"
        assert is_same(found, state)
    return found is not None


def an_input(kind, half):
    return INPUTS[kind](torch.ones(3, 24, dtype=torch.bfloat16 if half else torch.float32))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("change", PLAIN)
def test_what_most_layers_are_is_plain(change, dora):
    assert check(changed(dora, True, [change]), an_input("3-d", True))
    assert check(changed(dora, False, [change]), an_input("2-d", False))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("change", OTHERS)
def test_each_other_state_is_left_to_python(change, dora):
    assert not check(changed(dora, False, [change]), an_input("2-d", False))


@pytest.mark.parametrize("kind", INPUTS)
def test_inputs(kind):
    wanted = kind in ("2-d", "3-d", "strided", "a parameter")
    assert check(changed(False, False, []), an_input(kind, False)) == wanted


def test_an_input_that_peft_would_not_cast():
    layer, x = changed(False, True, []), an_input("2-d", True)
    assert check(layer, x)
    layer.cast_input_dtype_enabled = False
    assert not check(layer, x)


def test_the_layer_that_peft_made_is_not_plain():
    layer = model().base_model.model.a
    assert plain_call(layer, an_input("2-d", False)) is None
    assert plain_call(nn.Linear(24, 40), an_input("2-d", False)) is None
    assert plain_call(None, None) is None


@given(
    dora=st.booleans(),
    half=st.booleans(),
    changes=st.lists(st.sampled_from([*PLAIN, *OTHERS]), max_size=4, unique=True),
    kind=st.sampled_from(list(INPUTS)),
)
@example(dora=True, half=True, changes=["dropout", "the layer in eval mode"], kind="3-d")
@example(dora=False, half=False, changes=["a float64 base"], kind="on meta")
@settings(max_examples=150, deadline=None)
def test_any_states_are_as_python_reads_them(dora, half, changes, kind):
    try:
        layer = changed(dora, half, changes)
    except (AttributeError, KeyError, RuntimeError, TypeError):  # one change undid what another needs
        return
    check(layer, an_input(kind, half))


@pytest.mark.parametrize("dora", [False, True])
def test_no_reference_is_lost_or_kept(dora):
    layer, x = changed(dora, False, ["another scale"]), an_input("2-d", False)
    state = plain_call(layer, x)
    before = [sys.getrefcount(each) for each in state]
    for _ in range(100):
        plain_call(layer, x)
        plain_call(layer, None)
    assert [sys.getrefcount(each) for each in state] == before


def test_explain_still_sees_the_call():
    layer, x = changed(False, False, []), an_input("2-d", False)
    with torch.no_grad():
        assert [each.chosen for each in explain(layer, x).decisions] == ["cpu"]
