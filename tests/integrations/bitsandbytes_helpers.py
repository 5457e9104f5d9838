"""PEFT models over bitsandbytes' layers on the CPU, and the same models over what their weights
are in float64."""

import copy

import bitsandbytes as bnb
import peft
import torch
from torch import nn

from tests.integrations.fuse_helpers import make_small, randomise, take_over

KINDS = ("nf4", "fp4", "int8")


def quantised_linear(kind, n_in, n_out, bias=True, compute=torch.float32, nested=True, storage=torch.uint8):
    if kind == "int8":
        return bnb.nn.Linear8bitLt(n_in, n_out, bias=bias, has_fp16_weights=False)
    return bnb.nn.Linear4bit(
        n_in, n_out, bias=bias, compute_dtype=compute, quant_type=kind, compress_statistics=nested, quant_storage=storage
    )


class Net(nn.Module):
    """Blocks of 64 numbers end within the rows of none of its layers, as the library's CPU kernels
    want it."""

    def __init__(self, linear):
        super().__init__()
        self.a, self.b = linear(128, 64, True), linear(64, 32, False)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


def model(kind, compute=torch.float32, nested=True, storage=torch.uint8, **lora):
    """A PEFT model over quantised layers, with a random adapter whose outputs are of the size of
    the base's."""
    torch.manual_seed(0)
    net = Net(lambda n_in, n_out, bias: quantised_linear(kind, n_in, n_out, bias, compute, nested, storage)).to("cpu")
    net.is_loaded_in_8bit, net.is_loaded_in_4bit = kind == "int8", kind != "int8"
    made = _with_adapter(net, peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["a", "b"]} | lora))
    randomise(made)
    make_small(made)
    return made


def _with_adapter(net, config):
    """PEFT's own class for a task wants a transformer."""
    return peft.get_peft_model(net, config) if config.task_type is None else peft.PeftModel(net, config)


def exact(quantised):
    """The model over plain layers, in float64, of the numbers that the library itself makes of its
    weights, with the same adapters."""
    made = _with_adapter(Net(nn.Linear), copy.deepcopy(quantised.peft_config["default"]))
    for name, config in quantised.peft_config.items():
        if name != "default":
            made.add_adapter(name, copy.deepcopy(config))
    made.double()
    for name, p in made.named_parameters():
        p.requires_grad_("lora" in name)
    take_over(made, quantised, numbers)
    return made


def numbers(base, dtype=None):
    """W as the library dequantises it for a compute dtype."""
    if isinstance(base, bnb.nn.Linear8bitLt):
        codes, largest = base.weight.data, base.weight.SCB if base.state.SCB is None else base.state.SCB
        # in float32 and then rounded, as its training does
        return (codes.float() * largest[:, None].mul(1 / 127)).to(dtype or torch.float32)
    state = copy.copy(base.weight.quant_state)
    state.dtype = dtype or base.compute_dtype or torch.float32
    return bnb.functional.dequantize_4bit(base.weight.data, state)


def inputs(dtype=torch.float32, rows=7):
    return torch.randn(rows, 128, generator=torch.Generator().manual_seed(2)).to(dtype)


def edits(base):
    """What an optimizer of the base, a loader or a user may do to a base, by name."""
    weight, state = base.weight, getattr(base.weight, "quant_state", None)
    yield "codes", lambda: weight.copy_(weight.flip(0))
    if state is None:
        owner = weight if base.state.SCB is None else base.state
        yield "SCB", lambda: owner.SCB.mul_(2)
        yield "another SCB", lambda: setattr(owner, "SCB", _another(owner.SCB))
        return
    yield "codes by data", lambda: setattr(weight, "data", weight.data.flip(0))
    yield "absmax", lambda: state.absmax.copy_(state.absmax.flip(0))
    yield "another absmax", lambda: setattr(state, "absmax", _another(state.absmax))
    if state.nested:
        yield "nested absmax", lambda: state.state2.absmax.mul_(2)
        yield "another nested absmax", lambda: setattr(state.state2, "absmax", _another(state.state2.absmax))
        yield "offset", lambda: state.offset.add_(0.5)
    yield "another state", lambda: setattr(weight, "quant_state", _doubled(state))


def _another(tensor):
    """Other numbers of the same version."""
    other = tensor.flip(0) * 2
    while other._version < tensor._version:
        other.add_(0)
    return other


def _doubled(state):
    state = copy.deepcopy(state)
    scales = state.state2 if state.nested else state
    scales.absmax = _another(scales.absmax)
    return state
