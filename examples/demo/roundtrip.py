"""What comes after training: save, reload into stock PEFT, merge, generate."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from paired import mean_loss
from smollm2 import load_base
from torch import Tensor

from lora_kernels import fuse, unfuse


@dataclass(frozen=True)
class RoundTrip:
    """What came back. "Equal" means every bit."""

    tensors_equal: bool
    stock_outputs_equal: bool
    fused_outputs_equal: bool
    merged_loss: float | None
    """None for a quantised base: merging would quantise the sum anew."""
    completions: dict[str, str]


def run_round_trip(
    fused: peft.PeftModel,
    folder: Path,
    dtype: torch.dtype,
    base: str,
    rows: Tensor,
    prompt: str,
    tokenizer: Any,
    completion_tokens: int,
) -> RoundTrip:
    """Saves the fused model's adapter, reloads it into stock PEFT, compares, merges; completes
    `prompt` with both.

    Leaves `fused` unfused.
    """
    fused.eval()
    fused_outputs = first_row_logits(fused, rows)
    completions = {"fused": complete(fused, tokenizer, prompt, completion_tokens)}
    fused.save_pretrained(str(folder))

    reloaded = peft.PeftModel.from_pretrained(load_base(dtype, base), str(folder), torch_device="cpu").eval()
    tensors_equal = same_tensors(peft.get_peft_model_state_dict(fused), peft.get_peft_model_state_dict(reloaded))
    stock_outputs = first_row_logits(reloaded, rows)
    fuse(reloaded, strict=True)
    again = first_row_logits(reloaded, rows)
    unfuse(fused)
    unfused_outputs = first_row_logits(fused, rows)

    merged = reloaded.merge_and_unload(safe_merge=True) if base == "dense" else None
    if merged is not None:
        completions["merged"] = complete(merged, tokenizer, prompt, completion_tokens)
    return RoundTrip(
        tensors_equal=tensors_equal,
        stock_outputs_equal=torch.equal(stock_outputs, unfused_outputs),
        fused_outputs_equal=torch.equal(again, fused_outputs),
        merged_loss=None if merged is None else mean_loss(merged, rows),
        completions=completions,
    )


def first_row_logits(model: torch.nn.Module, rows: Tensor) -> Tensor:
    """The logits [1, tokens, vocabulary] of the first row."""
    with torch.no_grad():
        return model(input_ids=rows[:1], use_cache=False).logits


def same_tensors(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two state dicts have the same names and, bit for bit, the same tensors."""
    return one.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]) for name, tensor in one.items()
    )


def complete(model: Any, tokenizer: Any, prompt: str, tokens: int) -> str:
    """The model's greedy continuation of `prompt`, without the prompt."""
    given = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        made = model.generate(**given, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(made[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
