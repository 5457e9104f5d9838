"""Saves and loads adapters in PEFT's format: adapter_config.json and adapter_model.safetensors.

The files may come from a stranger. They are read once, never executed, and checked against the
model before a tensor is allocated or anything in the model is touched.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from lora_kernels.adapters.config import AdapterError, LoraConfig
from lora_kernels.adapters.expert_slots import expert_slots, in_other_order, per_expert_slots, tensor_of
from lora_kernels.adapters.foreign import PREFIX, what_is_there
from lora_kernels.adapters.inits import as_plain_lora, check_init, drawn_init, init_kinds, refuse_drawn_init
from lora_kernels.adapters.inject import (
    Base,
    Layer,
    adapter_layers,
    build_layers,
    check_targets,
    copies_to_train,
    finish_model,
    first_names,
    install_modules,
    put_back,
    refuse_peft,
    resolved,
    trained_biases,
    uncompiled_model,
)
from lora_kernels.adapters.interrupts import uninterrupted
from lora_kernels.adapters.per_expert import as_fused
from lora_kernels.adapters.storage import CONFIG_NAME, WEIGHTS_NAME, open_together, write_together
from lora_kernels.adapters.targets import Selection, select_targets
from lora_kernels.adapters.weights import Slot, check_finite, read_tensors, tensor_at
from lora_kernels.nn import DoRALinear, LoRAEmbedding, LoRAExperts, LoRALinear
from lora_kernels.nn.checks import check_flag
from lora_kernels.nn.quantised import holds_codes
from lora_kernels.nn.snapshot import changing


def save_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    config: LoraConfig | None = None,
    *,
    save_embedding_layers: bool = False,
) -> None:
    """Writes the adapter of `model` so that PeftModel.from_pretrained(base, directory) and
    load_adapter read it.

    `config` is needed only if the layers were put in by hand rather than by inject_adapter or
    load_adapter. Saved are the adapters, the biases that `config.bias` names, the modules to save
    and, with `save_embedding_layers` (say after a resize of the vocabulary), the base weights of
    the input and output embeddings. Layers that began with "pissa_niter_N" are saved as plain LoRA
    of twice the rank (PEFT's path_initial_model_for_weight_conversion): their base weight depends
    on random numbers, and only so can the file be read on the plain base.

    Both files are replaced as one step: whatever fails, and also if the
    process is killed, a whole older adapter or the new one is there. So it is for a reader or
    another writer at the same time.
    What else the folder holds stays.

    Raises:
        TypeError: save_embedding_layers is not True or False.
        AdapterError: there is no adapter, `config` does not describe it, or a weight is not finite
            (a ValueError).
        OSError: the files cannot be written.
    """
    check_flag("save_adapter", "save_embedding_layers", save_embedding_layers)
    model = uncompiled_model(model)
    refuse_peft(model)
    layers = adapter_layers(model)
    config = as_fused(config, model) if config else getattr(model, "_lora_config", None)
    if not layers or config is None:
        found = "no adapter" if not layers else "adapters but no configuration; give config="
        raise AdapterError(f"save_adapter: the model has {found}")
    selection = select_targets(model, config, strict=False)
    _check_layers(layers, selection, config)
    if save_embedding_layers:
        _check_unmerged(layers)
    slots = slots_of(model, selection, config)
    tensors = {
        key: tensor_of(model.get_submodule(slot.owner), slot).detach().cpu().contiguous().clone().view(slot.shape)
        for key, slot in slots.items()
        if slot.role == "own" or (slot.role == "base" and save_embedding_layers)
    }
    if any(drawn_init(layer) for layer in layers.values()):
        config, selection = as_plain_lora(layers, tensors, config, selection)
    for key, tensor in tensors.items():
        check_finite(key, tensor, "save_adapter")
    rescaled = [name for name, layer in layers.items() if layer._is_rescaled()]
    if rescaled:
        warnings.warn(f"save_adapter: set_scale is not saved; changed in {first_names(rescaled)}", stacklevel=2)
    name = config.base_model_name_or_path or getattr(model, "name_or_path", None) or None
    config = replace(config, base_model_name_or_path=name, extra={**config.extra, "inference_mode": True})
    folder = Path(directory)
    if folder.exists() and not folder.is_dir():
        raise AdapterError(f"save_adapter: {folder} must be a directory")
    weights = save(tensors, metadata={"format": "pt"})
    write_together(folder, {WEIGHTS_NAME: weights, CONFIG_NAME: resolved(config, selection).to_json()})


def load_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    is_trainable: bool = False,
    load_embedding_layers: bool = False,
) -> list[str]:
    """Loads the adapter in a local directory, written by PEFT or by save_adapter, into `model`.

    A plain model first gets the layers that the file's configuration names, all frozen unless
    `is_trainable`, as in PeftModel.from_pretrained. In a model that has our layers, they must be
    those of the configuration; their weights are replaced and nothing else. Base weights stay as
    they are, but for the biases and modules_to_save that belong to the adapter. Where the file
    repeats the base weights of an embedding, as PEFT writes them beside an adapted one, they must
    equal the model's, unless `load_embedding_layers` asks to take them.

    Only safetensors is read, nothing is downloaded or executed, and all checks come first: if
    anything raises, the model is as it was.

    Returns the names of the adapted modules.

    Raises:
        TypeError: a flag is not True or False.
        AdapterError: a file is missing, damaged, foreign or does not fit the model; the message
            names the file and the tensor (a ValueError).
    """
    check_flag("load_adapter", "is_trainable", is_trainable)
    check_flag("load_adapter", "load_embedding_layers", load_embedding_layers)
    model = uncompiled_model(model)
    refuse_peft(model)
    folder = Path(directory)
    path = folder / WEIGHTS_NAME
    layers = adapter_layers(model)
    with open_adapter(folder) as (config_file, weights_file):
        asked = LoraConfig.from_file(*config_file, folder / CONFIG_NAME)
        try:
            config = as_fused(asked, model)
            selection = select_targets(model, config, strict=False)
            if layers:
                refuse_drawn_init(config, layers)
                _check_layers(layers, selection, config)
                _check_unmerged(layers)
                _check_rest(getattr(model, "_lora_config", None), selection, config)
            else:
                check_init(config)
                check_targets(model, selection, config)
        except AdapterError as error:
            raise AdapterError(f"{folder / CONFIG_NAME}: {error}") from error
        slots = slots_of(model, selection, config)
        if config is not asked:
            slots = per_expert_slots(model, selection, slots)
        slots, tensors = read_slots(path, slots, weights_file)
    base = Base.of(model, selection, config.bias)
    with torch.random.fork_rng(devices=[]), ExitStack() as undo:
        new: dict[str, nn.Module] = {}
        if not layers:
            new = build_layers(model, selection, replace(config, init_lora_weights=True), undo) | copies_to_train(
                model, selection
            )
        writes = []
        blocks = {(slot.owner, slot.parameter) for slot in slots.values() if slot.part is not None and slot.name == "lora_B"}
        for owner_name, parameter in blocks if layers else ():
            # what lies beside the diagonal
            whole = model.get_submodule(owner_name).peft_tensor("lora_B", parameter)  # type: ignore[operator]
            writes.append((whole, torch.zeros_like(whole)))
            undo.callback(put_back, whole, whole.data, whole.clone())
        for key, value in tensors.items():
            slot = slots[key]
            owner = new[slot.owner] if slot.owner in new else model.get_submodule(slot.owner)
            target = tensor_of(owner, slot)
            value = value.to(target).view(target.shape)
            check_finite(key, value, f"{path} as {target.dtype}")
            if slot.role == "own" or load_embedding_layers:
                writes.append((target, value))
                if slot.owner not in new:
                    undo.callback(put_back, target, target.data, target.detach().clone())
            elif not torch.equal(target, value):
                raise AdapterError(
                    f"{path}: {key} differs from the base weight of the model; load_embedding_layers=True takes it"
                )
        with uninterrupted() as act, undo, torch.no_grad(), changing(*layers.values()):
            install_modules(model, new, undo)
            for target, value in writes:
                target.copy_(value)
            if not layers:
                finish_model(model, selection, config, base, undo, trainable=is_trainable)
            act()
            undo.pop_all()
    return selection.names()


@contextmanager
def open_adapter(folder: Path) -> Iterator[list[tuple[BufferedReader, int]]]:
    """Opens the configuration and the weights of one save, each with its size.

    Raises:
        AdapterError: one is missing or cannot be read; the message says what is there instead.
    """
    if not folder.is_dir():
        raise AdapterError(f"{folder}: is not a directory (adapters are read from disk, never downloaded)")
    with ExitStack() as stack:
        try:
            files = stack.enter_context(open_together(folder, (CONFIG_NAME, WEIGHTS_NAME)))
        except AdapterError as error:
            raise AdapterError(f"{error}{what_is_there(folder)}") from error
        yield files


def read_slots(
    path: Path, slots: dict[str, Slot], file: tuple[BufferedReader, int]
) -> tuple[dict[str, Slot], dict[str, Tensor]]:
    """The tensors of a file, and their slots in whichever order of experts' layers it has.

    Raises:
        AdapterError: they are not those of the adapter.
    """
    other = in_other_order(slots)
    try:
        return slots, read_tensors(path, slots, file)
    except AdapterError:
        if other is None:
            raise
        file[0].seek(0)
        with suppress(AdapterError):
            return other, read_tensors(path, other, file)
        raise


def slots_of(model: nn.Module, selection: Selection, config: LoraConfig) -> dict[str, Slot]:
    """Every tensor that the files of this adapter hold or may hold, by its key."""
    slots = {}
    adapted = {target.name for target in selection.targets}
    for target in selection.targets:
        module = model.get_submodule(target.name)
        if target.parameter is not None and not isinstance(module, nn.Linear | LoRALinear):
            continue
        rows, columns = matrix_shape(module)
        path = f"{PREFIX}{target.name}"
        shapes: dict[str, tuple[int, ...]]
        if isinstance(module, nn.Embedding | LoRAEmbedding):
            shapes = {"lora_embedding_A": (target.r, rows), "lora_embedding_B": (columns, target.r)}
        else:
            shapes = {"lora_A.weight": (target.r, columns), "lora_B.weight": (rows, target.r)}
            if config.use_dora:
                shapes["lora_magnitude_vector"] = (rows,)
        for key, shape in shapes.items():
            slots[f"{path}.{key}"] = Slot(target.name, key.removesuffix(".weight"), torch.Size(shape))
    slots |= expert_slots(model, selection, config)
    for name, bias in trained_biases(model, selection, config.bias).items():
        owner = name.rpartition(".")[0]
        key = f"{owner}.base_layer.bias" if owner in adapted else name
        slots[f"{PREFIX}{key}"] = Slot(owner, "bias", bias.shape)
    for path in selection.saved:
        for name, tensor in model.get_submodule(path).state_dict().items():
            dtype = None if tensor.is_floating_point() else tensor.dtype
            slots[f"{PREFIX}{path}.{name}"] = slot = Slot(path, name, tensor.shape, dtype)
            if config.bias == "all" and f".{name}".endswith(".bias"):
                for copy in ("modules_to_save", "original_module"):
                    slots[f"{PREFIX}{path}.{copy}.{name}"] = replace(slot, role="ignored")
    for name in _embeddings(model):
        key = f"{PREFIX}{name}.base_layer.weight" if name in adapted else f"{PREFIX}{name}.weight"
        slots.setdefault(key, Slot(name, "weight", tensor_at(model.get_submodule(name), "weight").shape, role="base"))
    return slots


def matrix_shape(module: nn.Module) -> torch.Size:
    """Of a layer's weight; codes may lie in another."""
    held: Any = module
    if _holds_codes(module):
        return torch.Size((held.out_features, held.in_features))
    return tensor_at(module, "weight").shape


def _holds_codes(module: nn.Module) -> bool:
    return holds_codes(module) or getattr(module, "_quantised", None) is not None


def _embeddings(model: nn.Module) -> list[str]:
    ends: list[Any] = []
    for side in ("input", "output"):
        with suppress(NotImplementedError):  # transformers: of several towers, none is the model's
            ends.append(getattr(model, f"get_{side}_embeddings", lambda: None)())
    ends = [end for end in ends if hasattr(end, "weight") and not _holds_codes(end)]
    return [name for name, m in model.named_modules() if any(m is end for end in ends)]


def _check_layers(layers: dict[str, Layer], selection: Selection, config: LoraConfig) -> None:
    """Raises unless the layers in the model are those that the configuration describes."""
    wanted = {target.name for target in selection.targets}
    for names, what in ((wanted - layers.keys(), "has no adapter"), (layers.keys() - wanted, "also has one")):
        if names:
            raise AdapterError(f"config selects other modules than the model has: it {what} at {first_names(sorted(names))}")
    for name, targets in selection.by_module().items():
        layer = layers[name]
        parameters = [target.parameter for target in targets]
        if isinstance(layer, LoRAExperts) and parameters != [*layer.adapted]:
            raise AdapterError(
                f"config: the adapted parameters of {name} are {', '.join(map(str, parameters))}, in the model they are"
                f" {', '.join(layer.adapted)}"
            )
        for target in targets:
            r, alpha = layer.r, layer.lora_alpha
            pairs = [
                ("r", target.r, r[str(target.parameter)] if isinstance(r, dict) else r),
                ("lora_alpha", target.lora_alpha, alpha[str(target.parameter)] if isinstance(alpha, dict) else alpha),
                ("use_rslora", config.use_rslora, layer.use_rslora),
                ("use_dora", config.use_dora, getattr(layer, "use_dora", isinstance(layer, DoRALinear))),
                ("init_lora_weights", *init_kinds(config, layer)),
            ]
            for field, asked, found in pairs:
                if asked != found:
                    raise AdapterError(f"config: {field} is {asked} for {target.key}, in the model it is {found}")


def _check_rest(held: LoraConfig | None, selection: Selection, config: LoraConfig) -> None:
    """Raises unless what else belongs to the file's adapter belongs to the model's too."""
    bias, saving = (held.bias, held.modules_to_save or []) if held else ("none", [])
    for field, asked, found in (("bias", config.bias, bias), ("modules_to_save", {*selection.saving}, {*saving})):
        if asked != found:
            raise AdapterError(f"config: {field} is {asked or None}, in the model it is {found or None}")


def _check_unmerged(layers: dict[str, Layer]) -> None:
    merged = [name for name, layer in layers.items() if layer.merged]
    if merged:
        raise AdapterError(f"the base weights hold the adapter; call unmerge() first for {first_names(merged)}")
