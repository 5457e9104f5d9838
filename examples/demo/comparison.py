"""One method in one dtype: stock PEFT against fused, from the first loss to the merged model, with
its checks."""

from pathlib import Path
from typing import Any

import paired
import plans
import roundtrip
import smollm2
import torch
from rich.console import Console


def run_comparison(
    method: str, dtype_name: str, base: str, quick: bool, steps: int | None, seed: int, out: Path, console: Console
) -> dict[str, Any]:
    """Runs one comparison and returns what summary.json says about it; the adapter is saved in a
    folder of `out`."""
    dtype = getattr(torch, dtype_name)
    plan = plans.choose_plan(quick, plans.is_slow(dtype), steps)
    name = f"{method}-{dtype_name}" if base == "dense" else f"{method}-{base}-{dtype_name}"
    console.print(f"[bold]{name}[/bold]: {plan}")

    tokenizer = smollm2.load_tokenizer()
    text = smollm2.load_text(tokenizer, plan.tokens, seed)
    held_out = text.held_out[: plan.held_out_rows]
    stock, fused = paired.build_runs(method, dtype, base, plan, seed)
    backends = paired.backends_used(fused.model, held_out[:1])
    before = {one.name: paired.mean_loss(one.model, held_out) for one in (stock, fused)}
    paired.train_both(stock, fused, text.train, plan.steps, console, name)
    after = {one.name: paired.mean_loss(one.model, held_out) for one in (stock, fused)}
    trip = roundtrip.run_round_trip(
        fused.model, out / name, dtype, base, held_out, text.prompt, tokenizer, plan.completion_tokens
    )

    summaries = {one.name: one.summary(before[one.name], after[one.name]) for one in (stock, fused)}
    return {
        "name": name,
        "method": method,
        "dtype": dtype_name,
        "base": base,
        "plan": plan.to_dict(),
        "backends": backends.chosen,
        "fused_layers": backends.fused_layers,
        "adapted_layers": backends.adapted_layers,
        "stock": summaries["stock"],
        "fused": summaries["fused"],
        "time_ratio": summaries["fused"]["median_step_seconds"] / summaries["stock"]["median_step_seconds"],
        "largest_loss_difference": plans.largest_difference(stock.losses, fused.losses),
        "rounding_bound": plans.rounding_bound(dtype, min(stock.losses)),
        "held_out_loss_merged": trip.merged_loss,
        "adapter": str(out / name),
        "completions": trip.completions,
        "checks": claim_checks(dtype, stock, fused, backends, before, after, trip),
    }


def claim_checks(
    dtype: torch.dtype,
    stock: paired.Run,
    fused: paired.Run,
    backends: paired.Backends,
    before: dict[str, float],
    after: dict[str, float],
    trip: roundtrip.RoundTrip,
) -> dict[str, bool]:
    """Each claim of the demo, and whether it held."""

    def within_rounding(one: float, other: float) -> bool:
        return abs(one - other) <= plans.rounding_bound(dtype, one)

    difference = plans.largest_difference(stock.losses, fused.losses)
    checks = {
        "every adapted layer ran fused": backends.fused_layers == backends.adapted_layers > 0,
        "the loss curves differ by rounding only": difference <= plans.rounding_bound(dtype, min(stock.losses)),
        "the held-out losses differ by rounding only": all(within_rounding(d["stock"], d["fused"]) for d in (before, after)),
        "the held-out loss fell": all(after[name] < before[name] for name in after),
        "stock PEFT reads the saved tensors unchanged": trip.tensors_equal,
        "stock PEFT with them gives the outputs of the unfused model": trip.stock_outputs_equal,
        "fused again, it gives the outputs of the fused model": trip.fused_outputs_equal,
        "the models complete a held-out problem": all(t.strip() for t in trip.completions.values()),
    }
    if trip.merged_loss is not None:
        checks["merging changes the held-out loss by rounding only"] = within_rounding(after["fused"], trip.merged_loss)
    return checks
