"""What the layers of a model see: its forward, run on sequences in one order and in another."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.serving.frame import FOREIGN, UNLIKE, Frame, Layout, Lengths, Requests
from lora_kernels.serving.routing import Block
from lora_kernels.serving.scope import Scope

SEQUENCES, TOKENS, DECODED = 3, 7, 5


class Records:
    """Inputs of layers, in the order of their calls, projected onto four random directions."""

    def __init__(self) -> None:
        self.of: dict[Any, list[Tensor]] = {}
        self._directions: dict[Any, Tensor] = {}

    def __call__(self, layer: Any, x: Tensor) -> None:
        key = x.shape[-1], x.device
        if key not in self._directions:
            draw = torch.randn(x.shape[-1], 4, generator=torch.Generator().manual_seed(0))
            self._directions[key] = draw.to(x.device)
        self.of.setdefault(layer, []).append(x.detach().float() @ self._directions[key])


def probe_tokens(model: nn.Module, call: Any, scope: Scope, layers: list[Any]) -> bool:
    """Learns the layouts of the layers from a few random tokens, where the model takes tokens
    alone."""
    call_inputs = _token_inputs(model, call)
    if call_inputs is None:
        return False
    kwargs, lengths = call_inputs
    return _learn(model, call, scope, layers, (), kwargs, lengths, True)


def probe_call(model: nn.Module, call: Any, scope: Scope, layers: list[Any], args: Any, kwargs: Any, frame: Frame) -> bool:
    """Learns them from a call, with other numbers for its sequences."""
    made = _Imitation(frame.requests)
    try:
        args, kwargs = made.value("", args), {name: made.value(name, value) for name, value in kwargs.items()}
    except TypeError:
        return False
    return _learn(model, call, scope, layers, args, kwargs, frame.tokens or (), False)


def _learn(
    model: nn.Module, call: Any, scope: Scope, layers: list[Any], args: Any, kwargs: Any, lengths: Lengths,
    by_tokens: bool,
) -> bool:  # fmt: skip
    """Three runs: as it is, in another order, and with one sequence that is another."""
    seen = []
    if scope.block is not None:
        call = scope.block.wrap(call)
    for change in (lambda t: t, lambda t: t.roll(1, 0), _with_another_last):
        frame = Frame(_nobody(), 1, lengths)
        frame.seen = Records()
        token = scope.current.set(frame)
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                call(model, *_changed(args, change), **_changed(kwargs, change))
        except Exception as error:  # it wants other arguments: nothing is learned, and a refusal says why
            scope.why = f"; nothing was learned of it, since the model raised {type(error).__name__}: {str(error)[:200]}"
            return False
        finally:
            scope.current.reset(token)
        seen.append(frame.seen.of)
    for layer in layers:
        inputs = [of.get(layer, []) for of in seen]
        if any(inputs):
            _learn_layer(layer, inputs, lengths, by_tokens)
    return True


def _learn_layer(layer: Any, inputs: list[list[Tensor]], lengths: Lengths, by_tokens: bool) -> None:
    layer.by_tokens = layer.by_tokens or by_tokens
    for x, turned, other in zip(*inputs, strict=False):
        layout, rank = layout_of(x, turned, other, lengths), x.dim() - 1
        known = layer.layouts.setdefault(rank, layout)
        if known is not layout:
            layer.layouts[rank] = UNLIKE if UNLIKE in (known, layout) else FOREIGN
    if len({len(calls) for calls in inputs}) > 1:
        for x in sum(inputs, []):
            layer.layouts[x.dim() - 1] = UNLIKE


def layout_of(x: Tensor, turned: Tensor, other: Tensor, lengths: Lengths) -> Layout:
    """Where the sequences are in an input, from what it is for SEQUENCES of them, for the same ones
    in another order (the last one first), and with another last one."""
    if not x.shape == turned.shape == other.shape:
        return UNLIKE
    moved = float((x - turned).norm())
    if moved != 0:  # what sequences share has the same bits each time
        for layout in _layouts(x.shape[:-1], lengths):
            if float((_split(x, layout).roll(1, _at(layout)) - _split(turned, layout)).norm()) <= 0.1 * moved:
                by_sequence = _split(x - other, layout).movedim(_at(layout), 0)
                alone = float(by_sequence[:-1].norm()) <= 0.1 * float(by_sequence[-1].norm())
                return layout if alone else UNLIKE
        return UNLIKE
    # the same for every sequence, such as learned queries: one copy for each, or one for all
    if not torch.equal(x, other):
        return UNLIKE
    same = x.shape[0] == SEQUENCES and x.dim() > 2 and bool((x == x[:1]).all())
    return Layout.of(0) if same else FOREIGN


def _layouts(shape: torch.Size, lengths: Lengths) -> Iterator[Layout]:
    for dim, size in enumerate(shape):
        if size and size % SEQUENCES == 0:
            per = size // SEQUENCES
            kind = next((kind for kind, length in lengths if length == per > 1), None)
            for minor in (False, True)[: 1 + (per > 1)]:
                yield Layout.of(dim, minor, per if kind is None else kind, kind is not None)


def _split(x: Tensor, layout: Layout) -> Tensor:
    """x with a dimension of its own for the sequences, `_at`."""
    per = x.shape[layout.dim] // SEQUENCES
    return x.unflatten(layout.dim, (per, SEQUENCES) if layout.minor else (SEQUENCES, per))


def _at(layout: Layout) -> int:
    return layout.dim + layout.minor


def routed_containers(model: nn.Module, layers: list[Any]) -> list[str]:
    """Lists of modules of which a router chooses: some of their layers saw rows of no layout, or
    were not called while others were, and none saw whole sequences."""
    found = []
    containers = [name for name, m in model.named_modules() if isinstance(m, nn.ModuleList | nn.ModuleDict) and len(m) > 1]
    for container in containers:
        prefix = container + "." if container else ""
        inside = [layer for layer in layers if _innermost(layer.name, containers) == container]
        if len({layer.name[len(prefix) :].split(".")[0] for layer in inside}) < 2:
            continue
        unlike = [layer for layer in inside if UNLIKE in layer.layouts.values()]
        missed = [layer for layer in inside if not layer.layouts]
        whole = [layer for layer in inside if Layout.of(0) in layer.layouts.values()]
        if unlike or (missed and len(missed) < len(inside) and not whole):
            found.append(container)
    return found


def carry_rows(model: nn.Module, scope: Scope, layers: list[Any], put: Callable[[nn.Module, str, Any], None]) -> list[Block]:
    """Puts a block's forward around the parent of every list of experts, and marks their layers."""
    blocks: dict[str, Block] = {}
    for container in routed_containers(model, layers):
        for layer in layers:
            if layer.name.startswith(container + ".") or not container:
                layer.routed = True
                layer.layouts.clear()
        owner = container
        while isinstance(model.get_submodule(owner), nn.ModuleList | nn.ModuleDict) and owner:
            owner = owner.rpartition(".")[0]
        if owner not in blocks:
            blocks[owner] = Block(scope, owner)
            if owner:
                put(model.get_submodule(owner), "forward", blocks[owner].wrap)
            else:
                scope.block = blocks[owner]
    return list(blocks.values())


