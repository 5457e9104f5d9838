import sys
from pathlib import Path

import pytest

from lora_kernels import use_backend
from lora_kernels.ops.registry import ON_GPU

# `pytest` finds bench too, as `python -m pytest` does
sys.path.append(str(Path(__file__).parents[1]))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With several processes, tests/ptxsim stays in one: its last test looks at what the others
    have run."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return "tests/ptxsim" if nodeid.startswith("tests/ptxsim/") else nodeid

    return Scheduling(config, log)


@pytest.fixture(autouse=True)
def fresh_tickets():
    """A launch that ends early, as one with a bug does, leaves its tickets as the next one must not
    find them."""
    if launch := sys.modules.get("lora_kernels.ops.launch"):
        launch._tickets.clear()


@pytest.fixture(params=["reference", "cpu", pytest.param("triton", marks=pytest.mark.slow)])
def backend(request):
    """Forces each backend in turn, those for GPUs in the simulator; one that is not built fails the
    test with its reason."""
    with use_backend(request.param, simulate=request.param in ON_GPU):
        yield request.param
