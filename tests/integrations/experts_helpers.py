"""Experts of transformers' models under PEFT's `target_parameters`: small blocks, stock and
fused."""

import copy
import importlib

import peft
import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from lora_kernels import fuse
from tests.integrations.fuse_helpers import errs_as_stock, gradients, randomise

EXPERTS, TOP_K, HIDDEN, INNER = 6, 3, 24, 16
PREFIX = "base_model.model."
OUTER, NESTED = f"{PREFIX}experts", f"{PREFIX}experts.base_layer"
CLASSES = {
    "MixtralExperts": "mixtral",
    "Qwen2MoeExperts": "qwen2_moe",
    "Qwen3MoeExperts": "qwen3_moe",
    "GptOssExperts": "gpt_oss",
    "DeepseekV3Experts": "deepseek_v3",
    "DeepseekV4Experts": "deepseek_v4",
    "Glm4MoeExperts": "glm4_moe",
    "OlmoeExperts": "olmoe",
    "AriaExperts": "aria",
    "NemotronHExperts": "nemotron_h",
    "MuseSparkExperts": "muse_spark",
    "Step3p7Experts": "step3p7",
}
GATED = ["experts.gate_up_proj", "experts.down_proj"]


class Config:
    """What the experts of any model ask their configuration."""

    def __init__(self, implementation="eager", experts=EXPERTS):
        self._experts_implementation, self.experts = implementation, experts

    def __getattr__(self, name):
        # before __init__ has run, as copies ask
        if name.startswith("__") or name == "experts":
            raise AttributeError(name)
        kinds = {"latent": None, "intermediate": INNER, "hidden_size": HIDDEN, "expert": self.experts}
        kinds |= {"mlp_hidden_act": "relu2", "act": "silu", "alpha": 1.7, "limit": 1.0, "softcap": 2.0, "eps": 1e-6}
        found = [value for kind, value in kinds.items() if kind in name]
        if not found:
            raise AttributeError(name)
        return found[0]


def experts_class(name):
    return getattr(importlib.import_module(f"transformers.models.{CLASSES[name]}.modeling_{CLASSES[name]}"), name)


class Block(nn.Module):
    """A router whose choices are given, so that no rounding changes them, and experts."""

    def __init__(self, experts, index):
        super().__init__()
        self.experts = experts
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.register_buffer("index", index)

    def forward(self, x):
        wide = torch.promote_types(x.dtype, torch.float32)
        scores = torch.softmax(self.router(x).to(wide), -1)
        # sentinels have the weight 0, as expert parallelism makes it
        weights = scores.gather(1, self.index.clamp(max=EXPERTS - 1)) * (self.index < EXPERTS)
        return self.experts(x, self.index, weights)


def choices(tokens=17):
    """TOP_K experts for each token; the last expert has none."""
    generator = torch.Generator().manual_seed(3)
    return torch.stack([torch.randperm(EXPERTS - 1, generator=generator)[:TOP_K] for _ in range(tokens)])


def block(name="MixtralExperts", implementation="eager", index=None, dtype=torch.float32, **values):
    """A PEFT model over a block, with a random adapter and a router that learns."""
    return block_of(experts_class(name), Config(implementation), index, dtype, **values)


def block_of(cls, config, index=None, dtype=torch.float32, **values):
    torch.manual_seed(0)
    experts = cls(config)
    for p in experts.parameters():
        nn.init.normal_(p, std=0.3)
    ups = "gate_up_proj" if getattr(experts, "has_gate", True) else "up_proj"
    one = Block(experts, choices() if index is None else index).to(dtype)
    return adapted(one, **{"target_parameters": [f"experts.{ups}", GATED[1]]} | values)


def adapted(one, **values):
    adapter = values.pop("autocast_adapter_dtype", True)
    values = {"r": 3, "lora_alpha": 5, "target_modules": [], "target_parameters": GATED} | values
    made = peft.get_peft_model(one, peft.LoraConfig(**values), autocast_adapter_dtype=adapter)
    randomise(made)
    for name, p in made.named_parameters():
        if "router" in name:
            p.requires_grad_()
    return made


def inputs(dtype=torch.float32, tokens=17):
    return torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(2)).to(dtype)


def fused_of(stock):
    fused = copy.deepcopy(stock)
    return fused, fuse(fused)


def right(stock, x, times=3):
    """A fused copy errs as PEFT does, in outputs and all gradients; (copy, its report)."""
    fused, report = fused_of(stock)
    with torch.no_grad():
        frozen, theirs_frozen = fused(x), stock(x)
    found, theirs = gradients(fused, x), gradients(stock, x)
    assert not report.left and not report.fallbacks() and len(found) > 3
    torch.testing.assert_close(frozen, found["y"], rtol=0, atol=0)
    if x.dtype is torch.float64:
        torch.testing.assert_close(found, theirs)
        torch.testing.assert_close(frozen, theirs_frozen)
    else:
        errs_as_stock(found, theirs, exact(stock, x), times)
    return fused, report


def exact(stock, x):
    """The same in float64, of which torch has no grouped product."""
    wide = copy.deepcopy(stock).double()
    for module in wide.modules():
        if isinstance(module, ParamWrapper) and hasattr(module.get_base_layer(), "config"):
            module.get_base_layer().config = Config()
    return gradients(wide, x.double())


def routed(one, x):
    """The choices of a block and their weights."""
    inner = one.base_model.model
    return inner.index, torch.softmax(inner.router(x), -1).gather(1, inner.index)


def left_to_peft(stock, reason, x=None):
    """The fused copy gives PEFT's numbers, and counts the reason."""
    x = inputs() if x is None else x
    fused, report = fused_of(stock)
    torch.testing.assert_close(gradients(fused, x), gradients(stock, x))
    assert report.fallbacks()[OUTER] == {reason: 1}, report.fallbacks()
    return report
