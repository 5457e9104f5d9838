"""What the tests of the layers share: PEFT's layer beside ours, a float64 oracle, and training."""

import copy
import io
import pickle

import peft
import torch
from torch import nn

from lora_kernels.nn import DoRALinear, LoRALinear
from lora_kernels.ops.dropout import draw_seed, mask

KINDS = {
    "lora": (LoRALinear, {"r": 4, "lora_alpha": 6}),
    "rslora": (LoRALinear, {"r": 5, "lora_alpha": 3, "use_rslora": True}),
    "dora": (DoRALinear, {"r": 3, "lora_alpha": 7.5}),
    "rsdora": (DoRALinear, {"r": 6, "lora_alpha": 2, "use_rslora": True}),
}
TOLERANCES = {
    torch.float64: {"rtol": 1e-11, "atol": 1e-11},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
}


def linear(n_in=12, n_out=10, bias=True, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(n_in, n_out, bias, dtype=dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return layer


def trained(layer, seed=1):
    """Moves what the adapter trains away from its first values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.startswith("lora_"):
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
    return layer


def ours(kind, dtype=torch.float32, **more):
    cls, options = KINDS[kind]
    sizes = {k: more.pop(k) for k in ("n_in", "n_out", "bias") if k in more}
    return trained(cls.from_linear(linear(dtype=dtype, **sizes), **options, **more))


def theirs(layer):
    """PEFT's layer with the weights of ours; the base is a copy."""
    base = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, dtype=layer.weight.dtype)
    is_dora = isinstance(layer, DoRALinear)
    config = peft.LoraConfig(
        r=layer.r,
        lora_alpha=layer.lora_alpha,
        use_rslora=layer.use_rslora,
        use_dora=is_dora,
        lora_dropout=layer.lora_dropout,
    )
    with torch.no_grad():
        base.weight.copy_(layer.weight)
        if layer.bias is not None:
            base.bias.copy_(layer.bias)
    base.requires_grad_(False)
    other = peft.tuners.lora.layer.Linear(base, "default", config=config, r=layer.r, lora_alpha=layer.lora_alpha)
    with torch.no_grad():
        for mine, its in zip(adapter(layer), peft_adapter(other), strict=True):
            its.data = mine.detach().clone()
    return other.train(layer.training)


def adapter(layer):
    found = [layer.lora_A, layer.lora_B]
    return [*found, layer.lora_magnitude_vector] if isinstance(layer, DoRALinear) else found


def peft_adapter(layer):
    found = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    if layer.use_dora["default"]:
        found.append(layer.lora_magnitude_vector["default"].weight)
    return found


class SameMask(nn.Module):
    """Dropout that draws the mask which our op draws at that point of torch's generator."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        rows = x.numel() // x.shape[-1]
        return x * mask(draw_seed(), self.p, rows, x.shape[-1], x.dtype, x.device).view_as(x)


def gradients(layer, parameters, x, dy):
    x = x.clone().requires_grad_()
    y = layer(x)
    return y.detach(), torch.autograd.grad(y, [x, *parameters], dy)


def fit(layer, parameters, steps=5, dtype=torch.float64, **options):
    """The losses of some AdamW steps towards random targets."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(9, layer.in_features, generator=generator, dtype=torch.float64).to(dtype)
    target = torch.randn(9, layer.out_features, generator=generator, dtype=torch.float64).to(dtype)
    optimizer = torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.1, **options)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def oracle(layer, x):
    """The layer's formula in eval mode, in float64, from the given weights; [tokens, out]."""
    w, a, b, x = (t.detach().double() for t in (layer.weight, layer.lora_A, layer.lora_B, x))
    adapted = w + layer.scaling * (b @ a)
    if isinstance(layer, DoRALinear):
        norm = adapted.norm(dim=1)
        gain = torch.where(norm > 0, layer.lora_magnitude_vector.detach().double() / norm, 1.0)
        adapted = gain[:, None] * adapted
    return x @ adapted.T + (0 if layer.bias is None else layer.bias.detach().double())


def bits(tensor):
    return bytes(tensor.detach().contiguous().view(torch.uint8).flatten().tolist())


def fresh(layer):
    """A copy that has computed nothing yet."""
    return copy.deepcopy(layer)


def through_pickle(layer):
    return pickle.loads(pickle.dumps(layer))


def through_torch_save(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)
