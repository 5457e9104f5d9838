"""Reads the tensors of an adapter's safetensors file, which may come from a stranger: once, never
executed, and checked before a tensor is allocated."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.adapters.config import parse_object, short_repr
from lora_kernels.adapters.foreign import our_key, what_they_are
from lora_kernels.adapters.inject import first_names
from lora_kernels.adapters.storage import AdapterError, open_together

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
    parameter: str | None = None
    """The parameter of experts that `name` belongs to."""
    part: tuple[int, int, int] | None = None
    """Of one expert's own layer: the expert, which of the layers that are one parameter, and how
    many these are."""


def tensor_at(module: nn.Module, name: str) -> Tensor:
    """The tensor of a module by its name there, which may have dots."""
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part)
    return found


def check_finite(key: str, tensor: Tensor, where: str) -> None:
    if tensor.is_floating_point():
        wrong = tensor.numel() - int(torch.isfinite(tensor).sum())
        if wrong:
            raise AdapterError(f"{where}: {key} has {wrong} of {tensor.numel()} values that are not finite")


def read_tensors(
    path: Path, slots: Mapping[str, Slot], opened: tuple[BufferedReader, int] | None = None
) -> dict[str, Tensor]:
    """The tensors of a safetensors file, which must be those of `slots`; nothing is allocated
    before that is known. `opened` is the file with its size, if it is open already."""
    if opened is None:
        with open_together(path.parent, [path.name]) as [each]:
            return read_tensors(path, slots, each)
    file, size = opened
    header, start = _read_header(file, size, path, slots)
    spans = {key: _byte_range(key, entry, path) for key, entry in header.items()}
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


def _read_header(file: BufferedReader, size: int, path: Path, slots: Mapping[str, Slot]) -> tuple[dict[str, Any], int]:
    length = int.from_bytes(file.read(8), "little")
    limit = max(_LEAST_HEADER, sum(len(key) + _HEADER_PER_TENSOR for key in slots))
    if size < 10 or length > size - 8:
        raise AdapterError(f"{path}: is truncated or not safetensors: the header takes {length} bytes of {size}")
    if length > limit:
        raise AdapterError(f"{path}: the header may take {limit} bytes, found {length}")
    header = parse_object(file.read(length), path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise AdapterError(f"{path}: __metadata__ must map strings to strings")
    found: dict[str, str] = {}
    foreign = []
    for key in header:
        ours = our_key(key, slots)
        if ours is None:
            foreign.append(key)
        elif ours in found:
            raise AdapterError(f"{path}: {short_repr(found[ours])} and {short_repr(key)} are the same tensor of an adapter")
        else:
            found[ours] = key
    if foreign:
        raise AdapterError(
            f"{path}: {len(foreign)} tensors do not belong to this adapter: {first_names(map(short_repr, sorted(foreign)))}"
            f"{what_they_are(foreign, slots)}"
        )
    missing = sorted(key for key, slot in slots.items() if slot.role == "own" and key not in found)
    if missing:
        raise AdapterError(f"{path}: {len(missing)} tensors are missing: {first_names(missing)}")
    return {ours: header[key] for ours, key in found.items()}, 8 + length


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
