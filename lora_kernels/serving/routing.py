"""Rows that a router sends to experts, carried along with whose they are."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lora_kernels.ops.multi_lora.plan import BatchPlan
from lora_kernels.serving.frame import WAY_OUT, Frame, Layout

ROWWISE = frozenset(
    "add add_ sub sub_ mul mul_ div div_ true_divide pow neg exp sqrt rsqrt square abs tanh sigmoid erf clamp clamp_ clip where"
    " relu relu_ silu gelu elu selu leaky_relu mish hardtanh hardswish softplus relu6 hardsigmoid dropout dropout_ linear"
    " layer_norm rms_norm to float half bfloat16 double type type_as contiguous clone detach nan_to_num nan_to_num_"
    " __add__ __radd__ __iadd__ __sub__ __rsub__ __mul__ __rmul__ __imul__ __truediv__ __rtruediv__ __itruediv__ __pow__"
    " __neg__ cuda cpu requires_grad_".split()
)
"""Functions whose row of the result is of the same row of the arguments alone."""
ALONG_DIM = frozenset(["softmax", "log_softmax", "cumsum", "normalize"])
"""Those that are so along the last dimension only."""
MOVING = frozenset(
    "index_select transpose swapaxes permute repeat_interleave split chunk unbind cat concat stack narrow select".split()
)
"""Those that move whole rows, if not along the last dimension."""
SHAPING = frozenset(
    ["view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "view_as", "reshape_as", "expand", "expand_as"]
)
_DIM = {"index_select": 1, "transpose": (1, 2), "swapaxes": (1, 2), "repeat_interleave": 2, "split": 2, "chunk": 2, "unbind": 1,
        "cat": 1, "concat": 1, "stack": 1, "narrow": 1, "select": 1}  # fmt: skip


class Routes(TorchFunctionMode):
    """While a block with experts runs: notes on its tensors whose each row is, [..., 1] for a
    tensor [..., d].

    It follows what keeps rows whole (indices, masks, shapes, elementwise functions, products from
    the right), and forgets them at anything else.
    """

    def __init__(self, frame: Frame) -> None:
        super().__init__()
        self.frame = frame
        self._plans: dict[int, tuple[Tensor, BatchPlan]] = {}

    def note(self, t: Any, owners: Tensor | None) -> None:
        if isinstance(t, Tensor):
            t.__dict__["_rows"] = None if owners is None else (self, owners)

    def owners(self, t: Any) -> Tensor | None:
        """Not those that another call noted on a tensor that is used again."""
        noted = t.__dict__.get("_rows") if isinstance(t, Tensor) else None
        return noted[1] if noted is not None and noted[0] is self else None

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        tagged = [t for t in tensors_of(args, kwargs) if self.owners(t) is not None]
        before = args[0].shape if name == "__setitem__" and tagged else None
        y = function(*args, **kwargs)
        if not tagged:
            if _in_place(name) and args:
                self.note(args[0], None)
            return y
        if before is not None or (_in_place(name) and name not in ROWWISE):
            self.note(args[0], None)
            return y
        if isinstance(y, Tensor) and y.dim():
            self.note(y, self._of_result(name, function, args, kwargs, tagged, y))
        elif isinstance(y, list | tuple) and name in MOVING and y and all(isinstance(each, Tensor) for each in y):
            parts = self._moved(name, function, args, kwargs)
            for i, each in enumerate(y):
                fits = parts is not None and parts[i].shape[:-1] == each.shape[:-1]
                self.note(each, parts[i] if fits else None)
        return y

    def _of_result(self, name: str, function: Any, args: Any, kwargs: Any, tagged: list[Tensor], y: Tensor) -> Tensor | None:
        first = self.owners(tagged[0])
        assert first is not None
        x, wanted = tagged[0], (*y.shape[:-1], 1)
        if name in ROWWISE or (name in ALONG_DIM and _last(args, kwargs, x)):
            return self._shared(tagged, y)
        if name in ("matmul", "__matmul__", "mm") and args[0] is x and len(tagged) == 1 and args[1].dim() == 2:
            return first
        if args[0] is not x:
            if name not in ("cat", "concat", "stack"):
                return None
        elif name in SHAPING:
            if y.shape[-1] != x.shape[-1]:
                return None
            return first.expand(wanted) if name in ("expand", "expand_as") else first.reshape(wanted)
        elif name == "__getitem__":
            return first[args[1]] if _leaves_last(args[1], x.dim()) else None
        if name not in MOVING:
            return None
        moved = self._moved(name, function, args, kwargs)
        return moved if isinstance(moved, Tensor) and moved.shape == wanted else None

    def _shared(self, tagged: list[Tensor], y: Tensor) -> Tensor | None:
        """The owners that all arguments of a result's rows have."""
        shape, found = (*y.shape[:-1], 1), None
        for t in tagged:
            owners = self.owners(t)
            if owners is None or owners.shape != shape:
                if t.shape[:-1].numel() <= 1 and len(tagged) > 1:
                    continue
                return None
            if found is not None and owners is not found and not torch.equal(owners, found):
                return None
            found = owners
        return found

    def _moved(self, name: str, function: Any, args: Any, kwargs: Any) -> Any:
        """The owners after what moved the rows, or None if it moved along the last dimension."""
        source = args[0] if isinstance(args[0], Tensor) else args[0][0]
        rank = source.dim() + (name == "stack")
        at = _DIM.get(name)
        if name == "permute":
            order = args[1] if isinstance(args[1], list | tuple) else args[1:]
            if not order or order[-1] % rank != rank - 1:
                return None
        elif at is None:
            return None
        else:
            names = ("dim0", "dim1") if isinstance(at, tuple) else ("dim",)
            places = at if isinstance(at, tuple) else (at,)
            for place, key in zip(places, names, strict=True):
                dim = args[place] if len(args) > place else kwargs.get(key, None if name == "repeat_interleave" else 0)
                if not isinstance(dim, int) or dim % rank == rank - 1:
                    return None
        if isinstance(args[0], Tensor):
            moving: Any = self.owners(args[0])
        else:
            moving = [self.owners(t) for t in args[0]]
            if any(each is None for each in moving):
                return None
        return None if moving is None else function(moving, *args[1:], **kwargs)

    def through(self, layer: Any, x: Tensor, plan: BatchPlan) -> Tensor:
        with torch._C.DisableTorchFunction():
            y: Tensor = layer.with_plan(x, plan)
        self.note(y, self.owners(x))
        return y

    def plan_of(self, layer: Any, x: Tensor) -> BatchPlan | None:
        """The plan of what rows x was made of, None if that is not known."""
        owners = self.owners(x)
        if owners is None:
            return None
        found = self._plans.get(id(owners))
        if found is None:
            with torch._C.DisableTorchFunction():
                found = self._plans[id(owners)] = owners, self.frame.batch.plan_for(owners.reshape(-1))
        return found[1]


