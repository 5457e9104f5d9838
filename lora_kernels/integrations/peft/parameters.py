"""PEFT's layer for one parameter of a module (`target_parameters`) with a forward on our kernels.

PEFT writes W + scaling · BA in the parameter's place for the time of each call, of experts for all
of them. Where the forward of the module is known (`nn.forms`), x goes through W, A and B instead.
Layers of several parameters of one module lie around each other; the outermost one's call runs all.
Hooks within that only move weights run around the kernels, as in `inside`.
"""

import sys
from typing import Any

import peft
import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from lora_kernels.integrations.peft.adapters import (
    ON_META,
    active_names,
    call_refusal,
    factors_refusal,
    frozen_refusal,
    layer_refusal,
)
from lora_kernels.integrations.peft.devices import device_refusal
from lora_kernels.integrations.peft.hooks import EVERY, FSDP1, HOOKED, has_hooks, moves_weights, plain_class
from lora_kernels.integrations.peft.inside import call_inside, lock_of
from lora_kernels.integrations.peft.linear import count_fallback
from lora_kernels.integrations.peft.state import ARGUMENTS, PLAIN, type_name
from lora_kernels.integrations.report import Survey
from lora_kernels.nn.expert_checks import most_of_index, routed_fault, sorted_fault
from lora_kernels.nn.experts import Adapted, multiplies, product_dtype, run_routed, run_sorted, run_split, run_with_identities
from lora_kernels.nn.forms import IDENTITIES, LINEAR, ROUTED, SPLIT, Form, form_of
from lora_kernels.nn.quantised_experts import is_parametrised, keeps_numbers_for_a_call, quantised_experts
from lora_kernels.ops import QuantisedWeight, lora_linear
from lora_kernels.ops.lora_linear.op import without_autocast
from lora_kernels.ops.quantised.op import codes_refusal
from lora_kernels.ops.registry import PREFERENCE, forced_backend

try:
    from peft.tuners.lora.layer import ParamWrapper
except ImportError as error:
    raise ImportError(f"lora_kernels cannot fuse the layers of peft {peft.__version__}: {error}") from error

_EXPERTS = "lora_kernels.ops.expert_lora_linear"
EXPERTS_ON = frozenset(
    device for device, order in PREFERENCE.items() if any(f"{_EXPERTS}.{b}" in sys.modules for b in order if b != "reference")
)
"""The kinds of devices that have kernels of experts."""
NESTED_HOOKS = "a hook waits for the call of base_layer"
CODES_TRANSPOSED = "the quantised weight is [in, out], which no kernel of a layer reads"
_BEHIND_HOOKS = (NESTED_HOOKS, ON_META)
_FURTHER = {ROUTED: 2, IDENTITIES: 2, SPLIT: 1}
"""Arguments after x."""


def read_parameters(layer: Any, inside: bool = False) -> Any:
    """(module, its form, each weight of the form with its adapter), or why PEFT must run the layer.
    `inside`: the hooks of its modules run around this."""
    wrappers: dict[str, Any] = {}
    module = layer
    while isinstance(module, ParamWrapper):
        if (reason := layer_refusal(module)) is not None:
            return reason
        if module is not layer and not inside and has_hooks(module):
            return NESTED_HOOKS
        if module.parameter_name in wrappers:
            return f"{module.parameter_name} is adapted twice"
        wrappers[module.parameter_name] = module
        module = module._modules["base_layer"]
    if not inside and has_hooks(module) and not _only_keeps_numbers(module):
        return NESTED_HOOKS
    form: Any = form_of(module)
    if type(form) is str:
        return form
    if not any(active_names(wrapper, wrapper.lora_A) for wrapper in wrappers.values()):
        return "no active adapter has weights here"
    if others := [name for name in wrappers if name not in form.weights]:
        return f"the adapted parameter is {others[0]}"
    found: list[Any] = []
    for name in form.weights:
        adapted = _read_adapted(module, name, wrappers.get(name), form)
        if type(adapted) is str:
            return adapted
        found.append(adapted)
    if form.kind == IDENTITIES:
        if type(module.identity_expert) is not nn.Identity:
            return f"the identity of the experts is {type_name(module.identity_expert)}"
        if type(found[0].w) is QuantisedWeight:
            return f"{form.weights[0]} is quantised, with the identities among its experts"
        # the forward never reads those of identities
        w, a, b = (t if t is None else t[: module.num_routed_experts] for t in found[0][:3])
        found[0] = found[0]._replace(w=w, a=a, b=b)
    if any(each.w.dtype is not found[0].w.dtype or each.w.shape[0] != found[0].w.shape[0] for each in found):
        return "the weights of the experts differ in dtype or number"
    return module, form, found


