"""test_table.py comes last: it looks at what all other tests of this folder have run."""

import pytest

from lora_kernels import ptxsim
from tests.ptxsim.lanes import RAN


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: "ptxsim/test_table" in str(item.path))


@pytest.fixture(autouse=True)
def watched():
    with ptxsim.device() as sim:
        yield
    RAN.update(sim.by_opcode)
