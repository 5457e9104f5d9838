"""Layers made on the meta device, and what their constructors refuse."""

import pytest
import torch
from torch import nn

from lora_kernels.nn import DoRALinear, LoRAEmbedding, LoRALinear

LAYERS = {
    "lora": lambda device: LoRALinear(12, 10, r=4, device=device),
    "gaussian": lambda device: LoRALinear(12, 10, r=4, init_lora_weights="gaussian", device=device),
    "both": lambda device: LoRALinear(12, 10, r=4, init_lora_weights=False, device=device),
    "pissa": lambda device: LoRALinear(12, 10, r=4, init_lora_weights="pissa", device=device),
    "pissa_niter": lambda device: LoRALinear(12, 10, r=4, init_lora_weights="pissa_niter_2", device=device),
    "dora": lambda device: DoRALinear(12, 10, r=4, device=device),
    "embedding": lambda device: LoRAEmbedding(12, 10, r=4, device=device),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_made_on_meta_gets_its_first_values_later(kind):
    layer = LAYERS[kind]("meta").to_empty(device="cpu")
    with torch.no_grad():
        for parameter in [*layer.parameters(), *layer.buffers()]:
            parameter.fill_(float("nan"))
        weight = torch.randn(layer.weight.shape)
        layer.weight.copy_(weight)
        if getattr(layer, "bias", None) is not None:
            layer.bias.zero_()
    torch.manual_seed(3)
    layer.reset_parameters()
    if kind == "embedding":
        made = LoRAEmbedding.from_embedding(nn.Embedding.from_pretrained(weight.clone()), r=4)
    else:
        plain = nn.Linear(12, 10)
        plain.weight.data, plain.bias.data = weight.clone(), torch.zeros(10)
        torch.manual_seed(3)
        made = type(layer).from_linear(plain, r=4, init_lora_weights=layer._init)
    assert layer.state_dict().keys() == made.state_dict().keys()
    for name, tensor in made.state_dict().items():
        if name != "lora_embedding_B":
            assert torch.equal(layer.state_dict()[name], tensor), name
    assert all(p.isfinite().all() for p in layer.parameters())
    x = torch.arange(12) if kind == "embedding" else torch.randn(3, 12)
    assert layer(x).isfinite().all()
    if kind.startswith("pissa"):
        with pytest.raises(RuntimeError, match="the base weight is a residual already"):
            layer.reset_parameters()
    else:
        layer.reset_parameters()
        layer.merge()
        with pytest.raises(RuntimeError, match=r"reset_parameters\(\) on a merged layer"):
            layer.reset_parameters()


def test_given_first_values_cannot_be_repeated():
    layer = LoRALinear(4, 4, r=2, init_lora_weights=(torch.ones(2, 4), torch.ones(4, 2)))
    with pytest.raises(RuntimeError, match="the tensors were given"):
        layer.reset_parameters()


def test_a_rank_by_place_is_refused():
    with pytest.raises(TypeError, match="positional"):
        LoRAEmbedding(12, 10, 4)
    for cls in (LoRALinear, DoRALinear):
        with pytest.raises(TypeError, match=rf"{cls.__name__}: bias must be True or False, found 16; give the rank as r="):
            cls(32, 24, 16)
