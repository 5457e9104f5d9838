"""Experts over codes: y, every gradient and DoRA's norm against float64 of their numbers."""

import re
from dataclasses import replace

import pytest
import torch

from lora_kernels import (
    Member,
    QuantisedWeight,
    dora_linear,
    expert_lora_linear,
    expert_weight_norm,
    lora_linear,
    lora_linear_group,
    merged_weight,
    use_backend,
    weight_norm,
)
from lora_kernels.ops import cpu_quantised
from lora_kernels.ops.quantised import requantise
from lora_kernels.ops.quantised.formula import dequantised
from lora_kernels.testing import assert_expert_problem, run_experts
from tests.ops.cpu import at_level
from tests.ops.quantised import FORMATS, KINDS, make_experts, over_codes
from tests.ops.test_cpu_levels import levels
from tests.ops.test_expert_lora_linear_index import assert_as_gathered, indexed

ALL = (*KINDS, *FORMATS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=["reference", *levels()])
def backend(request):
    """The reference, and the kernels of every level."""
    if request.param == "reference":
        with use_backend("reference"):
            yield
    else:
        with at_level(request.param), use_backend("cpu"):
            yield


def make_problem(name, sizes, n_in, n_out, dtype=torch.float32, transposed=False, block=32, **flags):
    shape = (n_in, n_out) if transposed else (n_out, n_in)
    tiles = {"block_rows": 20} if name in FORMATS else {}
    return over_codes(
        make_experts(name, len(sizes), *shape, dtype, block=block, **tiles), sizes, n_in, n_out, transposed, **flags
    )


