from typing import Any

class Program:
    def __init__(
        self,
        code: list[Any],
        registers: bytes,
        special: dict[str, int],
        shared_bytes: int,
        local_bytes: int,
    ) -> None: ...

def table() -> dict[str, str]: ...
def through_cache(trace: bytes, capacity: int, line_bytes: int) -> tuple[int, int]: ...
def run(
    program: Program,
    grid: list[int],
    block: list[int],
    parameters: bytes,
    buffers: list[tuple[str, int, int, bool, bool, int]],
    before: list[tuple[str, int, int, bool]],
    dynamic_shared: int,
    check: bool,
    late: bool,
    shuffle: bool,
    seed: int,
    steps: int,
    trace: bool,
    resident: int,
) -> dict[str, Any]: ...
