import pytest

from lora_kernels.testing import poisoned


@pytest.fixture(autouse=True)
def poisoned_memory():
    with poisoned():
        yield
