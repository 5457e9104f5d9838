"""The table of tiles: how a row is found, that it is what launches, the cost model and the CUDA
sources take, and what must hold of each row whoever changes it."""

import itertools
import json
import re

import pytest
import torch

from lora_kernels.ops import cost, missing_backends, weight_norm
from lora_kernels.ops.chips import CHIPS
from lora_kernels.ops.cost import Problem
from lora_kernels.ops.launch import CSRC, recorded
from lora_kernels.ops.tables import tiles
from lora_kernels.ops.tables.tiles import (
    FILE,
    Kernel,
    Row,
    Tile,
    TileRequest,
    compiled,
    ranges,
    read,
    resolve,
    seen,
    tile,
    tried,
)
from lora_kernels.ptxsim import device
from lora_kernels.testing.gates import Cuda
from tests.ops.interpreted import deterministic

BF16, F32 = torch.bfloat16, torch.float32
FORWARD = {"k": 4096, "n": 4096, "layers": 1, "two_sums": False, "one_pass": False, "mapped": False}
DX = {"k": 4096, "n": 4096, "layers": 1, "gains": False, "two_sums": False}
needs_triton = pytest.mark.skipif("triton" in missing_backends(), reason=str(missing_backends().get("triton")))


def test_ranges():
    assert ranges("64") == [(64, 64)] and ranges("-64") == [(0, 64)]
    assert ranges("0,100-109") == [(0, 0), (100, 109)] and ranges("65-")[0][1] > 10**18


def test_each_number_is_that_of_the_first_row_that_has_it():
    rows = [
        Row({"arch": "90", "deterministic": False}, {"depth": 128}),
        Row({"m": "-64", "dtype": "bfloat16 float16"}, {"rows": 64, "warps": 4}),
        Row({}, {"rows": 128, "depth": 64, "warps": 8, "stages": 2}),
    ]
    half = {"arch": 90, "deterministic": False, "m": 64, "dtype": "float16"}
    assert resolve(rows, half) == Tile(rows=64, depth=128, warps=4, stages=2)
    assert resolve(rows, half | {"m": 128}) == Tile(rows=128, depth=128, warps=8, stages=2)
    assert resolve(rows, half | {"arch": 89, "dtype": "float32"}) == Tile(rows=128, depth=64, warps=8, stages=2)
    assert resolve(rows, half | {"deterministic": True}).depth == 64


@pytest.mark.parametrize(("row", "message"), [
    ({"if": {"dtipe": "float32"}, "tile": {"depth": 32}}, "norm does not ask for 'dtipe'"),
    ({"tile": {"dept": 32}}, "norm has dept 32, and a tile rows, columns"),
    ({"tile": {"depth": 48}}, "norm has depth 48"),
    ({"if": {"arch": "9o"}, "tile": {"depth": 32}}, "invalid literal"),
])  # fmt: skip
def test_a_row_that_says_nothing_is_an_error(tmp_path, row, message):
    found = json.loads(FILE.read_text())
    found["norm"]["rows"].insert(0, row)
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps(found))
    with pytest.raises(ValueError, match=message):
        read(path)


def test_answers_that_nobody_asks_for_are_an_error():
    with pytest.raises(TypeError, match="row_norm_squared asks for dtype, found dtype, m"):
        tile("row_norm_squared", 90, dtype=BF16, m=3)
    with pytest.raises(KeyError, match="nrom"):
        tile("nrom", 90)


def test_the_file_is_read_as_it_was_written(tmp_path):
    tiles.write(read(), tmp_path / "tiles.json")
    assert read(tmp_path / "tiles.json") == read()
    assert (tmp_path / "tiles.json").read_text() == FILE.read_text()
    assert max(map(len, FILE.read_text().splitlines())) < 256 and len(FILE.read_text().splitlines()) <= 400


def answers(kernel: Kernel):
    """Every combination of what the rows of a kernel tell apart."""
    every = {}
    for name in (*kernel.asks, "arch"):
        wanted = [row.conditions[name] for row in kernel.rows if name in row.conditions]
        texts = [text for text in wanted if isinstance(text, str) and text[0] in "-0123456789"]
        edges = {edge for text in texts for one in ranges(text) for edge in one}
        numbers = sorted(edge + near for edge in edges for near in (0, 1) if edge + near < 10**6)
        if name == "arch":
            every[name] = sorted({0, *CHIPS, 87, 103, 110, 121})
        elif name == "dtype" or name == "factors":
            every[name] = ["bfloat16", "float16", "float32"]
        else:
            every[name] = numbers or ([True, False] if any(isinstance(each, bool) for each in wanted) else [1])
    return [dict(zip(every, each, strict=True)) for each in itertools.product(*every.values())]