def _only_keeps_numbers(module: Any) -> bool:
    """Whether all that runs around the module's forward are bitsandbytes' hooks of codes."""
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    others = module._backward_hooks or module._backward_pre_hooks or "forward" in module.__dict__
    return not others and all(map(keeps_numbers_for_a_call, hooks))


def _read_adapted(module: Any, name: str, wrapper: Any, form: Form) -> Any:
    """One parameter with its adapters as one, or why PEFT must run the layer."""
    w = module._parameters.get(name)
    if w is None and is_parametrised(module, name):
        w = quantised_experts(module, name)
        if type(w) is str:
            return w
    elif (reason := frozen_refusal(w)) is not None:
        return f"{reason} ({name})"
    if w.dim() != (2 if form.kind == LINEAR else 3):
        return f"{name} has {w.dim()} dimensions"
    bias = module._parameters.get("bias" if form.kind == LINEAR else f"{name}_bias")
    if bias is not None and type(bias) not in PLAIN:
        return f"the bias is {type_name(bias)}"
    names = active_names(wrapper, wrapper.lora_A) if wrapper is not None else []
    terms: list[Any] = []
    for adapter in names:
        factors = _factors(wrapper, adapter, w, form.transposed)
        if type(factors) is str:
            return factors
        terms.append((*factors, wrapper.scaling[adapter]))
    if not terms:
        return Adapted(w, None, None, 1.0, bias)
    if len(terms) == 1:
        a, b, scale = terms[0]
        return Adapted(w, a, b, scale, bias)
    if any(a.dtype is not terms[0][0].dtype for a, *_ in terms):
        return f"adapters of {terms[0][0].dtype} and other dtypes are active together"
    # a 16-bit B times its scale would be rounded once more
    wide = torch.promote_types(terms[0][0].dtype, torch.float32)
    a = torch.cat([a.to(wide) for a, *_ in terms], -2)
    return Adapted(w, a, torch.cat([b.to(wide) * scale for _, b, scale in terms], -1), 1.0, bias)


def _factors(wrapper: Any, adapter: str, w: Tensor, transposed: bool) -> Any:
    """A [experts, r, in] and B [experts, out, r] as views of PEFT's weights, without the first
    dimension where W has none, or why PEFT must run the layer."""
    lora_a, lora_b = wrapper.lora_A._modules[adapter], wrapper.lora_B._modules[adapter]
    if type(lora_a) is not nn.Linear or type(lora_b) is not nn.Linear:
        return f"lora_A and lora_B are {type_name(lora_a)} and {type_name(lora_b)}"
    a: Any = lora_a._parameters.get("weight")
    b: Any = lora_b._parameters.get("weight")
    if (reason := factors_refusal(a, b)) is not None:
        return reason
    if a.is_meta or b.is_meta:
        return ON_META
    if wrapper.lora_variant.get(adapter) is not None or lora_b._parameters.get("bias") is not None:
        return f"{type_name(wrapper.lora_variant.get(adapter))} or a bias on a parameter"
    # PEFT 0.18 takes all as [in, out]
    experts, swapped = wrapper.num_experts, getattr(wrapper, "_did_swap_in_out_features", False)
    if w.dim() == 3:
        # of one expert PEFT adds BA as it would lie in [out, in]
        if w.shape[0] != experts or (experts == 1 and not swapped):
            return f"the parameter has the shape {list(w.shape)}, and PEFT's layer is of {experts} experts"
        a = a.reshape(experts, -1, a.shape[-1])
        b = b.reshape(b.shape[0], -1, experts).permute(2, 0, 1)
    elif experts != 1:
        return f"the parameter has the shape {list(w.shape)}, and PEFT's layer is of {experts} experts"
    # what PEFT adds to W is BA, or where it knows the weights as [in, out] its transpose
    if (w.dim() == 2 or swapped) is transposed:
        a, b = b.transpose(-2, -1), a.transpose(-2, -1)
    n_out, n_in = reversed(w.shape[-2:]) if transposed else w.shape[-2:]
    if a.shape[-1] != n_in or b.shape[-2] != n_out:
        return f"the parameter has the shape {list(w.shape)}, and A and B have {list(a.shape)} and {list(b.shape)}"
    return a, b


