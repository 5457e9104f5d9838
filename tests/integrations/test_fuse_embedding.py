"""PEFT's embedding: outputs, gradients, steps and state are PEFT's, and what stays PEFT's is
named."""

import copy
import pickle

import peft
import pytest
import torch
from fuse_helpers import errs_as_stock, randomise
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from lora_kernels import fuse, refresh, unfuse
from lora_kernels.integrations.peft import FusedEmbedding

ENTRIES, DIM, PREFIX = 37, 24, "base_model.model."


class Words(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.words = nn.Embedding(ENTRIES, DIM, **options)

    def forward(self, ids):
        return self.words(ids)


def made(dtype=torch.float32, adapter_dtype=True, options=None, **values):
    torch.manual_seed(0)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["words"]} | values)
    one = peft.get_peft_model(Words(**(options or {})).to(dtype), config, autocast_adapter_dtype=adapter_dtype)
    fill(one)
    return one


def fill(one, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in one.named_parameters():
            if "lora_embedding" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.5)
            if "magnitude" in name:
                p.mul_(torch.rand(p.shape, generator=generator) + 0.5)


def ids(*shape):
    found = torch.randint(ENTRIES, shape or (3, 11), generator=torch.Generator().manual_seed(2))
    return found.masked_fill(found == 5, 7)


def results(one, x, dy_dtype=None):
    one.zero_grad(set_to_none=True)
    y = one(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    y.backward(dy.to(y.dtype))
    return {"y": y.detach()} | {n: p.grad for n, p in one.named_parameters() if p.grad is not None}


def right(stock, x=None, times=1.6):
    """A fused copy errs as PEFT does, in outputs and all gradients; (copy, its report)."""
    x, fused = ids() if x is None else x, copy.deepcopy(stock)
    report = fuse(fused)
    found, theirs, exact = (results(one, x) for one in (fused, stock, copy.deepcopy(stock).double()))
    assert not report.left and not report.fallbacks() and len(found) > 2
    assert found["y"].shape == theirs["y"].shape and found["y"].dtype is theirs["y"].dtype
    if found["y"].dtype is torch.float64:
        torch.testing.assert_close(found, theirs)
    else:
        errs_as_stock(found, theirs, exact, times)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), found["y"])
    return fused, report


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("case", ["float32", "bfloat16", "bfloat16 alone", "float16", "float64"])
def test_outputs_and_gradients(case, use_dora):
    dtype = getattr(torch, case.split()[0])
    fused, report = right(made(dtype, adapter_dtype="alone" not in case, use_dora=use_dora))
    assert report.fused == {PREFIX + "words": "torch"} and type(fused.base_model.model.words) is FusedEmbedding


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_real_size(use_dora):
    torch.manual_seed(0)
    base = nn.ModuleDict({"words": nn.Embedding(9000, 480)}).bfloat16()
    stock = peft.get_peft_model(base, peft.LoraConfig(r=16, target_modules=["words"], use_dora=use_dora))
    fill(stock)
    right(stock.base_model.model["words"], torch.randint(9000, (2, 130), generator=torch.Generator().manual_seed(2)))


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("options", [{"padding_idx": 3}, {"scale_grad_by_freq": True}], ids=str)
def test_options_that_act_on_gradients(options, use_dora):
    right(made(options=options, use_dora=use_dora))


@pytest.mark.parametrize("shape", [(), (1,), (0, 4), (2, 3, 5)], ids=str)
def test_shapes_of_indices(shape):
    stock = made(use_dora=True)
    fused = copy.deepcopy(stock)
    fuse(fused)
    x = ids(*shape) if shape else torch.tensor(4)
    for given in (x, x.int()):
        torch.testing.assert_close(fused(given), stock(given))
    with pytest.raises(IndexError):
        fused(torch.tensor([ENTRIES]))


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"sparse": True}], ids=str)
def test_what_is_left_to_peft(options):
    stock = made(options=options)
    fused = copy.deepcopy(stock)
    report = fuse(fused)
    assert report.left[PREFIX + "words"].startswith("base_layer has ") and not report.fused
    torch.testing.assert_close(fused(ids()), stock(ids()))
    assert report.fallbacks() == {PREFIX + "words": {report.left[PREFIX + "words"]: 1}}


def test_several_adapters_and_their_states():
    stock = made()
    stock.add_adapter("other", peft.LoraConfig(r=3, lora_alpha=2, use_rslora=True, target_modules=["words"]))
    fill(stock)
    stock.base_model.set_adapter(["default", "other"])
    fused, report = right(stock)
    for change in (
        lambda one: one.base_model.set_adapter("other"),
        lambda one: one.base_model.model.words.scale_layer(3.0),
        lambda one: one.merge_adapter(),
        lambda one: one.unmerge_adapter(),
        lambda one: one.base_model.disable_adapter_layers(),
    ):
        change(stock), change(fused)
        torch.testing.assert_close(fused(ids()), stock(ids()))
    reasons = ["an adapter is merged into the base weight", "the adapters are disabled"]
    assert report.fallbacks() == {PREFIX + "words": dict.fromkeys(reasons, 1)}
    named = {"adapter_names": ["other", "__base__", "default"]}
    stock.base_model.enable_adapter_layers(), fused.base_model.enable_adapter_layers()
    torch.testing.assert_close(fused.eval()(ids(), **named), stock.eval()(ids(), **named))


