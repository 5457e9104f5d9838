"""Saves and loads adapters in PEFT's format: adapter_config.json and adapter_model.safetensors.

The files may come from a stranger. They are read once, never executed, and checked against the
model before a tensor is allocated or anything in the model is touched.
"""

import math
import os
import warnings
from contextlib import ExitStack
from dataclasses import dataclass, replace
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from lora_kernels.adapters.config import (
    CONFIG_NAME,
    AdapterError,
    LoraConfig,
    open_file,
    parse_object,
    short_repr,
    write_files,
)
from lora_kernels.adapters.inject import (
    Layer,
    adapter_layers,
    build_layers,
    check_targets,
    copies_to_train,
    first_names,
    install_modules,
    refuse_peft,
    resolved,
    set_trainable,
    trained_biases,
    uncompiled_model,
)
from lora_kernels.adapters.targets import Selection, select_targets
from lora_kernels.nn import DoRALinear, LoRAEmbedding
from lora_kernels.nn.base import initial_scaling

WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."

_LEAST_HEADER = 1 << 20
_HEADER_PER_TENSOR = 256
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


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
    the input and output embeddings. Each file is replaced in one step; if anything fails, a
    complete older adapter, or none, is in its place.

    Raises:
        AdapterError: there is no adapter, `config` does not describe it, or a weight is not finite
            (a ValueError).
        OSError: the files cannot be written.
    """
    model = uncompiled_model(model)
    refuse_peft(model)
    layers = adapter_layers(model)
    config = config or getattr(model, "_lora_config", None)
    if not layers or config is None:
        found = "no adapter" if not layers else "adapters but no configuration; give config="
        raise AdapterError(f"save_adapter: the model has {found}")
    selection = select_targets(model, config, strict=False)
    _check_layers(layers, selection, config)
    if save_embedding_layers:
        _check_unmerged(layers)
    slots = slots_of(model, selection, config)
    tensors = {
        key: _tensor_at(model.get_submodule(slot.owner), slot.name).detach().cpu().contiguous().clone()
        for key, slot in slots.items()
        if slot.role == "own" or (slot.role == "base" and save_embedding_layers)
    }
    for key, tensor in tensors.items():
        check_finite(key, tensor, "save_adapter")
    rescaled = [n for n, layer in layers.items() if not math.isclose(layer.scaling, _scaling(layer), rel_tol=1e-6)]
    if rescaled:
        warnings.warn(f"save_adapter: set_scale is not saved; changed in {first_names(rescaled)}", stacklevel=2)
    name = config.base_model_name_or_path or getattr(model, "name_or_path", None) or None
    config = replace(config, base_model_name_or_path=name, extra={**config.extra, "inference_mode": True})
    folder = Path(directory)
    if folder.exists() and not folder.is_dir():
        raise AdapterError(f"save_adapter: {folder} must be a directory")
    folder.mkdir(parents=True, exist_ok=True)
    weights = save(tensors, metadata={"format": "pt"})
    write_files({folder / WEIGHTS_NAME: weights, folder / CONFIG_NAME: resolved(config, selection).to_json()})


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
        AdapterError: a file is missing, damaged, foreign or does not fit the model; the message
            names the file and the tensor (a ValueError).
    """
    model = uncompiled_model(model)
    refuse_peft(model)
    folder = Path(directory)
    if not folder.is_dir():
        raise AdapterError(f"{folder}: is not a directory (adapters are read from disk, never downloaded)")
    path = folder / WEIGHTS_NAME
    pickle = folder / "adapter_model.bin"
    if not path.exists() and pickle.exists():
        raise AdapterError(f"{pickle}: is a pickle, which can run code when read; save the adapter as safetensors")
    config = LoraConfig.from_pretrained(folder)
    layers = adapter_layers(model)
    try:
        selection = select_targets(model, config, strict=False)
        if layers:
            _check_layers(layers, selection, config)
            _check_unmerged(layers)
            _check_rest(getattr(model, "_lora_config", None), selection, config)
        else:
            check_init(config)
            check_targets(model, selection, config)
    except AdapterError as error:
        raise AdapterError(f"{folder / CONFIG_NAME}: {error}") from error
    slots = slots_of(model, selection, config)
    tensors = read_tensors(path, slots)
    with torch.random.fork_rng(devices=[]), ExitStack() as undo:
        new: dict[str, nn.Module] = {}
        if not layers:
            new = build_layers(model, selection, replace(config, init_lora_weights=True), undo) | copies_to_train(
                model, selection
            )
        writes = []
        for key, value in tensors.items():
            slot = slots[key]
            owner = new[slot.owner] if slot.owner in new else model.get_submodule(slot.owner)
            target = _tensor_at(owner, slot.name)
            value = value.to(target)
            check_finite(key, value, f"{path} as {target.dtype}")
            if slot.role == "own" or load_embedding_layers:
                writes.append((target, value))
            elif not torch.equal(target, value):
                raise AdapterError(
                    f"{path}: {key} differs from the base weight of the model; load_embedding_layers=True takes it"
                )
        install_modules(model, new, undo)
        undo.pop_all()
    with torch.no_grad():
        for target, value in writes:
            target.copy_(value)
    if not layers:
        set_trainable(model, selection, config.bias, is_trainable)
        model._lora_config = resolved(config, selection)  # type: ignore[assignment]
    return [target.name for target in selection.targets]