def _hooked_modules(layer: Any) -> list[nn.Module]:
    """The modules within that have hooks. PEFT reads A and B and calls neither, so of theirs only
    those that bring the weights."""
    found: list[nn.Module] = []
    module: Any = layer
    while isinstance(module, ParamWrapper):
        for group in (module.lora_A, module.lora_B):
            factors = [group._modules[name] for name in active_names(module, group)]
            found += [each for each in factors if has_hooks(each) and moves_weights(each) is None]
        module = module._modules["base_layer"]
        if has_hooks(module):
            found.append(module)
    return found


def _hooks_refusal(modules: list[nn.Module], x: Tensor | None) -> str | None:
    """Why the hooks cannot run around the kernels, for an input or for any."""
    for module in modules:
        if plain_class(module) is not type(module) or type(module).__name__ == FSDP1:
            return NESTED_HOOKS
        if (reason := moves_weights(module, x)) is not None:
            return NESTED_HOOKS if reason in ("", HOOKED) else reason
    return None


def _read_hooked(layer: Any, reason: str) -> Any:
    """What `read_parameters` gives inside the hooks, or the reason."""
    with lock_of(layer):
        modules = _hooked_modules(layer)
        refused = _hooks_refusal(modules, None) if modules else reason
    return read_parameters(layer, True) if refused is None else refused


def _run_hooked(layer: Any, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any], reason: str) -> Any:
    if torch.compiler.is_compiling():
        return reason
    # it would see calls of the modules with the layer's input and output
    if _has_any_global_hook():
        return EVERY
    y: Any = None

    def innermost(x: Tensor) -> Tensor:
        nonlocal y
        y = _run(layer, x, args, kwargs, True)
        # PEFT's forward runs once the hooks are done
        return x if type(y) is str else y

    # in another thread's call the modules look as if they were replaced
    with lock_of(layer):
        modules = _hooked_modules(layer)
        refused = (call_refusal(x) or _hooks_refusal(modules, x)) if modules else reason
        if refused is not None:
            return refused
        after = call_inside(modules, x, innermost)
    return y if type(y) is str else after


