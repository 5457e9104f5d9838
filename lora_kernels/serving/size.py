"""How much memory a pool takes, and how many adapters that holds."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lora_kernels.nn.quantised import is_quantised
from lora_kernels.ops.lora_linear.op import FLOATS
from lora_kernels.serving.adapter import vectors_of
from lora_kernels.serving.base import form_of
from lora_kernels.serving.experts import experts_at
from lora_kernels.serving.site import Layer, bytes_of_page, bytes_of_slots, pages_of, vectors_of_page

MIB = 1 << 20


@dataclass(frozen=True)
class PoolSize:
    """What a pool for certain modules takes; bytes.

    Each module gets as many pages, of 8 rows of A and of B, of experts for each of them. An adapter
    of rank r takes ⌈r / 8⌉ pages of each module that it changes; the gain of DoRA takes 1/4 of one
    beside them in 16 bits (1/8 in float32), gain and lora_bias twice as much.
    """

    slots: int
    """Adapters at once, at most."""
    max_rank: int
    pages: int
    """Of each module."""
    bytes_of_page: int
    """Of all modules together."""
    bytes_of_tables: int
    """Which page is whose; of all modules together."""
    vectors_of_page: int
    """Gains or biases for which a page has room."""

    @property
    def capacity_bytes(self) -> int:
        """What AdapterPool is to be given."""
        return self.bytes_of_tables + self.pages * self.bytes_of_page

    def holds(self, rank: int, *, dora: bool = False, lora_bias: bool = False) -> int:
        """How many adapters of one rank in all modules fit at the same time."""
        count = self.slots
        while count and _pages_for([rank] * count, dora, lora_bias, self.vectors_of_page) > self.pages:
            count -= 1
        return count

    def __str__(self) -> str:
        memory = f"{self.pages} pages of {self.bytes_of_page / MIB:.1f} MiB and tables of {self.bytes_of_tables / MIB:.1f} MiB"
        held = f"{self.holds(16)} LoRA or {self.holds(16, dora=True)} DoRA adapters of rank 16 in all modules"
        return f"{self.slots} slots, {memory}: room for {held}"


def size_of(layers: Iterable[Layer], capacity_bytes: int, slots: int, max_rank: int) -> PoolSize:
    """What a capacity gives.

    Raises:
        ValueError: slots or max_rank are below 1, or the capacity holds no page.
    """
    size = _size_without_pages(layers, slots, max_rank)
    pages = (capacity_bytes - size.bytes_of_tables) // size.bytes_of_page
    if pages < 1:
        least = size.bytes_of_tables + size.bytes_of_page
        raise ValueError(
            f"AdapterPool: capacity_bytes must be at least {least} for {slots} slots and one page of each module, found"
            f" {capacity_bytes}"
        )
    return replace(size, pages=pages)


def size_for(
    layers: Iterable[Layer], ranks: Iterable[int], slots: int | None, max_rank: int, dora: bool, lora_bias: bool
) -> PoolSize:
    """The least that holds adapters of these ranks at once, all with a gain or a bias if asked for.

    Raises:
        ValueError: there is no rank, one is below 1 or above max_rank, or slots are fewer than
            ranks.
    """
    ranks = list(ranks)
    if not ranks or min(ranks) < 1 or max(ranks) > max_rank:
        raise ValueError(f"AdapterPool: ranks must be some of 1 to {max_rank}, found {ranks}")
    if slots is not None and slots < len(ranks):
        raise ValueError(f"AdapterPool: {len(ranks)} adapters want as many slots, found {slots}")
    size = _size_without_pages(layers, len(ranks) if slots is None else slots, max_rank)
    return replace(size, pages=_pages_for(ranks, dora, lora_bias, size.vectors_of_page))


def _size_without_pages(layers: Iterable[Layer], slots: int, max_rank: int) -> PoolSize:
    if slots < 1 or max_rank < 1:
        raise ValueError(f"AdapterPool: slots and max_rank must be at least 1, found {slots} and {max_rank}")
    layers = list(layers)
    page = sum(bytes_of_page(layer, max_rank) for layer in layers)
    tables = sum(bytes_of_slots(layer, slots, max_rank) for layer in layers)
    return PoolSize(slots, max_rank, 0, page, tables, min(vectors_of_page(form_of(layer)[1]) for layer in layers))


def _pages_for(ranks: list[int], dora: bool, lora_bias: bool, per_page: int) -> int:
    """Of each module, for adapters of these ranks."""
    vectors = vectors_of(dora, lora_bias)
    beside = -(-len(ranks) // (per_page // vectors)) if vectors else 0
    return sum(map(pages_of, ranks)) + beside


def _is_plain(module: Any) -> bool:
    """Whether it is an nn.Linear or nn.Embedding that computes as one."""
    if "forward" in vars(module):
        return False
    return is_quantised(module) or type(module) is nn.Linear or (type(module) is nn.Embedding and module.max_norm is None)


def layers_of(model: nn.Module, modules: Iterable[str] | None) -> dict[str, Layer]:
    """The layers of a pool: those of `modules`, where experts are each of their weights, or each
    plain nn.Linear.

    Raises:
        TypeError, ValueError: as AdapterPool.
    """
    found = dict(model.named_modules())
    for name, module in found.items() if modules is None else ():
        weight = module._parameters.get("weight")
        if isinstance(module, nn.Linear) and weight is not None and not (weight.is_floating_point() or is_quantised(module)):
            kind = type(module).__name__
            raise TypeError(
                f"AdapterPool: {name}: {kind} holds its weight as {weight.dtype}, which no adapter can be served on;"
                " modules=[...] can leave it out"
            )
    names = [n for n, m in found.items() if isinstance(m, nn.Linear) and _is_plain(m)] if modules is None else list(modules)
    layers: dict[str, Layer] = {}
    for name in names:
        module = found.get(name)
        experts = None if isinstance(module, nn.Linear | nn.Embedding) else experts_at(found, name)
        if isinstance(experts, dict):
            layers.update(experts)
            continue
        if experts is not None:
            raise TypeError(f"AdapterPool: {name}: no adapter can be served on {experts}")
        if not isinstance(module, nn.Linear | nn.Embedding) or not _is_plain(module):
            kinds = "nn.Linear or nn.Embedding without max_norm"
            raise TypeError(f"AdapterPool: {name!r} must be a plain {kinds} of the model, found {type(module).__name__}")
        if module.weight.dtype not in FLOATS and not is_quantised(module):
            raise TypeError(f"AdapterPool: {name}: the weight must be floating, found {module.weight.dtype}")
        layers[name] = module
    if not layers:
        raise ValueError(f"AdapterPool: {type(model).__name__} has no linear layer")
    if len({layer.weight.device for layer in layers.values()}) > 1:
        raise ValueError("AdapterPool: all weights must be on one device")
    return layers
