"""Layers of one module that read one tensor (q, k and v; gate and up), run as one op.

Nobody names them. `Siblings` watches the fused layers of a module: those that get the same tensor
one after another, twice in the same order, form a group. From then on the call of the first
computes all, and keeps the others' outputs for their calls with that tensor. Whatever is not as
expected runs alone, as without groups, and is counted.

What is kept is dropped by the call of the last layer, and at the latest by a hook of the module,
which also runs where its forward raises. A call outside of the module's own runs alone.
"""

from collections import Counter
from threading import get_ident, local
from typing import Any, NamedTuple
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn

from lora_kernels.integrations.peft.checkpoints import UNKNOWN, epoch_of_checkpoint, next_epoch
from lora_kernels.integrations.peft.linear import FusedLinear, cached_gain
from lora_kernels.integrations.peft.state import read_state
from lora_kernels.ops import Member, group_pays, lora_linear_group
from lora_kernels.ops.lora_linear.op import autocasts

KEY = "_lora_kernels_siblings"  # of a layer's own dictionary
_SIGHTINGS = 2  # of the same layers in the same order, before they form a group
# calls of a layer, `warm_up`'s too, after which one that is in no group is watched no more
_WATCHED = 64
_MISSES, _IN_ROUNDS = 3, 16  # a group that misses thrice, and once in so many rounds, is given up
_any_autocast = torch._C._is_any_autocast_enabled
_modes = torch._C._len_torch_dispatch_stack


class _Group:
    """Layers in the order of their calls, and when they were a group: from one epoch to another."""

    def __init__(self, layers: tuple["ReferenceType[FusedLinear]", ...], formed: int) -> None:
        self.layers, self.formed = layers, formed
        self.given_up: int | None = None
        self.rounds = self.misses = 0

    def was_one(self, epoch: int) -> bool:
        return self.formed <= epoch and (self.given_up is None or epoch < self.given_up)


class _Round(NamedTuple):
    """What the first layer's call keeps for the others."""

    group: _Group
    x: Tensor
    conditions: tuple[Any, ...]
    states: list[tuple[Any, ...]]
    versions: list[list[int]]
    outputs: list[Tensor]
    """Of the layers that are still to be called, the next one last."""


class _Thread(local):
    """Of one thread: whether the module is being called, the round that is open, and whether the
    first layer's last call had a reason to be alone, which is then the others'."""

    inside = False
    round: _Round | None = None
    alone = False


class _Chain(NamedTuple):
    """Calls with one tensor, one after another."""

    thread: int
    x: "ReferenceType[Tensor]"
    conditions: tuple[Any, ...]
    layers: tuple[int, ...]


