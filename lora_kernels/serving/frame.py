"""Whose a row of a layer's input is, in one call of a served model."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lora_kernels.ops.multi_lora.plan import BASE, BatchPlan, ids_of_experts

WAY_OUT = "say whose its rows are: pool.batch(names, rows=...), or rows_of(rows) around the call"


Lengths = tuple[tuple[int, int], ...]
"""Kinds of tokens in a call, and how many of each a sequence has."""


class Layout:
    """Where the sequences are in a layer's input [..., in]: along `dim`, each `per` entries long;
    side by side (`minor` False: s0 s0 s1 s1) or interleaved (s0 s1 s0 s1). With `of_tokens`, `per`
    is which of the call's lengths that is. One object for each, compared by identity.
    """

    known: dict[tuple[int, bool, int, bool], "Layout"] = {}

    def __init__(self, dim: int, minor: bool, per: int, of_tokens: bool) -> None:
        self.dim, self.minor, self.per, self.of_tokens = dim, minor, per, of_tokens

    @classmethod
    def of(cls, dim: int, minor: bool = False, per: int = 1, of_tokens: bool = False) -> "Layout":
        key = (dim, minor, per, of_tokens)
        return cls.known.setdefault(key, cls(*key))

    def fits(self, size: int, requests: int, tokens: Lengths | None) -> bool:
        if not self.of_tokens:
            return size == requests * self.per
        return size in [requests * length for kind, length in tokens or ((self.per, 1),) if kind == self.per]


LEAD = Layout.of(0)
FOREIGN = Layout.of(-1)
"""Of a layer that sees what all sequences share, such as positions."""
UNLIKE = Layout.of(-2)
"""Of a layer whose rows are in no order of sequences, or of several: routed, packed, mixed."""


class Requests:
    """What a batch wants: the adapters of each request, and what was made of them."""

    def __init__(
        self, count: int, ids: Tensor, weights: Tensor | None, slots: int, modules: frozenset[str], uniform: bool,
        given: Tensor | None = None, pool: Any = None,
    ) -> None:  # fmt: skip
        self.ids, self.weights, self._slots, self.given = ids, weights, slots, given
        self.pool = pool
        """The pool, if an adapter of the batch has gains, which are of the weights as they were."""
        self.modules, self.uniform = modules, uniform
        """Modules that an adapter changes; whether all requests want the same adapters."""
        self.all_base, self.ended, self.count = not modules, False, count
        self.plans: dict[Any, BatchPlan] = {}
        """By what is known of the rows, and how many there are."""
        self._plan: BatchPlan | None = None
        self._columns: dict[int, tuple[BatchPlan, list[BatchPlan]]] = {}
        self._frames: dict[Any, Frame] = {}

    def plan_for(self, owners: Tensor) -> BatchPlan:
        """The plan of rows that belong to these requests, -1 to none."""
        owners, weights = owners.to(self.ids.device), self.weights
        nobody = self.ids.new_full((1, self.ids.shape[1]), BASE)
        if weights is not None:
            weights = torch.cat([weights, weights.new_zeros(1, weights.shape[1])])[owners]
        return self._with_error(BatchPlan.build(torch.cat([self.ids, nobody])[owners], self._slots, weights))

    def repeated_plan(self, each: int) -> BatchPlan:
        """The plan of `each` neighbouring rows for every request."""
        ids, weights = self.ids, self.weights
        if each != 1:
            ids, weights = ids.repeat_interleave(each, 0), None if weights is None else weights.repeat_interleave(each, 0)
        return self._with_error(BatchPlan.build(ids, self._slots, weights))

    def uniform_plan(self, rows: int) -> BatchPlan:
        """The plan of rows that all want what the first request wants."""
        weights = None if self.weights is None else self.weights[:1].expand(rows, -1)
        return self._with_error(BatchPlan.build(self.ids[:1].expand(rows, -1), self._slots, weights))

    def columns(self, plan: BatchPlan) -> list[BatchPlan]:
        """A plan as one for each of the adapters that a row may have."""
        if plan.ids.shape[1] == 1:
            return [plan]
        found = self._columns.get(id(plan))
        if found is None or found[0] is not plan:
            weights = [None] * plan.ids.shape[1] if plan.weights is None else plan.weights.unbind(1)
            pairs = zip(plan.ids.unbind(1), weights, strict=True)
            made = [self._with_error(BatchPlan.build(ids, self._slots, of_ids)) for ids, of_ids in pairs]
            found = self._columns[id(plan)] = plan, made
        return found[1]

    def plan_of_experts(self, plan: BatchPlan, tokens: Tensor, expert: Tensor, experts: int) -> BatchPlan:
        """The plan of rows that are of these tokens of a plan, and of these of so many experts."""
        ids = ids_of_experts(plan.ids[tokens], expert[:, None], experts)
        weights = None if plan.weights is None else plan.weights[tokens]
        return self._with_error(BatchPlan.build(ids, self._slots * experts, weights))

    def _with_error(self, plan: BatchPlan) -> BatchPlan:
        """One flag for all plans: the end of a batch reads it once."""
        self._plan = plan if self._plan is None else replace(plan, error=self._plan.error)
        return self._plan

    def frame(self, expansion: int = 1, tokens: Lengths | None = None, strays: bool = False) -> Any:
        """The batch in a call of that kind."""
        if self.given is not None:
            return Given(self, self.given)
        key = (expansion, tokens, strays)
        found = self._frames.get(key)
        if found is None:
            found = self._frames[key] = Frame(self, expansion, tokens, strays)
        return found

    def end(self) -> None:
        self.ended = True
        for frame in list(self._frames.values()):
            frame.plans = {}  # a thread that goes on asks anew, and is told
        self._frames, self.pool = {}, None

    def raise_if_ended(self) -> None:
        """Raises RuntimeError if the adapters may have been evicted."""
        if self.ended:
            why = "(a thread or task that began inside it goes on?)"
            raise RuntimeError(f"Batch: it has ended; the pool may have evicted its adapters {why}")

    def raise_errors(self) -> None:
        """Raises LookupError if a kernel met an id that is stale. Waits for the device."""
        if self._plan is not None:
            self._plan.raise_errors()


class Frame:
    """A batch in one call: the adapters of each of its sequences, and the plans of its layers.

    `expansion` sequences of the call belong to one request, side by side, as `generate` expands
    them. `tokens` are the lengths that sequences have in the call, None outside the model's
    forward.
    """

    routes: Any = None
    """The rows that a block with experts carries along."""
    seen: Any = None
    """What a probe calls with every layer's input."""
    generating = False
    """In `generate`, outside the forward of each step."""
    expands = 1
    """How many sequences `generate` makes of one."""
    around: tuple[Any, ...] = ()
    """Generators that had a batch open where this frame began, and were running."""

    def __init__(self, batch: Requests, expansion: int = 1, tokens: Lengths | None = None, strays: bool = False) -> None:
        self.batch, self.expansion, self.tokens, self.strays = batch, expansion, tokens, strays
        self.requests, self.bound = batch.count * expansion, tokens is not None
        self.all_base, self.modules = batch.all_base, batch.modules
        self.plans: dict[Any, BatchPlan] = {}
        """By layout and shape of x: those of a step that were made already."""

    def plan_of(self, layer: Any, x: Tensor, shape: torch.Size) -> BatchPlan | None:
        """The plan of a layer's input whose rows are `shape`; None where no adapter of the batch
        changes the layer, so that it does not matter whose they are.

        Raises:
            ValueError: nobody knows whose they are.
            RuntimeError: the batch has ended.
        """
        batch, layout = self.batch, layer.layouts.get(len(shape))
        batch.raise_if_ended()
        rows = shape.numel()
        if batch.uniform and batch.count:
            if layout is None and self.bound and shape[:1] != (self.requests,):
                layer.layouts[len(shape)] = UNLIKE
            plan = batch.plans.get(rows)
            if plan is None:
                plan = batch.plans[rows] = batch.uniform_plan(rows)
        else:
            surely = layout is LEAD and shape[0] == self.requests and not (layer.routed or self.strays)
            fault = "" if surely else self._fault(layer, shape, layout)
            if fault:
                if self.bound and layout is None:  # it may fit by chance the next time
                    layer.layouts[len(shape)] = UNLIKE
                self._refuse(layer, x, fault)
                return None
            found = layout or LEAD
            side_by_side = found.dim == 0 and not found.minor
            key = rows if side_by_side else (found, shape, self.expansion)
            plan = batch.plans.get(key)
            if plan is None:
                each = rows // max(batch.count, 1)
                plan = batch.repeated_plan(each) if side_by_side else batch.plan_for(self._along(found, shape))
                batch.plans[key] = plan
        self._remember(layout, x, shape, plan)
        return plan

    def _remember(self, layout: Layout | None, x: Tensor, shape: torch.Size, plan: BatchPlan) -> None:
        # an embedding's x has no dimension of features: the same shape says something else
        self.plans[(layout, x.shape) if len(shape) < x.dim() else (layout, x.shape, "entries")] = plan

    def rows_of(self, block: Any, x: Tensor) -> Tensor | None:
        """The request of each row of a block's input, like x without its last dimension."""
        shape = x.shape[:-1]
        layout = block.layouts.get(len(shape))
        if self._fault(block, shape, layout):
            return None
        return self._along(layout or LEAD, shape).view(shape)

    def _fault(self, layer: Any, shape: torch.Size, layout: Layout | None) -> str:
        """Why nobody knows whose the rows are; "" if somebody does."""
        if layer.routed:
            return "it sees rows that a router chose, outside the block that carries them"
        if self.strays and not layer.by_tokens:
            return "images or sounds are not one for each sequence"
        if layout is FOREIGN or layout is UNLIKE:
            return "it sees what all sequences share" if layout is FOREIGN else "its rows are in no order of sequences"
        if layout is not None:
            if not layout.fits(shape[layout.dim], self.requests, self.tokens):
                order = "interleaved" if layout.minor else "side by side"
                each = f", {layout.per} entries each, {order}," if layout.per > 1 and not layout.of_tokens else ""
                if layout.of_tokens:
                    each = f" × {' or '.join(str(n) for k, n in self.tokens or ((layout.per, 1),) if k == layout.per)} tokens"
                return f"dimension {layout.dim} must be the {self.requests} sequences{each}"
            return ""
        if shape[:1] != (self.requests,):
            return f"its first dimension must be the {self.requests} sequences"
        if self.requests in shape[1:]:
            return f"its dimensions of {self.requests} may be sequences or others"
        if self.tokens and len(shape) == 1:
            return "its rows may be pooled sequences, or others of that number"
        return ""

    def _refuse(self, layer: Any, x: Tensor, fault: str) -> None:
        """Raises ValueError where an adapter of the batch changes the layer."""
        if not layer.is_changed(self.modules):
            return
        why = "" if layer.layouts.get(x.dim() - 1) not in (None, UNLIKE) else layer.scope.why
        given = f"{self.batch.count} were given"
        if self.expansion > 1:
            given += f", × {self.expansion} = {self.requests} sequences"
        raise ValueError(f"adapters: {given}, for {layer.name} with an input of {list(x.shape)}: {fault}{why}; {WAY_OUT}")

    def _owners(self, per: int, minor: bool) -> Tensor:
        each = torch.arange(self.batch.count, device=self.batch.ids.device).repeat_interleave(self.expansion)
        return each.repeat(per) if minor else each.repeat_interleave(per)

    def _along(self, layout: Layout, shape: torch.Size) -> Tensor:
        owners = self._owners(shape[layout.dim] // max(self.requests, 1), layout.minor)
        return owners.view(-1, *[1] * (len(shape) - 1 - layout.dim)).expand(shape).reshape(-1)


class Given(Frame):
    """A frame whose rows the caller has said, `rows` [n] with a request of the batch or -1 each."""

    def __init__(self, batch: Requests, rows: Tensor) -> None:
        super().__init__(batch)
        self.given = rows
        self._made: dict[int, BatchPlan] = {}
        self._in_call: Given | None = None

    def in_call(self) -> "Given":
        """The same in a call of the model."""
        if self._in_call is None:
            self._in_call = Given(self.batch, self.given)
            self._in_call.bound, self._in_call._made = True, self._made
        self._in_call.around = self.around
        return self._in_call

    def plan_of(self, layer: Any, x: Tensor, shape: torch.Size) -> BatchPlan | None:
        self.batch.raise_if_ended()
        count, total = len(self.given), shape.numel()
        if count not in (shape[0] if shape else 1, total):
            self._refuse(layer, x, f"rows= has {count} entries; its first dimension, or its rows, must be as many")
            return None
        each = 1 if count == total else total // max(count, 1)
        plan = self._made.get(each)
        if plan is None:
            plan = self._made[each] = self.batch.plan_for(self.given.repeat_interleave(each))
        self._remember(layer.layouts.get(len(shape)), x, shape, plan)
        return plan

    def rows_of(self, block: Any, x: Tensor) -> Tensor | None:
        shape = x.shape[:-1]
        if len(self.given) not in (shape[0] if shape else 1, shape.numel()):
            return None
        each = shape.numel() // max(len(self.given), 1)
        return self.given.repeat_interleave(each).view(shape).to(self.batch.ids.device)


def checked_rows(rows: Any, requests: int) -> Tensor:
    """Rows as a tensor on the host.

    Raises:
        TypeError, ValueError: they are no integers from -1 to requests - 1.
    """
    given = torch.as_tensor(rows).detach().cpu()
    if given.dim() != 1 or given.is_floating_point() or given.dtype is torch.bool:
        raise TypeError(f"rows must be one integer for each row, found {list(given.shape)} {given.dtype}")
    low, high = (int(given.min()), int(given.max())) if len(given) else (0, -1)
    if low < -1 or high >= requests:
        raise ValueError(f"rows must be from 0 to {requests - 1}, or -1 for the base, found {low} to {high}")
    return given.long()
