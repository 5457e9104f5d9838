"""The base model under a pool: which of its weights are others now, of what kind they are, and what
it is called."""

import operator
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from lora_kernels.adapters.config import AdapterError
from lora_kernels.nn.quantised import is_quantised
from lora_kernels.nn.quantised_base import QuantisedBase, form_of_codes
from lora_kernels.nn.quantised_experts import plain_class
from lora_kernels.ops.quantised import QuantisedWeight
from lora_kernels.serving.experts import KEY, CodedMatrix, Experts

PLAIN = (Tensor, nn.Parameter)


class BaseChangedError(RuntimeError):
    """The base model is another than the pool was made for, and its pages do not fit any more."""


def is_plain(weight: Tensor) -> bool:
    """Whether a weight is a matrix in memory, not a quantised form that only looks like one."""
    return type(weight) in PLAIN


def in_memory(weight: Tensor) -> bool:
    """Whether a weight's numbers, or codes, lie in memory of its own."""
    return is_plain(weight) or type(weight).__name__ in ("Params4bit", "Int8Params")


def _versions(tensors: Iterable[Tensor]) -> list[int]:
    with torch._C.DisableTorchFunctionSubclass():
        return [t._version for t in tensors]


def _memory_of(weight: Tensor | None) -> Tensor | None:
    """The tensor with a weight's numbers, or its codes: of torchao's kinds one that they hold."""
    return weight if weight is None or is_plain(weight) else getattr(weight, "__dict__", {}).get("qdata", weight)


def form_of(module: nn.Module | Experts) -> tuple[tuple[int, int], torch.dtype]:
    """[rows, columns] of a layer's weight, of experts of each, and the dtype that it is multiplied
    in."""
    if isinstance(module, Experts):
        return module.matrix, module.dtype
    weight: Tensor = module.weight  # type: ignore[assignment]
    if is_quantised(module):
        return form_of_codes(module)
    rows, columns = weight.shape
    return (rows, columns), weight.dtype


def weight_of(weight: Tensor | QuantisedWeight) -> Any:
    """W in memory or as codes that the ops read, dequantised if need be.

    Raises:
        AdapterError: its kind does not say what W is.
    """
    if isinstance(weight, QuantisedWeight):
        return weight
    if is_plain(weight):
        return weight.detach()
    kind = type(weight).__name__
    try:
        whole = weight.detach().dequantize().to(weight.dtype)
    except (RuntimeError, NotImplementedError, TypeError, AttributeError) as error:
        raise AdapterError(f"DoRA needs the norm of W, which {kind} hides: {error}") from error
    if not is_plain(whole) or whole.shape != weight.shape:
        raise AdapterError(f"DoRA needs the norm of W, which {kind} hides: its dequantize gives {type(whole).__name__}")
    return whole


def check_kind(name: str, module: nn.Module | Experts) -> None:
    """Raises TypeError unless a batch can add to what the module computes: of a weight that is not
    plain, one row is tried."""
    if isinstance(module, Experts):  # they were read when they were looked for
        return
    weight: Tensor = module.weight  # type: ignore[assignment]
    # of plain tensors, too, where a wrapper made its parameters anew
    if is_quantised(module):
        try:
            QuantisedBase(module)
        except TypeError as error:
            kind = type(module).__name__
            raise TypeError(f"AdapterPool: {name}: no adapter can be served on this {kind}: {error}; leave it out") from None
        return
    if is_plain(weight):
        return
    wanted, why = weight.shape[0], ""
    try:
        if isinstance(module, nn.Embedding):
            why = "an embedding of that kind is not looked up"
        else:
            row = torch.zeros(1, weight.shape[1], dtype=weight.dtype, device=weight.device)
            with torch.no_grad():
                y = nn.functional.linear(row, weight)
            if type(y) is not Tensor or y.shape != (1, wanted):
                why = f"its product is {type(y).__name__} {list(y.shape)}, not a tensor [1, {wanted}]"
    except (RuntimeError, NotImplementedError, TypeError, AttributeError, ValueError) as error:
        why = f"its product failed: {error}"
    if why:
        kind = type(weight).__name__
        raise TypeError(f"AdapterPool: {name}: the weight is a {kind}, which no adapter can be served on: {why}; leave it out")


class Known:
    """A weight as the gains of its adapters know it: which it is, its versions (none: it counts
    none) and its memory (None: it hides that)."""

    __slots__ = "counted", "held", "memory", "number", "versions", "weight"

    def __init__(self, weight: Tensor | None) -> None:
        self.weight, self.number = weight, None
        self.counted: tuple[Tensor, ...] = ()
        self.held = held = _memory_of(weight)
        if held is not None and weight is not None and in_memory(held):
            # a copy to torchao's weight is not counted by the tensor that it holds
            both = (held,) if held is weight else (held, weight)
            self.counted = () if held.is_inference() else both
            # nothing else gets its number as long as this is kept
            self.memory = StorageWeakRef(held.untyped_storage())
            self.number = self.memory.cdata
        self.versions = _versions(self.counted)

    def same_as(self, other: "Known") -> bool:
        return self.weight is other.weight and (self.versions, self.number) == (other.versions, other.number)

    def is_still(self, weight: Tensor | None) -> bool:
        if weight is not self.weight or weight is None:
            return False
        if self.number is None:
            return True
        if is_plain(weight):
            still = weight.untyped_storage()._cdata == self.number
            return still and (not self.versions or weight._version == self.versions[0])
        with torch._C.DisableTorchFunctionSubclass():
            held: Any = _memory_of(weight)
            return held.untyped_storage()._cdata == self.number and _versions(self.counted) == self.versions