class Siblings:
    """The fused layers among the children of one module."""

    def __init__(self, parent: nn.Module | None) -> None:
        self._parent = None if parent is None else ref(parent)
        self._layers: dict[int, ReferenceType[FusedLinear]] = {}
        self._places: dict[int, tuple[_Group, int]] = {}
        self._groups: list[_Group] = []
        self._alone: Counter[str] = Counter()
        self._chain: _Chain | None = None
        self._sightings: Counter[tuple[int, ...]] = Counter()
        self._watched: Counter[int] = Counter()
        self._thread = _Thread()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Siblings | None":
        """One for the copies of all the layers, which learns anew; none for a layer that is copied
        alone."""
        parent = None if self._parent is None else memo.get(id(self._parent()))
        copied = None if parent is None else Siblings(parent)
        memo[id(self)] = copied
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        return Siblings, (None,)  # its module is the one that calls the hooks

    def is_of(self, parent: nn.Module) -> bool:
        """Whether this is the module; that of what was unpickled is the first that asks."""
        if self._parent is None:
            self._parent = ref(parent)
        return self._parent() is parent

    def call(self, layer: FusedLinear, x: Tensor, state: tuple[Any, ...]) -> Tensor | None:
        """The layer's output, if a group has it; None where the layer must compute alone."""
        place = self._places.get(id(layer))
        if place is None:
            self._watch(layer, x, state)
            return None
        thread = self._thread
        if not thread.inside:
            return None
        group, index = place
        if index == 0:
            return self._begin(group, layer, x, state, thread)
        kept, thread.round = thread.round, None
        if kept is None:
            if not thread.alone and group.given_up is None and _may_group(x):
                self._miss(group, f"{self._name(layer)} was called before {self._name(group.layers[0]())}")
            return None
        reason = self._difference(kept, group, index, x, state)
        if reason is not None:
            thread.alone = True
            self._miss(kept.group, f"{self._name(layer)}: {reason}")
            return None
        y = kept.outputs.pop()
        if kept.outputs:
            thread.round = kept
        return y

    def _begin(self, group: _Group, layer: FusedLinear, x: Tensor, state: tuple[Any, ...], thread: _Thread) -> Tensor | None:
        """The first layer's output; the others' are kept."""
        if thread.round is not None:
            self._drop(thread)
        thread.alone = True
        if not _may_group(x):
            return None
        epoch = epoch_of_checkpoint()
        if epoch is UNKNOWN or (group.given_up is not None if epoch is None else not group.was_one(epoch)):
            return None
        layers: list[Any] = [each() for each in group.layers]
        states: list[Any] = [state, *(None if other is None else read_state(other) for other in layers[1:])]
        for other, found in zip(layers, states, strict=True):
            if not _is_plain(other, found) or not _goes_with(x, layer, state, other, found):
                self._miss(group, f"{self._name(other)} is in a state that another op takes")
                return None
        thread.alone = False
        group.rounds += 1
        members = []
        for each, (w, bias, a, b, scale, _, magnitude) in zip(layers, states, strict=True):
            gain = None if magnitude is None else cached_gain(each, w, a, b, scale, magnitude)
            members.append(Member(w, a, b, scale, bias, gain))
        conditions, versions = _conditions(x), [_versions(each) for each in states]
        first, *others = lora_linear_group(x, members, [each[5] for each in states])
        thread.round = _Round(group, x, conditions, states, versions, others[::-1])
        return first

    def _difference(self, kept: _Round, group: _Group, index: int, x: Tensor, state: tuple[Any, ...]) -> str | None:
        """Why what was kept is not what this call would compute."""
        if kept.group is not group or index != len(group.layers) - len(kept.outputs):
            return "the order of the calls changed"
        if kept.x is not x:
            return "another tensor came"
        now = _conditions(x)
        if now != kept.conditions:
            at = next(i for i, (one, other) in enumerate(zip(now, kept.conditions, strict=True)) if one != other)
            return f"{_CONDITIONS[at]} changed"
        if len(state) != len(kept.states[index]) or not all(map(_same, state, kept.states[index])):
            return "the adapter's state changed"
        return None if _versions(state) == kept.versions[index] else "a weight changed"

    def _watch(self, layer: FusedLinear, x: Tensor, state: tuple[Any, ...]) -> None:
        """Notes a call of a layer that is in no group."""
        key, parent = id(layer), None if self._parent is None else self._parent()
        if parent is None:
            layer.__dict__.pop(KEY, None)
            return
        if key not in self._layers:
            if all(child is not layer for child in parent._modules.values()):
                return  # DataParallel's replica, which dies with the call
            self._layers[key] = ref(layer, lambda _: self.forget())
        epoch_of_checkpoint()  # what runs alone now does so when a checkpoint computes it again
        takes_part = _may_group(x)
        if takes_part and _is_plain(layer, state):
            chain, here = self._chain, (get_ident(), _conditions(x))
            if chain is not None and chain.x() is x and chain[::2] == here and key not in chain.layers:
                self._chain = chain._replace(layers=(*chain.layers, key))
            else:
                self._chain = _Chain(here[0], ref(x), here[1], (key,))
                if chain is not None and len(chain.layers) > 1:
                    self._saw(chain.layers)
        # of no use to the CPU, and elsewhere for long
        if takes_part or x.is_cpu:
            self._watched[key] += 1
            if self._watched[key] >= _WATCHED and key not in self._places:
                del self._layers[key]
                layer.__dict__.pop(KEY, None)

    def _saw(self, layers: tuple[int, ...]) -> None:
        self._sightings[layers] += 1
        if self._sightings[layers] == _SIGHTINGS:
            self._form(layers)

    def _form(self, keys: tuple[int, ...]) -> None:
        parent = None if self._parent is None else self._parent()
        if parent is None or any(key in self._places for key in keys):
            return
        if self.leave not in parent._forward_hooks.values():
            parent.register_forward_pre_hook(self.enter)
            parent.register_forward_hook(self.leave, always_call=True)
        group = _Group(tuple(self._layers[key] for key in keys), next_epoch())
        self._groups.append(group)
        self._places.update({key: (group, i) for i, key in enumerate(keys)})

    def enter(self, parent: nn.Module, *_: Any) -> None:
        """A hook before the module's forward."""
        if not torch.compiler.is_compiling() and self.is_of(parent):
            self._thread.inside, self._thread.round, self._thread.alone = True, None, False

    def leave(self, *_: Any) -> None:
        """A hook after the module's forward, whatever came of it."""
        if not torch.compiler.is_compiling():
            self._thread.inside = False
            if self._thread.round is not None:
                self._drop(self._thread)

    def _drop(self, thread: _Thread) -> None:
        kept, thread.round = thread.round, None
        assert kept is not None
        missing = kept.group.layers[-len(kept.outputs)]()
        self._miss(kept.group, f"{self._name(missing)} was not called")

    def _miss(self, group: _Group, reason: str) -> None:
        self._alone[reason] += 1
        group.misses += 1
        if group.given_up is None and group.misses >= _MISSES and group.misses * _IN_ROUNDS > group.rounds:
            group.given_up = next_epoch()

    def _name(self, layer: nn.Module | None) -> str:
        parent = None if self._parent is None else self._parent()
        children = {} if parent is None else parent._modules
        return next((name for name, each in children.items() if each is layer), "a layer that is gone")

    def groups(self) -> list[tuple[str, ...]]:
        """The names of the layers of each group, within their module."""
        return [tuple(self._name(each()) for each in g.layers) for g in self._groups if g.given_up is None]

    def alone(self) -> dict[str, int]:
        """How many calls were not as a group expects them, by reason."""
        return dict(self._alone)

    def forget(self) -> None:
        """Takes the hooks off the module, and the layers out of their groups."""
        for layer in [each() for each in self._layers.values()]:
            if layer is not None and layer.__dict__.get(KEY) is self:
                del layer.__dict__[KEY]
        self._layers, self._places, self._groups, self._chain = {}, {}, [], None
        # at the interpreter's end the module's own names are gone
        self._thread = type(self._thread)()
        parent = None if self._parent is None else self._parent()
        if parent is not None:
            for hooks in (parent._forward_pre_hooks, parent._forward_hooks):
                for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is self]:
                    del hooks[key]
                    parent._forward_hooks_always_called.pop(key, None)


