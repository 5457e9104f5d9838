"""Every shipped configuration passes the gates on every chip; only what changed is compiled."""

from pathlib import Path

import pytest

from lora_kernels.testing.gates import Table, broken, current, differences, versions
from lora_kernels.testing.gates.measure import unsound
from tests.gates.configurations import GATES, MISSING

HERE = Path(__file__).parent
TABLE = Table.read(HERE / "table.json")
OTHERS = versions.other_versions()
ROWS = [pytest.param(one, arch, id=f"{one.name}-{arch}") for one in GATES for arch in one.chips]


@pytest.mark.parametrize(("configuration", "arch"), ROWS)
def test_gates(configuration, arch):
    known, budget = TABLE.rows.get((configuration.name, arch)), configuration.budget(arch)
    if known is not None:
        assert not broken(known, budget, arch)
    try:
        found, kept = current(configuration, arch, TABLE)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    assert not broken(found, budget, arch)
    if not kept:
        assert not differences(known, found), "`make gates` writes the table anew; look at what changed in it"


@pytest.mark.skipif(bool(MISSING), reason=str(MISSING))
def test_the_table_has_what_is_shipped_and_nothing_else():
    names = [configuration.name for configuration in GATES]
    assert len(set(names)) == len(names)
    shipped = {(configuration.name, arch) for configuration in GATES for arch in configuration.chips}
    assert set(TABLE.rows) == shipped, "`make gates` writes the table anew"
    others = {(one.name, arch, version) for version in OTHERS for one, arch in versions.configurations_for(GATES, version)}
    assert set(TABLE.others) == others


@pytest.mark.skipif(bool(MISSING), reason=str(MISSING))
@pytest.mark.parametrize(
    ("version", "arch"), [(version, arch) for version in OTHERS for arch in versions.chips_to_compile(version)]
)
def test_other_tritons(version, arch):
    """They are not here: the table holds what they made of the kernels as they are."""
    stale, wrong = [], {}
    for one in [one for one, chip in versions.configurations_for(GATES, version) if chip == arch]:
        row = TABLE.others.get((one.name, arch, version), {"fingerprint": "none"})
        if row["fingerprint"] != one.fingerprint(arch, version):
            stale.append(one.name)
        if reasons := unsound(row, one.budget(arch, version).spilled):
            wrong[one.name] = reasons
    assert not wrong
    assert not stale, "`make gates` writes the table anew"


def test_the_table_was_made_by_the_pinned_compilers():
    pins = (HERE.parents[1] / "requirements-dev.txt").read_text()
    for made in {row["made"] for row in TABLE.rows.values()}:
        name, version = made.split()
        assert f"{'nvidia-cuda-nvcc' if name == 'nvcc' else name}=={version};" in pins, "`make gates` writes the table anew"
