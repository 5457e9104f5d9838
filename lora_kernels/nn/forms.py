"""Modules whose forward is known, so that their parameters can be adapted without forming W + sBA.

Experts of transformers say themselves how they compute: `use_experts_implementation` gives their
forward to a function that reads a few attributes. Others are known by the source of their forward.
"""

import ast
import inspect
import sys
import textwrap
from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules.module import _has_any_global_hook

from lora_kernels.nn.quantised_experts import is_fp8, only_codes_parametrised, plain_class


class Form(NamedTuple):
    """How a module computes with its parameters."""

    weights: tuple[str, ...]
    """Those that may be adapted, in the order of their use."""
    transposed: bool
    """Whether they end in [in, out], not [out, in]."""
    kind: str
    """LINEAR, ROUTED, IDENTITIES, SORTED or SPLIT."""
    casts: bool = False
    """Whether products are in the dtype of the weights, whatever autocast says."""


LINEAR, ROUTED, IDENTITIES, SORTED, SPLIT = "linear", "routed", "routed with identities", "sorted", "split"
_OF_LINEAR = Form(("weight",), False, LINEAR)
_GATED = ("gate_up_proj", "down_proj")

_MATMUL = """
def forward(self, x):
    return x @ self.weight + self.bias
"""
_SORTED = """
def forward(self, hidden_states):
    hidden_states = hidden_states.view(self.gate_up_proj.shape[0], -1, self.hidden_size)
    gate_up = torch.bmm(hidden_states, self.gate_up_proj)
    gate, up = gate_up.chunk(2, dim=-1)
    next_states = torch.bmm((up * self.act_fn(gate)), self.down_proj)
    next_states = next_states.view(-1, self.hidden_size)
    return next_states
"""
_LOOP = """
def forward(self, hidden_states, top_k_index, top_k_weights):
    final = torch.zeros_like(hidden_states)
    with torch.no_grad():
        mask = F.one_hot(top_k_index, num_classes=self.num_experts + 1).permute(2, 1, 0)
        hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()
    for expert_idx in hit:
        expert_idx = expert_idx[0]
        if expert_idx == self.num_experts:
            continue
        top_k_pos, token_idx = torch.where(mask[expert_idx])
        current = self._apply_gate(F.linear(hidden_states[token_idx], self.gate_up_proj[expert_idx]))
        current = F.linear(current, self.down_proj[expert_idx]) * top_k_weights[token_idx, top_k_pos, None]
        final.index_add_(0, token_idx, current.to(final.dtype))
    return final
"""
_LOOP_WITH_IDENTITIES = """
def forward(self, hidden_states, top_k_index, top_k_weights):
    final_hidden_states = torch.zeros_like(hidden_states)
    if top_k_index.numel() == 0:
        return final_hidden_states
    expert_mask = torch.nn.functional.one_hot(top_k_index, num_classes=self.total_experts).permute(2, 1, 0)
    expert_hit = torch.greater(expert_mask.sum(dim=(-1, -2)), 0).nonzero(as_tuple=False)
    for expert_idx_tensor in expert_hit:
        expert_idx = int(expert_idx_tensor.item())
        selection_idx, token_idx = torch.where(expert_mask[expert_idx].squeeze(0))
        if token_idx.numel() == 0:
            continue
        current_state = hidden_states[token_idx]
        if expert_idx >= self.num_routed_experts or self.gate_up_proj is None:
            current_hidden_states = self.identity_expert(current_state)
        else:
            gate, up = F.linear(current_state, self.gate_up_proj[expert_idx]).chunk(2, dim=-1)
            current_hidden_states = self.act_fn(gate) * up
            current_hidden_states = F.linear(current_hidden_states, self.down_proj[expert_idx])
        current_hidden_states = current_hidden_states * top_k_weights[token_idx, selection_idx, None]
        final_hidden_states.index_add_(0, token_idx, current_hidden_states.to(hidden_states.dtype))
    return final_hidden_states
"""
_SPLIT = """
def forward(self, inputs, expert_size):
    input_list = inputs.split(expert_size, dim=0)
    output_list = []
    for i in range(self.num_experts):
        output_list.append(F.linear(input_list[i], self.weight[i]))
    results = torch.cat(output_list, dim=0)
    return results
"""
_SOURCES = (
    (_MATMUL, Form(("weight",), True, LINEAR)),
    (_SORTED, Form(_GATED, True, SORTED)),
    (_LOOP, Form(_GATED, False, ROUTED)),
    (_LOOP_WITH_IDENTITIES, Form(_GATED, False, IDENTITIES)),
    (_SPLIT, Form(("weight",), False, SPLIT)),
)
_GATES = {
    ("torch.nn.modules.activation", "SiLU"): "silu",
    ("transformers.activations", "SiLUActivation"): "silu",
    ("transformers.activations", "GELUTanh"): "gelu_tanh",
}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_NAMES = {"torch": torch, "F": functional}
_forms: dict[type[nn.Module], tuple[Any, Form | None]] = {nn.Linear: (nn.Linear.forward, _OF_LINEAR)}
"""Of each class its forward, which a library may replace later, and what that computes."""
# the attributes of the instance say the rest; of the latter unless its own forward runs
_DECORATED, _WITHOUT_EAGER = Form((), False, ROUTED), Form(("",), False, ROUTED)


