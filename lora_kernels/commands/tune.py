"""`tune`: times the kernels on the user's GPU."""

import sys
from collections.abc import Sequence

import torch

from lora_kernels.ops import tables, tile_tuning, tuning
from lora_kernels.ops.tables import tiles


def tune(seconds: float = 60.0, dtype: str = "bfloat16", rank: int = 16, layers: Sequence[str] = ()) -> int:
    """Times the ways to compute `layers` ("4096x11008"; common ones if none) and keeps the fastest;
    2 without a GPU."""
    sizes = [tuple(map(int, layer.split("x"))) for layer in layers] or tuning.LAYERS
    if not torch.cuda.is_available():
        print("tune: it measures on a GPU, and torch finds none here; nothing was written", file=sys.stderr)
        return 2
    problems = tuning.common_problems(getattr(torch, dtype), rank, sizes)
    found = tuning.tune(problems, "cuda", seconds)
    print(*tuning.describe_choices(found), sep="\n")
    gpu = torch.cuda.get_device_name()
    print(*tile_tuning.words(tiles.local(gpu)), sep="\n")
    print(f"{len(found)} of {len(problems)} measured, in {tables.user_file(gpu)}")
    return 0
