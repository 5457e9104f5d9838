from typing import Any

ARCHITECTURES: str
PTX: str
kernels: dict[str, int]

def launch(
    kernel: int, x: int, y: int, z: int, threads: int, shared: int, early: bool, device: int, stream: int, args: tuple[Any, ...]
) -> None: ...
def pack(args: tuple[Any, ...]) -> int: ...
def tensor_map(data: int, bf16: bool, rows: int, columns: int, row: int, box_rows: int, box_columns: int) -> bytes: ...