def form_of(module: Any, cls: Any = None) -> Form | str:
    """How the module computes, or one of the class `cls` with its attributes; or why that is not
    known."""
    if "parametrizations" in module._modules and (cls is not None or not only_codes_parametrised(module)):
        return "another parametrization is on the module"
    cls = cls or plain_class(module)
    if is_fp8(cls):
        return Form(_GATED if module.has_gate else ("up_proj", "down_proj"), False, ROUTED)
    held = _forms.get(cls)
    if held is None or held[0] is not cls.forward:
        held = _forms[cls] = cls.forward, _class_form(cls)
    form = held[1]
    if form is None:
        return f"the forward of {cls.__name__} is not known"
    return _decorated_form(module, cls, form) if form in (_DECORATED, _WITHOUT_EAGER) else form


def gate_of(module: Any) -> str | None:
    """What stands between the two products of experts, "silu" or "gelu_tanh", if it is the plain
    gate of transformers and nothing watches it."""
    if not torch.compiler.is_compiling() and _has_any_global_hook():
        return None
    moe = _interface_module()
    # a layer of ours has its module's methods; where there is no such one it is the plain gate
    cls = module.__dict__.get("_origin", (type(module),))[0]
    apply = getattr(cls, "_apply_gate", None)
    if "_apply_gate" in module.__dict__ or (apply is not None and (moe is None or apply is not moe._default_apply_gate)):
        return None
    act = module.act_fn
    kind = _GATES.get((type(act).__module__, type(act).__qualname__))
    if kind is None or any(getattr(act, hooks) for hooks in _HOOKS) or "forward" in act.__dict__:
        return None
    partial = getattr(act, "act", None)  # GELUTanh has another formula, too
    return kind if kind == "silu" or getattr(partial, "keywords", None) == {"approximate": "tanh"} else None


def _class_form(cls: Any) -> Form | None:
    forward = cls.forward
    moe = _interface_module()
    if moe is not None and getattr(forward, "__code__", None) is _wrapper_code(moe):
        if _interface(forward) is not moe.ALL_EXPERTS_FUNCTIONS:
            return None
        # one model's computes in float32 whatever it gets
        is_known = (
            cls.__module__.startswith("transformers.models.") and "float" not in inspect.unwrap(forward).__code__.co_names
        )
        return _DECORATED if is_known else _WITHOUT_EAGER
    return next((form for source, form in _SOURCES if _has_source(forward, source)), None)


def _decorated_form(module: Any, cls: Any, form: Form) -> Form | str:
    """Of experts whose forward transformers' interface chooses."""
    moe: Any = _interface_module()
    name = module.config._experts_implementation or "eager"
    # no function is "eager" but the class's own, unless somebody registered one
    wanted = {"eager": None, "grouped_mm": moe.grouped_mm_experts_forward, "batched_mm": moe.batched_mm_experts_forward}
    if name not in wanted or moe.ALL_EXPERTS_FUNCTIONS.get(name) is not wanted[name]:
        return f"the experts' implementation is {name}"
    if name == "eager" and form is _WITHOUT_EAGER:
        return f"the eager forward of {cls.__name__} is not known"
    weights = _GATED if module.has_gate else ("up_proj", "down_proj")
    return Form(weights, bool(module.is_transposed), ROUTED, name == "grouped_mm")


def _interface_module() -> Any:
    """Of transformers 5; None while nobody has imported it, for then there are no such classes."""
    return sys.modules.get("transformers.integrations.moe")


def _wrapper_code(moe: Any) -> Any:
    """The code of the forward that transformers' decorator gives to a class of experts."""
    decorated = moe.use_experts_implementation(type("_Probe", (nn.Module,), {}))
    return decorated.forward.__code__


def _interface(forward: Any) -> Any:
    """The interface that chooses for a decorated class."""
    names = forward.__code__.co_freevars
    return forward.__closure__[names.index("experts_interface")].cell_contents if "experts_interface" in names else None


def _has_source(forward: Any, source: str) -> bool:
    """Whether a function does what the source says, up to annotations, defaults and docstrings."""
    if not isinstance(forward, FunctionType) or forward.__code__.co_freevars:
        return False
    found = _parsed(forward)
    used = {name: thing for name, thing in _NAMES.items() if name in forward.__code__.co_names}
    return found == _bare(source) and all(forward.__globals__.get(name) is thing for name, thing in used.items())


def _parsed(function: Callable[..., Any]) -> str | None:
    try:
        return _bare(inspect.getsource(function))
    except (OSError, TypeError, SyntaxError):
        return None


def _bare(source: str) -> str:
    """The arguments and the body of a function, as text."""
    function: Any = ast.parse(textwrap.dedent(source)).body[0]
    body = function.body
    if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        body = body[1:]
    names = [argument.arg for argument in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]
    return "\n".join([str(names), str(function.decorator_list), *map(ast.dump, body)])
