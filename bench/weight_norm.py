"""weight_norm and PEFT's norm of the same layer."""

import torch
from peft.tuners.lora.dora import DoraLinearLayer

from bench.paired import paired
from lora_kernels import weight_norm
from lora_kernels.ops import row_norm_squared


def rows(quick=False):
    """Every measurement, as plain values."""
    for dtype in (torch.float32, torch.bfloat16):
        for size in (1024, 4096):
            for r in (16,) if quick else (8, 16, 64):
                w, a, b = (torch.randn(shape, dtype=dtype) for shape in ((size, size), (r, size), (size, r)))
                squared, peft_norm = row_norm_squared(w), DoraLinearLayer(fan_in_fan_out=False)
                eye = torch.eye(size, dtype=dtype)
                times = paired(
                    {
                        "ours": lambda: weight_norm(w, a, b, 0.5, squared),  # noqa: B023
                        "ours with W squared": lambda: weight_norm(w, a, b, 0.5),  # noqa: B023
                        "peft": lambda: peft_norm.get_weight_norm(w, ((eye @ a.T) @ b.T).T, 0.5),  # noqa: B023
                    }
                )
                yield {
                    "op": "weight_norm",
                    "dtype": str(dtype).removeprefix("torch."),
                    "K": size,
                    "N": size,
                    "r": r,
                    "seconds": times,
                    "ours / peft": times["ours"] / times["peft"],
                }
