import pytest

from lora_kernels import use_backend


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    """Forces each CPU backend in turn; one that is not built fails the test with its reason."""
    with use_backend(request.param):
        yield request.param
