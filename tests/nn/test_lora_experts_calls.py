"""nn.LoRAExperts: calls under torch.func, without choices, and those that are refused."""

import pytest
import torch
from torch.func import functional_call

from tests.integrations.experts_helpers import EXPERTS, Config
from tests.nn.test_lora_experts import arguments, experts, found, layer_of, leaves, names


@names
def test_transforms_and_forward_mode(name):
    """torch.func's of the parameters, and a tangent of x, by the numbers of autograd."""
    layer, args = layer_of(experts(name, torch.float64), use_dora=True), arguments(name, torch.float64)
    wanted = found(layer, args)
    dy = torch.randn(wanted["y"].shape, generator=torch.Generator().manual_seed(4)).to(wanted["y"])
    given = {n: p.detach() for n, p in leaves(layer).items()}
    grads = torch.func.grad(lambda p: (functional_call(layer, p, args) * dy).sum())(given)
    torch.testing.assert_close(grads, {n: wanted[n] for n in given})
    x, *others = args
    _, tangent = torch.func.jvp(lambda x: (layer(x, *others) * dy).sum(), (x,), (x,))
    torch.testing.assert_close(tangent, (wanted["x"] * x).sum())


def test_no_choices():
    layer = layer_of(experts())
    x, index, weights = arguments("MixtralExperts")
    for wide in (torch.float32, torch.float64):
        y = layer(x, index[:, :0], weights[:, :0].to(wide))
        assert y.shape == x.shape and not y.any()


def test_bad_calls_are_refused():
    layer = layer_of(experts())
    x, index, weights = arguments("MixtralExperts")
    for args, error, says in (
        ((x,), TypeError, "three tensors"),
        ((x, index[1:], weights), ValueError, r"found \[17, 24\], \[16, 3\], \[17, 3\]"),
        ((x, index.double(), weights), TypeError, "index must be int64 or int32"),
        ((x, index - 1, weights), ValueError, "index must hold numbers of experts, found a negative one"),
        ((x, index + EXPERTS - 3, weights), ValueError, "index must hold numbers of experts up to 6, found 7"),
        ((x.double(), index, weights), TypeError, "x must have the dtype of gate_up_proj, torch.float32, found torch.float64"),
    ):
        with pytest.raises(error, match=says):
            layer(*args)
    by_all = layer_of(experts("Llama4TextExperts"))
    (x_of_all,) = arguments("Llama4TextExperts")
    for args, error, says in (
        ((x_of_all[1:],), ValueError, r"as many tokens of 24 features for each of the 6 experts, found \[101, 24\]"),
        ((x_of_all, index), TypeError, r"wanted is one tensor, x, found \(Tensor, Tensor\)"),
        ((), TypeError, "wanted is one tensor, x"),
    ):
        with pytest.raises(error, match=says):
            by_all(*args)
    layer.config = Config("deepgemm")
    with pytest.raises(RuntimeError, match="the experts' implementation is deepgemm"):
        layer(x, index, weights)
