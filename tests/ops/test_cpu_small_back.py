"""The CPU's kernel of a layer's gradients for few tokens, called directly."""

import pytest
import torch

_cpu = pytest.importorskip("lora_kernels._cpu", reason="the CPU kernels are not built here")

from lora_kernels.ops.cpu_quantised import Packed  # noqa: E402
from lora_kernels.ops.cpu_tensors import dropout_args  # noqa: E402
from lora_kernels.ops.dropout import mask  # noqa: E402
from lora_kernels.testing import rms  # noqa: E402
from tests.ops.cpu import at_level, operands  # noqa: E402
from tests.ops.quantised import make_quantised  # noqa: E402

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SCALE = 1.5


def drawn(*shape, dtype=F32, across=False):
    """Random numbers; `across`: with their columns as the rows of memory."""
    made = torch.randn(shape[::-1] if across else shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)
    return made.T if across else made


def gradients(dy, x, w, a, b, h, gain=None, dropout=None, wants="xab", across=False, threads=2):
    """dx, dA and dB into memory of NaN."""

    def empty(like, wanted):
        poison = torch.full(like.shape[::-1] if across and like is not x else like.shape, torch.nan, dtype=like.dtype)
        return (poison.T if across and like is not x else poison) if wanted in wants else None

    dx, da, db = empty(x, "x"), empty(a, "a"), empty(b, "b")
    assert _cpu.backward_small(dy, x, w, a, b, gain, h, dx, da, db, SCALE, dropout, threads)
    return dx, da, db


def check(found, dy, x, w, a, b, h, gain=None, keep=1.0):
    """Rounded once: as near float64 as that, but for float32 sums of 8 numbers each."""
    sums = 2.0**-24 * (8 + w.shape[0] / 8) ** 0.5
    dz = dy.double() * (1.0 if gain is None else gain.double())
    p = SCALE * dz @ b.double()
    truths = dz @ w.double() + keep * (p @ a.double()), p.T @ (keep * x.double()), dz.T @ h.double()
    for each, truth in zip(found, truths, strict=True):
        if each is not None:
            ideal = rms(truth.to(each.dtype).double() - truth)
            assert rms(each.double() - truth) <= 1.02 * ideal + sums * rms(truth)


@pytest.mark.parametrize("level", _cpu.levels())
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize(("tokens", "n_in", "n_out", "rank", "small", "gained", "across"), [
    (1, 576, 576, 64, F32, False, False), (5, 100, 77, 5, None, True, False), (12, 1500, 300, 17, None, False, True),
    (3, 64, 3000, 1, F32, True, True), (2, 1, 1, 3, None, False, False), (33, 200, 129, 40, None, True, False),
])  # fmt: skip
def test_against_float64(level, dtype, tokens, n_in, n_out, rank, small, gained, across):
    x, w = operands(tokens, n_in, n_out, dtype)
    dy, h = drawn(tokens, n_out, dtype=dtype), drawn(tokens, rank)
    a, b = drawn(rank, n_in, dtype=small or dtype, across=across), drawn(n_out, rank, dtype=small or dtype, across=across)
    gain = drawn(n_out, dtype=dtype) if gained else None
    with at_level(level):
        found = gradients(dy, x, w, a, b, h, gain, across=across)
        check(found, dy, x, w, a, b, h, gain)
        for threads in (1, 3):
            again = gradients(dy, x, w, a, b, h, gain, across=across, threads=threads)
            assert all(map(torch.equal, found, again)), "the bits follow the number of threads"


def test_only_what_is_wanted():
    x, w = operands(4, 129, 65, F32)
    given = drawn(4, 65), x, w, drawn(8, 129), drawn(65, 8), drawn(4, 8)
    whole = gradients(*given)
    for wants in ("x", "a", "b", "ab", "xb"):
        for name, one, of_all in zip("xab", gradients(*given, wants=wants), whole, strict=True):
            assert (one is None) == (name not in wants) and (one is None or torch.equal(one, of_all))


def test_dropout_is_on_the_adapters_input_alone():
    x, w = operands(6, 200, 65, F32)
    given, seed = (drawn(6, 65), x, w, drawn(8, 200), drawn(65, 8), drawn(6, 8)), torch.tensor(7)
    keep = mask(seed, 0.3, 6, 200, torch.float64, torch.device("cpu"))
    assert 0 < (keep == 0).sum() < keep.numel()
    check(gradients(*given, dropout=dropout_args(0.3, seed)), *given, keep=keep)


@pytest.mark.parametrize("kind", ["nested", "int8", "float8"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_codes_are_their_numbers(kind, dtype):
    q = make_quantised(kind, 70, 192, 64, dtype)
    w = q.dequantise()
    codes, parts, layout = q.fields()
    x, dy = drawn(5, 192, dtype=dtype), drawn(5, 70, dtype=dtype)
    given = drawn(8, 192, dtype=dtype), drawn(70, 8, dtype=dtype), drawn(5, 8)
    of_codes = gradients(dy, x, Packed.of(codes, parts, layout), *given)
    assert all(map(torch.equal, of_codes, gradients(dy, x, w, *given)))


def test_what_it_does_not_take():
    x, w = operands(4, 24, 40, F32)
    given = {
        "dy": drawn(4, 40), "x": x, "w": w, "a": drawn(8, 24), "b": drawn(40, 8), "gain": drawn(40), "h": drawn(4, 8),
        "dx": torch.empty(4, 24), "da": torch.empty(8, 24), "db": torch.empty(40, 8),
    }  # fmt: skip
    for name in ("dy", "x", "w", "dx"):
        turned = given | {name: given[name].T.contiguous().T}
        assert not _cpu.backward_small(*turned.values(), SCALE, None, 1)
    for name in given:
        wrong = given | {name: torch.zeros([n + 1 for n in given[name].shape])}
        with pytest.raises(ValueError, match=r"backward_small: \w+ must be \["):
            _cpu.backward_small(*wrong.values(), SCALE, None, 1)
    for name in ("dy", "x"):
        with pytest.raises(TypeError, match="x and"):
            _cpu.backward_small(*(given | {name: given[name].half()}).values(), SCALE, None, 1)
