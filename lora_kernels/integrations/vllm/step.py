"""Which adapter each token of an engine's step wants, in buffers whose addresses stay, as CUDA
graphs need."""

import torch
from torch import Tensor

from lora_kernels.ops.multi_lora.plan import BASE, BatchPlan, id_of


class Step:
    """The slots' generations and the current plan, for all layers that one punica wrapper of vLLM
    serves."""

    def __init__(self, slots: int, tokens: int, device: torch.device) -> None:
        self.generation = torch.zeros(slots, dtype=torch.int32, device=device)
        self.all_base = True
        """No token of the step wants an adapter."""
        self._ids = torch.full((tokens, 1), BASE, dtype=torch.int64, device=device)
        self._order = torch.arange(tokens, device=device)
        self._starts = torch.zeros(slots + 1, dtype=torch.int64, device=device)
        self._error = torch.zeros(1, dtype=torch.int32, device=device)
        self._seen = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._filled = 0
        self._plans: dict[int, BatchPlan] = {}

    def occupy(self, slot: int) -> None:
        """The slot holds another adapter from now on."""
        self.generation[slot] = (self.generation[slot] + 1) & 0x7FFFFFFF

    def set_slots(self, slots: Tensor, all_base: bool) -> None:
        """The slot of each token of the next step, [tokens] int64, -1 for the base; and whether all
        are -1.

        Raises:
            LookupError: a kernel of an earlier step met an id that was out of range or stale: our
                own bookkeeping is wrong.
            ValueError: there are more tokens than there is room for.
        """
        if int(self._seen):
            self._seen.zero_()
            self._error.zero_()
            raise LookupError("lora_kernels: a kernel met an adapter's id that is out of range or stale")
        # known at the next step, so none waits for the device
        self._seen.copy_(self._error, non_blocking=True)
        count, room = len(slots), len(self._ids)
        if count > room:
            raise ValueError(f"lora_kernels: a step may have {room} tokens, found {count}")
        self.all_base = all_base
        ids = id_of(self.generation[slots.clamp_min(0)].long(), slots)
        plan = BatchPlan.build(torch.where(slots >= 0, ids, BASE), len(self.generation))
        last = max(count, self._filled)
        self._ids[:count], self._order[:count] = plan.ids, plan.order
        self._ids[count:last] = BASE
        self._order[count:last] = torch.arange(count, last, device=self._ids.device)
        self._starts.copy_(plan.starts)
        self._filled = count

    def plan(self, tokens: int) -> BatchPlan:
        """The plan of a step of that many tokens; those beyond the step's own, which pad it, want
        the base. The order of the step holds for a longer one, since base tokens come last in it,
        by their number."""
        if torch.compiler.is_compiling():
            return self._plan_view(tokens)
        if tokens < self._filled:
            return BatchPlan.build(self._ids[:tokens], len(self.generation))
        found = self._plans.get(tokens)
        if found is None:
            found = self._plans[tokens] = self._plan_view(tokens)
        return found

    def _plan_view(self, tokens: int) -> BatchPlan:
        return BatchPlan(self._ids[:tokens], None, self._order[:tokens], self._starts, self._error)


def step_of(punica_wrapper: object) -> Step:
    """The step that `hooks` gave a wrapper."""
    step = getattr(punica_wrapper, "lora_kernels_step", None)
    if not isinstance(step, Step):
        raise RuntimeError(f"lora_kernels: {type(punica_wrapper).__name__} was made before the plugin was loaded")
    return step


def set_step(punica_wrapper: object, step: Step) -> None:
    punica_wrapper.lora_kernels_step = step  # type: ignore[attr-defined]
