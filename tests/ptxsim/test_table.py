"""Every instruction that the simulator has is run by a test of this folder."""

import pytest

from lora_kernels import _ptxsim
from tests.ptxsim.lanes import RAN


def test_every_instruction_is_tested(request):
    ran = {item.path.name for item in request.session.items}
    needed = "alu", "alu_more", "half", "memory", "matrix", "checks", "rounding", "narrow", "warp", "module"
    needed = {f"test_{name}.py" for name in needed}
    if not needed <= ran or request.config.option.keyword:
        pytest.skip("only when the whole folder runs")
    untested = sorted(set(_ptxsim.table()) - RAN)
    assert not untested, " ".join(untested)
