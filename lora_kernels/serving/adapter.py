"""An adapter as the pool takes it: its factors, module by module, from PEFT's files or PEFT's
tensors."""

import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.adapters.config import AdapterError, LoraConfig
from lora_kernels.adapters.expert_slots import in_other_order, per_expert_slots
from lora_kernels.adapters.files import matrix_shape, open_adapter, read_slots, slots_of
from lora_kernels.adapters.foreign import PREFIX
from lora_kernels.adapters.inits import check_init
from lora_kernels.adapters.inject import first_names, uncompiled_model
from lora_kernels.adapters.per_expert import as_fused
from lora_kernels.adapters.storage import CONFIG_NAME, WEIGHTS_NAME
from lora_kernels.adapters.targets import Target, select_targets
from lora_kernels.adapters.weights import Slot, check_finite
from lora_kernels.nn.base import initial_scaling
from lora_kernels.serving.experts import Experts
from lora_kernels.serving.parameters import expert_factors, experts_of

FLOAT32_MAX = torch.finfo(torch.float32).max
_ALSO = ("lora_bias",)  # keys of the configuration that LoraConfig leaves to us


def vectors_of(gain: bool, bias: bool) -> int:
    """How many float32 rows an adapter takes beside its ranks: the bias lies below the gain,
    whether there is one or not."""
    return 2 if bias else int(gain)


@dataclass(frozen=True)
class Factors:
    """What an adapter does to one module: y = m / ‖W + s·BA‖ ⊙ (W x + s B A x) + s c. The x of an
    embedding is one-hot. Of experts, which are named by their parameter ("….experts.down_proj"),
    all shapes begin with [experts]."""

    a: Tensor
    """[r, in]."""
    b: Tensor
    """[out, r]."""
    scale: float
    """s: lora_alpha / r, or / √r with rsLoRA, after the patterns."""
    magnitude: Tensor | None = None
    """m [out] of DoRA."""
    bias: Tensor | None = None
    """c [out]: the bias of B (lora_bias)."""

    @property
    def r(self) -> int:
        return self.a.shape[-2]

    @property
    def vectors(self) -> int:
        """How many float32 rows [out] a pool keeps beside the ranks: the gain of DoRA, and the bias
        with room for a gain."""
        return vectors_of(self.magnitude is not None, self.bias is not None)