STALE = Known(None)
"""Of what has no gains that could be used."""


class BaseWatch:
    """Whether the model still has the layers and the weights that a pool knows.

    A layer is known by the path to it, a weight by identity, version and memory: what assigns,
    casts, moves or writes in place changes one of these. Writing through `.data` or numpy, or to a
    tensor of inference mode, changes none, and wants `AdapterPool.refresh`.
    """

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        # a copied StorageWeakRef would be given back twice
        raise TypeError("BaseWatch: cannot be copied or pickled")

    def __init__(self, model: nn.Module, sites: Mapping[str, Any]) -> None:
        self._model, self._sites = model, sites
        self._paths_of = {name: _path_of(name, site) for name, site in sites.items()}
        self._parameters = {name: model.get_submodule(path)._parameters for name, (path, _) in self._paths_of.items()}
        self._coded: dict[str, QuantisedBase | CodedMatrix] = {}
        """By module, what says how the codes of its weight lie."""
        for name, site in sites.items():
            self._look_at_codes(name, model.get_submodule(_owner_of(name, site)))
        self._kinds = {name: type(self._weight_at(name)) for name in sites}
        self.unfit: dict[str, str] = {}
        """By module, why its pages cannot be used with the model as it is."""
        self.mark = 0
        """Grows whenever a weight was found to be another."""
        self.pending: set[str] = set()
        """The modules whose gains are still those of the weight before."""
        self._remember({name: Known(self._weight_at(name)) for name in sites})

    def _weight_at(self, name: str) -> Tensor | None:
        return self._parameters[name].get(self._paths_of[name][1])

    def _look_at_codes(self, name: str, module: nn.Module) -> None:
        """Raises TypeError where they cannot be read."""
        site = self._sites[name]
        if site.parameter is not None:
            if site.is_coded:
                self._coded[name] = CodedMatrix(module, site.parameter)
        elif is_quantised(module):
            self._coded[name] = QuantisedBase(module)

    def weight(self, name: str) -> Tensor | QuantisedWeight:
        if name in self._coded:
            return self._coded[name].weight(self._sites[name].dtype)
        found = self._weight_at(name)
        assert found is not None
        return found

    def _remember(self, state: dict[str, Known]) -> None:
        """Takes the model as it is for what is known, and these for its weights."""
        children: dict[str, dict[str, None]] = {}
        for path, _ in self._paths_of.values():
            parts = path.split(".") if path else []
            for i, child in enumerate(parts):
                children.setdefault(".".join(parts[:i]), {})[child] = None
        self._paths = []
        for owner, names in children.items():
            try:
                held, get = self._model.get_submodule(owner)._modules, operator.itemgetter(*names)
                self._paths.append((get, held, get(held)))
            except (AttributeError, KeyError):
                continue
        self._holders, self._keys = list(self._parameters.values()), [key for _, key in self._paths_of.values()]
        self._state = state
        self.known = {name: STALE if name in self.pending or name in self.unfit else one for name, one in state.items()}
        """By module, the weight that its gains are of."""
        every = list(state.values())
        self._weights = [one.weight for one in every]
        # what hides its memory is known by identity alone
        plain = [one for one in every if one.number is not None]
        self._plain, self._memories = [one.held for one in plain], [one.number for one in plain]
        # made in inference mode a tensor counts no versions, and is written to in that mode alone
        self._counted = [tensor for one in plain for tensor in one.counted]
        self._versions = [version for one in plain for version in one.versions]

    def same(self, weights: bool) -> bool:
        """Whether nothing has changed that matters; `weights`: what they hold does.

        Some 20 ns for each layer, and 150 more with `weights`.
        """
        if self.pending:
            return False
        try:
            for get, held, known in self._paths:
                if get(held) != known:
                    return False
            if not (weights or self.unfit):
                return True
            if self._coded:  # whose classes would be asked for functions of their own
                with torch._C.DisableTorchFunctionSubclass():
                    return self._same_weights()
            return self._same_weights()
        except KeyError:
            return False

    def _same_weights(self) -> bool:
        return (
            all(map(operator.is_, map(operator.getitem, self._holders, self._keys), self._weights))
            and list(map(_get_version, self._counted)) == self._versions
            and list(map(_get_number, map(_get_storage, self._plain))) == self._memories
        )

    def follow(self, all_weights: bool = False) -> None:
        """Looks at every layer anew: `unfit`, and `pending` for weights that are others now, or for
        all."""
        there = {name: _module_at(self._model, _owner_of(name, site)) for name, site in self._sites.items()}
        ours = {name for name, module in there.items() if _is_served(module, self._sites[name])}
        changed, unfit, state = set(), {}, {}
        for name, module in there.items():
            replaced = bool(ours) and name not in ours
            if module is not None and not replaced:
                holder = _module_at(self._model, self._paths_of[name][0])
                self._parameters[name] = {} if holder is None else holder._parameters
            now = state[name] = Known(self._weight_at(name))
            why = f"{type(module).__name__} has replaced the layer of `serve`" if replaced else self._misfit(name, module)
            if why is not None:
                unfit[name] = why
                continue
            if all_weights or not now.same_as(self._state[name]) or name in self.unfit:
                changed.add(name)
        self.pending = (self.pending | changed) - unfit.keys()
        self.unfit = unfit
        self.mark += bool(changed)
        self._remember(state)

    def renewed(self, name: str) -> None:
        """The gains of a module are those of its weight again."""
        self.known[name] = self._state[name]
        self.pending.discard(name)

    def _misfit(self, name: str, module: nn.Module | None) -> str | None:
        """Why the pages of a site are not for the weight that is there, or None; of codes it looks
        anew at what they mean."""
        weight, site = self._weight_at(name), self._sites[name]
        if module is None:
            return "the model has no such layer any more"
        if weight is None:
            key = self._paths_of[name][1]
            what = f"no codes of {site.parameter} any more" if key == "original" else f"no {key} of its own"
            return f"the {plain_class(module).__name__} there has {what}"
        if type(weight) is not self._kinds[name]:
            return f"its weight was a {self._kinds[name].__name__}, and is a {type(weight).__name__}"
        try:
            self._look_at_codes(name, module)
        except TypeError as error:
            return str(error)
        if name in self._coded and (found_shape := self._coded[name].shape) != site.numbers:
            return f"the pages are for a weight {list(site.numbers)}, it is {list(found_shape)}"
        wanted, found = (
            f"{list(shape)} {dtype} on {device}"
            for shape, dtype, device in (
                (site.weight_shape, site.weight_dtype, site.device), (weight.shape, weight.dtype, weight.device)
            )
        )  # fmt: skip
        return None if wanted == found else f"the pages are for a weight {wanted}, it is {found}"

    def check(self, modules: Iterable[str]) -> None:
        """Raises BaseChangedError if one of the modules does not fit any more."""
        wanted = frozenset(modules)
        for name, why in self.unfit.items():
            if name in wanted:
                raise BaseChangedError(f"AdapterPool: the base is another at {name}: {why}; make a new pool for it as it is")