def run_parameters(layer: Any, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The output of a call, or why PEFT must run it."""
    y = _run(layer, x, args, kwargs, False)
    return _run_hooked(layer, x, args, kwargs, y) if type(y) is str and y in _BEHIND_HOOKS else y


def _run(layer: Any, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any], inside: bool) -> Any:
    found = read_parameters(layer, inside)
    if type(found) is str:
        return found
    module, form, adapted = found
    if kwargs or len(args) != _FURTHER.get(form.kind, 0):
        return ARGUMENTS
    if (reason := call_refusal(x)) is not None:
        return reason
    w = adapted[0].w
    if not multiplies(form, w, x):
        return f"the input is {x.dtype}"
    if form.kind == LINEAR:
        if form.transposed and type(w) is QuantisedWeight:
            return CODES_TRANSPOSED
        return _run_linear(form, adapted[0], x)
    if (reason := _kernels_refusal(w)) is not None:
        return reason
    if form.kind in (ROUTED, IDENTITIES):
        index, weights = args
        run, count = (run_routed, "num_experts") if form.kind == ROUTED else (run_with_identities, "num_routed_experts")
        most = most_of_index(module, w.shape[0]) if form.kind == ROUTED else module.total_experts - 1
        if (reason := _routed_refusal(getattr(module, count), x, index, weights, w.shape[0], most)) is not None:
            return reason
        return run(module, form, adapted, x, index, weights)
    if form.kind == SPLIT:
        (sizes,) = args
        if type(sizes) is not list or len(sizes) != w.shape[0] or x.dim() != 2 or sum(sizes) != x.shape[0]:
            return f"the sizes are not how many of the tokens each of {w.shape[0]} experts has"
        return run_split(form, adapted[0], x, sizes)
    if (fault := sorted_fault((x,), w.shape[0], module.hidden_size)) is not None:
        return f"in the call of the experts {fault}"
    return run_sorted(module, form, adapted, x)


def _run_linear(form: Form, adapted: Any, x: Tensor) -> Tensor:
    w, a, b, scale, bias, _ = adapted
    dtype = product_dtype(form, w, x)
    with without_autocast(x):
        return lora_linear(x.to(dtype), (w.t() if form.transposed else w).to(dtype), a, b, scale, bias)


def _kernels_refusal(w: Tensor | QuantisedWeight) -> str | None:
    """Why no kernel of experts runs where their weights are; the reference is slower than PEFT."""
    if type(w) is QuantisedWeight and not w.is_meta and (reason := codes_refusal(w)) is not None:
        return reason
    there = w.is_meta or w.device.type in EXPERTS_ON or forced_backend()
    return None if there else f"there are no kernels of experts for {w.device.type}"


def _routed_refusal(count: int, x: Tensor, index: Any, weights: Any, experts: int, most: int | None) -> str | None:
    if type(index) not in PLAIN or type(weights) not in PLAIN:
        return f"the experts' indices and weights are {type_name(index)} and {type_name(weights)}"
    if (fault := routed_fault((x, index, weights), most)) is not None:
        return f"in the call of the experts {fault}"
    return None if count == experts else f"the module has {count} experts, its weights {experts}"


class FusedParamWrapper(ParamWrapper):
    """peft.tuners.lora.layer.ParamWrapper; a call that the kernels cover runs there, any other in
    PEFT's own forward."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = run_parameters(self, x, args, kwargs)
        if type(y) is not str:
            return y
        count_fallback(self, y)
        return super().forward(x, *args, **kwargs)


# PEFT looks for the layers of a parameter by the name of their class
FusedParamWrapper.__name__ = ParamWrapper.__name__


def survey_parameter(name: str, layer: Any, survey: Survey) -> None:
    """Adds to the survey what the layer's next call would do if it were fused."""
    found = read_parameters(layer)
    if type(found) is str and found in _BEHIND_HOOKS:
        found = _read_hooked(layer, found)
    if type(found) is str:
        survey.left[name] = found
        return
    _, form, adapted = found
    # the weight that this layer adapts
    w, a, b, scale, bias, _ = adapted[form.weights.index(layer.parameter_name)]
    if form.kind == LINEAR:
        transposed_codes = CODES_TRANSPOSED if form.transposed and type(w) is QuantisedWeight else None
        if (reason := transposed_codes or device_refusal(w)) is not None:
            survey.left[name] = reason
        else:
            survey.add_layer(name, w.t() if form.transposed else w, bias, a, b, scale, 0.0, False)
    elif (reason := device_refusal(w) or _kernels_refusal(w)) is not None:
        survey.left[name] = reason
    else:
        survey.add_experts(name, w, bias, a, b, scale, form.transposed)
