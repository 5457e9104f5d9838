"""A pytest plugin that hashes what every op gives in every test, so that two commits can be
compared bit for bit:

    python -m pytest -p bench.bits --bits before.json tests/ops        (at one commit, and at the
                                                                       other with after.json)
    python -m bench.bits before.json after.json
"""

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_kernels.ops import registry

# of which the arguments are hashed, since what is changed is among them
IN_PLACE = ("merge_into", "multi_lora_add")

_hashes: dict[str, Any] = {}
_now: list[str] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bits", metavar="FILE", help="write a hash of each test's op results into it")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--bits"):
        choose = registry.choose_implementation
        registry.choose_implementation = lambda *args: _watched(args[0], choose(*args))  # type: ignore[assignment]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    _now[:] = [item.nodeid]
    return (yield)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if path := session.config.getoption("--bits"):
        Path(path).write_text(json.dumps({name: digest.hexdigest() for name, digest in sorted(_hashes.items())}, indent=1))


def _watched(name: str, found: registry.Implementation) -> registry.Implementation:
    def run_hashed(*call: Any) -> Any:
        result = found.run(*call)
        digest = _hashes.setdefault(_now[0] if _now else "", hashlib.sha256())
        _hash_value(digest, call if name in IN_PLACE else result)
        return result

    return registry.Implementation(run_hashed, found.refusal)


def _hash_value(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        plain = value.detach().resolve_neg().cpu().contiguous()
        digest.update(f"{plain.dtype} {list(plain.shape)}".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
    elif isinstance(value, list | tuple):
        for each in value:
            _hash_value(digest, each)


def compare(before: Path, after: Path) -> int:
    """Prints what differs; the exit status."""
    old, new = (json.loads(path.read_text()) for path in (before, after))
    both = old.keys() & new.keys()
    other = sorted(name for name in both if old[name] != new[name])
    print(*(f"other bits: {name}" for name in other), sep="\n")
    print(f"{len(both)} tests, {len(other)} with other bits; {len(old.keys() - both)} gone, {len(new.keys() - both)} new")
    return int(bool(other))


if __name__ == "__main__":

    sys.exit(compare(*map(Path, sys.argv[1:3])))
