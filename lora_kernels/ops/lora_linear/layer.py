"""One of the layers that share x, as both backends for GPUs hand it to their kernels."""

from torch import Tensor

from lora_kernels.ops.lora_linear.call import Backward, Forward, GroupBackward, GroupForward


class Layer:
    """A layer of a call, what is to be had of it, and its sizes n × r. `fields`: those of a
    quantised W, whose codes w then is until a backend has made numbers of them."""

    def __init__(self, call: Forward | Backward) -> None:
        self.w, self.a, self.b, self.scale = call.w, call.a, call.b, call.scale
        self.fields = (call.w, call.parts, call.layout) if call.layout else None
        self.n, self.r = call.b.shape
        self.bias, self.gain = _contiguous_or_none(call.bias), _contiguous_or_none(call.gain)
        self.dropout = call.dropout if call.seed is not None else 0.0
        self.drop = (self.dropout, call.seed if self.dropout > 0 else None)
        self.drop_base = call.drop_base and self.gain is not None and self.dropout > 0
        self.keep_z = isinstance(call, Forward) and call.keep_z


def layers_of(call: GroupForward | GroupBackward) -> list[Layer]:
    """Those of a group."""
    return [Layer(member) for member in call.members()]


def _contiguous_or_none(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()
