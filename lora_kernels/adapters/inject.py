"""Puts LoRA layers in the place of a model's linear and embedding layers, and of its experts."""

import copy
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.adapters.config import AdapterError, LoraConfig
from lora_kernels.adapters.interrupts import uninterrupted
from lora_kernels.adapters.per_expert import as_fused
from lora_kernels.adapters.targets import Selection, Target, select_targets
from lora_kernels.nn import DoRALinear, LoRAEmbedding, LoRAExperts, LoRALinear
from lora_kernels.nn.base import HOOKS
from lora_kernels.nn.embedding import is_scaled_embedding
from lora_kernels.nn.expert_checks import experts_refusal
from lora_kernels.nn.init import CHANGES_CODES
from lora_kernels.nn.lora_experts import INITS
from lora_kernels.nn.passed_over import fast_paths, is_off_fast_path, leave_fast_path, reader_of, restore_fast_path
from lora_kernels.nn.quantised import holds_codes, rounds_in_forward
from lora_kernels.nn.quantised_base import QuantisedBase
from lora_kernels.ops.lora_linear.op import FLOATS

Layer = LoRALinear | LoRAEmbedding | LoRAExperts


@dataclass(frozen=True)
class Base:
    """Of a model before it got its adapter: what training may change or replaces."""

    saved: dict[str, nn.Module]
    """The modules whose copies are trained (modules_to_save), by name."""
    biases: dict[str, Tensor]
    """Copies of the biases that belong to the adapter, by name."""
    trained: frozenset[str]
    """The parameters that required grad."""

    @classmethod
    def of(cls, model: nn.Module, selection: Selection, bias: str) -> "Base":
        return cls(
            {name: model.get_submodule(name) for name in selection.saved},
            {name: b.detach().clone() for name, b in trained_biases(model, selection, bias).items()},
            frozenset(n for n, p in model.named_parameters(remove_duplicate=False) if p.requires_grad),
        )


def inject_adapter(model: nn.Module, config: LoraConfig) -> list[str]:
    """Replaces the modules that `config` selects by layers with an adapter, in place, and freezes
    the rest.

    nn.Linear becomes LoRALinear, or DoRALinear with `use_dora`; nn.Embedding becomes LoRAEmbedding.
    A module of experts whose matrices `target_parameters` names becomes LoRAExperts. They share the
    weights of what they replace, and keep its hooks and its train or eval mode. As after
    peft.get_peft_model, only the adapters require grad, with the biases that `bias` names and the
    copies of `modules_to_save`. All or nothing: if anything raises, the model is as it was. "pissa"
    and "olora" change the base weights, as in PEFT.

    Returns the names of the replaced modules.

    Raises:
        TypeError: config is not a LoraConfig of this package.
        AdapterError: a target, name or pattern matches no module, or a module cannot take an
            adapter (a ValueError).
    """
    if not isinstance(config, LoraConfig):
        raise TypeError(
            f"inject_adapter: config must be a lora_kernels LoraConfig, found {type(config).__name__}"
            " (LoraConfig.from_dict(config.to_dict()) converts PEFT's)"
        )
    model = uncompiled_model(model)
    config = replace(as_fused(config, model))
    refuse_peft(model)
    layers = adapter_layers(model)
    if layers:
        raise AdapterError(f"inject_adapter: the model already has adapters in {len(layers)} modules: {first_names(layers)}")
    if config.init_lora_weights in ("eva", "corda", "loftq", "lora_ga", "mica"):
        raise AdapterError(f"inject_adapter: init_lora_weights={config.init_lora_weights!r} is not supported")
    selection = select_targets(model, config)
    check_targets(model, selection, config)
    base = Base.of(model, selection, config.bias)
    with ExitStack() as undo:
        new = build_layers(model, selection, config, undo) | copies_to_train(model, selection)
        with uninterrupted() as act, undo:
            install_modules(model, new, undo)
            finish_model(model, selection, config, base, undo, trainable=True)
            act()
            undo.pop_all()
    return selection.names()


def finish_model(
    model: nn.Module, selection: Selection, config: LoraConfig, base: Base, undo: ExitStack, *, trainable: bool
) -> None:
    """Freezes what is not to be trained, and gives the model its configuration; `build_layers` has
    told `undo` what required grad before."""
    for name in ("_lora_config", "_lora_base"):
        undo.callback(_put_back_attribute, model, name, vars(model).get(name))
    model._lora_base = base  # type: ignore[assignment]
    set_trainable(model, selection, config.bias, trainable)
    model._lora_config = resolved(config, selection)  # type: ignore[assignment]


def uncompiled_model(model: nn.Module) -> nn.Module:
    """The model under torch.compile, whose names the files use."""
    return getattr(model, "_orig_mod", model)


