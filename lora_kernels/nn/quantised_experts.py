"""The quantised weights of experts as other libraries keep them, [experts, out, in] or [experts,
in, out] as the module has them, codes not copied.

    bitsandbytes  a parameter that `bitsandbytes.nn.parametrize` made nf4 or fp4
    transformers  FP8Experts: float8 with a scale for a tile or an expert's matrix, MXFP4
    gpt-oss       the blocks and scales of its files, MXFP4 (`mxfp4_weight`)

No library is imported here: a module can be one of its classes only if somebody did.
"""

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.nn.quantised import floats, of_4bit_state, plain, table_of
from lora_kernels.ops.quantised import QuantisedWeight
from lora_kernels.ops.quantised.weight import E2M1, LOW_FIRST, POWERS

_BITSANDBYTES = "bitsandbytes.nn.parametrize"
_FP8 = "transformers.integrations.finegrained_fp8"


def is_fp8(cls: type[nn.Module]) -> bool:
    """Whether this is FP8Experts of transformers."""
    return cls is getattr(sys.modules.get(_FP8), "FP8Experts", None)


def only_codes_parametrised(module: nn.Module) -> bool:
    """Whether all parametrizations of the module are bitsandbytes' of 4-bit codes."""
    library: Any = sys.modules.get(_BITSANDBYTES)
    found: Any = module._modules.get("parametrizations")
    return (
        library is not None
        and found is not None
        and all(len(each) == 1 and type(each[0]) is library.Bnb4bitParametrization for each in found.values())
    )


def is_parametrised(module: nn.Module, name: str) -> bool:
    """Whether there is a parametrization of the parameter."""
    found: Any = module._modules.get("parametrizations")
    return found is not None and name in found


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module; of one with parametrizations, whose own is of it alone, that of
    before."""
    return type(module).__bases__[0] if "parametrizations" in module._modules else type(module)


def may_hold_codes(module: nn.Module) -> bool:
    """Whether a library that is known here may keep matrices of the module as codes."""
    return is_fp8(type(module)) or only_codes_parametrised(module)


def parameter_names(module: nn.Module, weights: Iterable[str]) -> list[str]:
    """The names of a module's parameters, with those of `weights` that are of codes: in their order
    there, and before all others, for a parametrization does not keep its place."""
    moved = [name for name in weights if is_parametrised(module, name)]
    if not moved:
        return list(module._parameters)
    first = [name for name in weights if name in moved or name in module._parameters]
    return [*first, *(name for name in module._parameters if name not in first)]


def keeps_numbers_for_a_call(hook: Any) -> bool:
    """Whether a hook only holds the numbers that bitsandbytes makes of codes until the end of a
    module's call."""
    names = ("_enable_parametrization_cache", "_disable_parametrization_cache")
    return getattr(hook, "__module__", "") == _BITSANDBYTES and getattr(hook, "__name__", "") in names


def quantised_experts(module: nn.Module, name: str, dtype: torch.dtype | None = None) -> QuantisedWeight | str | None:
    """The parameter of that name for inputs of a dtype, where that is not given of the dtype in
    which the library makes its numbers; in words why it cannot be read; None if it is not of
    codes."""
    try:
        if is_parametrised(module, name):
            return _of_bitsandbytes(module, name, dtype)
        return _of_fp8(module, name, dtype) if is_fp8(type(module)) else None
    except (TypeError, ValueError) as error:
        return str(error)


def experts_weight(module: nn.Module, name: str) -> Tensor | QuantisedWeight | str | None:
    """The parameter of that name, of codes what they stand for; in words why it cannot be read;
    None if there is none."""
    found = quantised_experts(module, name)
    return module._parameters.get(name) if found is None else found


def mxfp4_weight(blocks: Tensor, scales: Tensor, dtype: torch.dtype = torch.bfloat16) -> QuantisedWeight:
    """W [experts, out, in] of gpt-oss's files: blocks [experts, out, in / 32, 16], two numbers in a
    byte, and scales [experts, out, in / 32], the power of two plus 127, both uint8. transformers
    has the transpose as its parameter.

    Raises:
        TypeError, ValueError: a part has a dtype or a shape that does not fit.
    """
    if blocks.dtype is not torch.uint8 or scales.dtype not in (torch.uint8, POWERS):
        raise TypeError(f"mxfp4_weight: blocks and scales must be uint8, found {blocks.dtype} and {scales.dtype}")
    if blocks.dim() != 4 or blocks.shape[:3] != scales.shape or blocks.shape[3] != 16:
        wanted = "blocks must be [experts, out, in / 32, 16] and scales [experts, out, in / 32]"
        raise ValueError(f"mxfp4_weight: {wanted}, found {list(blocks.shape)} and {list(scales.shape)}")
    experts, n_out, groups, _ = blocks.shape
    codes, powers = plain(blocks).contiguous(), plain(scales).contiguous().view(POWERS)
    return _of_e2m1(codes, (experts, n_out, 32 * groups), powers, dtype)


def _of_e2m1(codes: Tensor, shape: Any, scales: Tensor, dtype: torch.dtype) -> QuantisedWeight:
    return QuantisedWeight(codes, torch.Size(shape), scales, 32, dtype, table_of(E2M1, codes), order=LOW_FIRST)


def _of_bitsandbytes(module: Any, name: str, dtype: torch.dtype | None) -> QuantisedWeight | str:
    if not only_codes_parametrised(module):
        return "another parametrization is on the module"
    held = module.parametrizations[name]
    state = held[0].quant_state
    if state is None or state.shape is None:
        return f"the codes of {name} have no quant_state"
    if getattr(state, "packing_format_for_cpu", False):
        return f"bitsandbytes has packed {name} for its own inference on this CPU"
    return of_4bit_state(held.original, state, state.dtype if dtype is None else dtype)


def _of_fp8(module: Any, name: str, dtype: torch.dtype | None) -> QuantisedWeight | str | None:
    weight, scales = module._parameters.get(name), module._parameters.get(f"{name}_scale_inv")
    if weight is None or scales is None:
        return None
    if module.activation_scheme != "dynamic":
        return "the float8 experts have fixed scales for their inputs, too"
    codes, scales = plain(weight), floats(scales)
    dtype = torch.bfloat16 if dtype is None else dtype
    experts, n_out, n_in = codes.shape
    if codes.dtype is torch.int8:  # two numbers of MXFP4
        return _of_e2m1(codes.view(torch.uint8), (experts, n_out, 2 * n_in), scales, dtype)
    rows, columns = module.block_size or (n_out, n_in)
    if scales.shape != (experts, -(-n_out // rows), -(-n_in // columns)):
        return f"the scales of {name} are {list(scales.shape)}, not those of tiles of {[rows, columns]}"
    return QuantisedWeight(codes, codes.shape, scales, columns, dtype, block_rows=rows)
