"""`python -m bench.traffic` on a small grid."""

import json

import pytest

from lora_kernels.ops import missing_backends

if "triton" in missing_backends():
    pytest.skip(missing_backends()["triton"], allow_module_level=True)

from bench import traffic


@pytest.mark.parametrize(("arch", "n"), [(80, [128]), (80, [128, 64]), (90, [128])], ids=str)
def test_a_small_grid(monkeypatch, tmp_path, capsys, arch, n):
    sizes = {"arch": arch, "m": 256, "k": 128, "r": 8, "cache": 1, "resident": 4}
    words = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    out = tmp_path / "traffic.json"
    monkeypatch.setattr("sys.argv", ["traffic", *words, "--n", *map(str, n), "--out", str(out)])
    traffic.main()
    (row,) = json.loads(out.read_text())["rows"]
    assert row["launches"] == 5 and row["n"] == n and row["cache"] == 2**20
    assert row["least"] == 2 * (4 * 256 * 128 + 3 * 256 * sum(n) + 2 * 128 * sum(n))
    # nothing is kept in a cache that is emptied; all of it fits in one that is not
    assert 0 < row["read"] < row["least"] < row["apart_read"] + row["apart_written"]
    assert "5 launches" in capsys.readouterr().out


def test_experts(monkeypatch, tmp_path, capsys):
    out = tmp_path / "traffic.json"
    words = "--m 6 --k 128 --n 64 --r 8 --experts 4 --top 2 --forward --cache 1 --resident 4 --out".split()
    monkeypatch.setattr("sys.argv", ["traffic", *words, str(out)])
    traffic.main()
    (row,) = json.loads(out.read_text())["rows"]
    assert row["top"] == 2 and row["hit"] <= 4 and row["n"] == 64 and not row["peft"]
    assert row["least"] == 2 * (12 * (128 + 64) + row["hit"] * (128 * 64 + 8 * (128 + 64)))
    assert "experts 4, top 2" in capsys.readouterr().out
