"""The ways into a served model: how many sequences a call has, and whose they are."""

import functools
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.serving.compiled import outside
from lora_kernels.serving.frame import Frame, Given, Lengths, Requests, checked_rows
from lora_kernels.serving.scope import Scope, scopes

SEQUENCES = {"input_ids": 0, "inputs_embeds": 0, "decoder_input_ids": 1, "decoder_inputs_embeds": 1}
"""Arguments that are tokens, and of which kind their number is."""
MEDIA = ("pixel_values", "input_features", "input_values")
COUNTED = (*SEQUENCES, *MEDIA, "inputs")
"""Arguments whose first dimension counts sequences, the surest first."""
PROMPTS = ("inputs", "input_ids", "inputs_embeds", *MEDIA)
ENGINES = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")


def open_doors(model: nn.Module, pool: Any, scope: Scope, probe: Callable[..., None]) -> None:
    """Gives `forward` and `generate` of a model their `adapters`, and refuses them elsewhere."""
    model.__dict__["_lora_kernels"] = scope
    replace_method(model, "forward", lambda call: _with_adapters(call, pool, False, probe))
    if callable(getattr(model, "generate", None)):
        replace_method(model, "generate", lambda call: _with_adapters(call, pool, True, probe))
    if callable(getattr(model, "_expand_inputs_for_generation", None)):
        replace_method(model, "_expand_inputs_for_generation", _noting_expansion)
    for name in ENGINES:
        if callable(getattr(model, name, None)):
            replace_method(model, name, _without_batch)
    for module in model.modules():
        if module is not model and _swallows(type(module).forward):
            replace_method(module, "forward", _refusing_adapters)


def close_doors(model: nn.Module) -> None:
    for module in model.modules():
        for name, value in list(module.__dict__.items()):
            while (before := getattr(value, "_lora_kernels_before", None)) is not None:
                del module.__dict__[name]
                module.__dict__.update(before)
                value = before.get(name)
    model.__dict__.pop("_lora_kernels", None)


def replace_method(module: nn.Module, name: str, wrap: Callable[[Any], Any]) -> None:
    """Puts a method over the module's own. It is bound, so that a deep copy calls the copy."""
    own = module.__dict__.get(name)
    if own is None:
        function = getattr(type(module), name)
        if not inspect.isfunction(inspect.getattr_static(type(module), name)):  # static, of a class, a wrapper's object
            bound = getattr(module, name)
            function = functools.wraps(bound)(lambda self, *args, **kwargs: bound(*args, **kwargs))
    else:
        function = functools.wraps(own)(lambda self, *args, **kwargs: own(*args, **kwargs))
    method = wrap(function)
    functools.update_wrapper(method, function)
    if own is not None or function is not getattr(type(module), name, None):
        method.__signature__ = _signature_with_self(getattr(module, name))
    method._lora_kernels_before = {} if own is None else {name: own}
    module.__dict__[name] = types.MethodType(method, module)


def _signature_with_self(bound: Any) -> inspect.Signature:
    signature = inspect.signature(bound)
    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    return signature.replace(parameters=[itself, *signature.parameters.values()])


@functools.cache
def _swallows(forward: Any) -> bool:
    try:
        parameters = inspect.signature(forward).parameters
    except (TypeError, ValueError):
        return False
    return "adapters" not in parameters and any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _refusing_adapters(call: Any) -> Any:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if "adapters" in kwargs:
            raise TypeError(
                f"adapters: {type(self).__name__} is a part of a served model, and takes none; give them to the model that"
                " was served, or call this inside pool.batch(...)"
            )
        return call(self, *args, **kwargs)

    return forward