@dataclass(frozen=True)
class Adapter:
    """The factors of one adapter, by the name of the module, on the CPU."""

    factors: Mapping[str, Factors]
    base: str | None = None
    """The base model that it was trained on, by its configuration."""

    @cached_property
    def nbytes(self) -> int:
        tensors = (t for f in self.factors.values() for t in (f.a, f.b, f.magnitude, f.bias) if t is not None)
        return sum(t.numel() * t.element_size() for t in tensors)

    @cached_property
    def magnitudes(self) -> dict[str, tuple[Tensor, float]]:
        """m and s of the modules with DoRA, in memory of their own."""
        return {name: (f.magnitude.clone(), f.scale) for name, f in self.factors.items() if f.magnitude is not None}

    def copied(self) -> "Adapter":
        """The same in memory that nobody else writes to.

        Raises:
            AdapterError: a factor is not a tensor.
        """
        for name, f in self.factors.items():
            for what, t in (("a", f.a), ("b", f.b), ("magnitude", f.magnitude), ("bias", f.bias)):
                if not isinstance(t, Tensor) and (t is not None or what in "ab"):
                    raise AdapterError(f"{name}: {what} must be a tensor, found {type(t).__name__}")
        return self._mapped(lambda t: t.detach().to("cpu", copy=True))

    def pinned(self) -> "Adapter":
        """The same in memory that a GPU copies from by itself."""
        return self._mapped(Tensor.pin_memory)

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> "Adapter":
        of = lambda t: None if t is None else change(t)  # noqa: E731
        factors = {
            name: Factors(change(f.a), change(f.b), f.scale, of(f.magnitude), of(f.bias)) for name, f in self.factors.items()
        }
        return Adapter(factors, self.base)

    def check(self, module: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Raises AdapterError unless the factors of a module are those of a matrix [out, in], or of
        [experts, out, in], and finite in its dtype."""
        f, (*lead, n_out, n_in), where = self.factors[module], shape, f"AdapterPool: {module}"
        fits = f.a.dim() == f.b.dim() == len(shape)
        if not fits or f.a.shape != (*lead, f.r, n_in) or f.b.shape != (*lead, n_out, f.r) or not f.r:
            of = "".join(f"{count}, " for count in lead)
            wanted, found = f"[{of}r, {n_in}] and [{of}{n_out}, r]", f"{list(f.a.shape)} and {list(f.b.shape)}"
            raise AdapterError(f"{where}: a and b must be {wanted}, found {found}")
        for what, t in (("magnitude", f.magnitude), ("bias", f.bias)):
            if t is not None and t.shape != (*lead, n_out):
                raise AdapterError(f"{where}: {what} must be {[*lead, n_out]}, found {list(t.shape)}")
        # the tables hold it in float32
        if isinstance(f.scale, bool) or not isinstance(f.scale, int | float) or not abs(f.scale) < FLOAT32_MAX:
            raise AdapterError(f"{where}: the scale must be a finite number, found {f.scale!r}")
        for what, t in (("a", f.a), ("b", f.b), ("magnitude", f.magnitude), ("bias", f.bias)):
            if t is None:
                continue
            if not t.is_floating_point():
                raise AdapterError(f"{where}: {what} must be floating, found {t.dtype}")
            if not bool(t.to(dtype).isfinite().all()):
                raise AdapterError(f"{where}: {what} has values that are not finite as {dtype}")
        if f.bias is not None and not bool((f.scale * f.bias.float()).isfinite().all()):
            raise AdapterError(f"{where}: scale times bias has values that are not finite")


Source = str | os.PathLike[str] | Adapter | tuple[Any, Mapping[str, Tensor]]
"""A directory in PEFT's format, an adapter, or (LoraConfig, tensors by PEFT's names)."""


def read_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> Adapter:
    """The adapter in a local directory in PEFT's format, checked against `model` before a tensor is
    allocated: LoRA, rsLoRA, DoRA, rank_pattern, alpha_pattern, lora_bias, and target_parameters of
    experts. Nothing is downloaded or executed.

    Raises:
        AdapterError: a file is missing, damaged, foreign or does not fit the model, or asks for
            what a batch cannot do: biases of the base, modules_to_save, embeddings with DoRA.
    """
    folder = Path(directory)
    with open_adapter(folder) as (config_file, weights_file):
        config = LoraConfig.from_file(*config_file, folder / CONFIG_NAME, _ALSO)
        try:
            targets, experts, slots = _select_slots(uncompiled_model(model), config)
        except AdapterError as error:
            raise AdapterError(f"{folder}: {error}") from error
        slots, tensors = read_slots(folder / WEIGHTS_NAME, slots, weights_file)
    check_base(model, slots, tensors, str(folder / WEIGHTS_NAME))
    return _build_adapter(targets, experts, slots, config, tensors)


def adapter_of(model: nn.Module, config: Any, tensors: Mapping[str, Tensor]) -> Adapter:
    """The adapter of tensors by PEFT's names, as peft.get_peft_model_state_dict gives them, and of
    PEFT's or our LoraConfig.

    Raises:
        AdapterError: as `read_adapter`.
    """
    config = config if isinstance(config, LoraConfig) else LoraConfig.from_dict(config.to_dict(), _ALSO)
    targets, experts, slots = _select_slots(uncompiled_model(model), config)
    other, shapes = in_other_order(slots), {key: t.shape for key, t in tensors.items()}
    if other is not None and _fit(shapes, other) and not _fit(shapes, slots):
        slots = other
    own = {key: slot for key, slot in slots.items() if slot.role == "own"}
    # a trainer may write to its own at any time
    tensors = {key: t.detach().to("cpu", copy=True) if key in own else t for key, t in tensors.items()}
    check_base(model, slots, tensors, "adapter_of")
    for names, what in ((own.keys() - tensors.keys(), "missing"), (tensors.keys() - slots.keys(), "not of this adapter")):
        if names:
            raise AdapterError(f"{len(names)} tensors are {what}: {first_names(sorted(names))}")
    for key, slot in own.items():
        if tensors[key].shape != slot.shape or not tensors[key].is_floating_point():
            found = f"{tensors[key].dtype} {list(tensors[key].shape)}"
            raise AdapterError(f"{key} must be floating {list(slot.shape)}, found {found}")
        check_finite(key, tensors[key], "adapter_of")
    return _build_adapter(targets, experts, slots, config, tensors)


def _fit(shapes: Mapping[str, torch.Size], slots: Mapping[str, Slot]) -> bool:
    return all(shapes.get(key) == slot.shape for key, slot in slots.items() if slot.role == "own")


def check_base(model: nn.Module, slots: Mapping[str, Slot], tensors: Mapping[str, Tensor], where: str) -> None:
    """Raises AdapterError where an adapter repeats a weight of its base, as PEFT does of an adapted
    embedding, and the model has another: the adapter is not for it."""
    for key in slots.keys() & tensors.keys():
        if slots[key].role == "base":
            weight = uncompiled_model(model).get_submodule(slots[key].owner).weight.detach()  # type: ignore[operator]
            if tensors[key].shape != weight.shape or not torch.equal(tensors[key].to(weight), weight):
                raise AdapterError(f"{where}: {key} differs from the base weight of the model, which a batch shares")


def _select_slots(model: nn.Module, config: LoraConfig) -> tuple[list[Target], dict[str, Experts], dict[str, Slot]]:
    given, config = config, as_fused(config, model)
    selection = select_targets(model, config, strict=False)
    check_init(config)
    modules = dict(model.named_modules())
    experts = experts_of(modules, selection.targets)
    linear = [t for t in selection.targets if t.key not in experts]
    foreign = [t.name for t in linear if not isinstance(modules[t.name], nn.Linear | nn.Embedding)]
    embeddings = [t.name for t in selection.targets if isinstance(modules[t.name], nn.Embedding)]
    beyond_lora = config.use_dora or config.extra.get("lora_bias")
    for asked, what in (
        (config.bias != "none", f"bias={config.bias!r} trains biases of the base"), (selection.saved, "it has modules_to_save"),
        (foreign, f"it adapts {first_names(foreign)}, which are neither nn.Linear nor nn.Embedding"),
        (beyond_lora and embeddings, f"it adapts {first_names(embeddings)} with DoRA or lora_bias, and is an embedding"),
    ):  # fmt: skip
        if asked:
            raise AdapterError(f"{what}; a batch shares the base, so only factors of linear layers and embeddings can differ")
    twice = [name for name, count in Counter(t.name for t in linear).items() if count > 1]
    if twice:
        raise AdapterError(f"target_modules and target_parameters both adapt {twice[0]}")
    slots = slots_of(model, selection, config)
    if config is not given:
        slots = per_expert_slots(model, selection, slots)
    if config.extra.get("lora_bias"):
        for target in linear:
            key = f"{PREFIX}{target.name}.lora_B.bias"
            slots[key] = Slot(target.name, "lora_B.bias", matrix_shape(modules[target.name])[:1])
    return selection.targets, experts, slots


def _build_adapter(
    targets: list[Target], experts: Mapping[str, Experts], slots: Mapping[str, Slot], config: LoraConfig,
    tensors: Mapping[str, Tensor],
) -> Adapter:  # fmt: skip
    factors = {}
    for target in targets:
        of = lambda name, path=f"{PREFIX}{target.name}": tensors.get(f"{path}.{name}")  # noqa: E731
        scale = initial_scaling(target.lora_alpha, target.r, config.use_rslora)
        if target.key in experts:
            of_experts = expert_factors(experts[target.key], target, slots, tensors)
            factors[target.key] = Factors(*of_experts[:2], scale, of_experts[2])
            continue
        a, b = (of(f"lora_{side}.weight") for side in "AB")
        if a is None:
            a, b = (of(f"lora_embedding_{side}") for side in "AB")
        assert a is not None and b is not None
        factors[target.name] = Factors(a, b, scale, of("lora_magnitude_vector"), of("lora_B.bias"))
    return Adapter(factors, config.base_model_name_or_path)
