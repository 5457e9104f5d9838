"""Other threads replace tensors while kernels read them: every result is that of what was there
when the call began, and no kernel reads memory that was freed."""

import sys
import threading
import time
from itertools import count, takewhile

import pytest
import torch

from lora_kernels import _cpu, lora_linear, multi_lora, weight_norm
from lora_kernels.ops.cpu_quantised import Packed
from lora_kernels.ops.multi_lora import BatchPlan
from tests.ops import multi
from tests.ops.quantised import make_quantised

SECONDS = 0.4  # of each race; before the storages were held 100 to 247 of 400 calls were wrong


@pytest.fixture
def quick_switches():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def replacing(tensors, call, other_values=torch.clone):
    """What `call` gives, again and again, while another thread gives each tensor new storage, of
    the same values if no others are wanted, and fills what was freed with NaN."""
    done = threading.Event()

    def replace():
        while not done.is_set():
            for t in tensors:
                t.data = other_values(t.data)
            torch.full((1 << 20,), float("nan"))

    other = threading.Thread(target=replace)
    other.start()
    try:
        end = time.monotonic() + SECONDS
        return [call() for _ in takewhile(lambda _: time.monotonic() < end, count())]
    finally:
        done.set()
        other.join()


def wrong(results, expected):
    return sum(not torch.equal(each, expected) for each in results)


def factors(n_out, n_in, rank, dtype):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=g).to(dtype) for shape in ((n_out, n_in), (rank, n_in), (n_out, rank))]


@pytest.mark.parametrize(("tokens", "size", "dtype"), [
    (1, 64, torch.float32), (1, 1024, torch.float32), (8, 1024, torch.float32), (40, 1024, torch.float32),
    (40, 1024, torch.bfloat16), (300, 512, torch.float32), (300, 512, torch.bfloat16),
])  # fmt: skip
def test_weights_are_replaced_while_a_layer_runs(quick_switches, tokens, size, dtype):
    w, a, b = factors(size, size, 64, dtype)
    x = torch.randn(tokens, size, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = lora_linear(x, w, a, b, 0.5)
    assert expected.isfinite().all()
    assert wrong(replacing([w, a, b], lambda: lora_linear(x, w, a, b, 0.5)), expected) == 0


def test_weights_are_replaced_while_a_norm_is_taken(quick_switches):
    w, a, b = factors(1024, 1024, 16, torch.float32)
    expected = weight_norm(w, a, b, 0.5)
    assert wrong(replacing([w, a, b], lambda: weight_norm(w, a, b, 0.5)), expected) == 0


def test_pages_are_replaced_while_a_batch_runs(quick_switches):
    slots = multi.make_slots(512, [512], [16, 8], torch.float32)
    s, w, x = slots[0], torch.randn(512, 512), torch.randn(40, 512)
    plan = BatchPlan.build(multi.ids_of(torch.arange(40) % 3 - 1, slots), len(s.rank))
    tables = [s.a, s.b, s.table, s.rank, s.scale, s.flags, s.gain, s.bias, s.generation, plan.order]
    expected = multi_lora(x, w, slots, plan)
    assert wrong(replacing([w, *tables], lambda: multi_lora(x, w, slots, plan)), expected) == 0


@pytest.mark.parametrize("name", ["w", "a", "b", "y", "z", "bias", "gain", "h"])
def test_a_tensor_of_another_shape_is_refused(name):
    """As one that another thread put there after the op's own look."""
    shapes = {
        "x": (4, 24), "w": (40, 24), "a": (8, 24), "b": (40, 8), "y": (4, 40), "z": (4, 40), "bias": (40,), "gain": (40,),
        "h": (4, 8),
    }  # fmt: skip
    given = {key: torch.zeros(shape) for key, shape in shapes.items()}
    _cpu.forward_small(*given.values(), 1.0, None, 1)
    given[name] = torch.zeros([n + 1 for n in given[name].shape])
    with pytest.raises(ValueError, match=r"forward_small: \w+ must be \["):
        _cpu.forward_small(*given.values(), 1.0, None, 1)


def parts_of(w):
    return [t for t in (w.codes, w.table, w.scales, w.outer_table, w.outer, w.offset) if t is not None]


@pytest.mark.parametrize(("kind", "tokens", "dtype"), [
    ("nested", 1, torch.bfloat16), ("float8", 40, torch.float32), ("nested", 300, torch.bfloat16),
    ("int8", 1500, torch.float32),
])  # fmt: skip
def test_codes_are_replaced_while_a_layer_runs(quick_switches, kind, tokens, dtype):
    w = make_quantised(kind, 512, 512, 64, dtype)
    _, a, b = factors(512, 512, 16, dtype)
    x = torch.randn(tokens, 512, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = lora_linear(x, w, a, b, 0.5)
    assert expected.isfinite().all()
    assert wrong(replacing(parts_of(w), lambda: lora_linear(x, w, a, b, 0.5)), expected) == 0


def test_codes_are_replaced_while_a_norm_is_taken(quick_switches):
    w, (_, a, b) = make_quantised("nested", 1024, 512, 64), factors(1024, 512, 16, torch.float32)
    expected = weight_norm(w, a, b, 0.5)
    assert wrong(replacing(parts_of(w), lambda: weight_norm(w, a, b, 0.5)), expected) == 0


def test_scales_are_replaced_between_two_looks_at_them():
    """Once their address is read, and before their storage is held."""
    w, changes = make_quantised("nibbles", 1024, 1024, 64), []

    class Codes(torch.Tensor):
        def untyped_storage(self):
            while changes:
                changes.pop()()
            with torch._C.DisableTorchFunctionSubclass():
                return super().untyped_storage()

    def change():
        old = w.scales.data
        w.scales.data = old * 2
        old.fill_(float("nan"))

    codes, parts, layout = w.fields()
    expected, found = 2 * w.dequantise(), torch.empty(1024, 1024)
    changes.append(change)
    _cpu.dequantise(Packed.of(codes.as_subclass(Codes), parts, layout), found, 1)
    assert not changes
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["dense", "nested"])
def test_a_product_in_pieces_is_of_one_state(quick_switches, kind):
    """Of W before or after another thread's change, not of both."""
    w, a, b = factors(512, 512, 16, torch.float32)
    w = make_quantised(kind, 512, 512, 64) if kind != "dense" else w
    part = w if kind == "dense" else w.outer
    x, states, expected = torch.randn(1500, 512), (part.clone(), part * 2), []
    for state in states:
        part.data = state
        expected.append(lora_linear(x, w, a, b, 0.5))
    turns = count()
    results = replacing([part], lambda: lora_linear(x, w, a, b, 0.5), lambda t: states[next(turns) % 2].clone())
    assert all(any(torch.equal(y, one) for one in expected) for y in results)
