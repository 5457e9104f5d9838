"""The dropout mask: its generator, its rate, its seed, and that every backend draws the same
bits."""

from dataclasses import replace

import pytest
import torch

from lora_kernels import lora_linear, use_backend
from lora_kernels.ops.dropout import _philox_words, mask, threshold
from lora_kernels.testing import make_problem, run

# Random123, tests/kat_vectors: philox4x32 10
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text):
    return [int(w, 16) for w in text.split()]


@pytest.mark.parametrize("counter, key, result", KNOWN)
def test_philox_known_answers(counter, key, result):
    low, high = words(key)
    seed = torch.tensor((high << 32 | low) - (1 << 64 if high >> 31 else 0))
    found = _philox_words(seed, tuple(torch.tensor(w) for w in words(counter)))
    assert [int(w) for w in found] == words(result)


def test_the_mask_is_philox_of_seed_row_and_column():
    seed, p = torch.tensor(-(2**62) + 12345), 0.37
    found = mask(seed, p, 3, 11, torch.float32, torch.device("cpu"))
    for row in range(3):
        for column in range(11):
            word = int(_philox_words(seed, tuple(torch.tensor(c) for c in (column // 4, row, 0, 0)))[column % 4])
            assert found[row, column] == (torch.tensor(1 / (1 - p)) if word >= threshold(p) else 0)


def rows_of_mask(p, seed, tokens, n_in, dtype=torch.float32):
    """The mask as the op applies it: A picks single columns of x, and the base is zero."""
    x = torch.ones(tokens, n_in, dtype=dtype)
    eye = torch.eye(n_in, dtype=dtype)
    return lora_linear(x, torch.zeros(n_in, n_in, dtype=dtype), eye, eye, 1.0, dropout=p, seed=seed)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**62 + 7, -(2**63), 2**32, 2**31 - 1])
@pytest.mark.parametrize("tokens, n_in", [(1, 5), (3, 37), (70, 66)])
def test_every_backend_draws_the_bits_of_the_mask(backend, seed, tokens, n_in):
    seed = torch.tensor(seed)
    for p in (0.1, 0.5, 0.999):
        for dtype in (torch.float32, torch.bfloat16):
            wanted = mask(seed, p, tokens, n_in, torch.float32, torch.device("cpu"))
            y = rows_of_mask(p, seed, tokens, n_in, dtype)
            assert y.ne(0).equal(wanted.ne(0))
            torch.testing.assert_close(y, wanted.to(dtype), rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("tokens", [3, 70])
def test_the_gradients_use_the_same_mask(backend, tokens):
    n = 40
    seed, eye = torch.tensor(99), torch.eye(n)
    keep = mask(seed, 0.4, tokens, n, torch.float32, torch.device("cpu"))
    x, a = torch.ones(tokens, n, requires_grad=True), eye.clone().requires_grad_()
    lora_linear(x, torch.zeros(n, n), a, eye, 1.0, dropout=0.4, seed=seed).sum().backward()
    torch.testing.assert_close(x.grad, keep, rtol=1e-6, atol=0)
    torch.testing.assert_close(a.grad, keep.sum(0).expand(n, n), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tokens", [3, 70])
def test_peft_semantics_drop_the_rescaled_base(backend, tokens):
    # a = 0 and gain = 3 leave y = x Wᵀ + 2 drop(x) Wᵀ
    n, seed, eye = 40, torch.tensor(7), torch.eye(40)
    keep = mask(seed, 0.4, tokens, n, torch.float32, torch.device("cpu"))
    call = (torch.ones(tokens, n), eye, torch.zeros(2, n), torch.zeros(n, 2), 1.0, None, torch.full((n,), 3.0), 0.4)
    torch.testing.assert_close(lora_linear(*call, "peft", seed), 1 + 2 * keep)
    torch.testing.assert_close(lora_linear(*call, "lora_only", seed), torch.full((tokens, n), 3.0))


@pytest.mark.parametrize("p", [0.0, 0.05, 0.3, 0.5, 0.9])
def test_rate(p):
    n = 1 << 18
    kept = mask(torch.tensor(20240517), p, 512, 512, torch.float32, torch.device("cpu")).ne(0)
    deviation = (p * (1 - p)) ** 0.5
    assert abs(kept.float().mean().item() - (1 - p)) <= 5 * deviation / n**0.5
    # neither rows nor columns are favoured
    for rows in (kept.float().mean(0), kept.float().mean(1)):
        assert (rows - (1 - p)).abs().max() <= 6 * deviation / 512**0.5
    assert abs(kept.float().mean(1).mean().item() - (1 - threshold(p) / 2**32)) <= 5 * deviation / n**0.5


def test_neighbours_are_independent():
    kept = mask(torch.tensor(3), 0.5, 512, 512, torch.float64, torch.device("cpu")) - 1
    for one, two in ((kept[1:], kept[:-1]), (kept[:, 1:], kept[:, :-1]), (kept[:, 4:], kept[:, :-4])):
        assert (one * two).mean().abs() < 5 / 512
    other = mask(torch.tensor(4), 0.5, 512, 512, torch.float64, torch.device("cpu")) - 1
    assert (kept * other).mean().abs() < 5 / 512


def test_no_dropout_is_exact(backend):
    p = make_problem(5, gain=True)
    plain = lora_linear(*p.arguments())
    state = torch.get_rng_state()
    assert lora_linear(*replace(p, dropout_semantics="lora_only").arguments()).equal(plain)
    assert torch.get_rng_state().equal(state)  # no dropout draws no seed


def test_a_tiny_p_keeps_everything(backend):
    for tokens in (3, 70):
        p = make_problem(tokens, dropout=1e-12)
        torch.testing.assert_close(lora_linear(*p.arguments()), lora_linear(*replace(p, dropout=0.0).arguments()))


def test_manual_seed_governs_the_mask(backend):
    p = replace(make_problem(6, gain=True, dropout=0.4), seed=None)
    torch.manual_seed(1)
    one, two = run(p), run(p)
    torch.manual_seed(1)
    again = run(p)
    assert not one["y"].equal(two["y"])
    assert all(one[name].equal(again[name]) for name in one)


def test_a_seed_may_have_one_dimension_and_is_not_changed(backend):
    p = make_problem(6, dropout=0.4)
    seed = p.seed.reshape(1)
    assert lora_linear(*replace(p, seed=seed).arguments()).equal(lora_linear(*p.arguments()))
    assert seed.item() == p.seed.item()


@pytest.mark.parametrize("tokens", [3, 5, 33, 70, 130])
def test_a_row_keeps_its_mask_in_a_longer_batch(backend, tokens):
    seed = torch.tensor(11)
    longer = rows_of_mask(0.3, seed, 140, 35).ne(0)
    assert rows_of_mask(0.3, seed, tokens, 35).ne(0).equal(longer[:tokens])


def test_backends_agree_on_a_drawn_seed():
    results = []
    for name in ("reference", "cpu"):
        with use_backend(name):
            torch.manual_seed(2)
            results.append(run(replace(make_problem(70, 50, 40, 4, dropout=0.5, gain=True), seed=None)))
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=1e-4, atol=1e-4)