def adapter_layers(model: nn.Module) -> dict[str, Layer]:
    """Our layers in a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Layer)}


def refuse_peft(model: nn.Module) -> None:
    """Raises if the model is PEFT's, whose layers are not ours."""
    found = next((type(m).__name__ for m in model.modules() if type(m).__module__.startswith("peft.")), None)
    if found is not None:
        raise AdapterError(f"the model holds PEFT's {found}: use lora_kernels.fuse(model), or give the base model")


def resolved(config: LoraConfig, selection: Selection) -> LoraConfig:
    """The configuration as a file should hold it: with names in place of what depends on the
    model."""
    return replace(config, target_modules=selection.target_modules, modules_to_save=list(selection.saving) or None)


def check_targets(model: nn.Module, selection: Selection, config: LoraConfig) -> None:
    """Raises if a selected module cannot take the adapter; names all that cannot, each with the
    reason."""
    modules = dict(model.named_modules(remove_duplicate=False))
    whole = {target.name for target in selection.targets if target.parameter is None}
    reasons = {}
    for target in selection.targets:
        module = modules[target.name]
        reason = _refusal(module, config) if target.parameter is None else _parameter_refusal(module, target, config)
        if reason is None and isinstance(module, nn.Linear) and (reader := reader_of(model, target.name)):
            reason = f"{reader} may compute with this weight without calling the layer; add it to exclude_modules"
        if reason is None and config.init_lora_weights == "orthogonal" and target.r % 2:
            reason = f'init_lora_weights="orthogonal" needs an even r, found {target.r}'
        if reason is None and _is_saved(target, selection.saved):
            reason = "is also among modules_to_save"
        if reason is None and target.parameter is not None and target.name in whole:
            reason = "is named by target_modules and by target_parameters"
        if reason is not None:
            reasons[target.key] = reason
    for name in selection.saved:
        if isinstance(modules[name], nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict):
            reasons[name] = f"modules_to_save cannot be a {type(modules[name]).__name__}"
    if reasons:
        raise AdapterError(f"{first_names([f'{name}: {reason}' for name, reason in reasons.items()], '; ')}")


def _is_saved(target: Target, saved: list[str]) -> bool:
    """Modules within saved ones are not targeted, but their parameters are."""
    within = target.parameter is not None and any(target.name.startswith(f"{name}.") for name in saved)
    return within or target.name in saved


def _refusal(module: nn.Module, config: LoraConfig) -> str | None:
    """Why this module cannot take an adapter, in words; None if it can."""
    class_name = type(module).__name__
    plain: type[nn.Module]
    if isinstance(module, nn.Embedding):
        plain = nn.Embedding
        if config.use_dora:
            return "use_dora is not supported for nn.Embedding; leave it out of target_modules"
    elif isinstance(module, nn.Linear):
        plain = nn.Linear
    elif class_name == "Conv1D":
        return "transformers' Conv1D stores its weight transposed and is not supported; PEFT with fuse(model) runs it"
    else:
        return f"is a {class_name}; only nn.Linear and nn.Embedding can take an adapter"
    if holds_codes(module):
        return _refuse_codes(module, config)
    scaled = is_scaled_embedding(module)
    if (type(module).forward is not plain.forward and not scaled) or (
        "forward" in vars(module) and rounds_in_forward(module) is not None
    ):
        return f"{class_name} computes in its own way, which the adapter's layer would replace"
    weight = module._parameters.get("weight")
    if type(weight) is not nn.Parameter or type(weight.data) is not torch.Tensor:
        return "its weight is not a plain parameter"
    if weight.dtype not in FLOATS:
        return f"its weight is {weight.dtype}; only float32, bfloat16, float16 and float64 are supported"
    return None


def _parameter_refusal(module: nn.Module, target: Target, config: LoraConfig) -> str | None:
    """Why this parameter of the module cannot take an adapter, in words; None if it can."""
    if isinstance(module, nn.Linear):
        if target.parameter != "weight":
            return f"of a {type(module).__name__} only the weight can take an adapter"
        if holds_codes(module):
            return "its weight is quantised; name the layer in target_modules"
        return _refusal(module, config)
    if (reason := experts_refusal(module, [str(target.parameter)])) is not None:
        return f"{reason}; PEFT with fuse(model) may run it"
    if config.init_lora_weights not in INITS:
        return (
            f"init_lora_weights={config.init_lora_weights!r} is for matrices; of experts it must be True, False or 'gaussian'"
        )
    if config.bias == "all" and any("bias" in name for name in module._parameters):
        return f"bias='all' would train the biases of {type(module).__name__}, which is not supported"
    return None


def _refuse_codes(module: nn.Module, config: LoraConfig) -> str | None:
    if "forward" in vars(module) and rounds_in_forward(module) == "":
        return f"{type(module).__name__} computes in its own way, which the adapter's layer would replace"
    if _changes_base(config):
        return f"init_lora_weights={config.init_lora_weights!r} {CHANGES_CODES}"
    try:
        QuantisedBase(module)
    except TypeError as error:
        return str(error)
    return None