@pytest.mark.parametrize("name", read())
def test_each_tile_is_whole_and_each_row_counts(name):
    """Every case has a warp, a stage and the numbers of its kernel, and no row stands where others
    hide it."""
    kernel, used = read()[name], set()
    for given in answers(kernel):
        given |= {"deterministic": False}
        found = resolve(kernel.rows, given)
        assert 1 <= found.warps <= 16 and 1 <= found.stages <= 8 and found.registers in (None, *range(32, 256))
        for number in kernel.rows[-1].numbers:
            assert number in ("registers", "maps", "why") or getattr(found, number) > 0, (given, number)
        for row in [row for row in kernel.rows if row.holds(given)]:
            before = kernel.rows[: kernel.rows.index(row)]
            hidden = {number for other in before if other.holds(given) for number in other.numbers}
            used |= {kernel.rows.index(row)} if set(row.numbers) - hidden else set()
    assert used == set(range(len(kernel.rows))), [kernel.rows[i].line() for i in set(range(len(kernel.rows))) - used]


@pytest.mark.parametrize("arch", [0, 80, 90, 100, 120])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_depth_of_a_step_does_not_depend_on_m(arch, dtype):
    """In the deterministic mode, which asks for 64 rows at least: wgmma and tcgen05 sum by
    steps."""
    for name in ("forward", "input_gradient", "shrink", "multi_lora", "multi_small", "multi_shrink"):
        kernel, kept = read()[name], {}
        for given in answers(kernel):
            size = given.pop("m", given.pop("entries", None))
            if size is None or size < 64 or given["dtype"] != dtype or given["arch"] != arch:
                continue
            found = resolve(kernel.rows, given | {"m": size, "entries": size, "deterministic": True})
            if name == "input_gradient" and not 90 <= arch < 120:
                continue  # mma.sync takes 16 at a time, whatever the step
            assert kept.setdefault(str(given), (found.depth, found.part)) == (found.depth, found.part), (name, given)


# of each kernel its source, and which of its numbers are which constants there
SOURCES = {
    "lora_linear_small.cu": ("lora_linear/cuda_small.cu", {"ROWS": "rows", "THREADS": "threads", "RANKS": "ranks"}),
    "lora_linear_codes.cu": ("lora_linear/cuda_codes.cu", {
        "ROWS": "rows", "THREADS": "threads", "RANKS": "ranks", "CODES": "depth"}),
    "lora_linear_tiles.cu": ("lora_linear/cuda_tiles.cu", {
        "TILE": "rows columns", "COLUMNS": "depth", "STAGES": "stages", "THREADS": "threads", "RANKS": "ranks"}),
    "lora_linear_dx.cu": ("lora_linear/cuda_dx.cu", {
        "TILE": "rows columns", "COLUMNS": "depth", "STAGES": "stages", "THREADS": "threads", "RANKS": "ranks"}),
    "lora_linear_specialised.cu": ("lora_linear/cuda_specialised_sm90a.cu", {
        "ROWS": "rows", "ACROSS": "columns", "DEPTH": "depth", "CHUNK": "ranks", "RING": "stages",
        "SPECIALISED_THREADS": "threads"}),
    "lora_linear_dx_small.cu": ("lora_linear/cuda_dx_small.cu", {
        "STEP": "depth", "COLUMNS": "columns", "THREADS": "threads", "RANKS": "ranks"}),
    "lora_linear_shrink.cu": ("lora_linear/cuda_thin.cu", {"TOKENS": "rows", "COLUMNS": "depth", "THREADS": "threads"}),
    "lora_linear_expand.cu": ("lora_linear/cuda_expand.cu", {
        "ROWS": "rows", "COLUMNS": "columns", "THREADS": "threads", "RANKS": "ranks"}),
    "lora_linear_sides.cu": ("lora_linear/cuda_sides.cu", {"STEP": "rows", "THREADS": "threads"}),
    "lora_linear_outer.cu": ("lora_linear/cuda_outer.cu", {"STEP": "rows", "THREADS": "threads"}),
    "lora_linear_sums.cu": ("lora_linear/cuda_sums.cu", {"THREADS": "columns threads"}),
    "weight_norm.cu": ("weight_norm/cuda.cu", {"ROWS": "rows", "COLUMNS": "depth", "STAGES": "stages", "THREADS": "threads"}),
    "merge.cu": ("merge/cuda.cu", {"ROWS": "rows", "COLUMNS": "columns", "STAGES": "stages", "THREADS": "threads"}),
    "weight_norm_any.cu": ("weight_norm/cuda_any.cu", {
        "ROWS": "rows", "COLUMNS": "depth", "RANKS": "ranks", "THREADS": "threads"}),
    "merge_any.cu": ("merge/cuda_any.cu", {"ROWS": "rows", "COLUMNS": "columns", "RANKS": "ranks", "THREADS": "threads"}),
    "multi_lora_small.cu": ("multi_lora/cuda.cu", {"ROWS": "rows", "THREADS": "threads", "RANKS": "ranks"}),
    "multi_lora_shrink.cu": ("multi_lora/cuda_any.cu", {
        "ENTRIES": "rows", "STEP": "depth", "RANK": "ranks", "THREADS": "threads"}),
    "multi_lora_expand.cu": ("multi_lora/cuda_any.cu", {"TOKENS": "rows", "COLUMNS": "columns", "THREADS": "threads"}),
}  # fmt: skip


