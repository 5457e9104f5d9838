"""Nested, sparse and mkldnn inputs: the values of the rows, and the kind that nn.Linear gives."""

import pytest
import torch
from torch.nn import functional as F

from lora_kernels import Member, dora_linear, lora_linear, lora_linear_group
from lora_kernels.testing import make_problem

pytestmark = pytest.mark.filterwarnings("ignore:.*(prototype|beta state)")

LAYOUTS = {
    "nested": lambda x: torch.nested.as_nested_tensor([x[:2], x[2:]]),
    "nested in four dimensions": lambda x: torch.nested.as_nested_tensor([x[:2, None], x[2:, None].expand(-1, 3, -1)]),
    "jagged": lambda x: torch.nested.as_nested_tensor([x[:2], x[2:]], layout=torch.jagged),
    "coo": torch.Tensor.to_sparse,
    "csr": torch.Tensor.to_sparse_csr,
    "mkldnn": torch.Tensor.to_mkldnn,
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def dense(y):
    """The rows of a result."""
    if y.is_nested:
        return torch.cat([part.flatten(0, -2) for part in y.unbind()])
    return y.to_dense()


def rows_of(layout, x):
    return dense(LAYOUTS[layout](x))


@each_layout
@pytest.mark.parametrize("flags", [{}, {"bias": True, "gain": True}, {"dropout": 0.4}], ids=str)
def test_values_and_kinds(backend, layout, flags):
    p = make_problem(7, 24, 20, 4, **flags)
    _, *others = p.arguments()
    y = lora_linear(LAYOUTS[layout](p.x), *others)
    like = F.linear(LAYOUTS["nested" if "nested" in layout else layout](p.x), p.w)
    assert (y.layout, y.is_nested, type(y)) == (like.layout, like.is_nested, type(like))
    torch.testing.assert_close(dense(y), lora_linear(rows_of(layout, p.x), *others))


def test_a_jagged_result_adds_to_its_input(backend):
    """It has the input's own offsets, else torch takes the lengths for others."""
    p = make_problem(7, 24, 24, 4)
    x = LAYOUTS["jagged"](p.x)
    torch.testing.assert_close((x + lora_linear(x, *p.arguments()[1:])).values(), p.x + lora_linear(*p.arguments()))


@pytest.mark.parametrize("layout", ["nested", "jagged", "coo"])
def test_gradients(backend, layout):
    p = make_problem(7, 24, 20, 4, bias=True)
    leaves = list(p.require_grad().values())
    wanted = torch.autograd.grad(lora_linear(*p.arguments()).square().sum(), leaves)
    found = torch.autograd.grad(dense(lora_linear(LAYOUTS[layout](p.x), *p.arguments()[1:])).square().sum(), leaves)
    for one, two in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.to_dense(), two)


@each_layout
def test_the_other_ops(backend, layout):
    p = make_problem(7, 24, 20, 4)
    x, rows, m = LAYOUTS[layout](p.x), rows_of(layout, p.x), torch.rand(20)
    members = [Member(p.w, p.a, p.b), Member(p.w[:5], p.a, p.b[:5])]
    for found, wanted in zip(lora_linear_group(x, members), lora_linear_group(rows, members), strict=True):
        torch.testing.assert_close(dense(found), wanted)
    torch.testing.assert_close(dense(dora_linear(x, p.w, p.a, p.b, m)[0]), dora_linear(rows, p.w, p.a, p.b, m)[0])


def test_under_autocast(backend):
    p = make_problem(7, 24, 20, 4)
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_linear(LAYOUTS["jagged"](p.x), *p.arguments()[1:])
        torch.testing.assert_close(y.values(), lora_linear(*p.arguments()))


def test_checks_name_the_rows():
    p = make_problem(7, 24, 20, 4)
    with pytest.raises(ValueError, match="x must have 24 features"):
        lora_linear(LAYOUTS["nested"](p.x[:, :9]), *p.arguments()[1:])