def test_two_adapters_of_which_one_is_dora_are_pefts():
    stock = made(use_dora=True)
    stock.add_adapter("other", peft.LoraConfig(target_modules=["words"]))
    fill(stock)
    stock.base_model.set_adapter(["default", "other"])
    fused = copy.deepcopy(stock)
    assert fuse(fused).left == {PREFIX + "words": "several adapters are active, one of them DoRA"}
    torch.testing.assert_close(fused(ids()), stock(ids()))


class Doubled(nn.Embedding):
    """An embedding of the user's, whose rows it keeps."""

    def forward(self, x):
        self.kept = super().forward(x) * 2
        return self.kept


@pytest.mark.parametrize("use_dora", [False, True])
def test_an_output_that_others_hold_is_not_changed(use_dora):
    stock, held = made(use_dora=use_dora), []
    layer = stock.base_model.model.words.base_layer
    layer.register_forward_hook(lambda module, args, y: held.append((y, y.clone())))
    right(stock)
    layer.__class__ = Doubled
    fused, _ = right(stock)
    plain = fused.base_model.model.words.base_layer
    assert torch.equal(plain.kept, nn.functional.embedding(ids(), plain.weight) * 2)
    assert len(held) >= 6 and all(torch.equal(y, before) for y, before in held)


def test_a_base_that_is_trained_too():
    stock = made()
    stock.base_model.model.words.base_layer.weight.requires_grad_()
    right(stock)
    dora = made(use_dora=True)
    dora.base_model.model.words.base_layer.weight.requires_grad_()
    assert fuse(dora).left == {PREFIX + "words": "the base weight requires grad"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("use_dora", [False, True])
def test_the_scaled_embedding_of_gemma(dtype, use_dora):
    config = Gemma3TextConfig(
        vocab_size=ENTRIES, hidden_size=DIM, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, head_dim=12,
        num_key_value_heads=1,
    )  # fmt: skip
    base = Gemma3ForCausalLM(config).to(dtype)
    stock = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"], use_dora=use_dora))
    fill(stock)
    randomise(stock)
    fused = copy.deepcopy(stock)
    report = fuse(fused, strict=True)
    assert list(report.fused.values()).count("torch") == 1
    outputs = [one.get_input_embeddings()(ids()) for one in (fused, stock, copy.deepcopy(stock).double())]
    errs_as_stock(*({"y": y.detach()} for y in outputs), times=1.6)
    found, theirs = (results(one.base_model.model.model.embed_tokens, ids()) for one in (fused, stock))
    for name, wanted in theirs.items():
        tolerance = {} if dtype is torch.float32 else {"rtol": 0.02, "atol": 0.02}
        torch.testing.assert_close(found[name], wanted, **tolerance)


def test_autocast():
    stock = made(use_dora=True)
    fused = copy.deepcopy(stock)
    fuse(fused)
    with torch.autocast("cpu", torch.bfloat16):
        y, wanted = fused(ids()), stock(ids())
    assert y.dtype is wanted.dtype
    torch.testing.assert_close(y, fused(ids()))
    torch.testing.assert_close(y, wanted, rtol=0.02, atol=0.02)


def test_steps_of_dora_and_edits():
    """The kept gain follows steps, edits and, after refresh, those that nobody sees."""
    stock = made(use_dora=True)
    fused = copy.deepcopy(stock)
    fuse(fused)
    for one in (stock, fused):
        optimizer = torch.optim.AdamW([p for p in one.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            with torch.no_grad():
                one(ids())
            one(ids()).square().sum().backward()
            optimizer.step()
    with torch.no_grad():
        torch.testing.assert_close(fused(ids()), stock(ids()))
        for one in (stock, fused):
            one.base_model.model.words.base_layer.weight.mul_(-2)
        torch.testing.assert_close(fused(ids()), stock(ids()))
        for one in (stock, fused):
            one.base_model.model.words.base_layer.weight.data.mul_(3)
        refresh(fused)
        torch.testing.assert_close(fused(ids()), stock(ids()))


def test_copies_pickles_and_unfuse(tmp_path):
    stock = made(use_dora=True)
    fused, _ = right(stock)
    for one in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert type(one.base_model.model.words) is FusedEmbedding
        torch.testing.assert_close(one(ids()), stock(ids()))
    assert fused.state_dict().keys() == stock.state_dict().keys()
    fused.save_pretrained(str(tmp_path), save_embedding_layers=False)
    unfuse(fused)
    assert type(fused.base_model.model.words) is type(stock.base_model.model.words)
    assert torch.equal(fused(ids()), stock(ids()))
    read = peft.PeftModel.from_pretrained(stock.unload(), str(tmp_path))
    fuse(read)
    torch.testing.assert_close(read(ids()), fused(ids()))


def test_second_derivatives_transforms_and_compile():
    stock = made(use_dora=True)
    fused = copy.deepcopy(stock)
    report = fuse(fused)
    found = []
    for one in (fused, stock):
        layer = one.base_model.model.words
        a = layer.lora_embedding_A["default"]
        (g,) = torch.autograd.grad(one(ids()).tanh().sum(), a, create_graph=True)
        found.append(torch.autograd.grad(g.square().sum(), layer.lora_embedding_B["default"])[0])
    torch.testing.assert_close(*found)
    torch.testing.assert_close(torch.func.vmap(fused)(ids()), stock(ids()))
    assert sum(report.fallbacks()[PREFIX + "words"].values()) == 1
    compiled = torch.compile(fused, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids()), stock(ids()))


def test_adapters_on_meta():
    config = peft.LoraConfig(r=4, target_modules=["words"], use_dora=True)
    one = peft.get_peft_model(Words(), config, low_cpu_mem_usage=True)
    assert "meta device" in fuse(one).left[PREFIX + "words"]