def watch_siblings(model: nn.Module) -> dict[str, Siblings]:
    """Lets the fused layers of each module form groups; gives what watches them, by the module's
    name. Groups that are there go on."""
    found = {}
    for name, parent in model.named_modules():
        layers = _children(parent)
        if len(layers) < 2 or isinstance(parent, nn.ModuleList | nn.ModuleDict):
            continue
        known = next((each for each in _siblings_of(parent, layers) if each.groups()), None)
        if known is None:
            _forget(parent, layers)
            known = Siblings(parent)
            for layer in layers:
                layer.__dict__[KEY] = known
        found[name] = known
    return found


def formed_groups(parent: nn.Module) -> list[tuple[list[FusedLinear], Siblings]]:
    """The layers of each group among a module's children, in the order of their calls, and what
    computes them."""
    found = []
    for siblings in _siblings_of(parent, _children(parent)):
        for group in siblings._groups:
            layers = [each() for each in group.layers]
            if group.given_up is None and None not in layers:
                found.append(([layer for layer in layers if layer is not None], siblings))
    return found


def forget_siblings(model: nn.Module) -> None:
    """No layer of the model is in a group, or watched, any more."""
    for parent in model.modules():
        _forget(parent, [child for child in parent._modules.values() if child is not None and KEY in child.__dict__])


