import sys
from pathlib import Path

import pytest

from lora_kernels import use_backend
from lora_kernels.ops.registry import ON_GPU

sys.path.append(str(Path(__file__).parents[1]))  # `pytest` finds bench too, as `python -m pytest` does


@pytest.fixture(params=["reference", "cpu", pytest.param("triton", marks=pytest.mark.slow)])
def backend(request):
    """Forces each backend in turn, those for GPUs in the simulator; one that is not built fails the test with its reason."""
    with use_backend(request.param, simulate=request.param in ON_GPU):
        yield request.param
