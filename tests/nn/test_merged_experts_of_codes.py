"""nn.LoRAExperts over codes, merged to floating weights and to codes again."""

import copy
import importlib
import re
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from lora_kernels.nn import LoRAExperts
from lora_kernels.nn.forms import form_of
from tests.integrations.experts_helpers import Config
from tests.nn.coded_experts import (
    BNB,
    CODES,
    both,
    class_of,
    close,
    dense,
    dense_of,
    layer_over,
    module_of,
    same_bits,
    with_factors_of,
)
from tests.nn.layer_helpers import through_torch_save
from tests.nn.test_lora_experts import arguments
from tests.nn.test_snapshot import neither

pytest.importorskip("bitsandbytes.nn.parametrize")
codes = pytest.mark.parametrize("codes", CODES)
of_library = pytest.mark.parametrize("codes", BNB)


@of_library
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_merged_to_floats(codes, use_dora):
    layer, _, numbers = both(codes, torch.bfloat16, use_dora=use_dora)
    args, names = arguments(class_of(codes)), form_names(layer)
    module = layer._quantised.module
    plain_state = {name: t.clone() for name, t in layer.plain_layer(False).state_dict().items()}
    with torch.no_grad():
        wanted, held = layer(*args), [layer._parameters[name] for name in names]
        with layer.adapter_disabled():
            base = layer(*args)
        for dtype in (None, torch.float32, torch.float16):
            layer.merge(safe=True, dtype=dtype)
            assert all(layer._parameters[name].dtype is (dtype or torch.bfloat16) for name in names)
            assert layer.state_dict().keys() == numbers.state_dict().keys()
            close(layer(*args), wanted, 2e-2)
            with layer.adapter_disabled():
                assert torch.equal(layer(*args), base)
            again = copy.deepcopy(layer)
            again.unmerge()
            assert torch.equal(again(*args), wanted)
            merged = layer.plain_layer(True).to(dtype)
            assert type(merged) is type(numbers) and merged.state_dict().keys() == numbers.state_dict().keys()
            same = [t.to(merged.down_proj.dtype) if t.is_floating_point() else t for t in args]
            close(merged(*same), wanted, 2e-2)
            other = copy.deepcopy(layer).to(torch.float16).to(torch.float32)
            close(other(*args), wanted, 2e-2)
            other.unmerge()
            close(other(*args), wanted, 2e-2)
            layer.unmerge()
            assert all(layer._parameters[name] is p for name, p in zip(names, held, strict=True))
            assert torch.equal(layer(*args), wanted)
        exact_w = layer._merged(names[0], torch.float64)
        layer.merge(dtype=torch.float32)
        close(layer._parameters[names[0]], exact_w, 1e-6)
        layer.unmerge()
    plain = layer.plain_layer(False)
    assert type(plain).__name__ == type(module).__name__ and plain is not module
    state = plain.state_dict()
    state = plain.state_dict()
    assert state.keys() == plain_state.keys() and all(torch.equal(t, plain_state[key]) for key, t in state.items())
    assert all(plain.parametrizations[name].original is p for name, p in zip(names, held, strict=True))
    assert all(torch.equal(dense(plain, name), dense(module, name)) for name in names)


def form_names(layer):
    return layer._quantised.weights