def _forget(parent: nn.Module, layers: list[Any]) -> None:
    for siblings in _siblings_of(parent, layers):
        siblings.forget()
    for layer in layers:
        layer.__dict__.pop(KEY, None)


def _siblings_of(parent: nn.Module, layers: list[Any]) -> list[Siblings]:
    """What watches the layers, or has hooks on the module."""
    hooks = (*parent._forward_pre_hooks.values(), *parent._forward_hooks.values())
    held = [*(layer.__dict__.get(KEY) for layer in layers), *(getattr(hook, "__self__", None) for hook in hooks)]
    found = dict.fromkeys(each for each in held if isinstance(each, Siblings))
    return [each for each in found if each.is_of(parent)]


def _children(parent: nn.Module) -> list[FusedLinear]:
    return [child for child in parent._modules.values() if isinstance(child, FusedLinear)]


def _same(one: Any, other: Any) -> bool:
    """Whether both are one tensor, or one number."""
    return one is other or (type(one) is type(other) is float and one == other)


def _is_plain(layer: Any, state: Any) -> bool:
    """Whether the state is that of one LoRA or DoRA adapter, and the layer's own tensors: the next
    call finds these again, not ones made anew."""
    if type(state) is not tuple or len(state) != 7:
        return False
    base = layer._modules["base_layer"]._parameters
    own = state[0] is base["weight"] and state[1] is base["bias"]
    return own and type(state[2]) is nn.Parameter and type(state[3]) is nn.Parameter


def _goes_with(x: Tensor, layer: FusedLinear, state: tuple[Any, ...], other: FusedLinear, found: tuple[Any, ...]) -> bool:
    """Whether an input that is one layer's is the other's, too, and both outputs want a gradient or
    neither. A sharded weight has another shape until its own layer is called."""
    return (
        found[0].shape[1:] == x.shape[-1:] == found[2].shape[1:]
        and found[0].shape[:1] == found[3].shape[:1]
        and found[3].shape[1:] == found[2].shape[:1]
        and found[0].dtype is state[0].dtype
        and found[2].dtype is state[2].dtype
        and found[0].device == state[0].device
        and other.cast_input_dtype_enabled == layer.cast_input_dtype_enabled
        and (x.requires_grad or not torch.is_grad_enabled() or _is_trained(found) == _is_trained(state))
    )


def _is_trained(state: tuple[Any, ...]) -> bool:
    return any(isinstance(t, Tensor) and t.requires_grad for t in state)


def _may_group(x: Tensor) -> bool:
    """Whether calls with this tensor are for a group: it pays, and a change of the tensor would
    show."""
    return not _modes() and not x.is_inference() and x.layout is torch.strided and not x.is_nested and group_pays(x)


_CONDITIONS = ("the tensor", "whether the tensor requires grad", "grad mode", "autocast", "the stream", "a dispatch mode")


def _conditions(x: Tensor) -> tuple[Any, ...]:
    """What a call depends on besides the layer: `_CONDITIONS` names them."""
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if _any_autocast() and autocasts(device) else None
    stream = torch.cuda.current_stream(x.device) if x.is_cuda else None
    return x._version, x.requires_grad, torch.is_grad_enabled(), autocast, stream, _modes()


def _versions(state: tuple[Any, ...]) -> list[int]:
    return [t._version for t in state if isinstance(t, Tensor) and not t.is_inference()]
