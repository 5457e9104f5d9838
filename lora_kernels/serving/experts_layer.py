"""Experts whose tokens take another adapter for each sequence of a batch:

    y = W[e] x + s · B[e] A[e] x                                                                 (1)

with A, B and s of the adapter of the token that a row is of.

`expert_lora_linear` gives W[e] x of the rows, sorted by expert, and reads W of an expert once for
all adapters. `multi_lora_add_` then adds the rest: a pair of adapter and expert is a slot, so A and
B are read where a row wants them.
"""

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.nn.expert_checks import check_routed
from lora_kernels.nn.experts import Adapted, Routing, multiplies, run_routed
from lora_kernels.nn.forms import Form, form_of
from lora_kernels.nn.quantised_experts import is_parametrised, may_hold_codes
from lora_kernels.nn.quantised_experts_base import QuantisedExperts
from lora_kernels.ops.lora_linear.op import without_autocast
from lora_kernels.ops.multi_lora import BatchPlan, multi_lora_add_
from lora_kernels.serving.compiled import outside
from lora_kernels.serving.experts import KEY
from lora_kernels.serving.experts_site import ExpertsSite
from lora_kernels.serving.frame import Frame
from lora_kernels.serving.layer import Served
from lora_kernels.serving.routing import tensors_of
from lora_kernels.serving.scope import Scope


class ServedExperts(Served):
    """What a module of experts does in a batch. The module stays, with all that it has, and calls
    this from its `forward`."""

    def __init__(self, sites: Mapping[str, ExpertsSite], scope: Scope, name: str) -> None:
        self.sites = sites
        """By the name of the parameter."""
        self._codes: QuantisedExperts | None = None
        self.names = {parameter: f"{name}.{parameter}" for parameter in sites}
        self.learn_nothing(scope, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> "ServedExperts":
        """Of a copied model, whose slots no pool keeps."""
        return ServedExperts({}, copy.deepcopy(self.scope, memo), self.name)

    def is_changed(self, modules: frozenset[str]) -> bool:
        return any(name in modules for name in self.names.values())

    @staticmethod
    def wrap(call: Callable[..., Any]) -> Callable[..., Any]:
        def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            served: ServedExperts = module.__dict__[KEY]
            frame = served.frame_of(args, kwargs)
            if frame is None:
                if not may_hold_codes(module) or torch.compiler.is_compiling():
                    return call(module, *args, **kwargs)
                return served.base_output(module, call, args, kwargs)
            if torch.compiler.is_compiling():
                return outside.call(served.run, module, frame, call, args, kwargs)
            return served.run(module, frame, call, args, kwargs)

        return forward

    def frame_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Frame | None:
        """The batch that changes the experts in this call; None: there is none."""
        scope = self.scope
        frame = scope.current.get()
        if scope.openings and (frame is None or (scope.generators and not frame.bound)):
            frame = scope.resolve() or frame
        if frame is None:
            return None
        if frame.seen is not None:
            for x in tensors_of(args, kwargs)[:1]:
                frame.seen(self, x)
        return frame if self.is_changed(frame.modules) else None

    def run(self, module: nn.Module, frame: Frame, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The output for x [tokens, in], index and weights [tokens, k].

        Raises:
            TypeError, ValueError: the arguments are others, or it is not known whose the rows of x
                are.
        """
        form: Any = form_of(module)
        if isinstance(form, str):
            raise ValueError(f"adapters: {self.name}: {form}")
        x, index, weights = self._arguments(call, module, args, kwargs, next(iter(self.sites.values())).experts)
        held = self.codes_of(module, form)
        w: Any = module._parameters[form.weights[0]] if held is None else held
        if not (multiplies(form, w, x) if held is None else held.takes(form, x)):
            raise TypeError(f"adapters: {self.name}: x must have the dtype of {form.weights[0]}, {w.dtype}, found {x.dtype}")
        plan = frame.plans.get((self.layouts.get(1), x.shape)) or frame.plan_of(self, x, x.shape[:-1])
        assert plan is not None  # it is refused where an adapter changes the layer
        pool = frame.batch.pool
        for parameter, name in self.names.items() if pool is not None else ():
            weight = module._parameters.get(parameter) if held is None else held.parameter(parameter)
            pool.look_at_weight(name, weight, frame.modules)
        if frame.routes is None:
            return self.with_plan(module, form, held, frame, plan, x, index, weights)
        with torch._C.DisableTorchFunction():
            y = self.with_plan(module, form, held, frame, plan, x, index, weights)
        frame.routes.note(y, frame.routes.owners(x))
        return y

    def codes_of(self, module: nn.Module, form: Form) -> QuantisedExperts | None:
        """What says how the module's codes lie, if it has some now. One that it gets or loses
        later is another."""
        if not may_hold_codes(module):
            return None
        held = self._codes
        of_codes = [name for name in form.weights if is_parametrised(module, name)] or form.weights
        if held is None or held.module is not module or held.names != tuple(of_codes):
            held = self._codes = QuantisedExperts.of(module, form.weights)
        return held

    def base_output(self, module: nn.Module, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the module alone makes of its arguments; over codes on a CPU by the kernels, as for
        the rows of a batch."""
        form = form_of(module)
        held = None if isinstance(form, str) else self.codes_of(module, form)
        if held is None or isinstance(form, str):
            return call(module, *args, **kwargs)
        x, index, weights = self._arguments(call, module, args, kwargs, next(iter(held.shapes.values()))[0])
        if x.device.type != "cpu":
            return call(module, *args, **kwargs)
        return run_routed(module, form, base_matrices(module, form, held, x), x, index, weights)

    def _arguments(
        self, call: Any, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], experts: int
    ) -> tuple[Tensor, ...]:  # fmt: skip
        if kwargs:
            args = inspect.signature(call).bind(module, *args, **kwargs).args[1:]
        return check_routed(f"adapters: {self.name}", args, module, experts)

    def with_plan(
        self, module: nn.Module, form: Form, held: QuantisedExperts | None, frame: Frame, plan: BatchPlan, x: Tensor,
        index: Tensor, weights: Tensor,
    ) -> Tensor:  # fmt: skip
        plans: list[BatchPlan] = []

        def add(number: int, y: Tensor, rows: Tensor, routing: Routing) -> None:
            parameter = form.weights[number]
            if self.names.get(parameter) not in frame.modules:
                return
            site = self.sites[parameter]
            if not plans:
                chosen = index.reshape(-1)[routing.choices]
                plans.append(frame.batch.plan_of_experts(plan, routing.tokens, chosen, site.experts))
            with without_autocast(y):
                multi_lora_add_(y, rows.to(y.dtype), site.slots, plans[0])

        with torch.no_grad():
            adapted = base_matrices(module, form, held, x)
            return run_routed(module, form, adapted, x, index, weights, add)


def base_matrices(module: nn.Module, form: Form, held: QuantisedExperts | None, x: Tensor) -> list[Adapted]:
    """The matrices of a module without adapters, for a product of x."""
    parameters, found = module._parameters, []
    for name in form.weights:
        if held is not None and name in held.names:
            w: Any = held.weight(name, held.dtype_for(form, x))
        else:
            w = parameters[name].detach()  # type: ignore[union-attr]
        found.append(Adapted(w, None, None, 1.0, parameters.get(f"{name}_bias")))
    return found
