"""Ops and fused layers on the meta device while autocast is on for another: meta has none."""

import pytest
import torch

from lora_kernels import Member, dora_linear, expert_lora_linear, fuse, lora_linear, lora_linear_group

peft = pytest.importorskip("peft")
BF16 = torch.bfloat16


def empty(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


CALLS = {
    "lora_linear": lambda x: lora_linear(x, empty(5, 6), empty(2, 6), empty(5, 2)),
    "lora_linear_group": lambda x: lora_linear_group(x, [Member(empty(5, 6), empty(2, 6), empty(5, 2))])[0],
    "dora_linear": lambda x: dora_linear(x, empty(5, 6), empty(2, 6), empty(5, 2), empty(5))[0],
    "expert_lora_linear": lambda x: expert_lora_linear(
        x, empty(4, dtype=torch.int64), empty(4, 5, 6), empty(4, 2, 6), empty(4, 5, 2)
    ),
}


@pytest.mark.parametrize("op", CALLS)
def test_an_op(op):
    with torch.autocast("cpu", BF16):
        y = CALLS[op](empty(3, 6))
    assert y.is_meta and y.shape == (3, 5) and y.dtype is torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, BF16], ids=str)
def test_fused_layers_are_as_pefts(dtype):
    """They give what PEFT gives, or raise what it raises."""

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.conv = torch.nn.Linear(6, 5), torch.nn.Linear(6, 5), torch.nn.Conv1d(6, 5, 1)
            self.attention = torch.nn.MultiheadAttention(6, 2)

        def forward(self, x):
            return self.q(x) + self.k(x), self.conv(x.T[None]), self.attention(x, x, x)[0]

    config = peft.LoraConfig(r=2, target_modules=["q", "k", "conv", "attention"])
    made = peft.get_peft_model(Block(), config).to("meta")
    found = {}
    for who in ("peft", "fused"):
        if who == "fused":
            fuse(made)
        with torch.autocast("cpu", BF16):
            try:
                found[who] = [(y.shape, y.dtype, y.device) for _ in range(3) for y in made(empty(3, 6, dtype=dtype))]
            except RuntimeError as error:
                found[who] = str(error)
    assert found["fused"] == found["peft"]