def _without_batch(call: Any) -> Any:
    def refuse_batch(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        scope = self.__dict__["_lora_kernels"]
        if kwargs.pop("adapters", None) is not None or scope.resolve() is not None:
            raise NotImplementedError(
                "adapters: continuous batching packs tokens of many requests into one row, which a batch of adapters"
                " cannot follow; call generate(..., adapters=[...])"
            )
        return call(self, *args, **kwargs)

    return refuse_batch


def _noting_expansion(call: Any) -> Any:
    def expand(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        frame = self.__dict__["_lora_kernels"].current.get()
        size = kwargs.get("expand_size", args[0] if args and isinstance(args[0], int) else 1)
        if frame is not None and frame.generating:
            frame.expands = frame.expands * int(size)
        return call(self, *args, **kwargs)

    return expand


def _with_adapters(call: Any, pool: Any, generating: bool, probe: Callable[..., None]) -> Any:
    def call_in_batch(self: nn.Module, *args: Any, adapters: Any = None, adapter_weights: Any = None, **kwargs: Any) -> Any:
        scope: Scope = self.__dict__["_lora_kernels"]
        if adapters is None:
            outer = scope.resolve() if scope.openings else scope.current.get()
            if outer is None:
                return call(self, *args, **kwargs)
            outer.batch.raise_if_ended()
            if not outer.all_base:
                if torch.compiler.is_compiling():
                    outside.call(pool.look_at_layers, outer.modules)
                else:
                    pool.look_at_layers(outer.modules)
            return _in_frame(self, call, scope, _frame(self, outer.batch, outer, args, kwargs, generating), args, kwargs, probe)
        if scope.detached:
            raise RuntimeError("adapters: this is a copy of a served model; unserve(copy), and serve it with a pool of its own")
        batch = pool.batch(adapters, adapter_weights)
        try:
            frame = _frame(self, batch.requests, None, args, kwargs, generating)
            if scope.generators:
                frame.around = scope.generators_around()
            with torch.no_grad():
                y = _in_frame(self, call, scope, frame, args, kwargs, probe)
        finally:
            batch.close()
        batch.requests.raise_errors()
        return y

    return call_in_batch


def _in_frame(
    model: nn.Module, call: Any, scope: Scope, frame: Frame, args: Any, kwargs: Any, probe: Callable[..., None]
) -> Any:  # fmt: skip
    if not frame.generating:
        if scope.unsure and not (frame.all_base or frame.batch.uniform or torch.compiler.is_compiling()):
            probe(model, call, args, kwargs, frame)
        if scope.block is not None:
            call = scope.block.wrap(call)
    token = scope.current.set(frame)
    try:
        return call(model, *args, **kwargs)
    finally:
        scope.current.reset(token)


def _frame(
    model: nn.Module, batch: Requests, outer: Frame | None, args: Any, kwargs: Any, generating: bool
) -> Frame:  # fmt: skip
    """A batch in a call, with as many sequences as that has; `outer` is where it was current.

    Raises:
        ValueError: those are not the requests of the batch.
    """
    if outer is not None and outer.seen is not None:
        return outer
    if batch.given is not None or isinstance(outer, Given):
        return (outer if isinstance(outer, Given) else batch.frame()).in_call()
    tensors = _named(args, kwargs) if args else kwargs
    if generating:
        return _generation(batch, outer, tensors)
    name, value, count = _sequences(tensors, False)
    expansion = 1 if outer is None else outer.expands if outer.generating else outer.expansion
    if count != batch.count:
        if count is None and not batch.uniform:
            _refuse_count(batch.count, "a call without a tensor whose first dimension counts sequences", "", None)
        rows_of_one = batch.count == 1 and name not in COUNTED and _is_rows(value)
        if count is not None and count != batch.count * expansion and not rows_of_one:
            known = f", or {batch.count * expansion} as generate expands them" if expansion > 1 else ""
            _refuse_count(batch.count, f"{count} sequences{known}", name, value)
    else:
        expansion = 1
    lengths = _lengths(_with_names(model, tensors) if args else tensors, value)
    strays = any(key.startswith(MEDIA) for key in tensors) and _has_strays(model, tensors, count)
    if outer is None or not outer.around:
        return batch.frame(expansion, lengths, strays)
    frame = Frame(batch, expansion, lengths, strays)
    frame.around = outer.around
    return frame


def _generation(batch: Requests, outer: Frame | None, tensors: dict[str, Any]) -> Frame:
    name, value, count = _sequences(tensors, True)
    if (1 if count is None else count) != batch.count:
        _refuse_count(batch.count, f"a prompt of {1 if count is None else count} sequences", name or "none was given", value)
    frame = Frame(batch, 1, _lengths(tensors, value))
    frame.generating, frame.around = True, () if outer is None else outer.around
    return frame


def _named(args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments by name; what is positional by its number, and what a mapping holds by its
    keys."""
    found: dict[str, Any] = {}
    for i, value in enumerate(args):
        found.update(value if isinstance(value, Mapping) else {str(i): value})
    found.update(kwargs)
    return found


def _with_names(model: nn.Module, tensors: dict[str, Any]) -> dict[str, Any]:
    """The same, and tokens that are positional by their name, too."""
    kind: Any = type(model)
    return tensors | {name: tensors[at] for at, name in _tokens_at(kind) if at in tensors}


@functools.cache
def _tokens_at(kind: Any) -> list[tuple[str, str]]:
    """The places and names of a forward's arguments that are tokens."""
    names = list(inspect.signature(kind.forward).parameters)[1:]
    return [(str(at), name) for at, name in enumerate(names) if name in SEQUENCES]


def _sequences(tensors: dict[str, Any], generating: bool) -> tuple[str, Any, int | None]:
    """What counts the sequences of a call, and how many they are."""
    for name in PROMPTS if generating else COUNTED:
        value = tensors.get(name)
        if isinstance(value, Tensor) and value.dim():
            return name, value, value.shape[0]
    for name, value in tensors.items():
        if isinstance(value, Tensor) and value.dim():
            return name, value, 1 if value.dim() == 1 and value.is_floating_point() else len(value)
    for name, value in tensors.items():
        if isinstance(value, list | tuple) and value and all(isinstance(each, Tensor) for each in value):
            return name, value, len(value)
    return "", None, None


def _lengths(tensors: dict[str, Any], value: Any) -> Lengths:
    """The lengths that a sequence has in a call: of its tokens 0, of a decoder's 1; of what else it
    is of, the products of its first dimensions, from 2."""
    found = []
    for name, kind in SEQUENCES.items():
        t = tensors.get(name)
        if isinstance(t, Tensor) and t.dim() > 1:
            found.append((kind, t.shape[1]))
    if found or not isinstance(value, Tensor) or value.is_nested:
        return tuple(found)
    sizes = value.shape[1:-1] if value.is_floating_point() else value.shape[1:]
    return tuple((2 + i, sizes[: i + 1].numel()) for i in range(len(sizes)))


def _is_rows(value: Any) -> bool:
    """Whether a model's input is [rows, features], which may all be of one request."""
    return isinstance(value, Tensor) and value.dim() == 2 and value.is_floating_point()


def _refuse_count(given: int, expected: str, name: str, value: Any) -> None:
    by = f"argument {name}" if name.isdigit() else name
    by += f" {list(value.shape)}" if isinstance(value, Tensor) else ""
    by = f" ({by})" if by else ""
    raise ValueError(f"adapters: {given} were given, for {expected}{by}; there must be one for each sequence")


def _has_strays(model: nn.Module, tensors: dict[str, Any], count: int | None) -> bool:
    """Whether images or sounds come beside tokens, and not one for each sequence."""
    ids = tensors.get("input_ids")
    media = [t for key, t in tensors.items() if key.startswith(MEDIA) and isinstance(t, Tensor)]
    if not media or not isinstance(ids, Tensor) or ids.dim() != 2:
        return False
    if any(len(t) != count for t in media):
        return True
    config = getattr(model, "config", None)
    values = vars(config).items() if config is not None else ()
    marks = [v for k, v in values if isinstance(v, int) and k.endswith(("_token_id", "_token_index")) and _of_media(k)]
    counts = [(ids == mark).sum(1) for mark in marks]
    return any(bool((each != each[0]).any()) for each in counts)


def _of_media(name: str) -> bool:
    return any(word in name for word in ("image", "video", "audio", "vision", "speech"))


class rows_of:
    """Says whose the rows are that the layers see inside, where they are not sequences:

        with rows_of(index):        # index[i]: the request of row i, or -1 for the base
            y = expert(x[chosen])

    For each batch that is current. An input must have as many rows, or that many as its first
    dimension.

    Raises:
        TypeError, ValueError: the rows are not integers, or not requests of the batch.
    """

    def __init__(self, rows: Any) -> None:
        self._rows, self._tokens = rows, []  # type: ignore[var-annotated]

    def __enter__(self) -> "rows_of":
        for scope in list(scopes):
            frame = scope.resolve()
            if frame is not None:
                given = Given(frame.batch, checked_rows(self._rows, frame.batch.count))
                given.around = frame.around
                self._tokens.append((scope, scope.current.set(given)))
        return self

    def __exit__(self, *_: Any) -> None:
        while self._tokens:
            scope, token = self._tokens.pop()
            scope.current.reset(token)