def _innermost(name: str, containers: list[str]) -> str:
    return max((each for each in containers if name.startswith(each + ".")), key=len, default="")


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """The model in evaluation, without its users' hooks."""
    modules = list(model.modules())
    kept = [(m, m.training, m._forward_hooks, m._forward_pre_hooks) for m in modules]
    try:
        for m in modules:
            m.training, m._forward_hooks, m._forward_pre_hooks = False, type(m._forward_hooks)(), type(m._forward_pre_hooks)()
        yield
    finally:
        for m, training, hooks, pre_hooks in kept:
            m.training, m._forward_hooks, m._forward_pre_hooks = training, hooks, pre_hooks


def _nobody() -> Requests:
    return Requests(SEQUENCES, torch.zeros(SEQUENCES, 1, dtype=torch.int64), None, 1, frozenset(), False)


def _changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Arguments with what is of sequences changed."""
    if isinstance(value, Tensor):
        return change(value) if value.__dict__.get("_sequences") else value
    if isinstance(value, list | tuple):
        return type(value)(_changed(each, change) for each in value)
    if isinstance(value, dict):
        return type(value)(**{name: _changed(each, change) for name, each in value.items()})
    return value


def _with_another_last(t: Tensor) -> Tensor:
    return torch.cat([t[:-1], t.flip(-1)[-1:] if t.dim() > 1 and t.shape[-1] > 1 else t[:1]])


def _token_inputs(model: nn.Module, call: Any) -> tuple[dict[str, Any], Lengths] | None:
    parameters = inspect.signature(call).parameters
    embeddings = getattr(model, "get_input_embeddings", lambda: None)
    try:
        table = embeddings()
    except (NotImplementedError, AttributeError):
        return None
    if "input_ids" not in parameters or not isinstance(table, nn.Embedding) or table.weight.is_meta:
        return None
    config = getattr(model, "config", None)
    special = {v for k, v in vars(config).items() if isinstance(v, int) and k.endswith(("_id", "_index"))} if config else set()
    ordinary = torch.tensor([i for i in range(min(table.num_embeddings, 4096)) if i not in special])
    if len(ordinary) < SEQUENCES:
        return None
    generator = torch.Generator().manual_seed(0)

    def draw(length: int) -> Tensor:
        which = torch.randint(len(ordinary), (SEQUENCES, length), generator=generator)
        return _marked(ordinary[which].to(table.weight.device))

    kwargs: dict[str, Any] = {"input_ids": draw(TOKENS)}
    lengths: Lengths = ((0, TOKENS),)
    if "decoder_input_ids" in parameters and getattr(config, "is_encoder_decoder", False):
        kwargs["decoder_input_ids"], lengths = draw(DECODED), ((0, TOKENS), (1, DECODED))
    if "use_cache" in parameters:
        kwargs["use_cache"] = False
    return kwargs, lengths


def _marked(t: Tensor) -> Tensor:
    t.__dict__["_sequences"] = True
    return t


class _Imitation:
    """Arguments like those of a call, for SEQUENCES sequences of other numbers."""

    def __init__(self, requests: int) -> None:
        self.requests, self._generator = requests, torch.Generator().manual_seed(0)

    def value(self, name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            leads = value.dim() > 0 and value.shape[0] == self.requests and value.layout is torch.strided
            return self._tensor(name, value) if leads else value
        if type(value) in (list, tuple):
            return type(value)(self.value(name, each) for each in value)
        if type(value) is dict or (isinstance(value, dict) and is_dataclass(value)):  # an encoder's outputs
            return type(value)(**{key: self.value(str(key), each) for key, each in value.items()})
        if callable(getattr(value, "get_seq_length", None)) and not value.get_seq_length():  # an empty cache
            return None
        if value is None or isinstance(value, bool | int | float | str | torch.dtype):
            return value
        raise TypeError(f"a {type(value).__name__} may keep what a call leaves in it")

    def _tensor(self, name: str, t: Tensor) -> Tensor:
        if t.dtype is torch.bool or "mask" in name:
            return t[:1].expand(SEQUENCES, *t.shape[1:])
        if t.is_floating_point():
            noise = torch.randn((SEQUENCES, *t.shape[1:]), generator=self._generator).to(t)
            return _marked(noise * t.float().std(correction=0).to(t.dtype) + t.float().mean().to(t.dtype))
        chosen = t[torch.arange(SEQUENCES, device=t.device) % len(t)]
        if t.dim() < 2:
            return _marked(chosen)
        order = torch.stack([torch.randperm(t.shape[-1], generator=self._generator) for _ in range(SEQUENCES)]).to(t.device)
        return _marked(chosen.gather(-1, order.view(SEQUENCES, *[1] * (t.dim() - 2), -1).expand(chosen.shape)))
