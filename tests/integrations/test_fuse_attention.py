"""PEFT's MultiheadAttention: outputs, attention weights and gradients are PEFT's."""

import pytest
import torch
from attention_helpers import HEADS, NAME, QUERIES, Net, made, masks, right, tensors
from torch import nn

from lora_kernels import fuse
from lora_kernels.integrations.peft import FusedMultiheadAttention

OPTIONS = [
    {},
    {"bias": False},
    {"batch_first": True},
    {"add_bias_kv": True},
    {"add_zero_attn": True, "batch_first": True},
    {"add_zero_attn": True, "add_bias_kv": True, "heads": 3},
]


@pytest.mark.parametrize("call", [{}, {"average_attn_weights": False}, {"need_weights": False}], ids=str)
@pytest.mark.parametrize("which", ["self", "cross", "three", "unbatched"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_and_inputs(options, which, call):
    stock = made(**options)
    qkv = tensors(which, batch_first=options.get("batch_first", False))
    fused, report = right(stock, qkv, **call)
    assert type(fused.base_model.model.attention) is FusedMultiheadAttention and report.fused[NAME] == "cpu"
    right(stock.eval(), qkv, **call)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks(kind, need_weights, batch_first):
    padding, each = masks(kind)
    qkv, more = tensors(batch_first=batch_first), {"need_weights": need_weights}
    for stock in (made(batch_first=batch_first), made(batch_first=batch_first, add_bias_kv=True, add_zero_attn=True).eval()):
        for call in (
            {"key_padding_mask": padding},
            {"attn_mask": each[0]},
            {"attn_mask": each},
            {"key_padding_mask": padding, "attn_mask": each},
            {"key_padding_mask": padding, "attn_mask": each[0]},
        ):
            right(stock, qkv, **call, **more)
    right(made(), tensors("unbatched"), key_padding_mask=padding[0], attn_mask=each[:HEADS], **more)


@pytest.mark.parametrize("need_weights", [False, True])
def test_causal(need_weights):
    mask = nn.Transformer.generate_square_subsequent_mask(QUERIES)
    for padding in (None, masks("float")[0]):
        for stock in (made(), made(batch_first=True).eval()):
            qkv = tensors(batch_first=stock.base_model.model.attention.batch_first)
            right(stock, qkv, attn_mask=mask, is_causal=True, key_padding_mask=padding, need_weights=need_weights)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("case", ["bfloat16", "bfloat16 alone", "float16", "float64"])
def test_dtypes(case, need_weights):
    dtype = getattr(torch, case.split()[0])
    stock = made(dtype, adapter_dtype="alone" not in case, batch_first=True)
    padding, each = masks("float", dtype)
    qkv = tensors("self", dtype, True)
    right(stock, qkv, need_weights=need_weights)
    right(stock, qkv, need_weights=need_weights, key_padding_mask=padding, attn_mask=each)
    right(stock, tensors("three", dtype, True), need_weights=need_weights)


@pytest.mark.parametrize("need_weights", [False, True])
def test_a_real_size(need_weights):
    stock = made(net=Net(256, 8, batch_first=True), values={"r": 16})
    x = torch.randn(4, 60, 256, generator=torch.Generator().manual_seed(2))
    right(stock, (x, x, x), 3, need_weights=need_weights)


@pytest.mark.parametrize("need_weights", [False, True])
def test_dropout_draws_pefts_masks(need_weights):
    stock = made(dropout=0.4, values={"lora_dropout": 0.6}).train()
    right(stock, tensors("cross"), need_weights=need_weights)
    right(stock.eval(), tensors("cross"), need_weights=need_weights)


def test_biases():
    """The bias of in_proj's lora_B does nothing in PEFT, that of out_proj's has no gradient."""
    fused, _ = right(made(values={"lora_bias": True}), tensors())
    assert not any(p.grad is not None for n, p in fused.named_parameters() if "lora_B" in n and "bias" in n)
    stock = made(add_bias_kv=True)
    for name in ("in_proj_bias", "bias_k", "bias_v"):
        getattr(stock.base_model.model.attention.base_layer, name).requires_grad_()
    fused, _ = right(stock, tensors())
    assert {"in_proj_bias", "bias_k"} < {n.split(".")[-1] for n, p in fused.named_parameters() if p.grad is not None}
    without = made(values={"lora_bias": True}, bias=False)
    assert fuse(without).left == {NAME: "lora_bias of out_proj beside no bias of its base"}


def test_rslora_scales_and_rank_patterns():
    values = {"use_rslora": True, "rank_pattern": {"attention": 3}, "alpha_pattern": {"attention": 5}}
    stock = made(values=values)
    stock.base_model.model.attention.scale_layer(1.5)
    right(stock, tensors())
