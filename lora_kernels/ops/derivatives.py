"""Derivatives that no kernel computes: those of a backward, forward mode, and torch.func's
transforms. They run the formula of the reference, in plain torch ops, which torch differentiates
as often as is asked.
"""

from collections.abc import Callable
from contextvars import Context
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_flatten, tree_unflatten

under_functorch = torch._C._are_functorch_transforms_active
_compiling = torch.compiler.is_compiling
# what is_grads_batched makes of dy; older than torch.func
_is_batched = torch._C._functorch.is_legacy_batchedtensor


def transformed() -> bool:
    """Whether torch.func (jvp, vmap, grad, …) or an open level of forward mode looks at what runs.

    A kernel would drop the tangent in silence: an op then runs its formula. Not for functionalize,
    which keeps ops as they are.
    """
    return forward_ad._current_level >= 0 or (under_functorch() and (_compiling() or _sees_into_ops()))


def _sees_into_ops() -> bool:
    levels = torch._C._functorch.get_interpreter_stack() or []
    return any(level.key() != torch._C._functorch.TransformType.Functionalize for level in levels)


def differentiable(gradients: Callable[..., Any], formula: Callable[..., Any], call: Any, dy: Tensor, *more: Tensor) -> Any:
    """gradients(call) in a backward, under the settings (use_backend, explain) of the thread that
    called for it, since autograd runs a GPU's in one of its own.

    Under create_graph what is returned has a graph: the values are those of `gradients`, the
    derivatives those of `formula`, which computes the same from the inputs alone. `call` is a
    structure as `declare` has it. Many `dy` at once (is_grads_batched), and one with a tangent,
    take the formula, too.
    """
    if not _compiling():
        if forward_ad._current_level >= 0 or under_functorch() or _is_batched(dy) or (more and any(map(_is_batched, more))):
            return formula(call)
        if (settings := _context_of_caller()) is not None:
            gradients = partial(settings.run, gradients)
    if torch.is_grad_enabled():  # so it is under create_graph alone
        leaves, structure = tree_flatten(call)
        return _Gradients.apply(gradients, formula, structure, *leaves)
    return gradients(call)


def _context_of_caller() -> Context | None:
    """That of the call of backward(); None where this torch keeps none."""
    if not torch._C._is_key_in_tls("context"):
        return None
    kept = cast(Context | None, torch._C._get_obj_in_tls("context"))
    return kept and kept.copy()  # threads of several GPUs cannot enter one


class _Gradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gradients, formula, structure, *leaves):
        ctx.formula, ctx.structure = formula, structure
        ctx.numbers = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        ctx.save_for_backward(*(leaf if isinstance(leaf, Tensor) else None for leaf in leaves))
        ctx.set_materialize_grads(False)
        return gradients(tree_unflatten(leaves, structure))

    @staticmethod
    def backward(ctx, *outer):
        again = torch.is_grad_enabled()
        leaves = [number if t is None else t for t, number in zip(ctx.saved_tensors, ctx.numbers, strict=True)]
        wanted = [i for i, need in enumerate(ctx.needs_input_grad[3:]) if need]
        with torch.enable_grad():
            for i in wanted:
                # a view of its own: what one input owes to another counts outside of here
                leaves[i] = leaves[i].view_as(leaves[i]) if again else leaves[i].detach().requires_grad_()
            found = ctx.formula(tree_unflatten(leaves, ctx.structure))
        pairs = [(g, d) for g, d in zip(found, outer, strict=True) if g is not None and d is not None and g.requires_grad]
        grads = [None] * len(leaves)
        if pairs:
            inner, given = zip(*pairs, strict=True)
            of_wanted = torch.autograd.grad(inner, [leaves[i] for i in wanted], given, create_graph=again, allow_unused=True)
            for i, grad in zip(wanted, of_wanted, strict=True):
                grads[i] = grad
        return None, None, None, *grads
