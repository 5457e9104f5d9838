import sys
from pathlib import Path

import pytest

from lora_kernels import use_backend

sys.path.append(str(Path(__file__).parents[1]))  # `pytest` finds bench too, as `python -m pytest` does


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    """Forces each CPU backend in turn; one that is not built fails the test with its reason."""
    with use_backend(request.param):
        yield request.param
