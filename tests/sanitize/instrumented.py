"""A pytest plugin: `lora_kernels._cpu` is the module in the file LK_SANITIZED instead of the
package's own."""

import importlib.util
import os
import sys

NAME = "lora_kernels._cpu"
_spec = importlib.util.spec_from_file_location(NAME, os.environ["LK_SANITIZED"])
assert _spec is not None and _spec.loader is not None
# before the package is imported, which then finds it
sys.modules[NAME] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sys.modules[NAME])


def pytest_sessionfinish() -> None:
    from lora_kernels import _cpu

    assert _cpu.__file__ == os.environ["LK_SANITIZED"], f"the tests ran on {_cpu.__file__}"