def constants(source):
    """Of a source and what it includes: the numbers that are the same for all instances."""
    found: dict[str, int] = {}
    texts = list(Cuda(CSRC / source, "", 0, options=(f"-I{CSRC}",)).sources())
    for text in reversed(texts):
        for line in re.findall(r"^constexpr int ([^;]+);", text, re.MULTILINE):
            for name, value in re.findall(r"(\w+) = ([\w* ]+)", line):
                found[name] = eval(value, {}, found)
    return found


@pytest.mark.parametrize("name", SOURCES)
def test_the_cuda_sources_have_the_same_compiled_in(name):
    source, fields = SOURCES[name]
    there = constants(source)
    for given in [{k: v for k, v in each.items() if k != "arch"} for each in answers(read()[name])]:
        for constant, numbers in fields.items():
            for number in numbers.split():
                assert getattr(compiled(name, **given), number) == there[constant], (given, constant, number)


def instances(source, macro):
    """The names and arguments of a macro's uses."""
    text = (CSRC / source).read_text()
    return [(name, args.split(", ")) for name, args in re.findall(rf"^{macro}\((\w+), (.*)\)$", text, re.MULTILINE)]


def test_the_instances_of_cuda_templates_are_the_rows():
    """Tokens, ranks and stages, of which the sources have several."""
    for source, macro, row in (
        ("lora_linear/cuda_small.cu", "LK_SMALL", "lora_linear_small.cu"),
        ("lora_linear/cuda_codes.cu", "LK_CODES", "lora_linear_codes.cu"),
        ("multi_lora/cuda.cu", "LK_SMALL", "multi_lora_small.cu"),
        ("lora_linear/cuda_dx_small.cu", "LK_DX_SMALL", "lora_linear_dx_small.cu"),
    ):
        found = instances(source, macro)
        assert len(found) >= 2
        for name, args in found:
            if row == "multi_lora_small.cu":
                args = args[:-1]  # stages of the product with B, whose tiles are of another size
            tokens, stages = map(int, args[-2:])
            given = {"int8": "i8" in name} if row in ("lora_linear_small.cu", "lora_linear_codes.cu") else {}
            t = compiled(row, m=tokens, **given)
            assert (t.rows if "dx" in row else t.columns, t.stages) == (tokens, stages), name
    ranks = {name: int(args[1]) for source, macro in (
        ("lora_linear/cuda_thin.cu", "LK_SHRINK"), ("lora_linear/cuda_sides.cu", "LK_SIDES"),
        ("lora_linear/cuda_outer.cu", "LK_OUTER"), ("weight_norm/cuda.cu", "LK_WEIGHT_NORM"), ("merge/cuda.cu", "LK_MERGE"),
    ) for name, args in instances(source, macro)}  # fmt: skip
    for pieces, (kind, dtype) in itertools.product((True, False), {"bf16": BF16, "f16": torch.float16}.items()):
        for r in (1, 16, 17, 512):
            t = compiled("lora_linear_shrink.cu", r=r, split=not pieces, pieces=pieces)
            assert ranks[f"lora_linear_shrink_{f'{kind}_{t.ranks}' if pieces else f'any_{kind}'}"] == t.ranks
            t = compiled("lora_linear_sides.cu", r=r, times=not pieces, pieces=pieces)
            assert ranks[f"lora_linear_sides_{f'{kind}_{t.ranks}' if pieces else f'any_{kind}'}"] == t.ranks
            t = compiled("lora_linear_outer.cu", dtype=dtype, r=r, pieces=pieces)
            assert ranks[f"lora_linear_outer_{f'{kind}_{t.ranks}' if pieces else f'any_{kind}'}"] == t.ranks
    for name, args in instances("lora_linear/cuda_sides.cu", "LK_SIDES"):
        given = {"r": int(args[1]), "times": args[3] == "true", "pieces": args[4] == "false"}
        assert compiled("lora_linear_sides.cu", **given).columns == 64 * int(args[2]), name
    for op in ("weight_norm", "merge"):
        most = max(rank for name, rank in ranks.items() if name.startswith(f"{op}_"))
        assert compiled(f"{op}.cu").ranks == most


def changed(kernel, row):
    return {**read(), kernel: Kernel(read()[kernel].asks, (row, *read()[kernel].rows))}


