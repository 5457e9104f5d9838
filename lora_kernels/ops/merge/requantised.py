"""The merged weight of a quantised base, in the form that the base has."""

import torch
from torch import Tensor

from lora_kernels.ops.merge.op import merged_weight
from lora_kernels.ops.quantised import QuantisedWeight
from lora_kernels.ops.quantised.requantise import requantised


def requantised_weight(
    w: QuantisedWeight, a: Tensor, b: Tensor, scale: float = 1.0, gain: Tensor | None = None
) -> tuple[QuantisedWeight, float]:
    """Q(M) with M = gain ⊙ (W + scale·B A), in float32 as `merged_weight` has it, and
    ‖Q(M) - M‖ / ‖M‖ over all numbers: what the codes lose of it.

    Q(M) is `w` with other codes, scales and zeros; its table, blocks and dtype are those of w. Each
    code is the nearest to its number. An adapter changes W by little, so Q may give back the codes
    of W: an error that is larger than ‖M - W‖ / ‖M‖ says so.

    Shapes: w [out, in], a [r, in], b [out, r], gain [out]. Nothing gets a gradient.

    Raises:
        TypeError: w is no QuantisedWeight, or as `merged_weight`.
        ValueError: M is not finite, or as `merged_weight`.
    """
    if not isinstance(w, QuantisedWeight):
        raise TypeError(f"requantised_weight: w must be a QuantisedWeight, found {type(w).__name__}; see merged_weight")
    merged = merged_weight(w.to(torch.float32), a, b, scale, gain)
    if not merged.isfinite().all():
        raise ValueError("requantised_weight: the merged weight must be finite; a, b, gain or w is not")
    found = requantised(merged, w)
    size = float(torch.linalg.vector_norm(merged, dtype=torch.float64))
    lost = found.dequantise(torch.float32).sub_(merged)
    return found, float(torch.linalg.vector_norm(lost, dtype=torch.float64)) / size if size else 0.0
