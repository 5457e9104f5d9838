"""Every message of the checks in op.py: the op, the tensor, what was wanted and what was found."""

import pytest
import torch

from lora_kernels import lora_linear, weight_norm
from lora_kernels.ops import row_norm_squared


def ones(*shape, dtype=torch.float32, device="cpu"):
    return torch.ones(shape, dtype=dtype, device=device)


def arguments(**changed):
    return dict(x=ones(4, 6), w=ones(5, 6), a=ones(2, 6), b=ones(5, 2)) | changed


LORA_LINEAR = [
    (
        ValueError,
        {"w": ones(5, 6, 1)},
        r"x must have at least one dimension, w and a two, found x \[4, 6\], w \[5, 6, 1\], a",
    ),
    (ValueError, {"a": ones(6)}, r"x must have at least one dimension, w and a two, .* a \[6\]"),
    (ValueError, {"x": torch.tensor(1.0)}, r"x must have at least one dimension, w and a two, found x \[\]"),
    (ValueError, {"a": ones(0, 6), "b": ones(5, 0)}, r"a must have at least one row \(the rank\), found \[0, 6\]"),
    (ValueError, {"x": ones(4, 5)}, r"x must have 6 features \(w is \[5, 6\]\), found \[4, 5\]"),
    (ValueError, {"a": ones(2, 5)}, r"a must have shape \[2, 6\], found \[2, 5\]"),
    (ValueError, {"b": ones(2, 5)}, r"b must have shape \[5, 2\], found \[2, 5\]"),
    (ValueError, {"b": ones(5, 3)}, r"b must have shape \[5, 2\], found \[5, 3\]"),
    (
        TypeError,
        {"x": ones(4, 6, dtype=torch.int32)},
        "x must be float32, bfloat16, float16 or float64, found torch.int32",
    ),
    (TypeError, {"x": ones(4, 6, dtype=torch.complex64)}, "x must be float32, .* found torch.complex64"),
    (TypeError, {"x": ones(4, 6, dtype=torch.bool)}, "x must be float32, .* found torch.bool"),
    (TypeError, {"x": ones(4, 6).to(torch.float8_e4m3fn)}, "x must be float32, .* found torch.float8_e4m3fn"),
    (
        TypeError,
        {"w": ones(5, 6, dtype=torch.float16)},
        "w must have the dtype of x, torch.float32, found torch.float16",
    ),
    (
        TypeError,
        {"a": ones(2, 6, dtype=torch.float16)},
        "a and b must share one floating dtype, .*float16 and torch.float32",
    ),
    (
        TypeError,
        {"a": ones(2, 6).long(), "b": ones(5, 2).long()},
        "a and b must share .* found torch.int64 and torch.int64",
    ),
    (ValueError, {"w": ones(5, 6).requires_grad_()}, r"w is frozen and gets no gradient, .*requires_grad_\(False\)"),
    (ValueError, {"b": ones(5, 2, device="meta")}, r"all tensors must be on cpu \(x\), found w cpu, a cpu, b meta"),
    (ValueError, {"w": ones(5, 6, device="meta")}, r"all tensors must be on cpu \(x\), found w meta, a cpu, b cpu"),
    (ValueError, {"bias": ones(4)}, r"bias must have shape \[5\], found \[4\]"),
    (ValueError, {"gain": ones(1)}, r"gain must have shape \[5\], found \[1\]"),
    (ValueError, {"gain": ones(5, 1)}, r"gain must have shape \[5\], found \[5, 1\]"),
    (TypeError, {"bias": ones(5).int()}, "bias must be floating, found torch.int32"),
    (TypeError, {"gain": ones(5).bool()}, "gain must be floating, found torch.bool"),
    (ValueError, {"gain": ones(5, device="meta")}, r"gain must be on cpu \(x\), found meta"),
    (ValueError, {"dropout": 1.0}, r"dropout must be in \[0, 1\), found 1.0"),
    (ValueError, {"dropout": -0.1}, r"dropout must be in \[0, 1\), found -0.1"),
    (ValueError, {"dropout": float("nan")}, r"dropout must be in \[0, 1\), found nan"),
    (ValueError, {"dropout_semantics": "tune"}, r"dropout_semantics must be .*peft.*lora_only.*, found 'tune'"),
    (ValueError, {"scale": float("inf")}, "scale must be finite, found inf"),
    (ValueError, {"scale": float("nan")}, "scale must be finite, found nan"),
    (ValueError, {"scale": ones(2)}, r"scale must be a number or hold one, found \[2\]"),
    (ValueError, {"dropout": 0.1, "seed": torch.tensor(1.0)}, r"seed must be one int64, found torch.float32 \[\]"),
    (ValueError, {"dropout": 0.1, "seed": torch.zeros(2).long()}, r"seed must be one int64, found torch.int64 \[2\]"),
]


@pytest.mark.parametrize(
    "error, changed, message", LORA_LINEAR, ids=lambda v: None if isinstance(v, type) else str(v)[:50]
)
def test_lora_linear(error, changed, message):
    with pytest.raises(error, match="^lora_linear: " + message):
        lora_linear(**arguments(**changed))


WEIGHT_NORM = [
    (ValueError, {"w": ones(5)}, r"w and a must have two dimensions, found w \[5\], a \[2, 6\]"),
    (ValueError, {"a": ones(2, 6, 1)}, r"w and a must have two dimensions, found w \[5, 6\], a \[2, 6, 1\]"),
    (ValueError, {"a": ones(2, 5)}, r"a must have shape \[2, 6\], found \[2, 5\]"),
    (ValueError, {"b": ones(5, 3)}, r"b must have shape \[5, 2\], found \[5, 3\]"),
    (ValueError, {"w_squared": ones(6)}, r"w_squared must have shape \[5\], found \[6\]"),
    (ValueError, {"a": ones(2, 6, device="meta")}, r"a must be on cpu \(w\), found meta"),
    (TypeError, {"w": ones(5, 6).int()}, "w must be float32, bfloat16, float16 or float64, found torch.int32"),
    (
        TypeError,
        {"b": ones(5, 2).half()},
        "a and b must share one floating dtype, found torch.float32 and torch.float16",
    ),
    (ValueError, {"w": ones(5, 6).requires_grad_()}, r"w is frozen and gets no gradient, .*requires_grad_\(False\)"),
    (ValueError, {"scale": ones(2)}, r"scale must be a number or hold one, found \[2\]"),
]


@pytest.mark.parametrize(
    "error, changed, message", WEIGHT_NORM, ids=lambda v: None if isinstance(v, type) else str(v)[:50]
)
def test_weight_norm(error, changed, message):
    call = arguments(**changed)
    call.pop("x")
    with pytest.raises(error, match="^weight_norm: " + message):
        weight_norm(**call)


def test_row_norm_squared():
    with pytest.raises(ValueError, match=r"^row_norm_squared: w must be \[out, in\], found \[5\]"):
        row_norm_squared(ones(5))
    with pytest.raises(TypeError, match="^row_norm_squared: w must be floating, found torch.int64"):
        row_norm_squared(ones(5, 6).long())
