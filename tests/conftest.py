import gc
import hashlib
import importlib.util
import os
import sys
from collections import Counter
from pathlib import Path

import pytest

from lora_kernels import use_backend
from lora_kernels.ops.registry import ON_GPU

# `pytest` finds bench too, as `python -m pytest` does
sys.path.append(str(Path(__file__).parents[1]))

# modules and tests live to the end: a quarter of collection was the search for garbage among them
gc.disable()


def pytest_configure(config):
    """hypothesis draws the same examples in each run, lest a change fail for what is not its own;
    with --hypothesis-profile=default others."""
    if importlib.util.find_spec("hypothesis") is not None and not config.getoption("--hypothesis-profile", None):
        import hypothesis

        hypothesis.settings.register_profile("the same", derandomize=True)
        hypothesis.settings.load_profile("the same")


def pytest_collection_finish(session):
    gc.freeze()
    gc.enable()


# files of more than half a minute: several processes begin with them, and end with short ones
LONGEST = (
    "tests/ptxsim", "tests/ops/test_cuda_backward.py", "tests/integrations/test_warm_up.py", "tests/test_gpu_command.py",
    "tests/ops/test_multi_lora_triton.py", "tests/ops/test_simulated.py", "tests/ops/test_simulated_sm90.py",
    "tests/ops/test_maps.py", "tests/ops/test_addmm.py", "tests/ops/test_traffic.py", "tests/ops/test_cuda_library.py",
    "tests/ops/test_cuda_lora_linear.py", "tests/ops/test_multi_lora_cuda.py", "tests/ops/test_multi_lora_cuda_any.py",
    "tests/test_gpu_minutes.py",
)  # fmt: skip


def scope_of(nodeid):
    """What stays in one process: a file, for what it compiles is kept there; and tests/ptxsim,
    whose last test looks at what the others have run."""
    return "tests/ptxsim" if nodeid.startswith("tests/ptxsim/") else nodeid.partition("::")[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        _split_scope = staticmethod(scope_of)

    gc.enable()  # here nothing is collected
    config.option.loadscopereorder = False  # the order is that of collection
    return Scheduling(config, log)


def pytest_collection_modifyitems(config, items):
    if hasattr(config, "workerinput"):
        sizes = Counter(scope_of(item.nodeid) for item in items)
        places = {scope: place for place, scope in enumerate(LONGEST)}
        items.sort(key=lambda item: (places.get(scope_of(item.nodeid), len(places)), -sizes[scope_of(item.nodeid)]))


@pytest.fixture(autouse=True, scope="session")
def ptx_of_all_processes(tmp_path_factory):
    """nvcc makes the PTX of a file once in a run of all tests, whichever process asks for it."""
    if importlib.util.find_spec("lora_kernels._ptxsim") is None:
        return (yield)
    from lora_kernels.ptxsim import nvcc
    from tests.ops.plants import with_includes

    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "ptx"
    folder.mkdir(exist_ok=True)
    make = nvcc._compile

    def kept(source, *options):
        parts = [*options, *(path.read_text() for path in with_includes(source))]
        path = folder / hashlib.sha256("\0".join(parts).encode()).hexdigest()
        if not path.exists():
            own = path.with_suffix(f".{os.getpid()}")
            own.write_bytes(make(source, *options))
            own.rename(path)  # at once, for the other process may look
        return path.read_bytes()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nvcc, "_compile", kept)
        yield


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
