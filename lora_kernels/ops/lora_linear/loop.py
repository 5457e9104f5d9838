"""The group as a loop over the single formula, for the backends whose kernels take one member at a
time."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lora_kernels.ops.lora_linear.call import GroupBackward, GroupForward


def refuse_each(refusal: Callable[[Any], str | None], call: GroupForward | GroupBackward) -> str | None:
    """What the refusal of the single op says of the first member that it refuses."""
    for i, member in enumerate(call.members()):
        reason = refusal(member)
        if reason is not None:
            return f"member {i}: {reason}"
    return None


def refuse_codes_or_each(refusal: Callable[[Any], str | None], call: GroupForward | GroupBackward) -> str | None:
    """The same for kernels that take all members in one launch, and no codes."""
    return "a member's w is a QuantisedWeight; one by one they run" if call.layouts else refuse_each(refusal, call)


def forward_each(forward, call):
    """`forward` is the single op's."""
    return tuple(map(list, zip(*map(forward, call.members()), strict=True)))


def backward_each(gradients, call, add=Tensor.add_):
    """`gradients` is the single op's backward that leaves dx in the dtype of the sums: it is
    rounded once, here. `add` sums two of these."""
    dx, others, wanted = None, [], call.needs[0]
    for member in call.members():
        wide, *rest = gradients(member)
        others.append(rest)
        if wanted:
            dx = wide if dx is None else add(dx, wide)
    return (dx.to(call.x.dtype) if wanted else None, *map(list, zip(*others, strict=True)))