@codes
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_merged_and_quantised_again(codes, use_dora):
    layer, args = layer_over(module_of(codes), use_dora=use_dora), arguments(class_of(codes))
    names, args64 = form_names(layer), [t.double() if t.is_floating_point() else t for t in args]
    held, numbers = {name: layer._parameters[name] for name in names}, dense_of(codes, layer._quantised.module)
    with torch.no_grad():
        wanted = layer(*args)
        exact = {name: layer._merged(name, torch.float32) for name in names}
        error = layer.merge(requantise=True)
        merged = layer._requantised.module
        errors = [float((dense(merged, name) - w).norm() / w.norm()) for name, w in exact.items()]
        assert error == pytest.approx(max(errors)) and 0.01 < error < (0.05 if codes == "fp8" else 0.3)
        for name, w in exact.items():
            getattr(numbers, name).data = dense(merged, name)
            # each block in its own scale: no number is further away than half a step
            assert float((dense(merged, name) - w).abs().max() / w.abs().max()) < 0.25
        close(layer(*args), numbers.double()(*args64))
        y = layer(*args)
        assert {*layer.state_dict()} == {*module_of(codes).state_dict()}
        for again in (copy.deepcopy(layer), through_torch_save(layer), layer.to(torch.float16).float()):
            close(again(*args), y, 3e-3)
        plain = layer.plain_layer(True)
        assert type(plain).__name__ == type(module_of(codes)).__name__
        assert all(same_bits(t, layer.state_dict()[key]) for key, t in plain.state_dict().items())
        assert all(torch.equal(dense(plain, name), dense(merged, name)) for name in names)
        with layer.adapter_disabled():
            base = layer(*args)
        layer.unmerge()
        assert all(layer._parameters[name] is p for name, p in held.items())
        close(layer(*args), wanted, 2e-3)
        with layer.adapter_disabled():
            assert torch.equal(layer(*args), base)


def test_what_merge_refuses():
    layer = layer_over(module_of("nf4"))
    with pytest.raises(TypeError, match="merge: dtype must be float32"):
        layer.merge(dtype=torch.int8)
    with torch.no_grad():
        layer.lora_B_down_proj[0, 0, 0] = torch.inf
    for options in ({"safe": True}, {"requantise": True}):
        with pytest.raises(ValueError, match="merged down_proj must be finite"):
            layer.merge(**options)
    assert not layer.merged
    fp8 = layer_over(module_of("fp8"))
    for call in (fp8.merge, fp8.check_merge, lambda: fp8.plain_layer(True)):
        with pytest.raises(NotImplementedError, match="FP8Experts have no floating form: requantise=True merges to codes"):
            call()
    assert not fp8.merged and type(fp8.plain_layer(False)) is type(fp8._quantised.module)


def test_a_change_beside_calls_is_whole():
    """A call has one scale for both matrices, and merged weights, codes again, or adapters."""
    layer, args, states = layer_over(module_of("nf4"), use_dora=True), arguments("MixtralExperts"), []
    layer.requires_grad_(False)

    def change():
        for scale in (-1, 1):
            layer.set_scale(scale)
            layer.merge(requantise=scale > 0)
            layer.unmerge()

    for scale in (-1, 1):
        layer.set_scale(scale)
        states.append(layer(*args))
        layer.merge(requantise=scale > 0)
        states.append(layer(*args))
        layer.unmerge()
    wrong, calls = neither(lambda: layer(*args), states, change)
    assert wrong == 0 and calls > 10


@pytest.mark.slow
def test_all_models_of_transformers():
    """Of every class that has transformers' interface and a known loop."""
    library = pytest.importorskip("bitsandbytes.nn.parametrize")
    args, done = arguments("MixtralExperts"), 0
    for file in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        for name in re.findall(r"^@use_experts_implementation.*\nclass (\w+)\(", file.read_text(), re.MULTILINE):
            torch.manual_seed(0)
            cls = getattr(importlib.import_module(f"transformers.models.{file.parent.name}.{file.stem}"), name)
            numbers = cls(Config())
            for p in numbers.parameters():
                nn.init.normal_(p, std=0.3)
            if isinstance(form := form_of(numbers), str):
                continue
            module = copy.deepcopy(numbers)
            for parameter in form.weights:
                library.replace_parameter_4bit(module, parameter)
                getattr(numbers, parameter).data = dense(module, parameter)
            layer = layer_over(module, use_dora=True)
            other = with_factors_of(LoRAExperts.from_experts(numbers, r=3, lora_alpha=5, use_dora=True), layer)
            with torch.no_grad():
                wanted = other(*args)
                close(layer(*args), wanted)
                layer.merge()
                close(layer(*args), wanted)
                close(layer.plain_layer(True)(*args), wanted)
            done += 1
    assert done > 60
