"""A model with adapters as a plain one: for good, or while a block runs."""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lora_kernels.adapters.config import AdapterError
from lora_kernels.adapters.inject import (
    Base,
    Layer,
    adapter_layers,
    first_names,
    install_module,
    is_adapters,
    refuse_peft,
    uncompiled_model,
)
from lora_kernels.nn import LoRALinear
from lora_kernels.nn.quantised import holds_codes
from lora_kernels.ops.lora_linear.op import FLOATS

Model = TypeVar("Model", bound=nn.Module)


def merge_and_unload(model: Model, *, safe: bool = False, dtype: torch.dtype | None = None, requantise: bool = False) -> Model:
    """Puts a plain module with the merged weight in the place of every layer with an adapter, in
    place, and returns the model. It has no trace of adapters then. `save_pretrained` and
    `state_dict` are those of a merged base.

    The plain modules have class, hooks, mode and requires_grad of before `inject_adapter`; copies
    of `modules_to_save` stay, as trained. A weight that another module shares (a tied head) gets a
    tensor of its own, and a transformers configuration then says tie_word_embeddings=False. Layer
    after layer is merged, so one weight more is in memory; after an error the model still computes
    what it did, and the call can be repeated. With `safe`, merged weights that are not finite are
    refused before anything changes.

    A quantised base (bitsandbytes) becomes floating: nn.Linear with weights of `dtype`, if not
    given that in which they were before they were quantised, or that of the model's other
    parameters where the weights do not say. A transformers configuration then names only what is
    still quantised. With `requantise` the base's library quantises the merged weights in the same
    way; that rounds, and a warning says the relative errors.

    Raises:
        AdapterError: there is no adapter, or `dtype` or `requantise` is given where no base is
            quantised, or where a layer is merged to something else already.
        NotImplementedError: `requantise` of a base whose library cannot, or FP8Experts without it;
            nothing has changed.
        TypeError: dtype is not a floating one.
        RuntimeError: a weight is computed by pruning or a parametrization; nothing has changed.
        ValueError: an embedding has max_norm, or `safe` and a merged weight is not finite; nothing
            has changed.
    """
    plain = uncompiled_model(model)
    layers = _layers_of(plain, "merge_and_unload")
    on_codes = {name: layer for name, layer in layers.items() if layer._quantised is not None}
    _check_codes(on_codes, dtype, requantise)
    for name, layer in layers.items():
        layer.check_merge(safe, *((dtype, requantise) if name in on_codes else ()))
    shared, errors, beside = _shared_weights(plain, layers), {}, _floating_dtype(plain)
    has_codes = bool(on_codes)
    on_codes.clear()
    for name in list(layers):
        layer = layers.pop(name)  # so that nobody holds its base weight any more
        base = layer._quantised
        if base is not None and not layer.merged:
            wanted = dtype if base.says_dtype or requantise else dtype or beside
            errors[name] = layer.merge(safe, dtype=wanted, requantise=requantise)
        _install_everywhere(plain, layer, layer.plain_layer(True))
    if shared:
        _untie(plain)
    if has_codes and not requantise:
        _became_floating(plain)
    _forget(plain)
    rounded = {name: error for name, error in errors.items() if error is not None}
    if rounded:
        worst = max(rounded, key=rounded.__getitem__)
        warnings.warn(
            f"merge_and_unload: {len(rounded)} merged weights were quantised again, with relative errors of"
            f" {min(rounded.values()):.2g} to {rounded[worst]:.2g} ({worst})",
            stacklevel=2,
        )
    return model


def _check_codes(layers: dict[str, Layer], dtype: torch.dtype | None, requantise: bool) -> None:
    if not layers and (requantise or dtype is not None):
        raise AdapterError(f"merge_and_unload: {'requantise' if requantise else 'dtype'} is for a quantised base; no base is")
    for name, layer in layers.items():
        again, found = layer._merged_as()
        if layer.merged and (requantise, dtype or found) != (again, found):
            raise AdapterError(f"merge_and_unload: {name} is merged to {found} already; unmerge() it first")


def _floating_dtype(model: nn.Module) -> torch.dtype | None:
    """Of the model's own parameters."""
    own = ((name.rpartition(".")[2], p) for name, p in model.named_parameters())
    return next((p.dtype for name, p in own if not is_adapters(name) and p.dtype in FLOATS), None)


def _became_floating(model: Any) -> None:
    """Transformers loads a model as its configuration says: quantised but for what this leaves
    out."""
    config = getattr(model, "config", None)
    quantisation = getattr(config, "quantization_config", None)
    if quantisation is None:
        return
    modules = dict(model.named_modules())
    if any(map(holds_codes, modules.values())):
        field = "llm_int8_skip_modules" if hasattr(quantisation, "llm_int8_skip_modules") else "modules_to_not_convert"
        plain = [name for name, module in modules.items() if type(module) is nn.Linear and not holds_codes(module)]
        setattr(quantisation, field, plain)
        return
    remove = getattr(getattr(model, "hf_quantizer", None), "remove_quantization_config", None)
    if remove is not None:
        remove(model)
    else:
        del model.config.quantization_config
    model.is_loaded_in_4bit = model.is_loaded_in_8bit = False