class RoutedFrame(Frame):
    """A frame inside a block with experts."""

    def __init__(self, frame: Frame) -> None:
        self.__dict__.update(frame.__dict__)
        self.plans, self.outer, self.bound = {}, frame, True
        self.routes: Routes = Routes(self)

    def plan_of(self, layer: Any, x: Tensor, shape: torch.Size) -> BatchPlan | None:
        plan = self.routes.plan_of(layer, x) if x.is_floating_point() else None
        if plan is not None:
            return plan
        if layer.routed:
            if not layer.is_changed(self.modules):
                return None
            raise ValueError(
                f"adapters: {self.batch.count} were given, for {layer.name} with an input of {list(x.shape)}: the way of its"
                f" rows through the router was lost; {WAY_OUT}"
            )
        return self.outer.plan_of(layer, x, shape)


class Block:
    """A module that sends rows to experts, and what is known of its input."""

    def __init__(self, scope: Any, name: str) -> None:
        self.scope, self.name = scope, name
        self.layouts: dict[int, Layout] = {}
        self.routed, self.by_tokens = False, False

    def wrap(self, call: Any) -> Callable[..., Any]:
        @functools.wraps(call)
        def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            frame = self.scope.current.get()
            if frame is not None and frame.seen is not None:
                for x in tensors_of(args, kwargs)[:1]:
                    frame.seen(self, x)
            if frame is None or frame.all_base or frame.batch.uniform or frame.routes is not None:
                return call(module, *args, **kwargs)
            routed = RoutedFrame(frame)
            for x in tensors_of(args, kwargs):
                if x.is_floating_point() and x.dim() > 1:
                    owners = frame.rows_of(self, x)
                    routed.routes.note(x, None if owners is None else owners[..., None])
                break  # the layout is that of the first
            token = self.scope.current.set(routed)
            try:
                with routed.routes:
                    return call(module, *args, **kwargs)
            finally:
                self.scope.current.reset(token)

        return forward


def tensors_of(args: Any, kwargs: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += [each for each in value if isinstance(each, Tensor)]
    return found


def _in_place(name: str) -> bool:
    return (name.endswith("_") and not name.endswith("__")) or name in ("__setitem__", "__iadd__", "__imul__")


def _last(args: Any, kwargs: Any, x: Tensor) -> bool:
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    return isinstance(dim, int) and dim % x.dim() == x.dim() - 1


def _leaves_last(index: Any, rank: int) -> bool:
    """Whether an index takes whole rows."""
    taken = 0
    for each in index if isinstance(index, tuple) else (index,):
        if each is Ellipsis or isinstance(each, list | bool):
            return False
        if isinstance(each, Tensor) and each.dtype in (torch.bool, torch.uint8):
            taken += each.dim()
        elif each is not None:
            taken += 1
    return taken < rank