@dataclass(frozen=True)
class Slot:
    """Where one tensor of the file belongs."""

    owner: str
    name: str
    shape: torch.Size
    dtype: torch.dtype | None = None
    """None: any floating dtype."""
    role: str = "own"
    """"own": the adapter's, must be there; "base": a base weight that PEFT may repeat; "ignored":
    PEFT may write it."""


def slots_of(model: nn.Module, selection: Selection, config: LoraConfig) -> dict[str, Slot]:
    """Every tensor that the files of this adapter hold or may hold, by its key."""
    slots = {}
    adapted = {target.name for target in selection.targets}
    for target in selection.targets:
        module = model.get_submodule(target.name)
        rows, columns = _tensor_at(module, "weight").shape
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
        slots.setdefault(key, Slot(name, "weight", _tensor_at(model.get_submodule(name), "weight").shape, role="base"))
    return slots


def _embeddings(model: nn.Module) -> list[str]:
    """The names of a model's token embedding and head; a model of images has none."""
    ends = []
    for side in ("input", "output"):
        try:
            ends.append(getattr(model, f"get_{side}_embeddings", lambda: None)())
        except NotImplementedError:  # transformers: of several towers, none is the model's
            continue
    tables = [end for end in ends if isinstance(getattr(end, "weight", None), Tensor)]
    return [name for name, module in model.named_modules() if any(module is end for end in tables)]


def _tensor_at(module: nn.Module, name: str) -> Tensor:
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _check_layers(layers: dict[str, Layer], selection: Selection, config: LoraConfig) -> None:
    """Raises unless the layers in the model are those that the configuration describes."""
    wanted = {target.name for target in selection.targets}
    for names, what in ((wanted - layers.keys(), "has no adapter"), (layers.keys() - wanted, "also has one")):
        if names:
            raise AdapterError(f"config selects other modules than the model has: it {what} at {first_names(sorted(names))}")
    for target in selection.targets:
        layer = layers[target.name]
        pairs = [
            ("r", target.r, layer.r),
            ("lora_alpha", target.lora_alpha, layer.lora_alpha),
            ("use_rslora", config.use_rslora, layer.use_rslora),
            ("use_dora", config.use_dora, isinstance(layer, DoRALinear)),
        ]
        for field, asked, found in pairs:
            if asked != found:
                raise AdapterError(f"config: {field} is {asked} for {target.name}, in the model it is {found}")


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


def _scaling(layer: Layer) -> float:
    return initial_scaling(layer.lora_alpha, layer.r, layer.use_rslora)


def check_init(config: LoraConfig) -> None:
    init = str(config.init_lora_weights)
    if init.startswith(_CHANGES_BASE):
        raise AdapterError(
            f"init_lora_weights={init!r} means that the adapter belongs to base weights which its"
            " initialisation changed, and loading changes none. Either repeat it, with inject_adapter(model,"
            " LoraConfig.from_pretrained(directory)) and then load_adapter, or let PEFT convert the adapter"
            " (path_initial_model_for_weight_conversion)"
        )


def check_finite(key: str, tensor: Tensor, where: str) -> None:
    if tensor.is_floating_point():
        wrong = tensor.numel() - int(torch.isfinite(tensor).sum())
        if wrong:
            raise AdapterError(f"{where}: {key} has {wrong} of {tensor.numel()} values that are not finite")