def unload(model: Model) -> Model:
    """Takes every adapter out of the model, in place, and returns it as it was before
    `inject_adapter`: plain modules with the base weights, the biases of before, and the modules
    whose copies `modules_to_save` trained.

    Raises:
        AdapterError: there is no adapter.
        RuntimeError: the base weight of a layer is a residual (pissa, olora); nothing has changed.
    """
    plain = uncompiled_model(model)
    layers = _layers_of(plain, "unload")
    new = {name: layer.plain_layer(False) for name, layer in layers.items()}
    for name, layer in layers.items():
        _install_everywhere(plain, layer, new[name])
    for owner, base in _bases(plain):
        for name, module in base.saved.items():
            install_module(owner, name, _as_its_copy(module, owner.get_submodule(name)))
        for name, value in base.biases.items():
            bias = owner.get_parameter(name)
            bias.data = value.to(bias)
    _forget(plain)
    return model


@contextmanager
def adapter_disabled(model: nn.Module) -> Iterator[None]:
    """In the block the whole model computes what its base did before `inject_adapter`, in every
    thread, as under PEFT's `disable_adapter`: a reference for DPO or GRPO. Adapters are off, the
    modules that `modules_to_save` copied are back, and so are biases that are trained. Blocks may
    be nested; after an exception, too, all is as before.

    Raises:
        AdapterError: there is no adapter, or the base weight of a layer is a residual (pissa,
            olora).
    """
    model = uncompiled_model(model)
    layers = _layers_of(model, "adapter_disabled")
    residual = [name for name, layer in layers.items() if isinstance(layer, LoRALinear) and layer._base_changed()]
    if residual:
        raise AdapterError(
            f"adapter_disabled: the base weights are residuals (pissa, olora) at {first_names(residual)}: without the adapter"
            " they are not the base; keep a copy of the base model as the reference"
        )
    with ExitStack() as undo:
        for owner, base in _bases(model):
            for name, module in base.saved.items():
                copy = owner.get_submodule(name)
                undo.callback(install_module, owner, name, copy)
                install_module(owner, name, _as_its_copy(module, copy))
            for name, value in base.biases.items():
                bias = owner.get_parameter(name)
                undo.callback(_set_data, bias, bias.data)
                _set_data(bias, value.to(bias))
        for layer in layers.values():
            undo.enter_context(layer.adapter_disabled())
        yield


def _set_data(parameter: nn.Parameter, data: Tensor) -> None:
    parameter.data = data


def _layers_of(model: nn.Module, function: str) -> dict[str, Layer]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model must be a torch.nn.Module, found {type(model).__name__}")
    refuse_peft(model)
    layers = adapter_layers(model)
    if not layers:
        raise AdapterError(f"{function}: the model has no adapter")
    return layers


def _bases(model: nn.Module) -> list[tuple[nn.Module, Base]]:
    """The modules that got an adapter, each with what it was before."""
    return [(m, vars(m)["_lora_base"]) for m in model.modules() if "_lora_base" in vars(m)]


def _as_its_copy(module: nn.Module, copy: nn.Module) -> nn.Module:
    """A module that the model does not hold, where its copy was moved to since."""
    if module is not copy:
        tensors = zip([*module.parameters(), *module.buffers()], [*copy.parameters(), *copy.buffers()], strict=True)
        for mine, its in tensors:
            if (mine.device, mine.dtype) != (its.device, its.dtype):
                mine.data = mine.data.to(its.device, its.dtype)
        module.train(copy.training)
    return module


def _install_everywhere(model: nn.Module, layer: Layer, plain: nn.Module) -> None:
    """Also where a module is known by several names."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module is layer:
            install_module(model, name, plain)


def _shared_weights(model: nn.Module, layers: dict[str, Layer]) -> bool:
    own = {id(layer): layer._base_weights() for layer in layers.values()}
    owners: dict[int, set[int]] = {}
    for module in model.modules():
        for tensor in [*module._parameters.values(), *own.get(id(module), ())]:
            if tensor is not None:
                owners.setdefault(id(tensor), set()).add(id(module))
    return any(len(owners[id(weight)]) > 1 for weights in own.values() for weight in weights)


def _untie(model: nn.Module) -> None:
    config: Any = getattr(model, "config", None)
    text = getattr(config, "get_text_config", None)
    each: Any
    for each in (config, text() if callable(text) else None):
        if getattr(each, "tie_word_embeddings", False):
            each.tie_word_embeddings = False


def _forget(model: nn.Module) -> None:
    for owner, base in _bases(model):
        for name, parameter in owner.named_parameters(remove_duplicate=False):
            parameter.requires_grad_(name in base.trained)
        del owner._lora_base, owner._lora_config