@needs_triton
def test_a_changed_row_changes_launch_and_cost(monkeypatch):
    """One line: the launch of that architecture and of no other, and the model's prediction."""
    w, a, b = torch.empty(256, 64, dtype=BF16), torch.empty(8, 64, dtype=BF16), torch.empty(256, 8, dtype=BF16)

    def launched(arch):
        from lora_kernels import use_backend

        with use_backend("triton", simulate=True), device(arch), recorded() as found:
            weight_norm(w, a, b, 1.0)
        return found[0].args["BK"], found[0].warps, found[0].grid

    assert launched(90) == launched(89) == (64, 4, (4,))
    kernels = changed("norm", Row({"arch": "90"}, {"rows": 32, "depth": 32, "warps": 8}))
    monkeypatch.setattr(tiles, "read", lambda: kernels)
    monkeypatch.setattr(tiles, "_found", {})
    assert launched(90) == (32, 8, (8,)) and launched(89) == (64, 4, (4,))
    p = Problem("forward", 8192, 4096, (4096,), (16,), BF16)
    before = cost.candidate_launches(p, 90)["two launches"][1].tile_count
    kernels = changed("forward", Row({"arch": "90"}, {"rows": 64}))
    monkeypatch.setattr(tiles, "_found", {})
    assert (
        cost.candidate_launches(p, 90)["two launches"][1].tile_count
        == 2 * before
        == 2 * cost.candidate_launches(p, 89)["two launches"][1].tile_count
    )


def test_a_trial_holds_for_just_those_answers():
    x = torch.empty(1)
    with seen() as asked:
        usual = tile("forward", x, dtype=BF16, m=100, **FORWARD)
    other = Tile(rows=64, columns=128, depth=64, ranks=16, warps=4, stages=4)
    assert asked[0].tile == usual != other and dict(asked[0].answers)["m"] == 128
    with tried(TileRequest("forward", asked[0].answers, other)):
        assert tile("forward", x, dtype=BF16, m=128, **FORWARD) == tile("forward", x, dtype=BF16, m=65, **FORWARD) == other
        assert tile("forward", x, dtype=BF16, m=64, **FORWARD) != other
        assert tile("forward", x, dtype=BF16, m=100, **FORWARD | {"k": 8192}) == usual
    assert tile("forward", x, dtype=BF16, m=100, **FORWARD) == usual


def test_known_tiles():
    """Figures written down by hand, so that a slip in the table's order shows."""
    for arch, dtype, m, wanted in (
        (90, BF16, 8192, (128, 128, 64, 8, 3)), (100, BF16, 8192, (128, 128, 64, 8, 2)), (90, BF16, 64, (64, 64, 64, 4, 3)),
        (100, BF16, 64, (64, 64, 64, 4, 2)), (80, F32, 32, (32, 64, 16, 4, 3)), (80, F32, 33, (64, 64, 16, 8, 3)),
    ):  # fmt: skip
        t = tile("forward", arch, dtype=dtype, m=m, **FORWARD)
        assert (t.rows, t.columns, t.depth, t.warps, t.stages) == wanted, (arch, dtype, m)
    for arch, dtype, gains, wanted in (
        (80, BF16, False, (128, 128, 32, 8, 4, False)), (90, BF16, False, (128, 128, 64, 8, 3, True)),
        (90, BF16, True, (128, 128, 64, 8, 3, False)), (120, torch.float16, True, (32, 64, 32, 4, 2, False)),
        (90, torch.float16, True, (64, 64, 32, 8, 2, False)), (80, F32, False, (64, 64, 16, 8, 2, False)),
    ):  # fmt: skip
        t = tile("input_gradient", arch, dtype=dtype, m=8192, **DX | {"gains": gains})
        found = (t.rows, t.columns, t.depth, t.warps, t.stages, t.maps)
        assert found == wanted or (dtype is F32 and found[:5] == wanted[:5]), (arch, dtype, gains)


def test_what_was_measured_is_nothing_in_the_deterministic_mode(monkeypatch):
    x, other = torch.empty(1), Tile(rows=64, columns=64, depth=32, ranks=16, warps=4, stages=4)
    monkeypatch.setattr(tiles.launch, "gpu_name", lambda t: "Planted")
    monkeypatch.setattr(tiles, "_found", {})
    counted = {"dtype": "bfloat16", "m": 128, **FORWARD}
    monkeypatch.setattr(tiles, "local", lambda gpu: (tiles.MeasuredTile("forward", counted, other, {}),))
    with deterministic(False):
        assert tile("forward", x, dtype=BF16, m=100, **FORWARD) == other
        assert tile("forward", x, dtype=BF16, m=64, **FORWARD) != other
    with deterministic(True):
        assert tile("forward", x, dtype=BF16, m=100, **FORWARD) != other
