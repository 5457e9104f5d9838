"""Experts that are linear layers get their rows with whose they are, along the router's way."""

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

from lora_kernels.serving import unserve
from lora_kernels.serving.frame import Frame, Requests
from lora_kernels.serving.routing import Routes
from tests.serving.merged import assert_rows_are, serve_two
from tests.serving.served import tokens

EXPERTS = 4


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w2, self.w3 = (nn.Linear(*sizes, bias=False) for sizes in ((16, 24), (24, 16), (16, 24)))

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


def by_mask(block, x, weights, chosen):
    """As Mixtral did."""
    y = torch.zeros_like(x)
    mask = F.one_hot(chosen, EXPERTS).permute(2, 1, 0)
    for e, expert in enumerate(block.experts):
        k, rows = torch.where(mask[e])
        y.index_add_(0, rows, expert(x[None, rows].reshape(-1, 16)) * weights[rows, k, None])
    return y


def sorted_by_expert(block, x, weights, chosen):
    """As DeepSeek's own code."""
    order = chosen.view(-1).argsort()
    parts, ends = x[order // chosen.shape[1]], chosen.view(-1).bincount(minlength=EXPERTS).cumsum(0).tolist()
    y = torch.cat([expert(parts[a:b]) for expert, a, b in zip(block.experts, [0, *ends], ends, strict=False) if b > a])
    back = torch.empty_like(y)
    back[order] = y
    return (back.view(*chosen.shape, -1) * weights.unsqueeze(-1)).sum(1)


def repeated(block, x, weights, chosen):
    rows = x.repeat_interleave(chosen.shape[1], dim=0)
    y = torch.empty_like(rows)
    for e, expert in enumerate(block.experts):
        y[chosen.view(-1) == e] = expert(rows[chosen.view(-1) == e])
    return (y.view(*chosen.shape, -1) * weights.unsqueeze(-1)).sum(1)


def split_by_expert(block, x, weights, chosen):
    order = chosen[:, 0].argsort()
    parts = x.index_select(0, order).split(chosen[:, 0].bincount(minlength=EXPERTS).tolist())
    return torch.cat([expert(part) for expert, part in zip(block.experts, parts, strict=True)])[order.argsort()]


def all_of_them(block, x, weights, chosen):
    return sum(expert(x) for expert in block.experts)


def by_einsum(block, x, weights, chosen):
    """Rows become places in a buffer: lost."""
    place = F.one_hot(chosen[:, 0], EXPERTS)
    place = F.one_hot((place.cumsum(0) - 1).clamp(0), len(x)) * place.unsqueeze(-1)
    buffers = torch.einsum("tec,td->ecd", place.to(x), x)
    y = torch.stack([expert(each) for expert, each in zip(block.experts, buffers, strict=True)])
    return torch.einsum("tec,ecd->td", place.to(x), y)


def sorted_values(block, x, weights, chosen):
    """No row of the result is one of x."""
    return torch.cat([expert(part) for expert, part in zip(block.experts, x.sort(0).values.chunk(EXPERTS), strict=False)])


class Block(nn.Module):
    def __init__(self, route):
        super().__init__()
        self.route, self.gate = route, nn.Linear(16, EXPERTS, bias=False)
        self.experts, self.common = nn.ModuleList(Expert() for _ in range(EXPERTS)), Expert()

    def forward(self, x):
        rows = x.reshape(-1, 16)
        weights, chosen = self.gate(rows).softmax(-1).topk(2, -1)
        return (self.route(self, rows, weights, chosen) + self.common(rows)).view(x.shape)


class Deep(nn.Module):
    """Blocks that are modules of a list, too."""

    def __init__(self, route):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"norm": nn.LayerNorm(16), "block": Block(route)}) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer["block"](layer["norm"](x))
        return x


@pytest.mark.parametrize("kind", [Block, Deep])
@pytest.mark.parametrize("route", [by_mask, sorted_by_expert, repeated, split_by_expert, all_of_them])
def test_rows_that_a_router_chose(kind, route):
    """In each order, also where a batch has no more than a token, or experts have as many rows as
    there are sequences."""
    torch.manual_seed(0)
    model = kind(route)
    pool, models = serve_two(model)
    for seed, (count, length) in enumerate([(2, 6), (3, 3), (2, 1), (4, 4)] * 3):
        x, names = torch.randn(count, length, 16, generator=torch.Generator().manual_seed(seed)), ["a", "b", None, "a"][:count]
        y = model(x, adapters=names)
        assert_rows_are(y, names, models, x)
        with pool.batch(names):
            assert model(x).equal(y)
    plain = model(x)
    assert unserve(model)(x).equal(plain) and not [m for m in model.modules() if "forward" in vars(m)]


