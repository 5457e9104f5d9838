"""What `fuse` did to each LoRA layer, and what has run since."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_kernels.ops import QuantisedWeight, expert_lora_linear, explain, lora_linear
from lora_kernels.ops.registry import PREFERENCE

_NAMES_SHOWN = 3


@dataclass(frozen=True, repr=False)
class FuseReport:
    """Every LoRA layer of a model, by name; `print(report)` shows a summary.

    `fused` maps a layer to the backend that takes its calls. `left` maps a layer to the reason why,
    as the model stands, PEFT's own forward takes them. `slow` maps each layer on the reference to
    the reasons of the faster backends. `kept_off` maps an encoder that would take weights past its
    layers to the reason why it is kept off that path.
    """

    fused: Mapping[str, str]
    left: Mapping[str, str]
    slow: Mapping[str, str] = field(default_factory=dict)
    _fallbacks: Callable[[], dict[str, dict[str, int]]] = field(default=dict, compare=False)
    kept_off: Mapping[str, str] = field(default_factory=dict)
    _groups: Callable[[], dict[str, list[tuple[str, ...]]]] = field(default=dict, compare=False)
    _alone: Callable[[], dict[str, dict[str, int]]] = field(default=dict, compare=False)

    def fallbacks(self) -> dict[str, dict[str, int]]:
        """How many calls of each fused layer went to PEFT's forward after all, by layer and reason,
        up to now."""
        return self._fallbacks()

    def groups(self) -> dict[str, list[tuple[str, ...]]]:
        """The layers that run as one op, up to now: by the module that holds them, their names
        within it, in the order of their calls."""
        return self._groups()

    def alone(self) -> dict[str, dict[str, int]]:
        """How many calls of a group's layers were not as the group expects them, and ran alone, by
        module and reason, up to now."""
        return self._alone()

    def summary(self) -> str:
        """One line: how many layers are fused, and on which backends."""
        total = len(self.fused) + len(self.left)
        line = f"{len(self.fused)} of {total} LoRA layers fused"
        backends = Counter(self.fused.values())
        if len(backends) == 1:
            return f"{line}; backend {next(iter(backends))}"
        return "; ".join([line, *(f"{count} on backend {name}" for name, count in backends.most_common())])

    def __repr__(self) -> str:
        return f"<FuseReport: {self.summary()}>"

    def __str__(self) -> str:
        lines = [self.summary()]
        sizes = Counter(len(group) for groups in self.groups().values() for group in groups)
        if sizes:
            (first, count), *others = sorted(sizes.items(), reverse=True)
            text = ", ".join([f"{count} group{'s' if count > 1 else ''} of {first}", *(f"{n} of {size}" for size, n in others)])
            lines.append(f"  layers that share an input run as one op: {text}")
        lines += _section("on the reference, because", _grouped(self.slow))
        lines += _section("left to PEFT's own forward, because", _grouped(self.left))
        lines += _section("kept off their fast path, because", _grouped(self.kept_off, "module"))
        lines += _section("calls that went to PEFT's own forward", _summed(self.fallbacks()))
        lines += _section("calls that a group did not take", _summed(self.alone()))
        return "\n".join(lines)


@dataclass
class Survey:
    """What the report will say; asks the registry once for each kind of layer."""

    fused: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    slow: dict[str, str] = field(default_factory=dict)
    _answers: dict[object, tuple[str, str]] = field(default_factory=dict)

    def add_layer(
        self,
        name: str,
        w: Tensor | QuantisedWeight,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float | Tensor,
        dropout: float,
        has_gain: bool,
    ) -> None:
        """Notes which backend takes one token through these weights, or why none does."""
        kind = (*(_kind(t) for t in (w, bias, a, b) if t is not None), dropout > 0, has_gain)

        def call(x: Tensor) -> Tensor:
            gain = torch.ones(w.shape[0], device=w.device) if has_gain else None
            # a given seed, so that asking draws nothing from the user's generator
            return lora_linear(x, w, a, b, scale, bias, gain, dropout, seed=torch.zeros((), dtype=torch.int64))

        self._add(name, kind, w, w.shape[1], call)

    def add_experts(
        self,
        name: str,
        w: Tensor | QuantisedWeight,
        bias: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
        scale: float,
        transposed: bool,
    ) -> None:
        """The same of the weights of experts: one token of the first one."""

        def call(x: Tensor) -> Tensor:
            ends = torch.ones(w.shape[0], dtype=torch.int64, device=w.device)
            return expert_lora_linear(x, ends, w, a, b, scale, bias, None, transposed)

        kind = (*(_kind(t) for t in (w, bias, a, b) if t is not None), "experts", transposed)
        self._add(name, kind, w, w.shape[1 if transposed else 2], call)

    def _add(
        self, name: str, kind: object, w: Tensor | QuantisedWeight, features: int, call: Callable[[Tensor], Tensor]
    ) -> None:
        try:
            if kind not in self._answers:
                self._answers[kind] = _backend(call, torch.zeros(1, features, dtype=w.dtype, device=w.device))
        except NotImplementedError as refusal:
            self.left[name] = str(refusal)
            return
        self.fused[name], reasons = self._answers[kind]
        if reasons:
            self.slow[name] = reasons


def _kind(t: Tensor | QuantisedWeight) -> tuple[object, ...]:
    """What the choice of a backend may look at."""
    if isinstance(t, QuantisedWeight):
        return (*t.fields()[2], t.device)
    return t.shape, t.stride(), t.dtype, t.device


def _backend(call: Callable[[Tensor], Tensor], x: Tensor) -> tuple[str, str]:
    """The backend that is chosen for x, and for the reference the reasons of the faster ones."""
    with torch.no_grad():
        explanation = explain(call, x)
    decision = explanation.decisions[-1]
    faster = PREFERENCE.get(x.device.type, ()) if decision.chosen == "reference" else ()
    return decision.chosen, "; ".join(f"{name}: {decision.others[name]}" for name in faster if name in decision.others)


def _summed(counts: Mapping[str, Mapping[str, int]]) -> dict[str, str]:
    calls: Counter[str] = Counter()
    for reasons in counts.values():
        calls.update(reasons)
    return {reason: str(n) for reason, n in calls.most_common()}


def _grouped(reasons: Mapping[str, str], noun: str = "layer") -> dict[str, str]:
    """Each reason with its layers: "3 layers: a, b, c"."""
    layers: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        layers.setdefault(reason, []).append(name or "the model itself")
    return {reason: _counted(names, noun) for reason, names in layers.items()}


def _counted(names: list[str], noun: str) -> str:
    shown = ", ".join(names[:_NAMES_SHOWN]) + (", …" if len(names) > _NAMES_SHOWN else "")
    return f"{len(names)} {noun}{'s' if len(names) > 1 else ''}: {shown}"


def _section(title: str, rows: Mapping[str, str]) -> list[str]:
    return [f"  {title}", *(f"    {reason}: {what}" for reason, what in rows.items())] if rows else []