def _changes_base(config: LoraConfig) -> bool:
    return str(config.init_lora_weights).startswith(("pissa", "olora"))


def build_layers(model: nn.Module, selection: Selection, config: LoraConfig, undo: ExitStack) -> dict[str, nn.Module]:
    """The new layers, not yet in the model; what building them changes in the base is put back by
    `undo`."""
    for parameter in model.parameters():
        undo.callback(parameter.requires_grad_, parameter.requires_grad)
    changes_base = _changes_base(config)
    new: dict[str, nn.Module] = {}
    for name, targets in selection.by_module().items():
        module = model.get_submodule(name)
        if changes_base and isinstance(module, nn.Linear):
            undo.callback(put_back, module.weight, module.weight.data, module.weight.detach().clone())
        new[name] = _adapter_layer(module, targets, config)
        for hooks in HOOKS:
            setattr(new[name], hooks, getattr(module, hooks))
    return new


def _adapter_layer(module: nn.Module, targets: list[Target], config: LoraConfig) -> Layer:
    if not isinstance(module, nn.Embedding | nn.Linear):
        named = {target.parameter or "": target for target in targets}
        return LoRAExperts.from_experts(
            module,
            list(named),
            r={name: target.r for name, target in named.items()},
            lora_alpha={name: target.lora_alpha for name, target in named.items()},
            use_rslora=config.use_rslora,
            use_dora=config.use_dora,
            init_lora_weights=config.init_lora_weights,
        )
    (target,) = targets
    options: dict[str, Any] = {"r": target.r, "lora_alpha": target.lora_alpha, "use_rslora": config.use_rslora}
    if isinstance(module, nn.Embedding):
        # as PEFT: the named initialisations are for linear layers
        return LoRAEmbedding.from_embedding(module, **options, init_lora_weights=config.init_lora_weights is not False)
    layer_class = DoRALinear if config.use_dora else LoRALinear
    return layer_class.from_linear(
        module, **options, lora_dropout=config.lora_dropout, init_lora_weights=config.init_lora_weights
    )


def copies_to_train(model: nn.Module, selection: Selection) -> dict[str, nn.Module]:
    """Copies of the modules to save, to be trained in place of the base's."""
    return {name: copy.deepcopy(model.get_submodule(name)) for name in selection.saved}


def install_modules(model: nn.Module, new: dict[str, nn.Module], undo: ExitStack) -> None:
    """Puts the new modules in the places of the old ones; an encoder that would read their weights
    past them calls them from now on."""
    for name, module in new.items():
        undo.callback(install_module, model, name, model.get_submodule(name))
        install_module(model, name, module)
    layers = set(new.values())
    for encoder in fast_paths(model, lambda module: module in layers).values():
        if not is_off_fast_path(encoder):
            undo.callback(restore_fast_path, encoder)
            leave_fast_path(encoder)


def set_trainable(model: nn.Module, selection: Selection, bias: str, trainable: bool = True) -> None:
    """Freezes the model but for the adapters, the biases that `bias` names, and the modules to
    save."""
    model.requires_grad_(False)
    if not trainable:
        return
    for layer in adapter_layers(model).values():
        for name, parameter in layer.named_parameters(recurse=False):
            if is_adapters(name):
                parameter.requires_grad_(True)
    for parameter in trained_biases(model, selection, bias).values():
        parameter.requires_grad_(True)
    for name in selection.saved:
        for parameter in model.get_submodule(name).parameters():
            parameter.requires_grad_(parameter.is_floating_point())


def is_adapters(name: str) -> bool:
    """Whether a parameter of a layer, by its last name, is its adapter's."""
    return name.startswith("lora_")


def trained_biases(model: nn.Module, selection: Selection, bias: str) -> dict[str, nn.Parameter]:
    """The base biases that belong to the adapter, by name; those of modules to save are counted
    there."""
    if bias == "none":
        return {}
    adapted = {target.name for target in selection.targets}
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner, _, last = name.rpartition(".")
        if last != "bias" or any(f"{owner}.".startswith(f"{saved}.") for saved in selection.saved):
            continue
        if bias == "all" or owner in adapted:
            found[name] = parameter
    return found


def install_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _put_back_attribute(model: nn.Module, name: str, value: Any) -> None:
    vars(model).pop(name, None)
    if value is not None:
        vars(model)[name] = value


@torch.no_grad()
def put_back(parameter: Tensor, data: Tensor, value: Tensor) -> None:
    parameter.data = data
    parameter.copy_(value)


def first_names(names: Iterable[str], separator: str = ", ") -> str:
    """The first few names, for an error message."""
    names = list(names)
    return separator.join(names[:5]) + (f"{separator}and {len(names) - 5} more" if len(names) > 5 else "")
