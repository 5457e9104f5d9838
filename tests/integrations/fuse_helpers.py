"""What the tests of fuse share: small PEFT models, stock and fused, and what "equal within
rounding" means."""

import copy
import warnings

import peft
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lora_kernels import fuse

LLAMA_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VOCABULARY = 48


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(24, 40), nn.Linear(40, 16, bias=False)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


def model(dtype=torch.float32, net=Net, adapter_dtype=True, **values):
    """A PEFT model over `net` with a random adapter; `adapter_dtype`: 16-bit adapters become
    float32, PEFT's default."""
    torch.manual_seed(0)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["a", "b"]} | values)
    made = peft.get_peft_model(net().to(dtype), config, autocast_adapter_dtype=adapter_dtype)
    randomise(made)
    return made


def randomise(made, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in made.named_parameters():
            if "lora_B" in name or "lora_A" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)


def make_small(made):
    """The adapter's outputs of the size of a quantised base's."""
    with torch.no_grad():
        for name, p in made.named_parameters():
            if "lora_B" in name:
                p.mul_(0.1)


def take_over(made, quantised, numbers, names=("a", "b")):
    """Gives a PEFT model over plain layers the adapters of one over quantised layers, and
    numbers(base) as weights."""
    with torch.no_grad():
        for name in names:
            base, plain = (m.base_model.model.get_submodule(name).get_base_layer() for m in (quantised, made))
            plain.weight.copy_(numbers(base))
            if base.bias is not None:
                plain.bias.copy_(base.bias)
        own = dict(made.named_parameters())
        for name, p in quantised.named_parameters():
            if "lora" in name:
                own[name].copy_(p)


def check_masks(fused, plain, x):
    """Fails unless a fused model drops something, and what a fused one over plain layers drops of
    one seed."""
    found = []
    for one in (fused, plain):
        torch.manual_seed(3)
        found.append(gradients(one, x))
    assert not torch.equal(found[0]["y"], fused(x))
    assert worst_error(*found) < 1e-5


def quietly(function, *arguments, **keywords):
    """PEFT warns of layers that it cannot merge, and of what merging to few bits rounds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*arguments, **keywords)


def fused_copy(stock):
    fused = copy.deepcopy(stock)
    fuse(fused)
    return fused


def pair(dtype=torch.float32, **values):
    """(stock, fused) with the same weights."""
    stock = model(dtype, **values)
    return stock, fused_copy(stock)


def inputs(dtype=torch.float32, rows=7):
    return torch.randn(rows, 24, generator=torch.Generator().manual_seed(2)).to(dtype)


def same(stock, fused, x, **keywords):
    torch.testing.assert_close(fused(x, **keywords), stock(x, **keywords))


def llama(**values):
    """The base of a PEFT model: two layers, random weights."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=32, **sizes, **values))


def gpt2():
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, embd_pdrop=0, attn_pdrop=0, resid_pdrop=0, **sizes))


def tokens(seed=2):
    ids = torch.randint(VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def step(one, batch):
    """The loss, the outputs and every gradient of one step."""
    one.zero_grad(set_to_none=True)
    out = one(**batch)
    out.loss.backward()
    found = {"loss": out.loss.detach(), "logits": out.logits.detach()}
    return found | {n: p.grad for n, p in one.named_parameters() if p.grad is not None}


def worst_error(found, exact):
    """The largest error of a tensor, relative to the tensor, both by their 2-norm."""
    return max(float((found[n].double() - e.double()).norm() / e.double().norm()) for n, e in exact.items())


def errs_as_stock(fused, stock, exact, times=8):
    """Each tensor of the fused model is as right as stock PEFT's worst one, up to a factor.

    Both sum in one dtype but in another order, so each rounding is another draw of the same size.
    Through a model the first layers' draws decide the error of all gradients: over 36 seeds of
    three models the quotient of the two errors was 0.13 to 2, median 0.8, and would be 0.5 to 8
    with the roles exchanged; hence 8. One layer averages many draws.
    """
    assert fused.keys() == stock.keys() == exact.keys()
    assert [t.dtype for t in fused.values()] == [t.dtype for t in stock.values()]
    ours, theirs = worst_error(fused, exact), worst_error(stock, exact)
    assert ours <= times * theirs, (ours, theirs)


def gradients(one, x, **keywords):
    """The output and every gradient, that of x among them, for one random dy."""
    one.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_()
    y = one(x, **keywords)
    (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype)).sum().backward()
    return {"y": y.detach(), "x": x.grad} | {n: p.grad for n, p in one.named_parameters() if p.grad is not None}


def losses(one):
    """Of three optimizer steps on one batch."""
    optimizer = torch.optim.AdamW([p for p in one.parameters() if p.requires_grad], 1e-2)
    found = []
    for _ in range(3):
        loss = one(**tokens(), use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found