def read_tensors(path: Path, slots: dict[str, Slot]) -> dict[str, Tensor]:
    """The tensors of a safetensors file, which must be those of `slots`; nothing is allocated
    before that is known."""
    file, size = open_file(path)
    with file:
        header, start = _read_header(file, size, path, slots)
        spans = {key: _byte_range(key, entry, path) for key, entry in header.items() if key != "__metadata__"}
        _check_spans(spans, size - start, path)
        for key, slot in slots.items():
            if key in header:
                _check_entry(key, header[key], slot, path)
        data = bytearray(size - start)
        if file.readinto(data) != len(data):
            raise AdapterError(f"{path}: became shorter while it was read")
    raw = torch.frombuffer(data, dtype=torch.uint8)
    tensors = {}
    for key, (begin, end) in spans.items():
        tensor = raw[begin:end].clone().view(_DTYPES[header[key]["dtype"]]).reshape(header[key]["shape"])
        check_finite(key, tensor, str(path))
        if slots[key].role != "ignored":
            tensors[key] = tensor
    return tensors


def _read_header(file: BufferedReader, size: int, path: Path, slots: dict[str, Slot]) -> tuple[dict[str, Any], int]:
    length = int.from_bytes(file.read(8), "little")
    limit = max(_LEAST_HEADER, sum(len(key) + _HEADER_PER_TENSOR for key in slots))
    if size < 10 or length > size - 8:
        raise AdapterError(f"{path}: is truncated or not safetensors: the header takes {length} bytes of {size}")
    if length > limit:
        raise AdapterError(f"{path}: the header may take {limit} bytes, found {length}")
    header = parse_object(file.read(length), path)
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise AdapterError(f"{path}: __metadata__ must map strings to strings")
    keys = header.keys() - {"__metadata__"}
    foreign = sorted(keys - slots.keys())
    if foreign:
        raise AdapterError(
            f"{path}: {len(foreign)} tensors do not belong to this adapter: {first_names(map(short_repr, foreign))}"
        )
    missing = sorted(key for key, slot in slots.items() if slot.role == "own" and key not in keys)
    if missing:
        raise AdapterError(f"{path}: {len(missing)} tensors are missing: {first_names(missing)}")
    return header, 8 + length


def _byte_range(key: str, entry: Any, path: Path) -> tuple[int, int]:
    """Checks one header entry; returns where its bytes are."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise AdapterError(f"{path}: {key} must have dtype, shape and data_offsets, found {short_repr(entry)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise AdapterError(f"{path}: {key} has the dtype {short_repr(dtype)}; known are {', '.join(_DTYPES)}")
    for values, count in ((shape, 8), (offsets, 2)):
        numbers = isinstance(values, list) and all(type(v) is int and 0 <= v < 1 << 63 for v in values)
        if not numbers or len(values) > count or (values is offsets and len(values) != 2):
            raise AdapterError(f"{path}: {key} has a damaged entry {short_repr(entry)}")
    begin, end = offsets
    wanted = math.prod(shape) * _DTYPES[dtype].itemsize
    if end - begin != wanted:
        raise AdapterError(f"{path}: {key} with {dtype} {shape} takes {wanted} bytes, data_offsets give {end - begin}")
    return begin, end


def _check_spans(spans: dict[str, tuple[int, int]], size: int, path: Path) -> None:
    """Raises unless the tensors fill the data exactly, without gap or overlap."""
    reached = 0
    for key, (begin, end) in sorted(spans.items(), key=lambda item: item[1]):
        if begin != reached:
            kind = "overlaps" if begin < reached else "leaves a gap after"
            raise AdapterError(f"{path}: {key} {kind} the tensor before it: it begins at {begin}, not {reached}")
        reached = end
    if reached != size:
        raise AdapterError(f"{path}: is truncated or damaged: the tensors take {reached} bytes of data, found {size}")


def _check_entry(key: str, entry: dict[str, Any], slot: Slot, path: Path) -> None:
    dtype = _DTYPES[entry["dtype"]]
    if (slot.dtype or dtype) is not dtype or (slot.dtype is None and not dtype.is_floating_point):
        wanted = slot.dtype or "floating"
        raise AdapterError(f"{path}: {key} must be {wanted}, found {dtype}")
    if entry["shape"] != list(slot.shape):
        raise AdapterError(f"{path}: {key} must have shape {list(slot.shape)}, found {entry['shape']}")
