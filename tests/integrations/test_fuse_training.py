"""Training a fused Llama: the losses of some AdamW steps, of transformers.Trainer too, and what is
saved, are PEFT's."""

import copy

import peft
import pytest
import torch
from fuse_helpers import LLAMA_LAYERS, VOCABULARY, fused_copy, llama, model, tokens
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from lora_kernels import fuse

KINDS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 3, r"layers\.1\.mlp\.up_proj": 9},
        "alpha_pattern": {"down_proj": 20, "k_proj": 1},
    },
    "dora": {"use_dora": True},
    "dora patterns": {"use_dora": True, "use_rslora": True, "rank_pattern": {"o_proj": 2}, "alpha_pattern": {"v_proj": 2}},
    "all biases": {"bias": "all"},
    "biases of dora": {"bias": "lora_only", "use_dora": True},
    "some layers": {"layers_to_transform": [1]},
}


def tiny(**values):
    return model(
        net=lambda: llama(attention_bias=True, mlp_bias=True),
        target_modules=LLAMA_LAYERS,
        task_type="CAUSAL_LM",
        **values,
    ).train()


def train(one, steps=5):
    """The loss before each step, and after the last."""
    optimizer = torch.optim.AdamW([p for p in one.parameters() if p.requires_grad], lr=5e-3, fused=True)
    losses = []
    for _ in range(steps + 1):
        loss = one(**tokens()).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_saved_adapter(kind, tmp_path):
    stock = tiny(**KINDS[kind])
    fused = fused_copy(stock)
    untrained = copy.deepcopy(stock)
    assert fuse(fused, strict=True).fallbacks() == {}
    exact, theirs, ours = train(copy.deepcopy(stock).double()), train(stock), train(fused)
    assert exact[-1] < exact[0] - 0.05
    close(ours, theirs, exact)

    fused.save_pretrained(str(tmp_path))
    read = peft.PeftModel.from_pretrained(untrained.unload(), str(tmp_path)).eval()
    saved, held = (peft.get_peft_model_state_dict(one) for one in (read, fused))
    assert saved.keys() == held.keys() and all(torch.equal(saved[name], held[name]) for name in held)
    with torch.no_grad():
        expected = fused.eval()(**tokens()).logits
        torch.testing.assert_close(read(**tokens()).logits, expected)
        fuse(read)
        assert torch.equal(read(**tokens()).logits, expected)


def close(ours, theirs, exact):
    """Stock's worst error, or the last bit of a float32 loss, which is all of it where training
    adds nothing; 8 times as errs_as_stock."""
    last_bit = 2**-23 * float(exact.max())
    assert (ours - exact).abs().max() <= 8 * max((theirs - exact).abs().max(), last_bit)


class Tokens(Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        ids = torch.randint(VOCABULARY, (9,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def trained_by_trainer(one, path, **options):
    arguments = TrainingArguments(
        str(path), max_steps=3, per_device_train_batch_size=2, learning_rate=5e-3, logging_steps=1, seed=3,
        use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, **options,
    )  # fmt: skip
    trainer = Trainer(one, arguments, train_dataset=Tokens())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True, "gradient_accumulation_steps": 2}], ids=str)
def test_trainer(use_dora, options, tmp_path):
    stock = tiny(use_dora=use_dora)
    fused, exact = fused_copy(stock), copy.deepcopy(stock).double()
    close(*(trained_by_trainer(one, tmp_path, **options) for one in (fused, stock, exact)))
    assert len(fuse(fused, strict=True).fused) == 14 and fuse(fused).fallbacks() == {}