@pytest.mark.parametrize("name", ALL)
def test_numbers(backend, name):
    """Those of rows of all experts, but that tiles end with each."""
    w = make_experts(name, 4, 33, 70, block=32, **({"block_rows": 20} if name in FORMATS else {}))
    numbers = w.dequantise()
    assert numbers.shape == w.shape == (4, 33, 70) and numbers.equal(dequantised(w))
    assert w.dim() == 3 and w.numel() == 4 * 33 * 70
    if not name.endswith("tiles"):
        assert numbers.view(-1, 70).equal(replace(w, shape=(4 * 33, 70)).dequantise())
        return
    for e in range(4):
        of_e = replace(w, shape=(33, 70), codes=w.codes[e * 33 : (e + 1) * 33], scales=w.scales.view(4, -1)[e])
        assert numbers[e].equal(of_e.dequantise()), e
    assert QuantisedWeight.of_fields(*w.fields()).shape == w.shape


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
def test_against_float64(backend, name, transposed):
    """Few tokens, some and many; rows in steps of a register, and others, which begin within blocks
    and bytes."""
    for i, (n_in, n_out) in enumerate(((320, 96), (65, 38))):
        for dtype in DTYPES:
            flags = {"gain": dtype is not torch.float16, "bias": i == 0, "left": i, "peft": i == 0}
            assert_expert_problem(make_problem(name, [3, 0, 70, 14], n_in, n_out, dtype, transposed, rank=5, **flags))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes(backend, dtype):
    for i, sizes in enumerate(([7], [0, 3, 0, 1, 0, 0], [0, 0, 141, 0], [0, 0], [1, 0, 2, 5] * 6, [600, 2])):
        name = ("nested", "mxfp4", "e4m3 tiles")[i % 3]
        flags = ({"bias": True}, {"rank": 0}, {"gain": True})[i // 2 % 3]
        assert_expert_problem(make_problem(name, sizes, 128, 66, dtype, adapter_dtype=torch.float32, **flags))
        assert_expert_problem(make_problem(name, sizes, 128, 66, dtype, transposed=True, **flags))


def test_no_features(backend):
    codes, table = torch.empty(0, dtype=torch.uint8), torch.zeros(16)
    w = QuantisedWeight(codes, (2, 0, 8), torch.empty(0), 64, torch.float32, table)
    results = run_experts(over_codes(w, [2, 1], 8, 0, rank=2, bias=True))
    assert not any(t.count_nonzero() for t in results.values())


@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
def test_codes_of_experts_without_tokens_are_not_read(backend, transposed):
    for name in ("nibbles", "int8", "mxfp4", "e4m3 tiles"):
        p = make_problem(name, [3, 0, 20, 0], 64, 40, transposed=transposed, gain=True)
        wanted = run_experts(p)
        powers = p.w.scales.dtype is torch.float8_e8m0fnu
        p.w.scales.view(torch.uint8 if powers else torch.float32).view(4, -1)[1::2] = 255 if powers else torch.nan
        assert p.w.dequantise()[1::2].isnan().any()
        found = run_experts(p)
        assert all(found[each].equal(wanted[each]) for each in wanted), name


def test_no_whole_w_is_formed(monkeypatch):
    """On the CPU codes become numbers in the kernels alone."""

    class Forbidden:
        def __getattr__(self, name):
            assert name != "dequantise"
            return getattr(cpu_quantised_kernels, name)

    cpu_quantised_kernels = cpu_quantised._cpu
    p = make_problem("mxfp4", [3, 0, 70, 14], 320, 96, torch.bfloat16)
    wanted = run_experts(p)
    monkeypatch.setattr(cpu_quantised, "_cpu", Forbidden())
    with use_backend("cpu"):
        assert all(found.equal(wanted[name]) for name, found in run_experts(p).items())
    with pytest.raises(AssertionError):
        p.w.dequantise()


def test_bits_do_not_follow_the_threads(backend):
    before = torch.get_num_threads()
    try:
        for dtype in DTYPES:
            for transposed in (False, True):
                p = make_problem("nibbles", [3, 0, 40], 500, 420, dtype, transposed, gain=True)
                found = []
                for threads in (1, 2, 3):
                    torch.set_num_threads(threads)
                    found.append(run_experts(p))
                for other in found[1:]:
                    assert all(other[name].equal(found[0][name]) for name in other), (dtype, transposed)
    finally:
        torch.set_num_threads(before)


def shifted(w):
    """Every expert has its neighbour's scales."""
    return replace(w, scales=w.scales.view(w.shape[0], -1).roll(1, 0).reshape(-1))


def swapped(w):
    """The halves of each byte are exchanged."""
    return replace(w, codes=w.codes >> 4 | w.codes << 4)


def restarted(w):
    """The numbers where blocks begin anew at each expert, as they do not."""
    experts, scales = w.shape[0], w.scales
    per = -(-w.shape[1] * w.shape[2] // w.block)
    flat = torch.cat([scales, scales.new_ones(experts * per)])[: experts * per].view(experts, per)
    each = zip(w.codes.view(experts, -1), flat, strict=True)
    return torch.stack([replace(w, shape=w.shape[1:], codes=c, scales=s).dequantise() for c, s in each])


def turned(w):
    """Scales of tiles are those of the transpose."""
    scales = w.scales.view(w.shape[0], -(-w.shape[1] // w.block_rows), -1)
    return replace(w, scales=scales.mT.reshape(-1))


def run_on(w):
    """The numbers where tiles run on from one expert to the next."""
    experts, n_out, n_in = w.shape
    flat = replace(w, shape=(experts * n_out, n_in), scales=w.scales[: -(-experts * n_out // 20) * -(-n_in // 32)])
    return flat.dequantise().view(w.shape)


@pytest.mark.parametrize(
    "name, plant",
    [("nibbles", shifted), ("mxfp4", swapped), ("nibbles", restarted), ("e4m3 tiles", turned), ("e4m3 tiles", run_on)],
)
def test_a_wrong_weight_is_found(name, plant):
    sizes, shape = [3, 4, 70, 14], (31, 50) if plant is restarted else (50, 64)
    p = make_problem(name, sizes, shape[1], shape[0])
    assert_expert_problem(p)
    with pytest.raises(AssertionError):
        assert_expert_problem(replace(p, w=plant(p.w)))


@pytest.mark.parametrize("name", ALL)
def test_norms(backend, name):
    for i, (n_out, n_in) in enumerate(((66, 128), (38, 65))):
        for dtype in (torch.float32, torch.bfloat16):
            w = make_experts(name, 3 + i, n_out, n_in, dtype, block=32, **({"block_rows": 20} if name in FORMATS else {}))
            numbers = dequantised(w)
            for transposed in (False, True):
                rows, columns = (n_in, n_out) if transposed else (n_out, n_in)
                a = torch.randn(len(numbers), 5, columns, requires_grad=True)
                b = torch.randn(len(numbers), rows, 5, requires_grad=True)
                dn = torch.randn(len(numbers), rows)
                norm = expert_weight_norm(w, a, b, 0.3, transposed=transposed)
                dense = numbers.mT if transposed else numbers
                wanted = (dense.double() + 0.3 * b.double() @ a.double()).norm(dim=2)
                torch.testing.assert_close(norm.double(), wanted, rtol=2e-6, atol=0)
                squared = dense.float().square().sum(2)
                torch.testing.assert_close(expert_weight_norm(w, a, b, 0.3, squared, transposed), norm, rtol=2e-6, atol=0)
                found, theirs = (torch.autograd.grad(each, (a, b), dn.to(each.dtype)) for each in (norm, wanted))
                for one, other in zip(found, theirs, strict=True):
                    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_norms_of_some_rows_of_an_expert(backend):
    """Threads share the rows, so that their shares begin within experts."""
    w = make_experts("nibbles", 3, 420, 512, torch.bfloat16)
    a, b = torch.randn(3, 20, 512), torch.randn(3, 420, 20)
    wanted = (dequantised(w).double() + 0.1 * b.double() @ a.double()).norm(dim=2)
    torch.testing.assert_close(expert_weight_norm(w, a, b, 0.1).double(), wanted, rtol=2e-6, atol=0)


@pytest.mark.parametrize("backend", ["reference", levels()[-1]], indirect=True)
def test_schemas_and_compile(backend):
    p = make_problem("e4m3 tiles", [3, 0, 9], 64, 48, torch.bfloat16, gain=True, bias=True)
    codes, parts, layout = p.w.fields()
    assert layout[-1] == 48
    ops = torch.ops.lora_kernels
    given = p.x, codes, p.a, p.b, p.offsets, 0.5, p.bias, p.gain, False
    torch.library.opcheck(ops.expert_lora_linear_forward.default, (*given, True, False, None, parts, layout))
    y, h, _ = ops.expert_lora_linear_forward.default(*given, True, False, None, parts, layout)
    backward = (p.dy, *given, h, y, None, [1] * 5, None, parts, layout)
    torch.library.opcheck(ops.expert_lora_linear_backward.default, backward)
    norm = codes, p.a, p.b, 0.5, None, False, parts, layout
    torch.library.opcheck(ops.expert_weight_norm_forward.default, norm)
    n = ops.expert_weight_norm_forward.default(*norm)
    needs = [1, 1]
    torch.library.opcheck(
        ops.expert_weight_norm_backward.default, (torch.ones_like(n), n, codes, p.a, p.b, 0.5, False, needs, parts, layout)
    )
    compiled = torch.compile(lambda x: expert_lora_linear(x, p.offsets, p.w, p.a, p.b), fullgraph=True, backend="aot_eager")
    assert compiled(p.x).equal(expert_lora_linear(p.x, p.offsets, p.w, p.a, p.b))


@pytest.mark.parametrize("name", ["nested", "mxfp4", "e4m3 tiles"])
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
def test_x_through_an_index(backend, name, transposed):
    """Few tokens, some and many, and one expert alone: the numbers of a gathered x."""
    for dtype in DTYPES:
        for sizes in ([3, 0, 70, 14], [0, 0, 9], [40, 2]):
            p = make_problem(name, sizes, 128, 66, dtype, transposed, gain=dtype is not torch.float16, bias=True, left=2)
            assert_as_gathered(p)


def test_opcheck_with_an_index(backend):
    p = make_problem("mxfp4", [3, 0, 9], 64, 48, bias=True)
    (codes, parts, layout), (x, index) = p.w.fields(), indexed(p)
    ops, given = torch.ops.lora_kernels, (x, codes, p.a, p.b, p.offsets, 0.5, p.bias, None, False)
    torch.library.opcheck(ops.expert_lora_linear_forward.default, (*given, True, False, index, parts, layout))
    _, h, _ = ops.expert_lora_linear_forward.default(*given, True, False, index, parts, layout)
    backward = (p.dy, *given, h, None, None, [1, 1, 1, 1, 0], index, parts, layout)
    torch.library.opcheck(ops.expert_lora_linear_backward.default, backward)


def test_autocast_reads_the_codes_as_its_dtype(backend):
    p = make_problem("mxfp4", [3, 0, 9], 64, 48)
    with torch.autocast("cpu", torch.bfloat16):
        y = expert_lora_linear(p.x, p.offsets, p.w, p.a, p.b)
    half = p.x.bfloat16(), p.offsets, p.w.to(torch.bfloat16), p.a, p.b
    assert y.dtype is torch.bfloat16 and y.equal(expert_lora_linear(*half))


def test_layers_refuse_experts_in_words():
    w = make_experts("mxfp4", 2, 48, 64)
    x, a, b = torch.zeros(3, 64), torch.zeros(4, 64), torch.zeros(96, 4)
    for call in (
        lambda: lora_linear(x, w, a, b),
        lambda: lora_linear(x, w, a.requires_grad_(), b),
        lambda: lora_linear_group(x, [Member(w, a, b)]),
        lambda: dora_linear(x, w, a, b, torch.ones(96)),
        lambda: weight_norm(w, a, b),
        lambda: merged_weight(w, a, b),
    ):
        with pytest.raises(ValueError, match=re.escape("[2, 48, 64]")):
            call()
    p = make_problem("mxfp4", [1, 2], 64, 48)
    with pytest.raises(ValueError, match=re.escape("a quantised w must have experts, found [0, 48, 64]")):
        empty = replace(w, shape=(0, 48, 64), codes=w.codes[:0], scales=w.scales[:0])
        expert_lora_linear(p.x, p.offsets, empty, p.a, p.b)
    with pytest.raises(ValueError, match=re.escape("[out, in] or [experts, out, in], found [2]")):
        replace(w, shape=(2,))


def test_requantised_experts():
    for name in ("nibbles", "mxfp4", "e4m3 tiles", "int8 tiles"):
        like = make_experts(name, 3, 50, 64, block=32, **({"block_rows": 20} if name in FORMATS else {}))
        numbers = torch.randn(3, 50, 64)
        made = requantise.requantised(numbers, like)
        assert made.shape == like.shape
        for e in range(3):
            alone = replace(
                like, shape=(50, 64), codes=like.codes.reshape(3, -1)[e].reshape(-1, *like.codes.shape[1:]),
                scales=like.scales.view(3, -1)[e],
            )  # fmt: skip
            assert made.dequantise()[e].equal(requantise.requantised(numbers[e], alone).dequantise()), name
