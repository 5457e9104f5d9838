import pytest

from lora_kernels.ops import launch
from lora_kernels.testing import poisoned
from tests.ops import plants


@pytest.fixture(autouse=True)
def poisoned_memory():
    with poisoned():
        yield
    assert not any(tickets.any() for tickets in launch._tickets.values()), "a launch left its tickets other than zero"


@pytest.fixture
def planted(monkeypatch, request):
    """Puts a bug into a file of CUDA C++, where of its kernels it keeps one, which is quicker to
    compile; with nothing to replace the kernel is as it was. Kernels of other files have none."""
    from lora_kernels.ptxsim import nvcc

    monkeypatch.setattr(launch, "_tickets", {})  # a bug may leave them as they must not be

    def plant(source, old, new, keep, times=1):
        bug, others, compile_ptx = plants.Plant(old, new, times), plants.alike(request.node), nvcc.compile_ptx
        assert plants.planted(launch.CSRC / source, bug, keep), old

        def with_bug(path, *options):
            of_bug = path == launch.CSRC / source
            return plants.compiled(path, keep, bug, others, *options) if of_bug else compile_ptx(path, *options)

        monkeypatch.setattr(nvcc, "compile_ptx", with_bug)

    return plant
