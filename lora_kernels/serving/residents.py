"""What a pool holds: its adapters in their slots, and its counts."""

from dataclasses import dataclass, field

from lora_kernels.adapters.config import AdapterError
from lora_kernels.serving.adapter import Adapter


class PoolFullError(AdapterError):
    """There is no room that an adapter in use would not have to leave; nothing has changed."""


@dataclass
class Resident:
    """An adapter in a slot."""

    name: str | None
    """None once its name stands for another, or for none."""
    slot: int
    id: int
    adapter: Adapter
    pinned: bool
    users: int = 0


@dataclass
class PoolStats:
    """What a pool did so far, and what it holds; bytes."""

    loads: int = 0
    hits: int = 0
    misses: int = 0
    evictions: int = 0
    updates: int = 0
    failures: int = 0
    residents: int = 0
    slots: int = 0
    in_use: int = 0
    on_host: int = 0
    bytes_on_host: int = 0
    pages_free: int = field(default=0)
    """Of the module that has the fewest."""