@pytest.mark.parametrize("kind", [Block, Deep])
@pytest.mark.parametrize("route", [by_einsum, sorted_values])
def test_rows_whose_way_is_lost(kind, route):
    torch.manual_seed(0)
    model = kind(route)
    _, models = serve_two(model)
    for seed in range(3):
        x = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(seed))
        with pytest.raises(ValueError, match="experts.0.w1 with an input of .*: the way of its rows through the router"):
            model(x, adapters=["a", "b"])
        y = model(x, adapters=["b", "b"])
        torch.testing.assert_close(y.double(), models["b"](x.double()), rtol=1e-3, atol=1e-4)


SMALL = {
    "vocab_size": 64,
    "d_model": 32,
    "expert_capacity": 64,
    "num_experts": 4,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
}


def switch():
    return transformers.SwitchTransformersForConditionalGeneration(transformers.SwitchTransformersConfig(
        d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4, num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1, router_jitter_noise=0.0, **SMALL,
    ))  # fmt: skip


def nllb():
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder")
             for what, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48), ("sparse_step", 2))}  # fmt: skip
    return transformers.NllbMoeForConditionalGeneration(
        transformers.NllbMoeConfig(max_position_embeddings=64, eos_token_id=None, **sizes, **SMALL)
    )


@pytest.mark.parametrize("build", [switch, nllb])
def test_models_with_linear_experts(build):
    torch.manual_seed(0)
    model = build()
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.15)
    _, models = serve_two(model, 0.15, ("q", "v", "wi", "wo", "q_proj", "v_proj", "fc1", "fc2"))
    for seed in range(4):
        x, d = tokens(2, 8, seed), tokens(2, 4, seed + 9)
        y = model(input_ids=x, decoder_input_ids=d, adapters=["a", "b"]).logits
        call = lambda of, x, d: of(input_ids=x, decoder_input_ids=d).logits  # noqa: E731
        assert_rows_are(y, ["a", "b"], models, x, d, call=call)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": 2}
    found = model.generate(x, adapters=["a", "b"], **options)
    for i, name in enumerate(("a", "b")):
        assert found[i].equal(models[name].generate(x[i : i + 1], **options)[0])


def test_what_a_row_goes_through():
    """Each function moves the notes as it moves rows, or drops them."""
    owners, x = torch.arange(12).view(3, 4), torch.arange(12.0).view(3, 4, 1).expand(3, 4, 5).clone()
    frame = Frame(Requests(12, torch.zeros(12, 1, dtype=torch.int64), None, 1, frozenset(), False))
    index, mask = torch.tensor([2, 0]), owners % 2 == 1
    keeping = [
        lambda x: x.reshape(-1, 5), lambda x: x.view(12, 5)[index], lambda x: x[mask], lambda x: x[None, index, 1:3],
        lambda x: x.transpose(0, 1), lambda x: x.permute(1, 0, 2), lambda x: x.flatten(0, 1), lambda x: x.unsqueeze(0),
        lambda x: x[1], lambda x: x.split(2, 1)[1], lambda x: x.chunk(2, dim=1)[0], lambda x: x.unbind(1)[3],
        lambda x: torch.cat([x, x[index]], 0), lambda x: torch.stack([x, x], 1), lambda x: x.index_select(1, index),
        lambda x: x.repeat_interleave(2, dim=0), lambda x: x.to(torch.float64) * 1, lambda x: x.narrow(1, 1, 2),
        lambda x: F.dropout(x, 0.0).contiguous(), lambda x: x.expand(2, 3, 4, 5), lambda x: x[:, -1:],
        lambda x: x + 0 * x.mean(-1, keepdim=True), lambda x: F.linear(x, torch.eye(5)), lambda x: x @ torch.eye(5),
    ]  # fmt: skip
    dropping = [
        lambda x: x.flip(0), lambda x: x.roll(1, 0), lambda x: x.sort(0).values, lambda x: x.cumsum(0),
        lambda x: x.softmax(0), lambda x: x.view(3, 5, 4), lambda x: x.transpose(1, 2), lambda x: x.sum(0),
        lambda x: torch.einsum("abc->bac", x), lambda x: x.flatten(1), lambda x: x[..., 0], lambda x: x.repeat(2, 1, 1),
        lambda x: torch.cat([x, torch.zeros(3, 4, 5)], 0), lambda x: x + x[torch.tensor([1, 0, 2])],
        lambda x: x.clone().copy_(x.flip(0)), lambda x: x.clone().index_copy_(0, index, x[:2]),
    ]  # fmt: skip
    for function in keeping:
        with Routes(frame) as routes:
            routes.note(x, owners[..., None])
            y = function(x)
            found = routes.owners(y)
        assert found is not None and found[..., 0].equal(y[..., 0].long()), keeping.index(function)
    for function in dropping:
        with Routes(frame) as routes:
            routes.note(x, owners[..., None])
            assert routes.owners(function(x)) is None, dropping.index(function)
    with Routes(frame) as routes:
        assert routes.owners(x) is None  # another call's notes
        routes.note(x, owners[..., None])
        x[0] = 1
        assert routes.owners(x) is None