_get_version, _get_number = operator.attrgetter("_version"), operator.attrgetter("_cdata")
_get_storage = operator.methodcaller("untyped_storage")


def _path_of(name: str, site: Any) -> tuple[str, str]:
    """The path of a site's module, and the name of its weight there."""
    if site.parameter is None:
        return name, "weight"
    owner = _owner_of(name, site)
    return (f"{owner}.parametrizations.{site.parameter}", "original") if site.is_parametrised else (owner, site.parameter)


def _owner_of(name: str, site: Any) -> str:
    """The path of a site's module."""
    return name if site.parameter is None else name.rpartition(".")[0]


def _module_at(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _is_served(module: nn.Module | None, site: Any) -> bool:
    """Whether it is the layer that `serve` made for a site."""
    held = {} if module is None else vars(module)
    if site.parameter is not None:
        served = held.get(KEY)
        return served is not None and served.sites.get(site.parameter) is site
    return held.get("site") is site or held.get("slots") is site.slots


def check_base_name(model: nn.Module, trained_on: str | None, name: str, strict: bool) -> None:
    """Warns where an adapter names another base than the model's name.

    Raises:
        AdapterError: with `strict`.
    """
    own = getattr(model, "name_or_path", None)
    if not trained_on or not isinstance(own, str) or not own or _same_name(trained_on, own):
        return
    text = f"AdapterPool: {name!r} was trained on {trained_on!r}, the model is {own!r}"
    if strict:
        raise AdapterError(f"{text}; strict=True refuses it")
    warnings.warn(f"{text}; if those are other weights, what it computes is wrong", stacklevel=4)


def _same_name(one: str, other: str) -> bool:
    """Whole names, or their last parts where one is a directory of this machine."""
    parts = [_of_cache(each.replace("\\", "/").rstrip("/")).lower() for each in (one, other)]
    if parts[0] == parts[1]:
        return True
    local = any(os.path.isabs(each) or each.startswith((".", "~")) or os.path.isdir(each) for each in (one, other))
    return local and parts[0].rpartition("/")[2] == parts[1].rpartition("/")[2]


def _of_cache(name: str) -> str:
    """owner/model, of a directory of the hub's cache."""
    found = re.search(r"models--([^/]+?)--([^/]+)/snapshots/", name)
    return f"{found[1]}/{found[2]}" if found else name
