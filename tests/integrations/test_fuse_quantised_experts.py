"""Experts of codes (bitsandbytes' parametrizations) under PEFT's `target_parameters`.

Of two such wrappers stock PEFT 0.21.2 leaves out the inner one's adapter, for the numbers are kept
before it is there. Its own parametrization stays after a call, so that the next one adds BA twice.
So PEFT's layers over the numbers are what is compared with, and of one wrapper the first call.
"""

import copy

import pytest
import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from lora_kernels import fuse, unfuse
from lora_kernels.integrations.peft.parameters import NESTED_HOOKS
from lora_kernels.ops.quantised import QuantisedWeight
from tests.integrations import experts_helpers
from tests.integrations.experts_helpers import (
    GATED,
    OUTER,
    Block,
    Config,
    adapted,
    block,
    choices,
    exact,
    experts_class,
    fused_of,
    inputs,
)
from tests.integrations.fuse_helpers import errs_as_stock, gradients

parametrize = pytest.importorskip("bitsandbytes.nn.parametrize")


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    """Where a block is longer than a row, numbers that the library makes on the CPU are wrong."""
    for name in ("HIDDEN", "INNER"):
        monkeypatch.setattr(experts_helpers, name, 64)


def block_of_codes(name="Qwen3MoeExperts", implementation="eager", dtype=torch.float32, codes=GATED, targets=GATED, **options):
    """A block over codes, and the same over their numbers, both under PEFT."""
    torch.manual_seed(0)
    experts = experts_class(name)(Config(implementation))
    for p in experts.parameters():
        nn.init.normal_(p, std=0.3)
    one = Block(experts, choices()).to(dtype)
    dense = copy.deepcopy(one)
    for target in codes:
        parameter = target.rpartition(".")[-1]
        parametrize.replace_parameter_4bit(one.experts, parameter, **options)
        getattr(dense.experts, parameter).data = getattr(one.experts, parameter).detach().clone()
    one, dense = (adapted(each, target_parameters=targets) for each in (one, dense))
    ours, theirs = wrappers(one), wrappers(dense)
    for parameter, wrapper in ours.items():
        for name in ("lora_A", "lora_B"):
            getattr(theirs[parameter], name).load_state_dict(getattr(wrapper, name).state_dict())
    return one, dense


def wrappers(one):
    """PEFT's layers by parameter; how they lie around each other follows how it is kept."""
    return {m.parameter_name: m for m in one.modules() if isinstance(m, ParamWrapper)}


def named(one, found):
    """Gradients by the name of the parameter."""
    names = {id(p): f"{parameter}.{name}" for parameter, m in wrappers(one).items() for name, p in m.named_parameters()
             if "base_layer" not in name}  # fmt: skip
    of = {name: names.get(id(p), name) for name, p in one.named_parameters()}
    return {of.get(name, name): found[name] for name in sorted(found, key=lambda name: of.get(name, name))}


@pytest.mark.parametrize("name", ["Qwen3MoeExperts", "MixtralExperts", "GptOssExperts"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_outputs_and_gradients(name, dtype):
    for implementation, options in (
        ("eager", {"quant_type": "fp4"}),
        ("grouped_mm", {"quant_type": "nf4", "compress_statistics": True}),
    ):
        stock, dense = block_of_codes(name, implementation, dtype, blocksize=64, **options)
        x = inputs(dtype)
        fused, report = fused_of(stock)
        with torch.no_grad():
            frozen = fused(x)
        for _ in range(2):
            found = gradients(fused, x)
        truth, theirs = (named(dense, each) for each in (exact(dense, x), gradients(dense, x)))
        found = named(fused, found)
        assert not report.left and not report.fallbacks() and set(report.fused.values()) == {"cpu"}
        assert list(found) == list(theirs) and len(found) == 7 and frozen.equal(found["y"])
        errs_as_stock(found, theirs, truth)


def test_one_of_two_weights():
    """Of codes, or with an adapter, as a first call of PEFT's computes it."""
    for options in ({"codes": GATED[:1]}, {"targets": GATED[:1]}, {"targets": GATED[1:]}):
        stock, dense = block_of_codes(**options)
        fused, report = fused_of(stock)
        found, truth = named(fused, gradients(fused, inputs())), named(dense, exact(dense, inputs()))
        assert not report.fallbacks()
        other = stock if "targets" in options else dense
        theirs = named(other, gradients(other, inputs()))
        assert list(found) == list(theirs)
        errs_as_stock(found, theirs, truth)


def test_no_numbers_of_all_experts(monkeypatch):
    """Neither the library nor this package makes them."""
    stock, _ = block_of_codes()
    fused, report = fused_of(stock)
    for owner, name in ((parametrize.F, "dequantize_4bit"), (QuantisedWeight, "dequantise")):
        monkeypatch.setattr(owner, name, lambda *_: pytest.fail("all numbers are made"))
    gradients(fused, inputs())
    assert not report.fallbacks()


def test_autocast_and_checkpoints():
    stock, dense = block_of_codes()
    fused, report = fused_of(stock)
    with torch.autocast("cpu", torch.bfloat16):
        y = fused(inputs())
    with torch.autocast("cpu", torch.bfloat16):
        wanted = fused_of(dense)[0](inputs())
    assert y.dtype is wanted.dtype
    torch.testing.assert_close(y, wanted, rtol=0.05, atol=0.05 * wanted.abs().max().item())
    found = gradients(fused, inputs())
    x = inputs().requires_grad_()
    fused.zero_grad()
    y = torch.utils.checkpoint.checkpoint(fused, x, use_reentrant=False)
    (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(5))).sum().backward()
    assert x.grad.equal(found["x"]) and not report.fallbacks()


def test_what_peft_must_run():
    for spoil, reason in (
        (lambda m: m.register_forward_hook(lambda *_: None), NESTED_HOOKS),
        (lambda m: setattr(m.parametrizations.down_proj[0].quant_state, "packing_format_for_cpu", True), "packed down_proj"),
        (lambda m: nn.utils.parametrize.register_parametrization(m, "down_proj", nn.Identity()), "another parametrization"),
    ):
        stock, _ = block_of_codes()
        spoil(stock.base_model.model.experts.get_base_layer())
        report = fuse(copy.deepcopy(stock))
        assert reason in report.left[OUTER], report.left


def test_what_stock_calls_leave_behind_is_not_run_twice():
    """A parametrization of PEFT's own that stayed on the parameter."""
    stock, _ = block_of_codes()
    with pytest.warns(UserWarning, match="Could not find any LoRA parametrization"):
        stock(inputs())
    assert fuse(stock).left[OUTER] == "another parametrization is on the module"


def test_names_and_states_stay():
    stock, _ = block_of_codes()
    fused, _ = fused_of(stock)
    assert fused.state_dict().keys() == stock.state_dict().keys()
    unfuse(fused)
    assert type(fused.base_model.model.experts) is type(stock.base_model.model.experts)
    with fused.disable_adapter(), stock.disable_adapter():
        assert fused(inputs()).equal(stock(inputs()))
    assert fuse(block()).left == {}
